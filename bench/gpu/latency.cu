// Measures the constants of the model in csrc/lstm/cuda/plan.h: one CSV row per number, with the
// constant that it corrects and the value assumed there.
//
//     nvcc -O3 -std=c++17 --expt-relaxed-constexpr -arch=native -Icsrc bench/gpu/latency.cu -o latency
//     ./latency [FILE]      to FILE, or to the standard output; CUDA_VISIBLE_DEVICES picks the GPU
//
// A value is the median of 15 runs after 2 more, `spread` the distance of the quartiles. Cycles are
// those of the slowest block. A row whose kernel computes something wrong says FAILED, and the exit code
// is 1. Waits are the LSTM's own and not bounded: give the program a time limit.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include <cuda_runtime.h>

#include "kernels.cuh"
#include "lstm/cuda/plan.h"

namespace throughtime::latency {
namespace {

#define CHECK(call) check(call, #call)
void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "latency: %s: %s (%s)\n", call, cudaGetErrorString(error),
               cudaGetErrorName(error));
  std::exit(1);
}

constexpr int kAll = 0;  // as many blocks, or clusters, as run at once

struct Launch {
  int warps, groups;  // of a block; blocks, or clusters of `ranks` blocks
  int ranks;
  bool grid;
  int size;          // Probe::size
  int shared_bytes;  // of a block

  std::string text() const {
    const auto number = [](int n) { return n == kAll ? "all" : std::to_string(n); };
    return "warps=" + number(warps) + ";groups=" + number(groups) + ";ranks=" + number(ranks) +
           ";size=" + std::to_string(size);
  }
  bool in_cluster() const { return !grid && ranks != 1; }
};

// What a run of a kernel took.
struct Run {
  double cycles;  // of its slowest block
  double work;    // of a block
  double microseconds;
  int at_once;  // blocks, or clusters, that the GPU holds
};
double cycles_of_work(const Run& r) { return r.cycles / r.work; }
double work_per_cycle(const Run& r) { return r.work / r.cycles; }
double microseconds(const Run& r) { return r.microseconds; }
double gigahertz(const Run& r) { return r.cycles / r.microseconds / 1e3; }
double groups_at_once(const Run& r) { return r.at_once; }

struct Measurement {
  const char* name;
  const char* constant;  // of plan.h, which the number corrects
  double assumed;        // its value; 0: queried from the GPU
  const char* unit;
  double (*value)(const Run&);
  void (*kernel)(Probe);
  int rounds;                     // 0: a thousand launches of nothing
  double (*work)(const Launch&);  // of a block in a round
  std::vector<Launch> launches;
  const Words* from = nullptr;
};

class Bench {
 public:
  Bench() {
    CHECK(cudaGetDeviceProperties(&properties_, 0));
    for (cudaEvent_t* event : {&begin_, &end_}) CHECK(cudaEventCreate(event));
    probe_.half = 0.5f;
    probe_.cycles = on_device<long long>(kMostBlocks);
    probe_.wrong = on_device<unsigned>(kMostBlocks);
    arrivals_ = on_device<unsigned>(1);
    std::puts("name,parameter,value,unit,spread,constant,assumed,note");
    std::printf("gpu,%s sm_%d%d,%d,SM,,,,\n", properties_.name, properties_.major,
                properties_.minor, properties_.multiProcessorCount);
  }

  // Zeros on the GPU.
  template <typename T>
  static T* on_device(size_t count) {
    T* data = nullptr;
    CHECK(cudaMalloc(&data, count * sizeof(T)));
    CHECK(cudaMemset(data, 0, count * sizeof(T)));
    return data;
  }

  // One row per launch. The value is NaN where the note says why there is none.
  void measure(const Measurement& m) {
    for (const Launch& asked : m.launches) {
      Launch launch = asked;
      std::string note = prepare(m, launch);
      std::vector<double> values(kRepeats, std::nan(""));
      for (int i = -kWarmUps; note.empty() && i < kRepeats; ++i) {
        Run run{};
        if (once(m, launch, run)) {
          if (i >= 0) values[i] = m.value(run);
        } else {
          note = "FAILED: a kernel computed something wrong";
          any_failed_ = true;
          values.assign(kRepeats, std::nan(""));
        }
      }
      if (note.empty()) std::sort(values.begin(), values.end());
      const double spread = values[3 * kRepeats / 4] - values[kRepeats / 4];
      std::printf("%s,%s,%.6g,%s,%.3g,%s,%g,%s\n", m.name, asked.text().c_str(),
                  values[kRepeats / 2], m.unit, spread, m.constant, m.assumed, note.c_str());
      std::fflush(stdout);  // a crash or a timeout leaves the rows before it
    }
  }

  const cudaDeviceProp& properties() const { return properties_; }
  bool any_failed() const { return any_failed_; }

 private:
  static constexpr int kRepeats = 15, kWarmUps = 2, kMostBlocks = 4096;

  template <typename T>
  static std::vector<T> copy(const T* from, int count) {
    std::vector<T> to(count);
    CHECK(cudaMemcpy(to.data(), from, count * sizeof(T), cudaMemcpyDefault));
    return to;
  }

  // Sets what all launches of the row share; the reason if this GPU cannot run it.
  std::string prepare(const Measurement& m, Launch& launch) {
    if (launch.shared_bytes > static_cast<int>(properties_.sharedMemPerBlockOptin)) {
      return "a block has less shared memory";
    }
    if (launch.in_cluster() && properties_.major < 9) return "no clusters before sm_90";
    if (launch.grid && !properties_.cooperativeLaunch) return "no cooperative launch";
    if (launch.ranks == kAll) launch.ranks = properties_.multiProcessorCount;
    attribute_ = {};
    config_ = {};
    config_.blockDim = dim3(32 * launch.warps);
    config_.gridDim = dim3(launch.ranks);
    config_.dynamicSmemBytes = launch.shared_bytes;
    config_.attrs = &attribute_;
    config_.numAttrs = launch.ranks > 1 ? 1 : 0;
    CHECK(cudaFuncSetAttribute(m.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               launch.shared_bytes));
    at_once_ = properties_.multiProcessorCount;
    if (launch.grid) {
      attribute_.id = cudaLaunchAttributeCooperative;
      attribute_.val.cooperative = 1;
    } else if (launch.in_cluster()) {
      attribute_.id = cudaLaunchAttributeClusterDimension;
      attribute_.val.clusterDim = {static_cast<unsigned>(launch.ranks), 1, 1};
      CHECK(cudaFuncSetAttribute(m.kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
      const cudaError_t error = cudaOccupancyMaxActiveClusters(&at_once_, m.kernel, &config_);
      cudaGetLastError();  // a cluster too large is an answer, not an error to keep
      if (error != cudaSuccess || at_once_ == 0) return "no such cluster fits this GPU";
      at_once_ = std::min(at_once_, kMostBlocks / launch.ranks);
    }
    if (launch.groups == kAll) launch.groups = at_once_;
    config_.gridDim = dim3(launch.groups * launch.ranks);
    probe_.rounds = m.rounds;
    probe_.size = launch.size;
    probe_.from = m.from;
    probe_.partition.ranks = launch.ranks;
    probe_.partition.grid = launch.grid;
    probe_.partition.arrivals = arrivals_;
    return "";
  }

  // False if a block saw something wrong.
  bool once(const Measurement& m, const Launch& launch, Run& run) {
    const int blocks = launch.groups * launch.ranks, launches = m.rounds == 0 ? 1000 : 1;
    CHECK(cudaMemset(arrivals_, 0, sizeof(unsigned)));
    CHECK(cudaMemset(probe_.wrong, 0, blocks * sizeof(unsigned)));
    CHECK(cudaEventRecord(begin_));
    for (int i = 0; i < launches; ++i) {
      CHECK(cudaLaunchKernelEx(&config_, m.kernel, probe_));
    }
    CHECK(cudaEventRecord(end_));
    CHECK(cudaEventSynchronize(end_));
    float milliseconds = 0;
    CHECK(cudaEventElapsedTime(&milliseconds, begin_, end_));
    const auto cycles = copy(probe_.cycles, blocks);
    const auto wrong = copy(probe_.wrong, blocks);
    run = {static_cast<double>(*std::max_element(cycles.begin(), cycles.end())),
           m.rounds * m.work(launch), 1e3 * milliseconds / launches, at_once_};
    return std::count(wrong.begin(), wrong.end(), 0u) == blocks;
  }

  cudaDeviceProp properties_;
  cudaEvent_t begin_, end_;
  Probe probe_{};
  unsigned* arrivals_;
  cudaLaunchAttribute attribute_;
  cudaLaunchConfig_t config_;
  int at_once_;
  bool any_failed_ = false;
};

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
  CHECK(cudaMemcpy(to, links.data(), links.size() * sizeof(Words), cudaMemcpyDefault));
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
      {"clock", "Gpu::ghz", 0, "GHz", gigahertz, exchange<Words>, 1 << 18, one, {blocks(8)}},
      {"block_barrier", OF_PLAN(kBlockBarrier), "cycles", cycles_of_work, exchange<Words>, 4096, one,
       {blocks(1), blocks(4), blocks(8), blocks(16)}},
      {"message", OF_PLAN(kMessage), "cycles", cycles_of_work, exchange<Words>, 2048, one,
       {clusters(1, 1, 2, 1), clusters(1, 1, 8, 1), clusters(1, 1, 16, 1), clusters(1, kAll, 16, 1)}},
      {"message_bytes_4", "", 0, "bytes/cycle/SM", work_per_cycle, exchange<uint32_t>, 1024,
       bytes_sent, {clusters(8, 1, 4, 4), clusters(8, 1, 16, 4)}},
      {"message_bytes_8", OF_PLAN(kRemoteBytesPerCycle), "bytes/cycle/SM", work_per_cycle,
       exchange<Pair>, 1024, bytes_sent, {clusters(8, 1, 4, 4), clusters(8, 1, 16, 4)}},
      {"message_bytes_16", OF_PLAN(kRemoteBytesPerCycle), "bytes/cycle/SM", work_per_cycle,
       exchange<Words>, 1024, bytes_sent,
       {clusters(8, 1, 4, 4), clusters(8, 1, 16, 4), clusters(8, kAll, 16, 4)}},
      {"grid_barrier", OF_PLAN(kGridBarrier), "cycles", cycles_of_work, exchange<Words>, 1024, one,
       {grid(2), grid(8), grid(32), grid(kAll)}},
      {"active_clusters", "9/10 of the SMs in time()", 0.9, "clusters", groups_at_once, exchange<Words>,
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
      {"launch", OF_PLAN(kKernelMicroseconds), "us", microseconds, exchange<Words>, 0, one,
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
