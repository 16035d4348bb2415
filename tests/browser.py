"""A page in a real browser: Chromium without a window, and without a network."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
MISSING = f"no browser: none of {', '.join(NAMES)} in PATH, and CHROME names none"


def find() -> str | None:
    """The program, or None."""
    named = os.environ.get("CHROME")
    return named if named and shutil.which(named) else next(filter(None, map(shutil.which, NAMES)), None)


def run(page: Path, script: str) -> Any:
    """What the body of a JavaScript function returns, once the page is loaded; and what went wrong there.

    Returns {"value": ..., "errors": [...], "loaded": [addresses of what the page fetched]}.
    """
    watch = "<script>window.errors=[];addEventListener('error',e=>errors.push(e.message),true)</script>"
    act = f"""<script>{{
    const value = (() => {{ {script} }})();
    const loaded = performance.getEntriesByType("resource").map(entry => entry.name);
    const found = document.createElement("pre");
    found.id = "found";
    found.textContent = JSON.stringify({{ value, errors, loaded }});
    document.body.append(found);
    }}</script>"""
    driven = page.with_suffix(".driven.html")
    text = page.read_text().replace("<head>", f"<head>{watch}").replace("</body>", f"{act}</body>")
    driven.write_text(text)
    chrome = find()
    assert chrome is not None, MISSING
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom"]
    offline = "--host-resolver-rules=MAP * ~NOTFOUND"
    command = [chrome, *flags, offline, f"--user-data-dir={page.parent / 'profile'}", driven.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, f"the browser gave no answer: {done.stderr[-2000:]}"
    return json.loads(unescape(found[1]))
