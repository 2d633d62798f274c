// Relevancy attention's CPU kernels of one instruction set.
#pragma once

#include "common/cpu/kernels.h"
#include "relevancy/cpu/params.h"

namespace throughtime {

struct RelevancyKernels {
  Kernel<RelevancyForward> forward;
  Kernel<RelevancyBackward> backward;
};

// Those of the instruction set that runs.
const RelevancyKernels& relevancy_kernels();

}  // namespace throughtime
