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
constexpr u32 MOST_PARTS = 8;  // blocks in a cluster
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

// Where this thread takes its pieces of the weights from: a stage further with each call of `load_weights`.
struct Weights {
    const u8* from;
    int left;  // k tiles from there on; none where the outputs do not exist
};

constexpr int PIECES = 4 * TILE_BYTES / 16;  // of a k tile
constexpr int PIECE_TILES = THREADS / PIECES;  // k tiles of which all threads have a piece
static_assert(THREADS % PIECES == 0 && K_TILES % PIECE_TILES == 0, "threads would have parts of pieces");

DEVICE Weights weights_of(const Args& a, const Place& p) {
    const int k_tiles = a.K / 16, kt = p.begin * K_TILES + threadIdx.x / PIECES, at = threadIdx.x % PIECES * 16;
    const u64 tile = (u64(p.expert) * k_tiles + kt) * a.N64 + p.n_tile * 4;
    return {a.weights + tile * TILE_BYTES + at, p.n_tile * 4 + at / TILE_BYTES < a.N64 ? k_tiles - kt : 0};
}

DEVICE void load_weights(const Args& a, Weights& w, u32 stage) {
    const u64 step = u64(a.N64) * (PIECE_TILES * TILE_BYTES);
#pragma unroll
    for (int i = 0; i < K_TILES / PIECE_TILES; ++i, w.from += step)
        copy_async(stage + WEIGHTS_AT + (i * THREADS + threadIdx.x) * 16, w.from, w.left > i * PIECE_TILES);
    w.left -= K_TILES;
}

// Scales by the first threads, zero points by the last.
DEVICE void load_grid(const Args& a, const Place& p, int chunk, u32 stage) {
    const int n0 = p.n_tile * 4;
    auto load = [&](int thread, const u8* from, int at, int pieces, int bytes) {  // bytes: of 64 outputs
        if (thread >= pieces * RUNS) return;
        const int run = thread / pieces, piece = thread % pieces * 16;
        const int group = GROUPED ? (chunk * K_TILES + run * RUN) / (GROUPED ? GROUP_TILES : 1) : 0;
        const u64 row = (u64(p.expert) * a.groups + group) * a.N64 + n0;
        copy_async(stage + at + thread * 16, from + row * bytes + piece,
                   group < a.groups && n0 + piece / bytes < a.N64);
    };
    if (GROUPED) load(threadIdx.x, a.scales, SCALES_AT, 32, 128);
    if (ASYM) load(THREADS - 1 - threadIdx.x, a.zeros, ZEROS_AT, 2 * BITS, 8 * BITS);
}

// Likewise for x, from rows that may not be there.
struct Rows {
    const u8* from[X_ROWS];
    bool there[X_ROWS];
    int left;  // features
};

DEVICE Rows rows_of(const Args& a, const Place& p) {
    Rows x;
    const int k = p.begin * CHUNK + threadIdx.x % 8 * 8;
    x.left = a.K - k;
#pragma unroll
    for (int i = 0; i < X_ROWS; ++i) {
        const int token = i * ROW_STEP + threadIdx.x / 8;
        const int row = TOKENS % ROW_STEP && token >= TOKENS ? -1 : row_of(a, p, token);
        x.there[i] = row >= 0;
        x.from[i] = a.x + (u64(row < 0 ? 0 : MOE ? row / a.top_k : row) * a.x_stride + k) * 2;
    }
    return x;
}

DEVICE void load_x(Rows& x, u32 stage) {
    const int token = threadIdx.x / 8, piece = threadIdx.x % 8;  // rows of eight threads: 64 k
    const u32 to = stage + token * 128 + ((piece ^ token % 8) << 4);
#pragma unroll
    for (int i = 0; i < X_ROWS; ++i) {
#pragma unroll
        for (int column = 0; column < K_TILES / 4; ++column) {
            if (TOKENS % ROW_STEP && i * ROW_STEP + token >= TOKENS) continue;
            copy_async(to + column * X_BYTES + i * (ROW_STEP * 128), x.from[i] + column * 128,
                       x.there[i] && x.left > column * 64);
        }
        x.from[i] += 2 * CHUNK;
    }
    x.left -= CHUNK;
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
    u32 packed[BITS / 4];
#pragma unroll
    for (int i = 0; i < BITS / 4; ++i)
        packed[i] = !ASYM ? 0
                          : *reinterpret_cast<const u32*>(stage + ZEROS_AT + run * ZERO_BYTES + warp * 8 * BITS +
                                                          g * BITS + 4 * i);
#pragma unroll
    for (int i = 0; i < BITS / 4; ++i)  // those of this warpgroup's outputs first
        grid.zeros[i] = BITS == 4 ? packed[0] >> (8 * group) : packed[group % (BITS / 4)];
}

// What this thread multiplies of a stage: all of it is read before anything is waited for.
struct Stage {
    u32 q[K_TILES][2 * WORDS];
    Grid grids[RUNS ? RUNS : 1];
};

DEVICE void read_stage(const u8* stage, Stage& s) {
    const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const u8* weights = stage + WEIGHTS_AT + warp * TILE_BYTES + lane * 16 * WORDS + group * 8 * WORDS;
#pragma unroll
    for (int kt = 0; kt < K_TILES; ++kt)
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            const u64 two = reinterpret_cast<const u64*>(weights + kt * 4 * TILE_BYTES)[i];
            s.q[kt][2 * i] = u32(two), s.q[kt][2 * i + 1] = u32(two >> 32);
        }
#pragma unroll
    for (int run = 0; run < (RUNS ? RUNS : 1); ++run) read_grid(stage, run, s.grids[run]);
}

// Of 16 k: operand a of two wgmmas.
DEVICE void dequantize_step(const u32 (&q)[2 * WORDS], const Grid& grid, u32 magic, u32 (&registers)[2][4]) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        u32(&r)[4] = registers[j];
        dequantize(r, q + j * WORDS, zero_of(grid.zeros, j), magic);
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
    if (parts > 1) {
        cluster_arrive();
        cluster_wait();
    }
    const int first = TOKENS * rank / parts, last = TOKENS * (rank + 1) / parts;
    for (int i = threadIdx.x; i < (last - first) * (N_TILE / 4); i += THREADS) {
        const int token = first + i / (N_TILE / 4), n = i % (N_TILE / 4) * 4;
        const int row = row_of(a, p, token);
        if (row < 0 || p.n_tile * N_TILE + n >= a.N) continue;
        const u32 from = shared_address(added + token * SUM_STRIDE + n);
        Float4 f = load_from_cluster(from, 0);
        if (parts > 1) {
            Float4 others[MOST_PARTS];
#pragma unroll
            for (u32 r = 1; r < MOST_PARTS; ++r)
                if (r < parts) others[r] = load_from_cluster(from, r);
#pragma unroll
            for (u32 r = 1; r < MOST_PARTS; ++r)
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    if (r < parts) f.v[j] += others[r].v[j];
        }
        store(a, p, row, p.n_tile * N_TILE + n, f);
    }
    if (parts == 1) return;
    __syncwarp();
    cluster_arrive_relaxed();
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
    const int count = p.end - p.begin;
    Weights weights = weights_of(a, p);
    auto load_codes = [&](int chunk, u32 stage) {
        load_weights(a, weights, stage);
        load_grid(a, p, p.begin + chunk, stage);
    };
#pragma unroll 1
    for (int s = 0; s < STAGES - 1 && s < count; ++s) load_codes(s, base + s * STAGE_BYTES);
    if (!MOE) wait_for_kernels_before();  // it may have made x
    Rows x = rows_of(a, p);
#pragma unroll 1
    for (int s = 0; s < STAGES - 1; ++s) {
        if (s < count) load_x(x, base + s * STAGE_BYTES);
        copy_commit();
    }

    const u32 magic = in_register(MAGIC);
    float sums[2][TOKENS / 2];  // the first wgmmas set them
    u32 registers[2][2][4];
    Stage now, next;
    auto read = [&](int place, Stage& to) {
        show_to_wgmma();
        __syncthreads();
        read_stage(shared + place * STAGE_BYTES, to);
    };
    copy_wait<STAGES - 2>();
    read(0, now);
    int at = 0;
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
        const u64 matrix = wgmma_matrix(base + at * STAGE_BYTES);
        const int before = at ? at - 1 : STAGES - 1;
        at = at + 1 == STAGES ? 0 : at + 1;
#pragma unroll
        for (int kt = 0; kt < K_TILES; ++kt) {
            dequantize_step(now.q[kt], now.grids[kt / RUN % (RUNS ? RUNS : 1)], magic, registers[kt % 2]);
            wgmma_fence();
#pragma unroll
            for (int j = 0; j < 2; ++j)
                wgmma(sums[j], registers[kt % 2][j], wgmma_further(matrix, kt / 4 * X_BYTES + kt % 4 * 32), i + kt > 0);
            wgmma_commit();
            // The next stage is taken over here, so that wgmma has work meanwhile; the one before is free, since
            // its last wgmmas have been waited for.
            if (kt == K_TILES / 2 && i + 1 < count) {
                copy_wait<STAGES - 3>();
                read(at, next);
                if (i + STAGES - 1 < count) {
                    load_codes(i + STAGES - 1, base + before * STAGE_BYTES);
                    load_x(x, base + before * STAGE_BYTES);
                }
                copy_commit();
            }
            wgmma_wait<1>();
        }
        now = next;
    }
    wgmma_wait<0>();
    copy_wait<0>();
    __syncthreads();
    finish(a, p, sums, shared);
}
