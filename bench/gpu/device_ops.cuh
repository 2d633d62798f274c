// The instructions that latency.cu measures. All are volatile: neither dropped nor reordered.
#pragma once

#include <cstdint>

namespace latency {

#define LATENCY_DEVICE __device__ __forceinline__
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define LATENCY_CLUSTERS 1
#endif

LATENCY_DEVICE long long now() {
  long long cycles;
  asm volatile("mov.u64 %0, %%clock64;" : "=l"(cycles)::"memory");
  return cycles;
}

// No wait is endless: about a second at most, and once one was given up the others of this thread
// return at once. Every kernel that waits reports how often it gave up.
class Patience {
 public:
  static constexpr long long kCycles = 1LL << 31;
  LATENCY_DEVICE bool is_over(long long start) {
    if (now() - start < left_) return false;
    left_ = 0;
    ++given_up_;
    return true;
  }
  LATENCY_DEVICE unsigned given_up() const { return given_up_; }

 private:
  long long left_ = kCycles;
  unsigned given_up_ = 0;
};

// ---- Clusters ----
LATENCY_DEVICE void cluster_barrier() {
#if LATENCY_CLUSTERS
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __trap();  // the host launches no clusters there
#endif
}

LATENCY_DEVICE int cluster_rank() {
  int rank = 0;
#if LATENCY_CLUSTERS
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
LATENCY_DEVICE int cluster_size() {
  int size = 1;
#if LATENCY_CLUSTERS
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
  return size;
}

LATENCY_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
// The same place in the shared memory of another block of the cluster.
LATENCY_DEVICE uint32_t at_rank(uint32_t address, int rank) {
  uint32_t remote = address;
#if LATENCY_CLUSTERS
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
#endif
  return remote;
}

LATENCY_DEVICE void store_remote(uint32_t to, uint4 v) {
#if LATENCY_CLUSTERS
  asm volatile("st.shared::cluster.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
#endif
}
LATENCY_DEVICE uint4 load_remote(uint32_t from) {
  uint4 v{};
#if LATENCY_CLUSTERS
  asm volatile("ld.shared::cluster.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from)
               : "memory");
#endif
  return v;
}
// Signals `barrier`, in the receiver's block, when the first 4 or 8 bytes of v are there.
template <int kBytes>
LATENCY_DEVICE void store_async(uint32_t to, uint2 v, uint32_t barrier) {
#if LATENCY_CLUSTERS
  if constexpr (kBytes == 4) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to),
        "r"(v.x), "r"(barrier)
        : "memory");
  } else {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1,%2}, [%3];" ::"r"(
            to),
        "r"(v.x), "r"(v.y), "r"(barrier)
        : "memory");
  }
#endif
}

// ---- mbarrier ----
LATENCY_DEVICE void barrier_init(uint32_t barrier, int arrivals) {
#if LATENCY_CLUSTERS
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
LATENCY_DEVICE void arrive_and_expect(uint32_t barrier, int bytes) {
#if LATENCY_CLUSTERS
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
               "r"(bytes)
               : "memory");
#endif
}
LATENCY_DEVICE void wait(uint32_t barrier, int parity, Patience& patience) {
#if LATENCY_CLUSTERS
  const long long start = now();
  for (;;) {
    uint32_t done;
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    if (done || patience.is_over(start)) return;
  }
#endif
}

// ---- Global memory, past the L1 cache ----
LATENCY_DEVICE uint4 load_l2(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
LATENCY_DEVICE unsigned load_l2(const unsigned* p) {
  unsigned v;
  asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

// ---- Arithmetic ----
LATENCY_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
LATENCY_DEVICE void multiply_add(float& x, float a, float b) {
  asm volatile("fma.rn.f32 %0, %0, %1, %2;" : "+f"(x) : "f"(a), "f"(b));
}

}  // namespace latency
