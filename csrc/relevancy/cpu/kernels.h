// Relevancy attention's CPU kernels of one instruction set.
#pragma once

#include "common/cpu/kernels.h"
#include "relevancy/cpu/params.h"

namespace throughtime {

struct RelevancyKernels {
  Kernel<RelevancyForward> forward;
  Kernel<RelevancyBackward> backward;
};

// With bfloat16 operands, for the score that is a product: of instruction sets that multiply them
// faster than float32.
struct RelevancyBFloat16Kernels {
  void (*forward)(const RelevancyForward<BFloat16>& args, const Runtime& runtime);
  void (*backward)(const RelevancyBackward<BFloat16>& args, const Runtime& runtime);
};

// Those of the instruction set that runs; the latter null if it has none.
const RelevancyKernels& relevancy_kernels();
const RelevancyBFloat16Kernels* relevancy_bfloat16_kernels();

}  // namespace throughtime
