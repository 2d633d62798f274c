// Sums of RelLSTM's weight gradients, on their way to PyTorch's order.
//
// Every group of rows has its own, so groups never wait for each other; in the end they are added in the
// order of groups.
#pragma once

#include "common/cpu/outer.h"
#include "rel_lstm/cpu/weights.h"

namespace throughtime {
namespace {

template <typename S, typename Operand>
class RelLstmWeightSums {
  using X = GivenAs<Operand>;
  static constexpr int64_t L = kLanes<S>;

 public:
  // `rows`: the most that are added at once.
  RelLstmWeightSums(const RelLstmBackward<X>& args, const RelLstmLayout<S>& layout,
                    const RelLstmPlan& plan, const WalkSchedule& schedule, int64_t rows,
                    Scratch* scratch)
      : p_(args),
        at_(layout),
        groups_(plan.groups),
        members_(schedule.members),
        outer_(wanted() ? schedule.teams : 0, schedule.members, rows, at_.stacked,
               most(at_.units, at_.inputs) / L, scratch) {
    const auto sums = [&](int64_t count) {
      return scratch->template reserve<S>(wanted() ? plan.groups : 0, count);
    };
    states_ = sums(times(at_.stacked, at_.units));
    inputs_ = sums(times(at_.gates, at_.inputs));
    keys_ = sums(times(at_.attention, at_.units));
    score_ = scratch->template reserve<S>(plan.groups, at_.attention);
  }

  bool wanted() const { return p_.dweight_hh != nullptr; }

  // Of the score's weight, which the attention adds to, wanted or not.
  S* score(int64_t group) const { return score_(group); }

  // Makes the member's share of a group's sums zeros.
  void clear(const Member& member, int64_t group) const {
    const auto clear_own = [&](S* sums, int64_t count, int64_t size) {
      clear_operands(sums, count, size, member, members_);
    };
    clear_own(score_(group), at_.attention / L, L);
    if (!wanted()) return;
    clear_own(states_(group), at_.stacked, at_.units);
    clear_own(inputs_(group), at_.gates, at_.inputs);
    clear_own(keys_(group), at_.attention, at_.units);
  }

  // Adds products of rows: [da, dq] with [s, x, 1].
  void add(const Member& member, int64_t group, const Operand* da, int64_t ld_da, const Operand* sx,
           int64_t ld_sx, int64_t rows) const {
    const int64_t n = at_.units;
    outer_.add(member, da, ld_da, at_.stacked, sx, ld_sx, n / L, rows, states_(group), n);
    outer_.add(member, da, ld_da, at_.gates, sx + n, ld_sx, at_.inputs / L, rows, inputs_(group),
               at_.inputs);
  }
  // The same of [h, du]: du with h.
  void add_keys(const Member& member, int64_t group, const Operand* keys, int64_t ld_keys,
                int64_t rows) const {
    const int64_t n = at_.units;
    outer_.add(member, keys + n, ld_keys, at_.attention, keys, ld_keys, n / L, rows, keys_(group),
               n);
  }

  // Adds up the groups, for rows of the stacked weight.
  void finish(Share rows) const {
    if (!wanted()) return;
    const int64_t H = at_.H, I = at_.I;
    for (int64_t n = rows.begin; n < rows.end; ++n) {
      const int64_t q = n - at_.gates, unit = n % at_.units;
      if (n < at_.gates && unit < H) {
        const int64_t row = n / at_.units * H + unit;
        total(states_(), at_.stacked, n, at_.units, H, p_.dweight_hh + row * H);
        total(inputs_(), at_.gates, n, at_.inputs, I, p_.dweight_ih + row * I);
        total(inputs_() + I, at_.gates, n, at_.inputs, 1, p_.dbias + row);
      } else if (q >= 0 && q < at_.A) {
        total(states_(), at_.stacked, n, at_.units, H, p_.dweight_query + q * H);
        total(keys_(), at_.attention, q, at_.units, H, p_.dweight_key + q * H);
        total(score_() + q, 1, 0, at_.attention, 1, p_.dweight_score + q);
      }
    }
  }

 private:
  // to [count] = row n of the sums [groups][rows][columns], added over the groups.
  void total(const S* sums, int64_t rows, int64_t n, int64_t columns, int64_t count, S* to) const {
    for (int64_t k = 0; k < count; k += L) {
      Vec<S> sum = load_part(sums + n * columns + k, count - k);
      for (int64_t group = 1; group < groups_; ++group)
        sum += load_part(sums + (group * rows + n) * columns + k, count - k);
      store_part(to + k, sum, count - k);
    }
  }

  const RelLstmBackward<X>& p_;
  const RelLstmLayout<S>& at_;
  const int64_t groups_, members_;
  OuterProducts<Operand> outer_;
  Span<S> states_, inputs_, keys_, score_;
};

}  // namespace
}  // namespace throughtime
