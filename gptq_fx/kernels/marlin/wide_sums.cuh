// Of wide.cu: from the sums in registers to the outputs.

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
