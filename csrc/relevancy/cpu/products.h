// Products of a block of queries with rows in memory, by register tiles.
//
//   multiply_turned     scores: queries times keys, whose vectors lie turned, a lane for each key
//   sum_rows            outputs and gradients: weighted sums of rows that a list points at
//
// An element is the same sum in the same order for every tile. A weight of zero adds nothing, so
// that a tile may cover rows that not all of its queries attend, as long as these are finite.
//
// X is the type of the operands. One of pairs takes two k at a time (common/cpu/bfloat16.h): of features
// in scores, of rows in sums, whose list points at two rows side by side.
#pragma once

#include "common/cpu/operands.h"
#include "common/cpu/tile.h"
#include "common/cpu/vec.h"
#include "common/sizes.h"
#include "relevancy/cpu/amx_products.h"
#include "relevancy/cpu/params.h"

namespace throughtime {
namespace {

// Rows of one product.
template <typename X>
constexpr int kTileRows = Tiling<X>::kMatrixUnit ? Tiling<X>::kPadding : kRegisterRows;

// Rows of sums, and of scores, have a multiple of so many numbers: whole vectors, and whole steps of a
// product.
template <typename X>
constexpr int64_t kWhole =
    Numbers<X>::kDepth > kLanes<SumOf<X>> ? Numbers<X>::kDepth : kLanes<SumOf<X>>;

// Numbers of a row as a product takes it along its features.
template <typename X>
TT_INLINE int64_t whole_steps(int64_t features) {
  return round_up(features, Numbers<X>::kDepth);
}

// A ring of vectors of turned rows, [slot][feature / kPair][lane][kPair]; vector `index` is in slot
// index % slots.
template <typename X>
struct Turned {
  static constexpr int64_t L = kLanes<SumOf<X>>, kPair = Numbers<X>::kPair;

  X* at;
  int64_t features, slots;  // a power of two: a division takes as long as many products

  Turned(X* at, int64_t features, int64_t vectors)
      : at(at), features(whole_steps<X>(features)), slots(power_of_two_at_least(vectors)) {}
  static int64_t numbers(int64_t features, int64_t vectors) {
    return times(whole_steps<X>(features), power_of_two_at_least(vectors), L);
  }
  TT_INLINE X* vector(int64_t index) const { return at + (index & (slots - 1)) * features * L; }
  // Lane l of the vector is row(l), zeros where that is null.
  template <typename F>
  void put(int64_t index, const F& row) const {
    using Step = SumOf<X>;  // as large as kPair numbers
    static_assert(sizeof(Step) == kPair * sizeof(X));
    Step* to = reinterpret_cast<Step*>(vector(index));
    transpose_rows<Step>([&](int64_t lane) { return reinterpret_cast<const Step*>(row(lane)); },
                         features / kPair, features / kPair, 1,
                         [&](int64_t k, const Vec<Step>* column) { store(to + k * L, *column); });
  }
};

template <int NV, int MR, typename X>
TT_INLINE void multiply_vectors(const X* q, int64_t q_stride, const Turned<X>& keys, int64_t first,
                                SumOf<X>* to, int64_t to_stride) {
  using Step = Numbers<X>;
  const X* columns[NV];
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) columns[j] = keys.vector(first + j);
  int64_t begin = 0;
  do {  // also where there are no features: products of nothing are zero
    const int64_t end = least(keys.features, begin + kChain);
    Tile<SumOf<X>, MR, NV> chain;
    chain.clear();
    for (int64_t k = begin; k < end; k += Step::kPair) {
      decltype(Step::step(q)) b[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) b[j] = Step::step(columns[j] + k * Turned<X>::L);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const auto factor = Step::factor(q + i * q_stride + k);
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j)
          chain.v[i][j] = Step::multiply_add(chain.v[i][j], factor, b[j]);
      }
    }
    if (begin > 0) chain.add(to, to_stride);
    chain.write(to, to_stride);
    begin = end;
  } while (begin < keys.features);
}

// to [rows, vectors [begin, end)] = q times turned keys; at most kTileRows rows of keys.features numbers.
// Both have kPadding of Tiling rows in memory.
template <typename X>
__attribute__((noinline)) void multiply_turned(const X* q, int64_t q_stride, int64_t rows,
                                               const Turned<X>& keys, int64_t begin, int64_t end,
                                               SumOf<X>* to, int64_t to_stride) {
  if constexpr (Tiling<X>::kMatrixUnit) {
    amx::multiply_turned(q, q_stride, keys, begin, end, to, to_stride);
  } else {
    with_constant<kRegisterRows>(rows, [&](auto height) {
      for_vector_groups(begin, end, [&](auto width, int64_t first) {
        multiply_vectors<decltype(width)::value, decltype(height)::value>(
            q, q_stride, keys, first, to + (first - begin) * Turned<X>::L, to_stride);
      });
    });
  }
}

constexpr int64_t kLinks = 64;  // of a chain; weights are positive, and its error grows with it

// The left operand of sums: number k of row i lies at at[i row + k step].
template <typename X>
struct Factors {
  const X* at;
  int64_t row, step;
};

// to[i] = sum over k in [begin, end) of number k of row i times rows[k], or is added to, for `height` <=
// kTileRows rows of whole vectors. A chain ends before every k with (k + phase) % kLinks == 0.
// Operands of pairs: a step of the factors is 1, steps[k / kPair] is [feature][kPair], and factors and rows
// up to multiples of kDepth on both sides are in memory, one of a factor and its row zero.
template <typename X>
struct RowSums {
  Factors<X> factors;
  const X* const* steps;
  int64_t begin, end, phase;
  SumOf<X>* const* to;
  bool begun;  // what lies there is added to
};

template <int NV, int MR, typename X>
TT_INLINE void sum_vectors(const RowSums<X>& p, int64_t column) {
  using S = SumOf<X>;
  using Step = Numbers<X>;
  constexpr int64_t L = kLanes<S>, kPair = Step::kPair;
  S* to[MR];
  for (int i = 0; i < MR; ++i) to[i] = p.to[i] + column;
  const auto [at, row, next] = p.factors;
  const int64_t last = round_up(p.end, Step::kDepth), phase = p.phase;
  const X* const* const steps = p.steps;
  bool begun = p.begun;
  int64_t k = p.begin / Step::kDepth * Step::kDepth;
  do {  // once if there is no row
    const int64_t end = least(last, (k + phase) / kLinks * kLinks + kLinks - phase);
    Tile<S, MR, NV> chain;
    chain.clear();
    for (; k < end; k += kPair) {
      const X* step = steps[static_cast<uint64_t>(k) / kPair] + column * kPair;
      const X* factors = at + k * next;
      decltype(Step::step(step)) b[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) b[j] = Step::step(step + j * L * kPair);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const auto factor = Step::factor(factors + i * row);
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j)
          chain.v[i][j] = Step::multiply_add(chain.v[i][j], factor, b[j]);
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
template <typename X>
__attribute__((noinline)) void sum_rows(const RowSums<X>& p, int64_t height, int64_t begin,
                                        int64_t end) {
  if constexpr (Tiling<X>::kMatrixUnit) {
    amx::sum_rows(p, height, begin, end);
  } else {
    with_constant<kRegisterRows>(height, [&](auto rows) {
      for_vector_groups(begin, end, [&](auto width, int64_t first) {
        sum_vectors<decltype(width)::value, decltype(rows)::value>(p, first * kLanes<SumOf<X>>);
      });
    });
  }
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
