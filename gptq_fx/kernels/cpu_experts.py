"""Experts on the CPU, for few rows: one pass of C++ over the weights of the experts that are hit.

aten's kernel is called expert by expert, and a decode step has many small ones: starting the threads costs
more than the product. Here all rows and blocks of outputs of a call are shared out at once. The layout is
aten's, as cpu.py tells it.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from gptq_fx.kernels.block import ACTIVATIONS, BLOCK_ARGUMENTS, block_fake, experts
from gptq_fx.kernels.cpu_dequantize import BLOCK
from gptq_fx.kernels.grouped import grouped_linear, indexed_linear
from gptq_fx.kernels.registry import ExpertOps, LinearSpec, Tensors
from gptq_fx.ops import define_opaque

log = logging.getLogger(__name__)

# Pairs of a row and its expert up to which this is faster than gathering the rows of each expert.
FEW_PAIRS = 64

SOURCE = """
#include <immintrin.h>
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
constexpr int lanes = 16;
typedef __m512 floats;
typedef __m512i ints;
static inline ints load(const uint8_t* p) {{
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
}}
static inline floats low_codes(ints c) {{
    return _mm512_cvtepi32_ps(_mm512_and_si512(c, _mm512_set1_epi32(15)));
}}
static inline floats high_codes(ints c) {{
    return _mm512_cvtepi32_ps(_mm512_srli_epi32(c, 4));
}}
static inline floats splat(float x) {{ return _mm512_set1_ps(x); }}
static inline floats fma(floats a, floats b, floats c) {{ return _mm512_fmadd_ps(a, b, c); }}
static inline void store(float* p, floats v) {{ _mm512_storeu_ps(p, v); }}
#else
constexpr int lanes = 8;
typedef __m256 floats;
typedef __m256i ints;
static inline ints load(const uint8_t* p) {{
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
}}
static inline floats low_codes(ints c) {{
    return _mm256_cvtepi32_ps(_mm256_and_si256(c, _mm256_set1_epi32(15)));
}}
static inline floats high_codes(ints c) {{
    return _mm256_cvtepi32_ps(_mm256_srli_epi32(c, 4));
}}
static inline floats splat(float x) {{ return _mm256_set1_ps(x); }}
static inline floats fma(floats a, floats b, floats c) {{ return _mm256_fmadd_ps(a, b, c); }}
static inline void store(float* p, floats v) {{ _mm256_storeu_ps(p, v); }}
#endif

static inline uint16_t to_bfloat16(float value) {{  // to nearest even; NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (bits >> 16) | 0x40;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}}

static inline float to_float(uint16_t value) {{
    uint32_t bits = uint32_t(value) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}}

// out[s] = x[s / share] W[ids[s]]^T + bias[ids[s]], zeros where ids[s] is no expert.
// packed [E][blocks][K][{half}], scales_mins bf16 [E][K / group][blocks * 2 * {half}][2], x float [][K]
extern "C" void linear(const uint8_t* packed, const uint16_t* scales_mins, const float* x, const int64_t* ids,
                       const uint16_t* bias, uint16_t* out, int64_t rows, int64_t share, int64_t E,
                       int64_t K, int64_t blocks, int64_t group, int threads) {{
    constexpr int half = {half}, block = 2 * half, parts = half / lanes;
    const int64_t N = blocks * block;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t task = 0; task < rows * blocks; ++task) {{
        const int64_t s = task / blocks, b = task % blocks, e = ids[s];
        uint16_t* y = out + s * N + b * block;
        if (e < 0 || e >= E) {{
            std::memset(y, 0, block * sizeof(uint16_t));
            continue;
        }}
        const float* row = x + s / share * K;
        const uint8_t* codes = packed + (e * blocks + b) * K * half;
        float total[block] = {{}};
        for (int64_t start = 0; start < K; start += group) {{
            // Two numbers of x at a time, each with its own sums: one chain of them would wait for itself.
            floats low[2][parts], high[2][parts];
            for (int i = 0; i < 2; ++i)
                for (int p = 0; p < parts; ++p) low[i][p] = high[i][p] = splat(0);
            float sums[2] = {{0, 0}};
            for (int64_t k = start; k < start + group; k += 2) {{
                for (int i = 0; i < 2; ++i, codes += half) {{
                    sums[i] += row[k + i];
                    const floats xk = splat(row[k + i]);
                    for (int p = 0; p < parts; ++p) {{
                        const ints c = load(codes + lanes * p);
                        low[i][p] = fma(xk, low_codes(c), low[i][p]);
                        high[i][p] = fma(xk, high_codes(c), high[i][p]);
                    }}
                }}
            }}
            const float sum = sums[0] + sums[1];
            float products[block];
            for (int p = 0; p < parts; ++p) {{
                store(products + lanes * p, low[0][p] + low[1][p]);
                store(products + half + lanes * p, high[0][p] + high[1][p]);
            }}
            const uint16_t* grid = scales_mins + ((e * (K / group) + start / group) * N + b * block) * 2;
            for (int n = 0; n < block; ++n)
                total[n] += to_float(grid[2 * n]) * (products[n] - 8 * sum) + to_float(grid[2 * n + 1]) * sum;
        }}
        for (int n = 0; n < block; ++n)
            y[n] = to_bfloat16(total[n] + (bias ? to_float(bias[e * N + b * block + n]) : 0.f));
    }}
}}
extern "C" void kernel() {{}}
"""


@functools.cache
def _compiled() -> ctypes.CDLL | None:
    try:
        from torch._inductor.codecache import CppCodeCache

        found = CppCodeCache.load(SOURCE.format(half=BLOCK // 2))
        found.linear.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 6 + [ctypes.c_int]
        found.linear.restype = None
    except Exception as error:  # no compiler, a read-only cache, another Inductor
        log.warning("cpu_int4 runs experts one by one, which is slower for few rows: %s", error)
        return None
    assert isinstance(found, ctypes.CDLL)
    return found


def _few(
    library: ctypes.CDLL,
    x: Tensor,
    ids: Tensor,
    packed: Tensor,
    scales_mins: Tensor,
    bias: Tensor | None,
    group: int,
) -> Tensor:
    """x bf16 [R, K], ids [S] with S a multiple of R, the pack of a stack, bias [E, N] -> bf16 [S, N].

    Row s of the result is that of x[s // (S / R)] by expert ids[s].
    """
    E, N = packed.shape[:2]
    rows, which = x.float().contiguous(), ids.to(torch.int64).contiguous()
    bias = None if bias is None else bias.bfloat16().contiguous()
    out = x.new_empty(which.numel(), N)
    assert packed.is_contiguous() and scales_mins.is_contiguous()
    library.linear(
        packed.data_ptr(),
        scales_mins.data_ptr(),
        rows.data_ptr(),
        which.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        which.numel(),
        which.numel() // max(x.shape[0], 1),
        E,
        x.shape[-1],
        N // BLOCK,
        group,
        torch.get_num_threads(),
    )
    return out


@define_opaque(
    "cpu_int4_indexed(Tensor x, Tensor packed, Tensor scales_mins, Tensor ids, int group_size) -> Tensor",
    fake=lambda x, packed, scales_mins, ids, group_size: x.new_empty(x.shape[0], packed.shape[1]),
)
def cpu_int4_indexed(x: Tensor, packed: Tensor, scales_mins: Tensor, ids: Tensor, group_size: int) -> Tensor:
    """x bf16 [S, K] -> [S, N]: row s times the weight of expert ids[s]."""
    library = _compiled() if x.shape[0] <= FEW_PAIRS else None
    if library is None:
        y: Tensor = indexed_linear(x, [packed, scales_mins], ids, packed.shape[1], "cpu_int4", [group_size])
        return y
    return _few(library, x, ids, packed, scales_mins, None, group_size)


@define_opaque(
    "cpu_int4_grouped(Tensor x, Tensor packed, Tensor scales_mins, Tensor ends, int group_size) -> Tensor",
    fake=lambda x, packed, scales_mins, ends, group_size: x.new_empty(x.shape[0], packed.shape[1]),
)
def cpu_int4_grouped(x: Tensor, packed: Tensor, scales_mins: Tensor, ends: Tensor, group_size: int) -> Tensor:
    """x bf16 [S, K] -> [S, N]: rows ends[e - 1] to ends[e] times the weight of expert e, the rest zeros."""
    library = _compiled() if x.shape[0] <= FEW_PAIRS else None
    if library is None:
        y: Tensor = grouped_linear(x, [packed, scales_mins], ends, packed.shape[1], "cpu_int4", [group_size])
        return y
    rows = torch.arange(x.shape[0], dtype=ends.dtype, device="cpu")
    ids = torch.searchsorted(ends, rows, right=True)
    return _few(library, x, ids, packed, scales_mins, None, group_size)


@define_opaque(f"cpu_int4_experts({BLOCK_ARGUMENTS}) -> Tensor", fake=block_fake)
def cpu_int4_experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensors,
    down: Tensors,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    gate_up_args: Sequence[int],
    down_args: Sequence[int],
) -> Tensor:
    """gptq::experts on the packs of cpu_int4: x bf16 [T, H] -> [T, H]."""
    library = _compiled() if ids.numel() <= FEW_PAIRS else None
    if library is None:
        args = (gate_up_bias, down_bias, activation, gate_up_args, down_args, "cpu_int4", "cpu_int4")
        y: Tensor = experts(x, ids, weights, gate_up, down, *args)
        return y
    (up, up_scales), (back, back_scales) = gate_up, down
    assert up is not None and up_scales is not None and back is not None and back_scales is not None
    which = ids.reshape(-1)
    hidden = ACTIVATIONS[activation](_few(library, x, which, up, up_scales, gate_up_bias, *gate_up_args))
    out = _few(library, hidden, which, back, back_scales, down_bias, *down_args)
    weighted = out.view(*ids.shape, -1) * weights.unsqueeze(-1)
    return weighted.sum(1).to(x.dtype)


def supports(spec: LinearSpec) -> str | None:
    if BLOCK == 0 or spec.out_features % BLOCK:
        return f"experts run one by one: out_features {spec.out_features} is not a multiple of {BLOCK}"
    return None


CPU_EXPERTS = ExpertOps(
    supports=supports, grouped=cpu_int4_grouped, indexed=cpu_int4_indexed, block=cpu_int4_experts
)
