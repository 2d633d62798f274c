// Relevancy attention's CPU kernels of one instruction set.
#pragma once

#include "../common/kernels.h"
#include "params.h"

namespace throughtime {

struct RelevancyKernels {
  Kernel<RelevancyForward> forward;
  Kernel<RelevancyBackward> backward;
};

}  // namespace throughtime
