#include "relevancy/cpu/kernels.h"
#include "relevancy/cpu/product_backward.h"
#include "relevancy/cpu/product_forward.h"

namespace throughtime {
namespace {

void forward(const RelevancyForward<BFloat16>& args, const Runtime& runtime) {
  ProductForwardPass<BFloat16>(args, runtime).run(runtime);
}

void backward(const RelevancyBackward<BFloat16>& args, const Runtime& runtime) {
  ProductBackwardPass<BFloat16>(args, runtime).run(runtime);
}

}  // namespace

extern const RelevancyBFloat16Kernels TT_KERNELS(relevancy_bfloat16);
const RelevancyBFloat16Kernels TT_KERNELS(relevancy_bfloat16) = {forward, backward};

}  // namespace throughtime
