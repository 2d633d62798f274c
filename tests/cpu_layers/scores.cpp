// relevancy/cpu/attend.h and scores.h.
#include "relevancy/cpu/scores.h"

#include <vector>

#include "export.h"

using namespace throughtime;

namespace {

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
void scores(const S* q, const S* keys, const S* w, int64_t D, int64_t count, S* to) {
  const ScoreAdditive<S> score{D, w};
  const Made<S> made(score, q, keys, D, count);
  score.scores(made.query, made.keys.data(), count, to, nullptr);
}

template <typename S>
void gradients(const S* q, const S* keys, const S* w, int64_t D, int64_t count, const S* grad,
               S* grad_q, S* grad_keys, S* grad_w, S* lost) {
  const auto grad_rows = rows_of(grad_keys, count, D);
  const ScoreAdditive<S> score{D, w};
  const Made<S> made(score, q, keys, D, count);
  std::vector<S> kept(count * score.kept_numbers()), to(padded<S>(count));
  score.scores(made.query, made.keys.data(), count, to.data(), kept.data());
  score.gradients(made.query, made.keys.data(), kept.data(), count, grad,
                  {grad_q, grad_rows.data(), grad_w, lost});
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
  weighted_sum(weights, rows_of(rows, count, D).data(), count, 0, D, *factor, out);
}

template <typename S>
void add_rows(const S* weights, const S* x, int64_t count, int64_t D, const S* factor, S* rows) {
  add_to_rows(weights, *factor, x, 0, D, rows_of(rows, count, D).data(), count);
}

}  // namespace

EXPORT(scores)
EXPORT(gradients)
EXPORT(attention_weights)
EXPORT(attention_gradient)
EXPORT(sum_of_rows)
EXPORT(add_rows)
