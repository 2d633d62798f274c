// The gates i, f, g, o: from their sums, and as the forward saves them for the backward.
//
// 1 / (1 - f) is how many steps the cell remembers, so an error of f counts beside 1 - f. Rounding f to 16
// bits costs up to 2^-9 (bfloat16) or 2^-12 (float16), and over 1,000 steps the gradient that arrives
// would be another. Where S has 16 bits the sums of the gates are saved instead, as float16: f (1 - f)
// made from them is right to |sum| 2^-11 of itself, the derivatives of i and o are, and that of g is to
// twice as much, if the backward does not make them, and that of tanh(c), by the hardware's tanh. float
// saves the gates.
#pragma once

#include "common/cuda/device.cuh"
#include "lstm/cuda/recurrence.h"

namespace throughtime {

using namespace device;  // NOLINT: kernels are written in its words

// Gate `r` of i, f, g, o.
template <typename S>
TT_DEVICE float gate_of(int r, float sum) {
  return r == 2 ? hyperbolic_tangent<S>(sum) : sigmoid<S>(sum);
}

// What is saved of a gate, before it is rounded to SavedGate<S>.
template <typename S>
TT_DEVICE float to_save(float sum, float gate) {
  return sizeof(S) == 2 ? sum : gate;
}

// The gate again.
template <typename S>
TT_DEVICE float recall(int r, float saved) {
  return sizeof(S) == 2 ? gate_of<SavedGate<S>>(r, saved) : saved;
}

}  // namespace throughtime
