"""Calls of decode.cu: a few rows of x, and blocks of experts with few routes."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_fx.kernels.marlin.gemm import MOST_CLUSTER, Weight
from gptq_fx.kernels.marlin.launch import Function, device, pointer
from gptq_fx.kernels.marlin.routes import ACTIVATIONS
from gptq_fx.kernels.marlin.variants import (
    DECODE_TILES,
    EXPERTS_TILE,
    GATED,
    PLAIN,
    SUMMED,
    DecodeTile,
    DecodeVariant,
)

ARGUMENTS = "9Q22i6I"
MOST_ROWS = DECODE_TILES[-1].tokens
MOST_ORDERED_ROWS = 8  # of x that a block puts into act-order by itself
MOST_WAVES = 4  # of clusters, one after the other, where the sums of fewer do not fit
SUM_BYTES = 4 * 68  # of the sums of a row in the shared memory of decode.cu
# In the time that a block takes for a batch where memory is the limit: what a cluster takes more than a
# block, a batch of a warp that has the next one to wait for, and a batch of a row of x.
CLUSTER_OVERHEAD, LATENCY, X_TIME = 4, 6, 0.04


@dataclass(frozen=True)
class Decode:
    """A kernel, and what a plan must know of it.

    batch: features in a batch. runs: groups in a batch. perm: it reads x in the order of a permutation.
    """

    function: Function
    form: int
    batch: int
    runs: int
    perm: bool

    @property
    def warps(self) -> int:
        return self.function.threads // 32


@dataclass(frozen=True)
class Work:
    """What is asked for. tiles: of 64 outputs in a row of the result. rows: of x, each with top_k experts."""

    form: int
    tiles: int
    in_features: int
    rows: int
    top_k: int = 1

    @property
    def halves(self) -> int:
        return 2 if self.form == GATED else 1

    @property
    def units(self) -> int:
        return self.tiles * {PLAIN: 1, GATED: self.rows * self.top_k, SUMMED: self.rows}[self.form]

    @property
    def rows_of_unit(self) -> int:
        return self.rows if self.form == PLAIN else 1

    def batches(self, of: int) -> int:
        """Of so many features, of one weight."""
        return -(-self.in_features // of)

    @property
    def weights(self) -> int:
        """How many are added up."""
        return self.top_k if self.form == SUMMED else 1


@dataclass(frozen=True)
class Plan:
    """How a launch cuts the work.

    cluster: blocks that share units. clusters: how many. warps_k: warps of a block that share a unit.
    sums_at, received_at, staged_at, shared: bytes in shared memory. capacity: rows of 64 sums that a block
    receives from another. time: of the busiest block, and of_warp: of the busiest warp, in batches.
    """

    cluster: int
    clusters: int
    warps_k: int
    sums_at: int
    received_at: int
    staged_at: int
    shared: int
    capacity: int
    time: float
    of_warp: int


def _plan(decode: Decode, work: Work, cluster: int, warps_k: int, waves: int = 1) -> Plan | None:
    """With clusters of so many blocks, and so many warps that share a unit; None where they do not fit.

    waves: how often clusters fill the GPU.
    """
    clusters = min(work.units, waves * decode.function.clusters(cluster))
    if not clusters:
        return None
    batches = work.batches(decode.batch) * work.weights
    part, most = -(-batches // cluster), -(-work.units // clusters)
    slots, rows = most * work.halves, work.rows
    of_warp = -(-slots // (decode.warps // warps_k)) * -(-part // warps_k)
    x_bytes = rows * (2 * decode.batch * part + 16) + -(-4 * rows * part * decode.runs // 16) * 16
    sums_at = 2 * decode.batch + x_bytes
    received_at = sums_at + slots * warps_k * work.rows_of_unit * SUM_BYTES
    capacity = -(-work.rows_of_unit * most // cluster)
    staged_at = received_at + 256 * capacity * work.halves * cluster * (cluster > 1)
    shared = staged_at + 2 * rows * work.in_features * decode.perm
    if shared > decode.function.shared:
        return None
    time = max(slots * part, LATENCY * of_warp) + CLUSTER_OVERHEAD * (cluster > 1) + X_TIME * rows * part
    return Plan(
        cluster, clusters, warps_k, sums_at, received_at, staged_at, shared, capacity, waves * time, of_warp
    )


@functools.lru_cache(maxsize=4096)
def plan(decode: Decode, work: Work) -> Plan | None:
    """The fastest, as far as that can be told; None where x does not fit shared memory.

    Where the sums of one wave do not fit, the work is cut into more.
    """
    batches = work.batches(decode.batch) * work.weights
    for waves in range(1, MOST_WAVES + 1):
        plans = (
            _plan(decode, work, cluster, warps_k, waves)
            for cluster in range(1, min(MOST_CLUSTER, batches) + 1)
            for warps_k in range(1, min(decode.warps, batches // cluster) + 1)  # each has some
        )
        best = min((p for p in plans if p is not None), key=lambda p: (p.time, p.of_warp), default=None)
        if best is not None:
            return best
    return None


@functools.lru_cache(maxsize=4096)
def _cut(decode: Decode, work: Work, p: Plan) -> tuple[int, ...]:
    """The last arguments of the kernel: what each has, and what it divides by."""
    batches = work.batches(decode.batch)
    return (
        *divmod(work.units, p.clusters),
        *divmod(batches * work.weights, p.cluster),
        p.warps_k,
        decode.warps // p.warps_k,
        max(decode.warps // work.rows, 1).bit_length() - 1,
        *map(_inverse, (p.warps_k, work.rows, p.cluster, work.tiles, work.top_k, batches)),
    )


def _inverse(n: int) -> int:
    """For `divide` of decode.cu."""
    return -(-(2**32) // n) if n > 1 else 0


@functools.cache
def decode_function(
    bits: int, bf16: bool, asym: bool, group_tiles: int, perm: bool, form: int, tile: DecodeTile, index: int
) -> Decode:
    where = device(index)
    variant = DecodeVariant(bits, bf16, asym, group_tiles, perm, form, tile)
    source, shared = variant.source(), where.shared_per_block
    function = Function(source, "marlin_decode", where, tile.threads, shared, ARGUMENTS)
    return Decode(function, form, 16 * variant.batch_tiles, variant.runs, perm)


def _kernel(x: Tensor, w: Weight, form: int, tile: DecodeTile) -> Decode:
    return decode_function(
        w.bits,
        x.dtype == torch.bfloat16,
        w.zeros is not None,
        w.group_tiles,
        w.perm is not None,
        form,
        tile,
        x.get_device(),
    )


def _launch(
    kernel: Decode,
    work: Work,
    p: Plan,
    x: Tensor,
    w: Weight,
    bias: Tensor | None,
    out: Tensor,
    ids: Tensor | None = None,
    routed: Tensor | None = None,
    activation: int = 0,
) -> None:
    kernel.function(
        p.cluster,
        p.clusters,
        x.data_ptr(),
        w.packed.data_ptr(),
        w.scales.data_ptr(),
        pointer(w.zeros),
        pointer(w.perm),
        pointer(bias),
        out.data_ptr(),
        pointer(ids),
        pointer(routed),
        work.rows,
        w.out_features,
        work.in_features,
        work.tiles * work.halves,
        x.stride(0),
        w.scales.shape[-2],
        p.sums_at,
        p.received_at,
        p.capacity,
        p.staged_at,
        1 if ids is None else w.packed.shape[0],
        work.top_k,
        int(ids is not None and ids.dtype == torch.int64),
        int(routed is not None and routed.dtype == torch.float32),
        activation,
        *_cut(kernel, work, p),
        cluster=p.cluster,
        shared=p.shared,
    )


def linear(x: Tensor, w: Weight, bias: Tensor | None, out: Tensor) -> bool:
    """out [M, N] = x W^T + bias of the rows of x [M, K] (see `gemm.usable`); False where they do not fit."""
    rows = x.shape[0]
    if rows > (MOST_ROWS if w.perm is None else MOST_ORDERED_ROWS):
        return False
    kernel = _kernel(x, w, PLAIN, next(tile for tile in DECODE_TILES if rows <= tile.tokens))
    work = Work(PLAIN, w.scales.shape[-1] // 64, w.in_features, rows)
    p = plan(kernel, work)
    if p is None:
        return False
    _launch(kernel, work, p, x, w, bias, out)
    return True


def experts(
    x: Tensor, ids: Tensor, routed: Tensor, gate_up: Weight, down: Weight, activation: str, out: Tensor
) -> bool:
    """out [T, H] = the sum over k of routed * down(activation(gate_up(x))); False where that does not fit.

    x [T, H], ids [T, k] int32 or int64, routed [T, k] fp32 or of x's dtype. activation: with gate and up in
    halves.
    """
    T, k = ids.shape
    inner = gate_up.out_features // 2
    kernels = _kernel(x, gate_up, GATED, EXPERTS_TILE), _kernel(x, down, SUMMED, EXPERTS_TILE)
    if down.in_features % kernels[1].batch or inner != down.in_features:
        return False
    first = Work(GATED, gate_up.scales.shape[-1] // 128, gate_up.in_features, T, k)
    second = Work(SUMMED, down.scales.shape[-1] // 64, down.in_features, T, k)
    plans = plan(kernels[0], first), plan(kernels[1], second)
    if plans[0] is None or plans[1] is None:
        return False
    hidden = torch.empty(T * k, inner, dtype=x.dtype, device=x.device)
    kind = ACTIVATIONS.index(activation)
    _launch(kernels[0], first, plans[0], x, gate_up, None, hidden, ids, None, kind)
    _launch(kernels[1], second, plans[1], hidden, down, None, out, ids, routed)
    return True
