// What operators.cpp, which torch calls, asks of launch.cu, which nvcc compiles. Includes neither torch nor
// a kernel.
#pragma once

#include <functional>
#include <string>

#include <cuda_runtime_api.h>

#include "common/scalars.h"
#include "lstm/cuda/plan.h"

namespace throughtime {

// Why the kernels of this binary do not run on the current GPU, as one sentence; empty if they do.
std::string why_not(int device);

// The largest cluster of a persistent kernel on the current GPU, with all shared memory, in blocks.
int most_cluster_blocks(int device);

// Whether the current GPU has room for a plan's clusters or grid; a MIG partition may not.
bool has_room(const RecurrencePlan& plan);

// Tier kResident or kGrid; `workspace` is workspace_bytes() of GPU memory. Runs nothing and returns false if
// the blocks that wait for each other do not all find room: a server that shares the GPU, or a stream
// with a part of it, sets limits that has_room() does not see.
int64_t workspace_bytes(const RecurrencePlan& plan, const RecurrenceShape& shape);
template <typename S>
bool run_persistent(const RecurrencePlan& plan, RecurrenceForward<S> p, void* workspace,
                    cudaStream_t stream);
template <typename S>
bool run_persistent(const RecurrencePlan& plan, RecurrenceBackward<S> p, void* workspace,
                    cudaStream_t stream);

// Tier kStepwise; see launch_stepwise() in stepwise.cuh for the callbacks.
template <typename S>
void run_stepwise(const RecurrenceForward<S>& p, float* product,
                  const std::function<void(int64_t d, float* product)>& multiply,
                  cudaStream_t stream);
template <typename S>
void run_stepwise(const RecurrenceBackward<S>& p, float* product,
                  const std::function<bool(int64_t d, int64_t t)>& flows,
                  const std::function<void(int64_t d, int64_t t, float* product)>& multiply,
                  cudaStream_t stream);

}  // namespace throughtime
