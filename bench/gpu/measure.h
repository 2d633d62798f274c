// Host side of latency.cu: errors, repeats, CSV rows, memory of the device, launches of clusters.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include <cuda_runtime.h>

namespace latency {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "latency: %s: %s (%s)\n", what, cudaGetErrorString(error),
               cudaGetErrorName(error));
  std::exit(1);
}

__attribute__((format(printf, 1, 2))) inline std::string text(const char* format, ...) {
  char buffer[160];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return buffer;
}

// Whether a kernel gave up waiting, or read what it should not have: such rows say so, and the
// program's exit code is 1.
inline bool any_failed = false;

inline void header() { std::puts("name,parameter,value,unit,spread,note"); }

inline void print(const char* name, const std::string& parameter, const std::string& rest) {
  std::printf("%s,%s,%s\n", name, parameter.c_str(), rest.c_str());
  std::fflush(stdout);  // what was measured before a crash or a timeout counts
}
inline void row(const char* name, const std::string& parameter, double value, const char* unit,
                double spread = 0) {
  print(name, parameter, text("%.6g,%s,%.3g,", value, unit, spread));
}
inline void skipped(const char* name, const std::string& parameter, const std::string& why) {
  print(name, parameter, ",,,\"skipped: " + why + "\"");
}
inline void failed(const char* name, const std::string& parameter, const std::string& why) {
  any_failed = true;
  print(name, parameter, ",,,\"FAILED: " + why + "\"");
}

constexpr int kRepeats = 15, kWarmUps = 2;

// Median and distance of the quartiles of once(), a number per call.
template <typename Once>
void measure(const char* name, const std::string& parameter, const char* unit, const Once& once) {
  std::vector<double> values;
  for (int i = 0; i < kWarmUps + kRepeats; ++i) {
    const double value = once();
    if (std::isnan(value)) return failed(name, parameter, "gave up waiting, or wrong data");
    if (i >= kWarmUps) values.push_back(value);
  }
  std::sort(values.begin(), values.end());
  const size_t n = values.size();
  row(name, parameter, values[n / 2], unit, values[3 * n / 4] - values[n / 4]);
}

template <typename T>
class OnDevice {
 public:
  explicit OnDevice(size_t count) : count_(count) {
    check(cudaMalloc(&data_, count * sizeof(T)), "cudaMalloc");
    clear();
  }
  ~OnDevice() { cudaFree(data_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  void clear() { check(cudaMemset(data_, 0, count_ * sizeof(T)), "cudaMemset"); }
  void copy_from(const std::vector<T>& from) {
    check(cudaMemcpy(data_, from.data(), from.size() * sizeof(T), cudaMemcpyDefault), "cudaMemcpy");
  }
  // Waits for the kernels before it.
  std::vector<T> copy(size_t count) const {
    std::vector<T> to(count);
    check(cudaMemcpy(to.data(), data_, count * sizeof(T), cudaMemcpyDefault), "a kernel");
    return to;
  }
  T* get() const { return data_; }

 private:
  size_t count_;
  T* data_ = nullptr;
};

// What every kernel reports, one entry per block.
struct Report {
  long long* cycles;
  unsigned* wrong;  // waits given up and words that are not what was sent
  unsigned* sink;   // where results go, so that nothing is optimised away
};

class Gpu {
 public:
  explicit Gpu(int device)
      : cycles_(kMostBlocks), wrong_(kMostBlocks), sink_(kMostBlocks), scratch_(kScratch) {
    check(cudaGetDeviceProperties(&properties_, device), "cudaGetDeviceProperties");
  }
  static constexpr size_t kMostBlocks = 4096, kScratch = size_t{1} << 26;

  int compute() const { return 10 * properties_.major + properties_.minor; }
  int multiprocessors() const { return properties_.multiProcessorCount; }
  int shared_bytes() const { return static_cast<int>(properties_.sharedMemPerBlockOptin); }
  const cudaDeviceProp& properties() const { return properties_; }
  char* scratch() const { return scratch_.get(); }
  unsigned sink() const { return sink_.copy(1)[0]; }
  Report report() const { return {cycles_.get(), wrong_.get(), sink_.get()}; }

  // The slowest block's cycles of launch(report()); NaN if a block saw something wrong.
  template <typename Launch>
  double cycles(int blocks, const Launch& launch) {
    wrong_.clear();
    check(launch(), "a launch");
    const std::vector<long long> cycles = cycles_.copy(blocks);
    for (const unsigned wrong : wrong_.copy(blocks)) {
      if (wrong != 0) return std::nan("");
    }
    return static_cast<double>(*std::max_element(cycles.begin(), cycles.end()));
  }

 private:
  cudaDeviceProp properties_;
  OnDevice<long long> cycles_;
  OnDevice<unsigned> wrong_, sink_;
  OnDevice<char> scratch_;
};

// A grid of `clusters` clusters.
template <typename... P>
class Clusters {
 public:
  Clusters(void (*kernel)(P...), int size, int threads, int shared_bytes)
      : kernel_(kernel), size_(size) {
    attribute_.id = cudaLaunchAttributeClusterDimension;
    attribute_.val.clusterDim.x = size;
    attribute_.val.clusterDim.y = attribute_.val.clusterDim.z = 1;
    config_.blockDim = dim3(threads);
    config_.dynamicSmemBytes = shared_bytes;
    config_.attrs = &attribute_;
    config_.numAttrs = 1;
    config_.gridDim = dim3(size);
    error_ =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error_ == cudaSuccess && size > 8) {
      error_ = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }
    if (error_ == cudaSuccess) {
      error_ = cudaOccupancyMaxActiveClusters(&most_, kernel, &config_);
    }
    cudaGetLastError();  // a size that this GPU does not have is an answer, not an error to keep
  }
  Clusters(const Clusters&) = delete;
  Clusters& operator=(const Clusters&) = delete;

  int most() const { return error_ == cudaSuccess ? most_ : 0; }
  std::string why_not() const {
    return error_ == cudaSuccess ? "no such cluster fits this GPU" : cudaGetErrorString(error_);
  }
  template <typename... A>
  cudaError_t launch(int clusters, A... arguments) {
    config_.gridDim = dim3(clusters * size_);
    return cudaLaunchKernelEx(&config_, kernel_, arguments...);
  }

 private:
  void (*kernel_)(P...);
  int size_, most_ = 0;
  cudaError_t error_;
  cudaLaunchAttribute attribute_{};
  cudaLaunchConfig_t config_{};
};

inline bool has_clusters(const Gpu& gpu, const char* name) {
  if (gpu.compute() >= 90) return true;
  skipped(name, "",
          text("compute capability %d.%d has no clusters", gpu.compute() / 10, gpu.compute() % 10));
  return false;
}

}  // namespace latency
