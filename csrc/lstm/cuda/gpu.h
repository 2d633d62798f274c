// CUDA on the host, apart from launches: the GPU's properties, errors as messages, small copies.
#pragma once

#include <stdexcept>
#include <string>

#include <cuda_runtime_api.h>

#include "lstm/cuda/plan.h"

namespace throughtime {

// The call that CUDA refused, the GPU, and the way out.
struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws CudaError: "throughtime: <doing> failed on <GPU>: <CUDA's message>; <way out>".
void check_cuda(cudaError_t status, const std::string& doing, int device);

// "NVIDIA H100 80GB HBM3 (sm_90)"
std::string name_of(int device);

// What plan() needs to know of the current GPU, which is `device`; queried once.
const Gpu& gpu_of(int device);

// True while the stream records a CUDA graph, which must not depend on values on the host.
bool is_capturing(cudaStream_t stream);

// GPU memory into host memory, after all earlier work on the stream.
void copy_to_host(void* to, const void* from, size_t bytes, cudaStream_t stream);

}  // namespace throughtime
