// How fast products are: for `bench` and `explain`.
#pragma once

#include "common/cpu/matrix.h"

namespace throughtime {
namespace {

// Multiplies tiles that lie in the first-level cache; returns the number of multiply-adds.
template <typename Operand>
int64_t multiply_adds(int64_t repeats) {
  constexpr int64_t kRows = Tiling<Operand>::kRows, kColumns = kPanelVectors * kLanes<float>;
  constexpr int64_t kDepth = 32, kTerms = kChain / kDepth;
  alignas(kVectorBytes) Operand rows[kRows * kDepth], panel[kDepth * kColumns];
  // Numbers from 1 to 2: zeros cost less power, and the clock would not fall as it does in use.
  const auto fill = [](void* numbers, size_t bytes) {
    for (size_t i = 0; i < bytes / 2; ++i)
      static_cast<uint16_t*>(numbers)[i] = static_cast<uint16_t>(0x3f80 + i % 127);
  };
  fill(rows, sizeof rows);
  fill(panel, sizeof panel);
  Term<Operand> terms[kTerms];
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
}  // namespace throughtime
