"""The body of gptq::linear itself, on the canonical tensors: any device, bits, group size and order."""

from __future__ import annotations

from gptq_fx import ops
from gptq_fx.kernels.registry import Kernel, LinearSpec, Tensors, register
from gptq_fx.weight import QuantizedWeight


def unpack(tensors: Tensors, spec: LinearSpec) -> QuantizedWeight:
    qweight, scales, qzeros, g_idx = tensors
    assert qweight is not None and scales is not None
    return QuantizedWeight(spec.scheme.bits, spec.in_features, qweight, scales, qzeros, g_idx)


def cut(tensors: Tensors, spec: LinearSpec, start: int, stop: int) -> Tensors:
    qweight, scales, qzeros, g_idx = tensors
    assert qweight is not None and scales is not None
    if qzeros is not None:
        bits = spec.scheme.bits
        qzeros = qzeros[..., start * bits // 32 : -(-stop * bits // 32)]
    return qweight[..., start:stop], scales[..., start:stop], qzeros, g_idx


def cut_at(spec: LinearSpec) -> int:
    """Symmetric weights can be cut anywhere; packed zero points only where a word of them begins."""
    if spec.scheme.sym:
        return 1
    return 32 if spec.scheme.bits == 3 else 32 // spec.scheme.bits


REFERENCE = register(
    Kernel(
        name="reference",
        device=None,
        order=1000,
        available=lambda: None,
        supports=lambda spec: None,
        pack=lambda weight, spec: weight.tensors,
        unpack=unpack,
        op=ops.linear,
        op_args=lambda spec: (spec.scheme.bits,),
        cut_at=cut_at,
        cut=cut,
        stacks=True,
    )
)
