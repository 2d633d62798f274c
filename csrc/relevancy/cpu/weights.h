// From the scores of some queries to the weights of their keys, and from gradients of weights to those of
// scores.
//
// Every pass goes over all queries before the next begins: while the lanes of one are added up, the
// others go on.
#pragma once

#include "relevancy/cpu/attend.h"
#include "relevancy/cpu/blocks.h"
#include "relevancy/cpu/products.h"

namespace throughtime {
namespace {

// What a query attends: its retained keys, and those that lie side by side.
template <typename X>
struct QueryScores {
  Columns<X> kept, window;
  SumOfExponentials<SumOf<X>> total;
};

// Turns products of queries with keys into weights; those of lanes that are not attended become zero, or
// NaN where the others are. Lanes of the window are those of positions in the whole sequence.
template <int Count, typename X, typename S = SumOf<X>>
void softmax(S scale, QueryScores<X> (&queries)[Count]) {
  const Vec<S> nothing = splat(-static_cast<S>(__builtin_inff()));
  for (int q = 0; q < Count; ++q) {
    Vec<S> highest = nothing;
    const auto scaled = [&](S* at, auto own) {
      const Vec<S> x = own(load(at) * scale, nothing);
      store(at, x);
      highest = x > highest ? x : highest;
    };
    queries[q].kept.each_own(scaled);
    queries[q].window.each_own(scaled);
    queries[q].total.top = highest_lane<S>(highest);
  }
  for (int q = 0; q < Count; ++q) {
    const S top = queries[q].total.top;
    const auto exponentials = [&](const Columns<X>& columns) {
      Vec<S> sum{};
      columns.each([&](S* at) {
        const Vec<S> e = exp_nonpositive<S>(load(at) - splat(top));
        store(at, e);
        sum += e;
      });
      return sum;
    };
    const Vec<S> of_kept = exponentials(queries[q].kept);
    queries[q].total.sum = sum_of_lanes<S>(of_kept + exponentials(queries[q].window));
  }
  for (int q = 0; q < Count; ++q) {
    const S factor = S(1) / queries[q].total.sum;
    const auto weights = [&](S* at) { store(at, load(at) * factor); };
    queries[q].kept.each(weights);
    queries[q].window.each(weights);
  }
}

// Rows of a query in a block's matrices of scores and of gradients.
template <typename S>
struct QueryGradients {
  S *scores, *grad;
  S number;  // of the query in the block
  S top = 0, factor = 0, mean = 0;
};

// Columns of these matrices, in groups: [0, kept) and [begin, end). Query i of the block attends
// a column from since[column] to until[column].
template <typename S>
struct AttendedColumns {
  const S *since, *until;
  int64_t kept, begin, end;

  // Calls f(vector of scores, vector of gradients, bits set in the lanes that the query attends).
  template <typename F>
  TT_INLINE void each(const QueryGradients<S>& query, const F& f) const {
    const Vec<S> number = splat(query.number);
    const auto part = [&](int64_t first, int64_t last) {
      for (int64_t v = first; v < last; v += kLanes<S>)
        f(query.scores + v, query.grad + v,
          (load(since + v) <= number) & (number <= load(until + v)));
    };
    part(0, kept);
    part(begin, end);
  }
};

// Makes weights of products of queries with keys, and gradients of products of those of weights, and calls
// put(query, column, lanes that it attends, weights, gradients) with vectors of them. Those of other
// lanes are zero. Returns whether that is so: some may be NaN where a product is not finite.
template <typename S, typename F>
bool softmax_backward(S scale, const AttendedColumns<S>& columns, QueryGradients<S>* queries,
                      int64_t count, const F& put) {
  const Vec<S> nothing = splat(-static_cast<S>(__builtin_inff()));
  Vec<S> zero{};  // NaN where a number is not finite
  for (int64_t q = 0; q < count; ++q) {
    Vec<S> highest = nothing;
    columns.each(queries[q], [&](S* p, S* dp, auto own) {
      const Vec<S> score = load(p) * scale, x = own ? score : nothing;
      zero += score * S(0) + load(dp) * S(0);
      store(p, x);
      highest = x > highest ? x : highest;
    });
    queries[q].top = highest_lane<S>(highest);
  }
  for (int64_t q = 0; q < count; ++q) {
    Vec<S> sums{}, means{};
    columns.each(queries[q], [&](S* p, S* dp, auto own) {
      const Vec<S> e = exp_nonpositive<S>(load(p) - splat(queries[q].top));
      store(p, e);
      sums += e;
      means += own ? e * load(dp) : Vec<S>{};
    });
    queries[q].factor = S(1) / sum_of_lanes<S>(sums);
    queries[q].mean = sum_of_lanes<S>(means) * queries[q].factor;
    zero += splat(queries[q].mean) * S(0);
  }
  for (int64_t q = 0; q < count; ++q)
    columns.each(queries[q], [&](S* p, S* dp, auto own) {
      const Vec<S> weight = load(p) * queries[q].factor;
      const Vec<S> grad = weight * (load(dp) - splat(queries[q].mean)) * scale;
      put(q, p - queries[q].scores, own, weight, grad);
    });
  return sum_of_lanes<S>(zero) == S(0);
}

}  // namespace
}  // namespace throughtime
