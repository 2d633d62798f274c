// Relevancy attention on a CPU, backward.
//
// A worker walks a sequence from its last query to its first, over the candidates that the forward
// pass chose (Replay). The weights p come from the scores again: e^(score - lse) would carry the
// rounding of the log-sum-exp, and would not add up to 1.
//
//   dp_c = do . v_c      ds = p (dp - p . dp)      dv_c += p_c do
//   dq, dk_c and dw from ds: the score's gradients (scores.h)
//
// Rows of dk and dv are added to in place, since a sequence belongs to one worker. dw is summed per
// sequence, then over the batch in order: bit-equal for every number of threads.
#pragma once

#include "relevancy/cpu/scores.h"
#include "relevancy/cpu/screening.h"
#include "relevancy/cpu/sequence.h"

namespace throughtime {
namespace {

template <typename S, typename Score>
class RelevancyBackwardPass : public SequencePass {
 public:
  RelevancyBackwardPass(const RelevancyBackward<S>& args, const Score& score,
                        const Runtime& runtime)
      : SequencePass(plan_relevancy(args.in.shape, runtime.threads, false), runtime),
        p_(args),
        in_(args.in),
        score_(score),
        shape_(args.in.shape) {
    const ScreeningShape& s = shape_.screening;
    most_ = padded<S>(s.most_in_window() + most_retained(in_, p_.last) + 1);
    ended_ = per_worker<int64_t>(s.T);
    next_ = per_worker<int64_t>(s.positions());
    kept_ = per_worker<int64_t>(s.positions());
    weights_ = per_worker<S>(most_);
    grad_ = per_worker<S>(most_);
    keys_ = per_worker<const S*>(most_);
    values_ = per_worker<const S*>(most_);
    grad_keys_ = per_worker<S*>(most_);
    grad_values_ = per_worker<S*>(most_);
    made_keys_ = per_worker<S>(times(s.positions(), score.key_numbers()));
    made_query_ = per_worker<S>(score.query_numbers());
    kept_scores_ = per_worker<S>(times(most_, score.kept_numbers()));
    grad_w_ = scratch_.reserve<S>(Score::kHasWeight ? shape_.query_sequences() : 0, shape_.D);
    lost_w_ = per_worker<S>(Score::kHasWeight ? times(shape_.group, shape_.D) : 0);
  }

  void run(const Runtime& runtime) { run_parts(runtime, *this); }

  int64_t blocks() const { return shape_.heads * shape_.group; }

  void walk(const Member& member) {
    for_sequences(member, [&](int64_t n) { walk_sequence(member, n); });
  }

  void finish(Share heads) {
    if (!Score::kHasWeight) return;
    for (int64_t h = heads.begin; h < heads.end; ++h)
      for (int64_t d = 0; d < shape_.D; ++d) {
        S sum = 0;
        for (int64_t b = 0; b < shape_.B; ++b) sum += grad_w_(b * blocks() + h)[d];
        p_.grad_score_weight[h * shape_.D + d] = sum;
      }
  }

 private:
  void walk_sequence(const Member& member, int64_t n) {
    const int64_t worker = member.team;
    Stopwatch& watch = *member.watch;
    const int64_t D = shape_.D, Dv = shape_.Dv, group = shape_.group;
    const SequenceRows<S> rows(in_, n);
    const ScreeningShape& s = rows.screening;
    const int64_t length = rows.steps.length;
    const S* grad_output = p_.grad_output.of(rows, group);
    const Score score = score_.of_head(rows.head * group);
    const KeyRows<S> key(score, rows.key, in_.key.stride_t, rows.positions(), made_keys_(worker));
    watch.lap(kScores);
    S* grad_key = p_.grad_key + rows.first_position * D;
    S* grad_value = p_.grad_value + rows.first_position * Dv;
    S* weights = weights_(worker);
    S* grad = grad_(worker);
    const S** keys = keys_(worker);
    const S** values = values_(worker);
    S** grad_keys = grad_keys_(worker);
    S** grad_values = grad_values_(worker);
    S* grad_w = grad_w_(n * group);
    for (int64_t head = 0; head < group; ++head)
      std::memset(p_.grad_query + (rows.first_query + head * rows.next_head) * D, 0,
                  s.T * D * sizeof(S));
    std::memset(grad_key, 0, s.positions() * D * sizeof(S));
    std::memset(grad_value, 0, s.positions() * Dv * sizeof(S));
    S* lost_w = lost_w_(worker);
    if (Score::kHasWeight) {
      std::memset(grad_w, 0, group * D * sizeof(S));
      std::memset(lost_w, 0, group * D * sizeof(S));
    }

    Replay replay(s, rows.steps, {p_.last + rows.first_position, 1}, ended_(worker), next_(worker),
                  kept_(worker));
    for (int64_t step = length - 1; step >= 0; --step) {
      const Candidates& candidates = replay.candidates(step);
      const int64_t count = candidates.count();
      candidates.each([&](int64_t c, int64_t position) {
        keys[c] = key(position);
        values[c] = rows.value + position * in_.value.stride_t;
        grad_keys[c] = grad_key + position * D;
        grad_values[c] = grad_value + position * Dv;
      });
      watch.lap(kScreening);
      for (int64_t head = 0; head < group; ++head) {
        const Score own = score_.of_head(rows.head * group + head);
        const S* q = own.query(rows.query + head * in_.query.stride_h + step * in_.query.stride_t,
                               made_query_(worker));
        const S* go = grad_output + head * p_.grad_output.stride_h + step * p_.grad_output.stride_t;
        S* dq = p_.grad_query + (rows.first_query + head * rows.next_head + step) * D;
        own.scores(q, keys, count, weights, kept_scores_(worker));
        softmax(weights, count);
        dot_products(go, Dv, values, count, grad);
        softmax_gradient(weights, grad, count);
        watch.lap(kScores);
        add_to_rows(weights, S(1), go, 0, Dv, grad_values, count);
        watch.lap(kSums);
        own.gradients(q, keys, kept_scores_(worker), count, grad,
                      {dq, grad_keys, grad_w + head * D, lost_w + head * D});
        watch.lap(kScores);
      }
    }
  }

  const RelevancyBackward<S>& p_;
  const RelevancyInput<S>& in_;
  const Score score_;
  const RelevancyShape shape_;
  int64_t most_;  // candidates of a query, in whole vectors
  Span<S> weights_, grad_, grad_w_, lost_w_, made_keys_, made_query_, kept_scores_;
  Span<int64_t> ended_, next_, kept_;
  Span<const S*> keys_, values_;
  Span<S*> grad_keys_, grad_values_;
};

}  // namespace
}  // namespace throughtime
