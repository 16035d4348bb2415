// Of wide.cu: its arguments, its shared memory, and which tiles a block works on.

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

// What a block has to do: whole tiles, those of all blocks side by side, so that what they have in common is in the
// L2; then chunks of k, counted through the tiles that are left.
struct Share {
    u32 tile, whole;  // the next of whole ones, and where these end
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
        if (tile >= tiles) return {};
        return {0, 0, before + chunks * rank / parts, before + chunks * (rank + 1) / parts};
    }
    if (tiles <= gridDim.x) return {blockIdx.x, tiles, 0, 0};
    // At least one tile for each block, so that no more than two share one.
    const u32 whole = (tiles / gridDim.x - (tiles % gridDim.x != 0)) * gridDim.x;
    const u64 all = u64(tiles - whole) * chunks;
    return {blockIdx.x, whole, u32(all * blockIdx.x / gridDim.x), u32(all * (blockIdx.x + 1) / gridDim.x)};
}

DEVICE bool has_more(const Share& s) { return s.tile < s.whole || s.at < s.end; }

DEVICE int expert_of(const Args& a, int row_block) {
    return MOE ? expert_at(a.experts, a.wide_experts, row_block, a.num_experts) : 0;
}

// The row of out that is `token` of the block's rows, or -1.
DEVICE int row_of(const Args& a, const Place& p, int token) {
    if (MOE) return a.rows[p.row_block * TOKENS + token];
    const int row = p.row_block * TOKENS + token;
    return row < a.M ? row : -1;
}

// Takes the next tile of a share. Tiles that share weights follow each other, eight blocks of rows at a time.
DEVICE Place take_place(const Args& a, Share& s, int row_blocks) {
    constexpr int TOGETHER = 8;
    const int n_tiles = (a.N64 + 3) / 4;
    const u32 chunks = chunks_of_tile(a);
    Place p;
    int tile;
    if (s.tile < s.whole) {
        tile = s.tile, p.begin = 0, p.end = chunks;
        s.tile += gridDim.x;
    } else {
        const u32 nth = s.at / chunks, begin = s.at - nth * chunks, count = s.end - s.at;
        tile = s.whole + nth, p.begin = begin, p.end = count < chunks - begin ? begin + count : chunks;
        s.at += p.end - p.begin;
    }
    const int band = tile / (TOGETHER * n_tiles), left = row_blocks - band * TOGETHER;
    const int rows = left < TOGETHER ? left : TOGETHER, in_band = tile - band * TOGETHER * n_tiles;
    p.n_tile = in_band / rows;
    p.row_block = band * TOGETHER + in_band % rows;
    p.expert = expert_of(a, p.row_block);
    return p;
}
