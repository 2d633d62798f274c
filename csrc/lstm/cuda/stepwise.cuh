// The LSTM's recurrence on GPUs for any size: a library's matrix product and one kernel per step.
//
// The state travels in the arrays in which it is returned: h_n and c_n, dh0 and dc0. In the backward,
// the kernel of a step first takes up the product of the step that follows in travel, so that one
// kernel per step is enough; one more launch takes up the last product. A step through which nothing
// flows in either direction has no product. Both directions share the kernel of a step.
#pragma once

#include "lstm/cuda/gates.cuh"

namespace throughtime {

constexpr int kStepThreads = 256;  // of a block; a thread has one unit of one sample

template <typename S>
struct StepForward {
  RecurrenceForward<S> p;
  int64_t s;             // step in travel
  const float* product;  // [D, B, 4H]: h_{t-1} W_hh^T
};

template <typename S>
struct StepBackward {
  RecurrenceBackward<S> p;
  int64_t s;             // step in travel, -1 after the last
  const float* product;  // [D, B, H]: da W_hh of step s + 1, or null where nothing flows through it
};

// One unit of one sample in one direction: a thread's share of a step.
template <typename S>
struct StepPlace {
  const RecurrenceInput<S>& in;
  int64_t at;  // of [D, B, H]
  int64_t d, n, unit;

  TT_DEVICE explicit StepPlace(const RecurrenceInput<S>& input)
      : in(input),
        at(static_cast<int64_t>(block()) * kStepThreads + thread()),
        d(at / (in.B * in.H)),
        n(at / in.H % in.B),
        unit(at % in.H) {}

  TT_DEVICE bool exists() const { return d < in.D; }
  TT_DEVICE int64_t time(int64_t s) const { return in.reverse != (d == 1) ? in.T - 1 - s : s; }
  // Of [T, B, D].
  TT_DEVICE int64_t row(int64_t t) const { return (t * in.B + n) * in.D + d; }
  TT_DEVICE bool is_active(int64_t s) const {
    return s >= 0 && s < in.T && (!in.lengths || time(s) < in.lengths[n]);
  }
  TT_DEVICE bool is_reset(int64_t t) const {
    return in.reset && in.reset[(d * in.T + t) * in.B + n];
  }
};

template <typename S>
TT_KERNEL(kStepThreads)
lstm_step_forward(TT_PARAMS StepForward<S> step) {
  const RecurrenceForward<S>& p = step.p;
  const StepPlace<S> place(p.in);
  if (!place.exists()) return;
  const int64_t H = p.in.H, at = place.at, t = place.time(step.s), row = place.row(t);
  if (!place.is_active(step.s)) {
    p.y[row * H + place.unit] = S{};
    return;
  }
  const bool reset = place.is_reset(t);
  float gates[4], saved[4];
  TT_UNROLL
  for (int r = 0; r < 4; ++r) {
    const int64_t column = r * H + place.unit;
    const float h = reset ? 0.0f : step.product[(place.d * p.in.B + place.n) * 4 * H + column];
    const float bias = p.bias ? p.bias[place.d * 4 * H + column] : 0.0f;
    const float a = p.projected[row * 4 * H + column] + bias + h;
    gates[r] = gate_of<S>(r, a);
    saved[r] = to_save<S>(a, gates[r]);
  }
  const float c = gates[1] * (reset ? 0.0f : p.c_n[at]) + gates[0] * gates[2];
  const S h = from_float<S>(gates[3] * hyperbolic_tangent<S>(c));
  p.c_n[at] = c;
  p.h_n[at] = h;
  p.y[row * H + place.unit] = h;
  if (p.gates) {
    TT_UNROLL
    for (int r = 0; r < 4; ++r) {
      p.gates[row * 4 * H + r * H + place.unit] = from_float<SavedGate<S>>(saved[r]);
    }
    p.cells[row * H + place.unit] = c;
  }
}

template <typename S>
TT_KERNEL(kStepThreads)
lstm_step_backward(TT_PARAMS StepBackward<S> step) {
  const RecurrenceBackward<S>& p = step.p;
  const StepPlace<S> place(p.in);
  if (!place.exists()) return;
  const int64_t H = p.in.H, s = step.s, at = place.at;

  float dh = p.dh0[at];
  if (place.is_active(s + 1)) {
    const int64_t t = place.time(s + 1);
    const bool cut = place.is_reset(t) ||
                     (p.detach && p.detach[place.d * p.detach_stride_d + t * p.detach_stride_t +
                                           place.n * p.detach_stride_b]);
    dh = cut || !step.product ? 0.0f : step.product[at];
  }
  p.dh0[at] = dh;
  if (s < 0) return;

  const int64_t t = place.time(s), row = place.row(t);
  S* da = p.dgates + row * 4 * H + place.unit;
  if (!place.is_active(s)) {
    TT_UNROLL
    for (int r = 0; r < 4; ++r) da[r * H] = S{};
    return;
  }
  float gates[4];
  TT_UNROLL
  for (int r = 0; r < 4; ++r) {
    gates[r] = recall<S>(r, to_float(p.gates[row * 4 * H + r * H + place.unit]));
  }
  const float i = gates[0], f = gates[1], g = gates[2], o = gates[3];
  const bool reset = place.is_reset(t);
  float before = 0.0f;
  if (!reset) {
    before = place.is_active(s - 1) ? p.cells[place.row(place.time(s - 1)) * H + place.unit]
                                    : p.in.c0[at];
  }
  const float tanh_c = hyperbolic_tangent<SavedGate<S>>(p.cells[row * H + place.unit]);
  if (p.dy) dh += to_float(p.dy[row * H + place.unit]);
  const float dc = p.dc0[at] + dh * o * (1.0f - tanh_c * tanh_c);
  da[0] = from_float<S>(dc * g * i * (1.0f - i));
  da[H] = from_float<S>(dc * before * f * (1.0f - f));
  da[2 * H] = from_float<S>(dc * i * (1.0f - g * g));
  da[3 * H] = from_float<S>(dh * tanh_c * o * (1.0f - o));
  p.dc0[at] = reset ? 0.0f : dc * f;
}

// All steps. h_n, c_n hold the initial state; product has room for [D, B, 4H].
// multiply(d, product): product [B, 4H] = h W_hh^T of direction d, h being h_n's.
// launcher(kernel, arguments): one thread per (D, B, H).
template <typename S, typename Multiply, typename Launcher>
void launch_stepwise(const RecurrenceForward<S>& p, float* product, const Multiply& multiply,
                     const Launcher& launcher) {
  for (int64_t s = 0; s < p.in.T; ++s) {
    for (int64_t d = 0; d < p.in.D; ++d) multiply(d, product + d * p.in.B * 4 * p.in.H);
    launcher(&lstm_step_forward<S>, StepForward<S>{p, s, product});
  }
}

// All steps. dh0, dc0 hold the gradients of the final state; product has room for [D, B, H].
// multiply(d, t, product): product [B, H] = da W_hh of direction d and position t.
// flows(d, t): whether some sample lets a gradient through there.
template <typename S, typename Flows, typename Multiply, typename Launcher>
void launch_stepwise(const RecurrenceBackward<S>& p, float* product, const Flows& flows,
                     const Multiply& multiply, const Launcher& launcher) {
  const float* given = nullptr;
  for (int64_t s = p.in.T - 1; s >= 0; --s) {
    launcher(&lstm_step_backward<S>, StepBackward<S>{p, s, given});
    given = nullptr;
    const auto time = [&](int64_t d) { return p.in.reverse != (d == 1) ? p.in.T - 1 - s : s; };
    if (!flows(0, time(0)) && !(p.in.D == 2 && flows(1, time(1)))) continue;
    for (int64_t d = 0; d < p.in.D; ++d) multiply(d, time(d), product + d * p.in.B * p.in.H);
    given = product;
  }
  launcher(&lstm_step_backward<S>, StepBackward<S>{p, -1, given});
}

}  // namespace throughtime
