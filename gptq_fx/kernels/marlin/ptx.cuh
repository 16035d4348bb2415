// The instructions that C++ has no word for. tests/kernels/marlin_host.h gives each a meaning on the CPU.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef unsigned long long u64;

#define SHARED_MEMORY(name) extern __shared__ __align__(128) u8 name[]
#define DEVICE __device__ __forceinline__
#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)

struct __align__(16) Quad { u32 v[4]; };
struct __align__(16) Float4 { float v[4]; };

DEVICE u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// 16 bytes from global to shared memory, past L1; zeros where `valid` is false.
DEVICE void copy_async(u32 to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
DEVICE void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8x8 matrices of 16-bit values; lane l names row l % 8 of matrix l / 8.
DEVICE void load_matrices(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

#if BF16
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#else
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#endif
// d[16, 8] = a[16, 16] b[16, 8] + c
DEVICE void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4]) {
    asm volatile(MMA "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]),
                   "f"(c[3]));
}
DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(MMA "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// a * b + c on two 16-bit floats, rounded once.
DEVICE u32 fma2(u32 a, u32 b, u32 c) {
    u32 d;
#if BF16
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#else
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#endif
    return d;
}

DEVICE float to_float(u16 x) {
#if BF16
    return __uint_as_float(u32(x) << 16);
#else
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x));
    return f;
#endif
}

DEVICE u32 from_floats(float low, float high) {
    u32 d;
#if BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
#endif
    return d;
}

// x of lane (this lane ^ mask).
DEVICE float from_lane_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// Bytes of `a`, the selector's nibbles naming each.
template <u32 SELECTOR>
DEVICE u32 bytes(u32 a) {
    u32 d;
    asm("prmt.b32 %0, %1, %1, %2;" : "=r"(d) : "r"(a), "n"(SELECTOR));
    return d;
}

// Loads that stay where they are written, before the arithmetic that hides them.
DEVICE u16 load_early(const u16* p) {
    u16 v;
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(v) : "l"(p));
    return v;
}
DEVICE Quad load_early(const Quad* p) {
    Quad q;
    asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(q.v[0]), "=r"(q.v[1]), "=r"(q.v[2]), "=r"(q.v[3])
                 : "l"(p));
    return q;
}

DEVICE u32 load_early(const u32* p) {
    u32 v;
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}
// What is read once in a launch, and never written.
DEVICE Quad load_once(const Quad* p) {
    Quad q;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(q.v[0]), "=r"(q.v[1]), "=r"(q.v[2]), "=r"(q.v[3])
                 : "l"(p));
    return q;
}

// What another block wrote: past L1.
DEVICE Float4 load_shared_between_blocks(const float* p) {
    Float4 f;
    asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(f.v[0]), "=f"(f.v[1]), "=f"(f.v[2]), "=f"(f.v[3])
                 : "l"(p)
                 : "memory");
    return f;
}

// Where the launch allows it, the next kernel's blocks take places as they become free, instead of when the
// last one does. What the kernels before have written may be read behind `wait_for_kernels_before` only.
DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DEVICE void wait_for_kernels_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#ifdef WGMMA_TOKENS  // of sm_90a
// Of a warpgroup: what one gives up another may take.
template <int REGISTERS>
DEVICE void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }
template <int REGISTERS>
DEVICE void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }
// As __syncthreads, among so many threads that name the same barrier.
template <int BARRIER, int THREADS_OF_IT>
DEVICE void sync_some() { asm volatile("bar.sync %0, %1;" ::"n"(BARRIER), "n"(THREADS_OF_IT) : "memory"); }
// A barrier in shared memory: each time that `count` have arrived, a phase ends. barrier_wait: until that of this
// parity has, the first one having 0.
DEVICE void barrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
DEVICE void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// As soon as the copies are there that this thread has started.
DEVICE void barrier_arrive_after_copies(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
DEVICE void barrier_wait(u32 barrier, u32 parity) {
    asm volatile("{ .reg .pred done;"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;"
                 "@!done bra again; }" ::"r"(barrier), "r"(parity)
                 : "memory");
}
// Four 8x8 matrices of 16-bit values, as mma leaves them, with rows and columns exchanged; lane l names row l % 8 of
// what matrix l / 8 becomes.
DEVICE void store_matrices_turned(const u32 (&r)[4], u32 address) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}
// Makes what this thread has stored or copied visible to wgmma.
DEVICE void show_to_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Operand b: rows of 64 k (128 bytes, their pieces of 16 swizzled by row % 8), eight in 1024 bytes.
DEVICE u64 wgmma_matrix(u32 address) {
    return u64(address & 0x3ffff) >> 4 | u64(1) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;
}
// The operand so many bytes behind.
DEVICE u64 wgmma_further(u64 matrix, u32 bytes) { return matrix + (bytes >> 4); }
// c[64, WGMMA_TOKENS] = a[64, 16] b[16, WGMMA_TOKENS] (+ c) by a warpgroup; done when it is waited for.
DEVICE void wgmma(float (&c)[WGMMA_TOKENS / 2], const u32 (&a)[4], u64 b, bool add) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, " WGMMA_ADD ", 0;"
                 "wgmma.mma_async.sync.aligned.m64n" WGMMA_N "k16.f32."
#if BF16
                 "bf16.bf16 "
#else
                 "f16.f16 "
#endif
                 "{" WGMMA_C "}, {" WGMMA_A "}, " WGMMA_B ", p, 1, 1, 0; }"
                 : WGMMA_OUT(c)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));
}

#endif

#if __CUDA_ARCH__ >= 900
DEVICE u32 cluster_size() {
    u32 n;
    asm volatile("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(n));
    return n;
}
DEVICE u32 cluster_rank() {
    u32 n;
    asm volatile("mov.u32 %0, %%cluster_ctaid.x;" : "=r"(n));
    return n;
}
// All threads of the cluster have come to `arrive`, and what they stored before it is there, behind `wait`.
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.aligned;" ::: "memory"); }
// For threads that have only read.
DEVICE void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
// Into the shared memory of a block of the cluster, where that of this block has `address`.
DEVICE void store_in_cluster(u32 address, u32 rank, const Float4& f) {
    asm volatile("{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;"
                 "st.shared::cluster.v4.f32 [there], {%2,%3,%4,%5}; }" ::"r"(address),
                 "r"(rank), "f"(f.v[0]), "f"(f.v[1]), "f"(f.v[2]), "f"(f.v[3])
                 : "memory");
}
// From the shared memory of a block of the cluster, where that of this block has `address`.
DEVICE Float4 load_from_cluster(u32 address, u32 rank) {
    Float4 f;
    asm volatile("{ .reg .b32 there; mapa.shared::cluster.u32 there, %4, %5;"
                 "ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [there]; }"
                 : "=f"(f.v[0]), "=f"(f.v[1]), "=f"(f.v[2]), "=f"(f.v[3])
                 : "r"(address), "r"(rank)
                 : "memory");
    return f;
}
#endif
