#include "relevancy/cpu/kernels.h"

#include "relevancy/cpu/backward.h"
#include "relevancy/cpu/forward.h"
#include "relevancy/cpu/scores.h"

namespace throughtime {
namespace {

template <typename S>
void forward(const RelevancyForward<S>& args, const Runtime& runtime) {
  with_score(args.in, [&](auto score) {
    RelevancyForwardPass<S, decltype(score)>(args, score, runtime).run(runtime);
  });
}

template <typename S>
void backward(const RelevancyBackward<S>& args, const Runtime& runtime) {
  with_score(args.in, [&](auto score) {
    RelevancyBackwardPass<S, decltype(score)>(args, score, runtime).run(runtime);
  });
}

}  // namespace

extern const RelevancyKernels TT_KERNELS(relevancy);
const RelevancyKernels TT_KERNELS(relevancy) = {{forward<float>, forward<double>},
                                                {backward<float>, backward<double>}};

}  // namespace throughtime
