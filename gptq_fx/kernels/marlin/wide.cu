// y[M, N] = x[M, K] W[N, K]^T for many rows of x, on Hopper: as W x^T by wgmma. A tile of weights holds the
// registers of operand a (16 outputs x 16 k); x is operand b, in shared memory.
//
// A block has two warpgroups and 256 outputs: warp w of each those of the w-th tile of 64, of which one
// warpgroup takes the first half, the other the second, by two wgmmas of 16 outputs a warp. The blocks of a
// cluster share a tile, each with its part of K; each adds up a part of the rows, in the order of the blocks:
// the same bits each time.
//
// Chosen when compiled: BITS, BF16, ASYM, GROUP_TILES (k tiles in a group; 0: one group), MOE, TOKENS, K_TILES
// (in a stage), STAGES.

struct Args {
    const u8* x;           // [*, x_stride] 16-bit floats
    const u8* weights;     // [E, K / 16, N64 * 128 * BITS] bytes
    const u8* scales;      // [E, groups, N64 * 64]
    const u8* zeros;       // [E, groups, N64 * 8 * BITS] bytes
    const u16* bias;       // [E, N] or null
    u16* out;              // [*, N]
    const void* experts;   // MOE: of each block of rows; none where not in [0, num_experts)
    const int* rows;       // MOE: [*, TOKENS] row of out, -1: none
    const int* num_blocks; // MOE: of rows
    int M, N, K, N64, x_stride, groups, row_blocks, num_experts, top_k, wide_experts;
};

constexpr int THREADS = 256;
constexpr int N_TILE = 256;
constexpr int TILE_BYTES = 128 * BITS;
constexpr int WORDS = BITS / 4;
constexpr int CHUNK = 16 * K_TILES;
static_assert(TOKENS == WGMMA_TOKENS && K_TILES % 4 == 0, "the caller counts otherwise");

constexpr bool GROUPED = GROUP_TILES > 0;
constexpr int RUN = GROUPED && GROUP_TILES < K_TILES ? GROUP_TILES : K_TILES;  // k tiles under one scale
constexpr int RUNS = GROUPED || ASYM ? K_TILES / RUN : 0;

// A stage: x in columns of 64 k (rows of 128 bytes, swizzled), weights, scales, zero points.
constexpr int X_BYTES = TOKENS * 128;  // of a column
constexpr int WEIGHTS_AT = K_TILES / 4 * X_BYTES;
constexpr int SCALES_AT = WEIGHTS_AT + K_TILES * 4 * TILE_BYTES;
constexpr int SCALE_BYTES = GROUPED ? 512 : 0;  // of a run
constexpr int ZEROS_AT = SCALES_AT + RUNS * SCALE_BYTES;
constexpr int ZERO_BYTES = ASYM ? 32 * BITS : 0;
constexpr int STAGE_BYTES = (ZEROS_AT + RUNS * ZERO_BYTES + 1023) / 1024 * 1024;
constexpr int SUM_STRIDE = N_TILE + 4;
constexpr int SUM_BYTES = TOKENS * SUM_STRIDE * 4;
constexpr int SHARED_BYTES = 1024 + (STAGES * STAGE_BYTES > SUM_BYTES ? STAGES * STAGE_BYTES : SUM_BYTES);
static_assert(SHARED_BYTES == SHARED, "the caller counts otherwise");

constexpr int ROW_STEP = THREADS / 8;  // eight threads load 64 k of a row
constexpr int X_ROWS = (TOKENS + ROW_STEP - 1) / ROW_STEP;

// What a block of threads works on.
struct Place {
    int n_tile, row_block, expert, begin, end;  // chunks of k
};

DEVICE int expert_of(const Args& a, int row_block) {
    return MOE ? expert_at(a.experts, a.wide_experts, row_block, a.num_experts) : 0;
}

// The row of out that is `token` of the block's rows, or -1.
DEVICE int row_of(const Args& a, const Place& p, int token) {
    if (MOE) return a.rows[p.row_block * TOKENS + token];
    const int row = p.row_block * TOKENS + token;
    return row < a.M ? row : -1;
}

// Tiles that share weights follow each other, eight blocks of rows at a time.
DEVICE void place_tile(const Args& a, int tile, Place& p) {
    constexpr int TOGETHER = 8;
    const int n_tiles = (a.N64 + 3) / 4;
    const int band = tile / (TOGETHER * n_tiles), left = a.row_blocks - band * TOGETHER;
    const int rows = left < TOGETHER ? left : TOGETHER;
    const int in_band = tile - band * TOGETHER * n_tiles;
    p.n_tile = in_band / rows;
    p.row_block = band * TOGETHER + in_band % rows;
}

DEVICE void load_weights(const Args& a, const Place& p, int chunk, u32 stage) {
    const int k_tiles = a.K / 16, kt0 = chunk * K_TILES, n0 = p.n_tile * 4;
    constexpr int PIECES = 4 * TILE_BYTES / 16;  // of a k tile
#pragma unroll
    for (int i = 0; i < K_TILES * PIECES / THREADS; ++i) {
        const int piece = i * THREADS + threadIdx.x, kt = kt0 + piece / PIECES, at = piece % PIECES * 16;
        const bool valid = kt < k_tiles && n0 + at / TILE_BYTES < a.N64;
        const u8* from = a.weights + ((u64(p.expert) * k_tiles + kt) * a.N64 + n0) * TILE_BYTES + at;
        copy_async(stage + WEIGHTS_AT + piece * 16, valid ? from : a.weights, valid);
    }
    constexpr int SCALE_PIECES = SCALE_BYTES / 16 * RUNS;
    if (GROUPED && threadIdx.x < SCALE_PIECES) {
        const int run = threadIdx.x / 32, at = threadIdx.x % 32 * 16;
        const int group = (kt0 + run * RUN) / (GROUPED ? GROUP_TILES : 1);
        const bool valid = group < a.groups && n0 + at / 128 < a.N64;
        const u8* from = a.scales + ((u64(p.expert) * a.groups + group) * a.N64 + n0) * 128 + at;
        copy_async(stage + SCALES_AT + threadIdx.x * 16, valid ? from : a.scales, valid);
    }
    constexpr int ZERO_PIECES = ZERO_BYTES / 16;  // of a run
    const int thread = THREADS - 1 - threadIdx.x;
    if (ASYM && thread < ZERO_PIECES * RUNS) {
        const int run = thread / (ASYM ? ZERO_PIECES : 1), at = thread % (ASYM ? ZERO_PIECES : 1) * 16;
        const int group = GROUPED ? (kt0 + run * RUN) / (GROUPED ? GROUP_TILES : 1) : 0;
        const bool valid = group < a.groups && n0 + at / (8 * BITS) < a.N64;
        const u8* from = a.zeros + ((u64(p.expert) * a.groups + group) * a.N64 + n0) * (8 * BITS) + at;
        copy_async(stage + ZEROS_AT + run * ZERO_BYTES + at, valid ? from : a.zeros, valid);
    }
}

DEVICE void load_x(const Args& a, const u8* const (&rows)[X_ROWS], int chunk, u32 stage) {
    const int piece = threadIdx.x % 8;
#pragma unroll
    for (int column = 0; column < K_TILES / 4; ++column) {
        const int k = chunk * CHUNK + column * 64 + piece * 8;
#pragma unroll
        for (int i = 0; i < X_ROWS; ++i) {
            const int token = i * ROW_STEP + threadIdx.x / 8;
            if (TOKENS % ROW_STEP && token >= TOKENS) continue;
            const bool valid = rows[i] && k < a.K;
            copy_async(stage + column * X_BYTES + token * 128 + ((piece ^ token % 8) << 4),
                       valid ? rows[i] + k * 2 : a.x, valid);
        }
    }
}

// Of one run of k, for the outputs of this lane: (g, g + 8) twice.
struct Grid { u32 low[2], high[2], zeros[BITS / 4]; };

DEVICE void read_grid(const u8* stage, int run, Grid& grid) {
    const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, g = threadIdx.x % 32 / 4;
    if (GROUPED) {
        const u32* scales = reinterpret_cast<const u32*>(stage + SCALES_AT + run * SCALE_BYTES + warp * 128 + g * 16);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const u32 pair = scales[2 * group + j];
            grid.low[j] = bytes<0x1010>(pair);
            grid.high[j] = bytes<0x3232>(pair);
        }
    }
    // Of 4 bits, the four blocks of 16 outputs are in one word; of 8, two are.
#pragma unroll
    for (int i = 0; i < BITS / 4; ++i)
        grid.zeros[i] = !ASYM ? 0
                              : *reinterpret_cast<const u32*>(stage + ZEROS_AT + run * ZERO_BYTES +
                                                              warp * 8 * BITS + g * BITS + 4 * i);
}

// Of 16 k: operand a of two wgmmas.
DEVICE void dequantize_step(const u8* stage, int kt, const Grid& grid, u32 (&registers)[2][4]) {
    const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const u8* weights = stage + WEIGHTS_AT + (kt * 4 + warp) * TILE_BYTES + lane * 16 * WORDS;
    u32 q[2 * WORDS];
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
        const u64 two = reinterpret_cast<const u64*>(weights + group * 8 * WORDS)[i];
        q[2 * i] = u32(two), q[2 * i + 1] = u32(two >> 32);
    }
    u32 zeros[BITS / 4];  // those of this warpgroup's outputs first
#pragma unroll
    for (int i = 0; i < BITS / 4; ++i)
        zeros[i] = BITS == 4 ? grid.zeros[0] >> (8 * group) : grid.zeros[group];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        u32(&r)[4] = registers[j];
        dequantize(r, q + j * WORDS, zero_of(zeros, j));
        if (GROUPED) {
            r[0] = multiply2(r[0], grid.low[j]);
            r[1] = multiply2(r[1], grid.high[j]);
            r[2] = multiply2(r[2], grid.low[j]);
            r[3] = multiply2(r[3], grid.high[j]);
        }
    }
}

// Of a stack of outputs that have one scale each.
DEVICE float channel_scale(const Args& a, const Place& p, int n) {
    const int tile = n / 64, w = n % 64 / 16, r = n % 16 / 8, g = n % 8;
    const u16* from = reinterpret_cast<const u16*>(a.scales) + (u64(p.expert) * a.N64 + tile) * 64;
    return to_float(from[w / 2 * 32 + g / 2 * 8 + (w % 2 * 2 + r) * 2 + g % 2]);
}

DEVICE void store(const Args& a, const Place& p, int row, int n, Float4 f) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (!GROUPED && n + i < a.N) f.v[i] *= channel_scale(a, p, n + i);
    store_four(a.out + u64(row) * a.N, a.bias ? a.bias + u64(p.expert) * a.N : nullptr, a.N, n, f);
}

// Add up the blocks of the cluster.
DEVICE void finish(const Args& a, const Place& p, const float (&sums)[2][TOKENS / 2], u8* shared) {
    const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    float* added = reinterpret_cast<float*>(shared);
    float* to = added + lane % 4 * 2 * SUM_STRIDE + warp * 64 + group * 32 + lane / 4;
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int i = 0; i < TOKENS / 2; ++i)
            to[(i / 4 * 8 + i % 2) * SUM_STRIDE + j * 16 + i % 4 / 2 * 8] = sums[j][i];
    __syncthreads();
    const u32 parts = cluster_size(), rank = cluster_rank();
    cluster_arrive();
    cluster_wait();
    const int first = TOKENS * rank / parts, last = TOKENS * (rank + 1) / parts;
    for (int i = threadIdx.x; i < (last - first) * (N_TILE / 4); i += THREADS) {
        const int token = first + i / (N_TILE / 4), n = i % (N_TILE / 4) * 4;
        const int row = row_of(a, p, token);
        if (row < 0 || p.n_tile * N_TILE + n >= a.N) continue;
        const u32 from = shared_address(added + token * SUM_STRIDE + n);
        Float4 f = load_from_cluster(from, 0);
        for (u32 r = 1; r < parts; ++r) {
            const Float4 o = load_from_cluster(from, r);
#pragma unroll
            for (int j = 0; j < 4; ++j) f.v[j] += o.v[j];
        }
        store(a, p, row, p.n_tile * N_TILE + n, f);
    }
    __syncwarp();
    cluster_arrive();
    cluster_wait();  // what others read stays
}

KERNEL(THREADS, 1) marlin_wide(const Args a) {
    let_next_kernel_start();
    SHARED_MEMORY(memory);
    u8* shared = memory + (1024 - shared_address(memory) % 1024) % 1024;
    const u32 base = shared_address(shared), parts = cluster_size();
    const int chunks = (a.K / 16 + K_TILES - 1) / K_TILES;
    Place p;
    place_tile(a, blockIdx.x / parts, p);
    p.begin = u32(chunks) * cluster_rank() / parts;  // 32 bits: a division of 64 takes as long as a load
    p.end = u32(chunks) * (cluster_rank() + 1) / parts;
    p.expert = 0;
    if (MOE) {
        wait_for_kernels_before();
        if (p.row_block >= *a.num_blocks) return;
        p.expert = expert_of(a, p.row_block);
        if (p.expert < 0) return;
    }
    // Two stages lie between a load and the wgmmas that read its place before.
    constexpr int AHEAD = STAGES - 2;
    const int count = p.end - p.begin;
#pragma unroll 1
    for (int s = 0; s < AHEAD && s < count; ++s) load_weights(a, p, p.begin + s, base + s * STAGE_BYTES);
    if (!MOE) wait_for_kernels_before();  // it may have made x
    const u8* rows[X_ROWS];
#pragma unroll
    for (int i = 0; i < X_ROWS; ++i) {
        const int token = i * ROW_STEP + threadIdx.x / 8;
        const int row = TOKENS % ROW_STEP && token >= TOKENS ? -1 : row_of(a, p, token);
        rows[i] = row < 0 ? nullptr : a.x + u64(MOE ? row / a.top_k : row) * a.x_stride * 2;
    }
#pragma unroll 1
    for (int s = 0; s < AHEAD; ++s) {
        if (s < count) load_x(a, rows, p.begin + s, base + s * STAGE_BYTES);
        copy_commit();
    }

    float sums[2][TOKENS / 2];  // the first wgmmas set them
    u32 registers[2][2][4];
    int at = 0, to = AHEAD;
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
        copy_wait<AHEAD - 1>();
        show_to_wgmma();
        __syncthreads();
        if (i + AHEAD < count) {
            load_weights(a, p, p.begin + i + AHEAD, base + to * STAGE_BYTES);
            load_x(a, rows, p.begin + i + AHEAD, base + to * STAGE_BYTES);
        }
        copy_commit();
        Grid grid;
#pragma unroll
        for (int kt = 0; kt < K_TILES; ++kt) {
            if (kt % RUN == 0) read_grid(shared + at * STAGE_BYTES, kt / RUN, grid);
            dequantize_step(shared + at * STAGE_BYTES, kt, grid, registers[kt % 2]);
            const u64 matrix = wgmma_matrix(base + at * STAGE_BYTES + kt / 4 * X_BYTES + kt % 4 * 32);
            wgmma_fence();
#pragma unroll
            for (int j = 0; j < 2; ++j) wgmma(sums[j], registers[kt % 2][j], matrix, i + kt > 0);
            wgmma_commit();
            wgmma_wait<1>();
        }
        at = at + 1 == STAGES ? 0 : at + 1;
        to = to + 1 == STAGES ? 0 : to + 1;
    }
    wgmma_wait<0>();
    copy_wait<0>();
    __syncthreads();
    finish(a, p, sums, shared);
}
