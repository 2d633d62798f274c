// The LSTM cell: one step of one unit of one sample.
//
//     i, f, g, o = sigmoid, sigmoid, tanh, sigmoid of the sums a_t
//     c_t = f c_{t-1} + i g                      h_t = o tanh(c_t)
//
//     dc_t += dh_t o (1 - tanh(c_t)^2)           da_o = dh_t tanh(c_t) o (1 - o)
//     da_i = dc_t g i (1 - i)                    da_f = dc_t c_{t-1} f (1 - f)
//     da_g = dc_t i (1 - g^2)                    dc_{t-1} = dc_t f
//
// Saved for the backward: the gates in float, the sums a_t as float16 where S has 16 bits. 1 / (1 - f)
// is the number of steps that the cell remembers, so an error of f counts relative to 1 - f. A gate
// rounded to 16 bits is off by up to 2^-9 (bfloat16) or 2^-12 (float16), and 1,000 steps multiply that
// error. From the float16 sum, f (1 - f) is right to |a| 2^-11 of itself, i (1 - i) and o (1 - o) too,
// 1 - g^2 to twice that. The backward uses exact nonlinearities, the forward of bfloat16 the
// hardware's tanh for g and tanh(c).
#pragma once

#include "common/cuda/device.cuh"
#include "lstm/cuda/params.h"

namespace throughtime {

using namespace device;  // NOLINT: kernels use its words throughout

// Gate `r` of i, f, g, o from its sum.
template <typename S>
TT_DEVICE float gate_of(int r, float sum) {
  return r == 2 ? hyperbolic_tangent<S>(sum) : sigmoid<S>(sum);
}

template <typename S>
struct CellResult {
  float saved[4];  // of the gates, not yet rounded to SavedGate<S>
  float c;
  S h;
};

template <typename S>
TT_DEVICE CellResult<S> cell_forward(const float (&sums)[4], float c_before, bool reset) {
  CellResult<S> result;
  float gates[4];
  TT_UNROLL
  for (int r = 0; r < 4; ++r) {
    gates[r] = gate_of<S>(r, sums[r]);
    result.saved[r] = sizeof(S) == 2 ? sums[r] : gates[r];
  }
  result.c = gates[1] * (reset ? 0.0f : c_before) + gates[0] * gates[2];
  result.h = from_float<S>(gates[3] * hyperbolic_tangent<S>(result.c));
  return result;
}

// Gate `r` from what the forward saved.
template <typename S>
TT_DEVICE float restored_gate(int r, float saved) {
  return sizeof(S) == 2 ? gate_of<SavedGate<S>>(r, saved) : saved;
}

struct CellGradient {
  float sums[4];   // da_t
  float c_before;  // dc_{t-1}
};

// dh is dh_t, dc is dc_t without what comes from dh_t.
template <typename S>
TT_DEVICE CellGradient cell_backward(const float (&saved)[4], float c, float c_before, bool reset,
                                     float dh, float dc) {
  const float i = restored_gate<S>(0, saved[0]), f = restored_gate<S>(1, saved[1]);
  const float g = restored_gate<S>(2, saved[2]), o = restored_gate<S>(3, saved[3]);
  const float tanh_c = hyperbolic_tangent<SavedGate<S>>(c);
  dc += dh * o * (1.0f - tanh_c * tanh_c);
  return {{dc * g * i * (1.0f - i), dc * (reset ? 0.0f : c_before) * f * (1.0f - f),
           dc * i * (1.0f - g * g), dh * tanh_c * o * (1.0f - o)},
          reset ? 0.0f : dc * f};
}

}  // namespace throughtime
