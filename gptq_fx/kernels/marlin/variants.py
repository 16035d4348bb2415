"""What the CUDA sources are compiled for: the constants of one variant, and which variant a call gets."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
SHARED = ("ptx.cuh", "dequantize.cuh", "experts.cuh", "output.cuh")  # by the kernels that multiply
WIDE = ("wide_tiles.cuh", "wide_load.cuh", "wide_sums.cuh", "wide.cu")
MOST_STAGES = 4


@dataclass(frozen=True)
class Tile:
    """How a block of threads cuts the work; see gemm.cu.

    tokens: rows of x. warps_n, warps_k: warps along the outputs (64 each) and along k. k_tiles: tiles of 16 k
    that a warp takes in a stage. blocks: on a multiprocessor, at least, if its shared memory allows.
    """

    tokens: int
    warps_n: int
    warps_k: int
    k_tiles: int
    blocks: int = 2

    @property
    def threads(self) -> int:
        return 32 * self.warps_n * self.warps_k


# For up to so many rows of x, by bits. Larger inputs are cut into blocks of the last.
TILES: dict[int, tuple[Tile, ...]] = {
    4: (Tile(8, 2, 4, 4), Tile(16, 2, 4, 4, 1), Tile(32, 2, 4, 2), Tile(64, 4, 2, 4, 1)),
    8: (Tile(8, 2, 4, 2), Tile(16, 2, 4, 2), Tile(32, 2, 4, 2), Tile(64, 4, 2, 2, 1)),
}


def tile_for(rows: int, bits: int) -> Tile:
    """The smallest tile that holds `rows`, or the largest of all."""
    return next((tile for tile in TILES[bits] if rows <= tile.tokens), TILES[bits][-1])


@dataclass(frozen=True)
class Variant:
    """One compilation of gemm.cu.

    group_tiles: tiles of 16 k in a group, 2, 4 or 8; 0 where each output has one scale.
    perm: x is read in the order of a permutation. moe: the weights are a stack of experts.
    """

    bits: int
    bf16: bool
    asym: bool
    group_tiles: int
    perm: bool
    moe: bool
    tile: Tile

    @property
    def stage_bytes(self) -> int:
        """Shared memory of one stage: weights, x, scales, zero points."""
        tile = self.tile
        warps = tile.warps_n * tile.warps_k
        chunk = 16 * tile.warps_k * tile.k_tiles
        runs = max(tile.k_tiles // self.group_tiles, 1) if self.group_tiles else 1
        grid = 128 * bool(self.group_tiles) + 8 * self.bits * self.asym
        return warps * tile.k_tiles * 128 * self.bits + tile.tokens * (2 * chunk + 16) + warps * runs * grid

    def shared_bytes(self, stages: int) -> int:
        """Of a block: its stages, and the sums of its warps."""
        return stages * self.stage_bytes + self.tile.warps_k * 8 * (64 * self.tile.warps_n + 4) * 4

    def fit(self, per_multiprocessor: int, per_block: int) -> tuple[int, int]:
        """(stages, blocks a multiprocessor) that fit so many bytes of shared memory.

        A block costs 1 KiB beside its own bytes. Fewer blocks come before fewer than three stages.
        """
        for blocks in range(self.tile.blocks, 0, -1):
            limit = min(per_multiprocessor // blocks - 1024, per_block)
            for stages in range(MOST_STAGES, 1, -1):
                if self.shared_bytes(stages) <= limit and (stages > 2 or blocks == 1):
                    return stages, blocks
        raise AssertionError(f"{self} does not fit {per_block} bytes of shared memory")

    def source(self, stages: int, blocks: int) -> str:
        """The whole text for the compiler."""
        tile = self.tile
        constants = {
            "TOKENS": tile.tokens,
            "WARPS_N": tile.warps_n,
            "WARPS_K": tile.warps_k,
            "K_TILES": tile.k_tiles,
            "STAGES": stages,
            "BLOCKS": blocks,
            "PERM": int(self.perm),
            "MOE": int(self.moe),
            "SHARED": self.shared_bytes(stages),
        }
        head = grid_constants(self.bits, self.bf16, self.asym, self.group_tiles)
        return _join(head | constants, *map(text, (*SHARED, "gemm.cu")))


@dataclass(frozen=True)
class WideTile:
    """How a block of threads of wide.cu cuts the work.

    tokens: rows of x, a multiple of 16. k_tiles: tiles of 16 k in a stage.
    """

    tokens: int
    k_tiles: int = 8

    threads = 384
    outputs = 256


@dataclass(frozen=True)
class WideVariant:
    """One compilation of wide.cu; fields as in Variant."""

    bits: int
    bf16: bool
    asym: bool
    group_tiles: int
    moe: bool
    tile: WideTile

    @property
    def stage_bytes(self) -> int:
        """Shared memory of one stage: x, weights, scales, zero points."""
        tile = self.tile
        run = min(self.group_tiles or tile.k_tiles, tile.k_tiles)
        grid = 512 * bool(self.group_tiles) + 32 * self.bits * self.asym
        weights = tile.k_tiles * 4 * 128 * self.bits
        used = tile.tokens * 32 * tile.k_tiles + weights + tile.k_tiles // run * grid
        return -(-used // 1024) * 1024

    def shared_bytes(self, stages: int) -> int:
        """Of a block: its stages, or in their place the sums; and room to begin at a multiple of 1024.

        Behind them, addresses of the rows of x, two barriers for each stage, and room to turn outputs: 16
        rows for each of eight warps.
        """
        sums = self.tile.tokens * (self.tile.outputs + 4) * 4
        turned = 8 * 16 * 80
        return 1024 + max(stages * self.stage_bytes, sums) + 8 * self.tile.tokens + 16 * stages + turned + 16

    def fit(self, per_multiprocessor: int, per_block: int) -> int:
        """How many stages fit so many bytes of shared memory."""
        limit = min(per_multiprocessor - 1024, per_block)
        for stages in range(MOST_WIDE_STAGES, 2, -1):
            if self.shared_bytes(stages) <= limit:
                return stages
        raise AssertionError(f"{self} does not fit {per_block} bytes of shared memory")

    def source(self, stages: int) -> str:
        """The whole text for the compiler."""
        tile = self.tile
        constants = {
            "TOKENS": tile.tokens,
            "K_TILES": tile.k_tiles,
            "STAGES": stages,
            "MOE": int(self.moe),
            "SHARED": self.shared_bytes(stages),
        }
        head = grid_constants(self.bits, self.bf16, self.asym, self.group_tiles)
        operands = wgmma_operands(tile.tokens)
        return _join(head | constants | operands, *map(text, (*SHARED, *WIDE)))


MOST_WIDE_STAGES = 8
# As TILES, for any bits.
WIDE_TILES = (WideTile(32), WideTile(64), WideTile(96), WideTile(128))


# What a block of rows costs beside its rows, for it dequantizes the weight anew: as much as so many.
DEQUANTIZING_ROWS = 64


def wide_tile_for(rows: int) -> WideTile:
    """The tile that cuts so many rows into the blocks that cost least."""
    return min(WIDE_TILES, key=lambda tile: -(-rows // tile.tokens) * (tile.tokens + DEQUANTIZING_ROWS))


def every_wide() -> Iterator[WideVariant]:
    """All variants of wide.cu that can be asked for."""
    flags = (False, True)
    for bits, bf16, asym, group_tiles, moe in itertools.product(TILES, flags, flags, (0, 2, 4, 8), flags):
        for tile in WIDE_TILES:
            yield WideVariant(bits, bf16, asym, group_tiles, moe, tile)


def wgmma_operands(tokens: int) -> dict[str, int | str]:
    """The numbers of the operands of a wgmma of so many rows of x, as its assembly names them."""
    sums = tokens // 2
    names = [f"%{i}" for i in range(sums + 6)]
    return {
        "WGMMA_TOKENS": tokens,
        "WGMMA_N": f'"{tokens}"',
        "WGMMA_C": f'"{",".join(names[:sums])}"',
        "WGMMA_A": f'"{",".join(names[sums : sums + 4])}"',
        "WGMMA_B": f'"{names[sums + 4]}"',
        "WGMMA_ADD": f'"{names[sums + 5]}"',
        "WGMMA_OUT(c)": ", ".join(f'"+f"(c[{i}])' for i in range(sums)),
    }


PLAIN, GATED, SUMMED = range(3)  # forms of decode.cu


@dataclass(frozen=True)
class DecodeTile:
    """How decode.cu uses a block of threads. tokens: rows of x, 8 or 16."""

    tokens: int
    warps: int

    @property
    def threads(self) -> int:
        return 32 * self.warps


# For up to so many rows of x; and for experts.
DECODE_TILES = (DecodeTile(8, 8), DecodeTile(16, 8))
EXPERTS_TILE = DecodeTile(8, 12)


@dataclass(frozen=True)
class DecodeVariant:
    """One compilation of decode.cu; fields as in Variant."""

    bits: int
    bf16: bool
    asym: bool
    group_tiles: int
    perm: bool
    form: int
    tile: DecodeTile

    @property
    def batch_tiles(self) -> int:
        """Tiles of k that a warp has in its registers."""
        return 32 // self.bits

    @property
    def runs(self) -> int:
        """Groups in a batch."""
        return max(self.batch_tiles // self.group_tiles, 1) if self.group_tiles else 1

    def source(self) -> str:
        """The whole text for the compiler."""
        constants = {
            "PERM": int(self.perm),
            "FORM": self.form,
            "TOKENS": self.tile.tokens,
            "WARPS": self.tile.warps,
            "BATCH_TILES": self.batch_tiles,
        }
        head = grid_constants(self.bits, self.bf16, self.asym, self.group_tiles)
        return _join(head | constants, *map(text, (*SHARED, "decode.cu")))


def every_decode() -> Iterator[DecodeVariant]:
    """All variants of decode.cu that can be asked for."""
    flags = (False, True)
    forms = [
        *((False, PLAIN, tile) for tile in DECODE_TILES),
        (True, PLAIN, DECODE_TILES[0]),
        *((False, form, EXPERTS_TILE) for form in (GATED, SUMMED)),
    ]
    for bits, bf16, asym, group_tiles in itertools.product(TILES, flags, flags, (0, 2, 4, 8)):
        for perm, form, tile in forms:
            yield DecodeVariant(bits, bf16, asym, group_tiles, perm, form, tile)


# Rows of the largest tile that reads x in the order of act-order; one of a stack has no other way.
ORDERED_TOKENS = 16


def every() -> Iterator[Variant]:
    """All variants that can be asked for."""
    flags = (False, True)
    grids = itertools.product(TILES, flags, flags, (0, 2, 4, 8), flags, flags)
    for bits, bf16, asym, group_tiles, perm, moe in grids:
        for tile in TILES[bits]:
            if not perm or tile.tokens <= ORDERED_TOKENS:
                yield Variant(bits, bf16, asym, group_tiles, perm, moe, tile)


def grid_constants(bits: int, bf16: bool, asym: bool, group_tiles: int) -> dict[str, int]:
    return {"BITS": bits, "BF16": int(bf16), "ASYM": int(asym), "GROUP_TILES": group_tiles}


@functools.cache
def text(name: str) -> str:
    return (FOLDER / name).read_text()


def _join(constants: Mapping[str, int | str], *parts: str) -> str:
    return "\n".join([*(f"#define {name} {value}" for name, value in constants.items()), *parts])


def dense_source(bits: int, bf16: bool, asym: bool, group_tiles: int) -> str:
    """dense.cu for one grid."""
    head = grid_constants(bits, bf16, asym, group_tiles)
    return _join(head, text("ptx.cuh"), text("dequantize.cuh"), text("dense.cu"))


def moe_source(bf16: bool) -> str:
    """moe.cu for one dtype."""
    return _join({"BF16": int(bf16)}, text("ptx.cuh"), text("experts.cuh"), text("moe.cu"))
