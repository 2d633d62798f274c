// Relevancy attention on a CPU, forward: a worker walks one sequence (a sample and head) at a time.
//
// Per query: scores of its candidates, softmax, output, then the relevance of the window and the
// competition for the retained set (screening.h). Cost per query: (window_size + top_k) (D + Dv)
// multiply-adds. Memory beside the tensors: O(T) per worker, and O(T D) where the score makes
// something of the keys.
#pragma once

#include "relevancy/cpu/scores.h"
#include "relevancy/cpu/screening.h"
#include "relevancy/cpu/sequence.h"

namespace throughtime {
namespace {

template <typename S, typename Score>
class RelevancyForwardPass : public SequencePass {
 public:
  RelevancyForwardPass(const RelevancyForward<S>& args, const Score& score, const Runtime& runtime)
      : SequencePass(plan_relevancy(args.in.shape, runtime.threads, false), runtime),
        p_(args),
        in_(args.in),
        score_(score),
        shape_(args.in.shape),
        most_(padded<S>(shape_.screening.most_in_window() + shape_.screening.most_retained())) {
    relevance_ = per_worker<S>(shape_.screening.positions());
    kept_ = per_worker<int64_t>(shape_.screening.most_retained() + 1);
    scores_ = per_worker<S>(most_);
    keys_ = per_worker<const S*>(most_);
    values_ = per_worker<const S*>(most_);
    made_keys_ = per_worker<S>(times(shape_.screening.positions(), score.key_numbers()));
    made_query_ = per_worker<S>(score.query_numbers());
  }

  void run(const Runtime& runtime) { run_parts(runtime, *this); }

  void walk(const Member& member) {
    for_sequences(member, [&](int64_t n) { walk_sequence(member, n); });
  }

 private:
  void walk_sequence(const Member& member, int64_t n) {
    const int64_t worker = member.team;
    Stopwatch& watch = *member.watch;
    const SequenceRows<S> rows(in_, n);
    const ScreeningShape& s = rows.screening;
    const int64_t length = rows.steps.length;
    const Score score = score_.of_head(rows.head * shape_.group);
    const KeyRows<S> key(score, rows.key, in_.key.stride_t, rows.positions(), made_keys_(worker));
    watch.lap(kScores);
    S* scores = scores_(worker);
    const S** keys = keys_(worker);
    const S** values = values_(worker);

    Screening<S> screening(s, rows.steps, relevance_of(p_, rows), {p_.relevance + n * s.P, 1},
                           {p_.last + rows.first_position, 1}, relevance_(worker), kept_(worker));
    for (int64_t step = 0; step < length; ++step) {
      const Candidates& candidates = screening.candidates(step);
      const int64_t count = candidates.count();
      candidates.each([&](int64_t c, int64_t position) {
        keys[c] = key(position);
        values[c] = rows.value + position * in_.value.stride_t;
      });
      watch.lap(kScreening);
      for (int64_t head = 0; head < shape_.group; ++head) {
        const Score own = score_.of_head(rows.head * shape_.group + head);
        const S* q = rows.query + head * in_.query.stride_h + step * in_.query.stride_t;
        const int64_t row = rows.first_query + head * rows.next_head + step;
        own.scores(own.query(q, made_query_(worker)), keys, count, scores, nullptr);
        p_.lse[row] = softmax(scores, count).log();
        watch.lap(kScores);
        weighted_sum(scores, values, count, 0, shape_.Dv, S(1), p_.output + row * shape_.Dv);
        watch.lap(kSums);
        screening.receive(candidates.by_position(scores));
      }
      screening.compete(step, [](int64_t, int64_t) {});
    }
    finish_screening(p_, rows, screening, relevance_(worker));
    for (int64_t head = 0; head < shape_.group; ++head) {
      const int64_t first = rows.first_query + head * rows.next_head + length;
      std::memset(p_.output + first * shape_.Dv, 0, (s.T - length) * shape_.Dv * sizeof(S));
      std::memset(p_.lse + first, 0, (s.T - length) * sizeof(S));
    }
  }

  const RelevancyForward<S>& p_;
  const RelevancyInput<S>& in_;
  const Score score_;
  const RelevancyShape shape_;
  const int64_t most_;  // candidates of a query, in whole vectors
  Span<S> relevance_, scores_, made_keys_, made_query_;
  Span<int64_t> kept_;
  Span<const S*> keys_, values_;
};

}  // namespace
}  // namespace throughtime
