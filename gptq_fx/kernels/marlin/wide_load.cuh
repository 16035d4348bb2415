// Of wide.cu: what the loaders do.

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
    while (has_more(share)) {
        const Place p = take_place(a, share, row_blocks);
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
