// The arguments of the CPU LSTM kernels: those of a walk through time, with 4 gates.
#pragma once

#include "recurrence/cpu/params.h"

namespace throughtime {

using LstmShape = WalkShape;
template <typename S>
using LstmInput = WalkInput<S>;
template <typename S>
using LstmForward = WalkForward<S>;
template <typename S>
using LstmBackward = WalkBackward<S>;

constexpr int kLstmGates = 4;
// Saved for the backward pass, per step, row and unit: i, f, g, o after their nonlinearity, and c.
constexpr int kLstmSaved = 5;

// With bfloat16 operands: two pairs of float16, and c.
constexpr int kLstmBFloat16Saved = 3;

// In numbers of the type of the sums.
template <typename X>
TT_INLINE int64_t saved_activations(const LstmShape& s, bool cell_only) {
  return saved_activations(s, cell_only ? 1 : sizeof(X) == 2 ? kLstmBFloat16Saved : kLstmSaved);
}
// Behind the activations one number tells which instruction set wrote them: others lay them out in
// another way.
template <typename X>
TT_INLINE int64_t saved_numbers(const LstmShape& s, bool cell_only) {
  return saved_activations<X>(s, cell_only) + 1;
}

}  // namespace throughtime
