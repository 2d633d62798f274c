// Scores of relevancy attention that are no product of query and key, and their gradients.
//
// A score is a structure that holds its parameters:
//
//   kHasWeight                   it has a weight [D] per head
//   of_head(h)                   the same score with the weight of head h
//   key_numbers()                room for what it makes of a key, once for all queries; 0: it takes
//   key(row, room)               the row as it is. Both return what `keys` below holds
//   query_numbers()              the same of a query, once for all keys
//   query(row, room)
//   kept_numbers()               what the gradients need of a pair of query and key
//   scores(query, keys, count, to, kept)
//                                to[c] is the score of keys[c], written in whole vectors. Without
//                                gradients `kept` is null
//   gradients(query, keys, kept, count, grad, into)
//                                grad[c] is the gradient of to[c]
//
// A new score is a structure here, its name in params.h, and a line in kernels.cpp.
#pragma once

#include "relevancy/cpu/attend.h"
#include "relevancy/cpu/params.h"

namespace throughtime {
namespace {

// Where a score's gradients go. Everything is added to; `query` is zero before.
template <typename S>
struct ScoreGradients {
  S* query;        // [D]
  S* const* keys;  // [count] rows [D]
  S* weight;       // [D], compensated by `lost`; both unused without a weight
  S* lost;
};

// w . tanh(q + k)
//
//   with t = tanh(q + k_c), g = e_c w (1 - t^2):   dq += g   dk_c += g   dw += e_c t
//
// Exponentials are made once per query, a = e^2q - 1 and e = e^2q, and once per key,
// m = +-(e^2|k| - 1) with the sign of k. A pair of them takes a few operations and one division:
//
//   t = (u - d) / (u + d)     k >= 0:   u = e m + e   d = 1       u - d = e m + a
//                             k < 0:    u = e         d = 1 - m   u - d = m + a
//
// So t has no more error than tanh(q + k) has by itself: u - d is not a difference of rounded
// exponentials, which would lose a small t; and where |t| > 1/3, it is 1 - 2 min(u, d) / (u + d).
// A key with |k| > kFarKey, or NaN, lies as it is, and its scores take tanh itself. For the others
// tanh of a query past kFarQuery is 1.
template <typename S>
struct ScoreAdditive {
  static constexpr bool kHasWeight = true;
  // e^2(kFarKey + kFarQuery) is no infinity, and kFarQuery - kFarKey a clamp of tanh.
  static constexpr S kFarKey = 16, kFarQuery = kFarKey + Traits<S>::kTanhClamp;
  int64_t D;
  const S* w;

  TT_INLINE ScoreAdditive of_head(int64_t h) const { return {D, w + h * D}; }
  TT_INLINE int64_t columns() const { return padded<S>(D); }

  // m or the key, then whether it is the key.
  TT_INLINE int64_t key_numbers() const { return columns() + kLanes<S>; }
  const S* key(const S* row, S* room) const {
    typename VecOf<S>::integers far{};
    for_vectors<S>(D, [&](int64_t d, int64_t part) {
      far |= ~(absolute<S>(load_part(row + d, part)) <= splat(kFarKey));
    });
    bool as_it_is = false;
    for (int lane = 0; lane < kLanes<S>; ++lane) as_it_is |= far[lane] != 0;
    for_vectors<S>(D, [&](int64_t d, int64_t part) {
      const Vec<S> k = load_part(row + d, part);
      const auto [scale, q] = exponential<S>(at_most<S>(absolute<S>(k), kFarKey) * S(2));
      store(room + d, as_it_is ? k : with_sign<S>(scale * q + (scale - S(1)), k));
    });
    store(room + columns(), splat(S(as_it_is)));
    return room;
  }

  // q, a, e
  TT_INLINE int64_t query_numbers() const { return 3 * columns(); }
  const S* query(const S* row, S* room) const {
    for_vectors<S>(D, [&](int64_t d, int64_t part) {
      const Vec<S> x = load_part(row + d, part);
      const auto [scale, q] =
          exponential<S>(with_sign<S>(at_most<S>(absolute<S>(x), kFarQuery), x) * S(2));
      store(room + d, x);
      store(room + columns() + d, scale * q + (scale - S(1)));
      store(room + 2 * columns() + d, scale * q + scale);
    });
    return room;
  }

  // t
  TT_INLINE int64_t kept_numbers() const { return columns(); }
  void scores(const S* query, const S* const* keys, int64_t count, S* to, S* kept) const {
    // Copies: what is kept might lie over this structure, for all that the compiler knows.
    const int64_t D = this->D, columns = this->columns();
    const S *w = this->w, *a = query + columns, *e = a + columns;
    reduce_rows<S>(count, to, [=](int64_t c) {
      const S* key = keys[c];
      S* keep = kept ? kept + c * columns : nullptr;
      Vec<S> sum{};
      const auto add = [&](int64_t d, int64_t part, Vec<S> t) {
        if (keep) store(keep + d, t);
        sum += load_part(w + d, part) * t;
      };
      if (key[columns] == S(0)) {
        for_vectors<S>(D, [&](int64_t d, int64_t part) {
          add(d, part, tanh_of_sum(load(a + d), load(e + d), load(key + d)));
        });
      } else {
        for_vectors<S>(D, [&](int64_t d, int64_t part) {
          add(d, part, tanh<S>(load(query + d) + load(key + d)));
        });
      }
      return sum;
    });
  }

  // Columns [begin, end), whole vectors, of what the gradients need, without the scores.
  void keep(int64_t begin, int64_t end, const S* query, const S* const* keys, int64_t count,
            S* kept) const {
    const int64_t columns = this->columns();
    const S *a = query + columns, *e = a + columns;
    for (int64_t c = 0; c < count; ++c)
      for (int64_t d = begin; d < end; d += kLanes<S>) {
        const Vec<S> k = load(keys[c] + d);
        store(kept + c * columns + d, keys[c][columns] == S(0)
                                          ? tanh_of_sum(load(a + d), load(e + d), k)
                                          : tanh<S>(load(query + d) + k));
      }
  }

  void gradients(const S*, const S* const*, const S* kept, int64_t count, const S* grad,
                 const ScoreGradients<S>& into) const {
    gradients_of(0, D, kept, count, grad, into);
  }

  // Columns [begin, end) of the gradients, whole vectors but for the last. dw, a sum over all queries,
  // is compensated.
  void gradients_of(int64_t begin, int64_t end, const S* kept, int64_t count, const S* grad,
                    const ScoreGradients<S>& into) const {
    for_blocks<S>(begin, end, [&](auto vectors, int64_t d, int64_t part) {
      for_chains(count, [&](int64_t begin, int64_t end) {
        block<decltype(vectors)::value>(kept, begin, end, grad, d, part, into);
      });
    });
  }

 private:
  TT_INLINE static Vec<S> tanh_of_sum(Vec<S> a, Vec<S> e, Vec<S> m) {
    const auto below = m < Vec<S>{};
    const Vec<S> one = splat(S(1));
    const Vec<S> up = below ? e : m * e + e, down = below ? one - m : one;
    const Vec<S> difference = m * (below ? one : e) + a, size = absolute<S>(difference);
    const Vec<S> less = up < down ? up : down;
    const auto large = size > less;
    const Vec<S> quotient = (large ? less * S(-2) : size) / (up + down);
    return with_sign<S>(large ? quotient + one : quotient, difference);
  }

  template <int NV>
  TT_INLINE void block(const S* kept, int64_t begin, int64_t end, const S* grad, int64_t d,
                       int64_t part, const ScoreGradients<S>& into) const {
    constexpr int64_t L = kLanes<S>;
    const auto in = [&](int v) { return v < NV - 1 ? L : part; };
    Vec<S> weight[NV], to_q[NV] = {}, to_w[NV] = {};
    for (int v = 0; v < NV; ++v) weight[v] = load_part(w + d + v * L, in(v));
    for (int64_t c = begin; c < end; ++c) {
      const S* tanh = kept + c * columns() + d;
      S* row = into.keys[c] + d;
      const Vec<S> e = splat(grad[c]);
      for (int v = 0; v < NV; ++v) {
        const Vec<S> t = load(tanh + v * L), g = e * ((S(1) - t) * (S(1) + t));
        to_q[v] += g;
        to_w[v] += e * t;
        store_part(row + v * L, load_part(row + v * L, in(v)) + weight[v] * g, in(v));
      }
    }
    for (int v = 0; v < NV; ++v) {
      const int64_t at = d + v * L;
      store_part(into.query + at, load_part(into.query + at, in(v)) + weight[v] * to_q[v], in(v));
      add_compensated(into.weight + at, into.lost + at, to_w[v], in(v));
    }
  }
};

// The rows of one sequence's keys, as a score takes them.
template <typename S>
struct KeyRows {
  template <typename Score>
  KeyRows(const Score& score, const S* keys, int64_t stride, int64_t count, S* room)
      : at_(keys), stride_(stride) {
    const int64_t numbers = score.key_numbers();
    if (numbers == 0) return;
    for (int64_t c = 0; c < count; ++c) score.key(keys + c * stride, room + c * numbers);
    at_ = room;
    stride_ = numbers;
  }
  TT_INLINE const S* operator()(int64_t position) const { return at_ + position * stride_; }

 private:
  const S* at_;
  int64_t stride_;
};

}  // namespace
}  // namespace throughtime
