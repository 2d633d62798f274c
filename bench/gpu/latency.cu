// What the model of csrc/lstm/cuda/plan.h has to know of a GPU, measured: one CSV row per number.
//
//     nvcc -O3 -std=c++17 -arch=native bench/gpu/latency.cu -o latency && ./latency > latency.csv
//     ./latency 1        the second GPU
//
// Medians of 15 runs after 2 more; `spread` is the distance of the quartiles. Cycles are those of the
// slowest block. Of one step each: block_barrier, grid_barrier, exchange (the h of a step through a
// cluster). No row waits for ever: kernels give up after about a second, their row says FAILED, and
// the exit code is 1.
#include <cstdio>
#include <cstdlib>

#include "barriers.cuh"
#include "exchange.cuh"
#include "rates.cuh"

namespace {

int chosen_device(int argc, char** argv) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    std::fprintf(stderr, "latency: needs an NVIDIA GPU, and there is none: %s\n",
                 error != cudaSuccess ? cudaGetErrorString(error) : "no device");
    std::exit(1);
  }
  if (argc < 2) return 0;
  char* end;
  const long device = std::strtol(argv[1], &end, 10);
  if (argc > 2 || *argv[1] == 0 || *end != 0 || device < 0 || device >= count) {
    std::fprintf(stderr, "latency: wanted at most one number, of a GPU from 0 to %d, got '%s'\n",
                 count - 1, argv[argc - 1]);
    std::exit(2);
  }
  return static_cast<int>(device);
}

}  // namespace

int main(int argc, char** argv) {
  const int device = chosen_device(argc, argv);
  latency::check(cudaSetDevice(device), "cudaSetDevice");
  latency::Gpu gpu(device);
  latency::header();
  const cudaDeviceProp& properties = gpu.properties();
  latency::print("gpu", properties.name, ",,,");
  latency::row("compute_capability", "", gpu.compute() / 10.0, "");
  latency::row("multiprocessors", "", gpu.multiprocessors(), "SM");
  latency::row("shared_memory", "of a block", gpu.shared_bytes(), "bytes");
  latency::row("l2_cache", "", properties.l2CacheSize, "bytes");

  latency::measure_clock(gpu);
  latency::measure_block_barrier(gpu);
  latency::measure_active_clusters(gpu);
  latency::measure_exchange(gpu);
  latency::measure_stream(gpu);
  latency::measure_grid_barrier(gpu);
  latency::measure_l2(gpu);
  latency::measure_launch(gpu);
  latency::measure_arithmetic(gpu);
  return latency::any_failed ? 1 : 0;
}
