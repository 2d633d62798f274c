// Weights in the order in which a walk reads them, and small helpers of both passes.
#pragma once

#include "common/cpu/matrix.h"
#include "common/cpu/team.h"
#include "recurrence/cpu/params.h"
#include "recurrence/cpu/plan.h"

namespace throughtime {
namespace {

// A row length in memory that keeps rows on 64-byte lines and off each other's cache sets.
template <typename Operand>
TT_INLINE int64_t leading_dimension(int64_t columns) {
  const int64_t line = most(64 / sizeof(Operand), Numbers<Operand>::kRun);
  const int64_t lines = divide_up(round_up(columns, Numbers<Operand>::kDepth), line);
  return (lines | 1) * line;
}

template <typename X>
TT_INLINE void copy_row(X* to, const X* from, int64_t count) {
  if (count == 1) {
    *to = *from;
  } else {
    std::memcpy(to, from, count * sizeof(X));
  }
}
template <int kParts>
TT_INLINE void copy_row(SplitFloat<kParts>* to, const float* from, int64_t count) {
  Numbers<SplitFloat<kParts>>::put_row(to, from, count);
}

// Rows of [row0, row0 + rows) that are inside their sequence at time t.
template <typename Input>
TT_INLINE int64_t active_rows(const Input& in, int64_t t, int64_t row0, int64_t rows) {
  if (in.lengths)
    while (rows > 0 && in.lengths[row0 + rows - 1] <= t) --rows;
  return rows;
}

// The row of a weight [G H, columns] at place n of the kernels' order of gate sums,
// [block][gate][element]; null past the last unit.
template <int G, typename S>
TT_INLINE const S* gate_row(const S* weight, int64_t H, int64_t columns, int64_t n) {
  constexpr int64_t L = kLanes<S>;
  const int64_t gate = n / L % G, unit = n / (G * L) * L + n % L;
  return unit < H ? weight + (gate * H + unit) * columns : nullptr;
}

// Gate sums of a step, of x and h at once. The unit of matrices adds h to the sum of x, so whether the two
// are one product changes no bit there; vectors have one chain of both, in another order.
template <int G, typename Operand, typename F>
TT_INLINE void sum_gates(const Term<Operand>& x, const Term<Operand>& h, int64_t rows,
                         const Target<SumOf<Operand>>& to, const F& begin) {
  if constexpr (Tiling<Operand>::kMatrixUnit) {
    sum_products<G, 2, Operand>({x, h}, rows, to, begin);
  } else {
    sum_products<G, 2, Operand>({h, x}, rows, to, begin);
  }
}

template <int G, typename S>
void pack_gate_bias(const S* bias, int64_t H, S* packed, Share blocks) {
  constexpr int64_t L = kLanes<S>;
  for (int64_t block = blocks.begin; block < blocks.end; ++block)
    for (int64_t gate = 0; gate < G; ++gate) {
      const S* from = bias ? bias + gate * H + block * L : nullptr;
      store(packed + (block * G + gate) * L, bias ? load_part(from, H - block * L) : Vec<S>{});
    }
}

}  // namespace
}  // namespace throughtime
