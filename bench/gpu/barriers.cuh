// Barriers: of a block, of a grid.
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

// ---- All blocks of a grid, through global memory ----
// By the instructions of csrc/common/cuda/device.cuh.
__global__ void __launch_bounds__(kBarrierThreads, 1)
    grid_barrier_kernel(int rounds, unsigned* arrivals, Report report) {
  Patience patience;
  __syncthreads();
  const long long start = now();
  for (int round = 1; round <= rounds; ++round) {
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrivals) : "memory");
      const long long arrived = now();
      unsigned seen;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrivals) : "memory");
      } while (seen < gridDim.x * round && !patience.is_over(arrived));
      __threadfence();
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    report.cycles[blockIdx.x] = now() - start;
    report.wrong[blockIdx.x] = patience.given_up();
  }
}

inline void measure_grid_barrier(Gpu& gpu) {
  if (!gpu.properties().cooperativeLaunch) {
    return skipped("grid_barrier", "", "this GPU has no cooperative launch");
  }
  constexpr int kRounds = 1024;
  auto* arrivals = reinterpret_cast<unsigned*>(gpu.scratch());
  std::vector<int> counts;
  for (int blocks = 1; blocks < gpu.multiprocessors(); blocks *= 2) counts.push_back(blocks);
  counts.push_back(gpu.multiprocessors());
  for (const int blocks : counts) {
    const std::string parameter = text("blocks=%d", blocks);
    measure("grid_barrier", parameter, "cycles", [&] {
      return gpu.cycles(blocks, [&] {
        check(cudaMemset(arrivals, 0, sizeof(unsigned)), "cudaMemset");
        int rounds = kRounds;
        Report report = gpu.report();
        unsigned* at = arrivals;
        void* arguments[] = {&rounds, &at, &report};
        // Cooperative: all blocks run at once, or the launch fails.
        return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(&grid_barrier_kernel),
                                           dim3(blocks), dim3(kBarrierThreads), arguments, 0,
                                           nullptr);
      }) / kRounds;
    });
  }
}

}  // namespace latency
