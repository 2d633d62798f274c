// The LSTM's cell: the mathematics of one step on vectors of units. Its walks through time are in
// recurrence/cpu, and RelLSTM's in rel_lstm/cpu.
//
//   i, f, o = sigmoid(a), g = tanh(a)       c_t = f c_{t-1} + i g       h_t = o tanh(c_t)
//
//   dc_t = dc_{t+1} f_{t+1} + dh o (1 - tanh(c)^2)     do = dh tanh(c)
//   di = dc g, df = dc c_{t-1}, dg = dc i              da = di i(1-i), df f(1-f), dg (1-g^2), do o(1-o)
#pragma once

#include "common/cpu/vec.h"

namespace throughtime {
namespace {

template <typename S>
struct LstmCell {
  using Number = S;
  static constexpr int kGates = 4;            // i, f, g, o
  static constexpr int kSaved = 5;            // i, f, g, o after their nonlinearity, then c
  static constexpr int kForget = 1;           // place of f in what is saved
  static constexpr int kHeld = 2;             // c, o: what output() takes
  static constexpr bool kCarriesCell = true;  // c goes from step to step beside h

  // The sums a of the gates become what output() takes, c_{t-1} becomes c_t.
  TT_INLINE static void advance(Vec<S>* a, Vec<S>* c, Vec<S>* saved) {
    const Vec<S> i = sigmoid<S>(a[0]), f = sigmoid<S>(a[1]), g = tanh<S>(a[2]),
                 o = sigmoid<S>(a[3]);
    *c = f * *c + i * g;
    a[0] = *c;
    a[1] = o;
    saved[0] = i;
    saved[1] = f;
    saved[2] = g;
    saved[3] = o;
    saved[4] = *c;
  }

  TT_INLINE static Vec<S> output(const Vec<S>* held) { return held[1] * tanh<S>(held[0]); }

  // The gradient dh of the output becomes that of the sums, da; what step t+1 hands to c_t becomes
  // its whole gradient, dc. Returns h_t before a projection.
  TT_INLINE static Vec<S> retreat(const Vec<S>* saved, Vec<S> c_before, Vec<S> dh, Vec<S>* dc,
                                  Vec<S>* da) {
    const Vec<S> i = saved[0], f = saved[1], g = saved[2], o = saved[3], tanh_c = tanh<S>(saved[4]);
    const Vec<S> d = *dc + dh * o * (S(1) - tanh_c * tanh_c);
    *dc = d;
    da[0] = d * g * i * (S(1) - i);
    da[1] = d * c_before * f * (S(1) - f);
    da[2] = d * i * (S(1) - g * g);
    da[3] = dh * tanh_c * o * (S(1) - o);
    return o * tanh_c;
  }

  // What c_{t-1} gets of dc.
  TT_INLINE static Vec<S> hand_on(const Vec<S>* saved, Vec<S> dc) { return dc * saved[kForget]; }
};

}  // namespace
}  // namespace throughtime
