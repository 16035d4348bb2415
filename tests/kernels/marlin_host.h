// Runs the CUDA sources of gptq_fx/kernels/marlin on the CPU, in place of ptx.cuh: each thread of a block is a
// fiber, an instruction of a warp waits for its 32 lanes, __syncthreads for all. The blocks of a cluster run
// together. Warps run in a random order between two barriers. An asynchronous copy poisons its target when it
// starts and fills it when it is waited for, or, where a barrier is to be told, at a random time: so that reading
// too early and overwriting too early both show.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <random>
#include <vector>

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef unsigned long long u64;

#define __align__(n) alignas(n)
#define __constant__
#define __shared__
#define DEVICE static inline
#define KERNEL(threads, blocks) static void
#define SHARED_MEMORY(name) u8* name = host::shared
#define threadIdx host::thread
#define blockIdx host::block
#define gridDim host::grid
#define blockDim host::dim

struct __align__(16) Quad { u32 v[4]; };
struct __align__(16) Float4 { float v[4]; };

namespace host {
struct Index { u32 x = 0, y = 0, z = 0; };
enum State { READY, AT_WARP, AT_BLOCK, AT_SOME, AT_BARRIER, AT_CLUSTER, DONE };
struct Copy { u32 to; const void* from; bool valid; };
struct Barrier { u32 count = 0, left = 0, phase = 0; };
struct Told { u32 fiber, barrier; std::vector<Copy> copies; };  // a barrier of copies on their way
struct Fiber {
    ucontext_t context;  // only to start it: swapcontext asks the kernel for the signal mask each time
    jmp_buf here;
    bool started = false;
    State state = READY;
    int arrived = 0, waited = 0;  // at barriers of the cluster
    u32 barrier = 0, threads = 0, parity = 0;  // of sync_some, or in shared memory
    std::vector<char> stack;
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
    std::function<void()> whole_warp;  // set by lane 0: what the instruction does
    const void* operand = nullptr;
    void* result = nullptr;
};
static Index thread, block, grid, dim;
static u8* shared;    // of the block that runs
static u8* memory;    // of all blocks of its cluster
static size_t memory_each;
static u32 in_cluster, first_block;
static std::vector<Fiber> fibers;  // of all blocks of a cluster
static u32 current;
static Fiber& self() { return fibers[current]; }
static ucontext_t scheduler;
static jmp_buf scheduler_here;
static std::function<void()> body;
static std::map<std::pair<u32, u32>, Barrier> barriers;  // by block of the cluster, and address
static std::deque<Told> on_their_way;

static Barrier& barrier_at(u32 fiber, u32 address) { return barriers[{fiber / dim.x, address}]; }
static void arrive(Barrier& b) {
    if (--b.left == 0) b.left = b.count, ++b.phase;
}

static __attribute__((noinline)) void leave(State state) {
    Fiber& f = self();
    f.state = state;
    if (_setjmp(f.here) == 0) _longjmp(scheduler_here, 1);
}
static void enter() {
    body();
    self().state = DONE;
    _longjmp(scheduler_here, 1);
}
static void be(u32 fiber) {
    current = fiber;
    thread.x = fiber % dim.x;
    block.x = first_block + fiber / dim.x;
    shared = memory + fiber / dim.x * memory_each;
}
static void fill(const std::vector<Copy>& copies) {
    for (const Copy& c : copies) {
        if (c.valid)
            std::memcpy(shared + c.to, c.from, 16);
        else
            std::memset(shared + c.to, 0, 16);
    }
}
// Copies of one thread arrive.
static void deliver(u32 nth) {
    const Told told = on_their_way[nth];
    on_their_way.erase(on_their_way.begin() + nth);
    be(told.fiber);
    fill(told.copies);
    arrive(barrier_at(told.fiber, told.barrier));
}
static void resume(u32 t) {
    Fiber& f = fibers[t];
    be(t);
    if (_setjmp(scheduler_here)) return;
    if (f.started) _longjmp(f.here, 1);
    f.started = true;
    swapcontext(&scheduler, &f.context);
}
template <class Operation>
static void with_warp(const void* operand, void* result, Operation operation) {
    Fiber& f = self();
    f.operand = operand;
    f.result = result;
    f.whole_warp = operation;
    leave(AT_WARP);
}
static void fail(const char* what) {
    std::fprintf(stderr, "block %u thread %u: %s\n", block.x, thread.x, what);
    std::abort();
}

static void run_cluster(u32 seed) {
    std::mt19937 random(seed);
    const u32 threads = dim.x, all = threads * in_cluster, warps = all / 32;
    if (fibers.size() != all) fibers.resize(all);  // stacks are kept: fresh memory costs more than what runs on it
    for (Fiber& f : fibers) {
        std::vector<char> stack = std::move(f.stack);
        f = Fiber();
        f.stack = std::move(stack);
        f.stack.resize(128 * 1024);
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.data();
        f.context.uc_stack.ss_size = f.stack.size();
        f.context.uc_link = &scheduler;
        makecontext(&f.context, enter, 0);
    }
    barriers.clear();
    on_their_way.clear();
    // Threads that wait for a barrier in shared memory whose phase has ended.
    auto pass_barriers = [&] {
        for (u32 t = 0; t < all; ++t) {
            Fiber& f = fibers[t];
            if (f.state == AT_BARRIER && barrier_at(t, f.barrier).phase % 2 != f.parity) f.state = READY;
        }
    };
    // True where any went on: the threads of a block that are all there, or those that all others let pass.
    auto open_barriers = [&] {
        bool opened = false;
        int fewest = fibers[0].arrived;
        for (Fiber& f : fibers) fewest = std::min(fewest, f.state == DONE ? fewest : f.arrived);
        for (u32 b = 0; b < in_cluster; ++b) {
            u32 there = 0;
            std::map<u32, u32> some;
            for (u32 t = 0; t < threads; ++t) {
                const Fiber& f = fibers[b * threads + t];
                there += f.state == AT_BLOCK;
                some[f.barrier] += f.state == AT_SOME;
            }
            for (u32 t = 0; t < threads; ++t) {
                Fiber& f = fibers[b * threads + t];
                if ((f.state == AT_BLOCK && there == threads) || (f.state == AT_CLUSTER && fewest >= f.waited) ||
                    (f.state == AT_SOME && some[f.barrier] == f.threads)) {
                    f.state = READY;
                    opened = true;
                }
            }
        }
        return opened;
    };
    for (;;) {
        if (!on_their_way.empty() && random() % 8 == 0) deliver(random() % on_their_way.size());
        pass_barriers();
        std::vector<u32> runnable;
        u32 done = 0;
        for (u32 w = 0; w < warps; ++w) {
            bool ready = false;
            for (u32 l = 0; l < 32; ++l) {
                const State s = fibers[32 * w + l].state;
                ready |= s == READY;
                done += s == DONE;
            }
            if (ready) runnable.push_back(w);
        }
        if (done == all) return;
        if (runnable.empty()) {
            if (open_barriers()) continue;
            if (on_their_way.empty()) fail("threads wait for each other");
            deliver(random() % on_their_way.size());
            continue;
        }
        const u32 w = runnable[random() % runnable.size()];
        for (u32 l = 0; l < 32; ++l) {
            if (fibers[32 * w + l].state == READY) resume(32 * w + l);
        }
        u32 at = 0, goes_on = 0;
        for (u32 l = 0; l < 32; ++l) {
            at += fibers[32 * w + l].state == AT_WARP;
            goes_on += fibers[32 * w + l].state == READY;
        }
        if (at == 0 || goes_on) continue;
        be(32 * w);
        if (at != 32) fail("a warp is not whole");
        fibers[32 * w].whole_warp();
        for (u32 l = 0; l < 32; ++l) fibers[32 * w + l].state = READY;
    }
}

static void launch(std::function<void()> kernel, u32 blocks, u32 rows, u32 threads, u32 shared_bytes, u32 cluster,
                   int order) {
    body = kernel;
    grid.x = blocks;
    grid.y = rows;
    dim.x = threads;
    in_cluster = cluster;
    memory_each = (shared_bytes + 1023) / 1024 * 1024;
    std::vector<u8> room(memory_each * cluster + 1024);
    memory = room.data() + (1024 - reinterpret_cast<uintptr_t>(room.data()) % 1024) % 1024;
    std::vector<u32> clusters(blocks / cluster);
    for (u32 c = 0; c < clusters.size(); ++c) clusters[c] = order == 0 ? c : clusters.size() - 1 - c;
    if (order > 1) std::shuffle(clusters.begin(), clusters.end(), std::mt19937(order));
    for (u32 c : clusters) {
        first_block = c * cluster;
        for (block.y = 0; block.y < rows; ++block.y) {
            std::memset(memory, 0xff, memory_each * cluster);  // NaN
            run_cluster(c + order);
        }
    }
}

static float half_to_float(u16 x) {
#if BF16
    u32 bits = u32(x) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
#else
    _Float16 h;
    std::memcpy(&h, &x, 2);
    return h;
#endif
}
static u16 float_to_half(double d) {
#if BF16
    float f = d;
    u32 bits;
    std::memcpy(&bits, &f, 4);
    if (std::isnan(f)) return 0x7fff;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
#else
    _Float16 h = d;
    u16 x;
    std::memcpy(&x, &h, 2);
    return x;
#endif
}
}  // namespace host

static inline void __syncthreads() { host::leave(host::AT_BLOCK); }
static inline void __threadfence() {}
static inline u32 __umulhi(u32 a, u32 b) { return u64(a) * b >> 32; }
static inline void __syncwarp() { host::with_warp(nullptr, nullptr, [] {}); }
static inline int atomicAdd(int* p, int v) {
    const int before = *p;
    *p += v;
    return before;
}

DEVICE u32 shared_address(const void* p) { return static_cast<const u8*>(p) - host::shared; }

DEVICE void copy_async(u32 to, const void* from, bool valid) {
    if (to % 16 || reinterpret_cast<uintptr_t>(from) % 16) host::fail("a copy is not aligned");
    std::memset(host::shared + to, 0xff, 16);
    host::self().open.push_back({to, from, valid});
}
DEVICE void copy_commit() {
    host::Fiber& f = host::self();
    f.groups.push_back(f.open);
    f.open.clear();
}
template <int PENDING>
static void copy_wait() {
    host::Fiber& f = host::self();
    while (int(f.groups.size()) > PENDING) {
        host::fill(f.groups.front());
        f.groups.pop_front();
    }
}

DEVICE void load_matrices(u32 (&r)[4], u32 address) {
    host::with_warp(&address, r, [] {
        host::Fiber* warp = &host::self();
        for (int lane = 0; lane < 32; ++lane)
            for (int m = 0; m < 4; ++m) {
                const u32 row = *static_cast<const u32*>(warp[8 * m + lane / 4].operand);
                if (row % 16) host::fail("a row of a matrix is not aligned");
                std::memcpy(static_cast<u32*>(warp[lane].result) + m, host::shared + row + lane % 4 * 4, 4);
            }
    });
}

DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    const u32 operand[6] = {a[0], a[1], a[2], a[3], b0, b1};
    host::with_warp(operand, c, [] {
        host::Fiber* warp = &host::self();
        float A[16][16], B[16][8];
        for (int lane = 0; lane < 32; ++lane) {
            const u32* r = static_cast<const u32*>(warp[lane].operand);
            const int g = lane / 4, q = lane % 4 * 2;
            for (int e = 0; e < 2; ++e) {
                for (int i = 0; i < 4; ++i)
                    A[g + i % 2 * 8][q + e + i / 2 * 8] = host::half_to_float(r[i] >> (16 * e));
                for (int i = 0; i < 2; ++i) B[q + e + 8 * i][g] = host::half_to_float(r[4 + i] >> (16 * e));
            }
        }
        for (int lane = 0; lane < 32; ++lane)
            for (int i = 0; i < 4; ++i) {
                float& out = static_cast<float*>(warp[lane].result)[i];
                double sum = out;
                for (int k = 0; k < 16; ++k)
                    sum += double(A[lane / 4 + i / 2 * 8][k]) * B[k][lane % 4 * 2 + i % 2];
                out = sum;
            }
    });
}

DEVICE void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4]) {
    for (int i = 0; i < 4; ++i) d[i] = c[i];
    mma(d, a, b0, b1);
}

DEVICE float from_lane_xor(float x, int mask) {
    struct Operand { float x; int mask; } operand = {x, mask};
    float result;
    host::with_warp(&operand, &result, [] {
        host::Fiber* warp = &host::self();
        for (int lane = 0; lane < 32; ++lane) {
            const int other = lane ^ static_cast<const Operand*>(warp[lane].operand)->mask;
            *static_cast<float*>(warp[lane].result) = static_cast<const Operand*>(warp[other].operand)->x;
        }
    });
    return result;
}

DEVICE u32 fma2(u32 a, u32 b, u32 c) {
    u32 d = 0;
    for (int i = 0; i < 32; i += 16)
        d |= u32(host::float_to_half(double(host::half_to_float(a >> i)) * host::half_to_float(b >> i) +
                                     host::half_to_float(c >> i)))
             << i;
    return d;
}
DEVICE float to_float(u16 x) { return host::half_to_float(x); }
DEVICE u32 from_floats(float low, float high) {
    return host::float_to_half(low) | u32(host::float_to_half(high)) << 16;
}
template <u32 SELECTOR>
static u32 bytes(u32 a) {
    u32 d = 0;
    for (int i = 0; i < 4; ++i) d |= (a >> (8 * (SELECTOR >> (4 * i) & 3)) & 255) << (8 * i);
    return d;
}
DEVICE u16 load_early(const u16* p) { return *p; }
DEVICE u32 load_early(const u32* p) { return *p; }
DEVICE Quad load_early(const Quad* p) { return *p; }
DEVICE Quad load_once(const Quad* p) { return *p; }
DEVICE Float4 load_shared_between_blocks(const float* p) {
    Float4 f;
    std::memcpy(&f, p, 16);
    return f;
}
DEVICE void let_next_kernel_start() {}
DEVICE void wait_for_kernels_before() {}

#ifdef WGMMA_TOKENS
template <int REGISTERS>
static void fewer_registers() {}
template <int REGISTERS>
static void more_registers() {}
template <int BARRIER, int THREADS_OF_IT>
static void sync_some() {
    host::self().barrier = BARRIER;
    host::self().threads = THREADS_OF_IT;
    host::leave(host::AT_SOME);
}
DEVICE void barrier_init(u32 barrier, u32 count) { host::barrier_at(host::current, barrier) = {count, count, 0}; }
DEVICE void barrier_arrive(u32 barrier) { host::arrive(host::barrier_at(host::current, barrier)); }
DEVICE void barrier_arrive_after_copies(u32 barrier) {
    host::on_their_way.push_back({host::current, barrier, host::self().open});
    host::self().open.clear();
}
DEVICE void barrier_wait(u32 barrier, u32 parity) {
    host::self().barrier = barrier;
    host::self().parity = parity;
    host::leave(host::AT_BARRIER);
}
DEVICE void store_matrices_turned(const u32 (&r)[4], u32 address) {
    struct Operand { const u32* r; u32 address; } operand = {r, address};
    host::with_warp(&operand, nullptr, [] {
        host::Fiber* warp = &host::self();
        for (int lane = 0; lane < 32; ++lane)
            for (int m = 0; m < 4; ++m)
                for (int e = 0; e < 2; ++e) {  // (row, column) of matrix m, to row `column` of what it becomes
                    const int row = lane / 4, column = lane % 4 * 2 + e;
                    const u32 to = static_cast<const Operand*>(warp[8 * m + column].operand)->address;
                    if (to % 16) host::fail("a row of a matrix is not aligned");
                    const u16 x = static_cast<const Operand*>(warp[lane].operand)->r[m] >> (16 * e);
                    std::memcpy(host::shared + to + row * 2, &x, 2);
                }
    });
}
DEVICE void show_to_wgmma() {}
DEVICE void wgmma_fence() {}
DEVICE void wgmma_commit() {}
template <int PENDING>
static void wgmma_wait() {}
DEVICE u64 wgmma_matrix(u32 address) { return address; }
DEVICE u64 wgmma_further(u64 matrix, u32 bytes) { return matrix + bytes; }
struct Operand { u32 a[4]; u32 b; bool add; };
// At once, warp by warp: what is read and overwritten between start and wait does not show.
DEVICE void wgmma(float (&c)[WGMMA_TOKENS / 2], const u32 (&a)[4], u64 b, bool add) {
    Operand operand = {{a[0], a[1], a[2], a[3]}, u32(b), add};
    host::with_warp(&operand, c, [] {
        host::Fiber* warp = &host::self();
        float A[16][16];
        for (int lane = 0; lane < 32; ++lane) {
            const Operand& o = *static_cast<const Operand*>(warp[lane].operand);
            const int g = lane / 4, q = lane % 4 * 2;
            for (int e = 0; e < 2; ++e)
                for (int i = 0; i < 4; ++i)
                    A[g + i % 2 * 8][q + e + i / 2 * 8] = host::half_to_float(o.a[i] >> (16 * e));
        }
        const Operand& first = *static_cast<const Operand*>(warp[0].operand);
        auto B = [&](int k, int token) {
            u32 at = first.b + token * 128 + k * 2;
            at ^= (at >> 7 & 7) << 4;
            u16 x;
            std::memcpy(&x, host::shared + at, 2);
            return host::half_to_float(x);
        };
        for (int lane = 0; lane < 32; ++lane)
            for (int i = 0; i < WGMMA_TOKENS / 2; ++i) {
                float& out = static_cast<float*>(warp[lane].result)[i];
                double sum = first.add ? out : 0;
                const int row = lane / 4 + i % 4 / 2 * 8, token = i / 4 * 8 + lane % 4 * 2 + i % 2;
                for (int k = 0; k < 16; ++k) sum += double(A[row][k]) * B(k, token);
                out = sum;
            }
    });
}
#endif

DEVICE u32 cluster_size() { return host::in_cluster; }
DEVICE u32 cluster_rank() { return blockIdx.x - host::first_block; }
DEVICE void cluster_arrive() { ++host::self().arrived; }
DEVICE void cluster_arrive_relaxed() { cluster_arrive(); }
DEVICE void cluster_wait() {
    ++host::self().waited;
    host::leave(host::AT_CLUSTER);
}
DEVICE void store_in_cluster(u32 address, u32 rank, const Float4& f) {
    std::memcpy(host::memory + rank * host::memory_each + address, &f, 16);
}
DEVICE Float4 load_from_cluster(u32 address, u32 rank) {
    Float4 f;
    std::memcpy(&f, host::memory + rank * host::memory_each + address, 16);
    return f;
}
