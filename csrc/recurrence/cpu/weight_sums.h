// Sums of weight gradients of a walk on the CPU, on their way to PyTorch's order.
//
// Every group of rows has its own sums, so groups never wait for each other; in the end they are
// added in the order of groups. The sums of one group that takes one chunk lie in one block's place,
// and go on from there before the next block comes.
#pragma once

#include "recurrence/cpu/plan.h"
#include "recurrence/cpu/ring.h"

namespace throughtime {
namespace {

template <typename Cell, typename X>
class WeightSums {
 protected:
  using S = typename Cell::Number;
  static constexpr int G = Cell::kGates;
  static constexpr int64_t L = kLanes<S>;
  static constexpr int64_t kGates = G * L;

 public:
  WeightSums(const WalkBackward<X>& args, const WalkPlan& plan, const WalkSchedule& schedule,
             Scratch* scratch)
      : p_(args),
        in_(args.in),
        shape_(args.in.shape),
        plan_(plan),
        blocks_(divide_up(shape_.H, L)),
        columns_(shape_.R + shape_.I + 1),
        once_(plan.groups == 1 && plan.chunk == shape_.T && in_.length(0) > 0) {
    if (!wanted()) return;
    const int64_t places = once_ ? schedule.members : blocks_;
    dw_ = scratch->template reserve<S>(plan.groups, places, columns_, kGates);
    dw_r_ = scratch->template reserve<S>(projected() ? plan.groups : 0, places, shape_.R, L);
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

  // Adds up the groups and puts the sums into PyTorch's order.
  void finish(Share blocks) {
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      scatter(block, block);
      if (projected()) scatter_projection(block, block);
    }
  }

 protected:
  bool projected() const { return in_.weight_hr != nullptr; }
  int64_t place(const GroupPart& part, int64_t block) const {
    return once_ ? part.member.begin : block;
  }

  // The sums of one block are complete if `chunk` is the last.
  void finish_block(const GroupPart& part, const Chunk& chunk, int64_t block) {
    if (!chunk.last) return;
    const Timing timing(part.member.watch, kFinish);
    scatter(place(part, block), block);
  }
  void finish_projection(const GroupPart& part, const Chunk& chunk, int64_t block) {
    if (!chunk.last) return;
    const Timing timing(part.member.watch, kFinish);
    scatter_projection(place(part, block), block);
  }
  int64_t tail(int64_t block) const { return shape_.H - block * L; }

  const WalkBackward<X>& p_;
  const WalkInput<X>& in_;
  const WalkShape shape_;
  const WalkPlan& plan_;
  const int64_t blocks_, columns_;
  const bool once_;  // a place for every member, not for every block
  Span<S> dw_;       // per group: [places, columns, G L]
  Span<S> dw_r_;     // per group: [places, R, L]

 private:
  void scatter(int64_t place, int64_t block) {
    scatter_columns(place, block, 0, shape_.R, p_.dweight_hh);
    scatter_columns(place, block, shape_.R, shape_.I, p_.dweight_ih);
    scatter_columns(place, block, shape_.R + shape_.I, 1, p_.dbias);
  }

  // Columns [first, first + count) of one block's sums, added over the groups, to `to` [G H, count].
  void scatter_columns(int64_t place, int64_t block, int64_t first, int64_t count, S* to) {
    const S* sums = dw_() + (place * columns_ + first) * kGates;
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

  void scatter_projection(int64_t place, int64_t block) {
    for (int64_t output = 0; output < shape_.R; ++output) {
      const int64_t at = (place * shape_.R + output) * L;
      Vec<S> sum = load(dw_r_() + at);
      for (int64_t group = 1; group < plan_.groups; ++group) sum += load(dw_r_(group) + at);
      store_part(p_.dweight_hr + output * shape_.H + block * L, sum, tail(block));
    }
  }
};

}  // namespace
}  // namespace throughtime
