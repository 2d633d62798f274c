// Tensors at the border between torch (stable ABI) and the CPU kernels.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace throughtime {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// An optional argument: an optional tensor that only an optional tensor makes.
struct Maybe : OptionalTensor {
  Maybe() = default;
  explicit Maybe(OptionalTensor tensor) : OptionalTensor(std::move(tensor)) {}
};

// The operator that this thread runs, as messages name it.
extern thread_local const char* running_operator;

// RuntimeError of these words put together; STD_TORCH_CHECK would put file and line before them.
template <typename... Words>
[[noreturn]] void raise(const Words&... words) {
  std::ostringstream text;
  (text << ... << words);
  throw std::runtime_error(text.str());
}
#define TT_CHECK(truth, ...) \
  if (!(truth)) throughtime::raise(__VA_ARGS__)
// The same, with the running operator's name before the words.
#define TT_CHECK_CALL(truth, ...) \
  TT_CHECK(truth, "throughtime::", throughtime::running_operator, ": ", __VA_ARGS__)

// Raises "throughtime::op: argument should have shape [..], got [..]" if any size differs. Sizes are below
// kTooMany.
void check_shape(const char* argument, const Tensor& tensor, std::initializer_list<int64_t> wanted);
void check_dtype(const char* argument, const Tensor& tensor, ScalarType wanted);
void check_cpu(const char* argument, const Tensor& tensor);

// Raises unless the tensor is one, with as many dimensions as `letters` names: "[T, B, I]".
void check_dims(const char* argument, const Tensor& tensor, const char* letters);

// All of these, and that the tensor's storage, which can be resized, still holds it.
void check_argument(const char* argument, const Tensor& tensor,
                    std::initializer_list<int64_t> wanted, ScalarType dtype);
void check_argument(const char* argument, const OptionalTensor& tensor,
                    std::initializer_list<int64_t> wanted, ScalarType dtype);

// Raises unless the tensor is float32 or float64.
void check_real(const char* argument, const Tensor& tensor);

// The tensor itself if it is contiguous, else a contiguous copy.
Tensor dense(const Tensor& tensor);
OptionalTensor dense(const OptionalTensor& tensor);

// Bytes of a number of one of the dtypes that operators take.
int64_t bytes_of(ScalarType dtype);

void fill_zero(const Tensor& tensor);

// Copies a contiguous tensor into another of the same size and dtype.
void copy(const Tensor& from, const Tensor& to);

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
