// Matrix products of rows in memory with a packed weight, and sums of outer products.
//
// For layers whose steps are cut by rows: every matrix is [rows, columns] with columns padded to
// whole vectors. Sums are cut as in tile.h.
#pragma once

#include "common/cpu/tile.h"
#include "common/sizes.h"

namespace throughtime {
namespace {

// A weight packed into panels of kPanelVectors vectors of columns (the last may be narrower), each
// k-major.
template <typename S>
struct Panels {
  S* at;
  int64_t k_count;
  int64_t vectors;  // of columns, in all

  TT_INLINE static int64_t numbers(int64_t k_count, int64_t vectors) {
    return times(k_count, vectors, kLanes<S>);
  }
  TT_INLINE int64_t count() const { return divide_up(vectors, kPanelVectors); }
  TT_INLINE int64_t width(int64_t panel) const {
    return least(kPanelVectors, vectors - panel * kPanelVectors);
  }
  TT_INLINE S* panel(int64_t q) const { return at + q * kPanelVectors * kLanes<S> * k_count; }
};

// Panel column n is the row at(n) of a weight (null: zeros): for products with its transpose.
template <typename S, typename F>
void pack_rows_as_columns(const Panels<S>& to, int64_t begin, int64_t end, const F& at) {
  constexpr int64_t L = kLanes<S>;
  for (int64_t q = begin; q < end; ++q)
    for (int64_t v = 0; v < to.width(q); ++v)
      transpose_rows<S>([&](int64_t lane) { return at((q * kPanelVectors + v) * L + lane); },
                        to.k_count, to.panel(q) + v * L, to.width(q) * L);
}

// Panel row k is the row at(k) of a weight with `columns` columns (null: zeros).
template <typename S, typename F>
void pack_rows(const Panels<S>& to, int64_t columns, int64_t begin, int64_t end, const F& at) {
  for (int64_t q = begin; q < end; ++q) {
    S* panel = to.panel(q);
    for (int64_t k = 0; k < to.k_count; ++k) {
      const S* row = at(k);
      for (int64_t j = 0; j < to.width(q); ++j, panel += kLanes<S>) {
        const int64_t column = (q * kPanelVectors + j) * kLanes<S>;
        store(panel, row ? load_part(row + column, columns - column) : Vec<S>{});
      }
    }
  }
}

// What a product is added to.
enum class Onto { kZero, kBias, kResult };

template <typename S, int MR, int NV>
TT_INLINE void multiply_tile(const S* a, int64_t lda, const S* panel, int64_t k_count, Onto onto,
                             const S* bias, S* c, int64_t ldc) {
  Sum<S, MR, NV> sum(c, ldc, onto == Onto::kResult);
  sum.multiply(a, lda, 1, panel, k_count);
  sum.put([&](auto& whole) {
    if (onto == Onto::kBias) whole.add_row(bias);
  });
}

// c [rows, columns] = (0, a bias [columns], or c) + a [rows, k] times a packed weight.
template <typename S>
__attribute__((noinline)) void multiply(const S* a, int64_t lda, int64_t rows,
                                        const Panels<S>& weight, Onto onto, const S* bias, S* c,
                                        int64_t ldc) {
  for (int64_t q = 0; q < weight.count(); ++q) {
    const int64_t column = q * kPanelVectors * kLanes<S>;
    with_vectors(weight.width(q), [&](auto vectors) {
      for_row_tiles(0, rows, [&](int64_t row, int64_t height) {
        with_rows(height, [&](auto count) {
          multiply_tile<S, decltype(count)::value, decltype(vectors)::value>(
              a + row * lda, lda, weight.panel(q), weight.k_count, onto, bias + column,
              c + row * ldc + column, ldc);
        });
      });
    });
  }
}

// c [n, vectors * L] += a^T b for a [rows, n] and b [rows, vectors * L], from the last row to the
// first: rows are collected from the last step on, and the gradients of early steps may be small.
template <typename S>
__attribute__((noinline)) void add_outer_products(const S* a, int64_t lda, int64_t n, const S* b,
                                                  int64_t ldb, int64_t vectors, int64_t rows, S* c,
                                                  int64_t ldc) {
  if (rows == 0) return;
  for (int64_t v = 0; v < vectors; v += kPanelVectors)
    with_vectors(least(kPanelVectors, vectors - v), [&](auto width) {
      const int64_t column = v * kLanes<S>;
      for_row_tiles(0, n, [&](int64_t i, int64_t height) {
        with_rows(height, [&](auto count) {
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
