// Products of float32 numbers by the matrix unit: those of their bfloat16 parts (split.h).
//
// Of three parts, high, middle and low, six of the nine products matter. high high is summed in tiles
// of its own; the others, 2^-8 and 2^-16 of its size, lie in a second sum, so that none of them is
// rounded to the first one's last digit. Both are added once, at the end. Two parts make three
// products, one makes one.
#pragma once

#include "common/cpu/amx.h"

namespace throughtime {
namespace {

#if defined(TT_AMX)

namespace amx {

// The products of one part of the left and one of the right operand, R by C tiles.
template <int R, int C, int kParts>
class PartProducts {
  using Operand = SplitFloat<kParts>;
  static constexpr int64_t kPart = Numbers<Operand>::kPanelPart;

 public:
  TT_INLINE PartProducts(const Operand* rows, int64_t row_stride, const Operand* panel)
      : rows_(reinterpret_cast<const BFloat16*>(rows)),
        panel_(reinterpret_cast<const BFloat16*>(panel)),
        row_stride_(row_stride * kParts) {}

  template <int part>
  TT_INLINE void left() const {
    each<R>([&](auto r) {
      load<4 + decltype(r)::value>(rows_ + part * kDepth + r.value * kRows * row_stride_,
                                   row_stride_ * 2);
    });
  }
  // `loaded`: the part was the right operand of the product before.
  template <int part, bool loaded = false>
  TT_INLINE void right() const {
    each<C>([&](auto c) {
      constexpr int tile = 6 + decltype(c)::value % 2;
      if constexpr (!loaded || C > 2) load<tile>(panel_ + (c.value * kParts + part) * kPart, 64);
      each<R>([&](auto r) {
        multiply_add<decltype(r)::value * C + decltype(c)::value, 4 + decltype(r)::value, tile>();
      });
    });
  }

 private:
  const BFloat16 *rows_, *panel_;
  int64_t row_stride_;  // of bfloat16 numbers
};

// f of every step of a term, then the tiles of sums to memory.
template <int R, int C, int kParts, typename F>
TT_INLINE void sum_steps(const Term<SplitFloat<kParts>>& term, int64_t width, int64_t column,
                         float* out, const F& f) {
  each<R * C>([&](auto n) { clear<decltype(n)::value>(); });
  each_step(&term, 1, width, column,
            [&](const SplitFloat<kParts>* rows, int64_t stride, const SplitFloat<kParts>* panel) {
              f(PartProducts<R, C, kParts>(rows, stride, panel));
            });
  each<R * C>([&](auto n) {
    constexpr int tile = decltype(n)::value, r = tile / C, c = tile % C;
    store<tile>(out + (r * kRows * width + c + column) * kColumns, width * kColumns * 4);
  });
}

template <int R, int C, int kParts>
TT_INLINE void multiply_parts(const Term<SplitFloat<kParts>>& term, int64_t width, int64_t column,
                              float* large, float* small) {
  sum_steps<R, C>(term, width, column, large, [](const auto& products) {
    products.template left<0>();
    products.template right<0>();
  });
  if constexpr (kParts == 1) return;
  sum_steps<R, C>(term, width, column, small, [](const auto& products) {
    if constexpr (kParts == 3) {
      products.template left<2>();
      products.template right<0>();
    }
    products.template left<1>();
    products.template right<0, kParts == 3>();
    if constexpr (kParts == 3) products.template right<1>();
    products.template left<0>();
    products.template right<1, kParts == 3>();
    if constexpr (kParts == 3) products.template right<2>();
  });
}

}  // namespace amx

// See sum_products in matrix.h. What is added comes last, to the first term; each term has sums of its
// own, as where it is alone.
template <int NV, int kParts>
TT_INLINE void multiply_tiles(const Term<SplitFloat<kParts>>* terms, int count, int64_t rows,
                              const Target<float>& to) {
  for (int n = 0; n < count; ++n) {
    TileBuffer<float, 32> large, small;
    if (rows > amx::kRows) {
      constexpr int two = NV > 1 ? 2 : 1;
      for (int64_t column = 0; column + two <= NV; column += two)
        amx::multiply_parts<2, two>(terms[n], NV, column, large.numbers, small.numbers);
      if constexpr (NV == 3)
        amx::multiply_parts<2, 1>(terms[n], NV, 2, large.numbers, small.numbers);
    } else {
      amx::multiply_parts<1, NV>(terms[n], NV, 0, large.numbers, small.numbers);
    }
    for (int64_t row = 0; row < rows; ++row)
#pragma GCC unroll 4
      for (int64_t v = 0; v < NV; ++v) {
        const int64_t column = v * kLanes<float>, from = row * NV * kLanes<float> + column;
        Vec<float> sum = throughtime::load(large.numbers + from);
        if constexpr (kParts > 1) sum += throughtime::load(small.numbers + from);
        sum *= kSplitUnscale;
        float* const at = to.at + row * to.row_stride + column;
        if (n > 0 || to.begun) sum += throughtime::load(at);
        if (n == 0 && to.bias) sum += throughtime::load(to.bias + column);
        if (n == 0 && to.addend)
          sum += throughtime::load(to.addend + row * to.addend_stride + column);
        throughtime::store(at, sum);
      }
  }
}

#endif

}  // namespace
}  // namespace throughtime
