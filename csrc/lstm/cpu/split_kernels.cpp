#include "common/cpu/rate.h"
#include "lstm/cpu/cell.h"
#include "lstm/cpu/kernels.h"
#include "recurrence/cpu/backward.h"
#include "recurrence/cpu/forward.h"

namespace throughtime {
namespace {

// f(SplitFloat<parts>{}).
template <typename F>
auto with_parts(int parts, const F& f) {
  if (parts == 1) return f(SplitFloat<1>{});
  if (parts == 2) return f(SplitFloat<2>{});
  return f(SplitFloat<3>{});
}

void forward(const LstmForward<float>& args, int parts, const Runtime& runtime) {
  with_parts(parts, [&](auto operand) {
    ForwardWalk<LstmCell<float>, decltype(operand)>(args, runtime).run(runtime);
  });
}

void backward(const LstmBackward<float>& args, int parts, const Runtime& runtime) {
  with_parts(parts, [&](auto operand) {
    BackwardWalk<LstmCell<float>, decltype(operand)>(args, runtime).run(runtime);
  });
}

int64_t multiply_adds_of(int64_t repeats, int parts) {
  return with_parts(parts, [&](auto operand) { return multiply_adds<decltype(operand)>(repeats); });
}

}  // namespace

extern const LstmSplitKernels TT_KERNELS(lstm_split);
const LstmSplitKernels TT_KERNELS(lstm_split) = {forward, backward, multiply_adds_of};

}  // namespace throughtime
