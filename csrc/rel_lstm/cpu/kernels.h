// The RelLSTM's CPU kernels of one instruction set.
#pragma once

#include "common/cpu/kernels.h"
#include "rel_lstm/cpu/params.h"

namespace throughtime {

struct RelLstmKernels {
  Kernel<RelLstmForward> forward;
  Kernel<RelLstmBackward> backward;
};

// With bfloat16 operands: of instruction sets that multiply them faster than float32.
struct RelLstmBFloat16Kernels {
  void (*forward)(const RelLstmForward<BFloat16>& args, const Runtime& runtime);
  void (*backward)(const RelLstmBackward<BFloat16>& args, const Runtime& runtime);
};

// Those of the instruction set that runs; the latter null if it has none.
const RelLstmKernels& rel_lstm_kernels();
const RelLstmBFloat16Kernels* rel_lstm_bfloat16_kernels();

}  // namespace throughtime
