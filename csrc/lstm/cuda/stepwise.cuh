// The LSTM's recurrence on GPUs for any size: a library's matrix product and one kernel per step.
//
//     forward, step s     product = h_{t-1} W_hh^T (library)      c_t, h_t: cell.cuh (kernel)
//     backward, step s    da_t, dc_{t-1}: cell.cuh (kernel)       product = da_t W_hh (library)
//
// The state lies in the arrays in which it is returned: h_n and c_n, dh0 and dc0. In the backward the
// kernel of step s first takes dh from the product of step s + 1, so one kernel per step is enough; one
// more launch takes the last product. A step that is closed in both directions has no product.
//
// Partition: one thread per unit, sample and direction. Saved: as in forward.cuh.
// Cost of a step: 4 H^2 multiply-adds per sample and direction; two kernels, three with two directions.
#pragma once

#include "lstm/cuda/cell.cuh"

namespace throughtime {

constexpr int kStepThreads = 256;  // of a block

template <typename S>
struct StepForward {
  RecurrenceForward<S> p;
  int64_t s;             // step
  const float* product;  // [D, B, 4H]: h_{t-1} W_hh^T
};

template <typename S>
struct StepBackward {
  RecurrenceBackward<S> p;
  int64_t s;             // step, -1 after the last
  const float* product;  // [D, B, H]: da W_hh of step s + 1, or null if it has none
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
  TT_DEVICE int64_t time(int64_t s) const { return in.time(d, s); }
  TT_DEVICE int64_t row(int64_t t) const { return in.row(t, n, d); }
  TT_DEVICE bool is_reset(int64_t t) const { return in.is_reset(d, t, n); }
  TT_DEVICE bool is_active(int64_t s) const {
    return s >= 0 && s < in.T && (!in.lengths || time(s) < in.lengths[n]);
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
  float a[4];
  TT_UNROLL
  for (int r = 0; r < 4; ++r) {
    const int64_t column = r * H + place.unit;
    const float h = reset ? 0.0f : step.product[(place.d * p.in.B + place.n) * 4 * H + column];
    const float bias = p.bias ? p.bias[place.d * 4 * H + column] : 0.0f;
    a[r] = p.projected[row * 4 * H + column] + bias + h;
  }
  const CellResult<S> cell = cell_forward<S>(a, p.c_n[at], reset);
  p.c_n[at] = cell.c;
  p.h_n[at] = cell.h;
  p.y[row * H + place.unit] = cell.h;
  if (!p.gates) return;
  TT_UNROLL
  for (int r = 0; r < 4; ++r) {
    p.gates[row * 4 * H + r * H + place.unit] = from_float<SavedGate<S>>(cell.saved[r]);
  }
  p.cells[row * H + place.unit] = cell.c;
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
    const bool closed = place.is_reset(t) || p.is_detached(place.d, t, place.n);
    dh = closed || !step.product ? 0.0f : step.product[at];
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
  float saved[4];
  TT_UNROLL
  for (int r = 0; r < 4; ++r) {
    saved[r] = to_float(p.gates[row * 4 * H + r * H + place.unit]);
  }
  const bool reset = place.is_reset(t);
  float before = 0.0f;
  if (!reset) {
    before = place.is_active(s - 1) ? p.cells[place.row(place.time(s - 1)) * H + place.unit]
                                    : p.in.c0[at];
  }
  if (p.dy) dh += to_float(p.dy[row * H + place.unit]);
  const CellGradient cell =
      cell_backward<S>(saved, p.cells[row * H + place.unit], before, reset, dh, p.dc0[at]);
  TT_UNROLL
  for (int r = 0; r < 4; ++r) da[r * H] = from_float<S>(cell.sums[r]);
  p.dc0[at] = cell.c_before;
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
// flows(d, t): whether any sample of direction d is not detached at position t.
template <typename S, typename Flows, typename Multiply, typename Launcher>
void launch_stepwise(const RecurrenceBackward<S>& p, float* product, const Flows& flows,
                     const Multiply& multiply, const Launcher& launcher) {
  const float* given = nullptr;
  for (int64_t s = p.in.T - 1; s >= 0; --s) {
    launcher(&lstm_step_backward<S>, StepBackward<S>{p, s, given});
    given = nullptr;
    const auto time = [&](int64_t d) { return p.in.time(d, s); };
    if (!flows(0, time(0)) && !(p.in.D == 2 && flows(1, time(1)))) continue;
    for (int64_t d = 0; d < p.in.D; ++d) multiply(d, time(d), product + d * p.in.B * p.in.H);
    given = product;
  }
  launcher(&lstm_step_backward<S>, StepBackward<S>{p, -1, given});
}

}  // namespace throughtime
