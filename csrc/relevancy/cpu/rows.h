// Rows in memory, as the kernels read and write them: in whole vectors.
#pragma once

#include <cstring>

#include "common/cpu/vec.h"
#include "common/sizes.h"

namespace throughtime {
namespace {

// Whether no number is infinite or NaN.
template <typename S>
bool all_finite(const S* at, int64_t stride, int64_t rows, int64_t features) {
  Vec<S> sum{};
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t d = 0; d < features; d += kLanes<S>)
      sum += load_part(at + row * stride + d, features - d) * S(0);
  return sum_of_lanes<S>(sum) == S(0);
}

// Asks the memory for rows that are needed soon; they may be written then.
template <typename S>
TT_INLINE void fetch(const S* rows, int64_t stride, int64_t begin, int64_t end, int64_t features) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(S));
  for (int64_t row = begin; row < end; ++row)
    for (int64_t d = 0; d < features; d += kLine) __builtin_prefetch(rows + row * stride + d);
}

// Rows of whole vectors, of one head or several: those in memory, or their copies with zeros behind, once
// copy() has been called for all of them.
template <typename S>
struct WholeRows {
  const S* from;
  S* room;  // null if rows are whole as they are
  const S* at;
  int64_t features, stride, from_stride, next_head, from_next_head;

  TT_INLINE static int64_t numbers(int64_t rows, int64_t features) {
    return features % kLanes<S> ? times(rows, round_up(features, kLanes<S>)) : 0;
  }
  // Heads lie `apart` numbers from each other, and have `rows` rows.
  WholeRows(const S* at, int64_t stride_t, int64_t features, S* copies, int64_t apart = 0,
            int64_t rows = 0)
      : from(at),
        room(features % kLanes<S> ? copies : nullptr),
        at(room ? room : at),
        features(features),
        stride(room ? round_up(features, kLanes<S>) : stride_t),
        from_stride(stride_t),
        next_head(room ? rows * stride : apart),
        from_next_head(apart) {}
  void copy(Share rows, int64_t heads = 1) const {
    if (!room) return;
    for (int64_t head = 0; head < heads; ++head)
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        const S* source = from + head * from_next_head + row * from_stride;
        for (int64_t d = 0; d < features; d += kLanes<S>)
          store(room + head * next_head + row * stride + d, load_part(source + d, features - d));
      }
  }
  TT_INLINE const S* operator()(int64_t row, int64_t head = 0) const {
    return at + head * next_head + row * stride;
  }
};

// The same of dense results: rows in memory, or room for them until copy() is called.
template <typename S>
struct WholeResults {
  S *at, *to;
  int64_t features, stride, next_head, to_next_head;

  // Heads lie `apart` rows from each other in memory, and have `rows` rows.
  WholeResults(S* to, int64_t features, S* room, int64_t apart = 0, int64_t rows = 0)
      : at(features % kLanes<S> ? room : to),
        to(to),
        features(features),
        stride(round_up(features, kLanes<S>)),
        next_head((at == to ? apart : rows) * stride),
        to_next_head(apart * features) {}
  TT_INLINE S* operator()(int64_t row, int64_t head = 0) const {
    return at + head * next_head + row * stride;
  }
  TT_INLINE void clear(int64_t row, int64_t head = 0) const {
    for (int64_t d = 0; d < stride; d += kLanes<S>) store((*this)(row, head) + d, Vec<S>{});
  }
  void copy(Share rows, int64_t heads = 1) const {
    if (at == to) return;
    for (int64_t head = 0; head < heads; ++head)
      for (int64_t row = rows.begin; row < rows.end; ++row)
        std::memcpy(to + head * to_next_head + row * features, (*this)(row, head),
                    features * sizeof(S));
  }
};

}  // namespace
}  // namespace throughtime
