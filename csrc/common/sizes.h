// Rounding of sizes.
#pragma once

#include <cstdint>

#include "inline.h"

namespace throughtime {

TT_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
TT_INLINE int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }
TT_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
TT_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

TT_INLINE int64_t power_of_two_at_least(int64_t n) {
  int64_t power = 1;
  while (power < n) power *= 2;
  return power;
}

}  // namespace throughtime
