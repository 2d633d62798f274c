// Gate sums of one block of units, straight from the weights as PyTorch has them.
//
// A walk of one step uses every weight once per row. To pack them first costs as much as the products of
// many rows, so such a walk (goes_straight) multiplies along the rows of a weight: element `lane` of a
// sum holds the terms k = lane, lane + L, .. of h and then of x, and in the end the elements are added in
// pairs. This order depends on the shape alone, so that a row's bits do not depend on the others.
#pragma once

#include "common/cpu/tile.h"
#include "recurrence/cpu/pack.h"

namespace throughtime {
namespace {

template <typename A, typename B>
constexpr bool kSameType = false;
template <typename A>
constexpr bool kSameType<A, A> = true;

// Whether walks of a cell may do so: it has four gates, operands have the type of the sums, and a vector
// has room for all gates.
template <typename Cell, typename Operand>
constexpr bool kMayGoStraight = Cell::kGates == 4 && kSameType<Operand, typename Cell::Number> &&
                                kLanes<typename Cell::Number> >= 4;

// Rows times the transpose of a weight [4 H, k_count].
template <typename S>
struct Factor {
  const S* rows;
  int64_t row_stride;
  const S* weight;
  int64_t k_count;
};

template <typename S>
struct StraightBlock {
  Factor<S> factors[2];
  int64_t H, unit;  // units of the layer, the block's first
  const S* bias;    // [4 L]
};

// to [height, 4 L] of one height, at most kRegisterRows.
template <int MR, typename S>
TT_INLINE void straight_rows(const StraightBlock<S>& block, int64_t row, S* to) {
  constexpr int64_t L = kLanes<S>;
  constexpr int C = L / 4;  // elements of a gate, once those of all four share a vector
  alignas(kVectorBytes) S parts[MR * L * L];  // [row][unit][gate][C]
  const int64_t units = least(L, block.H - block.unit);
  for (int64_t j = 0; j < units; ++j) {
    Tile<S, MR, 4> sums;
    sums.clear();
    for (const Factor<S>& factor : block.factors) {
      const S* a = factor.rows + row * factor.row_stride;
      const S* w = factor.weight + (block.unit + j) * factor.k_count;
      const auto add = [&](int64_t k, const auto& take) {
        Vec<S> weights[4];
#pragma GCC unroll 8
        for (int g = 0; g < 4; ++g) weights[g] = take(w + g * block.H * factor.k_count + k);
#pragma GCC unroll 8
        for (int i = 0; i < MR; ++i) {
          const Vec<S> value = take(a + i * factor.row_stride + k);
#pragma GCC unroll 8
          for (int g = 0; g < 4; ++g) sums.v[i][g] += weights[g] * value;
        }
      };
      int64_t k = 0;
      for (; k + L <= factor.k_count; k += L) add(k, [](const S* from) { return load(from); });
      if (const int64_t rest = factor.k_count - k) {
        // Without branches between a product and its sum, which would not be fused then.
        if (rest < 0 || rest >= L) __builtin_unreachable();
        add(k, [&](const S* from) { return load_part(from, rest); });
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const Vec<S>* v = sums.v[i];
      store(parts + (i * L + j) * L, add_across<S, 1 * C>(add_across<S, 2 * C>(v[0], v[2]),
                                                          add_across<S, 2 * C>(v[1], v[3])));
    }
  }
  for (int i = 0; i < MR; ++i) {
    Vec<S> v[4];  // of C units each: [gate][unit]
    for (int q = 0; q < 4; ++q) {
      Vec<S> of_units[C];
      for (int m = 0; m < C; ++m) {
        const int64_t j = q * C + m;
        of_units[m] = j < units ? load(parts + (i * L + j) * L) : Vec<S>{};
      }
      if constexpr (C > 1) add_levels<S, C / 2>(of_units);
      v[q] = of_units[0];
    }
    exchange_across<S, 2 * C>(&v[0], &v[2]);
    exchange_across<S, 2 * C>(&v[1], &v[3]);
    exchange_across<S, C>(&v[0], &v[1]);
    exchange_across<S, C>(&v[2], &v[3]);
    for (int g = 0; g < 4; ++g)
      store(to + (i * 4 + g) * L, v[g] + load(block.bias + g * L));  // v[g]: of L units
  }
}

// The same for a height known at run time.
template <typename S>
void straight_sums(const StraightBlock<S>& block, int64_t row, int64_t height, S* to) {
  with_constant<kRegisterRows>(
      height, [&](auto rows) { straight_rows<decltype(rows)::value>(block, row, to); });
}

}  // namespace
}  // namespace throughtime
