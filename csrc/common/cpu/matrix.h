// Matrix products of rows in memory with a packed weight, and sums of outer products.
//
// Operands may be narrower than the sums, S = SumOf<Operand>. Sums are divided into chains as in
// tile.h.
#pragma once

#include "common/cpu/tile.h"
#include "common/sizes.h"

namespace throughtime {
namespace {

// A weight packed into panels of `width` vectors of columns (the last may be narrower), each
// k-major.
template <typename Operand>
struct Panels {
  static constexpr int64_t L = kLanes<SumOf<Operand>>;

  Operand* at;
  int64_t k_count;
  int64_t vectors;  // of columns, in all
  int64_t width = kPanelVectors;

  TT_INLINE static int64_t numbers(int64_t k_count, int64_t vectors) {
    return times(k_count, vectors, L);
  }
  TT_INLINE int64_t count() const { return divide_up(vectors, width); }
  TT_INLINE int64_t width_of(int64_t panel) const { return least(width, vectors - panel * width); }
  TT_INLINE Operand* panel(int64_t q) const { return at + q * width * L * k_count; }
};

// Column n of the panels `own` is the row at(n) of a weight (null: zeros): for products with its
// transpose.
template <typename Operand, typename F>
void pack_rows_as_columns(const Panels<Operand>& to, Share own, const F& at) {
  constexpr int64_t L = Panels<Operand>::L;
  for (int64_t q = own.begin; q < own.end; ++q)
    for (int64_t v = 0; v < to.width_of(q); ++v)
      transpose_rows<SumOf<Operand>>(
          [&](int64_t element) { return at((q * to.width + v) * L + element); }, to.k_count,
          to.panel(q) + v * L, to.width_of(q) * L);
}

// Row k of the panels `own` is the row at(k) of a weight with `columns` columns (null: zeros).
template <typename Operand, typename F>
void pack_rows(const Panels<Operand>& to, int64_t columns, Share own, const F& at) {
  constexpr int64_t L = Panels<Operand>::L;
  for (int64_t q = own.begin; q < own.end; ++q) {
    Operand* panel = to.panel(q);
    for (int64_t k = 0; k < to.k_count; ++k) {
      const auto* row = at(k);
      for (int64_t j = 0; j < to.width_of(q); ++j, panel += L) {
        const int64_t column = (q * to.width + j) * L;
        Numbers<Operand>::put(
            panel, row ? load_part(row + column, columns - column) : Vec<SumOf<Operand>>{});
      }
    }
  }
}

// The left operand of a product: rows of `blocks` pieces of k_count numbers.
template <typename Operand>
struct Left {
  const Operand* at;
  int64_t row_stride;
  int64_t k_count;
  int64_t blocks = 1;
  int64_t block_stride = 0;

  TT_INLINE Left from(int64_t row) const {
    return {at + row * row_stride, row_stride, k_count, blocks, block_stride};
  }
};

// Where a product goes, and what it is added to.
template <typename S>
struct Target {
  S* at;
  int64_t row_stride;
  bool begun = false;       // what lies there is added to, not replaced
  const S* bias = nullptr;  // a row that is added to every row, or null

  TT_INLINE Target from(int64_t row, int64_t column) const {
    return {at + row * row_stride + column, row_stride, begun, bias ? bias + column : nullptr};
  }
};

template <typename Operand, int MR, int NV>
TT_INLINE void product_tile(Left<Operand> a, const Operand* panel,
                            const Target<SumOf<Operand>>& to) {
  Sum<SumOf<Operand>, MR, NV> sum(to.at, to.row_stride, to.begun);
  for (int64_t block = 0; block < a.blocks; ++block) {
    sum.multiply(a.at, a.row_stride, 1, panel, a.k_count);
    a.at += a.block_stride;
    panel += a.k_count * NV * kLanes<SumOf<Operand>>;
  }
  sum.put([&](auto& whole) {
    if (to.bias) whole.add_row(to.bias);
  });
}

// to [rows, columns of the panel] = A [rows, k] times panel q of a weight; at most kRegisterRows
// rows. One function for all products of a run-time shape: the tiles are many.
template <typename Operand>
__attribute__((noinline)) void product(const Left<Operand>& a, const Panels<Operand>& weight,
                                       int64_t q, int64_t rows, const Target<SumOf<Operand>>& to) {
  with_constant<kPanelVectors>(weight.width_of(q), [&](auto columns) {
    with_constant<kRegisterRows>(rows, [&](auto count) {
      product_tile<Operand, decltype(count)::value, decltype(columns)::value>(a, weight.panel(q),
                                                                              to);
    });
  });
}

// The same for any number of rows.
template <typename Operand>
void multiply_panel(const Left<Operand>& a, int64_t rows, const Panels<Operand>& weight, int64_t q,
                    const Target<SumOf<Operand>>& to) {
  for_row_tiles(0, rows, [&](int64_t row, int64_t height) {
    product(a.from(row), weight, q, height, to.from(row, 0));
  });
}

// The same for all panels of a weight.
template <typename Operand>
void multiply(const Left<Operand>& a, int64_t rows, const Panels<Operand>& weight,
              const Target<SumOf<Operand>>& to) {
  for (int64_t q = 0; q < weight.count(); ++q)
    multiply_panel(a, rows, weight, q, to.from(0, q * weight.width * Panels<Operand>::L));
}

// c [n, vectors * L] += a^T b for a [rows, n] and b [rows, vectors * L], from the last row to the
// first: rows are collected from the last step on, and the gradients of early steps may be small.
template <typename Operand>
__attribute__((noinline)) void add_outer_products(const Operand* a, int64_t lda, int64_t n,
                                                  const Operand* b, int64_t ldb, int64_t vectors,
                                                  int64_t rows, SumOf<Operand>* c, int64_t ldc) {
  using S = SumOf<Operand>;
  if (rows == 0) return;
  for (int64_t v = 0; v < vectors; v += kPanelVectors)
    with_constant<kPanelVectors>(least(kPanelVectors, vectors - v), [&](auto width) {
      const int64_t column = v * kLanes<S>;
      for_row_tiles(0, n, [&](int64_t i, int64_t height) {
        with_constant<kRegisterRows>(height, [&](auto count) {
          Sum<S, decltype(count)::value, decltype(width)::value> sum(c + i * ldc + column, ldc,
                                                                     true);
          sum.multiply(a + (rows - 1) * lda + i, 1, -lda, b + (rows - 1) * ldb + column, rows,
                       -ldb);
          sum.put();
        });
      });
    });
}

}  // namespace
}  // namespace throughtime
