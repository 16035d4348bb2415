"""The library humming-kernels: whether it can be used here, and its kernels, compiled ahead of time.

A kernel is compiled (by NVRTC, into a cache on disk) for one shape and format of a weight and one tile shape.
A `Table` holds those that serve a weight for every number of rows; it is made for a whole graph at once, in
parallel, before the first call, so that serving never waits for a compiler.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptq_fx.errors import KernelError
from gptq_fx.progress import bar

VERSION = "0.1.19"  # its functions are no public interface yet: every release is read before it is taken
CAPABILITY = (7, 5)
BFLOAT16 = (8, 0)

# Rows up to which one choice of tiles serves. Between two of them the tiles of the upper one are used, which
# costs little; the library's own table has some 90 steps, and three times as many kernels to compile.
ROWS = (1, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 4096)
EXPERT_ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)

LOCKS = 8192  # int32 by which blocks of one product wait for each other; the library asks for up to 2500
STREAMS = 64  # how many streams get locks of their own


class Problem(NamedTuple):
    """What a compiled kernel depends on, beside the rows.

    group_size: 0 for one group. experts: 0 for one weight. form: "dense", "indexed", "grouped_contiguous".
    out_features: as packed (a multiple of the layout's BLOCK); `padding` of them are not computed.
    """

    device: int
    in_features: int
    out_features: int
    padding: int
    bits: int
    group_size: int
    zeros: bool
    dtype: torch.dtype
    experts: int
    form: str


@dataclass(frozen=True)
class Table:
    """configs: int64 [4 * steps] on the host, as the launcher reads them: rows from (exclusive), rows to,
    kernel, SMs. ends, tiles: for each step, the most rows, and the rows of its tiles."""

    configs: Tensor
    ends: tuple[int, ...]
    tiles: tuple[int, ...]

    def tile(self, rows: int) -> int:
        return next(tile for end, tile in zip(self.ends, self.tiles, strict=True) if rows <= end)


_TABLES: dict[tuple[Any, ...], Table] = {}  # by Problem, or the plain tuple that equals one
_LOCKS: dict[tuple[int, int], Tensor] = {}
_ARENAS: dict[int, Tensor] = {}
_taking = threading.Lock()


@functools.cache
def available() -> str | None:
    """Asked only about weights that lie on such a device: it initializes CUDA and imports the library."""
    if importlib.util.find_spec("humming") is None:
        return f"humming-kernels is not installed; pip install humming-kernels=={VERSION}"
    try:
        version = importlib.metadata.version("humming-kernels")
    except importlib.metadata.PackageNotFoundError:
        return "there is a package humming, but it is not humming-kernels"
    if version != VERSION:
        return f"humming-kernels is {version}, this kernel knows {VERSION} only"
    if torch.version.cuda is None:
        return "this PyTorch is not built for NVIDIA GPUs"
    if not torch.cuda.is_available():
        return "PyTorch finds no NVIDIA GPU that it can use"
    capability = torch.cuda.get_device_capability()
    if capability < CAPABILITY:
        return f"compute capability {_dotted(capability)} is below {_dotted(CAPABILITY)}"
    return _missing_compiler()


def _missing_compiler() -> str | None:
    try:
        _import()
        from humming.utils.nvrtc import get_nvrtc_library_path

        get_nvrtc_library_path()  # raises where the headers or the library are absent
    except Exception as error:
        major = (torch.version.cuda or "").partition(".")[0]
        return (
            f"humming-kernels cannot compile here ({type(error).__name__}: {error}); "
            f"pip install 'humming-kernels[cu{major}]' brings NVRTC and the CUDA headers"
        )
    return None


def refuses_dtype(dtype: torch.dtype) -> str | None:
    if dtype not in (torch.float16, torch.bfloat16):
        return f"x must be float16 or bfloat16, the model is {dtype}"
    if dtype == torch.bfloat16 and _capability() < BFLOAT16:
        return f"bfloat16 needs compute capability {_dotted(BFLOAT16)}, this is {_dotted(_capability())}"
    return None


@functools.cache
def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else BFLOAT16


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


@functools.cache
def _import() -> Callable[..., None]:
    """Import the library -> its launch op, with an `out` argument.

    On import it starts processes that build what its wheel brings along: this one variable keeps it from that
    (and would make it compile with one thread, so it is set for the import only).
    """
    with _environment("HUMMING_DISABLE_PARALLEL_BUILD", "1"):
        import humming.kernel.humming  # noqa: F401
        from humming.ops.utils import init_humming_launcher

        init_humming_launcher()
    launch: Callable[..., None] = torch.ops.humming.launch_kernel.out
    return launch


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


launcher = _import


def table(key: tuple[Any, ...]) -> Table:
    """The kernels for the fields of a Problem; compiled now if nothing has prepared them."""
    found = _TABLES.get(key)
    if found is None:
        prepare([Problem(*key)])
        found = _TABLES[key]
    return found


def prepare(problems: Sequence[Problem], *, show: bool = True) -> None:
    """Make the tables of all problems, their kernels compiled side by side. Raises KernelError."""
    missing = [p for p in dict.fromkeys(problems) if p not in _TABLES]
    if not missing:
        return
    _import()
    from humming.utils.cpu import get_parallel_build_workers

    steps = {p: _steps(p) for p in missing}
    jobs = {_key(p, config): (p, config) for p in missing for _, _, config in steps[p]}
    made: dict[str, int] = {}
    with ThreadPoolExecutor(max_workers=get_parallel_build_workers()) as pool:
        waiting = {pool.submit(_compile, *job): key for key, job in jobs.items()}
        with bar(len(jobs), "compiling kernels", show=show) as shown:
            for future in as_completed(waiting):
                problem, config = jobs[waiting[future]]
                try:
                    made[waiting[future]] = future.result()
                except Exception as error:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise KernelError(
                        f"humming-kernels cannot compile its kernel for {problem} with {config}: {error}"
                    ) from error
                shown.update()
    for p in missing:
        locks(p.device, 0)  # now: memory that is taken while a CUDA graph is recorded belongs to the graph
        rows = [
            [start, end, made[_key(p, config)], config.get("num_sms") or _sms(p.device)]
            for start, end, config in steps[p]
        ]
        flat = torch.tensor(rows, dtype=torch.int64, device="cpu").flatten()
        tiles = tuple(config["block_shape"][0] for _, _, config in steps[p])
        _TABLES[p] = Table(flat, tuple(end for _, end, _ in steps[p]), tiles)


def _steps(problem: Problem) -> list[tuple[int, int, dict[str, Any]]]:
    """(rows from, exclusive; rows to; tiles and schedule), which the library chooses for this GPU."""
    from humming.tune import get_heuristics_config

    found: list[tuple[int, int, dict[str, Any]]] = []
    start = 0
    for rows in EXPERT_ROWS if problem.experts else ROWS:
        config = dict(
            get_heuristics_config(
                _layer(problem), shape_m=rows, gemm_type=problem.form, device=problem.device
            )
        )
        if found and found[-1][2] == config:
            start = found.pop()[0]
        found.append((start, rows, config))
        start = rows
    start, _, config = found.pop()
    return [*found, (start, 1 << 30, config)]


def _layer(problem: Problem) -> Any:
    from humming.config import LayerConfig

    dtype = str(problem.dtype).removeprefix("torch.")
    major, minor = torch.cuda.get_device_capability(problem.device)
    return LayerConfig(
        sm_version=10 * major + minor,
        a_dtype=dtype,
        b_dtype=f"uint{problem.bits}",
        bs_dtype=dtype,
        c_dtype=dtype,
        shape_n=problem.out_features,
        shape_k=problem.in_features,
        pad_shape_n=problem.padding,
        num_experts=problem.experts,
        weight_scale_group_size=problem.group_size,
        has_zero_point=problem.zeros,
    )


def _key(problem: Problem, config: dict[str, Any]) -> str:
    return repr((problem, sorted(config.items())))


def _compile(problem: Problem, config: dict[str, Any]) -> int:
    """Compile, or find on disk, one kernel -> its number."""
    from humming.kernel.humming import HummingKernel

    layer = json.loads(_layer(problem).to_str())
    tuning = {name: value for name, value in config.items() if name != "num_sms"}
    with torch.cuda.device(problem.device):
        kernel = HummingKernel(**layer, **{"gemm_type": problem.form, **tuning})
    number: int = kernel.kernel_id
    return number


@functools.cache
def _sms(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def current_locks(device: int) -> Tensor:
    """int32 [LOCKS] of the current stream, all zero between calls: products that run at once cannot share
    them. From the 65th stream of a device on, streams do."""
    return locks(device, torch._C._cuda_getCurrentRawStream(device))


def locks(device: int, stream: int) -> Tensor:
    found = _LOCKS.get((device, stream))
    if found is None:
        with _taking:  # two threads that come at once must not take the same
            found = _LOCKS.get((device, stream))
            if found is None:
                found = _LOCKS[device, stream] = _take(device)
    return found


def _take(device: int) -> Tensor:
    if device not in _ARENAS:
        _ARENAS[device] = torch.zeros(STREAMS, LOCKS, dtype=torch.int32, device=f"cuda:{device}")
        torch.cuda.synchronize(device)  # other streams may use them next
    taken = sum(known == device for known, _ in _LOCKS)
    return _ARENAS[device][taken % STREAMS]
