#include "lstm/cuda/gpu.h"

#include <mutex>
#include <unordered_map>

#include "lstm/cuda/launch.h"

namespace throughtime {
namespace {

Gpu ask(int device) {
  const auto attribute = [device](cudaDeviceAttr name) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, name, device), "asking for a GPU's properties",
               device);
    return value;
  };
  Gpu gpu{};
  gpu.compute = 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                attribute(cudaDevAttrComputeCapabilityMinor);
  gpu.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  gpu.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  gpu.cluster = attribute(cudaDevAttrClusterLaunch) == 0 ? 1 : most_cluster_blocks(device);
  gpu.ghz = attribute(cudaDevAttrClockRate) / 1e6;
  // Data on both edges of the memory clock; 0 where the driver does not report it.
  gpu.memory_gbs = 2.0 * attribute(cudaDevAttrMemoryClockRate) *
                   attribute(cudaDevAttrGlobalMemoryBusWidth) / 8 / 1e6;
  if (gpu.ghz <= 0) gpu.ghz = 1.5;
  if (gpu.memory_gbs <= 0) gpu.memory_gbs = 2000;
  return gpu;
}

}  // namespace

std::string name_of(int device) {
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) {
    return "GPU " + std::to_string(device);
  }
  return std::string(properties.name) + " (sm_" + std::to_string(properties.major) +
         std::to_string(properties.minor) + ")";
}

void check_cuda(cudaError_t status, const std::string& doing, int device) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // else the next call would report it again
  throw CudaError("throughtime: " + doing + " failed on " + name_of(device) + ": " +
                  cudaGetErrorString(status) +
                  "; use backend='triton' or 'reference', and report this with the output of "
                  "`python -m throughtime env`");
}

const Gpu& gpu_of(int device) {
  static std::mutex mutex;
  static std::unordered_map<int, Gpu> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  return found != known.end() ? found->second : known.emplace(device, ask(device)).first->second;
}

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return cudaStreamIsCapturing(stream, &status) == cudaSuccess &&
         status != cudaStreamCaptureStatusNone;
}

void copy_to_host(void* to, const void* from, size_t bytes, cudaStream_t stream) {
  int device = 0;
  cudaGetDevice(&device);
  check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream), "copying a mask",
             device);
  check_cuda(cudaStreamSynchronize(stream), "waiting for a mask", device);
}

}  // namespace throughtime
