// Barriers: of a block, of a cluster, of a grid.
#pragma once

#include <cstdint>

#include "device_ops.cuh"
#include "measure.h"

namespace latency {

constexpr int kBarrierThreads = 256;

// ---- __syncthreads ----
__global__ void __launch_bounds__(1024) block_barrier_kernel(int rounds, Report report) {
  __syncthreads();
  const long long start = now();
#pragma unroll 8
  for (int i = 0; i < rounds; ++i) __syncthreads();
  if (threadIdx.x == 0) report.cycles[blockIdx.x] = now() - start;
}

inline void measure_block_barrier(Gpu& gpu) {
  constexpr int kRounds = 4096;
  for (int warps = 1; warps <= 32; warps *= 2) {
    measure("block_barrier", text("warps=%d", warps), "cycles", [&] {
      return gpu.cycles(1, [&] {
        block_barrier_kernel<<<1, 32 * warps>>>(kRounds, gpu.report());
        return cudaGetLastError();
      }) / kRounds;
    });
  }
}

// ---- barrier.cluster ----
// kStores: every thread has a store of 16 bytes to global memory under way when it arrives, as a
// step of a recurrence has.
template <Order kOrder, bool kStores>
__global__ void __launch_bounds__(kBarrierThreads, 1)
    cluster_barrier_kernel(int rounds, uint4* to, Report report) {
  const unsigned at = blockIdx.x * kBarrierThreads + threadIdx.x;
  const unsigned threads = gridDim.x * kBarrierThreads;
  cluster_barrier<Order::kReleaseAcquire>();
  const long long start = now();
  for (int i = 0; i < rounds; ++i) {
    if (kStores) to[(i % 16) * threads + at] = make_uint4(i, at, i, at);
    cluster_barrier<kOrder>();
  }
  if (threadIdx.x == 0) report.cycles[blockIdx.x] = now() - start;
}

template <Order kOrder, bool kStores>
void measure_cluster_barriers(Gpu& gpu) {
  constexpr int kRounds = 2048;
  const char* order = kOrder == Order::kRelaxed ? "relaxed" : "release-acquire";
  for (int size = 1; size <= 16; size *= 2) {
    Clusters clusters(&cluster_barrier_kernel<kOrder, kStores>, size, kBarrierThreads, 0);
    for (const bool all : {false, true}) {
      const std::string parameter = text("blocks=%d;clusters=%s;order=%s;stores=%s", size,
                                         all ? "all" : "one", order, kStores ? "global" : "none");
      if (clusters.most() == 0) {
        skipped("cluster_barrier", parameter, clusters.why_not());
        continue;
      }
      const int many = all ? std::min(clusters.most(), gpu.multiprocessors() / size) : 1;
      measure("cluster_barrier", parameter, "cycles", [&] {
        return gpu.cycles(size * many, [&] {
          return clusters.launch(many, kRounds, reinterpret_cast<uint4*>(gpu.scratch()),
                                 gpu.report());
        }) / kRounds;
      });
    }
  }
}

inline void measure_cluster_barrier(Gpu& gpu) {
  if (!has_clusters(gpu, "cluster_barrier")) return;
  measure_cluster_barriers<Order::kReleaseAcquire, false>(gpu);
  measure_cluster_barriers<Order::kReleaseAcquire, true>(gpu);
  measure_cluster_barriers<Order::kRelaxed, false>(gpu);
  measure_cluster_barriers<Order::kRelaxed, true>(gpu);
}

// ---- All blocks of a grid, through global memory ----
// By the instructions of csrc/common/cuda/device.cuh. kFences: with a __threadfence() on either side.
template <bool kFences>
__global__ void __launch_bounds__(kBarrierThreads, 1)
    grid_barrier_kernel(int rounds, unsigned* arrivals, Report report) {
  Patience patience;
  __syncthreads();
  const long long start = now();
  for (int round = 1; round <= rounds; ++round) {
    __syncthreads();
    if (threadIdx.x == 0) {
      if (kFences) __threadfence();
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrivals) : "memory");
      const long long arrived = now();
      unsigned seen;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrivals) : "memory");
      } while (seen < gridDim.x * round && !patience.is_over(arrived));
      if (kFences) __threadfence();
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    report.cycles[blockIdx.x] = now() - start;
    report.wrong[blockIdx.x] = patience.given_up();
  }
}

template <bool kFences>
void measure_grid_barriers(Gpu& gpu) {
  constexpr int kRounds = 1024;
  auto* arrivals = reinterpret_cast<unsigned*>(gpu.scratch());
  std::vector<int> counts;
  for (int blocks = 1; blocks < gpu.multiprocessors(); blocks *= 2) counts.push_back(blocks);
  counts.push_back(gpu.multiprocessors());
  for (const int blocks : counts) {
    const std::string parameter = text("blocks=%d;fences=%s", blocks, kFences ? "yes" : "no");
    measure("grid_barrier", parameter, "cycles", [&] {
      return gpu.cycles(blocks, [&] {
        check(cudaMemset(arrivals, 0, sizeof(unsigned)), "cudaMemset");
        int rounds = kRounds;
        Report report = gpu.report();
        unsigned* at = arrivals;
        void* arguments[] = {&rounds, &at, &report};
        // Cooperative: all blocks run at once, or the launch fails.
        return cudaLaunchCooperativeKernel(
            reinterpret_cast<const void*>(&grid_barrier_kernel<kFences>), dim3(blocks),
            dim3(kBarrierThreads), arguments, 0, nullptr);
      }) / kRounds;
    });
  }
}

inline void measure_grid_barrier(Gpu& gpu) {
  if (!gpu.properties().cooperativeLaunch) {
    return skipped("grid_barrier", "", "this GPU has no cooperative launch");
  }
  measure_grid_barriers<true>(gpu);
  measure_grid_barriers<false>(gpu);
}

}  // namespace latency
