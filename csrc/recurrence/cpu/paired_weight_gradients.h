// Weight gradients of operands whose products take pairs of k, here (step, row) pairs of a chunk.
//
// The left operand [h_{t-1}, x_t, 1] is gathered transposed, [column][k], and da is gathered into
// panels [k / kDepth][gate][kDepth / 2][unit][2]: then this is a product as any other. k counts the
// rows that are inside their sequence, from the earliest step of the chunk on; zeros follow the last.
#pragma once

#include "recurrence/cpu/weight_gradients.h"

namespace throughtime {
namespace {

template <typename Cell, typename Operand>
requires(Numbers<Operand>::kPair == 2) class WeightGradients<Cell, Operand>
    : public WeightSums<Cell, GivenAs<Operand>> {
  using Base = WeightSums<Cell, GivenAs<Operand>>;
  using X = GivenAs<Operand>;
  using Pairs = Numbers<Operand>;
  using Base::blocks_, Base::columns_, Base::dw_, Base::dw_r_, Base::G, Base::in_, Base::kGates,
      Base::L, Base::p_, Base::plan_, Base::shape_;
  using typename Base::S;
  static constexpr int64_t kRun = 2 * L;  // k that are gathered together
  static_assert(kRun % Pairs::kDepth == 0);

 public:
  WeightGradients(const WalkBackward<X>& args, const WalkPlan& plan, const WalkSchedule& schedule,
                  Scratch* scratch)
      : Base(args, plan, schedule, scratch),
        most_(round_up(plan.chunk * divide_up(shape_.B, plan.groups), kRun)),
        ld_(leading_dimension<Operand>(most_)) {
    if (!this->wanted()) return;
    const int64_t teams = schedule.teams, projecting = this->projected() ? teams : 0;
    hx_ = scratch->template reserve<Operand>(teams, padded(columns_), ld_);
    dr_ = scratch->template reserve<Operand>(projecting, padded(shape_.R), ld_);
    da_ = scratch->template reserve<Operand>(teams, blocks_, most_, kGates);
    u_ = scratch->template reserve<Operand>(projecting, blocks_, most_, L);
  }

  // The left operand of one chunk.
  void gather(const GroupPart& part, const Chunk& chunk) {
    const Timing timing(part.member.watch, kGather);
    Operand* to = hx_(part.member.team);
    clear_rows(part, to, columns_);
    const X one = Pairs::one();
    for_own_runs(part, chunk, [&](int64_t k, const Row* rows) {
      const X *h[kRun], *x[kRun], *ones[kRun];
      for (int64_t r = 0; r < kRun; ++r) {
        const int64_t at = part.row0 + rows[r].row;
        h[r] = rows[r].inside ? state_before(in_, p_.y, rows[r].t, at) : nullptr;
        x[r] = rows[r].inside ? in_.x + rows[r].t * in_.x_stride_t + rows[r].sample * in_.x_stride_b
                              : nullptr;
        ones[r] = rows[r].inside ? &one : nullptr;
      }
      Pairs::put_transposed(to, ld_, k, h, shape_.R);
      Pairs::put_transposed(to + shape_.R * ld_, ld_, k, x, shape_.I);
      Pairs::put_transposed(to + (columns_ - 1) * ld_, ld_, k, ones, 1);
    });
  }

  // Adds a chunk's sum [h, x, 1]^T da to the group's own sums.
  void add(const GroupPart& part, int64_t group, const Chunk& chunk, const Ring<Operand>& da) {
    const int64_t rows = rows_of(part, chunk);
    const Panels<Operand> panels{da_(part.member.team), rows, blocks_ * G, G};
    for (int64_t block = part.blocks.begin; block < part.blocks.end; ++block) {
      pair_rows(part, chunk, da, block, panels, block);
      const Timing timing(part.member.watch, kWeights);
      multiply_slices({hx_(part.member.team), ld_, rows}, columns_, panels, block,
                      {.at = dw_(group) + this->place(part, block) * columns_ * kGates,
                       .row_stride = kGates,
                       .begun = chunk.n > 0});
      this->finish_block(part, chunk, block);
    }
  }

  // The same for the projection: sum dr^T u, u the output of the cell.
  void add_projection(const GroupPart& part, int64_t group, const Chunk& chunk,
                      const Ring<Operand>& dr, const Ring<Operand>& u) {
    Operand* to = dr_(part.member.team);
    {
      const Timing timing(part.member.watch, kGather);
      clear_rows(part, to, shape_.R);
      for_own_runs(part, chunk, [&](int64_t k, const Row* rows) {
        const Operand* from[kRun];
        for (int64_t r = 0; r < kRun; ++r)
          from[r] = rows[r].inside ? dr.at(0, rows[r].slot(chunk, dr), rows[r].row) : nullptr;
        Pairs::put_transposed(to, ld_, k, from, shape_.R);
      });
    }
    part.member.wait();
    const int64_t rows = rows_of(part, chunk);
    const Panels<Operand> panels{u_(part.member.team), rows, blocks_, 1};
    for (int64_t block = part.blocks.begin; block < part.blocks.end; ++block) {
      pair_rows(part, chunk, u, block, panels, block);
      const Timing timing(part.member.watch, kWeights);
      multiply_slices({to, ld_, rows}, shape_.R, panels, block,
                      {.at = dw_r_(group) + this->place(part, block) * shape_.R * L,
                       .row_stride = L,
                       .begun = chunk.n > 0});
      this->finish_projection(part, chunk, block);
    }
  }

 private:
  // One k: a row of the group at the step that was walked as number n of the chunk.
  struct Row {
    bool inside;  // false past the last one
    int64_t n, row, t, sample;

    int64_t slot(const Chunk& chunk, const Ring<Operand>& ring) const {
      return (chunk.n + n) % ring.slots;
    }
  };

  // The rows of a chunk in the order of k.
  class Rows {
   public:
    Rows(const WalkInput<X>& in, const GroupPart& part, const Chunk& chunk)
        : in_(in), part_(part), chunk_(chunk), n_(chunk.steps) {
      turn();
    }
    Row next() {
      if (n_ < 0) return {};
      const Row row{true, n_, row_, t_, in_.order[part_.row0 + row_]};
      if (++row_ == active_) turn();
      return row;
    }
    void skip(int64_t count) {
      while (n_ >= 0 && count > 0) {
        const int64_t some = least(count, active_ - row_);
        count -= some;
        row_ += some;
        if (row_ == active_) turn();
      }
    }

   private:
    // To the next later step that has rows.
    void turn() {
      row_ = active_ = 0;
      while (active_ == 0 && --n_ >= 0) {
        t_ = in_.time(chunk_.step + chunk_.steps - 1 - n_);
        active_ = active_rows(in_, t_, part_.row0, part_.rows);
      }
    }

    const WalkInput<X>& in_;
    const GroupPart& part_;
    const Chunk& chunk_;
    int64_t n_, row_ = 0, active_ = 0, t_ = 0;
  };

  // multiply_panel, kChain of k at a time: a slice of rows of the left operand stays in the first-level
  // cache. Sums of vectors end their chains there anyway, so they have the same bits.
  static void multiply_slices(const Left<Operand>& left, int64_t rows,
                              const Panels<Operand>& panels, int64_t q, Target<S> to) {
    for (int64_t k = 0; k < left.k_count; k += kChain, to.begun = true) {
      const int64_t count = least(kChain, left.k_count - k);
      const Panels<Operand> slice{panels.place(q, k, 0), count, panels.width, panels.width};
      multiply_panel<Operand>({left.at + k, left.row_stride, count}, rows, slice, 0, to);
    }
  }

  static int64_t padded(int64_t rows) { return round_up(rows, Tiling<Operand>::kPadding); }

  int64_t rows_of(const GroupPart& part, const Chunk& chunk) const {
    int64_t rows = 0;
    for (int64_t step = chunk.step; step < chunk.step + chunk.steps; ++step)
      rows += active_rows(in_, in_.time(step), part.row0, part.rows);
    return rows;
  }

  // f(k, rows) for the member's own runs of kRun rows from k on.
  template <typename F>
  void for_own_runs(const GroupPart& part, const Chunk& chunk, const F& f) const {
    const Share own = part.own(divide_up(rows_of(part, chunk), kRun));
    for_runs_of(part, chunk, own, f);
  }
  template <typename F>
  void for_runs_of(const GroupPart& part, const Chunk& chunk, Share runs, const F& f) const {
    Rows all(in_, part, chunk);
    all.skip(runs.begin * kRun);
    for (int64_t run = runs.begin; run < runs.end; ++run) {
      Row rows[kRun];
      for (Row& row : rows) row = all.next();
      f(run * kRun, rows);
    }
  }

  // Whole tiles of rows are multiplied: zeros past the last column.
  void clear_rows(const GroupPart& part, Operand* to, int64_t columns) const {
    if (part.member.begin == 0)
      std::memset(to + columns * ld_, 0, (padded(columns) - columns) * ld_ * sizeof(Operand));
  }

  // Panel q = block `block` of a ring.
  void pair_rows(const GroupPart& part, const Chunk& chunk, const Ring<Operand>& ring,
                 int64_t block, const Panels<Operand>& panels, int64_t q) const {
    const Timing timing(part.member.watch, kGather);
    const Share all(divide_up(panels.k_count, kRun), 0, 1);
    for_runs_of(part, chunk, all, [&](int64_t k, const Row* rows) {
      for (int64_t r = 0; r < kRun && k + r < panels.depth(); r += 2) {
        const auto at = [&](const Row& row) {
          return row.inside ? ring.at(block, row.slot(chunk, ring), row.row) : nullptr;
        };
        const Operand *first = at(rows[r]), *second = at(rows[r + 1]);
        for (int64_t v = 0; v < panels.width; ++v)
          Pairs::put_pair(panels.place(q, k + r, v), (k + r) % panels.kDepth, first, second, v * L);
      }
    });
  }

  const int64_t most_, ld_;
  Span<Operand> hx_;  // per team: [columns, ld_]
  Span<Operand> dr_;  // per team: [R, ld_]
  Span<Operand> da_;  // per team: panels of blocks of gates
  Span<Operand> u_;   // per team: panels of blocks of units
};

}  // namespace
}  // namespace throughtime
