// Rows in memory, as the kernels read and write them: in whole vectors.
#pragma once

#include <cstring>

#include "common/sizes.h"
#include "relevancy/cpu/products.h"

namespace throughtime {
namespace {

// Whether no number is infinite or NaN.
template <typename X>
bool all_finite(const X* at, int64_t stride, int64_t rows, int64_t features) {
  using S = SumOf<X>;
  Vec<S> sum{};
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t d = 0; d < features; d += kLanes<S>)
      sum += Numbers<X>::vector_part(at + row * stride + d, features - d) * S(0);
  return sum_of_lanes<S>(sum) == S(0);
}

// Asks the memory for rows that are needed soon; they may be written then.
template <typename S>
TT_INLINE void fetch(const S* rows, int64_t stride, int64_t begin, int64_t end, int64_t features) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(S));
  for (int64_t row = begin; row < end; ++row)
    for (int64_t d = 0; d < features; d += kLine) __builtin_prefetch(rows + row * stride + d);
}

// Rows of a multiple of so many numbers, of one head or several: those in memory, or their copies with zeros
// behind, once copy() has been called for all of them. If kPast rows follow the last one, they are copies.
template <typename X, int64_t kMultiple = kWhole<X>, int64_t kPast = 0>
struct WholeRows {
  const X* from;
  X* room;  // null if rows are whole as they are
  const X* at;
  int64_t features, stride, from_stride, next_head, from_next_head;

  TT_INLINE static int64_t numbers(int64_t rows, int64_t features) {
    return copied(features) ? times(rows + kPast, round_up(features, kMultiple)) : 0;
  }
  // Heads lie `apart` numbers from each other, and have `rows` rows.
  WholeRows(const X* at, int64_t stride_t, int64_t features, X* copies, int64_t apart = 0,
            int64_t rows = 0)
      : from(at),
        room(copied(features) ? copies : nullptr),
        at(room ? room : at),
        features(features),
        stride(room ? round_up(features, kMultiple) : stride_t),
        from_stride(stride_t),
        next_head(room ? rows * stride : apart),
        from_next_head(apart) {}
  void copy(Share rows, int64_t heads = 1) const {
    if (!room) return;
    for (int64_t head = 0; head < heads; ++head)
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        X* to = room + head * next_head + row * stride;
        std::memcpy(to, from + head * from_next_head + row * from_stride, features * sizeof(X));
        std::memset(to + features, 0, (stride - features) * sizeof(X));
      }
  }
  TT_INLINE const X* operator()(int64_t row, int64_t head = 0) const {
    return at + head * next_head + row * stride;
  }

 private:
  TT_INLINE static bool copied(int64_t features) { return kPast > 0 || features % kMultiple; }
};

// Rows that are turned: of whole steps of a product.
template <typename X>
using TurnedRows = WholeRows<X, Numbers<X>::kDepth>;

// Rows that a tile takes from any of them on.
template <typename X, int64_t kMultiple = kWhole<X>>
using LeftRows = WholeRows<X, kMultiple, Tiling<X>::kPadding - 1>;

// The same of dense results, in the type of sums: rows in memory, or room for them until copy() is called.
template <typename X>
struct WholeResults {
  using S = SumOf<X>;

  X* to;
  S* at;
  bool apart_from_memory;
  int64_t features, stride, next_head, to_next_head;

  TT_INLINE static bool needs_room(int64_t features) {
    return sizeof(X) != sizeof(S) || features % kLanes<S>;
  }
  TT_INLINE static int64_t numbers(int64_t rows, int64_t features) {
    return needs_room(features) ? times(rows, round_up(features, kLanes<S>)) : 0;
  }
  // Heads lie `apart` rows from each other in memory, and have `rows` rows.
  WholeResults(X* to, int64_t features, S* room, int64_t apart = 0, int64_t rows = 0)
      : to(to),
        at(needs_room(features) ? room : reinterpret_cast<S*>(to)),
        apart_from_memory(needs_room(features)),
        features(features),
        stride(round_up(features, kLanes<S>)),
        next_head((apart_from_memory ? rows : apart) * stride),
        to_next_head(apart * features) {}
  TT_INLINE S* operator()(int64_t row, int64_t head = 0) const {
    return at + head * next_head + row * stride;
  }
  TT_INLINE void clear(int64_t row, int64_t head = 0) const {
    for (int64_t d = 0; d < stride; d += kLanes<S>) store((*this)(row, head) + d, Vec<S>{});
  }
  void copy(Share rows, int64_t heads = 1) const {
    if (!apart_from_memory) return;
    for (int64_t head = 0; head < heads; ++head)
      for (int64_t row = rows.begin; row < rows.end; ++row)
        for (int64_t d = 0; d < features; d += kLanes<S>)
          Numbers<X>::put_part(to + head * to_next_head + row * features, d,
                               load((*this)(row, head) + d), features - d);
  }
};

}  // namespace
}  // namespace throughtime
