// Relevancy attention on a CPU, forward: a worker walks one sequence (a sample and head) at a time.
//
// Per query: scores of its candidates, softmax, output, then the relevance of the window and the
// competition for the retained set (screening.h). Cost per query: (window_size + top_k) (D + Dv)
// multiply-adds. Memory beside the tensors: O(T) per worker, and O(T D) where the score makes
// something of the keys.
#pragma once

#include "relevancy/cpu/scores.h"
#include "relevancy/cpu/screening.h"

namespace throughtime {
namespace {

// Every worker takes sequences of its own; workers meet only at the end.
struct SequenceSchedule {
  int teams;
  static constexpr int members = 1;
  TT_INLINE int workers() const { return teams; }
};

TT_INLINE SequenceSchedule schedule_sequences(const RelevancyShape& shape, int threads) {
  constexpr double kOperationsToFork = 1 << 20;  // fewer cost less than starting threads
  const double candidates = static_cast<double>(shape.screening.most_in_window()) +
                            static_cast<double>(shape.screening.most_retained());
  const double operations = 2.0 * shape.sequences() * shape.T() * candidates * (shape.D + shape.Dv);
  if (threads <= 1 || operations < kOperationsToFork) return {1};
  return {static_cast<int>(least(threads, shape.sequences()))};
}

// What keys of sequence n compete with.
template <typename S>
TT_INLINE Relevance<S> relevance_of(const RelevancyForward<S>& args, int64_t n) {
  const S* given = args.given ? args.given + n * args.in.shape.T() : nullptr;
  return {args.keep_first, given, args.normalize};
}

template <typename S, typename Score>
class RelevancyForwardPass {
 public:
  RelevancyForwardPass(const RelevancyForward<S>& args, const Score& score, const Runtime& runtime)
      : p_(args),
        in_(args.in),
        score_(score),
        shape_(args.in.shape),
        schedule_(schedule_sequences(shape_, runtime.threads)),
        most_(padded<S>(shape_.screening.most_in_window() + shape_.screening.most_retained())),
        scratch_(runtime) {
    const auto per_worker = [&](auto number, int64_t count) {
      return scratch_.template reserve<decltype(number)>(schedule_.teams, count);
    };
    relevance_ = per_worker(S(), shape_.screening.positions());
    kept_ = per_worker(int64_t(), kept_size());
    scores_ = per_worker(S(), most_);
    keys_ = per_worker(static_cast<const S*>(nullptr), most_);
    values_ = per_worker(static_cast<const S*>(nullptr), most_);
    made_keys_ = per_worker(S(), times(shape_.screening.positions(), score.key_numbers()));
    made_query_ = per_worker(S(), score.query_numbers());
    barriers_ = scratch_.template reserve<Barrier>(schedule_.teams + 1);
  }

  void run(const Runtime& runtime) {
    scratch_.allocate();
    run_workers(runtime, schedule_, barriers_(), *this);
  }

  int64_t blocks() const { return 0; }
  void prepare(Share) {}
  void finish(Share) {}

  void walk(const Member& member) {
    const Share own(shape_.sequences(), member.team, schedule_.teams);
    for (int64_t n = own.begin; n < own.end; ++n) walk_sequence(member, n);
  }

 private:
  int64_t kept_size() const { return shape_.screening.most_retained() + 1; }

  void walk_sequence(const Member& member, int64_t n) {
    const int64_t worker = member.team;
    Stopwatch& watch = *member.watch;
    const ScreeningShape& s = shape_.screening;
    const int64_t b = n / shape_.heads, h = n % shape_.heads;
    const Steps steps = in_.steps(b);
    const int64_t length = steps.length;
    const S* query = in_.query.sequence(b, h);
    const S* value = in_.value.sequence(b, h);
    const Score score = score_.of_head(h);
    const KeyRows<S> key(score, in_.key.sequence(b, h), in_.key.stride_t, s.P + length,
                         made_keys_(worker));
    watch.lap(kScores);
    S* scores = scores_() + worker * most_;
    const S** keys = keys_() + worker * most_;
    const S** values = values_() + worker * most_;
    S* output = p_.output + n * s.T * shape_.Dv;

    Screening<S> screening(s, steps, relevance_of(p_, n), {p_.relevance + n * s.P, 1},
                           {p_.last + n * s.positions(), 1}, relevance_(worker),
                           kept_() + worker * kept_size());
    for (int64_t step = 0; step < length; ++step) {
      const Candidates& candidates = screening.candidates(step);
      const int64_t count = candidates.count();
      candidates.each([&](int64_t c, int64_t position) {
        keys[c] = key(position);
        values[c] = value + position * in_.value.stride_t;
      });
      const S* q = query + step * in_.query.stride_t;
      watch.lap(kScreening);
      score.scores(score.query(q, made_query_(worker)), keys, count, scores, nullptr);
      p_.lse[n * s.T + step] = softmax(scores, count).log();
      watch.lap(kScores);
      weighted_sum(scores, values, count, 0, shape_.Dv, S(1), output + step * shape_.Dv);
      watch.lap(kSums);
      screening.advance(step, candidates.by_position(scores));
    }
    screening.finish({p_.memory_index + n * s.memory_after(), 1},
                     {p_.memory_relevance + n * s.memory_after(), 1});
    if (p_.received)
      std::memcpy(p_.received + n * s.positions(), relevance_(worker), s.positions() * sizeof(S));
    std::memset(output + length * shape_.Dv, 0, (s.T - length) * shape_.Dv * sizeof(S));
    std::memset(p_.lse + n * s.T + length, 0, (s.T - length) * sizeof(S));
  }

  const RelevancyForward<S>& p_;
  const RelevancyInput<S>& in_;
  const Score score_;
  const RelevancyShape shape_;
  const SequenceSchedule schedule_;
  const int64_t most_;  // candidates of a query, in whole vectors
  Scratch scratch_;
  Span<S> relevance_, scores_, made_keys_, made_query_;
  Span<int64_t> kept_;
  Span<const S*> keys_, values_;
  Span<Barrier> barriers_;
};

}  // namespace
}  // namespace throughtime
