// The device layer: all that a GPU kernel asks of the machine, and nothing else.
//
// Kernels include this file and no CUDA or torch header, so the same sources run on a GPU (nvcc maps
// the layer to the hardware, below) and on the CPU (tests/gpu/cuda_on_cpu/host_device.h maps it to one
// thread per CUDA thread), where they are compared with the reference and watched by sanitizers.
//
// Every barrier carries its Site. The hardware ignores it; the host layer can leave one site out,
// which shows that the tests would notice (tests/gpu/test_cuda_on_cpu.py).
#pragma once

#include <cstdint>

#include "common/scalars.h"

namespace throughtime::device {

// What each barrier separates.
enum class Site {
  kStart,          // shared memory and peers are ready before anyone writes to a peer
  kForwardParts,   // partial products of the warps | their sum
  kForwardStep,    // h of this step in every block | the product of the next step
  kForwardCopy,    // h copied from global to shared memory | the product
  kBackwardGates,  // gradients of the gates in shared memory | the product
  kBackwardStep,   // partial dh in its owner's memory | its sum
  kCount
};

using Mailbox = uint64_t;

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

// ---- Where am I ----
TT_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
TT_DEVICE int threads() { return static_cast<int>(blockDim.x); }
TT_DEVICE int block() { return static_cast<int>(blockIdx.x); }

TT_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

// ---- Barriers ----
TT_DEVICE void block_barrier(Site) { __syncthreads(); }

// All threads of the cluster; what any of them wrote before is visible to all after.
TT_DEVICE void cluster_barrier(Site) {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
#else
  __trap();  // plan() makes clusters for sm_90 and later only
#endif
}

// A barrier in two halves, between all threads of co-resident blocks that share *arrivals: it starts at 0
// and is to reach the number of blocks times that of their barriers so far. What is stored between the
// halves delays nobody.
TT_DEVICE void grid_arrive(Site, unsigned* arrivals) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrivals) : "memory");
  }
}
TT_DEVICE void grid_wait(Site, const unsigned* arrivals, unsigned all) {
  if (threadIdx.x == 0) {
    unsigned seen;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrivals) : "memory");
    } while (seen < all);
    __threadfence();
  }
  __syncthreads();
}

// ---- Memory of others ----
TT_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
// Of p's counterpart in block `rank` of the cluster.
TT_DEVICE uint32_t at_rank(const void* p, int rank) {
  uint32_t remote = 0;
#if __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared_address(p)), "r"(rank));
#endif
  return remote;
}

// A mailbox counts the bytes that were sent to a place in its block's shared memory: data and the news
// of it are one message, and nobody waits for more than he reads. Its rounds are numbered from 0.

// By one thread, when the round before is complete.
TT_DEVICE void expect_mail(Mailbox* box, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(box)),
               "r"(bytes)
               : "memory");
#endif
}
// By one thread, before a barrier of the cluster.
TT_DEVICE void open_mailbox(Mailbox* box, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(box)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  expect_mail(box, bytes);
#endif
}
// Into block `rank`: `place` and `box` are where they lie in this one.
TT_DEVICE void send(uint32_t* place, uint32_t value, Mailbox* box, int rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
                   at_rank(place, rank)),
               "r"(value), "r"(at_rank(box, rank))
               : "memory");
#endif
}
TT_DEVICE void send(Pair* place, Pair value, Mailbox* box, int rank) {
#if __CUDA_ARCH__ >= 900
  const uint64_t both =
      static_cast<uint64_t>(__float_as_uint(value.b)) << 32 | __float_as_uint(value.a);
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(
                   at_rank(place, rank)),
               "l"(both), "r"(at_rank(box, rank))
               : "memory");
#endif
}
// Until all `bytes` of a round have come, and are visible.
TT_DEVICE void wait_for_mail(Site, Mailbox* box, uint32_t round, uint32_t /*bytes*/) {
#if __CUDA_ARCH__ >= 900
  uint32_t complete;
  do {
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(complete)
        : "r"(shared_address(box)), "r"(round & 1)
        : "memory");
  } while (!complete);
#endif
}

// Global memory that another block wrote since the kernel started: past the L1 cache.
TT_DEVICE Pair load_fresh(const Pair* p) {
  const float2 v = __ldcg(reinterpret_cast<const float2*>(p));
  return {v.x, v.y};
}
TT_DEVICE Words load_fresh(const Words* p) {
  const uint4 v = __ldcg(reinterpret_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
}

// A hint: p will be read some steps from now.
TT_DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// ---- Warp ----
// Bit l: whether lane l says so.
TT_DEVICE uint32_t warp_ballot(bool value) { return __ballot_sync(0xffffffffu, value); }

// An 8 x 8 matrix of 16-bit numbers: lane l holds row l / 4, columns 2 (l % 4) and + 1, before and
// after the transposition.
TT_DEVICE uint32_t transpose_8x8(uint32_t pair) {
  uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

// c += a b on the matrix unit, 16 x 8 x 16, in the fragment layout of PTX's mma.m16n8k16.
TT_DEVICE void mma_16x8x16(BFloat16, float* c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                           uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
TT_DEVICE void mma_16x8x16(Float16, float* c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                           uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

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
TT_DEVICE float exponential(float x) { return expf(x); }
TT_DEVICE float fast_exponential(float x) { return __expf(x); }  // relative error |x| * 1e-7
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

// Rounding to 16 bits hides the error of the fast exponential and of the cancellation near 0, rounding to
// bfloat16 that of the hardware's tanh, which takes half as long; float hides neither. A sigmoid from
// that tanh would be wrong by 2^-12, which nothing hides where the sigmoid or 1 - sigmoid is small. The
// reciprocal of more than 2^126 is 0, so all saturate; NaN passes through.
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
