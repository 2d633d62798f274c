// One sequence of a call (a sample and head): where its rows lie, and the memory that a pass keeps for
// it.
#pragma once

#include "common/cpu/team.h"
#include "relevancy/cpu/operands.h"
#include "relevancy/cpu/plan.h"
#include "relevancy/cpu/screening.h"

namespace throughtime {
namespace {

template <typename X>
struct SequenceRows : SequencePlace {
  const X *query, *key, *value;  // rows as far apart as the input's strides say

  TT_INLINE SequenceRows(const RelevancyInput<X>& in, int64_t n)
      : SequencePlace(in.place(n)),
        query(in.query.of(*this, in.shape.group)),
        key(in.key.of(*this)),
        value(in.value.of(*this)) {}
};

// The most keys that a query attends as retained ones.
template <typename X>
int64_t most_retained(const RelevancyInput<X>& in, const int64_t* last) {
  int64_t retained = 0;
  for (int64_t n = 0; n < in.shape.sequences(); ++n) {
    const SequenceRows<X> rows(in, n);
    retained = most(retained,
                    retained_at_end(rows.screening, rows.steps, {last + rows.first_position, 1}));
  }
  return retained;
}

// What keys of a sequence compete with.
template <typename X>
TT_INLINE Relevance<SumOf<X>> relevance_of(const RelevancyForward<X>& args,
                                           const SequencePlace& place) {
  const int64_t first = place.first_position - place.number * place.screening.P;
  return {args.keep_first, args.given ? args.given + first : nullptr, args.normalize,
          args.received != nullptr};
}

// Writes what a sequence leaves when its last query is done.
template <typename X, typename S = SumOf<X>>
void finish_screening(const RelevancyForward<X>& args, const SequencePlace& place,
                      Screening<S>& screening, const S* relevance) {
  const ScreeningShape& s = place.screening;
  screening.finish();
  if (args.memory_index)
    screening.leave({args.memory_index + place.number * s.memory_after(), 1},
                    {args.memory_relevance + place.number * s.memory_after(), 1});
  if (args.received)
    std::memcpy(args.received + place.first_position, relevance, s.positions() * sizeof(S));
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

  // Steps over lists of `count` rows.
  template <typename X>
  typename RowSteps<X>::Room steps_per_worker(int64_t count, int64_t features) {
    return {count, features, per_worker<X>(RowSteps<X>::numbers(count, features)),
            per_worker<const X*>(RowSteps<X>::pointers(count))};
  }

  // Runs the pass, one part of the plan after the other.
  template <typename Pass>
  void run_parts(const Runtime& runtime, Pass& pass) {
    scratch_.allocate();
    for (const SequencePart& part : plan_.parts) {
      part_ = &part;
      next_sequence_ = part.begin;
      if (part.teams > 0) run_workers(runtime, part, barriers_(), pass);
    }
  }

  // Calls f(number) for sequences of the part: a team of one takes the next, as they differ in length.
  template <typename F>
  void for_sequences(const Member& member, const F& f) {
    if (members() > 1) return f(part_->begin + member.team);
    for (;;) {
      const int64_t n = __atomic_fetch_add(&next_sequence_, 1, __ATOMIC_RELAXED);
      if (n >= part_->end) return;
      f(n);
    }
  }
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
  alignas(64) int64_t next_sequence_ = 0;
  Scratch scratch_;
  Span<Barrier> barriers_;
};

}  // namespace
}  // namespace throughtime
