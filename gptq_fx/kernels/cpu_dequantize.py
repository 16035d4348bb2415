"""Dequantize blocks of aten's int4 layout (see cpu.py), by C++ where a compiler is at hand.

Plain torch makes six passes over the numbers: at 512 rows that costs a fifth of the matmul itself, the
one pass of the C++ a thirtieth. Inductor's code cache compiles it, once for each machine.
"""

from __future__ import annotations

import ctypes
import functools
import logging

import torch
from torch import Tensor

log = logging.getLogger(__name__)


def block() -> int:
    """Outputs in one block of the layout; 0 where it is not known."""
    return {"AVX512": 64, "AVX2": 32}.get(torch.backends.cpu.get_cpu_capability(), 0)


BLOCK = block()

SOURCE = """
#pragma GCC optimize("tree-loop-vectorize")  // Inductor turns it off: it vectorizes by hand
#include <cstdint>
#include <cstring>
#include <vector>

static inline uint16_t to_bfloat16(float value) {{  // to nearest even; no NaN comes here
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}}

static inline float to_float(uint16_t value) {{
    uint32_t bits = uint32_t(value) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}}

// packed [blocks][K][{half}], scales_mins bf16 [K / group][stride][2] -> out bf16 [K][blocks * 2 * {half}]
extern "C" void dequantize(const uint8_t* packed, const uint16_t* scales_mins, uint16_t* out,
                           int64_t blocks, int64_t K, int64_t group, int64_t stride, int threads) {{
    constexpr int64_t half = {half}, block = 2 * half;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t start = 0; start < K; start += group) {{
        static thread_local std::vector<float> scales, mins;
        scales.resize(blocks * block);
        mins.resize(blocks * block);
        const uint16_t* grid = scales_mins + 2 * (start / group * stride);
        for (int64_t n = 0; n < blocks * block; ++n) {{
            scales[n] = to_float(grid[2 * n]);
            mins[n] = to_float(grid[2 * n + 1]);
        }}
        for (int64_t b = 0; b < blocks; ++b) {{
            const float* s = scales.data() + b * block;
            const float* m = mins.data() + b * block;
            for (int64_t k = start; k < start + group; ++k) {{
                const uint8_t* codes = packed + (b * K + k) * half;
                uint16_t* w = out + (k * blocks + b) * block;
                __builtin_prefetch(codes + 4096);  // the hardware looks no further than a page
                for (int64_t j = 0; j < half; ++j)
                    w[j] = to_bfloat16((int(codes[j] & 15) - 8) * s[j] + m[j]);
                for (int64_t j = 0; j < half; ++j)
                    w[half + j] = to_bfloat16((int(codes[j] >> 4) - 8) * s[half + j] + m[half + j]);
            }}
        }}
    }}
}}
extern "C" void kernel() {{}}
"""


@functools.cache
def _compiled(block: int) -> ctypes.CDLL | None:
    try:
        from torch._inductor.codecache import CppCodeCache

        library = CppCodeCache.load(SOURCE.format(half=block // 2))
        library.dequantize.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 4 + [ctypes.c_int]
        library.dequantize.restype = None
    except Exception as error:  # no compiler, a read-only cache, another Inductor
        log.warning("cpu_int4 dequantizes by plain torch, which is slower for many rows: %s", error)
        return None
    assert isinstance(library, ctypes.CDLL)
    return library


def dequantize_blocks(packed: Tensor, scales_mins: Tensor, out: Tensor, block: int) -> bool:
    """W^T [K, n] into `out` (bf16): whole blocks of outputs.

    packed uint8 [n, K/2] contiguous; scales_mins bf16 [G, n, 2], which may be cut out of a wider one.
    False, with nothing done, where there is no compiler.
    """
    library = _compiled(block)
    if library is None:
        return False
    K, n = out.shape
    assert out.is_contiguous() and packed.is_contiguous() and n % block == 0
    assert scales_mins.stride()[1:] == (2, 1) and scales_mins.stride(0) % 2 == 0
    library.dequantize(
        packed.data_ptr(),
        scales_mins.data_ptr(),
        out.data_ptr(),
        n // block,
        K,
        K // scales_mins.shape[0],
        scales_mins.stride(0) // 2,
        torch.get_num_threads(),
    )
    return True
