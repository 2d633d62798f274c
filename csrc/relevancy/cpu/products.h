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

// A ring of vectors of turned rows, [slot][feature][lane]; vector `index` is in slot index % slots.
template <typename S>
struct Turned {
  S* at;
  int64_t features, slots;  // a power of two: a division takes as long as many products

  Turned(S* at, int64_t features, int64_t vectors)
      : at(at), features(features), slots(power_of_two_at_least(vectors)) {}
  static int64_t numbers(int64_t features, int64_t vectors) {
    return times(features, power_of_two_at_least(vectors), kLanes<S>);
  }
  TT_INLINE S* vector(int64_t index) const {
    return at + (index & (slots - 1)) * features * kLanes<S>;
  }
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
  S* to[MR];
  for (int i = 0; i < MR; ++i) to[i] = p.to[i] + column;
  const S* const a = p.a;
  const int64_t a_row = p.a_row, a_k = p.a_k, last = p.end, phase = p.phase;
  const S* const* const rows = p.rows;
  bool begun = p.begun;
  int64_t k = p.begin;
  do {  // once if there is no row
    const int64_t end = least(last, (k + phase) / kLinks * kLinks + kLinks - phase);
    Tile<S, MR, NV> chain;
    chain.clear();
    for (; k < end; ++k) {
      const S* row = rows[k] + column;
      const S* factors = a + k * a_k;
      Vec<S> b[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) b[j] = load(row + j * L);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const S scalar = factors[i * a_row];
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) chain.v[i][j] += b[j] * scalar;
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        Vec<S> sum = chain.v[i][j];
        if (begun) sum += load(to[i] + j * L);
        store(to[i] + j * L, sum);
      }
    begun = true;
  } while (k < last);
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

}  // namespace
}  // namespace throughtime
