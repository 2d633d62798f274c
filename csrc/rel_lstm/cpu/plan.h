// How the CPU RelLSTM divides its work: the batch into groups of rows that walk through time alone, and
// each group's step among the members of a team. What decides the order of any sum is a pure function of
// the shape, so that results are bit-equal for every number of threads.
#pragma once

#include "recurrence/cpu/plan.h"
#include "rel_lstm/cpu/params.h"

namespace throughtime {

struct RelLstmPlan {
  int64_t groups;
  int64_t chunk_rows;  // rows that are collected for one product of the weight gradients
};

namespace rel_lstm_plan_detail {

constexpr int64_t kNearBytes = 640 * 1024;     // weights that stay in an L2 cache
constexpr int64_t kNearRows = 8;               // per group: attention reads much per row
constexpr int64_t kFarRows = 48;               // more rows for each reading of the weights
constexpr int64_t kProductRows = 96;           // rows that make a large product efficient
constexpr int64_t kGradientBytes = 64 << 20;   // for the groups' own sums of weight gradients
constexpr double kOperationsToFork = 1 << 20;  // in all: below, starting threads costs more
// Of a group in a step: below, four barriers cost more.
constexpr double kOperationsPerWorker = 1 << 16;

// Of the products.
TT_INLINE double step_operations(const RelLstmShape& s) {
  return 2.0 * s.B * (4 * s.H * (s.H + s.I) + 2 * s.A * s.H);
}
TT_INLINE bool worth_threads(const RelLstmShape& s) {
  return step_operations(s) * s.T() >= kOperationsToFork;
}

}  // namespace rel_lstm_plan_detail

TT_INLINE RelLstmPlan plan_rel_lstm(const RelLstmShape& s, int64_t scalar_bytes) {
  using namespace rel_lstm_plan_detail;
  const int64_t weights = times(4 * s.H + 2 * s.A, s.H, scalar_bytes);
  const int64_t numbers = times(4 * s.H + 2 * s.A, s.units()) + times(4, s.H, s.I + kRelLstmUnits);
  const int64_t gradients = times(numbers, scalar_bytes);
  const int64_t rows = weights <= kNearBytes ? kNearRows : kFarRows;
  RelLstmPlan plan{power_of_two_at_least(divide_up(s.B, rows)), 0};
  if (plan.groups == 1 && s.B >= 2) plan.groups = 2;
  while (plan.groups > 2 && times(plan.groups, gradients) > kGradientBytes) plan.groups /= 2;
  plan.chunk_rows = kProductRows + divide_up(s.B, plan.groups);
  return plan;
}

// The plan of the forward, which sums nothing over rows: where threads are left, more groups of fewer
// rows.
TT_INLINE RelLstmPlan plan_rel_lstm_forward(const RelLstmShape& s, int64_t scalar_bytes,
                                            int threads) {
  RelLstmPlan plan = plan_rel_lstm(s, scalar_bytes);
  if (rel_lstm_plan_detail::worth_threads(s))
    plan.groups = most(plan.groups, divide_up(s.B, most(1, divide_up(s.B, threads))));
  return plan;
}

// `lanes`: units of a block. A team has one member, but where every group has a team and threads are
// left: members split units, and the candidates of a row.
TT_INLINE WalkSchedule schedule_rel_lstm(const RelLstmShape& s, const RelLstmPlan& plan,
                                         int threads, int64_t lanes) {
  using namespace rel_lstm_plan_detail;
  if (threads <= 1 || !worth_threads(s)) return {1, 1};
  const int64_t walks = divide_up(plan.groups, threads);  // of a team, one after the other
  const int64_t teams = divide_up(plan.groups, walks), blocks = s.units() / lanes;
  const int64_t worth =
      static_cast<int64_t>(step_operations(s) / plan.groups / kOperationsPerWorker);
  const int64_t own = divide_up(blocks, most(1, least(threads / teams, least(worth, blocks))));
  return {static_cast<int>(teams), static_cast<int>(divide_up(blocks, own))};
}

}  // namespace throughtime
