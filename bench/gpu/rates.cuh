// Rates and latencies of one SM, of the L2 cache, and of launches.
#pragma once

#include <cstdint>

#include "device_ops.cuh"
#include "measure.h"

namespace latency {

class Events {
 public:
  Events() {
    check(cudaEventCreate(&begin_), "cudaEventCreate");
    check(cudaEventCreate(&end_), "cudaEventCreate");
  }
  ~Events() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }
  Events(const Events&) = delete;
  Events& operator=(const Events&) = delete;

  template <typename Work>
  double microseconds(cudaStream_t stream, const Work& work) {
    float milliseconds = 0;
    check(cudaEventRecord(begin_, stream), "cudaEventRecord");
    work();
    check(cudaEventRecord(end_, stream), "cudaEventRecord");
    check(cudaEventSynchronize(end_), "a kernel");
    check(cudaEventElapsedTime(&milliseconds, begin_, end_), "cudaEventElapsedTime");
    return 1e3 * milliseconds;
  }

 private:
  cudaEvent_t begin_, end_;
};

// ---- The clock that all cycles count ----
__global__ void clock_kernel(long long cycles, Report report) {
  const long long start = now();
  long long end;
  do {
    end = now();
  } while (end - start < cycles);
  report.cycles[0] = end - start;
}

inline void measure_clock(Gpu& gpu) {
  Events events;
  measure("clock", "one block", "GHz", [&] {
    const double us = events.microseconds(nullptr, [&] {
      clock_kernel<<<1, 1>>>(20'000'000, gpu.report());
      check(cudaGetLastError(), "a launch");
    });
    return gpu.cycles(1, [] { return cudaSuccess; }) / us / 1e3;
  });
}

// ---- L2 ----
constexpr int kReadThreads = 512, kReadsAtOnce = 8;

// All blocks read the same `vectors`, as they do with the h of a step.
__global__ void __launch_bounds__(kReadThreads, 1)
    l2_read_kernel(int rounds, const uint4* from, int vectors, Report report) {
  unsigned sum = 0;
  __syncthreads();
  const long long start = now();
  for (int round = 0; round < rounds; ++round) {
    for (int i = threadIdx.x; i < vectors; i += kReadThreads * kReadsAtOnce) {
      uint4 v[kReadsAtOnce];
#pragma unroll
      for (int k = 0; k < kReadsAtOnce; ++k) v[k] = load_l2(from + i + k * kReadThreads);
#pragma unroll
      for (int k = 0; k < kReadsAtOnce; ++k) sum += v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
    }
  }
  __syncthreads();
  const long long cycles = now() - start;
  // Every number there is 0.
  const unsigned wrong = __syncthreads_count(sum != 0);
  if (threadIdx.x == 0) {
    report.cycles[blockIdx.x] = cycles;
    report.wrong[blockIdx.x] = wrong;
  }
}

// One load after the other, each at the place that the one before it named.
__global__ void l2_chase_kernel(int loads, const unsigned* from, Report report) {
  unsigned at = 0;
  const long long start = now();
  for (int i = 0; i < loads; ++i) at = load_l2(from + at);
  report.cycles[0] = now() - start;
  report.sink[0] = at;
}

inline void measure_l2(Gpu& gpu) {
  check(cudaMemset(gpu.scratch(), 0, Gpu::kScratch), "cudaMemset");
  for (const int kilobytes : {64, 512, 4096}) {
    const int vectors = kilobytes * 64, rounds = 16 * 1024 / kilobytes;
    for (const int blocks : {1, gpu.multiprocessors()}) {
      measure("l2_read", text("kilobytes=%d;blocks=%d", kilobytes, blocks), "bytes/cycle/SM", [&] {
        return 16.0 * vectors * rounds / gpu.cycles(blocks, [&] {
          l2_read_kernel<<<blocks, kReadThreads>>>(
              rounds, reinterpret_cast<const uint4*>(gpu.scratch()), vectors, gpu.report());
          return cudaGetLastError();
        });
      });
    }
  }

  constexpr int kLoads = 4096,
                kStride = 32 * 17;       // 17 lines of 128 bytes: no neighbour, no pattern
  constexpr unsigned kWords = 1u << 18;  // 1 MB
  std::vector<unsigned> chain(kWords, 0);
  for (unsigned at = 0, i = 0; i < kLoads; ++i, at = chain[at]) chain[at] = (at + kStride) % kWords;
  OnDevice<unsigned> on_device(kWords);
  on_device.copy_from(chain);
  unsigned last = 0;
  for (int i = 0; i < kLoads; ++i) last = chain[last];
  measure("l2_latency", "kilobytes=1024", "cycles", [&] {
    const double cycles = gpu.cycles(1, [&] {
      l2_chase_kernel<<<1, 1>>>(kLoads, on_device.get(), gpu.report());
      return cudaGetLastError();
    });
    return gpu.sink() == last ? cycles / kLoads : std::nan("");
  });
}

// ---- Arithmetic ----
template <int kChains>
__global__ void __launch_bounds__(512, 1) mma_kernel(int rounds, Report report) {
  // Numbers from 1 to 2 with all bits in use: a product of zeros would draw less power.
  const uint32_t noise = threadIdx.x * 0x9e3779b9u & 0x007f007fu;
  const uint32_t a[4] = {0x3f803f80u ^ noise, 0x3f803f80u ^ noise >> 1 & 0x007f007fu,
                         0x3f803f80u ^ noise, 0x3f803f80u};
  const uint32_t b[2] = {0x3f803f80u ^ noise, 0xbf80bf80u ^ noise};
  float c[kChains][4] = {};
  __syncthreads();
  const long long start = now();
  for (int round = 0; round < rounds; ++round) {
#pragma unroll
    for (int chain = 0; chain < kChains; ++chain) mma(c[chain], a, b);
  }
  __syncthreads();
  const long long cycles = now() - start;
  float sum = 0;
#pragma unroll
  for (int chain = 0; chain < kChains; ++chain) {
    sum += c[chain][0] + c[chain][1] + c[chain][2] + c[chain][3];
  }
  atomicXor(report.sink, __float_as_uint(sum));
  if (threadIdx.x == 0) report.cycles[blockIdx.x] = cycles;
}

template <int kChains>
void measure_mma(Gpu& gpu) {
  constexpr int kRounds = 4096;
  for (int warps = 1; warps <= 16; warps *= 2) {
    const std::string parameter = text("warps=%d;chains=%d", warps, kChains);
    measure("mma_bf16", parameter, "FLOP/cycle/SM", [&] {
      return 4096.0 * kChains * kRounds * warps / gpu.cycles(1, [&] {
        mma_kernel<kChains><<<1, 32 * warps>>>(kRounds, gpu.report());
        return cudaGetLastError();
      });
    });
  }
}

__global__ void __launch_bounds__(1024, 1) fma_kernel(int rounds, Report report) {
  constexpr int kChains = 8;
  float x[kChains];
#pragma unroll
  for (int i = 0; i < kChains; ++i) x[i] = static_cast<float>(threadIdx.x + i);
  __syncthreads();
  const long long start = now();
#pragma unroll 8
  for (int round = 0; round < rounds; ++round) {
#pragma unroll
    for (int i = 0; i < kChains; ++i) multiply_add(x[i], 0.5f, 1.25f);
  }
  __syncthreads();
  const long long cycles = now() - start;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kChains; ++i) sum += x[i];
  atomicXor(report.sink, __float_as_uint(sum));
  if (threadIdx.x == 0) report.cycles[blockIdx.x] = cycles;
}

inline void measure_arithmetic(Gpu& gpu) {
  constexpr int kRounds = 4096;
  measure("mma_latency", "m16n8k16", "cycles", [&] {
    return gpu.cycles(1, [&] {
      mma_kernel<1><<<1, 32>>>(kRounds, gpu.report());
      return cudaGetLastError();
    }) / kRounds;
  });
  measure_mma<1>(gpu);
  measure_mma<2>(gpu);
  measure_mma<4>(gpu);
  for (int warps = 4; warps <= 32; warps *= 2) {
    measure("fma_float", text("warps=%d", warps), "FMA/cycle/SM", [&] {
      return 8.0 * 32 * warps * kRounds / gpu.cycles(1, [&] {
        fma_kernel<<<1, 32 * warps>>>(kRounds, gpu.report());
        return cudaGetLastError();
      });
    });
  }
}

// ---- Launches ----
struct StepArguments {  // as many bytes as a kernel of one step takes
  unsigned* out;
  char others[192];
};
__global__ void step_kernel(const __grid_constant__ StepArguments arguments) {
  if (arguments.out) *arguments.out = threadIdx.x;
}

inline void measure_launch(Gpu& gpu) {
  constexpr int kLaunches = 1000;
  Events events;
  cudaStream_t stream;
  check(cudaStreamCreate(&stream), "cudaStreamCreate");
  for (const int blocks : {1, gpu.multiprocessors()}) {
    const auto launches = [&] {
      for (int i = 0; i < kLaunches; ++i) step_kernel<<<blocks, 256, 0, stream>>>(StepArguments{});
      check(cudaGetLastError(), "a launch");
    };
    measure("launch", text("blocks=%d", blocks), "us",
            [&] { return events.microseconds(stream, launches) / kLaunches; });
  }
  check(cudaStreamDestroy(stream), "cudaStreamDestroy");
}

}  // namespace latency
