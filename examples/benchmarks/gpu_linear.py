"""One quantized linear on a GPU: each kernel of the registry, cuBLAS and aten's int4 kernel, row by row.

Microseconds a call, weights not in the L2 cache, medians of a CUDA graph; the largest relative error against
fp32 beside the name. `--tune` times the Triton kernels' algorithms and tiles one by one instead.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from gptq_fx import QuantizedWeight, Scheme
from gptq_fx.kernels import LinearSpec, kernels
from gpu import DEVICE, clones, copies, error, microseconds, random_weight, runnable
from table import conditions, markdown, parser, publish

SHAPES = {
    "8B o": (4096, 4096),
    "8B qkv": (6144, 4096),
    "8B gate_up": (28672, 4096),
    "8B down": (4096, 14336),
    "70B qkv": (10240, 8192),
    "70B gate_up": (57344, 8192),
    "70B down": (8192, 28672),
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
TINYGEMM_ROWS = 64  # beyond, it is many times slower than all others

Call = Callable[[Tensor], Tensor]


def int4pack(weight: QuantizedWeight, group_size: int, count: int) -> list[Call]:
    """aten's int4 kernel (tinygemm), on bf16."""
    codes = weight.codes().mT
    packed = torch.ops.aten._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).contiguous(), 8)
    grid = torch.stack([weight.scales, torch.zeros_like(weight.scales)], -1).contiguous()
    op = torch.ops.aten._weight_int4pack_mm
    made = clones((packed, grid), count)
    return [lambda x, p=p, g=g: op(x, p, group_size, g) for p, g in made]


def competitors(
    spec: LinearSpec, weight: QuantizedWeight, names: list[str]
) -> Iterator[tuple[str, list[Call]]]:
    """(name, one call for each copy of the weight)."""
    N, K = spec.out_features, spec.in_features
    dense = weight.dequantize().contiguous()
    yield (
        "cuBLAS",
        [lambda x, w=w[0]: torch.nn.functional.linear(x, w) for w in clones((dense,), copies(2 * N * K))],
    )
    count = copies(N * K * spec.scheme.bits // 8)
    if spec.scheme.bits == 4 and spec.scheme.sym and spec.dtype == torch.bfloat16:
        yield "int4pack", int4pack(weight, spec.group_size, count)
    for name, kernel in runnable(names, spec, kernels()).items():
        packs = clones(kernel.pack(weight, spec), count)
        yield name, [lambda x, t=t, k=kernel: k.call(x, t, None, spec) for t in packs]


def measure(shape: str, rows: list[int], args) -> list[list[str]]:
    N, K = SHAPES[shape]
    spec = LinearSpec(K, N, Scheme(args.bits, args.group_size, not args.asym), torch.bfloat16, DEVICE)
    weight = random_weight(N, K, spec.scheme, spec.dtype)
    W = weight.dequantize(torch.float32)
    lines = []
    for name, calls in competitors(spec, weight, args.kernels):
        times, worst = [], 0.0
        for M in rows:
            if name == "int4pack" and M > TINYGEMM_ROWS:
                times.append("")
                continue
            x = torch.randn(M, K, device=DEVICE, dtype=spec.dtype)
            worst = max(worst, error(calls[0](x), x.float() @ W.T))
            times.append(f"{microseconds([partial(call, x) for call in calls]):.1f}")
        lines.append([f"{shape} {N}x{K}, {name}", f"{worst:.4f}", *times])
        print(lines[-1], flush=True)
        del calls
    return lines


def tune(shape: str, rows: list[int], args) -> list[list[str]]:
    """The Triton kernels' algorithms, each with several tiles."""
    from gptq_fx.kernels.triton.gemv import gemv
    from gptq_fx.kernels.triton.layout import pack
    from gptq_fx.kernels.triton.matmul import matmul
    from gptq_fx.kernels.triton.spelled_out import spelled_out
    from gptq_fx.kernels.triton.weight import Packed, Tile

    N, K = SHAPES[shape]
    spec = LinearSpec(K, N, Scheme(args.bits, args.group_size, not args.asym), torch.bfloat16, DEVICE)
    made = clones(pack(random_weight(N, K, spec.scheme, spec.dtype), spec), copies(N * K * args.bits // 8))
    packs = [Packed.of(t, args.bits) for t in made]
    tiles = [Tile(BN=n, BB=8, warps=w) for n, w in ((16, 8), (32, 8), (64, 8), (8, 4), (16, 4))]
    ways: list[tuple[str, int, Callable[[Tensor, Packed], Tensor]]] = [
        (f"gemv {t.BN} w{t.warps}", 4, lambda x, p, t=t: gemv(x, p, None, t)) for t in tiles
    ]
    for BM, BN, warps, stages in itertools.chain(
        ((16, 64, 4, s) for s in (3, 4, 6)),
        ((16, 128, 4, 4), (16, 128, 8, 4), (32, 64, 4, 4), (32, 128, 8, 4), (64, 64, 4, 4), (64, 128, 4, 4)),
        ((64, 128, 8, 4), (128, 128, 8, 3), (128, 64, 4, 4), (256, 64, 8, 3), (256, 64, 4, 3)),
    ):
        for parts in (1, 2, 4, 8):
            tile = Tile(BN=BN, BM=BM, warps=warps, stages=stages)
            label = f"matmul {BM}x{BN} w{warps} s{stages} /{parts}"
            ways.append((label, 8 * BM, lambda x, p, t=tile, n=parts: matmul(x, p, None, t, n)))
    ways.append(("spelled out", 10**9, lambda x, p: spelled_out(x, p, None)))
    lines = []
    for M in rows:
        x = torch.randn(M, K, device=DEVICE, dtype=spec.dtype)
        times = []
        for label, most, way in ways:
            fits = (
                most >= M
                and (label == "spelled out") <= (M >= 64)
                and (M <= 64 or "/1" in label or "sp" in label)
            )
            if fits and not ("matmul" in label and most // 8 > 4 * max(M, 16)):
                try:
                    times.append((microseconds([partial(way, x, p) for p in packs], 10), label))
                except Exception as error:  # too much shared memory: no candidate
                    print(label, str(error).splitlines()[0][:120], flush=True)
        best = [f"{label}: {us:.1f}" for us, label in sorted(times)[:8]]
        lines.append([f"{shape} {N}x{K}", str(M), "; ".join(best)])
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=SHAPES)
    cli.add_argument("--rows", nargs="*", type=int, default=list(ROWS))
    cli.add_argument("--kernels", nargs="*", default=[], help="of the registry (default: all that run)")
    cli.add_argument("--bits", type=int, default=4)
    cli.add_argument("--group-size", type=int, default=128)
    cli.add_argument("--asym", action="store_true")
    cli.add_argument("--tune", action="store_true")
    cli.add_argument("--seconds", type=float, default=500, help="no shape begins after so many")
    args = cli.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    start, lines = time.monotonic(), []
    for shape in args.shapes:
        if time.monotonic() - start < args.seconds:
            lines += (tune if args.tune else measure)(shape, args.rows, args)
            head = (
                ["shape", "M", "fastest, µs"]
                if args.tune
                else ["N x K, kernel", "error", *map(str, args.rows)]
            )
            grid = "asym" if args.asym else "sym"
            title = (
                f"One linear on the GPU, {args.bits} bits, group {args.group_size}, {grid}: µs by rows of x"
            )
            publish(f"{conditions(title)}\n\n{markdown(head, lines)}", args.out)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
