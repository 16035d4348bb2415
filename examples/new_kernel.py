"""A kernel in one file: the op, what it can run, how weights are packed for it, and one call of `register`.

It keeps each code in a byte of its own: more memory than packed codes, less work to read them. Copy the
file to gptq_fx/kernels/ and import it there, or keep it in a package of your own that calls `register`.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import gptq_fx
from gptq_fx import QuantizedWeight
from gptq_fx.kernels import Kernel, LinearSpec, register
from gptq_fx.kernels.registry import Tensors
from gptq_fx.ops import define


# A composite op is traced through: Inductor fuses its body. An opaque one, say a call of a CUDA library,
# is made by `define_opaque`, which takes a function for fake tensors, too.
@define("bytes_linear(Tensor x, Tensor codes, Tensor scales, Tensor? bias, int middle) -> Tensor")
def bytes_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, middle: int) -> Tensor:
    """x [*, K], codes uint8 [K, N], scales [G, N], bias [N] -> [*, N]."""
    grouped = codes.unflatten(0, (scales.shape[0], -1)).to(x.dtype) - middle
    y = x @ (grouped * scales[:, None]).flatten(0, 1)
    return y if bias is None else y + bias


def supports(spec: LinearSpec) -> str | None:
    """What it can run is a fact about the spec, and a refusal says why; users read it in the report."""
    if not spec.scheme.sym:
        return "no zero points"
    if spec.scheme.desc_act:  # the graph then sorts the inputs, and asks again for the sorted weight
        return "no act-order"
    return None


def cut(tensors: Tensors, spec: LinearSpec, start: int, stop: int) -> Tensors:
    """Outputs start to stop of a pack, as views: so q, k and v become one product, and stay three weights."""
    return tuple(None if t is None else t[:, start:stop] for t in tensors)


KERNEL = Kernel(
    name="bytewise",
    device="cpu",
    order=50,  # asked before cpu_int4, which has 100
    available=lambda: None,
    supports=supports,
    pack=lambda weight, spec: (weight.codes(), weight.scales),
    unpack=lambda tensors, spec: QuantizedWeight.from_codes(*tensors, None, spec.scheme.bits),
    op=bytes_linear,
    op_args=lambda spec: (2 ** (spec.scheme.bits - 1),),
    cut_at=lambda spec: 1,
    cut=cut,
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, default=4)
    args = parser.parse_args(argv)
    register(KERNEL)
    model = nn.Sequential(nn.Linear(256, 512), nn.SiLU(), nn.Linear(512, 256)).requires_grad_(False)
    x = torch.randn(3, 256)
    print(gptq_fx.quantize(model, gptq_fx.GPTQConfig(bits=args.bits), progress=False))
    dense = [layer.weight.dequantize() for layer in (model[0], model[2])]
    expected = nn.functional.silu(x @ dense[0].T + model[0].bias) @ dense[1].T + model[2].bias
    model.compile(backend="gptq", options={"inner_backend": "eager"})
    print(f"largest difference to the dequantized weights: {(model(x) - expected).abs().max():.1e}")


if __name__ == "__main__":
    main()
