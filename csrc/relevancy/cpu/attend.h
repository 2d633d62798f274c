// Attention of one query over rows in memory: products, softmax, weighted sums, and gradients.
//
// Rows are given by a list of pointers. Lists of numbers have room for whole vectors.
#pragma once

#include "common/cpu/tile.h"
#include "common/sizes.h"

namespace throughtime {
namespace {

template <typename S>
TT_INLINE int64_t padded(int64_t count) {
  return round_up(count, kLanes<S>);
}

// Calls f(offset, part) for the vectors of D numbers; part < L only in the last.
template <typename S, typename F>
TT_INLINE void for_vectors(int64_t D, const F& f) {
  int64_t d = 0;
  for (; d + kLanes<S> <= D; d += kLanes<S>) f(d, static_cast<int64_t>(kLanes<S>));
  if (d < D) f(d, D - d);
}

// Calls f(Constant<NV>, d, part) for blocks of NV <= 4 vectors of numbers [begin, end), so that NV sums
// stay in registers. The last vector of a block has `part` of them.
template <typename S, typename F>
TT_INLINE void for_blocks(int64_t begin, int64_t end, const F& f) {
  constexpr int64_t L = kLanes<S>;
  for (int64_t d = begin; d < end; d += 4 * L) {
    const int64_t vectors = least(4, divide_up(end - d, L));
    const int64_t part = least(L, end - d - (vectors - 1) * L);
    with_constant<4>(vectors, [&](auto count) { f(count, d, part); });
  }
}

// Calls f(begin, end) for the pieces of [0, count) that one chain of additions covers. Weights are
// positive, so a sum grows with every link, and its rounding error with it.
template <typename F>
TT_INLINE void for_chains(int64_t count, const F& f) {
  constexpr int64_t kLinks = 64;
  for (int64_t begin = 0; begin < count; begin += kLinks) f(begin, least(count, begin + kLinks));
}

// sum += value. `lost` holds what rounding took from the sum; the next value makes up for it.
template <typename S>
TT_INLINE void add_compensated(S* sum, S* lost, Vec<S> value, int64_t part) {
  const Vec<S> before = load_part(sum, part), more = value - load_part(lost, part);
  const Vec<S> now = before + more;
  store_part(lost, (now - before) - more, part);
  store_part(sum, now, part);
}

// sums[c] = the sum of the lanes of row(c), for `count` rows; written in whole vectors.
template <typename S, typename F>
TT_INLINE void reduce_rows(int64_t count, S* sums, const F& row) {
  for (int64_t c = 0; c < count; c += kLanes<S>) {
    Vec<S> rows[kLanes<S>];
    for (int64_t r = 0; r < kLanes<S>; ++r) rows[r] = c + r < count ? row(c + r) : Vec<S>{};
    store(sums + c, sums_of_rows<S>(rows));
  }
}

// products[c] = x . rows[c]
template <typename S>
void dot_products(const S* x, int64_t D, const S* const* rows, int64_t count, S* products) {
  reduce_rows<S>(count, products, [&](int64_t c) {
    Vec<S> sum{};
    for_vectors<S>(D, [&](int64_t d, int64_t part) {
      sum += load_part(x + d, part) * load_part(rows[c] + d, part);
    });
    return sum;
  });
}

template <typename S>
TT_INLINE S lane_sum(Vec<S> v) {
  S sum = v[0];
  for (int lane = 1; lane < kLanes<S>; ++lane) sum += v[lane];
  return sum;
}

// The sum of e^score.
template <typename S>
struct SumOfExponentials {
  S top, sum;  // sum e^top
  TT_INLINE S log() const { return top + static_cast<S>(__builtin_log(static_cast<double>(sum))); }
};

// Turns scores into weights, in place, zero in the padding.
template <typename S>
SumOfExponentials<S> softmax(S* scores, int64_t count) {
  const S infinity = static_cast<S>(__builtin_inff());
  for (int64_t c = count; c < padded<S>(count); ++c) scores[c] = -infinity;
  Vec<S> highest = load(scores);
  for (int64_t c = kLanes<S>; c < count; c += kLanes<S>) {
    const Vec<S> x = load(scores + c);
    highest = x > highest ? x : highest;
  }
  S top = highest[0];
  for (int lane = 1; lane < kLanes<S>; ++lane) top = highest[lane] > top ? highest[lane] : top;
  Vec<S> sums{};
  for (int64_t c = 0; c < count; c += kLanes<S>) {
    const Vec<S> e = exp_nonpositive<S>(load(scores + c) - splat(top));
    store(scores + c, e);
    sums += e;
  }
  const S sum = lane_sum<S>(sums), factor = S(1) / sum;
  for (int64_t c = 0; c < count; c += kLanes<S>) store(scores + c, load(scores + c) * factor);
  return {top, sum};
}

// out [d .. d + NV vectors) = factor * sum over c of weights[c] rows[c]
template <typename S, int NV>
TT_INLINE void weighted_block(const S* weights, const S* const* rows, int64_t count, int64_t d,
                              int64_t part, S factor, S* out) {
  Vec<S> sum[NV] = {};
  for_chains(count, [&](int64_t begin, int64_t end) {
    Vec<S> chain[NV] = {};
    for (int64_t c = begin; c < end; ++c) {
      const S weight = weights[c];
      const S* row = rows[c] + d;
      for (int v = 0; v < NV - 1; ++v) chain[v] += load(row + v * kLanes<S>) * weight;
      chain[NV - 1] += load_part(row + (NV - 1) * kLanes<S>, part) * weight;
    }
    for (int v = 0; v < NV; ++v) sum[v] += chain[v];
  });
  for (int v = 0; v < NV - 1; ++v) store(out + d + v * kLanes<S>, sum[v] * factor);
  store_part(out + d + (NV - 1) * kLanes<S>, sum[NV - 1] * factor, part);
}

// Numbers [begin, end) of out = factor * sum over c of weights[c] rows[c]
template <typename S>
void weighted_sum(const S* weights, const S* const* rows, int64_t count, int64_t begin, int64_t end,
                  S factor, S* out) {
  for_blocks<S>(begin, end, [&](auto vectors, int64_t d, int64_t part) {
    weighted_block<S, decltype(vectors)::value>(weights, rows, count, d, part, factor, out);
  });
}

// rows[c] += factor * weights[c] x for all c, in numbers [begin, end).
template <typename S>
void add_to_rows(const S* weights, S factor, const S* x, int64_t begin, int64_t end, S* const* rows,
                 int64_t count) {
  x += begin;
  for (int64_t c = 0; c < count; ++c) {
    const S weight = weights[c] * factor;
    S* row = rows[c] + begin;
    for_vectors<S>(end - begin, [&](int64_t d, int64_t part) {
      store_part(row + d, load_part(row + d, part) + load_part(x + d, part) * weight, part);
    });
  }
}

// Turns the gradient of the weights into that of the scores, in place:
// weights * (grad - weights . grad).
template <typename S>
void softmax_gradient(const S* weights, S* grad, int64_t count) {
  Vec<S> sums{};
  for (int64_t c = 0; c < count; c += kLanes<S>)
    sums += load_part(weights + c, count - c) * load_part(grad + c, count - c);
  const S mean = lane_sum<S>(sums);
  for (int64_t c = 0; c < count; c += kLanes<S>)
    store(grad + c, load(weights + c) * (load(grad + c) - splat(mean)));
}

}  // namespace
}  // namespace throughtime
