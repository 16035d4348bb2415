"""One product on a GPU: gptq_fx's op, humming-kernels called directly, and cuBLAS; MoE blocks; attention.

Device time: a CUDA graph of one call for each of several copies of the weights, 288 MB of them in all, so
that none is in the cache; the median of its replays, divided by the copies. Host time: of 200 eager calls,
"host us" of an nn.Linear as models call it, "op" and "body" of the kernel's op and of the function behind it.
"""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptq_fx import QuantizedParameter, QuantizedWeight, Scheme
from gptq_fx.kernels import LinearSpec, Tensors, humming, humming_experts, humming_library
from gptq_fx.packed import PackedWeight
from gptq_fx.parameter import as_parameter
from table import conditions, markdown, parser, publish

SHAPES = {"o": (4096, 4096), "qkv": (6144, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
ROWS = (1, 8, 16, 32, 64, 128, 256, 1024, 4096)
MODELS = {"Qwen3-30B-A3B": (128, 8, 2048, 768), "Mixtral-8x7B": (8, 2, 4096, 14336)}
TOKENS = (1, 8, 64, 512, 4096)


def graph_us(calls: list[Callable[[], Any]], replays: int = 20) -> float:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    times = []
    for _ in range(replays + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return 1e3 * median(times[2:]) / len(calls)


def host_us(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(200):
            call()
        times.append((time.perf_counter() - start) / 200)
        torch.cuda.synchronize()
    return 1e6 * min(times)


def weight(spec: LinearSpec) -> QuantizedWeight:
    lead = () if spec.experts is None else (spec.experts,)
    shape = (*lead, spec.in_features, spec.out_features)
    codes = torch.randint(2**spec.scheme.bits, shape, dtype=torch.uint8, device="cuda")
    scales = torch.rand(*lead, spec.groups, spec.out_features, device="cuda") * 0.002 + 0.003
    return QuantizedWeight.from_codes(codes, scales.to(spec.dtype), None, spec.scheme.bits)


def module(quantized: QuantizedWeight, spec: LinearSpec) -> torch.nn.Linear:
    """What quantize leaves, packed for humming."""
    packed = PackedWeight(quantized, spec.scheme, None)
    packed.lower(humming.HUMMING)
    made = torch.nn.Linear(spec.in_features, spec.out_features, bias=False, device="meta")
    made.weight = as_parameter(QuantizedParameter(packed))
    return made


def copies(tensors: Tensors) -> list[Tensors]:
    size = sum(t.nbytes for t in tensors if t is not None)
    count = max(2, min(32, -(-(288 << 20) // size)))
    return [tensors, *(tuple(None if t is None else t.clone() for t in tensors) for _ in range(count - 1))]


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def show(table: list[list[str]], *row: object) -> None:
    table.append([f"{x:.1f}" if isinstance(x, float) else str(x) for x in row])
    print(" | ".join(table[-1]), flush=True)


def directly(spec: LinearSpec, M: int) -> tuple[Tensor, Any]:
    """The library's own choice for M rows, made by its own functions: configs, and the shape of a tile."""
    from humming.kernel.humming import HummingKernel
    from humming.tune import get_heuristics_config

    layer = humming_library._layer(humming.problem(spec, 0))
    config = dict(get_heuristics_config(layer, shape_m=M, gemm_type="dense"))
    compute = json.dumps({"gemm_type": "dense", "use_f16_accum": False, "use_batch_invariant": False})
    made = HummingKernel.prepare_kernels(layer.to_str(), compute, [(0, 1 << 30, config)])
    return made, config["block_shape"]


def dense_rows(bits: int, rows: tuple[int, ...]) -> list[list[str]]:
    table: list[list[str]] = []
    for name, (N, K) in SHAPES.items():
        spec = LinearSpec(K, N, Scheme(bits, 128, True), torch.bfloat16, "cuda")
        start = time.perf_counter()
        humming.prepare([spec])
        print(f"{name} {N}x{K}: kernels ready after {time.perf_counter() - start:.1f} s", flush=True)
        quantized = weight(spec)
        packs = copies(humming.pack(quantized, spec))
        layer = module(quantized, spec)
        for M in rows:
            dense_row(table, name, spec, M, quantized.dequantize(), packs, layer)
    return table


def dense_row(
    table: list[list[str]],
    name: str,
    spec: LinearSpec,
    M: int,
    dense: Tensor,
    packs: list[Tensors],
    layer: torch.nn.Linear,
) -> None:
    x = torch.randn(M, spec.in_features, dtype=torch.bfloat16, device="cuda")
    out = x.new_empty(M, spec.out_features)
    configs, tile = directly(spec, M)
    locks = torch.zeros(8192, dtype=torch.int32, device="cuda")
    launch, args, (pack, *_) = humming_library.launcher(), humming.op_args(spec), packs

    def ours(pack: Tensors) -> Tensor:
        return humming.humming_linear(x, *pack, None, *args)

    def body() -> Tensor:
        return humming.linear(x, *pack, None, *args)

    def theirs(pack: Tensors) -> None:
        launch(
            configs, x, pack[0], pack[1], None, None, None, None, None, out,
            None, None, None, None, locks, 1, 0,
        )  # fmt: skip

    error = relative(ours(pack), x.double() @ dense.double().T)
    a = graph_us([lambda p=p: ours(p) for p in packs])
    b = graph_us([lambda p=p: theirs(p) for p in packs])
    denses = [dense.clone() for _ in range(max(2, min(8, -(-(288 << 20) // dense.nbytes))))]
    c = graph_us([lambda w=w: F.linear(x, w) for w in denses])
    tokens = x[None]
    called = (
        lambda: layer(tokens), lambda: ours(pack), body, lambda: theirs(pack),
        lambda: F.linear(x, dense),
    )  # fmt: skip
    host = [host_us(f) for f in called]
    show(
        table,
        f"{name} {tuple(dense.shape)}",
        M,
        a,
        b,
        f"{a / b:.3f}",
        c,
        f"{c / a:.2f}",
        f"{error:.4f}",
        *host,
        tile,
    )


def block_rows(tokens: tuple[int, ...]) -> list[list[str]]:
    table: list[list[str]] = []
    for name, (E, k, H, inner) in MODELS.items():
        up = LinearSpec(H, 2 * inner, Scheme(4, 128, True), torch.bfloat16, "cuda", E)
        down = replace(up, in_features=inner, out_features=H)
        start = time.perf_counter()
        humming.prepare([up, down])
        print(f"{name}: kernels ready after {time.perf_counter() - start:.1f} s", flush=True)
        weights = [weight(up), weight(down)]
        packs = [humming.pack(w, s) for w, s in zip(weights, (up, down), strict=True)]
        for T in tokens:
            block_row(table, name, T, k, (up, down), weights, packs)
    return table


def block_row(
    table: list[list[str]], name: str, T: int, k: int, specs: Any, weights: Any, packs: list[Tensors]
) -> None:
    up, down = specs
    routes = []
    for _ in range(max(2, 16 // T)):
        scores, ids = torch.randn(T, up.experts, device="cuda").topk(k)
        x = torch.randn(T, up.in_features, dtype=torch.bfloat16, device="cuda")
        routes.append((x, ids, scores.softmax(-1)))

    def block(x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
        return humming_experts.humming_block(
            x, ids, scores, *packs, None, None, "silu", humming.op_args(up), humming.op_args(down)
        )

    error = "not checked"
    if T <= 512:
        exact = exact_block(*routes[0], weights)
        error = f"{relative(block(*routes[0]), exact):.4f}"
    us = graph_us([lambda r=r: block(*r) for r in routes])
    show(table, name, T, us, error, host_us(lambda: block(*routes[0])))


def exact_block(x: Tensor, ids: Tensor, scores: Tensor, weights: Any) -> Tensor:
    exact = torch.zeros(x.shape, dtype=torch.float64, device="cuda")
    for e in ids.unique().tolist():
        token, place = (ids == e).nonzero(as_tuple=True)
        gate, up = (x[token].double() @ weights[0].expert(e).dequantize(torch.float64).T).chunk(2, -1)
        y = (F.silu(gate) * up) @ weights[1].expert(e).dequantize(torch.float64).T
        exact.index_add_(0, token, y * scores[token, place, None].double())
    return exact


def attention_row(table: list[list[str]], B: int) -> None:
    """One new position of 32 heads on 8, 384 positions in the cache, a mask."""
    q = torch.randn(B, 32, 1, 128, dtype=torch.bfloat16, device="cuda")
    k, v = (torch.randn(B, 8, 384, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    mask = (torch.arange(384, device="cuda") < 300).expand(B, 1, 1, 384).contiguous()

    def repeated() -> Tensor:
        many = [t[:, :, None].expand(B, 8, 4, 384, 128).reshape(B, 32, 384, 128) for t in (k, v)]
        return F.scaled_dot_product_attention(q, *many, mask)

    def enable_gqa() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

    def queries_as_positions() -> Tensor:
        y = F.scaled_dot_product_attention(q.reshape(B, 8, 4, 128), k, v, mask)
        return y.reshape(B, 32, 1, 128)

    exact = repeated().double()
    for form in (repeated, enable_gqa, queries_as_positions):
        show(table, form.__name__, B, graph_us([form] * 20), f"{relative(form(), exact):.1e}")


def attention_rows() -> list[list[str]]:
    table: list[list[str]] = []
    for B in (1, 16):
        attention_row(table, B)
    return table


def main() -> None:
    cli = parser(__doc__.splitlines()[0])
    parts = ("dense", "blocks", "attention")
    cli.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    cli.add_argument("--bits", type=int, default=4)
    cli.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    cli.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    args = cli.parse_args()
    text = [conditions("One product on a GPU")]
    if "dense" in args.only:
        head = [
            "shape", "rows", "gptq_fx us", "humming us", "ratio", "cuBLAS us", "speed-up", "error", "host us",
            "host us, op", "host us, body", "humming host us", "linear host us", "their tile",
        ]  # fmt: skip
        text += ["", markdown(head, dense_rows(args.bits, tuple(args.rows)))]
    if "blocks" in args.only:
        head = ["experts", "tokens", "block us", "error", "host us"]
        text += ["", markdown(head, block_rows(tuple(args.tokens)))]
    if "attention" in args.only:
        text += ["", markdown(["attention", "sequences", "us", "difference"], attention_rows())]
    publish("\n".join(text), args.out)


if __name__ == "__main__":
    main()
