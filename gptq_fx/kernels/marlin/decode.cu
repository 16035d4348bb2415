// y[M, N] = x[M, K] W[N, K]^T for a few rows of x, on GPUs with clusters. As W x^T: a tile of weights (16 k x 64
// outputs) holds the registers of operand a of mma, lane by lane, so that a warp loads them from global memory
// into registers, a batch of k tiles while it multiplies the one before, and the first ones before the kernels
// before have ended. Nothing waits for another warp but for x, at the begin, and for the sum, at the end.
//
// One unit of work is 64 outputs (GATED: 64 of gate and the 64 of up). The blocks of a cluster share its units,
// each with its batches of k; in a block, groups of warps_k warps take unit by unit, each warp its part of those
// batches. Sums go to the shared memory of the block that writes those outputs, which adds them up in the order
// of the warps and blocks: the same bits each time.
//
// Codes are multiplied as `raw` numbers, cheap to make; the sum over a group begins with what is too much then:
// minus the zero point times the sum of x over the group.
//
// Chosen when compiled: BITS, BF16, ASYM, GROUP_TILES (k tiles in a group; 0: one group), PERM, TOKENS, WARPS,
// BATCH_TILES (k tiles in a batch), and FORM:
//   PLAIN   rows of x [M, K] and one weight.
//   GATED   unit (r, n): row r of the routes, ids[r] its expert, x[r / top_k]; out = activation(gate) * up.
//   SUMMED  unit (t, n): the sum over the routes r of token t of routed[r] * (x[r] W[ids[r]]^T), as one product
//           over the k of all of them. K fills its batches, and x has no gaps.

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
    int M, N, K, N64, x_stride, groups, sums_at, received_at, capacity, staged_at;
    int num_experts, top_k, wide_ids, wide_routed, activation;
    // What each has, the first `more` one more: units of a cluster, batches of a block.
    int units_each, units_more, batches_each, batches_more;
    int warps_k, warp_groups, spread;  // no warp without a batch; spread: warps that load a row of x, as a shift
    u32 by_warps_k, by_rows, by_blocks, by_tiles, by_top_k, by_batches;  // for `divide`
};

// x / d, of which the caller gives 2^32 / d, rounded up; or 0 for 1. x * d is below 2^32.
DEVICE int divide(int x, u32 inverse) { return inverse ? int(__umulhi(u32(x), inverse)) : x; }

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

DEVICE int expert_of(const Args& a, int route) { return expert_at(a.ids, a.wide_ids, route, a.num_experts); }

// Of 64 outputs.
struct Share {
    int tile, row, expert;  // row: of x in shared memory. GATED: expert of the unit
};

// SUMMED: the route that a batch belongs to.
DEVICE int route_of(const Args& a, const Share& s, int batch) { return s.row * a.top_k + divide(batch, a.by_batches); }

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
        batch -= divide(batch, a.by_batches) * (a.K / BATCH);
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

// x: of the lane, see x_of_lane. x_sums: of the runs of the batch, for the tokens of this lane (2 c, 2 c + 1), the
// next run a.M further. factor: of the route; 0 where it counts nothing, whatever x is.
DEVICE void multiply(const Args& a, const Batch& batch, u32 magic, u32 x, const float* (&x_sums)[NT][2], float factor,
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
                raw(registers, &batch.q[kt][w * WORDS / 4].v[w * WORDS % 4], magic);
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

// For what this warp loads of x: (row, piece), 128 pieces of 16 bytes at a time.
template <class Use>
DEVICE void for_each_part(const Args& a, int pieces, Use use) {
    const int warp = threadIdx.x / 32, first = (warp & ((1 << a.spread) - 1)) * 128;
    for (int row = warp >> a.spread; row < a.M; row += WARPS >> a.spread)
        for (int piece = first; piece < pieces; piece += 128 << a.spread) use(row, piece);
}

// The part of each row of x that this block multiplies, `batches` from `begin` on, and the sums of its runs: run r
// of row m is behind the rows, at r * M + m.
DEVICE void load_x(const Args& a, int begin, int batches, u8* shared) {
    constexpr int RUN_LANES = RUN / 2;  // lanes that sum a run, 32 k each
    const int lane = threadIdx.x % 32, pieces = batches * (BATCH / 8), stride = pieces * 16 + 16;
    float* x_sums = reinterpret_cast<float*>(shared + X_AT + a.M * stride);
    const u64 row_stride = u64(a.x_stride) * (FORM == SUMMED ? a.top_k : 1);
#if PERM
    // Whole rows first: gathered from shared memory, they cost a few bank conflicts, from global memory a sector each.
    for (int row = 0; row < a.M; ++row)
        for (int piece = threadIdx.x; piece < a.K / 8; piece += THREADS)
            copy_async(shared_address(shared) + a.staged_at + (row * a.K + piece * 8) * 2,
                       a.x + (row * row_stride + piece * 8) * 2, true);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
#endif
    for_each_part(a, pieces, [&](int row, int piece) {
        u8* to = shared + X_AT + row * stride + piece * 16;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int mine = j * 32 + lane, k = begin * BATCH + (piece + mine) * 8;
            if (piece + mine >= pieces) continue;
            const bool valid = FORM == SUMMED || k < a.K;
#if PERM
            const u16* from = reinterpret_cast<const u16*>(shared + a.staged_at) + row * a.K;
            Quad q = {};
            if (valid)
#pragma unroll
                for (int i = 0; i < 4; ++i) q.v[i] = from[a.perm[k + 2 * i]] | u32(from[a.perm[k + 2 * i + 1]]) << 16;
            *reinterpret_cast<Quad*>(to + mine * 16) = q;
#else
            const u8* from = a.x + (row * row_stride + k) * 2;
            copy_async(shared_address(to + mine * 16), valid ? from : a.x, valid);
#endif
        }
    });
    copy_commit();
    copy_wait<0>();
    __syncwarp();
    for_each_part(a, pieces, [&](int row, int piece) {
        const u8* from = shared + X_AT + row * stride + piece * 16;
        float sum = 0;
        if (piece + 4 * lane < pieces)
#pragma unroll
            for (int j = 0; j < 4; ++j) {  // in an order without bank conflicts
                const Quad q = *reinterpret_cast<const Quad*>(from + (4 * lane + (j + lane / 2) % 4) * 16);
#pragma unroll
                for (int i = 0; i < 4; ++i) sum += to_float(u16(q.v[i])) + to_float(u16(q.v[i] >> 16));
            }
#pragma unroll
        for (int lanes = 1; lanes < RUN_LANES; lanes *= 2) sum += from_lane_xor(sum, lanes);
        if (lane % RUN_LANES == 0 && piece + 4 * lane < pieces) x_sums[(piece / 4 + lane) / RUN_LANES * a.M + row] = sum;
    });
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

DEVICE Float4 add(const Float4& a, const Float4& b) {
    return {a.v[0] + b.v[0], a.v[1] + b.v[1], a.v[2] + b.v[2], a.v[3] + b.v[3]};
}

// What a slot stands for, of a block whose first unit is `first`.
DEVICE Share share_of(const Args& a, int first, int slot) {
    const int unit = first + slot / HALVES, tiles = a.N64 / HALVES;
    if (FORM == PLAIN) return {unit, 0, 0};
    const int row = divide(unit, a.by_tiles), tile = unit - row * tiles + slot % HALVES * tiles;
    if (FORM == SUMMED) return {tile, row, 0};
    return {tile, divide(row, a.by_top_k), expert_of(a, row)};
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

// Add up the warps and the blocks of the cluster, for `units` from `first` on, and write the outputs. A line is 64
// outputs of a row; the blocks of the cluster write them in turn.
DEVICE void finish(const Args& a, int first, int units, u8* shared) {
    const int blocks = cluster_size(), rank = cluster_rank(), rows = FORM == PLAIN ? a.M : 1;
    const int lines = units * rows, place = threadIdx.x % 16;  // of four outputs in a line
    constexpr int STEP = THREADS / 16;
    const float* sums = reinterpret_cast<const float*>(shared + a.sums_at) + place * 4;
    auto row_of = [&](int line, int& unit) {
        unit = FORM == PLAIN ? divide(line, a.by_rows) : line;
        return line - unit * rows;
    };
    auto add_warps = [&](int line, int half) {
        int unit;
        const int row = row_of(line, unit);
        const float* from = sums + ((unit * HALVES + half) * a.warps_k * rows + row) * SUM_STRIDE;
        Float4 f = *reinterpret_cast<const Float4*>(from);
#pragma unroll 4
        for (int w = 1; w < a.warps_k; ++w)
            f = add(f, *reinterpret_cast<const Float4*>(from + w * rows * SUM_STRIDE));
        return f;
    };
    auto write = [&](int line, Float4 (&f)[HALVES]) {
        if (FORM == GATED)
#pragma unroll
            for (int j = 0; j < 4; ++j) f[0].v[j] = activate(f[0].v[j], f[HALVES - 1].v[j], a.activation);
        int unit, row = row_of(line, unit);
        unit += first;
        if (FORM != PLAIN) {
            row = divide(unit, a.by_tiles);
            unit -= row * (a.N64 / HALVES);
        }
        store_four(a.out + u64(row) * (a.N / HALVES), a.bias, a.N / HALVES, unit * 64 + place * 4, f[0]);
    };
    __syncthreads();
    if (blocks == 1) {
        for (int line = threadIdx.x / 16; line < lines; line += STEP) {
            Float4 f[HALVES];
#pragma unroll
            for (int half = 0; half < HALVES; ++half) f[half] = add_warps(line, half);
            write(line, f);
        }
        return;
    }
    const u32 received = shared_address(shared) + a.received_at + place * 16;
    cluster_wait();  // the others have begun
#pragma unroll 2
    for (int line = threadIdx.x / 16; line < lines; line += STEP) {
        const int nth = divide(line, a.by_blocks);
#pragma unroll
        for (int half = 0; half < HALVES; ++half)
            store_in_cluster(received + ((rank * HALVES + half) * a.capacity + nth) * 256, line - nth * blocks,
                             add_warps(line, half));
    }
    __syncwarp();  // halves of a warp have had different numbers of lines
    cluster_arrive();
    cluster_wait();
    for (int nth = threadIdx.x / 16; nth * blocks + rank < lines; nth += STEP) {
        Float4 f[HALVES];
        const Float4* from = reinterpret_cast<const Float4*>(shared + a.received_at) + nth * 16 + place;
#pragma unroll
        for (int half = 0; half < HALVES; ++half) {
            f[half] = from[half * a.capacity * 16];
#pragma unroll 2
            for (int b = 1; b < blocks; ++b) f[half] = add(f[half], from[(b * HALVES + half) * a.capacity * 16]);
        }
        write(nth * blocks + rank, f);
    }
}

KERNEL(THREADS, 1) marlin_decode(const Args a) {
    SHARED_MEMORY(shared);
    const int blocks = cluster_size(), rank = cluster_rank(), cluster = blockIdx.y, warp = threadIdx.x / 32;
    if (blocks > 1) cluster_arrive();
    // What is read before the wait: weights; SUMMED: routes, which were complete before the kernel before began.
    if (FORM == GATED) wait_for_kernels_before();
    let_next_kernel_start();
    auto smaller = [](int x, int y) { return x < y ? x : y; };
    const int first = cluster * a.units_each + smaller(cluster, a.units_more);
    const int units = a.units_each + (cluster < a.units_more), slots = units * HALVES;
    const int begin_k = rank * a.batches_each + smaller(rank, a.batches_more);
    const int batches = a.batches_each + (rank < a.batches_more);
    const int group = divide(warp, a.by_warps_k), part = warp - group * a.warps_k;
    const int begin = begin_k + divide(batches * part, a.by_warps_k);
    const int stop = begin_k + divide(batches * (part + 1), a.by_warps_k);

    // A slot is 64 outputs. What comes next, of what is loaded last:
    int next_slot = group < a.warp_groups && begin < stop ? group : slots, next = begin;
    Share next_share = share_of(a, first, next_slot < slots ? next_slot : 0), s = next_share;
    Batch loaded;
    auto load = [&] {
        load_batch(a, next_share, next, loaded);
        if (++next == stop) {
            next = begin;
            next_slot += a.warp_groups;
            if (next_slot < slots) next_share = share_of(a, first, next_slot);
        }
    };
    int slot = next_slot;
    if (slot < slots) load();
    for (int i = threadIdx.x; i < X_AT / 4; i += THREADS) reinterpret_cast<u32*>(shared)[i] = 0;
    if (FORM != GATED) wait_for_kernels_before();
    load_x(a, begin_k, batches, shared);
    __syncthreads();

    const u32 magic = in_register(RAW_MAGIC);
    float sums[4][NT][4] = {};
    const float* x_sums[NT][2];
    u32 step, x = x_of_lane(a, s, batches, shared, step, x_sums);
    auto go_on = [&](int batches) {
        x += batches * step;
#pragma unroll
        for (int t = 0; t < NT; ++t)
#pragma unroll
            for (int i = 0; i < 2; ++i) x_sums[t][i] += batches * RUNS * a.M;
    };
    go_on(begin - begin_k);
#pragma unroll 1
    for (int batch = begin; slot < slots;) {
        float factor = s.expert >= 0;
        if (FORM == SUMMED) {
            const int route = route_of(a, s, batch);
            factor = expert_of(a, route) < 0 ? 0 : factor_of(a, route);
        }
        const Batch now = loaded;
        if (next_slot < slots) load();
        multiply(a, now, magic, x, x_sums, factor, sums);
        go_on(1);
        if (++batch < stop) continue;
        write_sums(a, slot, part, sums, shared);
        slot += a.warp_groups;
        if (slot >= slots) break;
#pragma unroll
        for (int w = 0; w < 4; ++w)
#pragma unroll
            for (int t = 0; t < NT; ++t)
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[w][t][i] = 0;
        s = share_of(a, first, slot);
        batch = begin;
        x = x_of_lane(a, s, batches, shared, step, x_sums);
        go_on(begin - begin_k);
    }
    finish(a, first, units, shared);
}
