#include "rel_lstm/cpu/backward.h"
#include "rel_lstm/cpu/forward.h"
#include "rel_lstm/cpu/kernels.h"

namespace throughtime {
namespace {

void forward(const RelLstmForward<BFloat16>& args, const Runtime& runtime) {
  RelLstmForwardPass<float, BFloat16>(args, runtime).run(runtime);
}

void backward(const RelLstmBackward<BFloat16>& args, const Runtime& runtime) {
  RelLstmBackwardPass<float, BFloat16>(args, runtime).run(runtime);
}

}  // namespace

extern const RelLstmBFloat16Kernels TT_KERNELS(rel_lstm_bfloat16);
const RelLstmBFloat16Kernels TT_KERNELS(rel_lstm_bfloat16) = {forward, backward};

}  // namespace throughtime
