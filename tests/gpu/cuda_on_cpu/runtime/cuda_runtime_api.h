// A fake of the part of CUDA's runtime that csrc/lstm/cuda/launch.cu and gpu.cpp call. It launches nothing and
// records every limit that is set.
#pragma once

#include <cstddef>
#include <map>
#include <utility>

struct CUstream_st;
using cudaStream_t = CUstream_st*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorInvalidClusterSize = 912
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrClusterLaunch,
  cudaDevAttrClockRate,
  cudaDevAttrMemoryClockRate,
  cudaDevAttrGlobalMemoryBusWidth,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributeNonPortableClusterSizeAllowed
};
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative, cudaLaunchAttributeClusterDimension };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone };
enum cudaMemcpyKind { cudaMemcpyDeviceToHost };

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1) : x(x_), y(1), z(1) {}  // NOLINT: as in CUDA
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
struct cudaFuncAttributes {};
struct cudaDeviceProp {
  const char* name = "a fake GPU";
  int major = 9, minor = 0;
};

struct FakeGpu {
  int device = 0;
  std::map<cudaDeviceAttr, int> attributes;
  int blocks_at_once = 1;              // on a multiprocessor
  int most_cluster = 16;               // blocks of a cluster that finds room
  cudaError_t launched = cudaSuccess;  // the status of a launch
  cudaError_t last = cudaSuccess;
  int launches = 0;
  // By kernel and device: the shared memory that a block may have, and how often it was set.
  std::map<std::pair<const void*, int>, std::pair<int, int>> shared;
};
inline FakeGpu fake;

inline cudaError_t cudaGetDevice(int* device) { return *device = fake.device, cudaSuccess; }
inline cudaError_t cudaGetLastError() { return std::exchange(fake.last, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t) { return "a fake error"; }
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp*, int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  return *value = fake.attributes[name], cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute name, int value) {
  if (name == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    auto& [bytes, times] = fake.shared[{reinterpret_cast<const void*>(kernel), fake.device}];
    bytes = value;
    ++times;
  }
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaMemcpyAsync(void*, const void*, size_t, cudaMemcpyKind, cudaStream_t) {
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus*) {
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  return *blocks = fake.blocks_at_once, cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel*, const cudaLaunchConfig_t* how) {
  const unsigned wanted = how->numAttrs > 0 ? how->attrs->val.clusterDim.x : 1;
  return *clusters = static_cast<int>(wanted) <= fake.most_cluster ? 1 : 0, cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxPotentialClusterSize(int* blocks, Kernel*, const cudaLaunchConfig_t*) {
  return *blocks = fake.most_cluster, cudaSuccess;
}
template <typename Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* how, void (*kernel)(Params),
                               const Params&) {
  ++fake.launches;
  const auto found = fake.shared.find({reinterpret_cast<const void*>(kernel), fake.device});
  const size_t most = found == fake.shared.end() ? 48 << 10 : found->second.first;
  return fake.last = how->dynamicSmemBytes > most ? cudaErrorInvalidValue : fake.launched;
}
inline cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
  return cudaSuccess;
}
