// A matrix of a block of queries, weights or their gradients, as the left operand of sums: over the columns of
// a row, and over the queries of a column.
//
// Plain numbers are operands as they lie in the matrix. Pairs are copies in the operand's type: of the head
// that is under way by row, and of all heads by column.
#pragma once

#include "relevancy/cpu/operands.h"

namespace throughtime {
namespace {

template <typename X, int64_t kQueries>
struct FactorMatrix {
  using S = SumOf<X>;

  int64_t columns;
  S* numbers_at;    // [head][query][column], where products go
  X* by_column_at;  // [head][column][query]; this and the next for an operand of pairs
  X* by_row_at;     // [query][column], of the head that is under way

  // Memory for matrices of so many columns: of each block, and of each worker.
  struct Room {
    int64_t columns;
    Span<S> numbers;
    Span<X> by_column, by_row;

    FactorMatrix operator()(int64_t block, int64_t worker) const {
      return {columns, numbers(block), by_column(block), by_row(worker)};
    }
  };
  static int64_t numbers(int64_t heads, int64_t columns) { return times(heads, kQueries, columns); }
  static int64_t by_column(int64_t heads, int64_t columns) {
    return kPaired<X> ? numbers(heads, columns) + kTileRows<X> * kQueries : 0;
  }
  static int64_t by_row(int64_t columns) { return kPaired<X> ? numbers(1, columns) : 0; }

  // Where a query's products go, and what they become.
  TT_INLINE S* row(int64_t head, int64_t query) const {
    return numbers_at + (head * kQueries + query) * columns;
  }
  TT_INLINE X* factors(int64_t head, int64_t query) const {
    if constexpr (kPaired<X>) {
      return by_row_at + query * columns;
    } else {
      return row(head, query);
    }
  }

  // Once all queries of a head are there: columns [begin, end), whole vectors, for along_column().
  void turn(int64_t head, int64_t queries, int64_t begin, int64_t end) const {
    if constexpr (kPaired<X>) {
      const X* rows[kQueries];
      for (int64_t q = 0; q < kQueries; ++q)
        rows[q] = q < queries ? by_row_at + q * columns + begin : nullptr;
      Numbers<X>::put_transposed(by_column_at + (head * columns + begin) * kQueries, kQueries, 0,
                                 rows, end - begin);
    }
  }

  // Factors of columns, of a query and those after it, and of queries, of a column and those after it.
  TT_INLINE Factors<X> along_row(int64_t head, int64_t query) const {
    return {factors(head, query), columns, 1};
  }
  TT_INLINE Factors<X> along_column(int64_t head, int64_t column) const {
    if constexpr (kPaired<X>) {
      return {by_column_at + (head * columns + column) * kQueries, kQueries, 1};
    } else {
      return {row(head, 0) + column, 1, columns};
    }
  }
};

}  // namespace
}  // namespace throughtime
