"""Empty stand-ins for the libraries of CANN, so that `import torch_npu` works on a machine without an NPU.

    python make_stubs.py FOLDER    # by a Python that has torch and torch_npu; needs cc, nm and readelf
    LD_LIBRARY_PATH=FOLDER TORCH_DEVICE_BACKEND_AUTOLOAD=0 python -c "import torch, torch_npu"

torch_npu's libraries are linked with DF_BIND_NOW: each symbol they miss must exist, though none is called
before the first tensor on an NPU. All are functions that return 0, but for the few of BY_HAND, which the
import itself calls. What works then is what needs no NPU: schemas, meta kernels, fake tensors on "npu".
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

C_LIBRARIES = (
    *("libc.so.6", "libm.so.6", "libdl.so.2", "librt.so.1", "libpthread.so.0"),
    *("libstdc++.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"),
)

BY_HAND = {
    "aclrtGetDeviceCount": "int aclrtGetDeviceCount(unsigned *n) { *n = 0; return 0; }",
    "aclrtGetDevice": "int aclrtGetDevice(int *d) { *d = 0; return 107002; }",  # no context yet
    "aclrtGetCurrentContext": "int aclrtGetCurrentContext(void **c) { *c = 0; return 0; }",
    "aclrtGetSocName": 'const char *aclrtGetSocName(void) { return "Ascend910B2"; }',
    "aclGetRecentErrMsg": 'const char *aclGetRecentErrMsg(void) { return ""; }',
    "vsnprintf_s": """int vsnprintf_s(char *to, size_t size, size_t most, const char *format, va_list args) {
    return vsnprintf(to, most + 1 < size ? most + 1 : size, format, args);
}""",
    "snprintf_s": """int snprintf_s(char *to, size_t size, size_t most, const char *format, ...) {
    va_list args;
    va_start(args, format);
    int written = vsnprintf(to, most + 1 < size ? most + 1 : size, format, args);
    va_end(args);
    return written;
}""",
    "strcpy_s": """int strcpy_s(char *to, size_t size, const char *from) {
    snprintf(to, size, "%s", from);
    return 0;
}""",
}


def output_of(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def symbols(library: Path, which: str) -> set[str]:
    """The names nm lists, without versions; weak undefined ones are left out, since they may stay so."""
    rows = [line.split() for line in output_of("nm", "-D", which, library).splitlines()]
    return {row[-1].partition("@")[0] for row in rows if len(row) > 1 and row[-2] not in ("w", "v")}


def needed(library: Path) -> set[str]:
    lines = output_of("readelf", "-d", library).splitlines()
    return {line.split("[")[1].rstrip("]") for line in lines if "(NEEDED)" in line}


def c_libraries() -> list[Path]:
    """Those of C_LIBRARIES that the compiler finds: it repeats the name of one that it does not."""
    found = {name: Path(output_of("cc", f"-print-file-name={name}").strip()) for name in C_LIBRARIES}
    return [path for name, path in found.items() if str(path) != name]


def make(folder: Path, packages: Path) -> tuple[list[str], list[str]]:
    """Build the libraries that torch_npu of `packages` misses -> their names, and the symbols in them."""
    npu = packages / "torch_npu"
    ours = [*npu.glob("lib/*.so"), *npu.glob("_C*.so"), *npu.glob("dynamo/torchair/core/*.so")]
    if not ours:
        raise SystemExit(f"no torch_npu in {packages}")
    system = c_libraries()
    there = [*ours, *(packages / "torch/lib").glob("*.so*"), *system]
    defined = set().union(*(symbols(path, "--defined-only") for path in there))
    wanted = set().union(*(symbols(path, "--undefined-only") for path in ours)) - defined
    missing = sorted(name for name in wanted if not name.startswith(("Py", "_Py")))
    names = {path.name for path in there} | set(C_LIBRARIES)
    absent = sorted(set().union(*(needed(path) for path in ours)) - names)
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "stubs.c"
    lines = ["#include <stdarg.h>", "#include <stddef.h>", "#include <stdio.h>", *BY_HAND.values()]
    lines += [f"long {name}(void) {{ return 0; }}" for name in missing if name not in BY_HAND]
    source.write_text("\n".join(lines) + "\n")
    for name in absent:  # all of it in each: the first that is loaded serves
        flags = ["-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{name}"]
        output_of("cc", *flags, "-o", folder / name, source)
    return absent, missing


if __name__ == "__main__":
    libraries, missing = make(Path(sys.argv[1]), Path(sysconfig.get_paths()["purelib"]))
    print(f"{len(missing)} symbols in {', '.join(libraries)}")
