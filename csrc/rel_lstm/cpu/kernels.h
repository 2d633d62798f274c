// The RelLSTM's CPU kernels of one instruction set.
#pragma once

#include "common/cpu/kernels.h"
#include "rel_lstm/cpu/params.h"

namespace throughtime {

struct RelLstmKernels {
  Kernel<RelLstmForward> forward;
  Kernel<RelLstmBackward> backward;
};

// Those of the instruction set that runs.
const RelLstmKernels& rel_lstm_kernels();

}  // namespace throughtime
