#include "relevancy/cpu/kernels.h"

#include "relevancy/cpu/backward.h"
#include "relevancy/cpu/forward.h"
#include "relevancy/cpu/product_backward.h"
#include "relevancy/cpu/product_forward.h"
#include "relevancy/cpu/scores.h"

namespace throughtime {
namespace {

template <typename S>
void forward(const RelevancyForward<S>& args, const Runtime& runtime) {
  if (args.in.score == ScoreKind::kDot) {
    ProductForwardPass<S>(args, runtime).run(runtime);
  } else {
    const ScoreAdditive<S> score{args.in.shape.D, args.in.score_weight};
    RelevancyForwardPass<S, ScoreAdditive<S>>(args, score, runtime).run(runtime);
  }
}

template <typename S>
void backward(const RelevancyBackward<S>& args, const Runtime& runtime) {
  if (args.in.score == ScoreKind::kDot) {
    ProductBackwardPass<S>(args, runtime).run(runtime);
  } else {
    const ScoreAdditive<S> score{args.in.shape.D, args.in.score_weight};
    RelevancyBackwardPass<S, ScoreAdditive<S>>(args, score, runtime).run(runtime);
  }
}

}  // namespace

extern const RelevancyKernels TT_KERNELS(relevancy);
const RelevancyKernels TT_KERNELS(relevancy) = {{forward<float>, forward<double>},
                                                {backward<float>, backward<double>}};

}  // namespace throughtime
