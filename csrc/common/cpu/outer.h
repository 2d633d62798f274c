// Sums of outer products of rows in memory, divided among the members of a team.
//
// With operands of pairs this is a product as any other: the left operand is transposed, [column][k],
// and the right one gathered into panels. k counts from the last row to the first: rows are collected
// from the last step on, and the gradients of early steps may be small.
#pragma once

#include "common/cpu/matrix.h"
#include "common/cpu/team.h"

namespace throughtime {
namespace {

template <typename Operand>
class OuterProducts {
  using S = SumOf<Operand>;
  static constexpr int64_t L = kLanes<S>;

 public:
  // teams, members; the most rows, columns of a left and vectors of columns of a right operand.
  OuterProducts(int64_t, int64_t members, int64_t, int64_t, int64_t, Scratch*)
      : members_(members) {}

  // c [n, vectors * L] += a^T b for a [rows, n] and b [rows, vectors * L], complete for all members.
  void add(const Member& member, const Operand* a, int64_t lda, int64_t n, const Operand* b,
           int64_t ldb, int64_t vectors, int64_t rows, S* c, int64_t ldc) const {
    const Share own(n, member.begin, member.end, members_);
    add_outer_products(a + own.begin, lda, own.end - own.begin, b, ldb, vectors, rows,
                       c + own.begin * ldc, ldc);
  }

 private:
  const int64_t members_;
};

template <typename Operand>
requires(Numbers<Operand>::kPair == 2) class OuterProducts<Operand> {
  using S = SumOf<Operand>;
  using Pairs = Numbers<Operand>;
  static constexpr int64_t L = kLanes<S>;
  static constexpr int64_t kRun = 2 * L;                       // k that are gathered together
  static constexpr int64_t kTile = Tiling<Operand>::kPadding;  // columns that members share out

 public:
  OuterProducts(int64_t teams, int64_t members, int64_t rows, int64_t columns, int64_t vectors,
                Scratch* scratch)
      : members_(members), ld_(round_up(rows, kRun)) {
    left_ = scratch->template reserve<Operand>(teams, round_up(columns, kTile), ld_);
    right_ = scratch->template reserve<Operand>(teams, Panels<Operand>::numbers(ld_, vectors));
  }

  void add(const Member& member, const Operand* a, int64_t lda, int64_t n, const Operand* b,
           int64_t ldb, int64_t vectors, int64_t rows, S* c, int64_t ldc) const {
    if (rows == 0) return;
    const auto own = [&](int64_t count) {
      return Share(count, member.begin, member.end, members_);
    };
    const Panels<Operand> panels{right_(member.team), rows, vectors};
    const auto row_of = [&](const Operand* from, int64_t ld, int64_t k) {
      return k < rows ? from + (rows - 1 - k) * ld : nullptr;
    };
    member.wait();  // for others that are still at the product before
    const Share own_panels = own(panels.count());
    for (int64_t q = own_panels.begin; q < own_panels.end; ++q)
      for (int64_t k = 0; k < panels.depth(); k += 2)
        for (int64_t v = 0; v < panels.width_of(q); ++v)
          Pairs::put_pair(panels.place(q, k, v), k % panels.kDepth, row_of(b, ldb, k),
                          row_of(b, ldb, k + 1), (q * panels.width + v) * L);
    const Share tiles = own(divide_up(n, kTile));
    const int64_t begin = tiles.begin * kTile, count = least(tiles.end * kTile, n) - begin;
    Operand* left = left_(member.team) + begin * ld_;
    for (int64_t k = 0; k < panels.depth(); k += kRun) {
      const Operand* from[kRun];
      for (int64_t r = 0; r < kRun; ++r) {
        const Operand* row = row_of(a, lda, k + r);
        from[r] = row ? row + begin : nullptr;
      }
      Pairs::put_transposed(left, ld_, k, from, count);
    }
    member.wait();
    if (count > 0)
      multiply<Operand>({left, ld_, rows}, count, panels, {c + begin * ldc, ldc, true});
  }

 private:
  const int64_t members_, ld_;
  Span<Operand> left_;   // per team: [columns, ld_]
  Span<Operand> right_;  // per team: panels
};

}  // namespace
}  // namespace throughtime
