// The scores of relevancy attention, and their gradients.
//
// A score is a structure that holds its parameters:
//
//   kHasWeight                              it has a weight [D] per head
//   of_head(h)                              the same score with the weight of head h
//   scores(q, keys, count, to)              to[c] = score(q, keys[c]), written in whole vectors
//   gradients(q, keys, count, grad, into)   grad[c] is the gradient of to[c]
//
// A new score is a structure here, a line of with_score(), and its name in params.h.
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

// scale * q . k
//
//   dq = scale sum e_c k_c       dk_c += scale e_c q
template <typename S>
struct ScoreDot {
  static constexpr bool kHasWeight = false;
  int64_t D;
  S scale;

  TT_INLINE ScoreDot of_head(int64_t) const { return *this; }

  void scores(const S* q, const S* const* keys, int64_t count, S* to) const {
    dot_products(q, D, keys, count, to);
    for (int64_t c = 0; c < count; c += kLanes<S>) store(to + c, load(to + c) * scale);
  }

  void gradients(const S* q, const S* const* keys, int64_t count, const S* grad,
                 const ScoreGradients<S>& into) const {
    weighted_sum(grad, keys, count, D, scale, into.query);
    add_to_rows(grad, scale, q, D, into.keys, count);
  }
};

// w . tanh(q + k)
//
//   with t = tanh(q + k_c), g = e_c w (1 - t^2):   dq += g   dk_c += g   dw += e_c t
template <typename S>
struct ScoreAdditive {
  static constexpr bool kHasWeight = true;
  int64_t D;
  const S* w;

  TT_INLINE ScoreAdditive of_head(int64_t h) const { return {D, w + h * D}; }

  // keep(d, part, c, t) gets every vector of tanh.
  template <typename F>
  TT_INLINE void scores(const S* q, const S* const* keys, int64_t count, S* to,
                        const F& keep) const {
    reduce_rows<S>(D, count, to, [&](int64_t d, int64_t part, int64_t c) {
      const Vec<S> t = tanh<S>(load_part(q + d, part) + load_part(keys[c] + d, part));
      keep(d, part, c, t);
      return load_part(w + d, part) * t;
    });
  }

  void scores(const S* q, const S* const* keys, int64_t count, S* to) const {
    scores(q, keys, count, to, [](int64_t, int64_t, int64_t, Vec<S>) {});
  }

  // tanh_at(d, part, c) gives t. dw, a sum over all queries, is compensated.
  template <typename F>
  TT_INLINE void gradients(int64_t count, const S* grad, const ScoreGradients<S>& into,
                           const F& tanh_at) const {
    for_vectors<S>(D, [&](int64_t d, int64_t part) {
      const Vec<S> weight = load_part(w + d, part);
      for_chains(count, [&](int64_t begin, int64_t end) {
        Vec<S> to_q{}, to_w{};
        for (int64_t c = begin; c < end; ++c) {
          const Vec<S> t = tanh_at(d, part, c);
          const Vec<S> e = splat(grad[c]);
          const Vec<S> g = e * weight * ((S(1) - t) * (S(1) + t));  // exact factors near 1
          to_q += g;
          to_w += e * t;
          S* row = into.keys[c] + d;
          store_part(row, load_part(row, part) + g, part);
        }
        store_part(into.query + d, load_part(into.query + d, part) + to_q, part);
        add_compensated(into.weight + d, into.lost + d, to_w, part);
      });
    });
  }

  void gradients(const S* q, const S* const* keys, int64_t count, const S* grad,
                 const ScoreGradients<S>& into) const {
    gradients(count, grad, into, [&](int64_t d, int64_t part, int64_t c) {
      return tanh<S>(load_part(q + d, part) + load_part(keys[c] + d, part));
    });
  }
};

// Calls f with the score that a call asks for.
template <typename S, typename F>
TT_INLINE void with_score(const RelevancyInput<S>& in, const F& f) {
  switch (in.score) {
    case ScoreKind::kDot:
      return f(ScoreDot<S>{in.shape.D, in.scale});
    case ScoreKind::kAdditive:
      return f(ScoreAdditive<S>{in.shape.D, in.score_weight});
  }
}

}  // namespace
}  // namespace throughtime
