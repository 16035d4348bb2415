// y[M, N] = x[M, K] W[N, K]^T for many rows of x, on Hopper: as W x^T by wgmma. A tile of weights holds the
// registers of operand a (16 outputs x 16 k); x is operand b, in shared memory.
//
// A block has three warpgroups and 256 outputs. One warpgroup loads, stage by stage; two multiply: warp w of each
// those of the w-th tile of 64, of which one takes the first half, the other the second, by two wgmmas of 16
// outputs a warp. Neither waits for another but at the stages: `full` when one is loaded, `empty` when it has been
// multiplied.
//
// Few tiles: the blocks of a cluster share one, each with its part of K; each adds up a part of the rows, in the
// order of the blocks. Many tiles: each block takes whole ones, then as many chunks of k as the others, through the
// tiles that are left; where two share one, the last to come adds what the other has left in `partials`. The same
// bits each time.
//
// Chosen when compiled: BITS, BF16, ASYM, GROUP_TILES (k tiles in a group; 0: one group), MOE, TOKENS, K_TILES
// (in a stage), STAGES.
// Its parts: wide_tiles.cuh, wide_load.cuh, wide_sums.cuh; here is what multiplies.

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
    while (has_more(share)) {
        const Place p = take_place(a, share, row_blocks);
        const int count = p.end - p.begin;
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
