// The operands of sums over rows (RowSums in products.h), for types that are multiplied in pairs.
//
// Plain numbers are operands as they lie in memory. Pairs need two rows side by side, and weights in the
// operand's type.
#pragma once

#include "common/cpu/team.h"
#include "relevancy/cpu/products.h"

namespace throughtime {
namespace {

// Whether operands are copies, in pairs.
template <typename X>
constexpr bool kPaired = Numbers<X>::kPair > 1;

// Steps over rows: the rows themselves, or pairs of them, packed into a ring, where they stay while lists
// name the same rows.
template <typename X>
class RowSteps {
 public:
  // Memory for lists of `count` rows, of each worker.
  struct Room {
    int64_t count, features;
    Span<X> numbers;
    Span<const X*> pointers;

    RowSteps operator()(int64_t worker) const {
      return {numbers(worker), pointers(worker), ring(count), width(features)};
    }
  };
  static int64_t numbers(int64_t count, int64_t features) {
    return times(ring(count), width(features));
  }
  static int64_t pointers(int64_t count) { return 2 * ring(count); }

  // Of rows [begin, end) of a list, up to whole steps; those around them are zeros. Row k has place
  // origin + k in the ring.
  TT_INLINE const X* const* operator()(const X* const* rows, int64_t begin, int64_t end,
                                       int64_t origin = 0) const {
    if constexpr (!kPaired<X>) {
      return rows;
    } else {
      constexpr int64_t kPair = Numbers<X>::kPair, kDepth = Numbers<X>::kDepth;
      const auto row = [&](int64_t k) { return k >= begin && k < end ? rows[k] : nullptr; };
      for (int64_t k = begin / kDepth * kDepth; k < round_up(end, kDepth); k += kPair)
        list_[k / kPair] = pair((origin + k) & (ring_ - 1), row(k), row(k + 1));
      return list_;
    }
  }

 private:
  RowSteps(X* at, const X** pointers, int64_t ring, int64_t width)
      : at_(at), rows_(pointers), list_(pointers + ring), ring_(ring), width_(width) {
    for (int64_t slot = 0; slot < ring; ++slot) rows_[slot] = at + 1;  // no row's address
  }

  static int64_t ring(int64_t count) {
    return kPaired<X> ? power_of_two_at_least(count + 2 * Numbers<X>::kDepth) : 0;
  }
  static int64_t width(int64_t features) { return round_up(features, kLanes<SumOf<X>>); }

  TT_INLINE const X* pair(int64_t slot, const X* first, const X* second) const {
    X* const to = at_ + slot * width_;
    if (rows_[slot] == first && rows_[slot + 1] == second) return to;
    rows_[slot] = first;
    rows_[slot + 1] = second;
    for (int64_t d = 0; d < width_; d += kLanes<SumOf<X>>)
      Numbers<X>::put_pair(to + Numbers<X>::kPair * d, 0, first, second, d);
    return to;
  }

  X* at_;
  const X **rows_, **list_;
  int64_t ring_, width_;
};

// Columns [begin, end) of `rows` rows of weights, whole vectors, for sums over columns; `room` takes copies.
template <typename X>
TT_INLINE Factors<X> factors(const SumOf<X>* from, int64_t from_row, int64_t rows, int64_t begin,
                             int64_t end, X* room, int64_t room_row) {
  if constexpr (!kPaired<X>) {
    return {from, from_row, 1};
  } else {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t v = begin; v < end; v += kLanes<SumOf<X>>)
        Numbers<X>::put(room + i * room_row, v, load(from + i * from_row + v));
    return {room, room_row, 1};
  }
}

}  // namespace
}  // namespace throughtime
