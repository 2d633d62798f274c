// recurrence/cpu/: a walk through time with a cell that the package does not have, tanh_cell.h, and
// with operands of 16 bits.
#include "export.h"
#include "recurrence/cpu/backward.h"
#include "recurrence/cpu/forward.h"
#include "tanh_cell.h"
#include "walk_calls.h"

using namespace throughtime;

namespace {

struct TanhKernels {
  template <typename X>
  static void run(const WalkForward<X>& pass, const int64_t*, const Runtime& runtime) {
    ForwardWalk<TanhCell<SumOf<X>>, X>(pass, runtime).run(runtime);
  }
  template <typename X>
  static void run(const WalkBackward<X>& pass, const int64_t*, const Runtime& runtime) {
    BackwardWalk<TanhCell<SumOf<X>>, X>(pass, runtime).run(runtime);
  }
};

template <typename X>
int64_t saved_size(const X*, const int64_t* sizes) {
  return saved_activations(shape_of(sizes), TanhCell<SumOf<X>>::kSaved);
}
template <typename X>
void forward(const int64_t* sizes, void* const* arguments) {
  run_forward<X, TanhKernels>(sizes, arguments);
}
template <typename X>
void backward(const int64_t* sizes, void* const* arguments) {
  run_backward<X, TanhKernels>(sizes, arguments);
}

}  // namespace

EXPORT(saved_size)
EXPORT(forward)
EXPORT(backward)
EXPORT_AS(saved_size_bf16, saved_size<BFloat16>)
EXPORT_AS(forward_bf16, forward<BFloat16>)
EXPORT_AS(backward_bf16, backward<BFloat16>)
