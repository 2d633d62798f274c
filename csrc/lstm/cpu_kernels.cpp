// Compiled once per instruction set, with -DTT_ISA=<its name>.
#include "cpu_kernels.h"

#include "cpu_backward.h"
#include "cpu_forward.h"

#define TT_NAME_(isa) cpu_kernels_##isa
#define TT_NAME(isa) TT_NAME_(isa)
#define TT_TEXT_(isa) #isa
#define TT_TEXT(isa) TT_TEXT_(isa)

namespace throughtime {
namespace {

template <typename S>
void lstm_forward(const LstmForward<S>& args, const Runtime& runtime) {
  Forward<S> run(args, runtime);
}

template <typename S>
void lstm_backward(const LstmBackward<S>& args, const Runtime& runtime) {
  Backward<S> run(args, runtime);
}

template <typename S>
void nonlinearity(S* values, int64_t count, bool is_tanh) {
  for (int64_t at = 0; at < count; at += kLanes<S>) {
    const Vec<S> x = load_part(values + at, count - at);
    store_part(values + at, is_tanh ? tanh<S>(x) : sigmoid<S>(x), count - at);
  }
}

}  // namespace

extern const CpuKernels TT_NAME(TT_ISA);
const CpuKernels TT_NAME(TT_ISA) = {
    TT_TEXT(TT_ISA),      kVectorBytes,          lstm_forward<float>, lstm_forward<double>,
    lstm_backward<float>, lstm_backward<double>, nonlinearity<float>, nonlinearity<double>};

}  // namespace throughtime
