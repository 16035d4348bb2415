"""GPTQ on plain tensors, with the names of the paper (Frantar et al. 2022, arXiv 2210.17323).

    minimize  tr((W - Wq) H (W - Wq)^T)  over Wq on an integer grid,  H = mean over tokens of x x^T

Columns of W (input features) are rounded one after the other; the error of each is made up for by the
columns after it. With Hinv = U^T U, U upper, column i gives Err = (W[:, i] - Wq[:, i]) / U[i, i], and
W[:, j] -= Err * U[i, j] for all j > i. Nothing here knows of models or graphs.

Where the inputs x0 of the dense model are known too, Wq x shall come near W x0 (the aim of GPTAQ, Li et
al. 2025, arXiv 2504.02692). As ||Wq x - W x0||^2 is least for W + W C^T Hinv, C = mean of x (x0 - x)^T,
that is what is quantized in place of W, or a part `gptaq` of the way to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_fx import columns
from gptq_fx.errors import CalibrationError
from gptq_fx.grid import Columns, Search, Static
from gptq_fx.hessian import Hessian
from gptq_fx.kernels.solver import solver_for
from gptq_fx.phases import phase
from gptq_fx.scheme import Scheme

DAMP_STEP = 0.01  # added to damp_percent each time that H cannot be factorized


@dataclass(frozen=True)
class Settings:
    """damp_percent: what is added to the diagonal of H, as a part of its mean.

    act_group_aware: where desc_act is off, quantize groups, and features within groups, by falling
        importance; the groups stay where they are, so that nothing is permuted at run time.
    static_groups: scales come from the original weights; with desc_act, groups stay where they are.
    scale_search: search scales for the least rounding error, squared and weighted by diag(H): by what it
        costs where nothing makes up for it.
    mse: 0, or the exponent of the error in place of 2; without scale_search, not weighted.
    gptaq: how far to make up for what the layers before have lost; 0: not at all.
    """

    damp_percent: float = 0.05
    act_group_aware: bool = True
    static_groups: bool = False
    scale_search: bool = True
    mse: float = 0.0
    gptaq: float = 0.5


@dataclass(frozen=True)
class Result:
    """Wq[n, k] = scales[g(k), n] * (codes[k, n] - zeros[g(k), n]), as in QuantizedWeight.

    codes: uint8 [*, K, N]. scales: [*, G, N]. zeros: [*, G, N], or None: symmetric. g_idx: int32 [*, K], or
        None: g(k) = k // group_size.
    error, energy: [*, N] each, (W - Wq) H (W - Wq)^T and W H W^T for each output n, where W is what was to
        be quantized: its mean squared error, and its mean square.
    damp: the damp_percent that H needed; of several, the most that any of them needed.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    g_idx: Tensor | None
    error: Tensor
    energy: Tensor
    damp: float


def gptq(W: Tensor, hessian: Hessian, scheme: Scheme, settings: Settings, dtype: torch.dtype) -> Result:
    """Quantize W [N, K]; scales are kept in `dtype`.

    Features that were never seen (H[k, k] = 0) are rounded to nearest.
    Raises CalibrationError if H cannot be factorized even with damp_percent 1.
    """
    found = gptq_stack(W[None], [hessian], scheme, settings, dtype)
    zeros, g_idx = (None if t is None else t[0] for t in (found.zeros, found.g_idx))
    return Result(found.codes[0], found.scales[0], zeros, g_idx, found.error[0], found.energy[0], found.damp)


@torch.no_grad()
def gptq_stack(
    W: Tensor, hessians: Sequence[Hessian], scheme: Scheme, settings: Settings, dtype: torch.dtype
) -> Result:
    """gptq of several matrices W [E, N, K] at once, each with a Hessian of its own."""
    E, _, K = W.shape
    group_size = K if scheme.group_size == -1 else scheme.group_size
    with phase("factorize"), _precision("highest"):
        importance = torch.stack([h.matrix.diagonal() / max(h.tokens, 1) for h in hessians])
        perm = _order(importance, group_size, scheme.desc_act, settings)
        H = torch.empty(E, K, K, device=importance.device)
        for to, hessian, p in zip(H, hessians, perm, strict=True):
            torch.index_select(hessian.matrix.index_select(0, p), 1, p, out=to)
            to.div_(max(hessian.tokens, 1))
        U, added, damp = inverse_factor(H, settings.damp_percent)
    with phase("quantize"), _precision("highest"):
        shifts = [_shift(W[e].float(), hessians[e], perm[e], U[e], settings.gptaq) for e in range(E)]
        W = W.gather(-1, perm[:, None].expand_as(W)).float()
        for w, shift in zip(W, shifts, strict=True):
            if shift is not None:
                w += shift
        del shifts
        with _precision("high"):
            energy = ((W @ H) * W).sum(-1)
        del H
        importance = importance.gather(-1, perm) if settings.scale_search else torch.ones_like(importance)
        search = Search(
            scheme.bits, scheme.sym, dtype, settings.mse or (2.0 if settings.scale_search else None)
        )
        static = _static(W, importance, perm, group_size, search) if settings.static_groups else None
        solver = solver_for(W.device)
        run = columns.columns if solver is None else solver.columns
        found = run(W.clone(), U, importance, search, group_size, static)
        error = (found.loss - _added_loss(W, found, added, static)).clamp_min_(0)  # by rounding
        codes, scales, zeros, g_idx = _in_place(found, perm, group_size, static is not None, scheme.desc_act)
        return Result(codes, scales.to(dtype), zeros, g_idx, error, energy, max(damp))


@contextmanager
def _precision(wanted: str) -> Iterator[None]:
    """Of fp32 matmuls: "high" may round their inputs to tf32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(wanted)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _order(importance: Tensor, group_size: int, desc_act: bool, settings: Settings) -> Tensor:
    """The order in which columns are quantized [E, K]: most important first, as far as groups allow."""
    if desc_act:
        return importance.argsort(dim=-1, descending=True, stable=True)
    if not settings.act_group_aware:
        return torch.arange(importance.shape[-1], device=importance.device).expand(importance.shape)
    groups = importance.unflatten(-1, (-1, group_size))
    first = groups.amax(-1).argsort(dim=-1, descending=True, stable=True)
    inner = groups.argsort(dim=-1, descending=True, stable=True)
    order: Tensor = first[..., None] * group_size + inner.take_along_dim(first[..., None], 1)
    return order.flatten(-2)


def inverse_factor(H: Tensor, damp_percent: float) -> tuple[Tensor, Tensor, list[float]]:
    """For each H of [E, K, K]: U, upper, with (H + diag(added))^-1 = U^T U; added [E, K]; the damp it took.

    added: damp * mean(diag H), and where a feature was never seen another mean(diag H).
    With H = R R^T, R upper, U is R^-1: one Cholesky of H in reversed order, and one triangular solve.
    Tried in fp32, then fp64, then with more damping.
    """
    diagonal = H.diagonal(dim1=-2, dim2=-1)
    seen = diagonal != 0
    mean = diagonal.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp_min(1)
    mean = torch.where(mean == 0, torch.ones_like(mean), mean)
    unseen = torch.where(seen, torch.zeros_like(diagonal), mean)
    added = unseen + damp_percent * mean
    U, fine = _factor(H, added)
    damp = [damp_percent] * len(H)
    for e, done in enumerate(fine.tolist()):
        while not done:
            one, done = _factor(H[e : e + 1].double(), added[e : e + 1].double())
            if not done and damp[e] < 1:
                damp[e] = min(1.0, damp[e] + DAMP_STEP)
                added[e] = unseen[e] + damp[e] * mean[e]
                one, done = _factor(H[e : e + 1], added[e : e + 1])
            elif not done:
                raise CalibrationError("the Hessian is not positive definite, even with damp_percent 1")
            U[e] = one[0]
    return U, added, damp


def _factor(H: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """U fp32 [E, K, K] in the dtype of H, and for which of them that went well, bool [E]."""
    A = H.flip(-2, -1)
    A.diagonal(dim1=-2, dim2=-1).add_(added.flip(-1))
    L, info = torch.linalg.cholesky_ex(A)
    del A
    R = L.flip(-2, -1)
    del L
    eye = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device)
    U = torch.linalg.solve_triangular(R, eye.expand_as(R), upper=True).float()
    del R, eye  # five of them are held at the most, as gptq_fx/streaming.py counts
    finite = torch.isfinite(U.amax((-2, -1)) - U.amin((-2, -1)))
    return U.contiguous(), (info == 0) & finite


def _shift(W: Tensor, hessian: Hessian, perm: Tensor, U: Tensor, part: float) -> Tensor | None:
    """part * W C^T Hinv [N, K], in the order of work; W is not."""
    if not part or hessian.drift is None:
        return None
    scale = part / max(hessian.tokens, 1)
    if W.shape[0] <= W.shape[1]:
        return ((W @ hessian.drift.T)[:, perm] @ U.T @ U).mul_(scale)
    return (W @ (hessian.drift.T[:, perm] @ U.T @ U)).mul_(scale)


def _static(W: Tensor, importance: Tensor, perm: Tensor, group_size: int, search: Search) -> Static:
    """The grids of weights that no error has reached yet; W and importance in the order of work."""
    place = perm.argsort(dim=-1)
    groups = W.mT.take_along_dim(place[..., None], 1).unflatten(1, (-1, group_size))
    weights = importance.take_along_dim(place, -1).unflatten(1, (-1, group_size))
    scales, zeros = search(groups, weights)
    return Static(scales, zeros, perm // group_size)


def _added_loss(W: Tensor, found: Columns, added: Tensor, static: Static | None) -> Tensor:
    """(W - Wq) diag(added) (W - Wq)^T [E, N], which is no error; all in the order of work."""

    def of_columns(grid: Tensor) -> Tensor:
        if static is None:
            return grid.mT.repeat_interleave(W.shape[-1] // grid.shape[1], -1)
        return grid.mT.take_along_dim(static.group_of[:, None], -1)

    Wq = found.codes.mT.float()
    Wq -= 2.0 ** (found.bits - 1) if found.zeros is None else of_columns(found.zeros)
    Wq *= of_columns(found.scales)
    Wq -= W
    loss: Tensor = Wq.square_().mul_(added[:, None]).sum(-1)
    return loss


def _in_place(
    found: Columns, perm: Tensor, group_size: int, static: bool, desc_act: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """codes, scales, zeros and g_idx of the features as they lie in W."""
    E, K, N = found.codes.shape
    codes = found.codes.gather(1, perm.argsort(dim=-1)[..., None].expand(E, K, N))
    if static:
        return codes, found.scales, found.zeros, None
    if desc_act:
        g_idx = torch.empty(E, K, dtype=torch.int32, device=perm.device)
        g_idx.scatter_(1, perm, (torch.arange(K, device=perm.device) // group_size).int().expand(E, K))
        return codes, found.scales, found.zeros, g_idx
    place = (perm[:, ::group_size] // group_size).argsort(dim=-1)[..., None].expand_as(found.scales)
    zeros = None if found.zeros is None else found.zeros.gather(1, place)
    return codes, found.scales.gather(1, place), zeros, None
