"""English prose for calibration and perplexity: Debian's package `anarchism` (An Anarchist FAQ, GPL-2+)."""

import random
import re
import subprocess
import tempfile
from html.parser import HTMLParser
from pathlib import Path

PAGES = "usr/share/doc/anarchism/html/*.html"
LINES = {
    "p",
    "div",
    "li",
    "h1",
    "h2",
    "h3",
    "h4",
    "br",
    "blockquote",
    "tr",
    "td",
    "ul",
    "ol",
    "dt",
    "dd",
    "pre",
}
TEST_CHARACTERS = 1_000_000


class Paragraphs(HTMLParser):
    """The paragraphs of a page, in order."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.hidden += tag in ("script", "style", "head")
        if tag in LINES:
            self.pieces.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden = max(0, self.hidden - (tag in ("script", "style", "head")))
        if tag in LINES:
            self.pieces.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.pieces.append(re.sub(r"\s+", " ", data))

    @property
    def texts(self) -> list[str]:
        lines = (re.sub(r"\s+", " ", line).strip() for line in "".join(self.pieces).split("\n"))
        return [line for line in lines if len(line) > 80]  # menus and headings are shorter


def texts(cache: Path) -> tuple[str, str]:
    """(train, test): whole pages each, none in both. The first call downloads 7 MB with apt-get."""
    train, test = cache / "anarchism.train.txt", cache / "anarchism.test.txt"
    if not train.exists():
        cache.mkdir(parents=True, exist_ok=True)
        split = _split(_pages())
        for path, pages in zip((test, train), split, strict=True):
            path.write_text("\n\n".join(pages))
    return train.read_text(), test.read_text()


def _pages() -> list[str]:
    """The text of each page; a paragraph that several pages share counts for the first."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", "anarchism"], check=True, cwd=folder)
        (package,) = Path(folder).glob("*.deb")
        subprocess.run(["dpkg", "-x", package, folder], check=True)
        seen: set[str] = set()
        pages = []
        for path in sorted(Path(folder).glob(PAGES)):
            parser = Paragraphs()
            parser.feed(path.read_bytes().decode("utf-8", "replace"))
            new = [text for text in parser.texts if text not in seen]
            seen.update(new)
            if sum(map(len, new)) > 2000:
                pages.append("\n\n".join(new))
    return pages


def _split(pages: list[str]) -> tuple[list[str], list[str]]:
    random.Random(0).shuffle(pages)
    test: list[str] = []
    while pages and sum(map(len, test)) < TEST_CHARACTERS:
        test.append(pages.pop(0))
    return test, pages
