// Cases of the recurrence for programs without Python, on random numbers.
#pragma once

#include <cmath>
#include <cstdlib>
#include <random>
#include <vector>

#include "run.h"

namespace throughtime {

struct Case {
  Tier tier;
  int T, B, D, H;
  int tiles_n, held, ranks, forward_parts, backward_parts, backward_warps;
  bool lengths, reset, detach, reverse;
};

template <typename S>
struct Numbers {
  std::vector<S> weight, h0, dy, dh_n;
  std::vector<float> projected, bias, c0, dc_n;
  std::vector<int64_t> lengths;
  std::vector<char> reset, detach;  // bool has no vector of its own
};

template <typename S>
Numbers<S> draw(const Case& c) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const auto fill = [&](auto& to, size_t count, float scale) {
    to.resize(count);
    for (auto& x : to) x = device::from_float<std::decay_t<decltype(x)>>(scale * normal(random));
  };
  const size_t state = static_cast<size_t>(c.D) * c.B * c.H;
  Numbers<S> n;
  fill(n.weight, 4 * static_cast<size_t>(c.D) * c.H * c.H,
       1.5f / std::sqrt(static_cast<float>(c.H)));
  fill(n.h0, state, 1);
  fill(n.dy, c.T * state, 1);
  fill(n.dh_n, state, 1);
  fill(n.projected, c.T * state * 4, 1);
  fill(n.bias, 4 * static_cast<size_t>(c.D) * c.H, 1);
  fill(n.c0, state, 1);
  fill(n.dc_n, state, 1);
  for (int b = 0; b < c.B; ++b) n.lengths.push_back(b == 0 ? c.T : b == 1 ? 0 : 1 + b % c.T);
  for (int i = 0; i < c.D * c.T * c.B; ++i) {
    n.reset.push_back(random() % 4 == 0);
    n.detach.push_back(random() % 2 == 0);
  }
  for (int d = 0; d < c.D; ++d) {  // one step that nothing flows through
    for (int b = 0; b < c.B; ++b) n.detach[(d * c.T + (d == 0 ? 0 : c.T - 1)) * c.B + b] = 1;
  }
  return n;
}

template <typename S>
RecurrenceInput<S> input(const Case& c, const Numbers<S>& n) {
  RecurrenceInput<S> in{};
  in.T = c.T;
  in.B = c.B;
  in.D = c.D;
  in.H = c.H;
  in.weight = n.weight.data();
  in.c0 = n.c0.data();
  in.lengths = c.lengths ? n.lengths.data() : nullptr;
  in.reset = c.reset ? reinterpret_cast<const bool*>(n.reset.data()) : nullptr;
  in.reverse = c.reverse;
  return in;
}

RecurrencePlan plan_of(const Case& c, int scalar_bytes, bool backward) {
  const RecurrenceShape shape{c.T, c.B, c.D, c.H, scalar_bytes, backward};
  return plan_by_hand(shape, c.tier, c.ranks, c.tiles_n, c.held,
                      backward ? c.backward_parts : c.forward_parts, c.backward_warps);
}

// Forward and backward, and after(backward) each of them. Threads of the stepwise tier run at once, to be
// watched.
template <typename S, typename After>
void run_both(const Case& c, const After& after) {
  const Numbers<S> n = draw<S>(c);
  const size_t state = static_cast<size_t>(c.D) * c.B * c.H, all = c.T * state;
  std::vector<S> y(all), h_n = n.h0, dgates(4 * all);
  std::vector<SavedGate<S>> gates(4 * all);
  std::vector<float> c_n = n.c0, cells(all), dh0(state), dc0 = n.dc_n;

  RecurrenceForward<S> f{};
  f.in = input(c, n);
  f.projected = n.projected.data();
  f.bias = n.bias.data();
  f.h0 = n.h0.data();
  f.y = y.data();
  f.h_n = h_n.data();
  f.c_n = c_n.data();
  f.gates = gates.data();
  f.cells = cells.data();
  steps_at_once = true;
  if (!run(plan_of(c, sizeof(S), false), f)) std::abort();
  after(false);

  RecurrenceBackward<S> b{};
  b.in = f.in;
  b.gates = f.gates;
  b.cells = f.cells;
  b.dy = n.dy.data();
  b.dh_n = n.dh_n.data();
  b.dc_n = n.dc_n.data();
  b.detach = c.detach ? reinterpret_cast<const bool*>(n.detach.data()) : nullptr;
  b.detach_stride_d = static_cast<int64_t>(c.T) * c.B;
  b.detach_stride_t = c.B;
  b.detach_stride_b = 1;
  b.dgates = dgates.data();
  b.dh0 = dh0.data();
  b.dc0 = dc0.data();
  if (!run(plan_of(c, sizeof(S), true), b)) std::abort();
  after(true);
}

}  // namespace throughtime
