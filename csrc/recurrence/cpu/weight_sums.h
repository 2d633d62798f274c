// Sums of weight gradients of a walk on the CPU, on their way to PyTorch's order.
//
// Every group of rows has its own sums, so groups never wait for each other; in the end they are
// added in the order of groups.
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
  WeightSums(const WalkBackward<X>& args, const WalkPlan& plan, Scratch* scratch)
      : p_(args),
        in_(args.in),
        shape_(args.in.shape),
        plan_(plan),
        blocks_(divide_up(shape_.H, L)),
        columns_(shape_.R + shape_.I + 1) {
    if (!wanted()) return;
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

  // Adds up the groups and puts the sums into PyTorch's order.
  void finish(Share blocks) {
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      scatter_columns(block, 0, shape_.R, p_.dweight_hh);
      scatter_columns(block, shape_.R, shape_.I, p_.dweight_ih);
      scatter_columns(block, shape_.R + shape_.I, 1, p_.dbias);
      if (projected()) scatter_projection(block);
    }
  }

 protected:
  bool projected() const { return in_.weight_hr != nullptr; }
  int64_t tail(int64_t block) const { return shape_.H - block * L; }

  const WalkBackward<X>& p_;
  const WalkInput<X>& in_;
  const WalkShape shape_;
  const WalkPlan& plan_;
  const int64_t blocks_, columns_;
  Span<S> dw_;    // per group: [blocks, columns, G L]
  Span<S> dw_r_;  // per group: [blocks, R, L]

 private:
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
};

}  // namespace
}  // namespace throughtime
