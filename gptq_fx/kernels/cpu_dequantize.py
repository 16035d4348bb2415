"""Dequantize blocks of aten's int4 layout (see cpu.py), by C++ where a compiler is at hand.

Plain torch makes six passes over the numbers: at 512 rows that costs a fifth of the matmul itself, the
one pass of the C++ a thirtieth. Inductor's code cache compiles it, once for each machine.
"""

from __future__ import annotations

import ctypes
import functools
import logging

from torch import Tensor

log = logging.getLogger(__name__)

SOURCE = """
#pragma GCC optimize("tree-loop-vectorize")  // Inductor turns it off: it vectorizes by hand
#include <cstdint>
#include <cstring>

static inline uint16_t bfloat16(float value) {{  // to nearest even; no NaN comes here
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}}

// packed [blocks][K][{half}] -> out [K][blocks * 2 * {half}] bf16; scales and mins [K / group][stride]
extern "C" void dequantize(const uint8_t* packed, const float* scales, const float* mins, uint16_t* out,
                           int64_t blocks, int64_t K, int64_t group, int64_t stride) {{
    constexpr int64_t half = {half}, block = 2 * half;
    for (int64_t b = 0; b < blocks; ++b)
        for (int64_t k = 0; k < K; ++k) {{
            const uint8_t* codes = packed + (b * K + k) * half;
            const float* s = scales + k / group * stride + b * block;
            const float* m = mins + k / group * stride + b * block;
            uint16_t* w = out + (k * blocks + b) * block;
            for (int64_t j = 0; j < half; ++j)
                w[j] = bfloat16((int(codes[j] & 15) - 8) * s[j] + m[j]);
            for (int64_t j = 0; j < half; ++j)
                w[half + j] = bfloat16((int(codes[j] >> 4) - 8) * s[half + j] + m[half + j]);
        }}
}}
extern "C" void kernel() {{}}
"""


@functools.cache
def _compiled(block: int) -> ctypes.CDLL | None:
    try:
        from torch._inductor.codecache import CppCodeCache

        library = CppCodeCache.load(SOURCE.format(half=block // 2))
        library.dequantize.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 4
        library.dequantize.restype = None
    except Exception as error:  # no compiler, a read-only cache, another Inductor
        log.warning("cpu_int4 dequantizes by plain torch, which is slower for many rows: %s", error)
        return None
    assert isinstance(library, ctypes.CDLL)
    return library


def dequantize_blocks(packed: Tensor, scales: Tensor, mins: Tensor, out: Tensor, block: int) -> bool:
    """W^T [K, n] into `out` (bf16) from the first n outputs of the views, whole blocks.

    packed uint8 [>= n, K/2]; scales, mins fp32 [G, >= n], columns adjacent. False, with nothing done,
    where there is no compiler.
    """
    library = _compiled(block)
    if library is None:
        return False
    K, n = out.shape
    assert out.is_contiguous() and packed.is_contiguous() and n % block == 0
    assert scales.stride() == mins.stride() and scales.stride(1) == 1
    library.dequantize(
        packed.data_ptr(),
        scales.data_ptr(),
        mins.data_ptr(),
        out.data_ptr(),
        n // block,
        K,
        K // scales.shape[0],
        scales.stride(0),
    )
    return True
