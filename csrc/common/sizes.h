// Sizes: rounding, products that do not wrap, and shares.
#pragma once

#include <cstdint>

#include "common/inline.h"

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

// Sizes end here: no machine has memory for 2^53 numbers. Some of them can still be added up.
constexpr int64_t kTooMany = int64_t(1) << 53;

// Product of sizes, kTooMany where it would be more. Whatever is allocated or lies at an offset has
// a size from here: one that does not fit finds no memory, where a wrapped one would.
TT_INLINE int64_t times(int64_t a, int64_t b) {
  int64_t product;
  return __builtin_mul_overflow(a, b, &product) ? kTooMany : least(product, kTooMany);
}
template <typename... Rest>
TT_INLINE int64_t times(int64_t a, int64_t b, Rest... rest) {
  return times(times(a, b), rest...);
}

// The share of `count` items of workers [first, last) of `workers`.
struct Share {
  int64_t begin, end;
  TT_INLINE Share(int64_t count, int64_t first, int64_t last, int64_t workers)
      : begin(count * first / workers), end(count * last / workers) {}
  TT_INLINE Share(int64_t count, int64_t index, int64_t workers)
      : Share(count, index, index + 1, workers) {}
  // The part of `count` items for this share of `all`.
  TT_INLINE Share of(int64_t count, int64_t all) const { return Share(count, begin, end, all); }
};

}  // namespace throughtime
