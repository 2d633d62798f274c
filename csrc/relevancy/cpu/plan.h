// How relevancy attention divides its sequences (a sample and head) among workers, as pure functions.
//
// A worker walks a sequence of its own while there are enough for all workers. What is left over then
// goes to teams, whose members share the blocks of queries of a sequence. Which member makes a block
// decides no sum: results are bit-equal for every number of threads.
#pragma once

#include "relevancy/cpu/params.h"

namespace throughtime {

// Sequences [begin, end). A team of one takes one after the other; one of several has one.
struct SequencePart {
  int64_t begin, end;
  int teams, members;

  TT_INLINE int workers() const { return teams * members; }
};

// One part after the other; the second may be empty.
struct RelevancyPlan {
  SequencePart parts[2];

  TT_INLINE int teams() const { return most(parts[0].teams, parts[1].teams); }
  TT_INLINE int members() const { return most(parts[0].members, parts[1].members); }
  TT_INLINE int workers() const { return most(parts[0].workers(), parts[1].workers()); }
};

namespace relevancy_plan_detail {

constexpr double kOperationsToFork = 1 << 20;  // fewer cost less than starting threads
constexpr int64_t kQueriesPerMember = 256;     // fewer cost less than meeting at barriers
constexpr int64_t kMostMembers =
    8;  // one walks through the competition, which takes a third of the time

}  // namespace relevancy_plan_detail

// `shares`: whether the score's kernel knows teams of several members.
TT_INLINE RelevancyPlan plan_relevancy(const RelevancyShape& shape, int threads, bool shares) {
  using namespace relevancy_plan_detail;
  const int64_t sequences = shape.sequences(), T = shape.T();
  const double candidates = static_cast<double>(shape.screening.most_in_window()) +
                            static_cast<double>(shape.screening.most_retained());
  const double operations = 2.0 * shape.query_sequences() * T * candidates * (shape.D + shape.Dv);
  if (operations < kOperationsToFork) threads = 1;
  const int64_t left = sequences % threads;
  const int64_t most_members = shares ? least(kMostMembers, T / kQueriesPerMember) : 1;
  const int64_t members = left == 0 ? 1 : least(threads / left, most_members);
  if (members <= 1) {
    const int teams = static_cast<int>(least(threads, sequences));
    return {{{0, sequences, teams, 1}, {sequences, sequences, 0, 0}}};
  }
  return {{{0, sequences - left, sequences < threads ? 0 : threads, 1},
           {sequences - left, sequences, static_cast<int>(left), static_cast<int>(members)}}};
}

}  // namespace throughtime
