// Starts the GPU kernels. Compiled once per dtype, TT_SCALAR: device::BFloat16, device::Float16, float.
#include <mutex>
#include <set>
#include <utility>

#include "lstm/cuda/gpu.h"
#include "lstm/cuda/launch.h"
#include "lstm/cuda/persistent.cuh"
#include "lstm/cuda/stepwise.cuh"

namespace throughtime {
namespace {

int current_device() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "asking for the current GPU", device);
  return device;
}

constexpr int64_t kArrivalBytes = 256;  // the exchange begins at a multiple of it

int64_t arrival_bytes(const RecurrencePlan& plan) {
  return round_up(4 * plan.directions * plan.partition.groups * kArrivalStride, kArrivalBytes);
}

// Blocks in clusters, or all of them co-resident, with more shared memory than the default.
struct LaunchConfig {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};

  LaunchConfig(const RecurrencePlan& plan, cudaStream_t stream) {
    config.gridDim = dim3(plan.blocks());
    config.blockDim = dim3(plan.threads);
    config.dynamicSmemBytes = plan.shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    if (plan.tier == Tier::kGrid) {
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
      config.numAttrs = 1;
    } else if (plan.cluster() > 1) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {static_cast<unsigned>(plan.cluster()), 1, 1};
      config.numAttrs = 1;
    }
  }
};

// Allows the kernel all the shared memory, and the largest clusters, that the GPU has. Once per kernel
// and GPU: host threads would race if each launch set what it needs.
void allow(const void* kernel, int device) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device}) > 0) return;
  const auto ask = [device](cudaDeviceAttr name) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, name, device), "asking for a GPU's properties",
               device);
    return value;
  };
  const int shared_bytes = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
      "asking for " + std::to_string(shared_bytes) + " bytes of shared memory", device);
  if (ask(cudaDevAttrClusterLaunch) != 0) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
               "asking for clusters of more than 8 blocks", device);
  }
  allowed.insert({kernel, device});
}

template <typename Params>
bool run(const RecurrencePlan& plan, Params p, void* workspace, cudaStream_t stream) {
  const int device = current_device();
  p.in.partition = plan.partition;
  if (plan.tier == Tier::kGrid) {
    p.in.partition.arrivals = static_cast<unsigned*>(workspace);
    p.in.partition.exchange = static_cast<char*>(workspace) + arrival_bytes(plan);
    check_cuda(cudaMemsetAsync(workspace, 0, arrival_bytes(plan), stream),
               "clearing the counters of a grid barrier", device);
  }
  cudaError_t status = cudaSuccess;
  const bool exists = launch_persistent(plan, p, [&](auto kernel, const auto& arguments) {
    allow(reinterpret_cast<const void*>(kernel), device);
    const LaunchConfig launch(plan, stream);
    status = cudaLaunchKernelEx(&launch.config, kernel, arguments);
  });
  if (!exists) throw CudaError("throughtime: the plan names a kernel that was not built");
  if (status == cudaErrorCooperativeLaunchTooLarge || status == cudaErrorInvalidClusterSize) {
    cudaGetLastError();  // else the next call would report it again
    return false;
  }
  check_cuda(status,
             "starting " + std::to_string(plan.blocks()) + " blocks of " +
                 std::to_string(plan.threads) + " threads with " +
                 std::to_string(plan.shared_bytes) + " bytes of shared memory in clusters of " +
                 std::to_string(plan.cluster()),
             device);
  return true;
}

auto step_launcher(int64_t threads, cudaStream_t stream) {
  return [=](auto kernel, auto arguments) {
    const auto blocks = static_cast<unsigned>(divide_up(threads, kStepThreads));
    void* pointers[] = {&arguments};
    check_cuda(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(blocks),
                                dim3(kStepThreads), pointers, 0, stream),
               "starting the kernel of a step", current_device());
  };
}

}  // namespace

template <typename S>
bool run_persistent(const RecurrencePlan& plan, RecurrenceForward<S> p, void* workspace,
                    cudaStream_t stream) {
  return run(plan, p, workspace, stream);
}
template <typename S>
bool run_persistent(const RecurrencePlan& plan, RecurrenceBackward<S> p, void* workspace,
                    cudaStream_t stream) {
  return run(plan, p, workspace, stream);
}

template <typename S>
void run_stepwise(const RecurrenceForward<S>& p, float* product,
                  const std::function<void(int64_t, float*)>& multiply, cudaStream_t stream) {
  launch_stepwise(p, product, multiply, step_launcher(p.in.D * p.in.B * p.in.H, stream));
}
template <typename S>
void run_stepwise(const RecurrenceBackward<S>& p, float* product,
                  const std::function<bool(int64_t, int64_t)>& flows,
                  const std::function<void(int64_t, int64_t, float*)>& multiply,
                  cudaStream_t stream) {
  launch_stepwise(p, product, flows, multiply, step_launcher(p.in.D * p.in.B * p.in.H, stream));
}

template bool run_persistent(const RecurrencePlan&, RecurrenceForward<TT_SCALAR>, void*,
                             cudaStream_t);
template bool run_persistent(const RecurrencePlan&, RecurrenceBackward<TT_SCALAR>, void*,
                             cudaStream_t);
template void run_stepwise(const RecurrenceForward<TT_SCALAR>&, float*,
                           const std::function<void(int64_t, float*)>&, cudaStream_t);
template void run_stepwise(const RecurrenceBackward<TT_SCALAR>&, float*,
                           const std::function<bool(int64_t, int64_t)>&,
                           const std::function<void(int64_t, int64_t, float*)>&, cudaStream_t);

#if defined(TT_FIRST_SCALAR)  // once in the module

int64_t workspace_bytes(const RecurrencePlan& plan, const RecurrenceShape& shape) {
  return plan.tier == Tier::kGrid ? arrival_bytes(plan) + plan.exchange_bytes(shape) : 0;
}

std::string why_not(int device) {
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, lstm_step_forward<TT_SCALAR>);
  if (status == cudaSuccess) return "";
  cudaGetLastError();
  return "this installation has no code for " + name_of(device) + " (" +
         cudaGetErrorString(status) +
         "): it was compiled for " TT_ARCHITECTURES
         "; reinstall where TORCH_CUDA_ARCH_LIST names this GPU's architecture";
}

bool has_room(const RecurrencePlan& plan) {
  if (plan.tier == Tier::kResident && plan.cluster() == 1) return true;
  const int device = current_device();
  // Any instance will do: threads and shared memory are those of the plan.
  const auto kernel = &lstm_walk_forward<TT_SCALAR, 1, 0, false>;
  allow(reinterpret_cast<const void*>(kernel), device);
  int room = 0, multiprocessors = 0;
  cudaError_t status = cudaSuccess;
  if (plan.tier == Tier::kGrid) {
    check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
               "asking for a GPU's properties", device);
    status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&room, kernel, plan.threads,
                                                           plan.shared_bytes);
    room = room * multiprocessors >= plan.blocks() ? 1 : 0;
  } else {
    const LaunchConfig launch(plan, nullptr);
    status = cudaOccupancyMaxActiveClusters(&room, kernel, &launch.config);
  }
  cudaGetLastError();
  return status == cudaSuccess && room > 0;
}

int most_cluster_blocks(int device) {
  int shared_bytes = 0, most = 1;
  check_cuda(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             "asking for a GPU's properties", device);
  const auto kernel = &lstm_walk_forward<TT_SCALAR, 1, 0, false>;
  allow(reinterpret_cast<const void*>(kernel), device);
  RecurrencePlan plan{};
  plan.tier = Tier::kResident;
  plan.directions = plan.partition.groups = 1;
  plan.partition.ranks = 16;
  plan.threads = most_threads(sizeof(TT_SCALAR), 1, 0);
  plan.shared_bytes = shared_bytes;
  const LaunchConfig launch(plan, nullptr);
  check_cuda(cudaOccupancyMaxPotentialClusterSize(&most, kernel, &launch.config),
             "asking for the largest cluster", device);
  return most;
}

#endif

}  // namespace throughtime
