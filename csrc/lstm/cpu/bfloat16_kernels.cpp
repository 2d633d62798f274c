#include "lstm/cpu/cell.h"
#include "lstm/cpu/kernels.h"
#include "recurrence/cpu/backward.h"
#include "recurrence/cpu/forward.h"

namespace throughtime {
namespace {

static_assert(Saved<LstmCell<float>, BFloat16>::kVectors == kLstmBFloat16Saved);

void forward(const LstmForward<BFloat16>& args, const Runtime& runtime) {
  ForwardWalk<LstmCell<float>, BFloat16>(args, runtime).run(runtime);
}

void backward(const LstmBackward<BFloat16>& args, const Runtime& runtime) {
  BackwardWalk<LstmCell<float>, BFloat16>(args, runtime).run(runtime);
}

int64_t multiply_adds(int64_t repeats) {
  constexpr int64_t kRows = Tiling<BFloat16>::kRows, kColumns = kPanelVectors * kLanes<float>;
  constexpr int64_t kDepth = 32, kTerms = kChain / kDepth;
  alignas(kVectorBytes) BFloat16 rows[kRows * kDepth], panel[kDepth * kColumns];
  // Numbers from 1 to 2: zeros cost less power, and the clock would not fall as it does in use.
  const auto number = [](int64_t i) { return BFloat16{static_cast<uint16_t>(0x3f80 + i % 127)}; };
  for (int64_t i = 0; i < kRows * kDepth; ++i) rows[i] = number(i);
  for (int64_t i = 0; i < kDepth * kColumns; ++i) panel[i] = number(i);
  Term<BFloat16> terms[kTerms];
  for (auto& term : terms) term = {{rows, kDepth, kDepth}, panel};
  TileBuffer<float, kRows> sums;
  const MatrixUnit unit;
  for (int64_t n = 0; n < repeats; ++n) {
    asm volatile("" ::: "memory");  // the operands may have changed: nothing is hoisted
    sum_products<kPanelVectors>(terms, kRows, Target<float>{sums.numbers, kColumns}, [](int) {});
  }
  asm volatile("" ::"r"(sums.numbers) : "memory");
  return repeats * kRows * kColumns * kDepth * kTerms;
}

}  // namespace

extern const LstmBFloat16Kernels TT_KERNELS(lstm_bfloat16);
const LstmBFloat16Kernels TT_KERNELS(lstm_bfloat16) = {forward, backward, multiply_adds};

}  // namespace throughtime
