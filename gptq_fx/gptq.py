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

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_fx.errors import CalibrationError
from gptq_fx.grid import find_grid, search_grid
from gptq_fx.scheme import Scheme

BLOCK = 128  # columns after which the errors reach the columns behind the block
DAMP_STEP = 0.01  # added to damp_percent each time that H cannot be factorized


class Hessian:
    """H of one input, summed up over batches.

    matrix: fp32 [K, K], sum of x x^T. drift: the same of x (x0 - x)^T, or None: no x0 was given.
    tokens: how many x they hold.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.matrix = torch.zeros(in_features, in_features, device=device)
        self.drift: Tensor | None = None
        self.tokens = 0

    def add(self, x: Tensor, original: Tensor | None = None) -> None:
        """x [*, K] of any float dtype, and x0 of the dense model.

        Raises CalibrationError if x holds NaN or Inf.
        """
        x = x.reshape(-1, x.shape[-1]).to(self.matrix.device, torch.float32)
        self.matrix.addmm_(x.T, x)
        self.tokens += x.shape[0]
        if not torch.isfinite(self.matrix.diagonal()).all():
            raise CalibrationError(f"{'NaN' if torch.isnan(x).any() else 'Inf'} among the activations")
        if original is not None:
            if self.drift is None:
                self.drift = torch.zeros_like(self.matrix)
            self.drift.addmm_(x.T, original.reshape(x.shape).to(x) - x)

    @staticmethod
    def sum(parts: Iterable[Hessian]) -> Hessian:
        """The Hessian of all inputs that the parts have seen."""
        parts = list(parts)
        if len(parts) == 1:
            return parts[0]
        total = Hessian(len(parts[0].matrix), parts[0].matrix.device)
        for part in parts:
            total.matrix += part.matrix
            total.tokens += part.tokens
            if part.drift is not None:
                total.drift = part.drift if total.drift is None else total.drift + part.drift
        return total


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

    codes: uint8 [K, N]. scales: [G, N]. zeros: [G, N], or None: symmetric. g_idx: int32 [K], or None:
        g(k) = k // group_size.
    error, energy: [N] each, (W - Wq) H (W - Wq)^T and W H W^T for each output n, where W is what was to
        be quantized: its mean squared error, and its mean square.
    damp: the damp_percent that H needed.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    g_idx: Tensor | None
    error: Tensor
    energy: Tensor
    damp: float


@torch.no_grad()
def gptq(W: Tensor, hessian: Hessian, scheme: Scheme, settings: Settings, dtype: torch.dtype) -> Result:
    """Quantize W [N, K]; scales are kept in `dtype`.

    Features that were never seen (H[k, k] = 0) are rounded to nearest.
    Raises CalibrationError if H cannot be factorized even with damp_percent 1.
    """
    K = W.shape[1]
    group_size = K if scheme.group_size == -1 else scheme.group_size
    tokens = max(hessian.tokens, 1)
    W, H = W.float(), hessian.matrix / tokens
    perm = _order(H.diagonal(), group_size, scheme.desc_act, settings)
    U, damp = inverse_factor(H[perm][:, perm], settings.damp_percent)
    if settings.gptaq and hessian.drift is not None:
        C = hessian.drift[perm] / tokens
        W = W + settings.gptaq * ((W @ C.T @ U.T) @ U)[:, perm.argsort()]

    in_place = not scheme.desc_act or settings.static_groups
    place = perm if in_place else torch.arange(K, device=perm.device)
    group_of = place // group_size  # of each column, in the order of work
    grid = _Grid(W.T, H.diagonal(), group_size, scheme, settings, dtype)
    codes = torch.empty(K, W.shape[0], dtype=torch.uint8, device=W.device)
    codes[perm] = _columns(W.T[perm], U, grid, perm, group_of.tolist())
    g_idx = None
    if not in_place:
        g_idx = torch.empty_like(perm)
        g_idx[perm] = group_of
    return _result(W, H, codes, grid, g_idx, damp)


def _order(importance: Tensor, group_size: int, desc_act: bool, settings: Settings) -> Tensor:
    """The order in which columns are quantized: most important first, as far as groups allow."""
    if desc_act:
        return importance.argsort(descending=True, stable=True)
    if not settings.act_group_aware:
        return torch.arange(len(importance), device=importance.device)
    groups = importance.unflatten(0, (-1, group_size))
    first = groups.amax(1).argsort(descending=True, stable=True)
    inner = groups.argsort(dim=1, descending=True, stable=True)[first]
    order: Tensor = first[:, None] * group_size + inner
    return order.flatten()


def inverse_factor(H: Tensor, damp_percent: float) -> tuple[Tensor, float]:
    """U, upper, with (H + damp * mean(diag H) * I)^-1 = U^T U, and the damp that it took.

    With H = R R^T, R upper, U is R^-1: one Cholesky of H in reversed order, and one triangular solve.
    Tried in fp32, then fp64, then with more damping.
    """
    H = H.clone()
    diagonal = H.diagonal()
    seen = diagonal != 0
    mean = diagonal[seen].mean() if seen.any() else diagonal.new_ones(())
    diagonal[~seen] = mean
    damp = damp_percent
    while True:
        for wide in (H, H.double()):
            eye = torch.eye(len(H), dtype=wide.dtype, device=H.device)
            L, info = torch.linalg.cholesky_ex((wide + damp * mean * eye).flip(0, 1))
            if int(info) == 0:
                R = L.flip(0, 1)
                U = torch.linalg.solve_triangular(R, eye, upper=True).float()
                if torch.isfinite(U).all():
                    return U, damp
        if damp >= 1:
            raise CalibrationError("the Hessian is not positive definite, even with damp_percent 1")
        damp = min(1.0, damp + DAMP_STEP)


class _Grid:
    """Scales and zero points of the groups, found when their first column is reached, or before.

    importance: [K], diag(H): what an error in a feature costs, if nothing makes up for it.
    """

    def __init__(
        self,
        Wt: Tensor,
        importance: Tensor,
        group_size: int,
        scheme: Scheme,
        settings: Settings,
        dtype: torch.dtype,
    ) -> None:
        self.scheme, self.settings, self.dtype, self.group_size = scheme, settings, dtype, group_size
        self.importance = importance
        shape = (len(Wt) // group_size, Wt.shape[1])
        self.scales = torch.empty(shape, device=Wt.device)
        self.zeros = None if scheme.sym else torch.empty(shape, device=Wt.device)
        if settings.static_groups:
            groups = Wt.unflatten(0, (-1, group_size))
            self._find(slice(None), groups, importance.view(groups.shape[:-1]))

    def reach(self, group: int, Wt: Tensor, columns: Tensor) -> None:
        """Wt [g, N]: the columns of a group, with the errors of all columns before made up for."""
        if not self.settings.static_groups:
            self._find(group, Wt, self.importance[columns])

    def _find(self, where: slice | int, groups: Tensor, importance: Tensor) -> None:
        bits, sym, norm = self.scheme.bits, self.scheme.sym, self.settings.mse
        if not self.settings.scale_search:
            importance = torch.ones_like(importance)
        if self.settings.scale_search or norm:
            scales, zeros = search_grid(groups, bits, sym, self.dtype, importance, norm or 2.0)
        else:
            scales, zeros = find_grid(groups, bits, sym, self.dtype)
        self.scales[where] = scales.float()
        if self.zeros is not None and zeros is not None:
            self.zeros[where] = zeros


def _columns(W: Tensor, U: Tensor, grid: _Grid, perm: Tensor, group_of: list[int]) -> Tensor:
    """The codes of W^T [K, N], whose rows are the columns of W in the order of work; W is used up."""
    K, group_size, top = len(W), grid.group_size, 2**grid.scheme.bits - 1
    codes = torch.empty(W.shape, dtype=torch.uint8, device=W.device)
    middle = float(2 ** (grid.scheme.bits - 1))
    diagonal = U.diagonal().tolist()
    for start, stop in _blocks(K, group_size):
        block, Ub = W[start:stop], U[start:stop, start:stop]
        Err = torch.empty_like(block)
        for i in range(start, stop):
            w, group, row = block[i - start], group_of[i], i - start
            if i % group_size == 0:
                ahead = slice(i, i + group_size)
                grid.reach(group, W[ahead], perm[ahead])
            s = grid.scales[group]
            z = middle if grid.zeros is None else grid.zeros[group]
            q = (w / s).round_().add_(z).clamp_(0, top)
            codes[i] = q
            error = torch.sub(w, q.sub_(z).mul_(s), out=Err[row]).div_(diagonal[i])
            block[row + 1 :].addr_(Ub[row, row + 1 :], error, alpha=-1)
        W[stop:].addmm_(U[start:stop, stop:].T, Err, alpha=-1)
    return codes


def _blocks(K: int, group_size: int) -> Iterator[tuple[int, int]]:
    """Runs of at most BLOCK columns; groups start where blocks start, or lie within one."""
    span = group_size if group_size > BLOCK else BLOCK // group_size * group_size
    for first in range(0, K, span):
        last = min(first + span, K)
        for start in range(first, last, BLOCK):
            yield start, min(start + BLOCK, last)


def _result(W: Tensor, H: Tensor, codes: Tensor, grid: _Grid, g_idx: Tensor | None, damp: float) -> Result:
    group = torch.arange(len(codes), device=W.device) // grid.group_size if g_idx is None else g_idx
    z = float(2 ** (grid.scheme.bits - 1)) if grid.zeros is None else grid.zeros[group]
    E = W - ((codes - z) * grid.scales[group]).T
    return Result(
        codes,
        grid.scales.to(grid.dtype),
        grid.zeros,
        None if g_idx is None else g_idx.to(torch.int32),
        error=((E @ H) * E).sum(1),
        energy=((W @ H) * W).sum(1),
        damp=damp,
    )
