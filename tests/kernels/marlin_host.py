"""Runs the CUDA sources of the Marlin kernel on the CPU, under marlin_host.h, where a GPU would run them."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

from gptq_fx.kernels.marlin import variants
from gptq_fx.kernels.marlin.launch import Device

PRIMITIVES = (Path(__file__).parent / "marlin_host.h").read_text()
CXX = shutil.which("g++") or shutil.which("clang++")
FOLDER = Path(tempfile.gettempdir()) / "gptq_fx_marlin_host"
A_GPU = Device(-1, "sm_90a", 3, 228 * 1024, 227 * 1024)  # with few multiprocessors: tiles are shared

ENTRY = """
template <class Args> static void call(void (*kernel)(const Args), const void* a) {{
    kernel(*static_cast<const Args*>(a));
}}
extern "C" void run(const void* a, u32 blocks, u32 rows, u32 threads, u32 shared, u32 cluster, int order) {{
    host::launch([=] {{ call({kernel}, a); }}, blocks, rows, threads, shared, cluster, order);
}}
"""


@functools.cache
def build(source: str, kernel: str) -> ctypes.CDLL:
    source += ENTRY.format(kernel=kernel)
    name = hashlib.sha256(source.encode()).hexdigest()[:20]
    library = FOLDER / f"{name}.so"
    if not library.exists():
        FOLDER.mkdir(exist_ok=True)
        path = FOLDER / f"{name}.{os.getpid()}.cpp"  # several processes may build the same
        path.write_text(source)
        # Some distributions turn on a check that takes a jump from fiber to fiber for a broken stack.
        flags = ["-std=c++17", "-O1", "-fno-strict-aliasing", "-w", "-U_FORTIFY_SOURCE", "-shared", "-fPIC"]
        made = path.with_suffix(".tmp")
        subprocess.run([str(CXX), *flags, str(path), "-o", str(made)], check=True)
        made.replace(library)
    return ctypes.CDLL(str(library))


class HostFunction:
    """In place of launch.Function. order: of blocks: 0 rising, 1 falling, above: shuffled."""

    order = 0
    launches: list[str] = []  # noqa: RUF012
    clusters_launched: set[int] = set()  # noqa: RUF012

    def __init__(self, source, name, where, threads, shared, arguments):
        self.library = build(source, name)
        self.name, self.threads, self.shared = name, threads, shared
        self.pack = struct.Struct(arguments).pack
        self.resident = 2 * where.multiprocessors

    def clusters(self, size):
        return self.resident // size

    def __call__(self, blocks, rows, *arguments, cluster=1, shared=None):
        HostFunction.launches.append(self.name)
        HostFunction.clusters_launched.add(cluster)
        packed = self.pack(*arguments)
        buffer = ctypes.create_string_buffer(packed, len(packed))
        self.library.run(
            buffer, blocks, rows, self.threads, shared or self.shared, cluster, HostFunction.order
        )


def text(name: str) -> str:
    """variants.text, with other primitives."""
    return PRIMITIVES if name == "ptx.cuh" else (variants.FOLDER / name).read_text()
