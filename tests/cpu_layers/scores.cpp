// relevancy/cpu/attend.h and scores.h; and whole passes with a third score.
#include "relevancy/cpu/scores.h"

#include <cmath>
#include <cstdlib>
#include <vector>

#include "export.h"
#include "relevancy/cpu/backward.h"
#include "relevancy/cpu/forward.h"

using namespace throughtime;

namespace {

// s = q . k / (|q| |k|), which the package does not offer: it shows what a new score takes.
//
//   dq += e_c (k_c / (|q| |k_c|) - s_c q / |q|^2)
//   dk_c += e_c (q / (|q| |k_c|) - s_c k_c / |k_c|^2)
template <typename S>
struct ScoreCosine : ScoreOfRows<S> {
  int64_t D;

  explicit ScoreCosine(int64_t D) : D(D) {}
  ScoreCosine of_head(int64_t) const { return *this; }

  S squared(const S* x) const {
    S products[kLanes<S>];
    dot_products(x, D, &x, 1, products);
    return products[0];
  }

  void scores(const S* q, const S* const* keys, int64_t count, S* to, S*) const {
    dot_products(q, D, keys, count, to);
    for (int64_t c = 0; c < count; ++c) to[c] /= std::sqrt(squared(q) * squared(keys[c]));
  }

  void gradients(const S* q, const S* const* keys, const S*, int64_t count, const S* grad,
                 const ScoreGradients<S>& into) const {
    std::vector<S> score(round_up(count, kLanes<S>));
    scores(q, keys, count, score.data(), nullptr);
    for (int64_t c = 0; c < count; ++c) {
      const S qq = squared(q), kk = squared(keys[c]), both = std::sqrt(qq * kk);
      for (int64_t d = 0; d < D; ++d) {
        into.query[d] += grad[c] * (keys[c][d] / both - score[c] * q[d] / qq);
        into.keys[c][d] += grad[c] * (q[d] / both - score[c] * keys[c][d] / kk);
      }
    }
  }
};

// The scores that the tests know by number.
template <typename S, typename F>
void with_number(int64_t number, int64_t D, const S* w, const S* scale, const F& f) {
  if (number == 0) f(ScoreDot<S>{D, *scale});
  if (number == 1) f(ScoreAdditive<S>{D, w});
  if (number == 2) f(ScoreCosine<S>{D});
}

template <typename S>
std::vector<S*> rows_of(S* matrix, int64_t count, int64_t columns) {
  std::vector<S*> rows;
  for (int64_t c = 0; c < count; ++c) rows.push_back(matrix + c * columns);
  rows.resize(padded<S>(count), matrix);
  return rows;
}

// What a score makes of a query and of keys.
template <typename S>
struct Made {
  template <typename Score>
  Made(const Score& score, const S* q, const S* rows, int64_t D, int64_t count)
      : query_room(score.query_numbers()), key_room(count * score.key_numbers()) {
    query = score.query(q, query_room.data());
    const KeyRows<S> key(score, rows, D, count, key_room.data());
    for (int64_t c = 0; c < count; ++c) keys.push_back(key(c));
  }

  std::vector<S> query_room, key_room;
  std::vector<const S*> keys;
  const S* query;
};

template <typename S>
void scores(int64_t number, const S* q, const S* keys, const S* w, const S* scale, int64_t D,
            int64_t count, S* to) {
  with_number(number, D, w, scale, [&](auto score) {
    const Made<S> made(score, q, keys, D, count);
    score.scores(made.query, made.keys.data(), count, to, nullptr);
  });
}

template <typename S>
void gradients(int64_t number, const S* q, const S* keys, const S* w, const S* scale, int64_t D,
               int64_t count, const S* grad, S* grad_q, S* grad_keys, S* grad_w, S* lost) {
  const auto grad_rows = rows_of(grad_keys, count, D);
  with_number(number, D, w, scale, [&](auto score) {
    const Made<S> made(score, q, keys, D, count);
    std::vector<S> kept(count * score.kept_numbers()), to(padded<S>(count));
    score.scores(made.query, made.keys.data(), count, to.data(), kept.data());
    score.gradients(made.query, made.keys.data(), kept.data(), count, grad,
                    {grad_q, grad_rows.data(), grad_w, lost});
  });
}

template <typename S>
void attention_weights(S* scores, int64_t count, S* log_sum) {
  *log_sum = softmax(scores, count).log();
}

template <typename S>
void attention_gradient(const S* weights, S* grad, int64_t count) {
  softmax_gradient(weights, grad, count);
}

template <typename S>
void sum_of_rows(const S* weights, const S* rows, int64_t count, int64_t D, const S* factor,
                 S* out) {
  weighted_sum(weights, rows_of(rows, count, D).data(), count, D, *factor, out);
}

template <typename S>
void add_rows(const S* weights, const S* x, int64_t count, int64_t D, const S* factor, S* rows) {
  add_to_rows(weights, *factor, x, D, rows_of(rows, count, D).data(), count);
}

void run_alone(int workers, void (*body)(void*, int, int), void* context) {
  body(context, 0, workers);
}

void* acquire(size_t bytes) { return std::aligned_alloc(64, round_up(bytes + 1, 64)); }

// Whole passes by the cosine, forward and backward, of [B, heads, T, D] without an earlier call.
template <typename S>
void attend(const int64_t* sizes, const S* q, const S* k, const S* v, const S* grad_output,
            S* output, int64_t* last, S* grad_q, S* grad_k, S* grad_v) {
  const int64_t B = sizes[0], heads = sizes[1], T = sizes[2], D = sizes[3], Dv = sizes[4];
  const RelevancyShape shape{B, heads, D, Dv, {T, 0, 0, sizes[5], sizes[6]}};
  const Runtime runtime{1, run_alone, acquire, std::free, nullptr};
  const auto dense = [&](const S* at, int64_t size) {
    return Sequences<S>{at, heads * T * size, T * size, size};
  };
  RelevancyInput<S> in{};
  in.shape = shape;
  in.query = dense(q, D);
  in.key = dense(k, D);
  in.value = dense(v, Dv);
  std::vector<S> lse(B * heads * T), relevance(B * heads * (sizes[5] + sizes[6]));
  std::vector<int64_t> index(relevance.size());
  const RelevancyForward<S> forward{in,         nullptr, false,        output,
                                    lse.data(), last,    index.data(), relevance.data()};
  RelevancyForwardPass<S, ScoreCosine<S>>(forward, ScoreCosine<S>{D}, runtime).run(runtime);
  const RelevancyBackward<S> backward{in,     dense(grad_output, Dv), last, grad_q, grad_k, grad_v,
                                      nullptr};
  RelevancyBackwardPass<S, ScoreCosine<S>>(backward, ScoreCosine<S>{D}, runtime).run(runtime);
}

}  // namespace

EXPORT(scores)
EXPORT(gradients)
EXPORT(attention_weights)
EXPORT(attention_gradient)
EXPORT(sum_of_rows)
EXPORT(add_rows)
EXPORT(attend)
