// What the backward pass of one group keeps of its last steps, and how chunks of them are read.
#pragma once

#include "recurrence/cpu/pack.h"

namespace throughtime {
namespace {

// Numbers of the last `slots` steps: [block][slot][row][width]. Step number n (counted in the order
// in which steps are walked) lies in slot n % slots.
template <typename S>
struct Ring {
  S* base;
  int64_t slots, rows, width;

  TT_INLINE S* at(int64_t block, int64_t slot, int64_t row) const {
    return base + ((block * slots + slot) * rows + row) * width;
  }
};

// Steps [step, step + steps) of the walk, the last one walked first, with number n. `last`: the sums
// of weight gradients are complete with it.
struct Chunk {
  int64_t step, steps, n;
  bool last;
};

// One group of rows and one member's part in it.
struct GroupPart {
  const Member& member;
  int team;
  int64_t row0, rows;  // the group's rows
  Share blocks;        // the member's own blocks of units

  TT_INLINE Share own(int64_t count) const { return Share(count, member.begin, member.end, team); }
};

// h_{t-1} of a row: of the outputs y, h_0 at its first step, or what a reset starts from; null where
// the state is zero.
template <typename X>
TT_INLINE const X* state_before(const WalkInput<X>& in, const X* y, int64_t t, int64_t at) {
  const int64_t sample = in.order[at], R = in.shape.R;
  if (in.resets(t, at)) return in.reset_h_at(t, at);
  if (t == in.first_time(at)) return in.h0 + sample * R;
  return y + ((in.reverse ? t + 1 : t - 1) * in.batch + sample) * R;
}

// Calls f(slot, index, rows) for the runs of (step, row) pairs of a chunk that lie side by side in
// a ring; index counts rows from the step walked first. Rows past their end are in no run.
template <typename X, typename Y, typename F>
TT_INLINE void for_runs(const WalkInput<X>& in, const GroupPart& part, const Chunk& chunk,
                        const Ring<Y>& ring, const F& f) {
  const auto active = [&](int64_t k) {
    return active_rows(in, in.time(chunk.step + chunk.steps - 1 - k), part.row0, part.rows);
  };
  for (int64_t k = 0; k < chunk.steps;) {
    const int64_t slot = (chunk.n + k) % ring.slots, rows = active(k);
    int64_t whole = 1;
    if (rows == ring.rows)
      while (k + whole < chunk.steps && slot + whole < ring.slots && active(k + whole) == rows)
        ++whole;
    f(slot, k * part.rows, whole * rows);
    k += whole;
  }
}

}  // namespace
}  // namespace throughtime
