"""The kernel registry: what each kernel can do, and which one a site gets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptq_fx.errors import KernelError, unknown
from gptq_fx.kernels import measured
from gptq_fx.scheme import Scheme
from gptq_fx.weight import QuantizedWeight

Tensors = tuple[Tensor | None, ...]
Bound = Callable[[Tensor, Tensor | None], Tensor]  # (x [*, K], bias [N]) -> [*, N], by one pack
GATHERED = "act-order: one gather for each input"


@dataclass(frozen=True)
class LinearSpec:
    """All that a kernel may know of a linear y[*, N] = x[*, K] W[N, K]^T; never the rows of x.

    experts: how many weights lie in one stack [E, N, K]; None: one weight [N, K].
    """

    in_features: int
    out_features: int
    scheme: Scheme
    dtype: torch.dtype  # of x, y and the scales
    device: str  # a device type
    experts: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense weight: [N, K], or [E, N, K]."""
        matrix = (self.out_features, self.in_features)
        return matrix if self.experts is None else (self.experts, *matrix)

    @property
    def group_size(self) -> int:
        """Input features in one group, never -1."""
        size = self.scheme.group_size
        return self.in_features if size == -1 else size

    @property
    def groups(self) -> int:
        return self.in_features // self.group_size

    @property
    def ordered(self) -> LinearSpec:
        """The same weight with its inputs sorted by groups, so that it is in act-order no more."""
        return replace(self, scheme=replace(self.scheme, desc_act=False))


@dataclass(frozen=True)
class ExpertOps:
    """How a kernel runs a whole stack of experts [E, N, K] in one call, on the tensors of its pack.

    supports: None, or why a stack of this spec runs expert by expert, with the kernel's own op.
    grouped: op(x [S, K], *tensors, ends [E], *op_args) -> [S, N]; rows ends[e - 1] to ends[e] (from 0 for the
        first) meet expert e, rows behind the last end give zeros.
    indexed: op(x [S, K], *tensors, ids [S], *op_args) -> [S, N]; row s meets expert ids[s].
    block: an op with the arguments BLOCK_ARGUMENTS of block.py, which does as `gptq::experts` does; or None.
    block_supports: (spec of gate_up, spec of down, activation) -> None, or why the block does not run so.
    """

    supports: Callable[[LinearSpec], str | None]
    grouped: torch._ops.OpOverload
    indexed: torch._ops.OpOverload
    block: torch._ops.OpOverload | None = None
    block_supports: Callable[[LinearSpec, LinearSpec, str], str | None] = lambda up, down, activation: None


@dataclass(frozen=True)
class Kernel:
    """One way to run a quantized linear.

    name, device: a unique name; the device type it runs on, None for every device.
    order: preference among the kernels that can run a site, smallest first; from measured tables.
    available: None, or why this machine cannot run it. Cheap, cached by the kernel where it is not.
    supports: None, or why the kernel refuses the spec. A pure function of the spec.
    pack, unpack: QuantizedWeight -> the kernel's tensors, and the exact inverse.
    op, op_args: the op is called as op(x, *tensors, bias, *op_args(spec)).
    cut_at, cut: along N the layout can be cut at multiples of cut_at(spec);
        cut(tensors, spec, start, stop) gives views that are the pack of those rows.
    dequantize: the tensors of a weight [N, K] -> that weight in the spec's dtype, where the kernel has a
        faster way to it than `unpack`. Gradients are multiplied by it.
    note: None, or what a user should know about how the kernel stores the spec.
    body: the function behind op, or None: it costs less to call, where nothing traces.
    bind: (tensors, spec) -> f with f(x, bias) = body(x, *tensors, bias, *op_args(spec)), where more than the
        arguments can be worked out once for all calls; None: only those are.
    stacks: pack and unpack take a stack of experts as it is; otherwise they are called for each of them.
    prepare: makes ready what can be made before weights of these specs are packed and called, such as
        compiled code: all at once, since that is faster, and may show a bar.
    experts: how it runs a whole stack; None: each expert that has rows by itself, by `op`.
    """

    name: str
    device: str | None
    order: int
    available: Callable[[], str | None]
    supports: Callable[[LinearSpec], str | None]
    pack: Callable[[QuantizedWeight, LinearSpec], Tensors]
    unpack: Callable[[Tensors, LinearSpec], QuantizedWeight]
    op: torch._ops.OpOverload
    op_args: Callable[[LinearSpec], tuple[int, ...]]
    cut_at: Callable[[LinearSpec], int]
    cut: Callable[[Tensors, LinearSpec, int, int], Tensors]
    dequantize: Callable[[Tensors, LinearSpec], Tensor] | None = None
    note: Callable[[LinearSpec], str | None] = lambda spec: None
    stacks: bool = False
    body: Callable[..., Tensor] | None = None
    bind: Callable[[Tensors, LinearSpec], Bound] | None = None
    prepare: Callable[[Sequence[LinearSpec]], None] = lambda specs: None
    experts: ExpertOps | None = None

    def refuses(self, spec: LinearSpec) -> str | None:
        """Why this kernel cannot run `spec` here, or None."""
        if self.device not in (None, spec.device):
            return f"runs on {self.device}, the weight is on {spec.device}"
        return self.available() or self.supports(spec)

    def sorts(self, spec: LinearSpec) -> bool:
        """Whether it runs a weight in act-order only with the inputs sorted by groups (gptq_fx/order.py)."""
        return spec.scheme.desc_act and self.refuses(spec) is not None

    def expert_ops(self, spec: LinearSpec) -> ExpertOps | None:
        """How it runs a stack of this spec in one call, or None."""
        if self.experts is None or self.experts.supports(spec) is not None:
            return None
        return self.experts

    def pack_all(self, weight: QuantizedWeight, spec: LinearSpec) -> Tensors:
        """The tensors for a weight, or for a stack of experts."""
        if spec.experts is None or self.stacks:
            return self.pack(weight, spec)
        one = replace(spec, experts=None)
        packs = [self.pack(weight.expert(e), one) for e in range(spec.experts)]
        return tuple(_stack(parts) for parts in zip(*packs, strict=True))

    def unpack_all(self, tensors: Tensors, spec: LinearSpec) -> QuantizedWeight:
        """The inverse of pack_all."""
        if spec.experts is None or self.stacks:
            return self.unpack(tensors, spec)
        one = replace(spec, experts=None)
        parts = [tuple(None if t is None else t[e] for t in tensors) for e in range(spec.experts)]
        return QuantizedWeight.stack([self.unpack(part, one) for part in parts])

    def call(self, x: Tensor, tensors: Tensors, bias: Tensor | None, spec: LinearSpec) -> Tensor:
        result: Tensor = self.op(x, *tensors, bias, *self.op_args(spec))
        return result

    def bound(self, tensors: Tensors, spec: LinearSpec) -> Bound | None:
        """What `call` does with these tensors, without the dispatch of an op; None where there is no body."""
        if self.bind is not None:
            return self.bind(tensors, spec)
        if self.body is None:
            return None
        body, args = self.body, self.op_args(spec)
        return lambda x, bias: body(x, *tensors, bias, *args)


def _stack(parts: Sequence[Tensor | None]) -> Tensor | None:
    given = [part for part in parts if part is not None]
    return torch.stack(given) if given else None


_KERNELS: dict[str, Kernel] = {}


def register(kernel: Kernel) -> Kernel:
    """Add a kernel. Raises KernelError if the name is taken."""
    if kernel.name in _KERNELS:
        raise KernelError(f"a kernel named {kernel.name!r} is registered already")
    _KERNELS[kernel.name] = kernel
    return kernel


def kernels() -> tuple[Kernel, ...]:
    """Every registered kernel, the preferred one first."""
    return tuple(sorted(_KERNELS.values(), key=lambda kernel: kernel.order))


def ranked(spec: LinearSpec) -> tuple[Kernel, ...]:
    """Every registered kernel, the preferred one for this weight first: by `order`, but where kernels were
    measured on the GPU that is here (measured.py), these change places among themselves."""
    found = list(kernels())
    where = measured.capability() if spec.device == "cuda" else None
    if where is None or spec.scheme.desc_act:  # of which there are no tables
        return tuple(found)
    scores = measured.scores(where, spec.scheme.bits, spec.experts)
    places = [i for i, kernel in enumerate(found) if kernel.name in scores]
    best = sorted((found[i] for i in places), key=lambda kernel: scores[kernel.name])
    for place, kernel in zip(places, best, strict=True):
        found[place] = kernel
    return tuple(found)


def get_kernel(name: str) -> Kernel:
    """The kernel of that name. Raises ConfigError, naming the legal ones, if there is none."""
    if name not in _KERNELS:
        raise unknown("kernel", name, ["auto", *_KERNELS])
    return _KERNELS[name]


def choose_kernel(
    spec: LinearSpec, wanted: str = "auto", site: str = "", *, sortable: bool = True
) -> tuple[Kernel, str]:
    """The kernel for a site, and why the ones before it in the order were passed over.

    A weight in act-order goes to a kernel without act-order as well, if it is `sortable`: the inputs are
    then gathered in the order of its groups, and the kernel is asked for the sorted weight.
    Raises KernelError with every kernel's reason if none, or not the `wanted` one, can run it.
    """
    candidates = ranked(spec) if wanted == "auto" else (get_kernel(wanted),)
    refusals: list[str] = []
    for kernel in candidates:
        reason = _refuses(kernel, spec, sortable)
        if reason is None:
            notes = [GATHERED if kernel.sorts(spec) else None, kernel.note(spec)]
            return kernel, "; ".join([*refusals, *filter(None, notes)])
        if kernel.device in (None, spec.device) or wanted != "auto":
            refusals.append(f"{kernel.name}: {reason}")
    if wanted != "auto":
        others = (k for k in kernels() if k.name != wanted)
        refusals += [f"{k.name}: {_refuses(k, spec, sortable) or 'could run it'}" for k in others]
    where = f"{site}: " if site else ""
    shape = f"{list(spec.shape)} {spec.scheme} {spec.dtype} on {spec.device}"
    what = "no kernel" if wanted == "auto" else f"kernel {wanted!r} cannot"
    raise KernelError(f"{where}{what} run{'s' * (wanted == 'auto')} {shape}. " + "; ".join(refusals))


def _refuses(kernel: Kernel, spec: LinearSpec, sortable: bool) -> str | None:
    reason = kernel.refuses(spec)
    if reason is None or not spec.scheme.desc_act:
        return reason
    if sortable or kernel.refuses(spec.ordered) is not None:
        return kernel.refuses(spec.ordered)
    return "act-order with groups of different sizes, which it cannot tell apart"


# What compiles the rewritten graph on a device where the user does not say, the preferred one first.
_INNER_BACKENDS: dict[str, tuple[str, ...]] = {}


def prefer_inner_backends(device: str, *names: str) -> None:
    """Say what should compile graphs on tensors of a device type. Raises KernelError if somebody did."""
    if device in _INNER_BACKENDS:
        raise KernelError(f"inner backends for {device} are registered already")
    _INNER_BACKENDS[device] = names


def default_inner_backend(devices: Iterable[str]) -> str:
    """The first that Dynamo knows of those for the first of `devices` that has some, else "inductor"."""
    names = next((_INNER_BACKENDS[device] for device in devices if device in _INNER_BACKENDS), ())
    known = torch._dynamo.list_backends(exclude_tags=())
    return next((name for name in names if name in known), "inductor")
