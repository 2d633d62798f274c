// Matrix products of rows in memory with a packed weight, and sums of outer products.
//
// Operands may be narrower than the sums, S = SumOf<Operand>. Sums are divided into chains as in
// tile.h, or made by the tiles of AMX (amx.h).
#pragma once

#include "common/cpu/amx.h"
#include "common/cpu/amx_split.h"
#include "common/cpu/operands.h"
#include "common/cpu/tile.h"
#include "common/sizes.h"

namespace throughtime {
namespace {

// Column n of the panels `own` is the row at(n) of a weight (null: zeros): for products with its
// transpose.
template <typename Operand, typename F>
void pack_rows_as_columns(const Panels<Operand>& to, Share own, const F& at) {
  constexpr int64_t L = Panels<Operand>::L;
  for (int64_t q = own.begin; q < own.end; ++q)
    for (int64_t v = 0; v < to.width_of(q); ++v)
      transpose_rows<SumOf<Operand>>(
          [&](int64_t element) { return at((q * to.width + v) * L + element); }, to.k_count,
          to.depth(), Numbers<Operand>::kPair,
          [&](int64_t k, const Vec<SumOf<Operand>>* columns) {
            Numbers<Operand>::put_step(to.place(q, k, v), k % to.kDepth, columns);
          });
}

// Row k of the panels `own` is the row at(k) of a weight with `columns` columns (null: zeros).
template <typename Operand, typename F>
void pack_rows(const Panels<Operand>& to, int64_t columns, Share own, const F& at) {
  constexpr int64_t L = Panels<Operand>::L, kPair = Numbers<Operand>::kPair;
  for (int64_t q = own.begin; q < own.end; ++q)
    for (int64_t k = 0; k < to.depth(); k += kPair) {
      const SumOf<Operand>* rows[kPair];
      for (int64_t r = 0; r < kPair; ++r) rows[r] = k + r < to.k_count ? at(k + r) : nullptr;
      for (int64_t j = 0; j < to.width_of(q); ++j) {
        const int64_t column = (q * to.width + j) * L;
        Vec<SumOf<Operand>> v[kPair];
        for (int64_t r = 0; r < kPair; ++r)
          v[r] = rows[r] ? load_part(rows[r] + column, columns - column) : Vec<SumOf<Operand>>{};
        Numbers<Operand>::put_step(to.place(q, k, j), k % to.kDepth, v);
      }
    }
}

template <int NV, int MR, int count, typename Operand, typename F>
TT_INLINE void multiply_registers(const Term<Operand> (&terms)[count],
                                  const Target<SumOf<Operand>>& to, const F& begin) {
  Sum<SumOf<Operand>, MR, NV> sum(to.at, to.row_stride, to.begun);
#pragma GCC unroll 2
  for (int n = 0; n < count; ++n) {
    begin(n);
    Left<Operand> a = terms[n].left;
    const Operand* panel = terms[n].panel;
    for (int64_t block = 0; block < a.blocks; ++block) {
      sum.multiply(a.at, a.row_stride, 1, panel, a.k_count);
      a.at += a.block_stride;
      panel += a.k_count * NV * kLanes<SumOf<Operand>>;
    }
  }
  sum.put([&](auto& whole) {
    if (to.bias) whole.add_row(to.bias);
    if (to.addend) whole.add(to.addend, to.addend_stride);
  });
}

// to [rows, NV vectors] = the sum of `count` products; at most Tiling<Operand>::kRows rows. Calls
// begin(n) before the n-th product, if they are made one after the other.
template <int NV, int count, typename Operand, typename F>
TT_INLINE void sum_products(const Term<Operand> (&terms)[count], int64_t rows,
                            const Target<SumOf<Operand>>& to, const F& begin) {
  if constexpr (Tiling<Operand>::kMatrixUnit) {
    begin(0);
    multiply_tiles<NV>(terms, count, rows, to);
  } else {
    with_constant<kRegisterRows>(rows, [&](auto height) {
      multiply_registers<NV, decltype(height)::value>(terms, to, begin);
    });
  }
}

// to [rows, columns of the panel] = A [rows, k] times panel q of a weight; at most
// Tiling<Operand>::kRows rows. One function for all products of a run-time shape: the tiles are many.
template <typename Operand>
__attribute__((noinline)) void product(const Left<Operand>& a, const Panels<Operand>& weight,
                                       int64_t q, int64_t rows, const Target<SumOf<Operand>>& to) {
  const Term<Operand> term[] = {{a, weight.panel(q)}};
  with_constant<kPanelVectors>(weight.width_of(q), [&](auto columns) {
    sum_products<decltype(columns)::value>(term, rows, to, [](int) {});
  });
}

// The same for any number of rows.
template <typename Operand>
void multiply_panel(const Left<Operand>& a, int64_t rows, const Panels<Operand>& weight, int64_t q,
                    const Target<SumOf<Operand>>& to) {
  for_product_rows<Operand>(0, rows, [&](int64_t row, int64_t height) {
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
  static_assert(Numbers<Operand>::kPair == 1, "pairs of rows do not lie side by side");
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
