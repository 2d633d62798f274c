// A trace as the tensors that an operator returns.
#pragma once

#include "common/cpu/call.h"
#include "common/tensors.h"
#include "recurrence/cpu/trace.h"

namespace throughtime {

// The whole gradients of h_t and c_t of every n-th step; `every` is what the operator is given.
struct TraceTensors {
  int64_t every;
  Tensor h, c;

  void check() const { TT_CHECK_CALL(every > 0, "trace_every should be at least 1, got ", every); }

  // For T steps of B samples; zeros if a kernel may leave steps out.
  void make(int64_t T, int64_t B, int64_t outputs, int64_t units, ScalarType dtype, bool zeros) {
    const int64_t steps = traced_steps(T, every);
    h = pooled({steps, B, outputs}, dtype);
    c = pooled({steps, B, units}, dtype);
    if (!zeros) return;
    for (const Tensor& x : {h, c}) fill_zero(x);
  }

  // What the kernels get of a trace that may not be wanted.
  template <typename S>
  static Trace<S> of(const TraceTensors* trace) {
    if (!trace) return {};
    return {mutable_data<S>(trace->h), mutable_data<S>(trace->c), trace->every};
  }
};

}  // namespace throughtime
