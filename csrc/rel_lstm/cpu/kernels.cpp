#include "rel_lstm/cpu/kernels.h"

#include "rel_lstm/cpu/backward.h"
#include "rel_lstm/cpu/forward.h"

namespace throughtime {
namespace {

template <typename S>
void forward(const RelLstmForward<S>& args, const Runtime& runtime) {
  RelLstmForwardPass<S>(args, runtime).run(runtime);
}

template <typename S>
void backward(const RelLstmBackward<S>& args, const Runtime& runtime) {
  RelLstmBackwardPass<S>(args, runtime).run(runtime);
}

}  // namespace

extern const RelLstmKernels TT_KERNELS(rel_lstm);
const RelLstmKernels TT_KERNELS(rel_lstm) = {{forward<float>, forward<double>},
                                             {backward<float>, backward<double>}};

}  // namespace throughtime
