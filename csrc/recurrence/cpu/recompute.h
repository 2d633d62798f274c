// The gates of one chunk of steps, computed again in the backward pass where only c was saved.
//
// All states are known by then: this is one product per chunk, with no barrier between steps. Sums
// are added in the forward's order, so float32 and float64 gates have the forward's bits.
#pragma once

#include "recurrence/cpu/plan.h"
#include "recurrence/cpu/ring.h"
#include "recurrence/cpu/straight.h"

namespace throughtime {
namespace {

template <typename Cell, typename Operand>
class Recomputation {
  using S = typename Cell::Number;
  using X = GivenAs<Operand>;
  static constexpr int G = Cell::kGates;
  static constexpr int64_t L = kLanes<S>;
  static constexpr int64_t kGates = G * L;
  static constexpr int64_t kTileRows = Tiling<Operand>::kRows;
  static constexpr bool kMayGoStraight = throughtime::kMayGoStraight<Cell, Operand>;

 public:
  Recomputation(const WalkBackward<X>& args, const WalkPlan& plan, const WalkSchedule& schedule,
                int64_t slots, Scratch* scratch)
      : p_(args),
        in_(args.in),
        shape_(args.in.shape),
        plan_(plan),
        blocks_(divide_up(shape_.H, L)),
        slots_(slots),
        straight_(kMayGoStraight && goes_straight(shape_, L)),
        rows_(plan.chunk * divide_up(shape_.B, plan.groups)),
        ld_x_(leading_dimension<Operand>(shape_.I)),
        ld_h_(leading_dimension<Operand>(shape_.R)) {
    if (!wanted()) return;
    panel_x_ = scratch->template reserve<Operand>(Panels<Operand>::numbers(shape_.I, blocks_ * G));
    panel_h_ = scratch->template reserve<Operand>(Panels<Operand>::numbers(shape_.R, blocks_ * G));
    bias_ = scratch->template reserve<S>(blocks_, kGates);
    const int64_t rows = rows_ + Tiling<Operand>::kPadding;
    x_ = scratch->template reserve<Operand>(schedule.teams, rows, ld_x_);
    h_ = scratch->template reserve<Operand>(schedule.teams, rows, ld_h_);
    again_ = scratch->template reserve<S>(schedule.teams, blocks_, slots,
                                          divide_up(shape_.B, plan.groups), Cell::kSaved * L);
  }

  bool wanted() const { return p_.cell_only; }

  Ring<S> ring(int64_t team, int64_t rows) const {
    return {wanted() ? again_(team) : nullptr, slots_, rows, Cell::kSaved * L};
  }

  void prepare(Share blocks) {
    const auto pack = [&](const Panels<Operand>& to, const S* weight) {
      pack_rows_as_columns(to, blocks,
                           [&](int64_t n) { return gate_row<G>(weight, shape_.H, to.k_count, n); });
    };
    if (!straight_) {
      pack(panel_x(), in_.weight_ih);
      pack(panel_h(), in_.weight_hh);
    }
    pack_gate_bias<G>(in_.bias, shape_.H, bias_(), blocks);
  }

  // x_t and h_{t-1} of a chunk, the step walked first first.
  void gather(const GroupPart& part, const Chunk& chunk) {
    const Timing timing(part.member.watch, kGather);
    Operand *x = x_(part.member.team), *h = h_(part.member.team);
    const int64_t rows = chunk.steps * part.rows;
    const Share own = part.own(rows);
    for (int64_t r = own.begin; r < own.end; ++r) {
      const int64_t at = part.row0 + r % part.rows, t = in_.time(step_of(part, chunk, r));
      const X* from = in_.x + t * in_.x_stride_t + in_.order[at] * in_.x_stride_b;
      const bool inside = t < in_.length(at);
      put(x + r * ld_x_, inside ? from : nullptr, shape_.I, ld_x_);
      put(h + r * ld_h_, inside ? state_before(in_, p_.y, t, at) : nullptr, shape_.R, ld_h_);
    }
    if (part.member.begin > 0) return;
    for (int64_t r = rows; r < rows + Tiling<Operand>::kPadding; ++r) {
      put(x + r * ld_x_, nullptr, shape_.I, ld_x_);
      put(h + r * ld_h_, nullptr, shape_.R, ld_h_);
    }
  }

  // What the forward would have saved of a chunk, into the member's own blocks of a ring.
  // cell_before(step, block, row) is c_{t-1}.
  template <typename F>
  void run(const GroupPart& part, const Chunk& chunk, const Ring<S>& ring, const F& cell_before) {
    const Timing timing(part.member.watch, kRecurrent);
    const Operand *x = x_(part.member.team), *h = h_(part.member.team);
    for (int64_t block = part.blocks.begin; block < part.blocks.end; ++block)
      for_runs(in_, part, chunk, ring, [&](int64_t slot, int64_t index, int64_t rows) {
        for_product_rows<Operand>(0, rows, [&](int64_t row, int64_t height) {
          TileBuffer<S, kTileRows> gates;
          const int64_t first = index + row;
          gate_sums(block, {x + first * ld_x_, ld_x_, shape_.I},
                    {h + first * ld_h_, ld_h_, shape_.R}, height, gates.numbers);
          for (int64_t r = 0; r < height; ++r) {
            const int64_t step = step_of(part, chunk, first + r);
            Vec<S> a[G], kept[Cell::kSaved];
            Vec<S> c = cell_before(step, block, part.row0 + (first + r) % part.rows);
            load_vectors<G>(gates.numbers + r * kGates, L, a);
            Cell::advance(a, &c, kept);
            store_vectors<Cell::kSaved>(ring.at(block, slot, row + r), L, kept);
          }
        });
      });
  }

 private:
  Panels<Operand> panel_x() const { return {panel_x_(), shape_.I, blocks_ * G, G}; }
  Panels<Operand> panel_h() const { return {panel_h_(), shape_.R, blocks_ * G, G}; }

  static int64_t step_of(const GroupPart& part, const Chunk& chunk, int64_t r) {
    return chunk.step + chunk.steps - 1 - r / part.rows;
  }

  // `count` numbers, or zeros, and zeros past them.
  static void put(Operand* to, const X* from, int64_t count, int64_t ld) {
    std::memset(to, 0, ld * sizeof(Operand));
    if (from) copy_row(to, from, count);
  }

  // To a TileBuffer. In the order of ForwardWalk: x in a sum of its own where it is a product of its
  // own there.
  TT_INLINE void gate_sums(int64_t block, Left<Operand> x, Left<Operand> h, int64_t rows,
                           S* to) const {
    const Operand *panel_x = this->panel_x().panel(block), *panel_h = this->panel_h().panel(block);
    const S* bias = bias_() + block * kGates;
    if constexpr (kMayGoStraight)
      if (straight_) {
        const StraightBlock<S> from{{{h.at, h.row_stride, in_.weight_hh, shape_.R},
                                     {x.at, x.row_stride, in_.weight_ih, shape_.I}},
                                    shape_.H,
                                    block * L,
                                    bias};
        return straight_sums(from, 0, rows, to);
      }
    const auto nothing = [](int) {};
    if (plan_.fuse_input) {
      sum_gates<G, Operand>({x, panel_x}, {h, panel_h}, rows,
                            {.at = to, .row_stride = kGates, .bias = bias, .whole = true}, nothing);
      return;
    }
    TileBuffer<S, kTileRows> sums;
    sum_products<G, 1, Operand>(
        {{x, panel_x}}, rows,
        {.at = sums.numbers, .row_stride = kGates, .bias = bias, .whole = true}, nothing);
    sum_products<G, 1, Operand>({{h, panel_h}}, rows,
                                {.at = to,
                                 .row_stride = kGates,
                                 .addend = sums.numbers,
                                 .addend_stride = kGates,
                                 .whole = true},
                                nothing);
  }

  const WalkBackward<X>& p_;
  const WalkInput<X>& in_;
  const WalkShape shape_;
  const WalkPlan& plan_;
  const int64_t blocks_, slots_;
  const bool straight_;  // as in the forward
  const int64_t rows_, ld_x_, ld_h_;
  Span<Operand> panel_x_, panel_h_;
  Span<Operand> x_, h_;  // per team: [chunk * rows, ld]
  Span<S> bias_;         // [blocks, G L]
  Span<S> again_;        // per team: a ring
};

}  // namespace
}  // namespace throughtime
