// The operands of matrix products: how they lie in memory.
#pragma once

#include "common/cpu/bfloat16.h"
#include "common/cpu/split.h"
#include "common/cpu/tile.h"
#include "common/sizes.h"

namespace throughtime {
namespace {

// Rows of one product: those of a register tile, or of two rows of AMX tiles.
template <typename Operand>
struct Tiling {
  static constexpr bool kMatrixUnit = false;
  static constexpr int64_t kRows = kRegisterRows;
  static constexpr int64_t kPadding = 1;  // left operands have a multiple of so many rows in memory
};
#if defined(TT_AMX)
struct TilingOfUnit {
  static constexpr bool kMatrixUnit = true;
  static constexpr int64_t kRows = 32;
  static constexpr int64_t kPadding = 16;
};
template <>
struct Tiling<BFloat16> : TilingOfUnit {};
template <int kParts>
struct Tiling<SplitFloat<kParts>> : TilingOfUnit {};
#endif

// Calls f(row, height) for the rows of one product each that cover [begin, end). A matrix unit takes whole
// tiles first: it then reads no row past the multiple of kPadding from `begin` on that covers them.
template <typename Operand, typename F>
TT_INLINE void for_product_rows(int64_t begin, int64_t end, const F& f) {
  constexpr int64_t kRows = Tiling<Operand>::kRows;
  if constexpr (Tiling<Operand>::kMatrixUnit) {
    for (int64_t row = begin; row < end; row += kRows) f(row, least(kRows, end - row));
  } else {
    for_row_tiles<kRows>(begin, end, f);
  }
}

// A weight packed into panels of `width` vectors of columns (the last may be narrower), each
// k-major: [k / kDepth][vector][kDepth / kPair][element][kPair].
template <typename Operand>
struct Panels {
  static constexpr int64_t L = kLanes<SumOf<Operand>>, kDepth = Numbers<Operand>::kDepth;

  Operand* at;
  int64_t k_count;
  int64_t vectors;  // of columns, in all
  int64_t width = kPanelVectors;

  TT_INLINE static int64_t numbers(int64_t k_count, int64_t vectors) {
    return times(round_up(k_count, kDepth), vectors, L);
  }
  TT_INLINE int64_t depth() const { return round_up(k_count, kDepth); }
  TT_INLINE int64_t count() const { return divide_up(vectors, width); }
  TT_INLINE int64_t width_of(int64_t panel) const { return least(width, vectors - panel * width); }
  TT_INLINE Operand* panel(int64_t q) const { return at + q * width * L * depth(); }
  // Of vector v of columns of panel q: the kDepth steps that k is among.
  TT_INLINE Operand* place(int64_t q, int64_t k, int64_t v) const {
    return panel(q) + (k / kDepth * width_of(q) + v) * (kDepth * L);
  }
};

// The left operand of a product: rows of `blocks` pieces of k_count numbers. Only the last piece's
// k_count may be no multiple of kDepth, and zeros follow it up to one.
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

// Where a product goes, and what it is added to: one of what lies there, a bias and an addend.
template <typename S>
struct Target {
  S* at;
  int64_t row_stride;
  bool begun = false;         // what lies there is added to, not replaced
  const S* bias = nullptr;    // a row that is added to every row, or null
  const S* addend = nullptr;  // rows that are added, or null
  int64_t addend_stride = 0;
  bool whole = false;  // memory has whole tiles of rows, and nothing else there

  TT_INLINE Target from(int64_t row, int64_t column) const {
    return {at + row * row_stride + column,
            row_stride,
            begun,
            bias ? bias + column : nullptr,
            addend ? addend + row * addend_stride + column : nullptr,
            addend_stride,
            whole};
  }
};

// One of the products that are added up: rows times a panel.
template <typename Operand>
struct Term {
  Left<Operand> left;
  const Operand* panel;
};

}  // namespace
}  // namespace throughtime
