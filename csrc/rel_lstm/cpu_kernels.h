// The RelLSTM's CPU kernels of one instruction set.
#pragma once

#include "../common/kernels.h"
#include "params.h"

namespace throughtime {

struct RelLstmKernels {
  Kernel<RelLstmForward> forward;
  Kernel<RelLstmBackward> backward;
};

}  // namespace throughtime
