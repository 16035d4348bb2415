// Four outputs of a row, from n on, of N; bias: of that row's weight, or null. row: aligned to 8 bytes where N is a
// multiple of 4.
DEVICE void store_four(u16* row, const u16* bias, int N, int n, Float4 f) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (bias && n + i < N) f.v[i] += to_float(bias[n + i]);
    const u32 low = from_floats(f.v[0], f.v[1]), high = from_floats(f.v[2], f.v[3]);
    if (N % 4 == 0) {
        if (n < N) *reinterpret_cast<u64*>(row + n) = low | u64(high) << 32;
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (n + i < N) row[n + i] = u16((i < 2 ? low : high) >> (16 * (i % 2)));
}

// Eight outputs, as they are.
DEVICE void store_eight(u16* row, int N, int n, const Quad& q) {
    if (N % 8 == 0) {
        if (n < N) *reinterpret_cast<Quad*>(row + n) = q;
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
        if (n + i < N) row[n + i] = u16(q.v[i / 2] >> (16 * (i % 2)));
}
