// The device layer: everything that a GPU kernel asks of the machine.
//
// Kernels include this file and no CUDA or torch header. The same sources therefore run on a GPU, where
// nvcc maps the layer to the hardware (below), and on the CPU, where tests/gpu/cuda_on_cpu/host_device.h
// maps it to one thread per CUDA thread. There tests compare them with the reference, and sanitizers
// check them.
//
// Every barrier names its Site. The hardware ignores it; the host layer can leave one site out, which
// proves that the tests notice a missing barrier (tests/gpu/test_cuda_on_cpu.py).
#pragma once

#include <cstdint>

#include "common/scalars.h"

namespace throughtime::device {

// Barriers by what they separate: before | after.
enum class Site {
  kStart,          // shared memory is set up in every block | a block writes to another
  kForwardParts,   // partial products of the warps | their sum
  kForwardStep,    // h of this step in every block | the product of the next step
  kForwardCopy,    // h copied from global to shared memory | the product
  kBackwardGates,  // gradients of the gates in shared memory | the product
  kBackwardStep,   // partial dh in its owner's memory | its sum
  kBackwardParts,  // sums of some sources' partial dh | the sum of all
  kCount
};

using Mbarrier = uint64_t;  // in shared memory

struct alignas(8) Pair {
  float a, b;
};
struct alignas(16) Quad {
  float v[4];
};
struct alignas(16) Words {
  uint32_t v[4];
};

}  // namespace throughtime::device

#if !defined(__CUDACC__)
#include "host_device.h"  // of tests/gpu/cuda_on_cpu
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define TT_DEVICE __device__ __forceinline__
#define TT_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define TT_PARAMS const __grid_constant__
#define TT_UNROLL _Pragma("unroll")
#define TT_DO_NOT_UNROLL _Pragma("unroll 1")

namespace throughtime::device {

// ---- Indices ----
TT_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
TT_DEVICE int threads() { return static_cast<int>(blockDim.x); }
TT_DEVICE int block() { return static_cast<int>(blockIdx.x); }

TT_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

// ---- Barriers ----
TT_DEVICE void block_barrier(Site) { __syncthreads(); }

// Between all threads of the cluster. Makes their earlier writes visible to all of them.
TT_DEVICE void cluster_barrier(Site) {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
#else
  __trap();  // plan() makes clusters for sm_90 and later only
#endif
}

// A barrier in two halves between all threads of co-resident blocks that share *arrivals. The counter
// starts at 0; `all` is the number of blocks times the number of their barriers so far. A store between
// the halves does not delay the other blocks. Release and acquire are cumulative: with the barriers of
// the block they order what all its threads wrote and read, without a fence.
TT_DEVICE void grid_arrive(Site, unsigned* arrivals) {
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrivals) : "memory");
  }
}
TT_DEVICE void grid_wait(Site, const unsigned* arrivals, unsigned all) {
  if (threadIdx.x == 0) {
    unsigned seen;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrivals) : "memory");
    } while (seen < all);
  }
  __syncthreads();
}

// ---- Shared memory of other blocks of the cluster ----
TT_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
// The address of p's counterpart in block `rank` of the cluster.
TT_DEVICE uint32_t map_to_rank(const void* p, int rank) {
  uint32_t remote = 0;
#if __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared_address(p)), "r"(rank));
#endif
  return remote;
}

// An mbarrier counts the bytes that other blocks store in its block's shared memory. Each store also
// signals the receiver's mbarrier, so a reader waits only for the bytes that it needs. Rounds are
// numbered from 0.

// Starts a round of `bytes`. By one thread, when the previous round is complete.
TT_DEVICE void mbarrier_expect(Mbarrier* barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
#endif
}
// Starts round 0. By one thread, before a barrier of the cluster.
TT_DEVICE void mbarrier_init(Mbarrier* barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  mbarrier_expect(barrier, bytes);
#endif
}
// Stores `value` at block `rank`'s counterpart of `to` and signals its counterpart of `barrier`.
TT_DEVICE void store_remote(uint32_t* to, uint32_t value, Mbarrier* barrier, int rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
                   map_to_rank(to, rank)),
               "r"(value), "r"(map_to_rank(barrier, rank))
               : "memory");
#endif
}
TT_DEVICE void store_remote(Pair* to, Pair value, Mbarrier* barrier, int rank) {
#if __CUDA_ARCH__ >= 900
  const uint64_t both =
      static_cast<uint64_t>(__float_as_uint(value.b)) << 32 | __float_as_uint(value.a);
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(
                   map_to_rank(to, rank)),
               "l"(both), "r"(map_to_rank(barrier, rank))
               : "memory");
#endif
}
TT_DEVICE void store_remote(Words* to, Words value, Mbarrier* barrier, int rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(map_to_rank(to, rank)),
      "r"(value.v[0]), "r"(value.v[1]), "r"(value.v[2]), "r"(value.v[3]),
      "r"(map_to_rank(barrier, rank))
      : "memory");
#endif
}
// Waits until all `bytes` of a round have arrived and are visible. Only shared memory is handed over: a
// fence for it alone leaves the L1 cache as it is, which an acquire of the whole cluster empties.
TT_DEVICE void mbarrier_wait(Site, Mbarrier* barrier, uint32_t round, uint32_t /*bytes*/) {
#if __CUDA_ARCH__ >= 900
#if __CUDACC_VER_MAJOR__ >= 13
#define TT_TRY_WAIT "mbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64"
#else
#define TT_TRY_WAIT "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64"
#endif
  uint32_t complete;
  do {
    asm volatile("{\n\t.reg .pred p;\n\t" TT_TRY_WAIT
                 " p, [%1], %2;\n\t"
                 "selp.u32 %0, 1, 0, p;\n\t}"
                 : "=r"(complete)
                 : "r"(shared_address(barrier)), "r"(round & 1)
                 : "memory");
  } while (!complete);
#if __CUDACC_VER_MAJOR__ >= 13
  asm volatile("fence.acquire.sync_restrict::shared::cluster.cluster;" ::: "memory");
#endif
#undef TT_TRY_WAIT
#endif
}

// ---- Global memory ----
// Past the L1 cache: for what another block wrote since the kernel started.
TT_DEVICE Pair load_past_l1(const Pair* p) {
  const float2 v = __ldcg(reinterpret_cast<const float2*>(p));
  return {v.x, v.y};
}
TT_DEVICE Words load_past_l1(const Words* p) {
  const uint4 v = __ldcg(reinterpret_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
}

// Copies to shared memory, past the L1 cache, without waiting; copies_wait() waits for all of this
// thread's.
TT_DEVICE void copy_async(Words* to, const Words* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
               : "memory");
}
TT_DEVICE void copies_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Fetches p into the L2 cache, for a read some steps later.
TT_DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// ---- Warp ----
// Between the lanes: earlier writes to shared memory are visible to all of them.
TT_DEVICE void warp_barrier() { __syncwarp(); }

// Bit l: the value of lane l.
TT_DEVICE uint32_t warp_ballot(bool value) { return __ballot_sync(0xffffffffu, value); }

// An 8 x 8 matrix of 16-bit numbers: lane l holds row l / 4, columns 2 (l % 4) and + 1, before and
// after the transposition.
TT_DEVICE uint32_t transpose_8x8(uint32_t pair) {
  uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

// c += a b on the matrix unit. Numbers of 16 bits: 16 x 8 x 16, in the fragment layout of PTX's
// mma.m16n8k16. float: 16 x 8 x 8, in that of mma.m16n8k8; of a and b it takes the upper 19 bits.
#define TT_MMA(S, kind)                                                                    \
  TT_DEVICE void mma_16x8(S, float* c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, \
                          uint32_t b0, uint32_t b1) {                                      \
    asm("mma.sync.aligned." kind " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"  \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                   \
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                           \
  }
TT_MMA(BFloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
TT_MMA(Float16, "m16n8k16.row.col.f32.f16.f16.f32")
TT_MMA(float, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef TT_MMA

// The nearest number of 11 significant bits, as the matrix unit takes it. Before sm_90, where rounding takes
// three instructions, it is off by up to 0.71 of the last bit: x (1 + 2^-11.5), truncated. Volatile: what
// lies in registers is rounded where it is used, else the compiler would hold it twice.
TT_DEVICE uint32_t to_tf32(float x) {
  uint32_t bits;
#if __CUDA_ARCH__ >= 900
  asm volatile("cvt.rn.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
#else
  asm volatile("{.reg .f32 t; mul.f32 t, %1, 0f3F800B50; and.b32 %0, t, 0xffffe000;}"
               : "=r"(bits)
               : "f"(x));
#endif
  return bits;
}

// The compiler holds the number in a register: it would compute it again at every step.
TT_DEVICE void hold(int& x) { asm volatile("" : "+r"(x)); }

// ---- Numbers ----
TT_DEVICE float to_float(float x) { return x; }
TT_DEVICE float to_float(BFloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
TT_DEVICE float to_float(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }

template <typename S>
TT_DEVICE S from_float(float x);
template <>
TT_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
TT_DEVICE BFloat16 from_float<BFloat16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
TT_DEVICE Float16 from_float<Float16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}

TT_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
TT_DEVICE float from_bits(uint32_t bits) { return __uint_as_float(bits); }
TT_DEVICE bool is_finite(float x) { return isfinite(x); }
TT_DEVICE float exponential(float x) { return expf(x); }
TT_DEVICE float fast_exponential(float x) {  // relative error |x| * 1e-7; below 2^-126: 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
  return y;
}
TT_DEVICE float reciprocal(float x) { return __fdividef(1.0f, x); }
TT_DEVICE float tangent(float x) { return tanhf(x); }
TT_DEVICE float fast_tangent(float x) {  // relative error 2^-11
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace throughtime::device

#endif  // __CUDACC__

namespace throughtime::device {

TT_DEVICE int lane() { return thread() % 32; }
TT_DEVICE int warp() { return thread() / 32; }

template <typename S>
TT_DEVICE uint32_t pack(float low, float high) {
  return static_cast<uint32_t>(from_float<S>(low).bits) |
         static_cast<uint32_t>(from_float<S>(high).bits) << 16;
}
template <typename S>
TT_DEVICE float low_half(uint32_t pair) {
  return to_float(S{static_cast<uint16_t>(pair & 0xffffu)});
}
template <typename S>
TT_DEVICE float high_half(uint32_t pair) {
  return to_float(S{static_cast<uint16_t>(pair >> 16)});
}

// float: exact to rounding. 16 bits: rounding hides the error of the fast exponential and of the
// cancellation near 0. bfloat16 hides the error of the hardware's tanh too, which takes half as long. No
// sigmoid is made from that tanh: the result would be off by 2^-12, which is too much where the sigmoid
// or 1 - sigmoid is small. The reciprocal of more than 2^126 is 0, so all saturate; NaN passes through.
template <typename S>
TT_DEVICE float sigmoid(float x);
template <>
TT_DEVICE float sigmoid<float>(float x) {
  return reciprocal(1.0f + exponential(-x));
}
template <>
TT_DEVICE float sigmoid<Float16>(float x) {
  return reciprocal(1.0f + fast_exponential(-x));
}
template <>
TT_DEVICE float sigmoid<BFloat16>(float x) {
  return sigmoid<Float16>(x);
}
template <typename S>
TT_DEVICE float hyperbolic_tangent(float x);
template <>
TT_DEVICE float hyperbolic_tangent<float>(float x) {
  return tangent(x);
}
template <>
TT_DEVICE float hyperbolic_tangent<Float16>(float x) {
  return 1.0f - 2.0f * reciprocal(1.0f + fast_exponential(2.0f * x));
}
template <>
TT_DEVICE float hyperbolic_tangent<BFloat16>(float x) {
  return fast_tangent(x);
}

}  // namespace throughtime::device
