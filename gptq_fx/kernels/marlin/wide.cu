// y[M, N] = x[M, K] W[N, K]^T for many rows of x, on Hopper: as W x^T by wgmma. A tile of weights holds the
// registers of operand a (16 outputs x 16 k); x is operand b, in shared memory.
//
// A block has three warpgroups and 256 outputs. One warpgroup loads, stage by stage; two multiply: warp w of each
// those of the w-th tile of 64, of which one takes the first half, the other the second, by two wgmmas of 16
// outputs a warp. Neither waits for another but at the stages: `full` when one is loaded, `empty` when it has been
// multiplied. The blocks of a cluster share a tile, each with its part of K; each adds up a part of the rows, in
// the order of the blocks: the same bits each time.
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

constexpr int MULTIPLIERS = 256, LOADERS = 128, THREADS = MULTIPLIERS + LOADERS;
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
constexpr int STAGES_BYTES = STAGES * STAGE_BYTES > SUM_BYTES ? STAGES * STAGE_BYTES : SUM_BYTES;
// Behind the stages: where each row of x is, null for none; and the barriers `full` and `empty` of each stage.
constexpr int ROWS_AT = STAGES_BYTES, FULL_AT = ROWS_AT + 8 * TOKENS, EMPTY_AT = FULL_AT + 8 * STAGES;
static_assert(1024 + EMPTY_AT + 8 * STAGES == SHARED, "the caller counts otherwise");

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

// Where a loader takes its pieces of the weights from: a stage further with each call of `load_weights`.
struct Weights {
    const u8* from;
    int k_tiles, n_tiles;  // that exist from there on
};

constexpr int PIECES = 4 * TILE_BYTES / 16;                             // of a k tile, 16 bytes each
constexpr int TURNS = PIECES / LOADERS, TURN_TILES = 4 / TURNS;         // that it takes to load one
static_assert(PIECES % LOADERS == 0, "a loader would have parts of pieces");

DEVICE Weights weights_of(const Args& a, const Place& p, int loader) {
    const int k_tiles = a.K / 16, first = p.begin * K_TILES, at = loader * 16;
    const u64 tile = (u64(p.expert) * k_tiles + first) * a.N64 + p.n_tile * 4;
    return {a.weights + tile * TILE_BYTES + at, k_tiles - first, a.N64 - p.n_tile * 4 - at / TILE_BYTES};
}

DEVICE void load_weights(const Args& a, Weights& w, int loader, u32 stage) {
#pragma unroll
    for (int kt = 0; kt < K_TILES; ++kt) {
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
            const int piece = turn * LOADERS * 16;
            copy_async(stage + WEIGHTS_AT + kt * 4 * TILE_BYTES + piece + loader * 16, w.from + piece,
                       w.k_tiles > kt && w.n_tiles > turn * TURN_TILES);
        }
        w.from += u64(a.N64) * TILE_BYTES;
    }
    w.k_tiles -= K_TILES;
}

// Scales by the first loaders, zero points by the last.
DEVICE void load_grid(const Args& a, const Place& p, int chunk, int loader, u32 stage) {
    const int n0 = p.n_tile * 4;
    auto load = [&](int nth, const u8* from, int at, int pieces, int bytes) {  // bytes: of 64 outputs
        if (nth >= pieces * RUNS) return;
        const int run = nth / pieces, piece = nth % pieces * 16;
        const int group = GROUPED ? (chunk * K_TILES + run * RUN) / (GROUPED ? GROUP_TILES : 1) : 0;
        const u64 row = (u64(p.expert) * a.groups + group) * a.N64 + n0;
        copy_async(stage + at + nth * 16, from + row * bytes + piece, group < a.groups && n0 + piece / bytes < a.N64);
    };
    static_assert(32 * RUNS <= LOADERS, "a loader has one piece");
    if (GROUPED) load(loader, a.scales, SCALES_AT, 32, 128);
    if (ASYM) load(LOADERS - 1 - loader, a.zeros, ZEROS_AT, 2 * BITS, 8 * BITS);
}

// Eight loaders take 64 k of a row.
DEVICE void load_x(const Args& a, const u8* const* rows, int chunk, int loader, u32 stage) {
    constexpr int STEP = LOADERS / 8;
    static_assert(TOKENS % STEP == 0, "some loaders would have no row");
    const int token = loader / 8, piece = loader % 8, k = chunk * CHUNK + piece * 8;
    const u32 to = stage + token * 128 + ((piece ^ token % 8) << 4);
#pragma unroll
    for (int i = 0; i < TOKENS / STEP; ++i) {
        const u8* from = rows[i * STEP + token];
#pragma unroll
        for (int column = 0; column < K_TILES / 4; ++column)
            copy_async(to + column * X_BYTES + i * (STEP * 128), from + (k + column * 64) * 2,
                       from && k + column * 64 < a.K);
    }
}

// What the loaders do: all chunks, as stages become free.
DEVICE void load_all(const Args& a, const Place& p, u8* shared) {
    const int loader = threadIdx.x - MULTIPLIERS, count = p.end - p.begin;
    const u32 base = shared_address(shared);
    const u8** rows = reinterpret_cast<const u8**>(shared + ROWS_AT);
    Weights weights = weights_of(a, p, loader);
    auto load_codes = [&](int chunk, u32 stage) {
        load_weights(a, weights, loader, stage);
        load_grid(a, p, p.begin + chunk, loader, stage);
    };
#pragma unroll 1
    for (int i = 0; i < STAGES && i < count; ++i) load_codes(i, base + i * STAGE_BYTES);
    if (!MOE) wait_for_kernels_before();  // it may have made x
    if (loader < TOKENS) {
        const int row = row_of(a, p, loader);
        rows[loader] = row < 0 ? nullptr : a.x + u64(MOE ? row / a.top_k : row) * a.x_stride * 2;
    }
    sync_some<2, LOADERS>();
    int place = 0;
    u32 round = 0;
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
        const u32 stage = base + place * STAGE_BYTES;
        if (i >= STAGES) {
            barrier_wait(base + EMPTY_AT + place * 8, round - 1 & 1);
            load_codes(i, stage);
        }
        load_x(a, rows, p.begin + i, loader, stage);
        barrier_arrive_after_copies(base + FULL_AT + place * 8);
        if (++place == STAGES) place = 0, ++round;
    }
    copy_commit();
    copy_wait<0>();
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
    sync_some<1, MULTIPLIERS>();
    const u32 parts = cluster_size(), rank = cluster_rank();
    if (parts > 1) {
        cluster_arrive();
        cluster_wait();
    }
    const int first = TOKENS * rank / parts, last = TOKENS * (rank + 1) / parts;
    for (int i = threadIdx.x; i < (last - first) * (N_TILE / 4); i += MULTIPLIERS) {
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

// What the others do. registers: of operand a, of this 16 k and the next.
DEVICE void multiply_all(const Args& a, const Place& p, u8* shared) {
    const u32 base = shared_address(shared), magic = in_register(MAGIC);
    const int count = p.end - p.begin;
    float sums[2][TOKENS / 2];  // the first wgmmas set them
    u32 registers[2][2][4];
    Stage now, next;
    barrier_wait(base + FULL_AT, 0);
    show_to_wgmma();
    read_stage(shared, now);
    int place = 0;
    u32 round = 0;
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
        const u64 matrix = wgmma_matrix(base + place * STAGE_BYTES);
        const u32 before = base + EMPTY_AT + (place ? place - 1 : STAGES - 1) * 8;
        if (++place == STAGES) place = 0, ++round;
#pragma unroll
        for (int kt = 0; kt < K_TILES; ++kt) {
            dequantize_step(now.q[kt], now.grids[kt / RUN % (RUNS ? RUNS : 1)], magic, registers[kt % 2]);
            wgmma_fence();
#pragma unroll
            for (int j = 0; j < 2; ++j)
                wgmma(sums[j], registers[kt % 2][j], wgmma_further(matrix, kt / 4 * X_BYTES + kt % 4 * 32), i + kt > 0);
            wgmma_commit();
            if (kt == K_TILES / 2 && i + 1 < count) {  // wgmma has work meanwhile
                barrier_wait(base + FULL_AT + place * 8, round & 1);
                show_to_wgmma();
                read_stage(shared + place * STAGE_BYTES, next);
            }
            wgmma_wait<1>();
            if (kt == 0 && i > 0 && threadIdx.x % 32 == 0) barrier_arrive(before);
        }
        now = next;
    }
    wgmma_wait<0>();
    sync_some<1, MULTIPLIERS>();  // sums take the place of stages
    finish(a, p, sums, shared);
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
    if (threadIdx.x < STAGES) {
        barrier_init(base + FULL_AT + threadIdx.x * 8, LOADERS);
        barrier_init(base + EMPTY_AT + threadIdx.x * 8, MULTIPLIERS / 32);
    }
    __syncthreads();
    if (threadIdx.x >= MULTIPLIERS) {
        fewer_registers<40>();
        load_all(a, p, shared);
    } else {
        more_registers<232>();
        multiply_all(a, p, shared);
    }
}
