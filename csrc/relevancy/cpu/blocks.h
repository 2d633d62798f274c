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

// Sizes of the matrices of a block.
template <typename S>
struct BlockShape {
  int64_t kept_vectors, vectors;

  TT_INLINE BlockShape(const ScreeningShape& shape, int64_t queries, int64_t most_retained)
      : kept_vectors(most(1, divide_up(most_retained, kLanes<S>))),
        vectors(
            divide_up(least(shape.most_in_window() + queries - 1, shape.positions()), kLanes<S>) +
            1) {}
  TT_INLINE int64_t kept() const { return kept_vectors * kLanes<S>; }
  TT_INLINE int64_t columns() const { return vectors * kLanes<S>; }
};

// Which lanes of a vector are columns: choose() takes theirs of x, and the others of `rest`.
template <typename S>
struct SomeLanes {
  typename VecOf<S>::integers own;
  TT_INLINE Vec<S> choose(Vec<S> x, Vec<S> rest) const { return own ? x : rest; }
};
template <typename S>
struct AllLanes {
  TT_INLINE Vec<S> choose(Vec<S> x, Vec<S>) const { return x; }
};

// Some columns of a row of scores, in whole vectors.
template <typename S>
struct Columns {
  S* at;
  int64_t begin, end;

  // Calls f(vector, SomeLanes or AllLanes).
  template <typename F>
  TT_INLINE void each(const F& f) const {
    constexpr int64_t L = kLanes<S>;
    int64_t v = begin / L * L;
    if (v < begin && v < end) {
      f(at + v, SomeLanes<S>{lanes_between<S>(v, begin, end)});
      v += L;
    }
    for (; v + L <= end; v += L) f(at + v, AllLanes<S>{});
    if (v < end) f(at + v, SomeLanes<S>{lanes_between<S>(v, begin, end)});
  }
};

}  // namespace
}  // namespace throughtime
