// Tensors at the border between torch (stable ABI) and the CPU kernels.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace throughtime {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Raises "op: argument should have shape [..], got [..]" if any size differs.
void check_shape(const char* op, const char* argument, const Tensor& tensor,
                 std::initializer_list<int64_t> wanted);
void check_dtype(const char* op, const char* argument, const Tensor& tensor, ScalarType wanted);
void check_cpu(const char* op, const char* argument, const Tensor& tensor);

// The tensor itself if it is contiguous, else a contiguous copy.
Tensor dense(const Tensor& tensor);
OptionalTensor dense(const OptionalTensor& tensor);

// An uninitialised contiguous CPU tensor of float, double or int64, its memory from the pool where this torch can take it
// (2.11 or later), else from torch.
Tensor pooled(std::initializer_list<int64_t> sizes, ScalarType dtype);

void fill_zero(const Tensor& tensor);

// Copies a contiguous tensor into another of the same size and dtype.
void copy(const Tensor& from, const Tensor& to);

// The one bias of the kernels: the sum of those that are there, float32 or float64; dense.
OptionalTensor sum_of(const OptionalTensor& bias_ih, const OptionalTensor& bias_hh);

template <typename S>
const S* data(const Tensor& tensor) {
  return static_cast<const S*>(tensor.const_data_ptr());
}

template <typename S>
const S* data(const OptionalTensor& tensor) {
  return tensor ? data<S>(*tensor) : nullptr;
}

template <typename S>
S* mutable_data(const Tensor& tensor) {
  return static_cast<S*>(tensor.mutable_data_ptr());
}

}  // namespace throughtime
