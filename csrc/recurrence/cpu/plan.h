// How a walk through time divides its work: pure functions of the shape and the number of gates
// (and, for the second, of the number of threads). What decides the order of any sum depends on the shape alone, so results are
// bit-equal for every number of threads.
#pragma once

#include <cstdint>

#include "common/sizes.h"
#include "recurrence/cpu/params.h"

namespace throughtime {

struct WalkPlan {
  int64_t groups;   // groups of rows that the batch is divided into; each walks through time alone
  int64_t chunk;    // steps per large product (input projection, weight gradient)
  bool fuse_input;  // x_t W_ih inside the step instead of one product per chunk
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
constexpr int64_t kGradientBytes = 64 << 20;      // for the groups' own sums of weight gradients
constexpr int64_t kFuseInputs = 48;               // below: a separate projection does not pay
constexpr double kOperationsPerWorker = 1 << 16;  // per step: below, a barrier costs more
constexpr double kOperationsToFork = 2 << 20;     // in all: below, starting threads costs more

}  // namespace walk_plan_detail

TT_INLINE WalkPlan plan_walk(const WalkShape& s, int64_t gates, int64_t scalar_bytes) {
  using namespace walk_plan_detail;
  const int64_t weights = times(gates * scalar_bytes, s.H, s.R);
  const int64_t gradients = times(gates * scalar_bytes, s.H, s.R + s.I + 1);
  WalkPlan plan;
  // Weights near: small groups need no barrier. Weights far: few groups read them less often.
  const int64_t rows = weights <= kNearBytes ? 32 : 64;
  plan.groups = power_of_two_at_least(divide_up(s.B, rows));
  if (plan.groups == 1 && s.B >= (weights <= kNearBytes ? 4 : 32)) plan.groups = 2;
  while (plan.groups > 1 && times(plan.groups, gradients) > kGradientBytes) plan.groups /= 2;
  // A brief walk costs as much as packing weights and summing their gradients: one group does either
  // where it uses it, so that nothing goes through memory twice.
  const bool brief = times(s.T, s.B) <= kBriefRows && gradients >= kBriefBytes;
  if (brief) plan.groups = 1;
  const int64_t rows_each = brief                        ? kBriefRows
                            : gradients > kGradientBytes ? kFarProductRows
                                                         : kProductRows;
  plan.chunk = divide_up(rows_each, divide_up(s.B, plan.groups));
  if (plan.chunk > s.T) plan.chunk = s.T;
  plan.fuse_input = s.I <= kFuseInputs;
  return plan;
}

TT_INLINE WalkSchedule schedule_walk(const WalkShape& s, int64_t gates, const WalkPlan& plan,
                                     int threads) {
  using namespace walk_plan_detail;
  const double step = 2.0 * gates * s.B * s.H * (s.R + s.I);  // operations
  WalkSchedule schedule{1, 1};
  if (threads <= 1 || step * s.T < kOperationsToFork) return schedule;
  schedule.teams = static_cast<int>(plan.groups < threads ? plan.groups : threads);
  const double per_team = step / plan.groups;
  const int64_t most = threads / schedule.teams;
  const int64_t worth = static_cast<int64_t>(per_team / kOperationsPerWorker) + 1;
  const int64_t units = divide_up(s.H, kSavedUnits);
  int64_t members = most < worth ? most : worth;
  if (members > units) members = units;
  schedule.members = static_cast<int>(members);
  return schedule;
}

}  // namespace throughtime
