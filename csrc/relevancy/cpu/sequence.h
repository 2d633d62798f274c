// One sequence of a call (a sample and head): where its rows lie, and the memory that a pass keeps for
// it.
#pragma once

#include "common/cpu/team.h"
#include "relevancy/cpu/plan.h"
#include "relevancy/cpu/screening.h"

namespace throughtime {
namespace {

template <typename S>
struct SequenceRows {
  int64_t number, head;
  Steps steps;
  ScreeningShape screening;
  int64_t positions;                    // keys that are there: P and those of its queries
  const S *query, *key, *value;         // rows as far apart as the input's strides say
  int64_t first_query, first_position;  // rows of results that have one for each

  TT_INLINE SequenceRows(const RelevancyInput<S>& in, int64_t n)
      : number(n),
        head(n % in.shape.heads),
        steps(in.steps(n / in.shape.heads)),
        screening(in.shape.screening),
        positions(screening.P + steps.length),
        query(in.query.sequence(n / in.shape.heads, head)),
        key(in.key.sequence(n / in.shape.heads, head)),
        value(in.value.sequence(n / in.shape.heads, head)),
        first_query(n * screening.T),
        first_position(n * screening.positions()) {}
};

// The most keys that a query attends as retained ones.
template <typename S>
int64_t most_retained(const RelevancyInput<S>& in, const int64_t* last) {
  int64_t retained = 0;
  for (int64_t n = 0; n < in.shape.sequences(); ++n) {
    const SequenceRows<S> rows(in, n);
    retained = most(retained,
                    retained_at_end(rows.screening, rows.steps, {last + rows.first_position, 1}));
  }
  return retained;
}

// What keys of a sequence compete with.
template <typename S>
TT_INLINE Relevance<S> relevance_of(const RelevancyForward<S>& args, int64_t n) {
  const S* given = args.given ? args.given + n * args.in.shape.T() : nullptr;
  return {args.keep_first, given, args.normalize};
}

// What all passes have: the plan, and scratch memory for each worker or team.
class SequencePass {
 public:
  int64_t blocks() const { return 0; }
  void prepare(Share) {}
  void finish(Share) {}

 protected:
  SequencePass(const RelevancyPlan& plan, const Runtime& runtime)
      : plan_(plan), scratch_(runtime), barriers_(scratch_.reserve<Barrier>(plan.teams() + 1)) {}

  template <typename N>
  Span<N> per_worker(int64_t count) {
    return scratch_.reserve<N>(plan_.workers(), count);
  }
  template <typename N>
  Span<N> per_team(int64_t count) {
    return scratch_.reserve<N>(plan_.teams(), count);
  }

  // Runs pass.walk_sequence(member, number) for all sequences, one part of the plan after the other.
  template <typename Pass>
  void run_parts(const Runtime& runtime, Pass& pass) {
    scratch_.allocate();
    for (const SequencePart& part : plan_.parts) {
      part_ = &part;
      if (part.teams > 0) run_workers(runtime, part, barriers_(), pass);
    }
  }
  TT_INLINE Share sequences_of(const Member& member) const { return part_->of(member.team); }
  TT_INLINE int64_t members() const { return part_->members; }
  TT_INLINE Share share(const Member& member, int64_t count) const {
    return Share(count, member.begin, member.end, members());
  }
  // Among all workers.
  TT_INLINE int64_t worker(const Member& member) const {
    return member.team * members() + member.begin;
  }

  const RelevancyPlan plan_;
  const SequencePart* part_ = nullptr;
  Scratch scratch_;
  Span<Barrier> barriers_;
};

}  // namespace
}  // namespace throughtime
