// Blocks of queries whose scores lie in a matrix, a column for each key.
#pragma once

#include "relevancy/cpu/params.h"
#include "relevancy/cpu/products.h"

namespace throughtime {
namespace {

// Queries of a block: at most `most`, and as few as reach the border if that is worth its while.
TT_INLINE int64_t block_length(int64_t most, int64_t every, int64_t to_border) {
  return every < most ? most : divide_up(to_border, divide_up(to_border, most));
}

// Columns lie in groups of kWhole.
template <typename X>
TT_INLINE int64_t group_begin(int64_t column) {
  return column / kWhole<X> * kWhole<X>;
}
template <typename X>
TT_INLINE int64_t group_end(int64_t column) {
  return round_up(column, kWhole<X>);
}

// Sizes of the matrices of a block.
template <typename X>
struct BlockShape {
  int64_t kept, columns;

  TT_INLINE BlockShape(const ScreeningShape& shape, int64_t queries, int64_t most_retained)
      : kept(group_end<X>(most(1, most_retained))),
        columns(group_end<X>(least(shape.most_in_window() + queries - 1, shape.positions())) +
                kWhole<X>) {}
  TT_INLINE static int64_t vectors(int64_t columns) { return columns / kLanes<SumOf<X>>; }
};

// Bits set in the lanes of the vector at column v that are columns of [begin, end).
template <typename S>
TT_INLINE typename VecOf<S>::integers lanes_between(int64_t v, int64_t begin, int64_t end) {
  using Int = typename Traits<S>::Int;
  typename VecOf<S>::integers lane;
  for (int i = 0; i < kLanes<S>; ++i) lane[i] = i;
  return (lane >= static_cast<Int>(begin - v)) & (lane < static_cast<Int>(end - v));
}

// Groups of columns [begin, end) of a row of scores, of which a query attends [first, last).
template <typename X>
struct Columns {
  using S = SumOf<X>;

  S* at;
  int64_t begin, end, first, last;

  // Of a row: the fewest groups.
  TT_INLINE static Columns around(S* at, int64_t first, int64_t last) {
    return {at, group_begin<X>(first), group_end<X>(last), first, last};
  }
  template <typename F>
  TT_INLINE void each(const F& f) const {
    for (int64_t v = begin; v < end; v += kLanes<S>) f(at + v);
  }
  // Calls f(vector, own): own(x, rest) has x in the lanes that are attended.
  template <typename F>
  TT_INLINE void each_own(const F& f) const {
    constexpr int64_t L = kLanes<S>;
    const int64_t whole = least(round_up(first, L), end), part = most(last / L * L, whole);
    const auto some = [&](int64_t from, int64_t until) {
      for (int64_t v = from; v < until; v += L) {
        const auto lanes = lanes_between<S>(v, first, last);
        f(at + v, [&](Vec<S> x, Vec<S> rest) { return lanes ? x : rest; });
      }
    };
    some(begin, whole);
    for (int64_t v = whole; v < part; v += L) f(at + v, [](Vec<S> x, Vec<S>) { return x; });
    some(part, end);
  }
};

}  // namespace
}  // namespace throughtime
