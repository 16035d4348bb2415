"""Machine code on a GPU: loading it, and launching with little Python, through ctypes to the driver."""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_fx.errors import KernelError
from gptq_fx.kernels.marlin import nvrtc

FEWEST_CAPABILITY = (8, 0)
COUNTERS = 4096  # of one stream; no launch has more blocks that share a tile
STREAMS = 64  # that counters are made for at a time
OVERLAP = True  # the start of a kernel with the end of the one before, where the architecture can
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_CLUSTER = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_PARAMETERS = ctypes.c_char_p * 1
_lock = threading.Lock()


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute"""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig"""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


@functools.cache
def _attributes(overlap: bool, cluster: int) -> ctypes.Array[_Attribute]:
    chosen = []
    if overlap:
        chosen.append(_Attribute(_STREAM_SERIALIZATION, 0, (ctypes.c_int * 16)(1)))
    if cluster > 1:
        chosen.append(_Attribute(_CLUSTER, 0, (ctypes.c_int * 16)(cluster, 1, 1)))
    return (_Attribute * len(chosen))(*chosen)


@functools.cache
def driver() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    library.cuLaunchKernelEx.argtypes = [ctypes.c_void_p] * 4
    return library


def _check(code: int, what: str) -> None:
    if code:
        library = driver()
        said = ctypes.c_char_p()
        assert library is not None
        library.cuGetErrorString(code, ctypes.byref(said))
        raise KernelError(f"{what}: {(said.value or b'unknown error').decode()} ({code})")


@dataclass(frozen=True)
class Device:
    """A GPU: its number, architecture, multiprocessors, and bytes of shared memory."""

    @property
    def has_wgmma(self) -> bool:
        return self.arch == "sm_90a"

    @property
    def has_clusters(self) -> bool:
        return int(self.arch[3:].rstrip("a")) >= 90

    index: int
    arch: str
    multiprocessors: int
    shared_per_multiprocessor: int
    shared_per_block: int


@functools.cache
def device(index: int) -> Device:
    """The GPU of that number. Raises KernelError where it is too old."""
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    if capability < FEWEST_CAPABILITY:
        raise KernelError(
            f"{properties.name} has compute capability {capability[0]}.{capability[1]}. "
            f"Legal: {FEWEST_CAPABILITY[0]}.{FEWEST_CAPABILITY[1]} and above"
        )
    arch = f"sm_{properties.major}{properties.minor}" + "a" * (capability == (9, 0))
    return Device(
        index,
        arch,
        properties.multi_processor_count,
        properties.shared_memory_per_multiprocessor,
        properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
    )


class Function:
    """A kernel on a GPU. resident: how many of its blocks the GPU holds at a time."""

    def __init__(
        self, source: str, name: str, where: Device, threads: int, shared: int, arguments: str
    ) -> None:
        """arguments: the one struct that the kernel takes, as `struct` spells it."""
        code = nvrtc.compile(source, where.arch, name)
        library = driver()
        assert library is not None
        self._library = library
        self._pack = struct.Struct(arguments).pack
        self.threads, self.shared, self.index = threads, shared, where.index
        self._overlaps = where.has_clusters  # the same architectures have both
        with torch.cuda.device(where.index):
            self._code, module, self._handle = code, ctypes.c_void_p(), ctypes.c_void_p()
            _check(library.cuModuleLoadData(ctypes.byref(module), code), f"loading {name}")
            _check(library.cuModuleGetFunction(ctypes.byref(self._handle), module, name.encode()), name)
            _check(library.cuFuncSetAttribute(self._handle, _MAX_DYNAMIC_SHARED, shared), name)
            fits = ctypes.c_int()
            size = ctypes.c_size_t(shared)
            _check(
                library.cuOccupancyMaxActiveBlocksPerMultiprocessor(
                    ctypes.byref(fits), self._handle, threads, size
                ),
                name,
            )
        if fits.value < 1:
            raise KernelError(f"{name}: {threads} threads with {shared} bytes do not fit {where.arch}")
        self.resident = fits.value * where.multiprocessors

    def clusters(self, size: int) -> int:
        """How many clusters of so many blocks the GPU holds at a time."""
        if size == 1:
            return self.resident
        attributes, count = _attributes(False, size), ctypes.c_int()
        config = _Config((size, 1, 1), (self.threads, 1, 1), self.shared)
        config.attributes, config.count = ctypes.cast(attributes, ctypes.POINTER(_Attribute)), len(attributes)
        with torch.cuda.device(self.index):
            code = self._library.cuOccupancyMaxActiveClusters(
                ctypes.byref(count), self._handle, ctypes.byref(config)
            )
        _check(code, "counting clusters")
        return count.value

    def __call__(
        self, blocks: int, rows: int, *arguments: int, cluster: int = 1, shared: int | None = None
    ) -> None:
        """Launch `blocks` x `rows` blocks on PyTorch's current stream of the device.

        cluster: how many successive blocks share their memory; `blocks` is a multiple of it. shared: bytes of
        shared memory, where fewer than the kernel's most.
        """
        if torch.cuda.current_device() != self.index:
            with torch.cuda.device(self.index):
                return self(blocks, rows, *arguments, cluster=cluster, shared=shared)
        parameters = _PARAMETERS(self._pack(*arguments))
        shared = self.shared if shared is None else shared
        config = _Config((blocks, rows, 1), (self.threads, 1, 1), shared, stream(self.index))
        attributes = _attributes(OVERLAP and self._overlaps, cluster)
        config.attributes = ctypes.cast(attributes, ctypes.POINTER(_Attribute))
        config.count = len(attributes)
        code = self._library.cuLaunchKernelEx(ctypes.byref(config), self._handle, parameters, None)
        return _check(code, "launching a kernel") if code else None


def stream(index: int) -> int:
    raw: int = torch._C._cuda_getCurrentRawStream(index)
    return raw


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


_counters: dict[tuple[int, int], int] = {}
_free: dict[int, list[int]] = {}
_kept: list[Tensor] = []


def counters(index: int) -> int:
    """Address of COUNTERS zeros, int32, that belong to the current stream for good.

    A kernel leaves zeros behind. They are made before a CUDA graph is captured (see `prepare`): what a
    capture allocates or fills belongs to its graph.
    """
    key = (index, stream(index))
    found = _counters.get(key)
    if found is None:
        with _lock:
            found = _counters.get(key)  # another thread on this stream may have come first
            if found is None:
                if not _free.get(index):
                    _make_counters(index)
                found = _counters[key] = _free[index].pop()
    return found


def prepare(index: int) -> None:
    """Have counters for streams to come."""
    with _lock:
        if index not in _free:
            _make_counters(index)


def _make_counters(index: int) -> None:
    if torch.cuda.is_current_stream_capturing():
        raise KernelError(
            "marlin needs new counters while a CUDA graph is captured. Run the model once, on the stream of "
            "the capture, before it"
        )
    zeros = torch.zeros(STREAMS, COUNTERS, dtype=torch.int32, device=f"cuda:{index}")
    torch.cuda.synchronize(index)
    _kept.append(zeros)
    _free[index] = [zeros[s].data_ptr() for s in range(STREAMS)]
