// Measures the constants of the model in csrc/lstm/cuda/plan.h: one CSV row per number, with the
// constant that it corrects and the value assumed there. Never run on a GPU so far.
//
//     nvcc -O3 -std=c++17 --expt-relaxed-constexpr -arch=native -Icsrc bench/gpu/latency.cu -o latency
//     ./latency [FILE]      to FILE, or to the standard output; CUDA_VISIBLE_DEVICES picks the GPU
//
// A value is the median of 15 runs after 2 more, `spread` the distance of the quartiles. Cycles are
// those of the slowest block. A row whose kernel computes something wrong says FAILED, and the exit code
// is 1. Waits are the LSTM's own and not bounded: give the program a time limit.
#include "lstm/cuda/plan.h"
#include "measure.h"

namespace throughtime::latency {
namespace {

constexpr int kLoads = 4096, kLines = 8192;  // 1 MB in lines of 128 bytes

// Indices for chase(): 17 lines from each to the next, which no prefetcher expects.
const Words* chain() {
  std::vector<Words> links(8 * kLines);
  int at = 0;
  for (int i = 0; i < kLoads; ++i) {
    const int next = i + 1 == kLoads ? 1 : (at + 8 * 17) % (8 * kLines);
    links[at].v[0] = next;
    at = next;
  }
  auto* to = Bench::on_device<Words>(links.size());
  check(cudaMemcpy(to, links.data(), links.size() * sizeof(Words), cudaMemcpyDefault),
        "cudaMemcpy");
  return to;
}

Launch blocks(int warps, int count = 1, int size = 0, int shared_bytes = kBuffers) {
  return {warps, count, 1, false, size, shared_bytes};
}
Launch grid(int ranks) { return {8, 1, ranks, true, 0, kBuffers}; }
Launch clusters(int warps, int count, int ranks, int tiles) {
  return {warps, count, ranks, false, tiles, exchange_shared_bytes(ranks, warps, tiles)};
}
Launch filling(int ranks, int sm_bytes) { return {1, kAll, ranks, false, 1, sm_bytes}; }

// Units of work of a block in a round.
double one(const Launch&) { return 1; }
double bytes_read(const Launch& l) { return 16.0 * l.size; }
double bytes_sent(const Launch& l) { return 128.0 * l.size * l.ranks * l.warps; }
double mma_flops(const Launch& l) { return 4 * 4096.0 * l.warps; }
double fmas(const Launch& l) { return 32.0 * kFmaChains * l.warps; }
double elements(const Launch& l) { return 64.0 * l.warps; }

#define OF_PLAN(constant) #constant, plan_detail::constant

// `sm`: most shared memory of a block. A block that uses it fills an SM.
std::vector<Measurement> measurements(int sm) {
  constexpr int kVectors = 4096;  // 64 KB
  const Words* const zeros = Bench::on_device<Words>(64 * kVectors);
  // name, constant, unit, value, kernel, rounds, work, launches, what is read
  // clang-format off
  return {
      {"clock", "Gpu::ghz", 0, "GHz", gigahertz, exchange, 1 << 18, one, {blocks(8)}},
      {"block_barrier", OF_PLAN(kBlockBarrier), "cycles", cycles_of_work, exchange, 4096, one,
       {blocks(1), blocks(4), blocks(8), blocks(16)}},
      {"message", OF_PLAN(kRemoteStore), "cycles", cycles_of_work, exchange, 2048, one,
       {clusters(1, 1, 2, 1), clusters(1, 1, 8, 1), clusters(1, 1, 16, 1), clusters(1, kAll, 16, 1)}},
      {"message_bytes", OF_PLAN(kRemoteBytesPerCycle), "bytes/cycle/SM", work_per_cycle, exchange,
       1024, bytes_sent, {clusters(8, 1, 4, 4), clusters(8, 1, 16, 4), clusters(8, kAll, 16, 4)}},
      {"grid_barrier", OF_PLAN(kGridBarrier), "cycles", cycles_of_work, exchange, 1024, one,
       {grid(2), grid(8), grid(32), grid(kAll)}},
      {"active_clusters", "9/10 of the SMs in time()", 0.9, "clusters", groups_at_once, exchange,
       1, one, {filling(2, sm), filling(4, sm), filling(8, sm), filling(16, sm)}},
      {"shared_read", OF_PLAN(kSharedBytesPerCycle), "bytes/cycle/SM", work_per_cycle, read<true>,
       64, bytes_read, {blocks(16, 1, kVectors, 16 * kVectors)}},
      {"l2_read", OF_PLAN(kL2BytesPerCycle), "bytes/cycle/SM", work_per_cycle, read<false>, 16,
       bytes_read,
       {blocks(16, 1, kVectors), blocks(16, kAll, kVectors), blocks(16, kAll, 64 * kVectors)}, zeros},
      {"l2_latency", OF_PLAN(kL2Latency), "cycles", cycles_of_work, chase, kLoads, one,
       {blocks(1)}, chain()},
      {"mma_rate", OF_PLAN(kMatrixFlopsPerCycle), "FLOP/cycle/SM", work_per_cycle, mma<4>, 4096,
       mma_flops, {blocks(4), blocks(8), blocks(16)}},
      {"mma_latency", OF_PLAN(kMatrixLatency), "cycles", cycles_of_work, mma<1>, 4096, one,
       {blocks(1)}},
      {"fma_rate", OF_PLAN(kFmasPerCycle), "FMA/cycle/SM", work_per_cycle, fma, 4096, fmas,
       {blocks(4), blocks(8), blocks(16)}},
      {"cell_latency", OF_PLAN(kStepLatency), "cycles", cycles_of_work, pointwise, 4096, one,
       {blocks(1)}},
      {"cell_rate", OF_PLAN(kPointwisePerUnit), "cycles per unit and sample", cycles_of_work,
       pointwise, 4096, elements, {blocks(8), blocks(16)}},
      {"launch", OF_PLAN(kKernelMicroseconds), "us", microseconds, exchange, 0, one,
       {blocks(8), blocks(8, kAll)}},
  };
  // clang-format on
}

}  // namespace
}  // namespace throughtime::latency

int main(int argc, char** argv) {
  using namespace throughtime::latency;
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    std::fprintf(stderr, "latency: needs an NVIDIA GPU, and there is none: %s\n",
                 error != cudaSuccess ? cudaGetErrorString(error) : "no device");
    return 1;
  }
  if (argc > 1 && !std::freopen(argv[1], "w", stdout)) {
    std::fprintf(stderr, "latency: %s cannot be written\n", argv[1]);
    return 1;
  }
  Bench bench;
  const int sm = static_cast<int>(bench.properties().sharedMemPerBlockOptin);
  for (const Measurement& m : measurements(sm)) bench.measure(m);
  return bench.any_failed() ? 1 : 0;
}
