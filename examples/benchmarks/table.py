"""Results as markdown: under which conditions, and one table."""

import argparse
import datetime
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the tables to this file, too")
    return parser


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{cpu()}, {torch.backends.cpu.get_cpu_capability()}"


def installed(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} not installed"


def conditions(title: str) -> str:
    packages = map(installed, ("torch", "transformers", "torchao", "gptqmodel", "gptq-fx"))
    facts = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "versions": ", ".join((f"Python {platform.python_version()}", *packages)),
        "command": f"`python {shlex.join(_without_out(sys.argv))}`",
    }
    return "\n".join((f"# {title}", "", *(f"* {key}: {value}" for key, value in facts.items())))


def _without_out(argv: Sequence[str]) -> list[str]:
    """Where the table went, or the repository lies, does not matter to who reads it."""
    kept = [os.path.relpath(argv[0], Path(__file__).parents[2]), *argv[1:]]
    if "--out" in kept:
        place = kept.index("--out")
        del kept[place : place + 2]
    return kept


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column is aligned to the left, the others, which are numbers, to the right."""
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def publish(text: str, out: Path | None) -> None:
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")
