// Weight gradients of a walk on the CPU: dW_hh, dW_ih, db from one product per chunk of steps, and
// dW_hr of a projection.
//
// The left operand is [h_{t-1}, x_t, 1], gathered per chunk in tiles of columns; the right one is
// da as the walk left it in its ring. A chunk is added up from its earliest step on: where the loss is
// on the last step gradients fall with every step back, and small terms come first.
// Operands of pairs have a way of their own: paired_weight_gradients.h.
#pragma once

#include "recurrence/cpu/weight_sums.h"

namespace throughtime {
namespace {

template <typename Cell, typename Operand>
class WeightGradients : public WeightSums<Cell, Operand> {
  using Base = WeightSums<Cell, Operand>;
  using Base::blocks_, Base::columns_, Base::dw_, Base::dw_r_, Base::G, Base::in_, Base::kGates,
      Base::L, Base::p_, Base::plan_, Base::shape_;
  using typename Base::S;

 public:
  WeightGradients(const WalkBackward<Operand>& args, const WalkPlan& plan,
                  const WalkSchedule& schedule, Scratch* scratch)
      : Base(args, plan, schedule, scratch) {
    if (!this->wanted()) return;
    hx_ = scratch->template reserve<Operand>(
        schedule.teams, plan.chunk, divide_up(shape_.B, plan.groups), columns_ + kRegisterRows);
  }

  // Left operands of the weight gradient of one chunk, in the order in which its steps are walked.
  void gather(const GroupPart& part, const Chunk& chunk) {
    const Timing timing(part.member.watch, kGather);
    const Share own = part.own(chunk.steps * part.rows);
    const Operand one = Numbers<Operand>::one();
    int64_t row = own.begin % part.rows, s = chunk.step + chunk.steps - 1 - own.begin / part.rows;
    for (int64_t r = own.begin; r < own.end; ++r) {
      const int64_t at = part.row0 + row, sample = in_.order[at], t = in_.time(s);
      if (++row == part.rows) {
        row = 0;
        --s;
      }
      if (t >= in_.length(at)) continue;
      put_columns(part, r, 0, state_before(in_, p_.y, t, at), shape_.R);
      put_columns(part, r, shape_.R, in_.x + t * in_.x_stride_t + sample * in_.x_stride_b,
                  shape_.I);
      put_columns(part, r, shape_.R + shape_.I, &one, 1);
    }
  }

  // Adds a chunk's sum da^T [h, x, 1] to the group's own sums.
  void add(const GroupPart& part, int64_t group, const Chunk& chunk, const Ring<Operand>& da) {
    const Timing timing(part.member.watch, kWeights);
    for (int64_t block = part.blocks.begin; block < part.blocks.end; ++block) {
      for (int64_t column = 0; column < columns_; column += kRegisterRows)
        with_constant<kRegisterRows>(least(columns_ - column, kRegisterRows), [&](auto count) {
          S* to = dw_(group) + (this->place(part, block) * columns_ + column) * kGates;
          Sum<S, decltype(count)::value, G> sum(to, kGates, chunk.n > 0);
          if (chunk.n > 0)
            for (int v = 0; v < decltype(count)::value * G; ++v) __builtin_prefetch(to + v * L);
          for_runs(in_, part, chunk, da, [&](int64_t slot, int64_t index, int64_t rows) {
            const int64_t last = rows - 1;
            sum.multiply(hx_at(part, index + last, column), 1, -kRegisterRows,
                         da.at(block, slot, last), rows, -kGates);
          });
          sum.put();
        });
      this->finish_block(part, chunk, block);
    }
  }

  // The same for the projection: sum dr^T u, u the output of the cell.
  void add_projection(const GroupPart& part, int64_t group, const Chunk& chunk,
                      const Ring<Operand>& dr, const Ring<Operand>& u) {
    const Timing timing(part.member.watch, kWeights);
    for (int64_t block = part.blocks.begin; block < part.blocks.end; ++block) {
      for_row_tiles(0, shape_.R, [&](int64_t output, int64_t height) {
        with_constant<kRegisterRows>(height, [&](auto count) {
          S* to = dw_r_(group) + (this->place(part, block) * shape_.R + output) * L;
          Sum<S, decltype(count)::value, 1> sum(to, L, chunk.n > 0);
          for_runs(in_, part, chunk, u, [&](int64_t slot, int64_t, int64_t rows) {
            sum.multiply(dr.at(0, slot, rows - 1) + output, 1, -dr.width,
                         u.at(block, slot, rows - 1), rows, -L);
          });
          sum.put();
        });
      });
      this->finish_projection(part, chunk, block);
    }
  }

 private:
  // Tiles of kRegisterRows columns: the tile's k loop reads one contiguous piece.
  Operand* hx_at(const GroupPart& part, int64_t row, int64_t column) const {
    const int64_t tile = column / kRegisterRows * plan_.chunk * part.rows + row;
    return hx_(part.member.team) + tile * kRegisterRows + column % kRegisterRows;
  }

  // Columns [column, column + count) of a row; zeros where there is no source.
  TT_INLINE void put_columns(const GroupPart& part, int64_t row, int64_t column,
                             const Operand* from, int64_t count) {
    constexpr int64_t width = kRegisterRows;
    const int64_t to_next_tile = plan_.chunk * part.rows * width;
    const int64_t first = column % width;
    Operand* to = hx_at(part, row, column - first);
    const auto piece = [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) to[k] = from ? *from++ : Operand{};
      to += to_next_tile;
      count -= end - begin;
    };
    if (first > 0) piece(first, least(width, first + count));
    for (; from && count >= width; count -= width, from += width, to += to_next_tile)
      copy_row(to, from, width);  // of constant size: a move or two
    while (count > 0) piece(0, least(width, count));
  }

  Span<Operand> hx_;  // per team: [columns / kRegisterRows, chunk * rows, kRegisterRows]
};

}  // namespace
}  // namespace throughtime
