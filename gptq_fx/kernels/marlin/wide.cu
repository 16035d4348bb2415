// y[M, N] = x[M, K] W[N, K]^T for many rows of x, on Hopper: as W x^T by wgmma. A tile of weights holds the
// registers of operand a (16 outputs x 16 k); x is operand b, in shared memory.
//
// A block has three warpgroups and 256 outputs. One warpgroup loads, stage by stage; two multiply: warp w of each
// those of the w-th tile of 64, of which one takes the first half, the other the second, by two wgmmas of 16
// outputs a warp. Neither waits for another but at the stages: `full` when one is loaded, `empty` when it has been
// multiplied.
//
// Few tiles: the blocks of a cluster share one, each with its part of K; each adds up a part of the rows, in the
// order of the blocks. Many tiles: each block takes as many chunks of k as the others, through tile after tile;
// where two share one, the last to come adds what the other has left in `partials`. The same bits each time.
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
    float* partials;       // [blocks, 2, TOKENS * 256]: of the first and the last tile of a block
    int* counters;         // [blocks] zeros, left as such: of the tile that a block shares with the next
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
// Behind the stages: where each row of x is; the barriers `full` and `empty` of each stage; for each
// warp a place to turn 16 rows of 32 outputs, and a number for all.
constexpr int ROWS_AT = STAGES_BYTES, FULL_AT = ROWS_AT + 8 * TOKENS, EMPTY_AT = FULL_AT + 8 * STAGES;
constexpr int TURNED_STRIDE = 64 + 16, TURNED_BYTES = 16 * TURNED_STRIDE;
constexpr int TURNED_AT = EMPTY_AT + 8 * STAGES, NUMBER_AT = TURNED_AT + MULTIPLIERS / 32 * TURNED_BYTES;
static_assert(1024 + NUMBER_AT + 16 == SHARED, "the caller counts otherwise");

// What a block has to do: chunks of k, counted through all tiles.
struct Share {
    u32 at, end;
};

// Of one tile.
struct Place {
    int n_tile, row_block, expert, begin, end;  // chunks of k
};

DEVICE u32 chunks_of_tile(const Args& a) { return (a.K / 16 + K_TILES - 1) / K_TILES; }

DEVICE Share share_of(const Args& a, int row_blocks) {
    const u32 tiles = u32(row_blocks) * ((a.N64 + 3) / 4), chunks = chunks_of_tile(a), parts = cluster_size();
    if (parts > 1) {
        const u32 tile = blockIdx.x / parts, rank = cluster_rank(), before = tile * chunks;
        if (tile >= tiles) return {0, 0};
        return {before + chunks * rank / parts, before + chunks * (rank + 1) / parts};
    }
    if (tiles <= gridDim.x) {
        const u32 before = blockIdx.x * chunks;
        return blockIdx.x < tiles ? Share{before, before + chunks} : Share{0, 0};
    }
    const u64 all = u64(tiles) * chunks;
    return {u32(all * blockIdx.x / gridDim.x), u32(all * (blockIdx.x + 1) / gridDim.x)};
}

DEVICE int expert_of(const Args& a, int row_block) {
    return MOE ? expert_at(a.experts, a.wide_experts, row_block, a.num_experts) : 0;
}

// The row of out that is `token` of the block's rows, or -1.
DEVICE int row_of(const Args& a, const Place& p, int token) {
    if (MOE) return a.rows[p.row_block * TOKENS + token];
    const int row = p.row_block * TOKENS + token;
    return row < a.M ? row : -1;
}

// The next tile of a share. Tiles that share weights follow each other, eight blocks of rows at a time.
DEVICE Place place_of(const Args& a, const Share& s, int row_blocks) {
    constexpr int TOGETHER = 8;
    const int n_tiles = (a.N64 + 3) / 4, chunks = chunks_of_tile(a), tile = s.at / chunks;
    const int band = tile / (TOGETHER * n_tiles), left = row_blocks - band * TOGETHER;
    const int rows = left < TOGETHER ? left : TOGETHER, in_band = tile - band * TOGETHER * n_tiles;
    Place p;
    p.n_tile = in_band / rows;
    p.row_block = band * TOGETHER + in_band % rows;
    p.begin = s.at - tile * chunks;
    p.end = s.end - s.at < u32(chunks - p.begin) ? p.begin + int(s.end - s.at) : chunks;
    p.expert = expert_of(a, p.row_block);
    return p;
}

// Where a loader takes its pieces of the weights from: a stage further with each call of `load_weights`. In place of
// outputs that do not exist it takes others: what comes of them is not stored.
struct Weights {
    const u8* from;
    int k_tiles;  // from there on
};

constexpr int PIECES = 4 * TILE_BYTES / 16;  // of a k tile, 16 bytes each
constexpr int TURNS = PIECES / LOADERS;      // that it takes to load one
static_assert(PIECES % LOADERS == 0, "a loader would have parts of pieces");

DEVICE Weights weights_of(const Args& a, const Place& p, int loader) {
    const int k_tiles = a.K / 16, first = p.begin * K_TILES;
    const u64 row = (u64(p.expert) * k_tiles + first) * a.N64;
    return {a.weights + row * TILE_BYTES + loader * 16, k_tiles - first};
}

DEVICE void load_weights(const Args& a, const Place& p, Weights& w, int loader, u32 stage) {
    long long at[TURNS];
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
        const int tile = (turn * LOADERS + loader) * 16 / TILE_BYTES, most = a.N64 - 1 - p.n_tile * 4;
        at[turn] = (p.n_tile * 4LL - (tile > most ? tile - most : 0)) * TILE_BYTES + turn * LOADERS * 16;
    }
    const u64 step = u64(a.N64) * TILE_BYTES;
    const u8* from = w.from;
    auto load = [&](int kt, bool valid) {
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn)
            copy_async(stage + WEIGHTS_AT + kt * 4 * TILE_BYTES + (turn * LOADERS + loader) * 16, from + at[turn], valid);
        from += step;
    };
    if (w.k_tiles >= K_TILES)
#pragma unroll
        for (int kt = 0; kt < K_TILES; ++kt) load(kt, true);
    else
#pragma unroll 1
        for (int kt = 0; kt < K_TILES; ++kt) load(kt, kt < w.k_tiles);
    w = {from, w.k_tiles - K_TILES};
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

// Eight loaders take 64 k of a row. rows: any where there is none; what comes of it is not stored.
DEVICE void load_x(const Args& a, const u8* const* rows, int chunk, int loader, u32 stage) {
    constexpr int STEP = LOADERS / 8;
    static_assert(TOKENS % STEP == 0, "some loaders would have no row");
    const int token = loader / 8, piece = loader % 8, k = chunk * CHUNK + piece * 8;
    const u32 to = stage + token * 128 + ((piece ^ token % 8) << 4);
#pragma unroll
    for (int i = 0; i < TOKENS / STEP; ++i) {
        const u8* from = rows[i * STEP + token] + u64(k) * 2;
#pragma unroll
        for (int column = 0; column < K_TILES / 4; ++column)
            copy_async(to + column * X_BYTES + i * (STEP * 128), from + column * 128, k + column * 64 < a.K);
    }
}

// What the loaders do: all chunks, as stages become free.
DEVICE void load_all(const Args& a, Share share, int row_blocks, u8* shared) {
    const int loader = threadIdx.x - MULTIPLIERS;
    const u32 base = shared_address(shared);
    const u8** rows = reinterpret_cast<const u8**>(shared + ROWS_AT);
    int nth = 0, place = 0, early = 0;  // early: chunks whose weights came before x
    u32 round = 0;
    bool waited = MOE;
    for (; share.at < share.end;) {
        const Place p = place_of(a, share, row_blocks);
        share.at += p.end - p.begin;
        if (p.expert < 0) continue;
        Weights weights = weights_of(a, p, loader);
        auto load_codes = [&](int chunk, u32 stage) {
            load_weights(a, p, weights, loader, stage);
            load_grid(a, p, chunk, loader, stage);
        };
        if (!waited) {
#pragma unroll 1
            for (; early < 2 && p.begin + early < p.end; ++early) load_codes(p.begin + early, base + early * STAGE_BYTES);
            wait_for_kernels_before();  // they may have made x
            waited = true;
        }
        sync_some<2, LOADERS>();  // all are done with the rows before
        if (loader < TOKENS) {
            const int row = row_of(a, p, loader);
            rows[loader] = a.x + u64(row < 0 ? 0 : MOE ? row / a.top_k : row) * a.x_stride * 2;
        }
        sync_some<2, LOADERS>();
#pragma unroll 1
        for (int chunk = p.begin; chunk < p.end; ++chunk, ++nth) {
            const u32 stage = base + place * STAGE_BYTES;
            if (nth >= STAGES) barrier_wait(base + EMPTY_AT + place * 8, (round - 1) & 1);
            if (nth >= early) load_codes(chunk, stage);
            load_x(a, rows, chunk, loader, stage);
            barrier_arrive_after_copies(base + FULL_AT + place * 8);
            if (++place == STAGES) place = 0, ++round;
        }
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

// Add up the blocks of the cluster, in the place of its stages.
DEVICE void finish_cluster(const Args& a, const Place& p, const float (&sums)[2][TOKENS / 2], u8* shared) {
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
    cluster_arrive();
    cluster_wait();
    const int first = TOKENS * rank / parts, last = TOKENS * (rank + 1) / parts;
    for (int i = threadIdx.x; i < (last - first) * (N_TILE / 4); i += MULTIPLIERS) {
        const int token = first + i / (N_TILE / 4), n = i % (N_TILE / 4) * 4;
        const int row = row_of(a, p, token);
        if (row < 0 || p.n_tile * N_TILE + n >= a.N) continue;
        const u32 from = shared_address(added + token * SUM_STRIDE + n);
        Float4 each[MOST_PARTS];
#pragma unroll
        for (u32 r = 0; r < MOST_PARTS; ++r)
            if (r < parts) each[r] = load_from_cluster(from, r);
        Float4 f = each[0];
#pragma unroll
        for (u32 r = 1; r < MOST_PARTS; ++r)
#pragma unroll
            for (int j = 0; j < 4; ++j)
                if (r < parts) f.v[j] += each[r].v[j];
        store(a, p, row, p.n_tile * N_TILE + n, f);
    }
    __syncwarp();
    cluster_arrive_relaxed();
    cluster_wait();  // what others read stays
}

// Add what another block has of the same tile; false where it will do so with ours.
DEVICE bool add_other(const Args& a, const Place& p, float (&sums)[2][TOKENS / 2], u8* shared) {
    const bool last = p.end < int(chunks_of_tile(a));  // of this block's tiles; else its first
    const int own = 2 * blockIdx.x + last, other = last ? own + 1 : own - 1;
    int* counter = a.counters + (last ? own : other) / 2;
    volatile int* there = reinterpret_cast<volatile int*>(shared + NUMBER_AT);
    auto partial = [&](int of, int i) {
        return a.partials + ((u64(of) * (TOKENS / 4) + i) * MULTIPLIERS + threadIdx.x) * 4;
    };
    if (threadIdx.x == 0) *there = last ? atomicAdd(counter, 0) : 0;  // the first tile is another's last: not there yet
    sync_some<1, MULTIPLIERS>();
    bool add = *there;
    if (!add) {
#pragma unroll
        for (int i = 0; i < TOKENS / 4; ++i)
            *reinterpret_cast<Float4*>(partial(own, i)) = {sums[i % 2][i / 2 * 4], sums[i % 2][i / 2 * 4 + 1],
                                                           sums[i % 2][i / 2 * 4 + 2], sums[i % 2][i / 2 * 4 + 3]};
        __threadfence();
        sync_some<1, MULTIPLIERS>();
        if (threadIdx.x == 0) *there = atomicAdd(counter, 1);
        sync_some<1, MULTIPLIERS>();
        add = *there;
    }
    if (!add) return false;
    __threadfence();
#pragma unroll
    for (int i = 0; i < TOKENS / 4; ++i) {
        const Float4 f = load_shared_between_blocks(partial(other, i));
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i % 2][i / 2 * 4 + j] += f.v[j];
    }
    if (threadIdx.x == 0) *counter = 0;
    return true;
}

// A tile that is complete: each warp turns its 32 outputs, 16 rows at a time, so that it stores whole sectors.
DEVICE void finish(const Args& a, const Place& p, const float (&sums)[2][TOKENS / 2], u8* shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first = p.n_tile * N_TILE + warp % 4 * 64 + warp / 4 * 32;
    float factor[2][2], added[2][2];
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int n = first + j * 16 + r * 8 + lane / 4;
            factor[j][r] = GROUPED || n >= a.N ? 1 : channel_scale(a, p, n);
            added[j][r] = a.bias && n < a.N ? to_float(a.bias[u64(p.expert) * a.N + n]) : 0;
        }
    u8* turned = shared + TURNED_AT + warp * TURNED_BYTES;
#pragma unroll
    for (int t = 0; t < TOKENS / 8; t += 2) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            u32 pairs[4];  // of two rows
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* f = &sums[i / 2][(t + h) * 4 + i % 2 * 2];
                const float scale = factor[i / 2][i % 2], more = added[i / 2][i % 2];
                pairs[i] = from_floats(f[0] * scale + more, f[1] * scale + more);
            }
            store_matrices_turned(pairs, shared_address(turned + (h * 8 + lane % 8) * TURNED_STRIDE + lane / 8 * 16));
        }
        __syncwarp();
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = row_of(a, p, (t + h) * 8 + lane / 4), n = first + lane % 4 * 8;
            const u8* from = turned + (h * 8 + lane / 4) * TURNED_STRIDE + lane % 4 * 16;
            if (row >= 0) store_eight(a.out + u64(row) * a.N, a.N, n, *reinterpret_cast<const Quad*>(from));
        }
        __syncwarp();
    }
}

// What the others do: all chunks, tile after tile. registers: of operand a, of this 16 k and the next.
DEVICE void multiply_all(const Args& a, Share share, int row_blocks, u8* shared) {
    const u32 base = shared_address(shared), magic = in_register(MAGIC);
    float sums[2][TOKENS / 2];  // the first wgmmas of a tile set them
    u32 registers[2][2][4];
    Stage now, next;
    int place = 0;
    u32 round = 0;
    auto take = [&](Stage& to) {
        barrier_wait(base + FULL_AT + place * 8, round & 1);
        show_to_wgmma();
        read_stage(shared + place * STAGE_BYTES, to);
    };
    auto give_back = [&](int stage) {
        if (threadIdx.x % 32 == 0) barrier_arrive(base + EMPTY_AT + stage * 8);
        __syncwarp();
    };
    for (; share.at < share.end;) {
        const Place p = place_of(a, share, row_blocks);
        const int count = p.end - p.begin;
        share.at += count;
        if (p.expert < 0) continue;
        take(now);
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
            const u64 matrix = wgmma_matrix(base + place * STAGE_BYTES);
            const int before = place ? place - 1 : STAGES - 1;
            if (++place == STAGES) place = 0, ++round;
#pragma unroll
            for (int kt = 0; kt < K_TILES; ++kt) {
                dequantize_step(now.q[kt], now.grids[kt / RUN % (RUNS ? RUNS : 1)], magic, registers[kt % 2]);
                wgmma_fence();
#pragma unroll
                for (int j = 0; j < 2; ++j)
                    wgmma(sums[j], registers[kt % 2][j], wgmma_further(matrix, kt / 4 * X_BYTES + kt % 4 * 32),
                          i + kt > 0);
                wgmma_commit();
                if (kt == K_TILES / 2 && i + 1 < count) take(next);  // wgmma has work meanwhile
                wgmma_wait<1>();
                if (kt == 0 && i > 0) give_back(before);
            }
            now = next;
        }
        wgmma_wait<0>();
        give_back(place ? place - 1 : STAGES - 1);
        if (cluster_size() > 1) {
            sync_some<1, MULTIPLIERS>();
            finish_cluster(a, p, sums, shared);
        } else if (count == int(chunks_of_tile(a)) || add_other(a, p, sums, shared)) {
            finish(a, p, sums, shared);
        }
    }
}

KERNEL(THREADS, 1) marlin_wide(const Args a) {
    let_next_kernel_start();
    SHARED_MEMORY(memory);
    u8* shared = memory + (1024 - shared_address(memory) % 1024) % 1024;
    const u32 base = shared_address(shared);
    int row_blocks = a.row_blocks;
    if (MOE) {
        wait_for_kernels_before();
        row_blocks = *a.num_blocks;
    }
    const Share share = share_of(a, row_blocks);
    if (threadIdx.x < STAGES) {
        barrier_init(base + FULL_AT + threadIdx.x * 8, LOADERS);
        barrier_init(base + EMPTY_AT + threadIdx.x * 8, MULTIPLIERS / 32);
    }
    __syncthreads();
    if (threadIdx.x >= MULTIPLIERS) {
        fewer_registers<40>();
        load_all(a, share, row_blocks, shared);
    } else {
        more_registers<232>();
        multiply_all(a, share, row_blocks, shared);
    }
}
