// Products of a block of queries with rows in memory, by register tiles.
//
//   multiply_turned     scores: queries times keys, whose vectors lie turned, a lane for each key
//   sum_rows            outputs and gradients: weighted sums of rows that a list points at
//
// An element is the same sum in the same order for every tile. A weight of zero adds nothing, so
// that a tile may cover rows that not all of its queries attend, as long as these are finite.
#pragma once

#include "common/cpu/tile.h"
#include "common/cpu/vec.h"
#include "common/sizes.h"
#include "relevancy/cpu/params.h"

namespace throughtime {
namespace {

// Room for vectors of turned rows, [slot][feature][lane]; vector `index` is in slot index % slots.
template <typename S>
struct Turned {
  S* at;
  int64_t features, slots;

  TT_INLINE static int64_t numbers(int64_t features, int64_t slots) {
    return times(features, slots, kLanes<S>);
  }
  TT_INLINE S* vector(int64_t index) const { return at + index % slots * features * kLanes<S>; }
  // Lane l of the vector is row(l), zeros where that is null.
  template <typename F>
  void put(int64_t index, const F& row) const {
    S* to = vector(index);
    transpose_rows<S>(row, features, features, 1,
                      [&](int64_t k, const Vec<S>* column) { store(to + k * kLanes<S>, *column); });
  }
};

template <int NV, int MR, typename S>
TT_INLINE void multiply_vectors(const S* q, int64_t q_stride, const Turned<S>& keys, int64_t first,
                                S* to, int64_t to_stride) {
  const S* columns[NV];
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) columns[j] = keys.vector(first + j);
  for (int64_t begin = 0; begin < keys.features; begin += kChain) {
    const int64_t end = least(keys.features, begin + kChain);
    Tile<S, MR, NV> chain;
    chain.clear();
    for (int64_t k = begin; k < end; ++k) {
      Vec<S> b[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) b[j] = load(columns[j] + k * kLanes<S>);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const S scalar = q[i * q_stride + k];
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) chain.v[i][j] += b[j] * scalar;
      }
    }
    if (begin > 0) chain.add(to, to_stride);
    chain.write(to, to_stride);
  }
}

// Calls f(Constant<width>, first) for groups of at most kPanelVectors vectors of [begin, end), of
// nearly equal width.
template <typename F>
TT_INLINE void for_vector_groups(int64_t begin, int64_t end, const F& f) {
  for_row_tiles<kPanelVectors>(begin, end, [&](int64_t first, int64_t width) {
    with_constant<kPanelVectors>(width, [&](auto count) { f(count, first); });
  });
}

// to [rows, vectors [begin, end)] = q times turned keys; at most kRegisterRows rows.
template <typename S>
__attribute__((noinline)) void multiply_turned(const S* q, int64_t q_stride, int64_t rows,
                                               const Turned<S>& keys, int64_t begin, int64_t end,
                                               S* to, int64_t to_stride) {
  with_constant<kRegisterRows>(rows, [&](auto height) {
    for_vector_groups(begin, end, [&](auto width, int64_t first) {
      multiply_vectors<decltype(width)::value, decltype(height)::value>(
          q, q_stride, keys, first, to + (first - begin) * kLanes<S>, to_stride);
    });
  });
}

constexpr int64_t kLinks = 64;  // of a chain; weights are positive, and its error grows with it

// to[i] = sum over k in [begin, end) of a[i a_row + k a_k] rows[k], or is added to, for `height` <=
// kRegisterRows rows of whole vectors. A chain ends before every k with (k + phase) % kLinks == 0.
template <typename S>
struct RowSums {
  const S* a;
  int64_t a_row, a_k;
  const S* const* rows;
  int64_t begin, end, phase;
  S* const* to;
  bool begun;  // what lies there is added to
};

template <int NV, int MR, typename S>
TT_INLINE void sum_vectors(const RowSums<S>& p, int64_t column) {
  constexpr int64_t L = kLanes<S>;
  bool begun = p.begun;
  int64_t k = p.begin;
  do {  // once if there is no row
    const int64_t end = least(p.end, (k + p.phase) / kLinks * kLinks + kLinks - p.phase);
    Tile<S, MR, NV> chain;
    chain.clear();
    for (; k < end; ++k) {
      const S* row = p.rows[k] + column;
      const S* a = p.a + k * p.a_k;
      Vec<S> b[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) b[j] = load(row + j * L);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const S scalar = a[i * p.a_row];
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) chain.v[i][j] += b[j] * scalar;
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        S* to = p.to[i] + column + j * L;
        store(to, begun ? load(to) + chain.v[i][j] : chain.v[i][j]);
      }
    begun = true;
  } while (k < p.end);
}

// In vectors [begin, end) of the rows.
template <typename S>
__attribute__((noinline)) void sum_rows(const RowSums<S>& p, int64_t height, int64_t begin,
                                        int64_t end) {
  with_constant<kRegisterRows>(height, [&](auto rows) {
    for_vector_groups(begin, end, [&](auto width, int64_t first) {
      sum_vectors<decltype(width)::value, decltype(rows)::value>(p, first * kLanes<S>);
    });
  });
}

template <typename S>
TT_INLINE S sum_of_lanes(Vec<S> v) {
  return over_lanes<S>(v, [](Vec<S> a, Vec<S> b) { return a + b; });
}
template <typename S>
TT_INLINE S highest_lane(Vec<S> v) {
  return over_lanes<S>(v, [](Vec<S> a, Vec<S> b) { return a > b ? a : b; });
}

// Bits set in the lanes of the vector at column v that are columns of [begin, end).
template <typename S>
TT_INLINE typename VecOf<S>::integers lanes_between(int64_t v, int64_t begin, int64_t end) {
  using Int = typename Traits<S>::Int;
  typename VecOf<S>::integers lane;
  for (int i = 0; i < kLanes<S>; ++i) lane[i] = i;
  return (lane >= static_cast<Int>(begin - v)) & (lane < static_cast<Int>(end - v));
}

// Whether no number is infinite or NaN.
template <typename S>
bool all_finite(const S* at, int64_t stride, int64_t rows, int64_t features) {
  Vec<S> sum{};
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t d = 0; d < features; d += kLanes<S>)
      sum += load_part(at + row * stride + d, features - d) * S(0);
  return sum_of_lanes<S>(sum) == S(0);
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
