// The weights of a RelLSTM as the CPU kernels read them, and what both passes know of a row.
//
// Left operands of products lie in rows of Operand that begin as zeros. Only numbers inside H, A or I
// are put there, so that products read zeros past them.
//
// The gradients of the gates and of the query are one row [da, dq], which the stacked weight [W_hh; V_a]
// multiplies: gates i, f, g, o of `units` each, then the query; padded with zeros.
#pragma once

#include "common/cpu/matrix.h"
#include "common/cpu/team.h"
#include "lstm/cpu/cell.h"
#include "recurrence/cpu/pack.h"
#include "rel_lstm/cpu/params.h"
#include "rel_lstm/cpu/plan.h"

namespace throughtime {
namespace {

template <typename S>
struct RelLstmLayout {
  static constexpr int64_t L = kLanes<S>;

  explicit RelLstmLayout(const RelLstmShape& shape)
      : H(shape.H),
        A(shape.A),
        I(shape.I),
        units(shape.units()),
        attention(shape.attention_units()),
        gates(4 * units),
        stacked(gates + attention),
        inputs(round_up(shape.I + 1, L)),
        key(shape.key_numbers()),
        step(shape.step_numbers()) {}

  int64_t H, A, I;
  int64_t units, attention, gates, stacked;  // columns
  int64_t inputs;                            // columns of [x, 1]
  int64_t key, step;                         // numbers saved per row

  // Row of a weight [4H, columns] that makes column n of the gates; null in the padding.
  TT_INLINE const S* gate_row(const S* weight, int64_t columns, int64_t n) const {
    const int64_t unit = n % units;
    return unit < H ? weight + (n / units * H + unit) * columns : nullptr;
  }
  TT_INLINE const S* attention_row(const S* weight, int64_t n) const {
    return n < A ? weight + n * H : nullptr;
  }
  template <typename X>
  TT_INLINE const S* stacked_row(const RelLstmInput<X>& in, int64_t n) const {
    return n < gates ? gate_row(in.weight_hh, H, n) : attention_row(in.weight_query, n - gates);
  }
};

// Makes the member's own share of `rows` rows zeros.
template <typename Operand>
void clear_operands(Operand* to, int64_t rows, int64_t ld, const Member& member, int64_t members) {
  const Share own(rows, member.begin, member.end, members);
  std::memset(to + own.begin * ld, 0, (own.end - own.begin) * ld * sizeof(Operand));
}

// Calls f(row, begin, end) for the member's own part of the candidates of rows [0, rows), count(row)
// each: whole vectors of scores, evenly divided.
template <typename S, typename Count, typename F>
TT_INLINE void for_own_candidates(const Member& member, int64_t members, int64_t rows,
                                  const Count& count, const F& f) {
  constexpr int64_t L = kLanes<S>;
  int64_t vectors = 0;
  for (int64_t row = 0; row < rows; ++row) vectors = most(vectors, divide_up(count(row), L));
  const Share own(rows * vectors, member.begin, member.end, members);
  for (int64_t at = own.begin; at < own.end;) {
    const int64_t row = at / vectors, first = at % vectors;
    const int64_t last = least(vectors, first + own.end - at);
    const int64_t begin = first * L, end = least(last * L, count(row));
    if (begin < end) f(row, begin, end);
    at += last - first;
  }
}

// `count` numbers and zeros up to `columns`.
template <typename S>
TT_INLINE void load_row(S* to, const S* from, int64_t count, int64_t columns) {
  for (int64_t k = 0; k < columns; k += kLanes<S>)
    store(to + k, from ? load_part(from + k, count - k) : Vec<S>{});
}

// Zeros past `count` of `columns`: infinity times a weight of zero has made them NaN.
template <typename S>
TT_INLINE void clear_padding(S* row, int64_t count, int64_t columns) {
  for (int64_t k = count; k < columns; ++k) row[k] = 0;
}

template <typename S>
TT_INLINE void prefetch_row(const S* row, int64_t count) {
  constexpr int64_t kLineNumbers = 64 / sizeof(S);
  for (int64_t k = 0; k < count; k += kLineNumbers) __builtin_prefetch(row + k, 0, 2);
}

}  // namespace
}  // namespace throughtime
