// Weights in the order in which the LSTM kernels read them, and small helpers of both passes.
#pragma once

#include "common/cpu/team.h"
#include "common/cpu/tile.h"
#include "lstm/cpu/params.h"
#include "lstm/cpu/plan.h"

namespace throughtime {
namespace {

// A row length in memory that keeps rows on 64-byte lines and off each other's cache sets.
template <typename S>
TT_INLINE int64_t leading_dimension(int64_t columns) {
  constexpr int64_t line = 64 / sizeof(S);
  const int64_t lines = divide_up(columns, line);
  return (lines | 1) * line;
}

template <typename S>
TT_INLINE void copy_row(S* to, const S* from, int64_t count) {
  if (count == 1) {
    *to = *from;
  } else {
    std::memcpy(to, from, count * sizeof(S));
  }
}

// Rows of [row0, row0 + rows) that are inside their sequence at time t.
template <typename S>
TT_INLINE int64_t active_rows(const LstmInput<S>& in, int64_t t, int64_t row0, int64_t rows) {
  if (in.lengths)
    while (rows > 0 && in.lengths[row0 + rows - 1] <= t) --rows;
  return rows;
}

// panels[block][k][gate][lane] = weight[gate * H + block * L + lane][k], zero past the last unit.
template <typename S>
void pack_gate_panels(const S* weight, int64_t H, int64_t columns, S* panels, Share blocks) {
  constexpr int64_t L = kLanes<S>;
  for (int64_t block = blocks.begin; block < blocks.end; ++block)
    for (int64_t gate = 0; gate < 4; ++gate)
      transpose_rows<S>(
          [&](int64_t lane) {
            const int64_t unit = block * L + lane;
            return unit < H ? weight + (gate * H + unit) * columns : nullptr;
          },
          columns, panels + (block * columns * 4 + gate) * L, 4 * L);
}

template <typename S>
void pack_gate_bias(const S* bias, int64_t H, S* packed, Share blocks) {
  constexpr int64_t L = kLanes<S>;
  for (int64_t block = blocks.begin; block < blocks.end; ++block)
    for (int64_t gate = 0; gate < 4; ++gate) {
      const S* from = bias ? bias + gate * H + block * L : nullptr;
      store(packed + (block * 4 + gate) * L, bias ? load_part(from, H - block * L) : Vec<S>{});
    }
}

// Columns of weight [4H, columns], for products with gate gradients: panel q holds, for every
// (block, gate, lane) of the gate gradients' own order, `width` vectors of columns from
// q * width * L on (the last panel may be narrower), zero past the ends.
template <typename S>
void pack_column_panels(const S* weight, int64_t H, int64_t columns, int64_t width, S* panels,
                        Share which) {
  constexpr int64_t L = kLanes<S>;
  const int64_t blocks = divide_up(H, L), vectors = divide_up(columns, L);
  for (int64_t q = which.begin; q < which.end; ++q) {
    const int64_t here = vectors - q * width < width ? vectors - q * width : width;
    S* to = panels + q * width * L * blocks * 4 * L;
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t gate = 0; gate < 4; ++gate)
        for (int64_t lane = 0; lane < L; ++lane)
          for (int64_t j = 0; j < here; ++j, to += L) {
            const int64_t unit = block * L + lane, column = (q * width + j) * L;
            store(to, unit < H ? load_part(weight + (gate * H + unit) * columns + column,
                                           columns - column)
                               : Vec<S>{});
          }
  }
}

// The same for a weight [rows, columns] in its own order of rows.
template <typename S>
void pack_plain_panels(const S* weight, int64_t rows, int64_t columns, int64_t width, S* panels,
                       Share which) {
  constexpr int64_t L = kLanes<S>;
  const int64_t vectors = divide_up(columns, L);
  for (int64_t q = which.begin; q < which.end; ++q) {
    const int64_t here = vectors - q * width < width ? vectors - q * width : width;
    S* to = panels + q * width * L * rows;
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t j = 0; j < here; ++j, to += L) {
        const int64_t column = (q * width + j) * L;
        store(to, load_part(weight + row * columns + column, columns - column));
      }
  }
}

// The same for the transpose of a weight [rows, columns]: a panel's columns are the weight's rows.
template <typename S>
void pack_transposed_panels(const S* weight, int64_t rows, int64_t columns, int64_t width,
                            S* panels, Share which) {
  constexpr int64_t L = kLanes<S>;
  const int64_t vectors = divide_up(rows, L);
  for (int64_t q = which.begin; q < which.end; ++q) {
    const int64_t here = vectors - q * width < width ? vectors - q * width : width;
    for (int64_t v = 0; v < here; ++v)
      transpose_rows<S>(
          [&](int64_t lane) {
            const int64_t row = (q * width + v) * L + lane;
            return row < rows ? weight + row * columns : nullptr;
          },
          columns, panels + (q * width * columns + v) * L, here * L);
  }
}

}  // namespace
}  // namespace throughtime
