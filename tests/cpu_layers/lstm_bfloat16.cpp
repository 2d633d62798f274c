// lstm/cpu/bfloat16_kernels.cpp: the LSTM with bfloat16 operands, also on a stand-in for AMX.
#include "export.h"
#include "lstm/cpu/bfloat16_kernels.cpp"
#include "lstm_calls.h"

using namespace throughtime;

namespace {

struct BFloat16Kernels {
  static void run(const LstmForward<BFloat16>& pass, const int64_t*, const Runtime& runtime) {
    TT_KERNELS(lstm_bfloat16).forward(pass, runtime);
  }
  static void run(const LstmBackward<BFloat16>& pass, const int64_t*, const Runtime& runtime) {
    TT_KERNELS(lstm_bfloat16).backward(pass, runtime);
  }
};

}  // namespace

EXPORT_AS(saved_size_bf16, saved_size<BFloat16>)
EXPORT_AS(forward_bf16, run_forward<BFloat16, BFloat16Kernels>)
EXPORT_AS(backward_bf16, run_backward<BFloat16, BFloat16Kernels>)
