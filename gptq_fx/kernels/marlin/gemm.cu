// y[M, N] = x[M, K] W[N, K]^T on weights in the Marlin layout (layout.py), as W x^T: a weight tile holds the
// registers of operand a (16 outputs x 16 k), so that eight rows of x fill an mma and few rows waste little.
//
// A block has WARPS_N x WARPS_K warps. Each multiplies 64 outputs with TOKENS rows, over its own K_TILES * 16
// of the CHUNK of k in a stage. One unit of work is a chunk of an output tile (N_TILE outputs x TOKENS rows);
// each block takes an equal run of the units in the order (tile, chunk), so that all of them end together.
// A tile whose chunks fall to several blocks is added up, in the order of the blocks, by the one that ends
// last: the same bits each time.
//
// Chosen when compiled: BITS, BF16, ASYM, GROUP_TILES (k tiles in a group; 0: one group), PERM, MOE, TOKENS,
// WARPS_N, WARPS_K, K_TILES, STAGES, BLOCKS (per multiprocessor, at least).

struct Args {
    const u8* x;           // [*, x_stride] 16-bit floats
    const u8* weights;     // [E, K / 16, N64 * 128 * BITS] bytes
    const u8* scales;      // [E, groups, N64 * 64]
    const u8* zeros;       // [E, groups, N64 * 8 * BITS] bytes
    const int* perm;       // [E, K]: which feature of x comes k-th
    const u16* bias;       // [E, N] or null
    u16* out;              // [*, N]
    float* partials;       // [blocks, 2, TOKENS, N_TILE]
    int* counters;         // [blocks], zero before and after
    const void* experts;   // MOE: of each block of rows; none where not in [0, num_experts)
    const int* rows;       // MOE: [*, TOKENS] row of out, -1: none; null: block b is row b alone
    const int* num_blocks; // MOE: null: row_blocks
    int M, N, K, N64, x_stride, groups, row_blocks, num_experts, top_k, wide_experts;
};

constexpr int WARPS = WARPS_N * WARPS_K;
constexpr int THREADS = 32 * WARPS;
constexpr int N_TILE = 64 * WARPS_N;
constexpr int NT = TOKENS / 8;
constexpr int CHUNK_TILES = WARPS_K * K_TILES;
constexpr int CHUNK = 16 * CHUNK_TILES;
constexpr int TILE_BYTES = 128 * BITS;
constexpr int WORDS = BITS / 4;  // of a lane, in each of the four blocks of 16 outputs

constexpr bool GROUPED = GROUP_TILES > 0;
constexpr int RUN = GROUPED && GROUP_TILES < K_TILES ? GROUP_TILES : K_TILES;  // k tiles under one scale
constexpr int RUNS = K_TILES / RUN;
// Few rows: sums of a group are scaled, in fp32. Many: the weights are, which takes no second accumulator.
constexpr bool SCALE_SUMS = GROUPED && TOKENS <= 16;
constexpr bool SCALE_WEIGHTS = GROUPED && !SCALE_SUMS;

constexpr int X_STRIDE = 2 * CHUNK + 16;  // bytes; odd in 16s: no bank conflicts in load_matrices
constexpr int SCALE_BYTES = GROUPED ? 128 : 0;
constexpr int ZERO_BYTES = ASYM ? 8 * BITS : 0;
constexpr int X_AT = WARPS * K_TILES * TILE_BYTES;
constexpr int SCALES_AT = X_AT + TOKENS * X_STRIDE;
constexpr int ZEROS_AT = SCALES_AT + WARPS * RUNS * SCALE_BYTES;
constexpr int STAGE_BYTES = ZEROS_AT + WARPS * RUNS * ZERO_BYTES;
constexpr int SUM_STRIDE = N_TILE + 4;
constexpr int SUMS_AT = STAGES * STAGE_BYTES;
constexpr int SHARED_BYTES = SUMS_AT + WARPS_K * 8 * SUM_STRIDE * 4;

constexpr int PIECES = CHUNK / 8;  // of 16 bytes, in a row of x
constexpr int X_THREADS = TOKENS * PIECES < THREADS ? TOKENS * PIECES : THREADS;
constexpr int X_ROWS = TOKENS * PIECES / X_THREADS;  // rows that one thread loads a piece of
constexpr int ROW_STEP = X_THREADS / PIECES;
static_assert(X_THREADS % PIECES == 0 && TOKENS * PIECES % X_THREADS == 0, "x does not divide");
static_assert(NT == 1 ? K_TILES % 2 == 0 : NT % 2 == 0, "load_matrices takes two tiles at a time");
static_assert(STAGE_BYTES % 16 == 0 && K_TILES % RUN == 0 && RUNS <= 2, "stages");

static_assert(SHARED_BYTES == SHARED, "the caller counts otherwise");

// Where a block stands in its run of units. tile = n_tile * row_blocks + row_block: row blocks that share
// weights follow each other.
struct Place {
    int chunk, n_tile, row_block, expert;
};

struct Work {
    int chunks, row_blocks, n_tiles;
    u32 units, blocks, begin, end;  // blocks: those that have any unit
};

DEVICE int expert_of(const Args& a, int row_block) {
    return MOE ? expert_at(a.experts, a.wide_experts, row_block, a.num_experts) : 0;
}

// The row of out that is `token` of a row block, or -1.
DEVICE int row_of(const Args& a, const Place& p, int token) {
    if (MOE) {
        if (p.expert < 0) return -1;
        if (a.rows) return a.rows[p.row_block * TOKENS + token];
        return token == 0 ? p.row_block : -1;
    }
    const int row = p.row_block * TOKENS + token;
    return row < a.M ? row : -1;
}

DEVICE Place place_of(const Args& a, const Work& w, u32 unit) {
    Place p;
    const int tile = unit / w.chunks;
    p.chunk = unit % w.chunks;
    p.n_tile = tile / w.row_blocks;
    p.row_block = tile % w.row_blocks;
    p.expert = expert_of(a, p.row_block);
    return p;
}

// True where a new tile begins.
DEVICE bool advance(const Args& a, const Work& w, Place& p) {
    if (++p.chunk < w.chunks) return false;
    p.chunk = 0;
    if (++p.row_block == w.row_blocks) {
        p.row_block = 0;
        ++p.n_tile;
    }
    if (p.n_tile < w.n_tiles) p.expert = expert_of(a, p.row_block);
    return true;
}

DEVICE bool loads_x() { return X_THREADS == THREADS || threadIdx.x < X_THREADS; }

// The rows of x that a thread loads pieces of.
DEVICE void find_rows(const Args& a, const Place& p, int (&rows)[X_ROWS]) {
#pragma unroll
    for (int i = 0; i < X_ROWS; ++i) {
        const int row = loads_x() ? row_of(a, p, threadIdx.x / PIECES + i * ROW_STEP) : -1;
        rows[i] = MOE && row >= 0 ? row / a.top_k : row;
    }
}

DEVICE void load_weights(const Args& a, const Place& p, u32 stage) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int wn = warp % WARPS_N, wk = warp / WARPS_N;
    const int n64 = p.n_tile * WARPS_N + wn, kt0 = p.chunk * CHUNK_TILES + wk * K_TILES;
    const int k_tiles = a.K / 16;
    const bool here = n64 < a.N64 && p.expert >= 0;
    const u64 expert = p.expert < 0 ? 0 : p.expert;
    const u8* from = a.weights + ((expert * k_tiles + kt0) * a.N64 + n64) * TILE_BYTES + lane * 16;
    const u32 to = stage + warp * K_TILES * TILE_BYTES + lane * 16;
#pragma unroll
    for (int kt = 0; kt < K_TILES; ++kt) {
        const bool valid = here && kt0 + kt < k_tiles;
#pragma unroll
        for (int h = 0; h < WORDS; ++h)
            copy_async(to + kt * TILE_BYTES + h * 512, valid ? from + h * 512 : a.weights, valid);
        from += u64(a.N64) * TILE_BYTES;
    }
    if (GROUPED && lane < 8 * RUNS) {
        const int run = lane / 8, group = (kt0 + run * RUN) / (GROUPED ? GROUP_TILES : 1);
        const bool valid = here && group < a.groups;
        const u8* s = a.scales + ((expert * a.groups + group) * a.N64 + n64) * 128 + lane % 8 * 16;
        copy_async(stage + SCALES_AT + (warp * RUNS + run) * 128 + lane % 8 * 16, valid ? s : a.scales, valid);
    }
    constexpr int ZERO_PIECES = BITS / 2;
    if (ASYM && lane >= 16 && lane - 16 < ZERO_PIECES * RUNS) {
        const int run = (lane - 16) / ZERO_PIECES, piece = lane % ZERO_PIECES;
        const int group = GROUPED ? (kt0 + run * RUN) / (GROUPED ? GROUP_TILES : 1) : 0;
        const bool valid = here && group < a.groups;
        const u8* z = a.zeros + ((expert * a.groups + group) * a.N64 + n64) * (8 * BITS) + piece * 16;
        copy_async(stage + ZEROS_AT + (warp * RUNS + run) * (8 * BITS) + piece * 16, valid ? z : a.zeros,
                   valid);
    }
}

DEVICE u32 x_place(u32 stage, int i) {
    return stage + X_AT + (threadIdx.x / PIECES + i * ROW_STEP) * X_STRIDE + threadIdx.x % PIECES * 16;
}

DEVICE void load_x(const Args& a, const Place& p, const int (&rows)[X_ROWS], u32 stage) {
    if (!loads_x()) return;
    const int k = p.chunk * CHUNK + threadIdx.x % PIECES * 8;
#pragma unroll
    for (int i = 0; i < X_ROWS; ++i) {
        const bool valid = rows[i] >= 0 && k < a.K;
        copy_async(x_place(stage, i), valid ? a.x + (u64(rows[i]) * a.x_stride + k) * 2 : a.x, valid);
    }
}

#if PERM
// Which features of x are next, for the piece of this thread.
DEVICE void load_perm(const Args& a, const Place& p, int (&perm)[8]) {
    const int k = p.chunk * CHUNK + threadIdx.x % PIECES * 8;
    if (k >= a.K || p.expert < 0) return;  // never used
    const Quad* from = reinterpret_cast<const Quad*>(a.perm + u64(p.expert) * a.K + k);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const Quad q = load_early(from + h);
#pragma unroll
        for (int j = 0; j < 4; ++j) perm[4 * h + j] = q.v[j];
    }
}

DEVICE void gather_x(const Args& a, const Place& p, const int (&rows)[X_ROWS], const int (&perm)[8],
                     u16 (&values)[X_ROWS][8]) {
    const int k = p.chunk * CHUNK + threadIdx.x % PIECES * 8;
#pragma unroll
    for (int i = 0; i < X_ROWS; ++i) {
        const bool valid = rows[i] >= 0 && k < a.K;
        const u16* row = reinterpret_cast<const u16*>(a.x) + u64(valid ? rows[i] : 0) * a.x_stride;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            values[i][j] = 0;
            if (valid) values[i][j] = load_early(row + perm[j]);
        }
    }
}

DEVICE void store_x(u8* shared, u32 stage, const u16 (&values)[X_ROWS][8]) {
    if (!loads_x()) return;
#pragma unroll
    for (int i = 0; i < X_ROWS; ++i) {
        Quad q;
#pragma unroll
        for (int j = 0; j < 4; ++j) q.v[j] = values[i][2 * j] | u32(values[i][2 * j + 1]) << 16;
        *reinterpret_cast<Quad*>(shared + (x_place(stage, i) - shared_address(shared))) = q;
    }
}
#endif

DEVICE void multiply(const u8* shared, u32 offset, float (&sums)[4][NT][4]) {
    const u32 magic = in_register(MAGIC);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, wk = warp / WARPS_N;
    const u8* stage = shared + offset;
    const u8* weights = stage + warp * K_TILES * TILE_BYTES + lane * 16 * WORDS;
    // Lane l names a row of matrix l / 8: k and k + 8 of eight rows, then the next k tile or eight rows.
    const int matrix = lane / 8;
    const int x_row = NT == 1 ? lane % 8 : matrix / 2 * 8 + lane % 8;
    const int x_piece = NT == 1 ? matrix : matrix % 2;
    const u32 x = shared_address(stage) + X_AT + x_row * X_STRIDE + (wk * K_TILES * 2 + x_piece) * 16;

#pragma unroll
    for (int run = 0; run < RUNS; ++run) {
        float part[SCALE_SUMS ? 4 : 1][SCALE_SUMS ? NT : 1][4];
        if (SCALE_SUMS) {
#pragma unroll
            for (int w = 0; w < 4; ++w)
#pragma unroll
                for (int t = 0; t < NT; ++t)
#pragma unroll
                    for (int i = 0; i < 4; ++i) part[w % (SCALE_SUMS ? 4 : 1)][t % (SCALE_SUMS ? NT : 1)][i] = 0;
        }
        Quad scales;
        if (GROUPED)
            scales = *reinterpret_cast<const Quad*>(stage + SCALES_AT + (warp * RUNS + run) * 128 + g * 16);
        u32 zeros[BITS / 4];
#pragma unroll
        for (int i = 0; i < BITS / 4; ++i)
            zeros[i] = !ASYM ? 0
                             : *reinterpret_cast<const u32*>(stage + ZEROS_AT +
                                                             (warp * RUNS + run) * ZERO_BYTES + g * BITS + 4 * i);

        u32 pair[4];
#pragma unroll
        for (int j = 0; j < RUN; ++j) {
            const int kt = run * RUN + j;
            u32 b[NT][2];
            if (NT == 1) {
                if (kt % 2 == 0 || j == 0) load_matrices(pair, x + (kt - kt % 2) * 32);
                b[0][0] = kt % 2 ? pair[2] : pair[0];
                b[0][1] = kt % 2 ? pair[3] : pair[1];
            } else {
#pragma unroll
                for (int t = 0; t + 1 < NT; t += 2) {
                    load_matrices(pair, x + t * 8 * X_STRIDE + kt * 32);
                    b[t][0] = pair[0], b[t][1] = pair[1];
                    b[(t + 1) % NT][0] = pair[2], b[(t + 1) % NT][1] = pair[3];
                }
            }
            Quad q[WORDS];
#pragma unroll
            for (int h = 0; h < WORDS; ++h)
                q[h] = *reinterpret_cast<const Quad*>(weights + kt * TILE_BYTES + 16 * h);
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                u32 a[4];
                const Zero zero = zero_of(zeros, w);
                dequantize(a, &q[w * WORDS / 4].v[w * WORDS % 4], zero, magic);
                if (SCALE_WEIGHTS) {
                    const u32 low = bytes<0x1010>(scales.v[w]), high = bytes<0x3232>(scales.v[w]);
                    a[0] = multiply2(a[0], low);
                    a[1] = multiply2(a[1], high);
                    a[2] = multiply2(a[2], low);
                    a[3] = multiply2(a[3], high);
                }
#pragma unroll
                for (int t = 0; t < NT; ++t) {
                    if (SCALE_SUMS)
                        mma(part[w % (SCALE_SUMS ? 4 : 1)][t % (SCALE_SUMS ? NT : 1)], a, b[t][0], b[t][1]);
                    else
                        mma(sums[w][t], a, b[t][0], b[t][1]);
                }
            }
        }
        if (SCALE_SUMS) {
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                const float low = to_float(u16(scales.v[w])), high = to_float(u16(scales.v[w] >> 16));
#pragma unroll
                for (int t = 0; t < NT; ++t)
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        sums[w][t][i] += (i < 2 ? low : high) * part[w % (SCALE_SUMS ? 4 : 1)][t % (SCALE_SUMS ? NT : 1)][i];
            }
        }
    }
}

// The scales of an expert's outputs where they have one each, of the outputs of this lane: (g, g + 8) x 4.
DEVICE void load_scales(const Args& a, const Place& p, u16 (&scales)[4][2]) {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4;
    const int n64 = p.n_tile * WARPS_N + warp % WARPS_N;
    const bool valid = n64 < a.N64 && p.expert >= 0;
    const u16* from = reinterpret_cast<const u16*>(a.scales) + (u64(p.expert) * a.N64 + n64) * 64;
#pragma unroll
    for (int w = 0; w < 4; ++w)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            scales[w][r] = 0;
            if (valid) scales[w][r] = load_early(from + w / 2 * 32 + g / 2 * 8 + (w % 2 * 2 + r) * 2 + g % 2);
        }
}

DEVICE void store(const Args& a, const Place& p, int row, int n, const Float4& f) {
    store_four(a.out + u64(row) * a.N, a.bias ? a.bias + u64(p.expert) * a.N : nullptr, a.N, n, f);
}

// The block that has a unit in its run.
DEVICE u32 block_of(const Work& w, u32 unit) { return ((u64(unit) + 1) * w.blocks - 1) / w.units; }

// Add up the warps, and the blocks where several share the tile.
DEVICE void finish(const Args& a, const Work& w, const Place& p, float (&sums)[4][NT][4],
                   const u16 (&scales)[4][2], u8* shared) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    const int wn = warp % WARPS_N, wk = warp / WARPS_N;
    float* added = reinterpret_cast<float*>(shared + SUMS_AT);
    const u32 tile = (u32(p.n_tile) * w.row_blocks + p.row_block) * w.chunks;
    const bool begins = tile >= w.begin, whole = begins && tile + w.chunks <= w.end;
    float* partials = a.partials + (u64(blockIdx.x) * 2 + begins) * TOKENS * N_TILE;
    constexpr int FOURS = 8 * N_TILE / 4;

#pragma unroll
    for (int t = 0; t < NT; ++t) {
        float* to = added + (wk * 8 + 2 * c) * SUM_STRIDE + wn * 64 + g;
#pragma unroll
        for (int b = 0; b < 4; ++b)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float s = GROUPED ? 1 : to_float(scales[b][i / 2]);
                to[i % 2 * SUM_STRIDE + b * 16 + i / 2 * 8] = sums[b][t][i] * s;
            }
        __syncthreads();
        for (int i = threadIdx.x; i < FOURS; i += THREADS) {
            const int token = i / (N_TILE / 4), n = i % (N_TILE / 4) * 4;
            const int row = row_of(a, p, t * 8 + token);
            if (row < 0) continue;
            Float4 f = *reinterpret_cast<const Float4*>(added + token * SUM_STRIDE + n);
#pragma unroll
            for (int k = 1; k < WARPS_K; ++k) {
                const Float4 o = *reinterpret_cast<const Float4*>(added + (k * 8 + token) * SUM_STRIDE + n);
#pragma unroll
                for (int j = 0; j < 4; ++j) f.v[j] += o.v[j];
            }
            if (whole)
                store(a, p, row, p.n_tile * N_TILE + n, f);
            else
                *reinterpret_cast<Float4*>(partials + (t * 8 + token) * N_TILE + n) = f;
        }
        __syncthreads();
    }
    if (whole) return;

    const u32 first = block_of(w, tile), last = block_of(w, tile + w.chunks - 1);
    __threadfence();
    __syncthreads();
    int* flag = reinterpret_cast<int*>(added);
    if (threadIdx.x == 0) {
        const int before = atomicAdd(a.counters + first, 1);
        *flag = before == int(last - first);
        if (*flag) a.counters[first] = 0;
    }
    __syncthreads();
    const bool ends = *flag;
    __syncthreads();
    if (!ends) return;
    __threadfence();
    for (int i = threadIdx.x; i < TOKENS * N_TILE / 4; i += THREADS) {
        const int token = i / (N_TILE / 4), n = i % (N_TILE / 4) * 4;
        const int row = row_of(a, p, token);
        if (row < 0) continue;
        const float* from = a.partials + token * N_TILE + n;
        Float4 f = load_shared_between_blocks(from + (u64(first) * 2 + 1) * TOKENS * N_TILE);
#pragma unroll 4
        for (u32 b = first + 1; b <= last; ++b) {
            const Float4 o = load_shared_between_blocks(from + u64(b) * 2 * TOKENS * N_TILE);
#pragma unroll
            for (int j = 0; j < 4; ++j) f.v[j] += o.v[j];
        }
        store(a, p, row, p.n_tile * N_TILE + n, f);
    }
}

KERNEL(THREADS, BLOCKS) marlin_gemm(const Args a) {
    let_next_kernel_start();
    wait_for_kernels_before();
    SHARED_MEMORY(shared);
    const u32 base = shared_address(shared);
    Work w;
    w.chunks = (a.K / 16 + CHUNK_TILES - 1) / CHUNK_TILES;
    w.row_blocks = MOE && a.num_blocks ? *a.num_blocks : a.row_blocks;
    w.n_tiles = (a.N64 + WARPS_N - 1) / WARPS_N;
    w.units = u32(w.n_tiles) * w.row_blocks * w.chunks;
    w.blocks = w.units < gridDim.x ? w.units : gridDim.x;
    if (blockIdx.x >= w.blocks) return;
    w.begin = u64(w.units) * blockIdx.x / w.blocks;
    w.end = u64(w.units) * (blockIdx.x + 1) / w.blocks;
    const int count = w.end - w.begin;

    Place now = place_of(a, w, w.begin), next = now;
    int rows[X_ROWS];
    find_rows(a, next, rows);
#if PERM
    int perm[8] = {};
    u16 values[X_ROWS][8];
    load_perm(a, next, perm);
#endif
    // Load what `next` names into a stage, and go on to the one behind.
    auto load = [&](int at) {
        const u32 stage = base + at * STAGE_BYTES;
        load_weights(a, next, stage);
#if PERM
        gather_x(a, next, rows, perm, values);
#else
        load_x(a, next, rows, stage);
#endif
    };
    auto go_on = [&](bool more) {
        if (advance(a, w, next) && more) find_rows(a, next, rows);
#if PERM
        if (more) load_perm(a, next, perm);
#endif
    };
#pragma unroll 1
    for (int s = 0; s < STAGES - 1; ++s) {
        if (s < count) {
            load(s);
#if PERM
            store_x(shared, base + s * STAGE_BYTES, values);
#endif
            go_on(s + 1 < count);
        }
        copy_commit();
    }

    float sums[4][NT][4] = {};
    u16 scales[4][2] = {};
    if (!GROUPED) load_scales(a, now, scales);
    int at = 0;  // the stage that is multiplied
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
        copy_wait<STAGES - 2>();
        __syncthreads();
        const bool more = i + STAGES - 1 < count;
        const int to = at == 0 ? STAGES - 1 : at - 1;
        if (more) {
            load(to);
            go_on(i + STAGES < count);
        }
        copy_commit();
        multiply(shared, at * STAGE_BYTES, sums);
#if PERM
        if (more) store_x(shared, base + to * STAGE_BYTES, values);
#endif
        at = at + 1 == STAGES ? 0 : at + 1;
        if (now.chunk + 1 == w.chunks || i + 1 == count) {
            finish(a, w, now, sums, scales, shared);
#pragma unroll
            for (int b = 0; b < 4; ++b)
#pragma unroll
                for (int t = 0; t < NT; ++t)
#pragma unroll
                    for (int j = 0; j < 4; ++j) sums[b][t][j] = 0;
        }
        if (advance(a, w, now) && !GROUPED && i + 1 < count) load_scales(a, now, scales);
    }
}
