"""From how many rows on dequantize-and-matmul beats aten's int4 kernel: FEW_ROWS in kernels/cpu.py."""

import itertools
import time
from collections.abc import Callable
from statistics import median

import torch
from tqdm import tqdm

from gptq_fx import Scheme
from gptq_fx.grid import round_to_nearest
from gptq_fx.kernels.cpu import cpu_int4_many_rows, pack
from gptq_fx.kernels.registry import LinearSpec
from table import conditions, markdown, parser, publish

SHAPES = ((576, 576, 64), (1536, 576, 64), (2048, 2048, 128), (8192, 2048, 128), (2048, 8192, 128))
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128, 512)
ROUNDS = 9
SECONDS = 0.01  # of calls in one round, at least


def milliseconds(call: Callable[[], object]) -> float:
    calls, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < SECONDS:
        call()
        calls += 1
    return 1000 * elapsed / calls


@torch.no_grad()
def measure(rows: int, out_features: int, in_features: int, group_size: int) -> list[str]:
    scheme = Scheme(4, group_size)
    spec = LinearSpec(in_features, out_features, scheme, torch.bfloat16, "cpu")
    dense = torch.randn(out_features, in_features, dtype=torch.bfloat16)
    packed, scales_mins = pack(round_to_nearest(dense, scheme), spec)
    x = torch.randn(rows, in_features, dtype=torch.bfloat16)
    out = x.new_empty(rows, out_features)
    int4 = torch.ops.aten._weight_int4pack_mm_for_cpu
    ways = (
        lambda: torch.nn.functional.linear(x, dense),
        lambda: int4(x, packed, group_size, scales_mins),
        lambda: cpu_int4_many_rows(x, packed, scales_mins, out),
    )
    for way in ways:
        way()
    rounds = [[milliseconds(way) for way in ways] for _ in range(ROUNDS)]
    bf16, few, many = map(median, zip(*rounds, strict=True))
    shape = f"{out_features} x {in_features}, g{group_size}"
    winner = "int4" if few <= many else "dequantize"
    return [shape, f"{rows}", f"{bf16:.3f}", f"{few:.3f}", f"{many:.3f}", winner]


def main() -> None:
    args = parser(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    cases = list(itertools.product(SHAPES, ROWS))
    rows = [measure(rows, *shape) for shape, rows in tqdm(cases, delay=2)]
    head = ["N x K", "rows", "bf16 [ms]", "int4 kernel [ms]", "dequantize, matmul [ms]", "faster"]
    title = f"One 4-bit linear on the CPU, medians of {ROUNDS} rounds"
    publish(f"{conditions(title)}\n\n{markdown(head, rows)}", args.out)


if __name__ == "__main__":
    main()
