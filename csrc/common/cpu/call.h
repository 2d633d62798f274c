// One call of a CPU operator: threads, memory, and where its time goes.
#pragma once

#include <initializer_list>

#include "common/cpu/runtime.h"
#include "common/scalars.h"
#include "common/tensors.h"

namespace throughtime {

// pool_acquire for the running operator: raises torch's kind of error if there is no memory.
void* acquire(size_t bytes);

// Raises it, with the operator's name, the bytes and the way out.
[[noreturn]] void out_of_memory(double bytes);

Runtime cpu_runtime();  // without a profile

// An operator whose calls are profiled; each file that implements operators has one of them each.
class Operator {
 public:
  explicit Operator(const char* name);  // as in torch.ops.throughtime
  Operator(const Operator&) = delete;
  Operator& operator=(const Operator&) = delete;

  const char* const name;
  Profile profile{};
  Operator* const next;  // of the list of all operators
};

// The operator of that name, or null.
const Operator* operator_named(const char* name);

// Starts all profiles anew, or stops profiling. Not while an operator runs.
void set_profiling(bool on);

// The runtime of one call of an operator; its life is the time of the call.
class Call {
 public:
  explicit Call(Operator& op);
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  void checked();    // the arguments are: what follows is allocation
  void allocated();  // what follows is the kernel
  const Runtime& runtime() const { return runtime_; }

 private:
  Runtime runtime_;
  int64_t start_, last_;
};

// An uninitialised contiguous CPU tensor of a dtype that operators take. Its memory is from the pool
// where this torch can take it (2.11 or later), else from torch.
Tensor pooled(std::initializer_list<int64_t> sizes, ScalarType dtype);

// The one bias of the kernels: the sum of those that are there, float32 or float64; dense.
OptionalTensor sum_of(const OptionalTensor& bias_ih, const OptionalTensor& bias_hh);

// A contiguous tensor in another dtype, from bfloat16 to float32 or back; itself if it has the dtype.
Tensor converted(const Tensor& tensor, ScalarType dtype);
OptionalTensor converted(const OptionalTensor& tensor, ScalarType dtype);

// The dtype in which numbers of a dtype are added up.
ScalarType sums_of(ScalarType dtype);

// The argument has a dtype that operators take; bfloat16 only where kernels multiply it.
void check_dtype(const char* argument, const Tensor& tensor, bool bfloat16);

// The dtype that weights should have: of the input, or that of the sums, as autocast has them.
ScalarType weight_dtype(const Tensor& input, const Tensor& weight);

// visit(S{}) for the type of the numbers, float32 or float64.
template <typename Visit>
void with_real(ScalarType dtype, const Visit& visit) {
  if (dtype == ScalarType::Float) {
    visit(float{});
  } else {
    visit(double{});
  }
}

// The same, or bfloat16.
template <typename Visit>
void with_number(ScalarType dtype, const Visit& visit) {
  if (dtype == ScalarType::BFloat16) {
    visit(BFloat16{});
  } else {
    with_real(dtype, visit);
  }
}

}  // namespace throughtime
