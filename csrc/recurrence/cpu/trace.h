// A trace: the gradients that a backward walk keeps of its steps.
#pragma once

#include <cstdint>

#include "common/inline.h"

namespace throughtime {

// Steps of T that a trace keeps: the last in the direction of travel, and every n-th before it. n may be
// the largest integer.
TT_INLINE int64_t traced_steps(int64_t T, int64_t every) { return T > 0 ? (T - 1) / every + 1 : 0; }

// [traced_steps, B, ...], both or none: the whole gradient of h_t (after a projection) and c_t. Not
// written past the end of a sample.
template <typename S>
struct Trace {
  S* h = nullptr;
  S* c = nullptr;
  int64_t every = 1;

  // Whether it keeps a step that so many steps follow in the direction of travel.
  TT_INLINE bool keeps(int64_t later) const { return c && later % every == 0; }
  // The place of a step that it keeps.
  TT_INLINE int64_t place(int64_t t) const { return t / every; }
};

}  // namespace throughtime
