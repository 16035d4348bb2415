"""Compiles and runs the CUDA sources of the Marlin kernel on the CPU, under marlin_host.h."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

PRIMITIVES = (Path(__file__).parent / "marlin_host.h").read_text()
CXX = shutil.which("g++") or shutil.which("clang++")
FOLDER = Path(tempfile.gettempdir()) / "gptq_fx_marlin_host"

ENTRY = """
extern "C" void run(const {args}* a, u32 blocks, u32 threads, u32 shared, int order) {{
    host::launch([=] {{ {kernel}(*a); }}, blocks, threads, shared, order);
}}
"""


@functools.cache
def build(source: str, kernel: str, args: str) -> ctypes.CDLL:
    """source: made with PRIMITIVES; kernel(const args a) is what `run` of the library runs."""
    source += ENTRY.format(kernel=kernel, args=args)
    name = hashlib.sha256(source.encode()).hexdigest()[:20]
    library = FOLDER / f"{name}.so"
    if not library.exists():
        FOLDER.mkdir(exist_ok=True)
        path = FOLDER / f"{name}.cpp"
        path.write_text(source)
        flags = ["-std=c++17", "-O1", "-fno-strict-aliasing", "-w", "-shared", "-fPIC"]
        made = library.with_suffix(".tmp")
        subprocess.run([str(CXX), *flags, str(path), "-o", str(made)], check=True)
        made.replace(library)
    return ctypes.CDLL(str(library))


def run(library: ctypes.CDLL, args: bytes, blocks: int, threads: int, shared: int, order: int) -> None:
    """order: of the blocks: 0 rising, 1 falling, 2 mixed."""
    buffer = ctypes.create_string_buffer(args, len(args))
    library.run(buffer, blocks, threads, shared, order)
