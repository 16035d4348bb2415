// For many rows of x a dense GEMM is faster: marlin_dequantize writes W for it, marlin_permute orders x.
// Chosen when compiled: BITS, BF16, ASYM, GROUP_TILES.

struct DequantizeArgs {
    const u8* weights;  // [K / 16, N64 * 128 * BITS] bytes
    const u8* scales;   // [groups, N64 * 64]
    const u8* zeros;    // [groups, N64 * 8 * BITS] bytes
    u8* out;            // [64 * (blocks of n), K] 16-bit floats: outputs from 64 * begin on
    int K, N64, begin;
};

// Each warp: 64 outputs x 64 k, turned in shared memory so that rows of k are written as a whole.
KERNEL(128, 4) marlin_dequantize(const DequantizeArgs a) {
    let_next_kernel_start();
    wait_for_kernels_before();
    SHARED_MEMORY(shared);
    constexpr int WORDS = BITS / 4, ROW = 144;  // bytes; no bank conflicts
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    const int k_tiles = a.K / 16, quads = (k_tiles + 15) / 16;
    const int n_block = blockIdx.x / quads, n64 = a.begin + n_block;
    const int kt0 = (blockIdx.x % quads * 4 + warp) * 4;
    u8* turned = shared + warp * 64 * ROW;
    const u32 magic = in_register(MAGIC);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const int kt = kt0 + j;
        if (kt >= k_tiles) break;
        const int group = GROUP_TILES ? kt / (GROUP_TILES ? GROUP_TILES : 1) : 0;
        const u8* from = a.weights + (u64(kt) * a.N64 + n64) * (128 * BITS) + lane * 16 * WORDS;
        Quad q[WORDS];
#pragma unroll
        for (int h = 0; h < WORDS; ++h) q[h] = load_early(reinterpret_cast<const Quad*>(from) + h);
        const u8* grid = a.scales + (u64(group) * a.N64 + n64) * 128;
        u32 scales[4];
        if (GROUP_TILES) {
            const Quad s = *reinterpret_cast<const Quad*>(grid + g * 16);
#pragma unroll
            for (int w = 0; w < 4; ++w) scales[w] = s.v[w];
        } else {
            const u16* s = reinterpret_cast<const u16*>(grid);
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                const int at = w / 2 * 32 + g / 2 * 8 + w % 2 * 4 + g % 2;
                scales[w] = s[at] | u32(s[at + 2]) << 16;
            }
        }
        u32 zeros[BITS / 4] = {};
        if (ASYM) {
            const u8* z = a.zeros + (u64(group) * a.N64 + n64) * (8 * BITS) + g * BITS;
#pragma unroll
            for (int i = 0; i < BITS / 4; ++i) zeros[i] = reinterpret_cast<const u32*>(z)[i];
        }
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            u32 v[4];
            dequantize(v, &q[w * WORDS / 4].v[w * WORDS % 4], zero_of(zeros, w), magic);
            const u32 s[2] = {bytes<0x1010>(scales[w]), bytes<0x3232>(scales[w])};
#pragma unroll
            for (int i = 0; i < 4; ++i)  // i = 2 h + r: output 16 w + 8 r + g, k = 16 j + 8 h + 2 c
                *reinterpret_cast<u32*>(turned + (16 * w + i % 2 * 8 + g) * ROW + j * 32 + i / 2 * 16 + c * 4) =
                    multiply2(v[i], s[i % 2]);
        }
    }
    __syncwarp();
    const int k = kt0 * 16 + lane % 8 * 8;
    if (k >= a.K) return;
#pragma unroll
    for (int step = 0; step < 16; ++step) {
        const int row = step * 4 + lane / 8;
        u8* to = a.out + ((u64(n_block) * 64 + row) * a.K + k) * 2;
        *reinterpret_cast<Quad*>(to) = *reinterpret_cast<const Quad*>(turned + row * ROW + lane % 8 * 16);
    }
}

struct PermuteArgs {
    const u16* x;     // [M, x_stride]
    const int* perm;  // [K]
    u8* out;          // [M, K]
    int K, x_stride;
};

// Block: one row (x) and 8 * 256 features (y).
KERNEL(256, 1) marlin_permute(const PermuteArgs a) {
    let_next_kernel_start();
    wait_for_kernels_before();
    const int k = (blockIdx.y * 256 + threadIdx.x) * 8;
    if (k >= a.K) return;
    const u16* row = a.x + u64(blockIdx.x) * a.x_stride;
    const Quad* from = reinterpret_cast<const Quad*>(a.perm + k);
    const Quad low = load_early(from), high = load_early(from + 1);
    Quad q;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const Quad& p = j < 2 ? low : high;
        q.v[j] = row[p.v[j % 2 * 2]] | u32(row[p.v[j % 2 * 2 + 1]]) << 16;
    }
    *reinterpret_cast<Quad*>(a.out + (u64(blockIdx.x) * a.K + k) * 2) = q;
}
