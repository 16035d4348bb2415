"""Microseconds of the Marlin kernels on an NVIDIA GPU beside humming, aten's int4 and cuBLAS, in one run.

    python examples/benchmarks/marlin.py [--only layer variants experts tiles] [--rows 1 16] [--out FILE]

One CUDA graph holds one call for each copy of the weights, which are more than the L2 holds; the median of
its replays, divided by the copies. Error: ||y - x W^T|| / ||x W^T|| against fp32.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

import gpu_op
import table
from gptq_fx import QuantizedWeight, Scheme
from gptq_fx.kernels import LinearSpec
from gptq_fx.kernels.marlin import MARLIN, gemm, launch, nvrtc, ops
from gptq_fx.kernels.marlin.variants import Tile, Variant

# The linears of one layer, q/k/v and gate/up merged: (N, K).
LAYERS = {
    "llama-3.1-8b": {"o": (4096, 4096), "qkv": (6144, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
    "llama-3.1-70b": {
        "o": (8192, 8192),
        "qkv": (10240, 8192),
        "gate_up": (57344, 8192),
        "down": (8192, 28672),
    },
}
LAYER = LAYERS["llama-3.1-8b"]
ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
L2_COLD = 288 * 2**20  # bytes of weights in a graph
# Sums of Marlin of vLLM 0.33, NVIDIA H200, 2026-11-22.
UPSTREAM = {1: 77.7, 16: 77.1, 64: 125, 128: 204, 256: 333.6, 512: 622.7, 1024: 1213.9, 4096: 4972.4}
MODELS = {"Qwen3-30B-A3B": (128, 8, 2048, 768), "Mixtral-8x7B": (8, 2, 4096, 14336)}  # E, k, H, I
Call = Callable[[int], Tensor]  # with the n-th copy of the weights


def measure(call: Call, copies: int) -> float:
    """Microseconds of one call, the weights cold."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for n in (0, copies - 1):
            call(n)
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            for n in range(copies):
                call(n)
    times = []
    for _ in range(24):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[4:]) / copies * 1e3


def copies_of(bytes_each: int) -> int:
    return max(2, min(32, -(-L2_COLD // bytes_each)))


def make(N: int, K: int, scheme: Scheme, experts: int | None = None) -> tuple[LinearSpec, QuantizedWeight]:
    spec = LinearSpec(K, N, scheme, torch.bfloat16, "cuda", experts)
    lead = () if experts is None else (experts,)
    qweight = torch.randint(-(2**31), 2**31, (*lead, K * scheme.bits // 32, N), device="cuda").to(torch.int32)
    scales = ((torch.rand(*lead, spec.groups, N, device="cuda") + 1) * 0.04 / 2**scheme.bits).bfloat16()
    shape = (*lead, spec.groups, N * scheme.bits // 32)
    qzeros = None
    if not scheme.sym:
        qzeros = torch.randint(-(2**31), 2**31, shape, device="cuda").to(torch.int32)
    g_idx = None
    if scheme.desc_act:
        g_idx = (torch.randperm(K, device="cuda") // spec.group_size).to(torch.int32)
    return spec, QuantizedWeight(scheme.bits, K, qweight, scales, qzeros, g_idx)


def marlin(spec: LinearSpec, weight: QuantizedWeight, x: Tensor) -> tuple[Call, int]:
    tensors = MARLIN.pack(weight, spec)
    size = sum(t.numel() * t.element_size() for t in tensors if t is not None)
    packs = [[t if t is None else t.clone() for t in tensors] for _ in range(copies_of(size))]
    args = MARLIN.op_args(spec)
    return lambda n: ops.linear(x, *packs[n], None, *args), len(packs)  # type: ignore[arg-type]


def cublas(spec: LinearSpec, weight: QuantizedWeight, x: Tensor) -> tuple[Call, int]:
    W = weight.dequantize()
    packs = [W.clone() for _ in range(copies_of(W.numel() * 2))]
    return lambda n: torch.mm(x, packs[n].T), len(packs)


def int4pack(spec: LinearSpec, weight: QuantizedWeight, x: Tensor) -> tuple[Call, int] | None:
    if x.shape[0] > 64:
        return None
    codes = weight.codes().T
    packed = torch.ops.aten._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).contiguous(), 8)
    grid = torch.stack([weight.scales, torch.zeros_like(weight.scales)], -1)
    packs = [(packed.clone(), grid.clone()) for _ in range(copies_of(packed.numel() * 4))]
    return lambda n: torch.ops.aten._weight_int4pack_mm(x, packs[n][0], 128, packs[n][1]), len(packs)


def humming(spec: LinearSpec, weight: QuantizedWeight, x: Tensor) -> tuple[Call, int] | None:
    """The library called directly, with its own choice for so many rows."""
    configs, _ = gpu_op.directly(spec, x.shape[0])
    packs = gpu_op.copies(gpu_op.humming.pack(weight, spec))
    out = torch.empty(x.shape[0], spec.out_features, dtype=x.dtype, device="cuda")
    locks = torch.zeros(8192, dtype=torch.int32, device="cuda")
    launch_kernel = gpu_op.humming_library.launcher()

    def call(n: int) -> Tensor:
        rest = [None] * 5
        launch_kernel(configs, x, *packs[n][:2], *rest, out, None, None, None, None, locks, 1, 0)  # type: ignore[misc]
        return out

    return call, len(packs)


def humming_or_nothing(spec: LinearSpec, weight: QuantizedWeight, x: Tensor) -> tuple[Call, int] | None:
    """A peer that fails is left out, with its error, and costs no other figure."""
    try:
        return humming(spec, weight, x)
    except Exception as error:
        print(f"humming at {spec.shape}, {x.shape[0]} rows: {error!r}", flush=True)
        return None


BACKENDS = {"marlin": marlin, "humming": humming_or_nothing, "int4pack": int4pack, "cublas": cublas}


def layer_table(
    rows_of_x: Sequence[int] = ROWS, peers: Sequence[str] = tuple(BACKENDS), model: str = "llama-3.1-8b"
) -> str:
    """Each linear, and the sum of the layer. A row is printed as soon as it is known."""
    layer, upstream = LAYERS[model], UPSTREAM if model == "llama-3.1-8b" else {}
    backends = {"marlin": marlin, **{name: BACKENDS[name] for name in BACKENDS if name in peers}}
    made = {name: make(N, K, Scheme(4, 128)) for name, (N, K) in layer.items()}
    errors: dict[str, float] = dict.fromkeys(backends, 0.0)
    rows = []
    for M in rows_of_x:
        times: dict[str, list[float]] = {backend: [] for backend in backends}
        for spec, weight in made.values():
            x = torch.randn(M, spec.in_features, device="cuda").bfloat16()
            expected = x.float() @ weight.dequantize(torch.float32).T
            for backend, prepare in backends.items():
                prepared = prepare(spec, weight, x)
                if prepared is None:
                    continue
                call, copies = prepared
                error = float((call(0).float() - expected).norm() / expected.norm())
                errors[backend] = max(errors[backend], error)
                times[backend].append(measure(call, copies))
                del prepared, call
        sums = {b: sum(found) if len(found) == len(made) else None for b, found in times.items()}
        own = sums.pop("marlin")
        assert own is not None
        cells = [*(f"{t:.1f}" for t in times["marlin"]), f"{own:.1f}"]
        cells += ["" if other is None else f"{other:.1f}" for other in sums.values()]
        cells += ["" if other is None else f"{other / own:.2f}" for other in sums.values()]
        if "humming" in times and len(times["humming"]) == len(made):
            worst = max(t / h for t, h in zip(times["marlin"], times["humming"], strict=True))
            cells.append(f"{worst:.2f}")
        else:
            cells.append("")
        rows.append([str(M), *cells, f"{upstream[M] / own:.2f}" if M in upstream else ""])
        print(" | ".join(rows[-1]), flush=True)
    names = [b for b in backends if b != "marlin"]
    head = ["rows", *layer, "sum marlin", *(f"sum {b}" for b in names), *(f"{b}/marlin" for b in names)]
    text = table.markdown([*head, "worst marlin/humming of a linear", "upstream/marlin"], rows)
    return text + "\n\nlargest error: " + ", ".join(f"{b} {e:.4f}" for b, e in errors.items())


def variants_table() -> str:
    """Sums over the layer of other grids, as parts of 4 bits, symmetric, groups of 128."""
    schemes = {
        "base": Scheme(4, 128),
        "act-order": Scheme(4, 128, desc_act=True),
        "asym": Scheme(4, 128, sym=False),
        "g32": Scheme(4, 32),
        "channel": Scheme(4, -1),
        "8 bits": Scheme(8, 128),
        "8 bits asym": Scheme(8, 128, sym=False),
    }
    sums = {}
    for label, scheme in schemes.items():
        for M in (1, 8, 16, 64):
            total = 0.0
            for N, K in LAYER.values():
                spec, weight = make(N, K, scheme)
                total += measure(*marlin(spec, weight, torch.randn(M, K, device="cuda").bfloat16()))
            sums[label, M] = total
            print(label, M, f"{total:.1f}", flush=True)
    rows = [
        [label, *(f"{sums[label, M]:.1f} ({sums[label, M] / sums['base', M]:.2f})" for M in (1, 8, 16, 64))]
        for label in schemes
    ]
    return table.markdown(["grid", "1 row", "8", "16", "64"], rows)


def _block(calls: Sequence[Sequence[Tensor]], packs: Sequence[Sequence[Tensor | None]], args: object) -> Call:
    first, second = packs
    return lambda n: ops.marlin_experts(*calls[n], first, second, None, None, "silu", *args)  # type: ignore


def experts_table() -> str:
    """A whole block, routed at random."""
    rows = []
    for model, (E, k, H, inner) in MODELS.items():
        specs = [make(2 * inner, H, Scheme(4, 128), E), make(H, inner, Scheme(4, 128), E)]
        packs = [MARLIN.pack_all(weight, spec) for spec, weight in specs]
        args = [list(MARLIN.op_args(spec)) for spec, _ in specs]
        cells = []
        for T in (1, 8, 64, 512, 4096):
            calls = []
            for _ in range(16 if T <= 8 else 4):
                x = torch.randn(T, H, device="cuda").bfloat16()
                ids = torch.rand(T, E, device="cuda").topk(k).indices
                calls.append((x, ids, torch.rand(T, k, device="cuda")))
            cells.append(f"{measure(_block(calls, packs, args), len(calls)):.1f}")
        rows.append([model, *cells])
    return table.markdown(["block of experts, us", "1 token", "8", "64", "512", "4096"], rows)


CANDIDATES: dict[int, Sequence[Tile]] = {
    8: [
        *(Tile(8, 2, 4, 4, b) for b in (1, 2)),
        *(Tile(8, 2, 4, 2, b) for b in (2, 3, 4)),
        *(Tile(8, 1, 8, 4, b) for b in (1, 2)),
        *(Tile(8, 1, 8, 2, b) for b in (2, 3)),
        *(Tile(8, 4, 2, 4, b) for b in (1, 2)),
        *(Tile(8, 4, 2, 2, b) for b in (2, 3)),
        *(Tile(8, 2, 2, 4, b) for b in (3, 4)),
        *(Tile(8, 1, 4, 4, b) for b in (4, 6)),
        *(Tile(8, 4, 4, 2, b) for b in (1,)),
    ],
    16: [
        *(Tile(16, 2, 4, 4, b) for b in (1, 2)),
        *(Tile(16, 2, 4, 2, b) for b in (2,)),
        *(Tile(16, 4, 2, 4, b) for b in (1, 2)),
        *(Tile(16, 4, 2, 2, b) for b in (2,)),
        *(Tile(16, 1, 8, 2, b) for b in (2,)),
        *(Tile(16, 2, 2, 4, b) for b in (3, 4)),
    ],
    32: [
        *(Tile(32, 4, 2, 4, b) for b in (1, 2)),
        *(Tile(32, 4, 2, 2, b) for b in (2,)),
        *(Tile(32, 2, 4, 2, b) for b in (2,)),
        *(Tile(32, 4, 1, 4, b) for b in (2, 3)),
        *(Tile(32, 2, 2, 4, b) for b in (2, 3)),
    ],
    64: [
        *(Tile(64, 4, 1, 4, b) for b in (1, 2)),
        *(Tile(64, 4, 1, 2, b) for b in (2,)),
        *(Tile(64, 4, 2, 2, b) for b in (1,)),
        *(Tile(64, 4, 2, 4, b) for b in (1,)),
        *(Tile(64, 2, 2, 4, b) for b in (2,)),
        *(Tile(64, 2, 1, 4, b) for b in (2, 3)),
        *(Tile(64, 8, 1, 2, b) for b in (1,)),
    ],
}


def tiles_table() -> str:
    """Which tile serves which shape best: the candidates for the table in variants.py."""
    where = launch.device(torch.cuda.current_device())

    def build(tile: Tile) -> None:
        variant = Variant(4, True, False, 8, False, False, tile)
        stages, blocks = variant.fit(where.shared_per_multiprocessor, where.shared_per_block)
        nvrtc.compile(variant.source(stages, blocks), where.arch, "marlin_gemm")

    with ThreadPoolExecutor() as pool:
        list(pool.map(build, itertools.chain(*CANDIDATES.values())))
    rows = []
    for rows_of_x, tokens in ((1, 8), (8, 8), (16, 16), (32, 32), (64, 64), (128, 64), (256, 64)):
        times: dict[Tile, list[float]] = {tile: [] for tile in CANDIDATES[tokens]}
        for N, K in LAYER.values():
            spec, weight = make(N, K, Scheme(4, 128))
            tensors = MARLIN.pack(weight, spec)
            packs = [
                gemm.Weight(*(t if t is None else t.clone() for t in tensors), *MARLIN.op_args(spec))  # type: ignore[arg-type]
                for _ in range(copies_of(N * K // 2))
            ]
            x = torch.randn(rows_of_x, K, device="cuda").bfloat16()
            out = torch.empty(rows_of_x, N, dtype=x.dtype, device="cuda")
            for tile in times:

                def run(n: int, tile: Tile = tile) -> Tensor:
                    gemm.gemm(x, packs[n], None, tile, out, None)  # noqa: B023
                    return out  # noqa: B023

                times[tile].append(measure(run, len(packs)))
        for tile, found in sorted(times.items(), key=lambda item: sum(item[1])):
            shape = f"{tile.tokens} {tile.warps_n}x{tile.warps_k} k{tile.k_tiles} b{tile.blocks}"
            rows.append([f"{rows_of_x}: {shape}", *(f"{t:.1f}" for t in found), f"{sum(found):.1f}"])
    return table.markdown(["rows: tile", *LAYER, "sum"], rows)


TABLES = {"layer": layer_table, "variants": variants_table, "experts": experts_table, "tiles": tiles_table}


def main() -> None:
    parser = table.parser(__doc__ or "")
    parser.add_argument("--only", nargs="+", choices=list(TABLES), default=["layer", "variants", "experts"])
    parser.add_argument(
        "--rows", nargs="+", type=int, default=list(ROWS), help="of x, in the table of the layer"
    )
    parser.add_argument("--peers", nargs="+", choices=list(BACKENDS)[1:], default=list(BACKENDS)[1:])
    parser.add_argument("--model", choices=list(LAYERS), default="llama-3.1-8b", help="whose layer")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    text = table.conditions("Marlin kernels")
    print(text)
    for name in args.only:
        part = layer_table(args.rows, args.peers, args.model) if name == "layer" else TABLES[name]()
        print(f"\n{part}", flush=True)
        text += f"\n\n{part}"
        if args.out is not None:  # what is done is kept, whatever comes
            args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
