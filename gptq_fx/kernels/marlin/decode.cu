// y[M, N] = x[M, K] W[N, K]^T for a few rows of x, on GPUs with clusters. As W x^T: a tile of weights (16 k x 64
// outputs) holds the registers of operand a of mma, lane by lane, so that a warp loads them from global memory
// into registers, a batch of k tiles while it multiplies the one before, and the first ones before the kernels
// before have ended. Nothing waits for another warp but for x, at the begin, and for the sum, at the end.
//
// One unit of work is 64 outputs (GATED: 64 of gate and the 64 of up). The blocks of a cluster share its
// units, each with its batches of k; in a block, groups of warps_k warps take unit by unit, each warp its part of
// those batches. Sums go to the shared memory of the block that writes those outputs, which adds them up in the order of the
// warps and blocks: the same bits each time.
//
// Codes are multiplied as `raw` numbers, cheap to make; the sum over a group begins with what is too much then:
// minus the zero point times the sum of x over the group.
//
// Chosen when compiled: BITS, BF16, ASYM, GROUP_TILES (k tiles in a group; 0: one group), PERM, TOKENS, WARPS,
// BATCH_TILES (k tiles in a batch), and FORM:
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
    int M, N, K, N64, x_stride, groups, units, warps_k, sums_at, received_at, capacity;
    int num_experts, top_k, wide_ids, wide_routed, activation;
};

constexpr int THREADS = 32 * WARPS;
constexpr int NT = TOKENS / 8;
constexpr int BATCH = 16 * BATCH_TILES;
constexpr int TILE_BYTES = 128 * BITS;
constexpr int WORDS = BITS / 4;
constexpr int HALVES = FORM == GATED ? 2 : 1;
constexpr bool GROUPED = GROUP_TILES > 0;
constexpr int RUN = GROUPED && GROUP_TILES < BATCH_TILES ? GROUP_TILES : BATCH_TILES;  // under one scale
constexpr int RUNS = BATCH_TILES / RUN;
constexpr int SUM_STRIDE = 64 + 4;
constexpr int X_AT = 2 * BATCH;  // in shared memory; the bytes before are 0, for rows of x that are not there

static_assert(FORM == PLAIN || TOKENS == 8, "a unit of experts has one row of x");

DEVICE int expert_of(const Args& a, int route) {
    const int e = a.wide_ids ? int(static_cast<const long long*>(a.ids)[route])
                             : static_cast<const int*>(a.ids)[route];
    return e >= 0 && e < a.num_experts ? e : -1;
}

// Of 64 outputs.
struct Share {
    int tile, row, expert;  // row: of x in shared memory. GATED: expert of the unit
};

DEVICE int batches_of(const Args& a) { return (a.K + BATCH - 1) / BATCH; }  // of one expert

// SUMMED: the route that a batch belongs to.
DEVICE int route_of(const Args& a, const Share& s, int batch) { return s.row * a.top_k + batch / batches_of(a); }

// SUMMED: what the sum over a batch is multiplied with.
DEVICE float factor_of(const Args& a, int route) {
    return a.wide_routed ? static_cast<const float*>(a.routed)[route]
                         : to_float(static_cast<const u16*>(a.routed)[route]);
}

// Scales and zero points of a run, of the outputs of this lane: (g, g + 8) x 4.
struct Grid { Quad scales; u32 zeros[BITS / 4]; };

struct Batch {
    Quad q[BATCH_TILES][WORDS];
    Grid grids[RUNS];
};

DEVICE void load_batch(const Args& a, const Share& s, int batch, Batch& to) {
    int expert = s.expert;
    if (FORM == SUMMED) {
        expert = expert_of(a, route_of(a, s, batch));
        batch %= batches_of(a);
    }
    const u64 stack = FORM == PLAIN || expert < 0 ? 0 : expert;  // what counts nothing may be anything
    const int lane = threadIdx.x % 32, g = lane / 4, k_tiles = a.K / 16, first = batch * BATCH_TILES;
    const u8* weights = a.weights + ((stack * k_tiles + first) * a.N64 + s.tile) * TILE_BYTES + lane * 16 * WORDS;
    auto load = [&](int kt) {
#pragma unroll
        for (int h = 0; h < WORDS; ++h) to.q[kt][h] = load_once(reinterpret_cast<const Quad*>(weights + 16 * h));
    };
    const u64 step = u64(a.N64) * TILE_BYTES;
    const int left = k_tiles - first;
#pragma unroll
    for (int kt = 0; kt < BATCH_TILES; ++kt) {
        load(kt);
        if (kt + 1 < left) weights += step;  // behind the last one x is 0
    }
#pragma unroll
    for (int run = 0; run < RUNS; ++run) {
        int group = GROUPED ? (first + run * RUN) / (GROUPED ? GROUP_TILES : 1) : 0;
        if (group >= a.groups) group = a.groups - 1;
        const u64 row = (stack * a.groups + group) * a.N64 + s.tile;
        Grid& grid = to.grids[run];
        if (GROUPED) {
            grid.scales = load_early(reinterpret_cast<const Quad*>(a.scales + row * 128 + g * 16));
        } else {
            const u16* pairs = reinterpret_cast<const u16*>(a.scales + row * 128) + g / 2 * 8 + g % 2;
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                const u16* pair = pairs + w / 2 * 32 + w % 2 * 4;
                grid.scales.v[w] = load_early(pair) | u32(load_early(pair + 2)) << 16;
            }
        }
#pragma unroll
        for (int i = 0; i < BITS / 4; ++i)
            grid.zeros[i] = !ASYM ? 0 : load_early(reinterpret_cast<const u32*>(a.zeros + row * 8 * BITS + g * BITS) + i);
    }
}

// This number in a register: an instruction has room for one constant, and the compiler would write it anew
// for each. Of threadIdx.z it does not know that it is 0.
DEVICE u32 in_register(u32 constant) { return constant + threadIdx.z; }

// x: of the lane, see x_of_lane. x_sums: of the runs of the batch, for the tokens of this lane (2 c, 2 c + 1), the
// next run a.M further. factor: of the route; 0 where it counts nothing, whatever x is.
DEVICE void multiply(const Args& a, const Batch& batch, u32 nibbles, u32 x, const float* (&x_sums)[NT][2], float factor,
                     float (&sums)[4][NT][4]) {
#pragma unroll
    for (int run = 0; run < RUNS; ++run) {
        const Grid& grid = batch.grids[run];
        float part[4][NT][4], first[ASYM ? 4 : 1][NT][4];  // blocks of outputs share a zero point where symmetric
#pragma unroll
        for (int t = 0; t < NT; ++t)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float x_sum = x_sums[t][i][run * a.M];
#pragma unroll
                for (int w = 0; w < (ASYM ? 4 : 1); ++w)
#pragma unroll
                    for (int r = 0; r < 2; ++r) first[w][t][2 * r + i] = -raw_zero(grid.zeros, w, r) * x_sum;
            }
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
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                u32 registers[4];
                raw(registers, &batch.q[kt][w * WORDS / 4].v[w * WORDS % 4], nibbles);
#pragma unroll
                for (int t = 0; t < NT; ++t) {
                    if (j == 0)
                        mma(part[w][t], registers, b[t][0], b[t][1], first[ASYM ? w : 0][t]);
                    else
                        mma(part[w][t], registers, b[t][0], b[t][1]);
                }
            }
        }
        if (FORM != PLAIN && factor == 0) continue;
#pragma unroll
        for (int w = 0; w < 4; ++w)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float scale = to_float(u16(grid.scales.v[w] >> (16 * r))) * RAW_UNIT;
                if (FORM == SUMMED) scale *= factor;
#pragma unroll
                for (int t = 0; t < NT; ++t)
#pragma unroll
                    for (int i = 0; i < 2; ++i) sums[w][t][2 * r + i] += scale * part[w][t][2 * r + i];
            }
    }
}

// The part of each row of x that this block multiplies, batches [begin, end), and the sums of its runs: run r of
// row m is behind the rows, at r * M + m. A thread takes 32 k at a time.
DEVICE void load_x(const Args& a, int begin, int end, u8* shared) {
    constexpr int PIECES = 4, EACH = BATCH / 32;  // pieces of 16 bytes; of a batch
    const int of_row = (end - begin) * EACH, stride = of_row * 64 + 16, all = a.M * of_row;
    float* x_sums = reinterpret_cast<float*>(shared + X_AT + a.M * stride);
#pragma unroll 2
    for (int at = threadIdx.x; at < all + int(threadIdx.x % 32); at += THREADS) {  // whole warps
        const int i = at < all ? at : all - 1, row = i / of_row, place = i % of_row;
        int batch = begin + place / EACH, from = row;
        if (FORM == SUMMED) {
            from = row * a.top_k + batch / batches_of(a);
            batch %= batches_of(a);
        }
        const int k = batch * BATCH + place % EACH * 32;
        const u16* source = reinterpret_cast<const u16*>(a.x) + u64(from) * a.x_stride;
        Quad q[PIECES] = {};
#pragma unroll
        for (int p = 0; p < PIECES; ++p) {
            if (k + 8 * p >= a.K) continue;
#if PERM
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int* features = a.perm + k + 8 * p + 2 * j;
                q[p].v[j] = source[features[0]] | u32(source[features[1]]) << 16;
            }
#else
            q[p] = load_early(reinterpret_cast<const Quad*>(source + k + 8 * p));
#endif
        }
        float sum = 0;
#pragma unroll
        for (int p = 0; p < PIECES; ++p) {
            *reinterpret_cast<Quad*>(shared + X_AT + row * stride + place * 64 + p * 16) = q[p];
#pragma unroll
            for (int j = 0; j < 4; ++j) sum += to_float(u16(q[p].v[j])) + to_float(u16(q[p].v[j] >> 16));
        }
#pragma unroll
        for (int lanes = 1; lanes < RUN / 2; lanes *= 2) sum += from_lane_xor(sum, lanes);
        if (place % (RUN / 2) == 0 && at < all) x_sums[place / (RUN / 2) * a.M + row] = sum;
    }
}

// Where a lane finds the rows of x that it names to load_matrices, in the first of the block's batches; and the
// bytes from batch to batch: none for a row that is not there. And where the sums of its tokens are.
DEVICE u32 x_of_lane(const Args& a, const Share& s, int batches, const u8* shared, u32& step,
                     const float* (&x_sums)[NT][2]) {
    const int lane = threadIdx.x % 32, matrix = lane / 8;
    const int token = lane % 8 + (NT == 1 ? 0 : matrix / 2 * 8), piece = NT == 1 ? matrix : matrix % 2;
    const bool valid = FORM == PLAIN ? token < a.M : token == 0;
    const int row = FORM == PLAIN ? token : s.row;
    step = valid ? 2 * BATCH : 0;
    const float* sums = reinterpret_cast<const float*>(shared + X_AT + a.M * (batches * 2 * BATCH + 16));
#pragma unroll
    for (int t = 0; t < NT; ++t)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int mine = t * 8 + lane % 4 * 2 + i;
            x_sums[t][i] = sums + (FORM == PLAIN && mine < a.M ? mine : s.row);
        }
    return shared_address(shared) + piece * 16 + (valid ? X_AT + row * (batches * 2 * BATCH + 16) : 0);
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

// What a slot stands for, of a block whose first unit is `first`.
DEVICE Share share_of(const Args& a, int first, int slot) {
    Share s;
    const int unit = first + slot / HALVES, half = slot % HALVES, tiles = a.N64 / HALVES;
    if (unit >= a.units) return {};
    const int row = unit / tiles;
    s.tile = unit % tiles + half * tiles;
    s.row = FORM == PLAIN ? 0 : FORM == GATED ? row / a.top_k : row;
    s.expert = FORM == GATED ? expert_of(a, row) : 0;
    return s;
}

// slot: of 64 outputs among those of the block; part: of its warps.
DEVICE void write_sums(const Args& a, int slot, int part, const float (&sums)[4][NT][4], u8* shared) {
    const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4, rows = FORM == PLAIN ? a.M : 1;
    float* to = reinterpret_cast<float*>(shared + a.sums_at) + (slot * a.warps_k + part) * rows * SUM_STRIDE + g;
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
        cluster_wait();  // the others have begun
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

KERNEL(THREADS, 1) marlin_decode(const Args a) {
    SHARED_MEMORY(shared);
    const u32 blocks = cluster_size(), rank = cluster_rank();
    if (blocks > 1) cluster_arrive();
    // What is read before the wait: weights; SUMMED: routes, which were complete before the kernel before began.
    if (FORM == GATED) wait_for_kernels_before();
    let_next_kernel_start();
    for (int i = threadIdx.x; i < X_AT / 4; i += THREADS) reinterpret_cast<u32*>(shared)[i] = 0;
    const int cluster = blockIdx.x / blocks, clusters = gridDim.x / blocks, warp = threadIdx.x / 32;
    const int first = u64(a.units) * cluster / clusters, end = u64(a.units) * (cluster + 1) / clusters;
    const int batches = batches_of(a) * (FORM == SUMMED ? a.top_k : 1);
    const int begin_k = batches * rank / blocks, end_k = batches * (rank + 1) / blocks;
    const u32 nibbles = in_register(0x000f000fu);

    const int units = end - first, slots = units * HALVES, groups = WARPS / a.warps_k;
    const int part = warp % a.warps_k;
    const int begin = begin_k + (end_k - begin_k) * part / a.warps_k;
    const int stop = begin_k + (end_k - begin_k) * (part + 1) / a.warps_k;

    // What is loaded last, and what comes next: `count` batches in all.
    int slot = warp / a.warps_k, next_slot = slot, next = begin;
    int count = slot < groups && slot < slots ? (slots - slot + groups - 1) / groups * (stop - begin) : 0;
    Share s = share_of(a, first, slot), next_share = s;
    Batch loaded;
    auto load = [&] {
        load_batch(a, next_share, next, loaded);
        if (++next == stop) {
            next = begin;
            next_slot += groups;
            next_share = share_of(a, first, next_slot);
        }
    };
    if (count) load();
    if (FORM != GATED) wait_for_kernels_before();
    load_x(a, begin_k, end_k, shared);
    __syncthreads();

    float sums[4][NT][4] = {};
    const float* x_sums[NT][2];
    u32 step, x = x_of_lane(a, s, end_k - begin_k, shared, step, x_sums);
    auto go_on = [&](int batches) {
        x += batches * step;
#pragma unroll
        for (int t = 0; t < NT; ++t)
#pragma unroll
            for (int i = 0; i < 2; ++i) x_sums[t][i] += batches * RUNS * a.M;
    };
    go_on(begin - begin_k);
#pragma unroll 1
    for (int batch = begin; count > 0; --count) {
        float factor = s.expert >= 0;
        if (FORM == SUMMED) {
            const int route = route_of(a, s, batch);
            factor = expert_of(a, route) < 0 ? 0 : factor_of(a, route);
        }
        const Batch now = loaded;
        if (count > 1) load();
        multiply(a, now, nibbles, x, x_sums, factor, sums);
        go_on(1);
        if (++batch < stop) continue;
        write_sums(a, slot, part, sums, shared);
#pragma unroll
        for (int w = 0; w < 4; ++w)
#pragma unroll
            for (int t = 0; t < NT; ++t)
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[w][t][i] = 0;
        slot += groups;
        s = share_of(a, first, slot);
        batch = begin;
        x = x_of_lane(a, s, end_k - begin_k, shared, step, x_sums);
        go_on(begin - begin_k);
    }
    finish(a, first, units, shared);
}
