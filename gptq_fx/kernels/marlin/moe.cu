// What a mixture of experts needs around its two GEMMs. Chosen when compiled: BF16.

struct AlignArgs {
    const void* index;  // [count] the expert of each row; or [num_experts] where each expert's rows end
    int* num_blocks;    // [1]
    int* experts;       // [most blocks]: of each block of rows
    int* rows;          // [most blocks, tokens]: which rows, -1: none
    int count, num_experts, tokens, wide, ends;
};

DEVICE int index_at(const AlignArgs& a, int i) {
    return a.wide ? int(static_cast<const long long*>(a.index)[i]) : static_cast<const int*>(a.index)[i];
}
DEVICE int smaller(int a, int b) { return a < b ? a : b; }

// One block of 1024 threads, thread e for expert e. The rows of an expert keep their order: the place of a row
// decides which tile it is in, a tile decides where its sum is split, and so the last bit of the result.
KERNEL(1024, 1) marlin_align(const AlignArgs a) {
    let_next_kernel_start();
    wait_for_kernels_before();
    SHARED_MEMORY(shared);
    int* counts = reinterpret_cast<int*>(shared);
    int* last = counts + 1024;  // block behind the last one of an expert
    int* start = last + 1024;   // first row of an expert; then, how many rows it has found
    int* round = start + 1024;  // the experts of 1024 rows at a time
    const int t = threadIdx.x;
    counts[t] = start[t] = 0;
    __syncthreads();
    if (a.ends) {
        if (t < a.num_experts) {
            const int begin = t ? smaller(index_at(a, t - 1), a.count) : 0;
            const int end = smaller(index_at(a, t), a.count);
            counts[t] = end > begin ? end - begin : 0;
            start[t] = begin;
        }
    } else {
        for (int i = t; i < a.count; i += 1024) {
            const int e = index_at(a, i);
            if (e >= 0 && e < a.num_experts) atomicAdd(counts + e, 1);
        }
    }
    __syncthreads();
    const int blocks = (counts[t] + a.tokens - 1) / a.tokens;
    last[t] = blocks;
    __syncthreads();
    for (int d = 1; d < a.num_experts; d *= 2) {
        const int before = t >= d ? last[t - d] : 0;
        __syncthreads();
        last[t] += before;
        __syncthreads();
    }
    const int total = last[a.num_experts - 1];
    if (t == 0) *a.num_blocks = total;
    if (t < a.num_experts)
        for (int b = last[t] - blocks; b < last[t]; ++b) a.experts[b] = t;
    __syncthreads();
    for (int i = t; i < total * a.tokens; i += 1024) {
        int row = -1;
        if (a.ends) {
            const int e = a.experts[i / a.tokens];
            const int at = i - (e ? last[e - 1] : 0) * a.tokens;
            if (at < counts[e]) row = start[e] + at;
        }
        a.rows[i] = row;
    }
    if (a.ends) return;
    __syncthreads();
    for (int base = 0; base < a.count; base += 1024) {
        const int i = base + t, warp = t / 32;
        int e = i < a.count ? index_at(a, i) : -1;
        if (e >= a.num_experts) e = -1;
        round[t] = e;
        __syncthreads();
        int before = 0, same = 0;  // of the rows of this warp, those of the same expert
        for (int lane = 0; lane < 32; ++lane) {
            const int is_same = round[warp * 32 + lane] == e;
            before += is_same && lane < t % 32;
            same += is_same;
        }
        const int warps = smaller(32, (a.count - base + 31) / 32);
        for (int w = 0; w < warps; ++w) {
            if (w == warp && e >= 0) a.rows[(e ? last[e - 1] : 0) * a.tokens + start[e] + before] = i;
            __syncthreads();
            if (w == warp && e >= 0 && before == 0) start[e] += same;
            __syncthreads();
        }
    }
}

struct ActivateArgs {
    const u16* x;  // [rows, 2 I]: gate and up in halves, or (gpt_oss) in turn
    u16* out;      // [rows, I]
    int rows, I, kind;
};

// Two outputs a thread.
KERNEL(256, 1) marlin_activate(const ActivateArgs a) {
    let_next_kernel_start();
    wait_for_kernels_before();
    const u64 pairs = u64(a.rows) * ((a.I + 1) / 2);
    for (u64 p = u64(blockIdx.x) * 256 + threadIdx.x; p < pairs; p += u64(gridDim.x) * 256) {
        const u64 row = p / ((a.I + 1) / 2);
        const int i = p % ((a.I + 1) / 2) * 2;
        const u16* x = a.x + row * 2 * a.I;
        float v[2] = {0, 0};
        for (int j = 0; j < 2 && i + j < a.I; ++j) {
            const bool turns = a.kind == GPT_OSS;
            const u16 gate = turns ? x[2 * (i + j)] : x[i + j];
            const u16 up = turns ? x[2 * (i + j) + 1] : x[a.I + i + j];
            v[j] = activate(to_float(gate), to_float(up), a.kind);
        }
        const u32 packed = from_floats(v[0], v[1]);
        u16* to = a.out + row * a.I + i;
        to[0] = u16(packed);
        if (i + 1 < a.I) to[1] = u16(packed >> 16);
    }
}

struct CombineArgs {
    const u16* x;         // [T * k, H]
    const void* ids;      // [T, k]
    const void* weights;  // [T, k]
    u16* out;             // [T, H]
    int T, H, k, num_experts, wide, wide_weights;
};

// out[t] = sum over j of weights[t, j] * x[t * k + j], in the order of j. Two outputs a thread.
KERNEL(256, 1) marlin_combine(const CombineArgs a) {
    let_next_kernel_start();
    wait_for_kernels_before();
    const int half = (a.H + 1) / 2;
    const u64 pairs = u64(a.T) * half;
    for (u64 p = u64(blockIdx.x) * 256 + threadIdx.x; p < pairs; p += u64(gridDim.x) * 256) {
        const u64 t = p / half;
        const int h = p % half * 2;
        float v[2] = {0, 0};
#pragma unroll 4
        for (int j = 0; j < a.k; ++j) {
            const u64 at = t * a.k + j;
            if (expert_at(a.ids, a.wide, at, a.num_experts) < 0) continue;
            const float s = a.wide_weights ? static_cast<const float*>(a.weights)[at]
                                           : to_float(static_cast<const u16*>(a.weights)[at]);
            const u16* x = a.x + at * a.H + h;
            v[0] += s * to_float(x[0]);
            if (h + 1 < a.H) v[1] += s * to_float(x[1]);
        }
        const u32 packed = from_floats(v[0], v[1]);
        u16* to = a.out + t * a.H + h;
        to[0] = u16(packed);
        if (h + 1 < a.H) to[1] = u16(packed >> 16);
    }
}
