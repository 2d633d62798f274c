// The products of products.h by AMX: 16 rows by up to four times 16 columns.
#pragma once

#include "common/cpu/amx.h"
#include "common/cpu/tile.h"
#include "common/sizes.h"

namespace throughtime {
namespace {

#if defined(TT_AMX)

namespace amx {

// A tile in memory, and the numbers from one of its rows to the next.
struct InMemory {
  const BFloat16* at;
  int64_t stride;
};

// to [16, C tiles of columns] = the sum over `steps` of left(step) times right(step, c).
template <int C, typename F, typename G>
TT_INLINE void sum_steps(int64_t steps, const F& left, const G& right, float* to, int64_t stride) {
  each<C>([](auto c) { clear<decltype(c)::value>(); });
  for (int64_t step = 0; step < steps; ++step) {
    const InMemory rows = left(step);
    load<4>(rows.at, rows.stride * 2);
    each<C>([&](auto c) {
      constexpr int column = decltype(c)::value, tile = 5 + column % 3;
      const InMemory panel = right(step, column);
      load<tile>(panel.at, panel.stride * 2);
      multiply_add<column, 4, tile>();
    });
  }
  each<C>([&](auto c) { store<decltype(c)::value>(to + c.value * kColumns, stride * 4); });
}

template <typename Keys>
void multiply_turned(const BFloat16* q, int64_t q_stride, const Keys& keys, int64_t begin,
                     int64_t end, float* to, int64_t to_stride) {
  for_vector_groups(begin, end, [&](auto width, int64_t first) {
    sum_steps<decltype(width)::value>(
        keys.features / kDepth, [&](int64_t step) { return InMemory{q + step * kDepth, q_stride}; },
        [&](int64_t step, int column) {
          return InMemory{keys.vector(first + column) + step * kTile, kDepth};
        },
        to + (first - begin) * kColumns, to_stride);
  });
}

template <typename Sums>
void sum_rows(const Sums& p, int64_t height, int64_t begin, int64_t end) {
  const int64_t first_step = p.begin / kDepth, last_step = divide_up(p.end, kDepth);
  for_vector_groups(begin, end, [&](auto width, int64_t first) {
    TileBuffer<float, kRows> sums;
    constexpr int64_t kWidth = decltype(width)::value * kColumns;
    sum_steps<decltype(width)::value>(
        last_step - first_step,
        [&](int64_t step) {
          return InMemory{p.factors.at + (first_step + step) * kDepth, p.factors.row};
        },
        [&](int64_t step, int column) {
          const auto* pairs = p.steps + (first_step + step) * (kDepth / 2);
          return InMemory{pairs[0] + 2 * (first + column) * kColumns, pairs[1] - pairs[0]};
        },
        sums.numbers, kWidth);
    for (int64_t row = 0; row < height; ++row)
      for (int64_t v = 0; v < kWidth; v += kColumns) {
        float* const to = p.to[row] + first * kColumns + v;
        const Vec<float> sum = throughtime::load(sums.numbers + row * kWidth + v);
        throughtime::store(to, p.begun ? sum + throughtime::load(to) : sum);
      }
  });
}

}  // namespace amx

#else

// Only kernels for AMX have these products.
namespace amx {
template <typename X, typename Keys, typename S>
void multiply_turned(const X*, int64_t, const Keys&, int64_t, int64_t, S*, int64_t);
template <typename Sums>
void sum_rows(const Sums&, int64_t, int64_t, int64_t);
}  // namespace amx

#endif

}  // namespace
}  // namespace throughtime
