// Host side of latency.cu: a measurement, its launches, and its rows of the CSV.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include <cuda_runtime.h>

#include "kernels.cuh"

namespace throughtime::latency {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "latency: %s: %s (%s)\n", what, cudaGetErrorString(error),
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
    const std::string many = groups == kAll ? "all" : std::to_string(groups);
    const std::string of = ranks == kAll ? "all" : std::to_string(ranks);
    return "warps=" + std::to_string(warps) + ";groups=" + many + ";ranks=" + of +
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
inline double cycles_of_work(const Run& r) { return r.cycles / r.work; }
inline double work_per_cycle(const Run& r) { return r.work / r.cycles; }
inline double microseconds(const Run& r) { return r.microseconds; }
inline double gigahertz(const Run& r) { return r.cycles / r.microseconds / 1e3; }
inline double groups_at_once(const Run& r) { return r.at_once; }

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
    check(cudaGetDeviceProperties(&properties_, 0), "cudaGetDeviceProperties");
    for (cudaEvent_t* event : {&begin_, &end_}) check(cudaEventCreate(event), "cudaEventCreate");
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
    check(cudaMalloc(&data, count * sizeof(T)), "cudaMalloc");
    check(cudaMemset(data, 0, count * sizeof(T)), "cudaMemset");
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
    check(cudaMemcpy(to.data(), from, count * sizeof(T), cudaMemcpyDefault), "cudaMemcpy");
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
    check(cudaFuncSetAttribute(m.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               launch.shared_bytes),
          "cudaFuncSetAttribute");
    at_once_ = properties_.multiProcessorCount;
    if (launch.grid) {
      attribute_.id = cudaLaunchAttributeCooperative;
      attribute_.val.cooperative = 1;
    } else if (launch.in_cluster()) {
      attribute_.id = cudaLaunchAttributeClusterDimension;
      attribute_.val.clusterDim = {static_cast<unsigned>(launch.ranks), 1, 1};
      check(cudaFuncSetAttribute(m.kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
            "cudaFuncSetAttribute");
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
    check(cudaMemset(arrivals_, 0, sizeof(unsigned)), "cudaMemset");
    check(cudaMemset(probe_.wrong, 0, blocks * sizeof(unsigned)), "cudaMemset");
    check(cudaEventRecord(begin_), "cudaEventRecord");
    for (int i = 0; i < launches; ++i) {
      check(cudaLaunchKernelEx(&config_, m.kernel, probe_), "a launch");
    }
    check(cudaEventRecord(end_), "cudaEventRecord");
    check(cudaEventSynchronize(end_), "a kernel");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin_, end_), "cudaEventElapsedTime");
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

}  // namespace throughtime::latency
