// y[M, N] = x[M, K] W[N, K]^T for a few rows of x, on GPUs with clusters. As W x^T: a tile of weights (16 k x 64
// outputs) holds the registers of operand a of mma, lane by lane, so that a warp loads them from global memory
// straight into registers, a batch of 128 k before they are multiplied. Nothing waits for another warp until
// the end.
//
// One unit of work is 64 outputs (GATED: 64 of gate and the 64 of up). The blocks of a cluster share its
// units, each with its batches of k; in a block, each unit has warps_k warps, each with its part of those.
// Sums go to the shared memory of the block that writes those outputs, which adds them up in the order of the
// warps and blocks: the same bits each time.
//
// Codes are multiplied as `raw` numbers, cheap to make; zero points are subtracted from the sum over a group,
// times the sum of x over it, which is a product with ones.
//
// Chosen when compiled: BITS, BF16, ASYM, GROUP_TILES (k tiles in a group; 0: one group), PERM, TOKENS, WARPS,
// BLOCKS (per multiprocessor, at least), WHOLE (K is a multiple of 128), and FORM:
//   PLAIN   rows of x [M, K] and one weight.
//   GATED   unit (r, n): row r of the routes, ids[r] its expert, x[r / top_k]; out = activation(gate) * up.
//   SUMMED  unit (t, n): the sum over the routes r of token t of routed[r] * (x[r] W[ids[r]]^T), as one product
//           over the k of all of them.

#define PLAIN 0
#define GATED 1
#define SUMMED 2

struct Args {
    const u8* x;         // [*, x_stride] 16-bit floats
    const u8* weights;   // [E, K / 16, N64 * 128 * BITS] bytes
    const u8* scales;    // [E, groups, N64 * 64]
    const u8* zeros;     // [E, groups, N64 * 8 * BITS] bytes
    const int* perm;     // PERM: [K]: which feature of x comes k-th
    const u16* bias;     // PLAIN: [N] or null
    u16* out;            // [*, N], GATED: [*, N / 2]
    const void* ids;     // [*, top_k] experts; none where not in [0, num_experts)
    const void* routed;  // SUMMED: [*, top_k] weights
    int M, N, K, N64, x_stride, groups, units, together, warps_k, sums_at, received_at, capacity;
    int num_experts, top_k, wide_ids, wide_routed, activation;
};

constexpr int THREADS = 32 * WARPS;
constexpr int NT = TOKENS / 8;
constexpr int BATCH_TILES = 8;
constexpr int BATCH = 16 * BATCH_TILES;
constexpr int TILE_BYTES = 128 * BITS;
constexpr int WORDS = BITS / 4;
constexpr int HALVES = FORM == GATED ? 2 : 1;
constexpr bool GROUPED = GROUP_TILES > 0;
constexpr int RUN = GROUPED && GROUP_TILES < BATCH_TILES ? GROUP_TILES : BATCH_TILES;  // under one scale
constexpr int RUNS = BATCH_TILES / RUN;
constexpr int SUM_STRIDE = 64 + 4;
constexpr int ZEROS = 2 * BATCH;  // bytes at the begin of shared memory, for rows of x that are not there
static_assert(FORM == PLAIN || TOKENS == 8, "a unit of experts has one row of x");

DEVICE int expert_of(const Args& a, int route) {
    const int e = a.wide_ids ? int(static_cast<const long long*>(a.ids)[route])
                             : static_cast<const int*>(a.ids)[route];
    return e >= 0 && e < a.num_experts ? e : -1;
}

// What a warp works on: 64 outputs, and its batches of k.
struct Share {
    int unit, tile, row, expert, begin, end;  // row: of x in shared memory. GATED: expert of the unit
};

// A batch: where its weights are.
struct Source {
    const u8 *weights, *scales, *zeros;
    int tiles;     // of k that there are
    int groups;    // from the first one on
    float factor;  // SUMMED: of the route
    bool counts;
};

DEVICE int batches_of(const Args& a) { return (a.K + BATCH - 1) / BATCH; }  // of one expert

DEVICE Source source_of(const Args& a, const Share& s, int batch) {
    Source from;
    int expert = s.expert;
    from.factor = 1;
    from.counts = true;
    if (FORM == SUMMED) {
        const int route = s.row * a.top_k + batch / batches_of(a);
        batch %= batches_of(a);
        expert = expert_of(a, route);
        from.counts = expert >= 0;
        if (expert < 0) expert = 0;
        from.factor = a.wide_routed ? static_cast<const float*>(a.routed)[route]
                                    : to_float(static_cast<const u16*>(a.routed)[route]);
    }
    const int lane = threadIdx.x % 32, k_tiles = a.K / 16, first = batch * BATCH_TILES;
    const int group = GROUPED ? first / (GROUPED ? GROUP_TILES : 1) : 0;
    from.tiles = k_tiles - first;
    from.groups = a.groups - group;
    const u64 stack = FORM == PLAIN ? 0 : expert;
    from.weights = a.weights + ((stack * k_tiles + first) * a.N64 + s.tile) * TILE_BYTES + lane * 16 * WORDS;
    const u64 row = (stack * a.groups + group) * a.N64 + s.tile;
    from.scales = a.scales + row * 128;
    from.zeros = a.zeros + row * (8 * BITS) + lane / 4 * BITS;
    return from;
}

DEVICE void load_tile(const Args& a, const Source& from, int kt, Quad (&q)[WORDS]) {
    const int tile = WHOLE || kt < from.tiles ? kt : from.tiles - 1;  // x is 0 where there is none
    const u8* p = from.weights + u64(tile) * a.N64 * TILE_BYTES;
#pragma unroll
    for (int h = 0; h < WORDS; ++h) q[h] = load_once(reinterpret_cast<const Quad*>(p + 16 * h));
}

// Scales and zero points of a run, of the outputs of this lane: (g, g + 8) x 4.
struct Grid { Quad scales; u32 zeros[BITS / 4]; };

DEVICE void load_grid(const Args& a, const Source& from, int run, Grid& grid) {
    const int g = threadIdx.x % 32 / 4;
    const int last = from.groups - 1, group = WHOLE || run < last ? run : last;
    if (GROUPED) {
        grid.scales = load_early(reinterpret_cast<const Quad*>(from.scales + u64(group) * a.N64 * 128 + g * 16));
    } else {
        const u16* p = reinterpret_cast<const u16*>(from.scales);
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            const u16* pair = p + w / 2 * 32 + g / 2 * 8 + w % 2 * 4 + g % 2;
            grid.scales.v[w] = load_early(pair) | u32(load_early(pair + 2)) << 16;
        }
    }
    if (ASYM) {
        const u32* p = reinterpret_cast<const u32*>(from.zeros + u64(GROUPED ? group : 0) * a.N64 * 8 * BITS);
#pragma unroll
        for (int i = 0; i < BITS / 4; ++i) grid.zeros[i] = load_early(p + i);
    }
}

// Multiply what is loaded; where MORE, load `next` into the same registers meanwhile.
template <bool MORE>
DEVICE void multiply(const Args& a, Quad (&q)[BATCH_TILES][WORDS], Grid (&grids)[RUNS], const Source& now,
                     const Source& next, u32 x, float (&sums)[4][NT][4]) {
#pragma unroll
    for (int run = 0; run < RUNS; ++run) {
        float part[4][NT][4] = {}, ones[NT][4] = {};
        u32 pair[4];
#pragma unroll
        for (int j = 0; j < RUN; ++j) {
            const int kt = run * RUN + j;
            u32 b[NT][2];
            if (NT == 1) {
                if (kt % 2 == 0) load_matrices(pair, x + kt * 32);
                b[0][0] = pair[kt % 2 * 2], b[0][1] = pair[kt % 2 * 2 + 1];
            } else {
                load_matrices(pair, x + kt * 32);
#pragma unroll
                for (int t = 0; t < NT; ++t) b[t][0] = pair[2 * t], b[t][1] = pair[2 * t + 1];
            }
            const u32 one[4] = {ONE, ONE, ONE, ONE};
#pragma unroll
            for (int t = 0; t < NT; ++t) mma(ones[t], one, b[t][0], b[t][1]);
            u32 words[4 * WORDS];
#pragma unroll
            for (int i = 0; i < 4 * WORDS; ++i) words[i] = q[kt][i / 4].v[i % 4];
            if (MORE) load_tile(a, next, kt, q[kt]);
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                u32 registers[4];
                raw(registers, words + w * WORDS);
#pragma unroll
                for (int t = 0; t < NT; ++t) mma(part[w][t], registers, b[t][0], b[t][1]);
            }
        }
        const Grid grid = grids[run];
        if (MORE) load_grid(a, next, run, grids[run]);
        if (FORM == SUMMED && !now.counts) continue;
#pragma unroll
        for (int w = 0; w < 4; ++w)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float scale = to_float(u16(grid.scales.v[w] >> (16 * r))) * RAW_UNIT;
                if (FORM == SUMMED) scale *= now.factor;
                const float zero = raw_zero(grid.zeros, w, r);
#pragma unroll
                for (int t = 0; t < NT; ++t)
#pragma unroll
                    for (int i = 0; i < 2; ++i)
                        sums[w][t][2 * r + i] += scale * (part[w][t][2 * r + i] - zero * ones[t][i]);
            }
    }
}

// The part of each row of x that this block multiplies: batches [begin, end).
DEVICE void load_x(const Args& a, int begin, int end, u8* shared) {
    const int pieces = (end - begin) * (BATCH / 8), stride = pieces * 16 + 16;
    for (int i = threadIdx.x; i < ZEROS / 4; i += THREADS) reinterpret_cast<u32*>(shared)[i] = 0;
    for (int i = threadIdx.x; i < a.M * pieces; i += THREADS) {
        const int row = i / pieces, piece = i % pieces;
        int k = begin * BATCH + piece * 8, from = row;
        if (FORM == SUMMED) {
            from = row * a.top_k + k / (batches_of(a) * BATCH);
            k %= batches_of(a) * BATCH;
        }
        u8* to = shared + ZEROS + row * stride + piece * 16;
        const u8* source = a.x + (u64(from) * a.x_stride) * 2;
#if PERM
        const u16* features = reinterpret_cast<const u16*>(source);
        Quad q = {};
        if (k < a.K)
#pragma unroll
            for (int j = 0; j < 4; ++j)
                q.v[j] = features[a.perm[k + 2 * j]] | u32(features[a.perm[k + 2 * j + 1]]) << 16;
        *reinterpret_cast<Quad*>(to) = q;
#else
        copy_async(shared_address(to), k < a.K ? source + k * 2 : a.x, k < a.K);
#endif
    }
    copy_commit();
    copy_wait<0>();
}

// Where a lane finds the rows of x that it names to load_matrices, in the first batch of the block; and the
// bytes from batch to batch: none for a row that is not there.
DEVICE u32 x_of_lane(const Args& a, const Share& s, int batches, const u8* shared, u32& step) {
    const int lane = threadIdx.x % 32, matrix = lane / 8;
    const int token = lane % 8 + (NT == 1 ? 0 : matrix / 2 * 8), piece = NT == 1 ? matrix : matrix % 2;
    const bool valid = FORM == PLAIN ? token < a.M : token == 0;
    const int row = FORM == PLAIN ? token : s.row;
    step = valid ? 2 * BATCH : 0;
    return shared_address(shared) + piece * 16 + (valid ? ZEROS + row * (batches * 2 * BATCH + 16) : 0);
}

DEVICE void store(const Args& a, int row, int n, const Float4& f) {
    const int N = a.N / HALVES;
    float v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
        v[i] = f.v[i] + (FORM == PLAIN && a.bias && n + i < N ? to_float(a.bias[n + i]) : 0);
    u16* to = a.out + u64(row) * N + n;
    const u32 low = from_floats(v[0], v[1]), high = from_floats(v[2], v[3]);
    if (N % 4 == 0) {
        if (n < N) *reinterpret_cast<u64*>(to) = low | u64(high) << 32;
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (n + i < N) to[i] = u16((i < 2 ? low : high) >> (16 * (i % 2)));
}

DEVICE Float4 add(const Float4& a, const Float4& b) {
    return {a.v[0] + b.v[0], a.v[1] + b.v[1], a.v[2] + b.v[2], a.v[3] + b.v[3]};
}

// The unit: which outputs, and of which row.
DEVICE Share share_of(const Args& a, int unit, int half) {
    Share s;
    const int tiles = a.N64 / HALVES, row = unit / tiles;
    s.unit = unit;
    s.tile = unit % tiles + half * tiles;
    s.row = FORM == PLAIN ? 0 : FORM == GATED ? row / a.top_k : row;
    s.expert = FORM == GATED ? expert_of(a, row) : 0;
    return s;
}

DEVICE void write_sums(const Args& a, const float (&sums)[4][NT][4], u8* shared) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    const int rows = FORM == PLAIN ? a.M : 1;
    float* to = reinterpret_cast<float*>(shared + a.sums_at) + warp * rows * SUM_STRIDE + g;
#pragma unroll
    for (int t = 0; t < NT; ++t)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int token = t * 8 + 2 * c + i;
            if (token >= rows) continue;
#pragma unroll
            for (int w = 0; w < 4; ++w)
#pragma unroll
                for (int r = 0; r < 2; ++r) to[token * SUM_STRIDE + w * 16 + r * 8] = sums[w][t][2 * r + i];
        }
}

// Add up the warps and the blocks of the cluster, for `units` from `first` on, and write the outputs.
DEVICE void finish(const Args& a, int first, int units, u8* shared) {
    const u32 blocks = cluster_size(), rank = cluster_rank();
    const int rows = FORM == PLAIN ? a.M : 1;
    const u32 all = units * rows * 16;  // of four outputs
    const float* sums = reinterpret_cast<const float*>(shared + a.sums_at);
    u8* received = shared + a.received_at;
    auto add_warps = [&](u32 i, int half) {
        const int unit = i / 16 / rows, row = i / 16 % rows;
        const float* from = sums + ((unit * HALVES + half) * a.warps_k * rows + row) * SUM_STRIDE + i % 16 * 4;
        Float4 f = *reinterpret_cast<const Float4*>(from);
        for (int w = 1; w < a.warps_k; ++w)
            f = add(f, *reinterpret_cast<const Float4*>(from + w * rows * SUM_STRIDE));
        return f;
    };
    __syncthreads();
    if (blocks > 1) {
        cluster_wait();  // the others have begun, or read what they received before
        for (u32 i = threadIdx.x; i < all; i += THREADS) {
            const u32 to = ((i + 1) * blocks - 1) / all;
            const u32 place = (rank * HALVES) * a.capacity + i - all * to / blocks;
#pragma unroll
            for (int half = 0; half < HALVES; ++half)
                store_in_cluster(shared_address(received) + (place + half * a.capacity) * 16, to,
                                 add_warps(i, half));
        }
        cluster_arrive();
        cluster_wait();
    }
    const u32 begin = all * rank / blocks, end = all * (rank + 1) / blocks;
    for (u32 i = begin + threadIdx.x; i < end; i += THREADS) {
        Float4 f[HALVES];
#pragma unroll
        for (int half = 0; half < HALVES; ++half) {
            if (blocks == 1) {
                f[half] = add_warps(i, half);
                continue;
            }
            const Float4* from = reinterpret_cast<const Float4*>(received) + half * a.capacity + i - begin;
            f[half] = *from;
            for (u32 b = 1; b < blocks; ++b) f[half] = add(f[half], from[b * HALVES * a.capacity]);
        }
        if (FORM == GATED)
#pragma unroll
            for (int j = 0; j < 4; ++j) f[0].v[j] = activate(f[0].v[j], f[HALVES - 1].v[j], a.activation);
        const int unit = first + i / 16 / rows, tiles = a.N64 / HALVES;
        const int row = FORM == PLAIN ? i / 16 % rows : unit / tiles;
        store(a, row, unit % tiles * 64 + i % 16 * 4, f[0]);
    }
}

KERNEL(THREADS, BLOCKS) marlin_decode(const Args a) {
    SHARED_MEMORY(shared);
    const u32 blocks = cluster_size(), rank = cluster_rank();
    if (blocks > 1) cluster_arrive();
    // What is read before the wait: weights; SUMMED: routes, which were complete before the kernel before began.
    if (FORM == GATED) wait_for_kernels_before();
    let_next_kernel_start();
    const int cluster = blockIdx.x / blocks, clusters = gridDim.x / blocks, warp = threadIdx.x / 32;
    const int first = u64(a.units) * cluster / clusters, end = u64(a.units) * (cluster + 1) / clusters;
    const int batches = batches_of(a) * (FORM == SUMMED ? a.top_k : 1);
    const int begin_k = batches * rank / blocks, end_k = batches * (rank + 1) / blocks;
    const int slot = warp / a.warps_k, part = warp % a.warps_k;

#pragma unroll 1
    for (int unit = first; unit < end; unit += a.together) {
        const int units = end - unit < a.together ? end - unit : a.together;
        const bool mine = slot < units * HALVES;
        Share s = share_of(a, unit + (mine ? slot / HALVES : 0), slot % HALVES);
        s.begin = begin_k + (end_k - begin_k) * part / a.warps_k;
        s.end = mine && s.expert >= 0 ? begin_k + (end_k - begin_k) * (part + 1) / a.warps_k : s.begin;
        Quad q[BATCH_TILES][WORDS];
        Grid grids[RUNS];
        Source now;
        if (s.begin < s.end) {
            now = source_of(a, s, s.begin);
#pragma unroll
            for (int run = 0; run < RUNS; ++run) load_grid(a, now, run, grids[run]);
#pragma unroll
            for (int kt = 0; kt < BATCH_TILES; ++kt) load_tile(a, now, kt, q[kt]);
        }
        if (unit == first) {
            if (FORM != GATED) wait_for_kernels_before();
            load_x(a, begin_k, end_k, shared);
            __syncthreads();
        }
        float sums[4][NT][4] = {};
        u32 step, x = x_of_lane(a, s, end_k - begin_k, shared, step);
        x += (s.begin - begin_k) * step;
#pragma unroll 1
        for (int batch = s.begin; batch + 1 < s.end; ++batch) {
            const Source next = source_of(a, s, batch + 1);
            multiply<true>(a, q, grids, now, next, x, sums);
            now = next;
            x += step;
        }
        if (s.begin < s.end) multiply<false>(a, q, grids, now, now, x, sums);
        if (mine) write_sums(a, sums, shared);
        finish(a, unit, units, shared);
        if (unit + a.together < end) {  // what is read stays until all have read it
            __syncthreads();
            if (blocks > 1) cluster_arrive();
        }
    }
}
