// The LSTM's recurrence on GPUs for any size: a library's matrix product and one kernel per step.
//
// The state travels in the arrays in which it is returned: h_n and c_n, dh0 and dc0. In the backward,
// the kernel of a step first takes up the product of the step that follows in travel, so that one
// kernel per step is enough; one more launch takes up the last product.
#pragma once

#include "../common/device.cuh"
#include "recurrence.h"

namespace throughtime {

using namespace device;  // NOLINT: kernels are written in its words

constexpr int kStepThreads = 256;  // of a block; a thread has one unit of one sample

template <typename S>
struct StepForward {
  RecurrenceForward<S> p;
  int64_t s;             // step in travel
  const float* product;  // [B, 4H]: h_{t-1} W_hh^T
};

template <typename S>
struct StepBackward {
  RecurrenceBackward<S> p;
  int64_t s;             // step in travel, -1 after the last
  const float* product;  // [B, H]: da W_hh of step s + 1, or null where nothing flows through it
};

template <typename S>
TT_DEVICE bool is_active(const RecurrenceInput<S>& in, int64_t s, int64_t n) {
  if (s < 0 || s >= in.T) return false;
  return !in.lengths || (in.reverse ? in.T - 1 - s : s) < in.lengths[n];
}
template <typename S>
TT_DEVICE bool is_reset(const RecurrenceInput<S>& in, int64_t t, int64_t n) {
  return in.reset && in.reset[t * in.B + n];
}

template <typename S>
TT_KERNEL(kStepThreads)
lstm_step_forward(TT_PARAMS StepForward<S> step) {
  const RecurrenceForward<S>& p = step.p;
  const int64_t B = p.in.B, H = p.in.H;
  const int64_t at = static_cast<int64_t>(block()) * kStepThreads + thread();
  if (at >= B * H) return;
  const int64_t n = at / H, unit = at % H, t = p.in.reverse ? p.in.T - 1 - step.s : step.s;
  if (!is_active(p.in, step.s, n)) {
    p.y[t * B * H + at] = S{};
    return;
  }
  const bool reset = is_reset(p.in, t, n);
  const int64_t row = (t * B + n) * 4 * H + unit;
  float gates[4];
  TT_UNROLL
  for (int r = 0; r < 4; ++r) {
    const float a = p.projected[row + r * H] + (p.bias ? p.bias[r * H + unit] : 0.0f) +
                    (reset ? 0.0f : step.product[n * 4 * H + r * H + unit]);
    gates[r] = r == 2 ? hyperbolic_tangent<S>(a) : sigmoid<S>(a);
  }
  const float c = gates[1] * (reset ? 0.0f : p.c_n[at]) + gates[0] * gates[2];
  const S h = from_float<S>(gates[3] * hyperbolic_tangent<S>(c));
  p.c_n[at] = c;
  p.h_n[at] = h;
  p.y[t * B * H + at] = h;
  if (p.gates) {
    TT_UNROLL
    for (int r = 0; r < 4; ++r) p.gates[row + r * H] = from_float<S>(gates[r]);
    p.cells[t * B * H + at] = c;
  }
}

template <typename S>
TT_KERNEL(kStepThreads)
lstm_step_backward(TT_PARAMS StepBackward<S> step) {
  const RecurrenceBackward<S>& p = step.p;
  const int64_t T = p.in.T, B = p.in.B, H = p.in.H, s = step.s;
  const int64_t at = static_cast<int64_t>(block()) * kStepThreads + thread();
  if (at >= B * H) return;
  const int64_t n = at / H, unit = at % H;
  const auto time = [&](int64_t s) { return p.in.reverse ? T - 1 - s : s; };

  float dh = p.dh0[at];
  if (is_active(p.in, s + 1, n)) {
    const int64_t t = time(s + 1);
    const bool cut = is_reset(p.in, t, n) ||
                     (p.detach && p.detach[t * p.detach_stride_t + n * p.detach_stride_b]);
    dh = cut || !step.product ? 0.0f : step.product[at];
  }
  p.dh0[at] = dh;
  if (s < 0) return;

  const int64_t t = time(s), row = (t * B + n) * 4 * H + unit;
  if (!is_active(p.in, s, n)) {
    TT_UNROLL
    for (int r = 0; r < 4; ++r) p.dgates[row + r * H] = S{};
    return;
  }
  float gates[4];
  TT_UNROLL
  for (int r = 0; r < 4; ++r) gates[r] = to_float(p.gates[row + r * H]);
  const float i = gates[0], f = gates[1], g = gates[2], o = gates[3];
  const bool reset = is_reset(p.in, t, n);
  float before = 0.0f;
  if (!reset) {
    before = is_active(p.in, s - 1, n) ? p.cells[time(s - 1) * B * H + at] : p.in.c0[at];
  }
  const float tanh_c = hyperbolic_tangent<S>(p.cells[t * B * H + at]);
  if (p.dy) dh += to_float(p.dy[t * B * H + at]);
  const float dc = p.dc0[at] + dh * o * (1.0f - tanh_c * tanh_c);
  p.dgates[row] = from_float<S>(dc * g * i * (1.0f - i));
  p.dgates[row + H] = from_float<S>(dc * before * f * (1.0f - f));
  p.dgates[row + 2 * H] = from_float<S>(dc * i * (1.0f - g * g));
  p.dgates[row + 3 * H] = from_float<S>(dh * tanh_c * o * (1.0f - o));
  p.dc0[at] = reset ? 0.0f : dc * f;
}

// All steps. h_n, c_n hold the initial state; product has room for [B, 4H].
// multiply(h [B, H], product): product = h W_hh^T. launcher(kernel, arguments): one thread per (B, H).
template <typename S, typename Multiply, typename Launcher>
void launch_stepwise(const RecurrenceForward<S>& p, float* product, const Multiply& multiply,
                     const Launcher& launcher) {
  for (int64_t s = 0; s < p.in.T; ++s) {
    multiply(p.h_n, product);
    launcher(&lstm_step_forward<S>, StepForward<S>{p, s, product});
  }
}

// All steps. dh0, dc0 hold the gradients of the final state; product has room for [B, H].
// multiply(da [B, 4H], product): product = da W_hh. flows(t): whether some sample lets a gradient
// through at step t.
template <typename S, typename Flows, typename Multiply, typename Launcher>
void launch_stepwise(const RecurrenceBackward<S>& p, float* product, const Flows& flows,
                     const Multiply& multiply, const Launcher& launcher) {
  const float* given = nullptr;
  for (int64_t s = p.in.T - 1; s >= 0; --s) {
    const int64_t t = p.in.reverse ? p.in.T - 1 - s : s;
    launcher(&lstm_step_backward<S>, StepBackward<S>{p, s, given});
    given = nullptr;
    if (flows(t)) {
      multiply(p.dgates + t * p.in.B * 4 * p.in.H, product);
      given = product;
    }
  }
  launcher(&lstm_step_backward<S>, StepBackward<S>{p, -1, given});
}

}  // namespace throughtime
