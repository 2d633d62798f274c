// lstm/cpu/bfloat16_kernels.cpp: the LSTM with bfloat16 operands, also on a stand-in for AMX.
#include "export.h"
#include "lstm/cpu/bfloat16_kernels.cpp"
#include "walk_calls.h"

using namespace throughtime;

namespace {

size_t scratch[2];  // bytes of the last forward, of the last backward

struct BFloat16Kernels {
  static void run(const LstmForward<BFloat16>& pass, const int64_t*, const Runtime& runtime) {
    TT_KERNELS(lstm_bfloat16).forward(pass, runtime);
    scratch[0] = last_acquired;
  }
  static void run(const LstmBackward<BFloat16>& pass, const int64_t*, const Runtime& runtime) {
    TT_KERNELS(lstm_bfloat16).backward(pass, runtime);
    scratch[1] = last_acquired;
  }
};

int64_t scratch_bytes(int64_t backward) { return scratch[backward]; }

int64_t saved_size(const BFloat16*, const int64_t* sizes) {
  return saved_activations<BFloat16>(shape_of(sizes), sizes[7] != 0);
}

}  // namespace

EXPORT_AS(saved_size_bf16, saved_size)
EXPORT_PLAIN(scratch_bytes)
EXPORT_AS(forward_bf16, run_forward<BFloat16, BFloat16Kernels>)
EXPORT_AS(backward_bf16, run_backward<BFloat16, BFloat16Kernels>)
