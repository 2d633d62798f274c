#include "relevancy/cpu/kernels.h"

#include "relevancy/cpu/backward.h"
#include "relevancy/cpu/forward.h"

namespace throughtime {
namespace {

template <typename S>
void forward(const RelevancyForward<S>& args, const Runtime& runtime) {
  RelevancyForwardPass<S> run(args, runtime);
}

template <typename S>
void backward(const RelevancyBackward<S>& args, const Runtime& runtime) {
  RelevancyBackwardPass<S> run(args, runtime);
}

}  // namespace

extern const RelevancyKernels TT_KERNELS(relevancy);
const RelevancyKernels TT_KERNELS(relevancy) = {{forward<float>, forward<double>},
                                                {backward<float>, backward<double>}};

}  // namespace throughtime
