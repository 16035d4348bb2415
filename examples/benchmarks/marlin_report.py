"""Registers, spills, shared memory and occupancy of each variant of the Marlin kernels. Needs NVRTC, no GPU.

python examples/benchmarks/marlin_report.py --arch sm_90a > results/marlin_report.md
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from gptq_fx.kernels.marlin import nvrtc, variants

# KiB of shared memory (a multiprocessor, a block) and warps of a multiprocessor: CUDA programming guide.
MACHINES = {
    "sm_80": (164, 163, 64),
    "sm_86": (100, 99, 48),
    "sm_89": (100, 99, 48),
    "sm_90a": (228, 227, 64),
    "sm_100": (228, 227, 64),
    "sm_120": (100, 99, 48),
}
REGISTERS = 64 * 1024  # of a multiprocessor
COLUMNS = (
    *("bits", "dtype", "group", "grid", "kind", "rows", "warps", "stages"),
    *("registers", "spill bytes", "shared bytes", "blocks/SM", "occupancy"),
)


Compiled = variants.Variant | variants.WideVariant | variants.DecodeVariant
FORMS = {variants.PLAIN: "decode", variants.GATED: "decode, gated", variants.SUMMED: "decode, summed"}


def row(variant: Compiled, arch: str) -> tuple[str, int]:
    """One line of the table, and the bytes of spills."""
    per_multiprocessor, per_block, warps = MACHINES[arch]
    sizes = per_multiprocessor * 1024, per_block * 1024
    if isinstance(variant, variants.WideVariant):
        stages, kind, cut = variant.fit(*sizes), "wgmma", f"8, k{variant.tile.k_tiles}"
        log = nvrtc.resources(variant.source(stages), arch, "marlin_wide")
    elif isinstance(variant, variants.DecodeVariant):
        stages, kind, cut = 2, FORMS[variant.form] + ", act-order" * variant.perm, f"{variant.tile.warps}"
        log = nvrtc.resources(variant.source(), arch, "marlin_decode")
    else:
        stages, blocks = variant.fit(*sizes)
        log = nvrtc.resources(variant.source(stages, blocks), arch, "marlin_gemm")
        kind = "act-order" if variant.perm else "mma"
        cut = f"{variant.tile.warps_n}x{variant.tile.warps_k}"
    used = re.search(r"Used (\d+) registers", log)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert used and spilled, log
    registers, spills = int(used[1]), int(spilled[1]) + int(spilled[2])
    # That of decode.cu depends on the call; its blocks have a multiprocessor for themselves.
    decodes = isinstance(variant, variants.DecodeVariant)
    shared = per_block * 1024 if decodes else variant.shared_bytes(stages)
    threads = variant.tile.threads
    resident = min(
        REGISTERS // (-(-registers // 8) * 8 * threads),
        per_multiprocessor * 1024 // (shared + 1024),
        warps * 32 // threads,
    )
    occupancy = resident * threads / (warps * 32)
    tile = variant.tile
    group = variant.group_tiles * 16 or "channel"
    if not decodes:
        kind += "+moe" * variant.moe
    cells = [
        variant.bits,
        "bf16" if variant.bf16 else "fp16",
        group,
        "asym" if variant.asym else "sym",
        kind,
        tile.tokens,
        cut,
        stages,
        registers,
        spills,
        "of the call" if decodes else shared,
        resident,
        f"{occupancy:.0%}",
    ]
    return line(cells), spills


def line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="sm_90a", choices=sorted(MACHINES))
    parser.add_argument("--all", action="store_true", help="every variant, not just bf16 with groups of 128")
    args = parser.parse_args()
    print(f"{args.arch}, NVRTC {nvrtc.version()}\n")
    print(line(COLUMNS))
    print(line(["---"] * len(COLUMNS)))
    total = 0
    every: list[Compiled] = list(variants.every())
    if args.arch == "sm_90a":
        every += variants.every_wide()
    if int(args.arch[3:].rstrip("a")) >= 90:
        every += variants.every_decode()
    for variant in every:
        if args.all or (variant.bf16 and variant.group_tiles == 8):
            text, spills = row(variant, args.arch)
            total += spills
            print(text, flush=True)
    print(f"\nBytes of spills in all: {total}")


if __name__ == "__main__":
    main()
