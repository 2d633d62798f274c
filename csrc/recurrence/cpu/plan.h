// How a walk through time divides its work: pure functions of the shape, the number of gates and, for
// what a worker computes, of the number of threads. What decides the order of any sum depends on the
// shape alone, so results are bit-equal for every number of threads.
//
// Each step of a group of rows belongs to one team, and each member of the team has blocks of units, of
// one vector each.
#pragma once

#include <cstdint>

#include "common/sizes.h"
#include "recurrence/cpu/params.h"

namespace throughtime {

struct WalkPlan {
  int64_t groups;   // groups of rows that the batch is divided into; each walks through time alone
  int64_t chunk;    // steps per large product (input projection, weight gradient)
  bool fuse_input;  // x_t W_ih inside the step instead of one product per chunk
  int64_t unit_bytes;  // weights that a matrix unit reads in each step; 0: vectors multiply
};

struct WalkSchedule {
  int teams;    // groups that run at the same time
  int members;  // workers of a team: they split the units and meet at a barrier every step
  TT_INLINE int workers() const { return teams * members; }
};

namespace walk_plan_detail {

constexpr int64_t kNearBytes = 640 * 1024;        // recurrent weights that stay in an L2 cache
constexpr int64_t kProductRows = 96;              // rows that make a large product efficient
constexpr int64_t kFarProductRows = 512;          // the same for sums that lie in no cache
constexpr int64_t kBriefRows = 640;               // T B: up to here weights are read few times
constexpr int64_t kBriefBytes = 768 * 1024;       // all weights: below, packing costs little
constexpr int64_t kStraightChain = 256;           // terms of an element of a sum, as kChain
constexpr int64_t kGradientBytes = 64 << 20;      // for the groups' own sums of weight gradients
constexpr int64_t kFuseInputs = 48;               // below: a separate projection does not pay
constexpr double kOperationsPerWorker = 1 << 16;  // per step: below, a barrier costs more
constexpr int64_t kWidestPanel = 4;               // vectors of columns of a product
constexpr int64_t kLeastRows = 6;  // of a group, where there are more threads than units

constexpr double kOperationsToFork = 2 << 20;  // in all: below, starting threads costs more

// Of a matrix unit, which multiplies ten times as fast as vectors do and waits for memory.
constexpr int64_t kUnitRows = 16;             // of a tile, which costs the same with fewer
constexpr int64_t kUnitCacheBytes = 5 << 18;  // weights of one worker that stay in its L2 cache
constexpr double kUnitWait = 1.75;            // beyond: how much longer a product takes
constexpr int64_t kUnitFarBytes = 4 << 20;    // weights that the members of a team do not hold
constexpr int64_t kUnitFarRows = 128;         // of a group then
constexpr int64_t kUnitProductRows = 256;     // rows that make a large product efficient
constexpr int64_t kUnitSumBytes = 4 << 20;    // sums of weight gradients that lie in no cache
constexpr int64_t kUnitFuseInputs = 256;      // as kFuseInputs, where the weights are near

TT_INLINE int64_t chunk_of(const WalkShape& s, int64_t groups, int64_t rows) {
  return least(s.T, divide_up(rows, divide_up(s.B, groups)));
}

}  // namespace walk_plan_detail

// `unit`: a matrix unit multiplies.
TT_INLINE WalkPlan plan_walk(const WalkShape& s, int64_t gates, int64_t scalar_bytes, bool unit) {
  using namespace walk_plan_detail;
  const int64_t weights = times(gates * scalar_bytes, s.H, s.R);
  const int64_t gradients = times(gates * scalar_bytes, s.H, s.R + s.I + 1);
  WalkPlan plan;
  // Weights near: small groups need no barrier. Weights far: few groups read them less often.
  const bool near = weights <= kNearBytes, far_from_unit = unit && weights > kUnitFarBytes;
  // Rows of several steps fill a tile where those of one do not.
  plan.fuse_input =
      s.I <= (unit && near ? kUnitFuseInputs : kFuseInputs) && !(unit && s.B < kUnitRows);
  plan.unit_bytes = unit ? weights : 0;
  plan.groups = power_of_two_at_least(divide_up(s.B, near            ? 32
                                                     : far_from_unit ? kUnitFarRows
                                                                     : 64));
  if (plan.groups == 1 && s.B >= (unit ? 2 * kUnitRows : near ? 4 : 32) && !far_from_unit)
    plan.groups = 2;
  while (plan.groups > 1 && times(plan.groups, gradients) > kGradientBytes) plan.groups /= 2;
  // A brief walk costs as much as packing weights and summing their gradients: one group does either
  // where it uses it, so that nothing goes through memory twice.
  const bool brief = times(s.T, s.B) <= kBriefRows && gradients >= kBriefBytes;
  if (brief) plan.groups = 1;
  const bool far_sums =
      gradients > kGradientBytes || (unit && times(gates * 4, s.H, s.R + s.I + 1) > kUnitSumBytes);
  const int64_t rows_each = brief      ? kBriefRows
                            : far_sums ? kFarProductRows
                            : unit     ? kUnitProductRows
                                       : kProductRows;
  plan.chunk = chunk_of(s, plan.groups, rows_each);
  return plan;
}

// Whether a walk multiplies its weights as PyTorch has them, with another order of sums than packed
// ones: a walk of one step, unless a chain of its sums would be too long.
TT_INLINE bool goes_straight(const WalkShape& s, int64_t lanes) {
  return s.T == 1 && s.R + s.I <= times(walk_plan_detail::kStraightChain, lanes);
}

// `lanes`: units of a block. Of the partitions into teams and members the one whose busiest worker has
// least to do, a barrier counted, with as few workers as that takes.
TT_INLINE WalkSchedule schedule_walk(const WalkShape& s, int64_t gates, const WalkPlan& plan,
                                     int threads, int64_t lanes) {
  using namespace walk_plan_detail;
  const double step = 2.0 * gates * s.B * s.H * (s.R + s.I);  // operations
  WalkSchedule schedule{1, 1};
  if (threads <= 1 || step * s.T < kOperationsToFork) return schedule;
  const int64_t blocks = divide_up(s.H, lanes);
  const double per_team = step / plan.groups;
  const int64_t worth = static_cast<int64_t>(per_team / kOperationsPerWorker) + 1;
  const auto wait = [&](int64_t own) {
    return plan.unit_bytes * own > kUnitCacheBytes * blocks ? kUnitWait : 1;
  };
  double shortest = step * wait(blocks);
  for (int64_t teams = 1; teams <= least(plan.groups, threads); ++teams) {
    const int64_t own = divide_up(blocks, least(threads / teams, least(worth, blocks)));
    const int64_t members = divide_up(blocks, own);
    const double walk =
        per_team * wait(own) * own / blocks + (members > 1 ? kOperationsPerWorker / 2 : 0);
    const double length = divide_up(plan.groups, teams) * walk;
    if (length >= shortest) continue;
    shortest = length;
    schedule = {static_cast<int>(teams), static_cast<int>(members)};
  }
  return schedule;
}

// The plan of the forward, which sums nothing over rows: where threads are left when every member has
// one block of units, more groups of fewer rows.
TT_INLINE WalkPlan plan_forward(const WalkShape& s, int64_t gates, int64_t scalar_bytes, bool unit,
                                int threads, int64_t lanes) {
  using namespace walk_plan_detail;
  WalkPlan plan = plan_walk(s, gates, scalar_bytes, unit);
  // The products of the input lie in memory until their step comes.
  if (unit && plan.chunk < s.T) plan.chunk = chunk_of(s, plan.groups, kUnitProductRows);
  const WalkSchedule schedule = schedule_walk(s, gates, plan, threads, lanes);
  if (schedule.teams < plan.groups || schedule.members < divide_up(s.H, lanes)) return plan;
  const int64_t rows = s.B / plan.groups, fewest = unit ? kUnitRows : kLeastRows;
  plan.groups *= most(1, least(threads / schedule.workers(), rows / fewest));
  plan.chunk = chunk_of(s, plan.groups, kProductRows);
  return plan;
}

TT_INLINE Share group_rows(const WalkShape& s, const WalkPlan& plan, int64_t group) {
  return Share(s.B, group, plan.groups);
}

// Blocks of units, or vectors of outputs, of members [first, last) of a team. They lie in panels of
// `width`, which belong to one member.
TT_INLINE Share member_blocks(int64_t blocks, int64_t width, int64_t first, int64_t last,
                              int64_t members) {
  Share own(divide_up(blocks, width), first, last, members);
  own.begin = least(own.begin * width, blocks);
  own.end = least(own.end * width, blocks);
  return own;
}

// The width of panels whose busiest member has least to do. A step's product with a panel of n vectors
// takes as long as n + 1/2 of them, but one alone twice as long; weight gradients take as long again.
TT_INLINE int64_t panel_width(int64_t blocks, int64_t members) {
  int64_t best = 0, shortest = 0;
  for (int64_t width = walk_plan_detail::kWidestPanel; width >= 1; --width) {
    int64_t longest = 0;
    for (int64_t member = 0; member < members; ++member) {
      const Share own = member_blocks(blocks, width, member, member + 1, members);
      const int64_t count = own.end - own.begin;
      longest = most(longest, 4 * count + (width > 1 ? divide_up(count, width) : 4 * count));
    }
    if (best > 0 && longest >= shortest) continue;
    best = width;
    shortest = longest;
  }
  return best;
}

}  // namespace throughtime
