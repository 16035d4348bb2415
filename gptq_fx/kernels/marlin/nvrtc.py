"""CUDA C++ to machine code, by NVRTC from a pip package: no nvcc, no headers, no GPU. Results stay on disk.

The library is looked for in the wheels that PyTorch brings (nvidia-cuda-nvrtc), then wherever the loader
finds one. It is spoken to through ctypes: a handful of C functions whose signatures are fixed.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import tempfile
from pathlib import Path

import torch

from gptq_fx.errors import KernelError

log = logging.getLogger(__name__)

OPTIONS = ("--std=c++17",)
FEWEST = "sm_80"  # cp.async, mma of bf16


def _libraries() -> list[str]:
    """Where NVRTC may be, the version that fits PyTorch first."""
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found = [str(path) for folder in folders for path in Path(folder).glob("*/lib/libnvrtc.so.*")]
    wanted = f".so.{(torch.version.cuda or '13').partition('.')[0]}"
    found.sort(key=lambda path: not path.endswith(wanted))
    return [*found, f"libnvrtc{wanted}", "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]


@functools.cache
def library() -> ctypes.CDLL | None:
    """NVRTC, or None where there is none."""
    for path in _libraries():
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    return None


def available() -> str | None:
    """None, or what is missing."""
    if library() is not None:
        return None
    return "NVRTC is not found: `pip install nvidia-cuda-nvrtc` (PyTorch for CUDA brings it)"


def _call(name: str, *args: object) -> None:
    nvrtc = library()
    assert nvrtc is not None
    if code := getattr(nvrtc, name)(*args):
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise KernelError(f"{name}: {nvrtc.nvrtcGetErrorString(code).decode()}")


@functools.cache
def version() -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


@functools.cache
def architectures() -> tuple[str, ...]:
    """The architectures that this NVRTC knows and the sources admit ("sm_80", ...)."""
    count = ctypes.c_int()
    _call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
    numbers = (ctypes.c_int * count.value)()
    _call("nvrtcGetSupportedArchs", numbers)
    return tuple(f"sm_{n}" for n in sorted(numbers) if n >= int(FEWEST.partition("_")[2]))


def cache_folder() -> Path:
    """GPTQ_FX_CACHE, or gptq_fx in the user's folder of caches."""
    if own := os.environ.get("GPTQ_FX_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptq_fx"


def compile(source: str, arch: str, name: str) -> bytes:
    """The machine code (cubin) of `source` for `arch`, from the cache if it is there.

    name: for messages. Raises KernelError where there is no NVRTC, it does not know `arch`, or it refuses the
    source.
    """
    if reason := available():
        raise KernelError(f"{name}: {reason}")
    key = "\0".join([source, arch, *OPTIONS, version()])
    path = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()}.cubin"
    cached = _read(path)
    if cached is None:
        cached, _ = _compile(source, arch, name)
        _write(path, cached)
    return cached


def _read(path: Path) -> bytes | None:
    """What _write wrote, None where there is nothing or it is damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, code = content[:32], content[32:]
    return code if hashlib.sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> None:
    """At once or not at all: several processes may compile the same."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(file.name, path)
    except OSError as error:
        log.warning("compiled kernels are not kept, every process compiles its own: %s", error)


def resources(source: str, arch: str, name: str) -> str:
    """What the assembler says of registers, spills and memory. Not from the cache."""
    if reason := available():
        raise KernelError(f"{name}: {reason}")
    return _compile(source, arch, name, "--ptxas-options=-v")[1]


def _compile(source: str, arch: str, name: str, *more: str) -> tuple[bytes, str]:
    """-> the machine code, and what the compiler said."""
    program = ctypes.c_void_p()
    _call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), f"{name}.cu".encode(), 0, None, None)
    try:
        options = [f"--gpu-architecture={arch}", *OPTIONS, *more]
        try:
            _call(
                "nvrtcCompileProgram",
                program,
                len(options),
                (ctypes.c_char_p * len(options))(*(option.encode() for option in options)),
            )
        except KernelError as error:
            said = _log(program)
            known = "" if arch.rstrip("af") in architectures() else f". Legal: {', '.join(architectures())}"
            raise KernelError(f"{name} for {arch} by NVRTC {version()}: {error}{known}\n{said}") from None
        return _text(program, "CUBIN"), _log(program)
    finally:
        _call("nvrtcDestroyProgram", ctypes.byref(program))


def _text(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    _call(f"nvrtcGet{what}", program, buffer)
    return buffer.raw


def _log(program: ctypes.c_void_p) -> str:
    return _text(program, "ProgramLog").rstrip(b"\0").decode(errors="replace").strip()
