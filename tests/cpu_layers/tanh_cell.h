// The cell of Elman's network, all that a walk through time needs of a new cell:
//
//   h_t = tanh(a_t)        da_t = dh_t (1 - h_t^2)
#pragma once

#include "common/cpu/vec.h"

namespace throughtime {
namespace {

template <typename S>
struct TanhCell {
  using Number = S;
  static constexpr int kGates = 1;
  static constexpr int kSaved = 1;  // h
  static constexpr int kHeld = 1;
  static constexpr bool kCarriesCell = false;

  TT_INLINE static void advance(Vec<S>* a, Vec<S>*, Vec<S>* saved) {
    a[0] = saved[0] = tanh<S>(a[0]);
  }

  TT_INLINE static Vec<S> output(const Vec<S>* held) { return held[0]; }

  TT_INLINE static Vec<S> retreat(const Vec<S>* saved, Vec<S>, Vec<S> dh, Vec<S>*, Vec<S>* da) {
    da[0] = dh * (S(1) - saved[0] * saved[0]);
    return saved[0];
  }
};

}  // namespace
}  // namespace throughtime
