// Weight gradients of a walk on the CPU: dW_hh, dW_ih, db from one product per chunk of steps, and
// dW_hr of a projection.
//
// The left operand is [h_{t-1}, x_t, 1], gathered per chunk in tiles of columns; the right one is
// da as the walk left it in its ring. Every group of rows has its own sums, so groups never wait for
// each other; in the end they are added in the order of groups. A chunk is added up from its earliest
// step on: where the loss is on the last step gradients fall with every step back, and small terms
// come first.
#pragma once

#include "recurrence/cpu/plan.h"
#include "recurrence/cpu/ring.h"

namespace throughtime {
namespace {

template <typename Cell, typename Operand>
class WeightGradients {
  using S = typename Cell::Number;
  static constexpr int G = Cell::kGates;
  static constexpr int64_t L = kLanes<S>;
  static constexpr int64_t kGates = G * L;

 public:
  WeightGradients(const WalkBackward<S>& args, const WalkPlan& plan, const WalkSchedule& schedule,
                  Scratch* scratch)
      : p_(args),
        in_(args.in),
        shape_(args.in.shape),
        plan_(plan),
        blocks_(divide_up(shape_.H, L)),
        columns_(shape_.R + shape_.I + 1),
        most_rows_(divide_up(shape_.B, plan.groups)) {
    if (!wanted()) return;
    hx_ = scratch->template reserve<Operand>(schedule.teams, plan.chunk, most_rows_,
                                             columns_ + kRegisterRows);
    dw_ = scratch->template reserve<S>(plan.groups, blocks_, columns_, kGates);
    dw_r_ = scratch->template reserve<S>(projected() ? plan.groups : 0, blocks_, shape_.R, L);
  }

  bool wanted() const { return p_.dweight_hh != nullptr; }

  // For a group without any step; otherwise its first chunk writes the sums.
  void clear(const GroupPart& part, int64_t group) {
    const auto clear_blocks = [&](S* sums, int64_t size) {
      std::memset(sums + part.blocks.begin * size, 0,
                  (part.blocks.end - part.blocks.begin) * size * sizeof(S));
    };
    clear_blocks(dw_(group), columns_ * kGates);
    if (projected()) clear_blocks(dw_r_(group), shape_.R * L);
  }

  // Left operands of the weight gradient of one chunk, in the order in which its steps are walked.
  void gather(const GroupPart& part, const Chunk& chunk) {
    const Timing timing(part.member.watch, kGather);
    const Share own = part.own(chunk.steps * part.rows);
    const S one = 1;
    int64_t row = own.begin % part.rows, s = chunk.step + chunk.steps - 1 - own.begin / part.rows;
    for (int64_t r = own.begin; r < own.end; ++r) {
      const int64_t at = part.row0 + row, sample = in_.order[at], t = in_.time(s);
      const int64_t before = s - 1;
      if (++row == part.rows) {
        row = 0;
        --s;
      }
      if (t >= in_.length(at)) continue;
      const S* h = nullptr;
      if (!in_.resets(t, at))
        h = t == in_.first_time(at) ? in_.h0 + sample * shape_.R
                                    : p_.y + (in_.time(before) * shape_.B + sample) * shape_.R;
      put_columns(part, r, 0, h, shape_.R);
      put_columns(part, r, shape_.R, in_.x + t * in_.x_stride_t + sample * in_.x_stride_b,
                  shape_.I);
      put_columns(part, r, shape_.R + shape_.I, &one, 1);
    }
  }

  // Adds a chunk's sum da^T [h, x, 1] to the group's own sums.
  void add(const GroupPart& part, int64_t group, const Chunk& chunk, const Ring<Operand>& da) {
    const Timing timing(part.member.watch, kWeights);
    for (int64_t block = part.blocks.begin; block < part.blocks.end; ++block)
      for (int64_t column = 0; column < columns_; column += kRegisterRows)
        with_constant<kRegisterRows>(least(columns_ - column, kRegisterRows), [&](auto count) {
          S* to = dw_(group) + (block * columns_ + column) * kGates;
          Sum<S, decltype(count)::value, G> sum(to, kGates, chunk.n > 0);
          if (chunk.n > 0)
            for (int v = 0; v < decltype(count)::value * G; ++v) __builtin_prefetch(to + v * L);
          for_runs(in_, part, chunk, da.slots, [&](int64_t slot, int64_t index, int64_t rows) {
            const int64_t last = rows - 1;
            sum.multiply(hx_at(part, index + last, column), 1, -kRegisterRows,
                         da.at(block, slot, last), rows, -kGates);
          });
          sum.put();
        });
  }

  // The same for the projection: sum dr^T u, u the output of the cell.
  void add_projection(const GroupPart& part, int64_t group, const Chunk& chunk,
                      const Ring<Operand>& dr, const Ring<Operand>& u) {
    const Timing timing(part.member.watch, kWeights);
    for (int64_t block = part.blocks.begin; block < part.blocks.end; ++block)
      for_row_tiles(0, shape_.R, [&](int64_t output, int64_t height) {
        with_constant<kRegisterRows>(height, [&](auto count) {
          S* to = dw_r_(group) + (block * shape_.R + output) * L;
          Sum<S, decltype(count)::value, 1> sum(to, L, chunk.n > 0);
          for_runs(in_, part, chunk, u.slots, [&](int64_t slot, int64_t, int64_t rows) {
            sum.multiply(dr.at(0, slot, rows - 1) + output, 1, -dr.width,
                         u.at(block, slot, rows - 1), rows, -L);
          });
          sum.put();
        });
      });
  }

  // Adds up the groups and puts the sums into PyTorch's order.
  void finish(Share blocks) {
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      scatter_columns(block, 0, shape_.R, p_.dweight_hh);
      scatter_columns(block, shape_.R, shape_.I, p_.dweight_ih);
      scatter_columns(block, shape_.R + shape_.I, 1, p_.dbias);
      if (projected()) scatter_projection(block);
    }
  }

 private:
  bool projected() const { return in_.weight_hr != nullptr; }
  int64_t tail(int64_t block) const { return shape_.H - block * L; }

  // Tiles of kRegisterRows columns: the tile's k loop reads one contiguous piece.
  Operand* hx_at(const GroupPart& part, int64_t row, int64_t column) const {
    const int64_t tile = column / kRegisterRows * plan_.chunk * part.rows + row;
    return hx_(part.member.team) + tile * kRegisterRows + column % kRegisterRows;
  }

  // Columns [column, column + count) of a row; zeros where there is no source.
  TT_INLINE void put_columns(const GroupPart& part, int64_t row, int64_t column, const S* from,
                             int64_t count) {
    constexpr int64_t width = kRegisterRows;
    const int64_t to_next_tile = plan_.chunk * part.rows * width;
    const int64_t first = column % width;
    Operand* to = hx_at(part, row, column - first);
    const auto piece = [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) to[k] = Numbers<Operand>::narrow(from ? *from++ : S(0));
      to += to_next_tile;
      count -= end - begin;
    };
    if (first > 0) piece(first, least(width, first + count));
    for (; from && count >= width; count -= width, from += width, to += to_next_tile)
      copy_row(to, from, width);  // of constant size: a move or two
    while (count > 0) piece(0, least(width, count));
  }

  // Columns [first, first + count) of one block's sums, added over the groups, to `to` [G H, count].
  void scatter_columns(int64_t block, int64_t first, int64_t count, S* to) {
    const S* sums = dw_() + (block * columns_ + first) * kGates;
    const int64_t units = least(L, tail(block));
    for (int64_t column = 0; column < count; column += L)
      for (int64_t gate = 0; gate < G; ++gate) {
        Vec<S> v[L];
#pragma GCC unroll 16
        for (int64_t k = 0; k < L; ++k) {
          const S* from = sums + (column + k) * kGates + gate * L;
          v[k] = column + k < count ? load(from) : Vec<S>{};
          for (int64_t group = 1; column + k < count && group < plan_.groups; ++group)
            v[k] += load(from + (dw_(group) - dw_()));
        }
        transpose<S>(v);
        S* row = to + (gate * shape_.H + block * L) * count + column;
        for (int64_t unit = 0; unit < units; ++unit, row += count)
          store_part(row, v[unit], count - column);
      }
  }

  void scatter_projection(int64_t block) {
    for (int64_t output = 0; output < shape_.R; ++output) {
      const int64_t at = (block * shape_.R + output) * L;
      Vec<S> sum = load(dw_r_() + at);
      for (int64_t group = 1; group < plan_.groups; ++group) sum += load(dw_r_(group) + at);
      store_part(p_.dweight_hr + output * shape_.H + block * L, sum, tail(block));
    }
  }

  const WalkBackward<S>& p_;
  const WalkInput<S>& in_;
  const WalkShape shape_;
  const WalkPlan& plan_;
  const int64_t blocks_, columns_, most_rows_;
  Span<Operand> hx_;  // per team: [columns / kRegisterRows, chunk * rows, kRegisterRows]
  Span<S> dw_;        // per group: [blocks, columns, G L]
  Span<S> dw_r_;      // per group: [blocks, R, L]
};

}  // namespace
}  // namespace throughtime
