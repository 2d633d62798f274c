#include "common/cpu/rate.h"
#include "lstm/cpu/cell.h"
#include "lstm/cpu/kernels.h"
#include "recurrence/cpu/backward.h"
#include "recurrence/cpu/forward.h"

namespace throughtime {
namespace {

static_assert(Saved<LstmCell<float>, BFloat16>::kVectors == kLstmBFloat16Saved);

void forward(const LstmForward<BFloat16>& args, const Runtime& runtime) {
  ForwardWalk<LstmCell<float>, BFloat16>(args, runtime).run(runtime);
}

void backward(const LstmBackward<BFloat16>& args, const Runtime& runtime) {
  BackwardWalk<LstmCell<float>, BFloat16>(args, runtime).run(runtime);
}

}  // namespace

extern const LstmBFloat16Kernels TT_KERNELS(lstm_bfloat16);
const LstmBFloat16Kernels TT_KERNELS(lstm_bfloat16) = {forward, backward, multiply_adds<BFloat16>};

}  // namespace throughtime
