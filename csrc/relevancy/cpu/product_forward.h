// Relevancy attention with the score scale q . k, forward: a worker walks one sequence at a time, a
// block of queries at a time.
//
// A block has two matrices of scores, which become weights in place. That of the retained set has a
// column for each of its keys, by rank; the other has a column for each key that lies side by side:
// those pending, of the window of any of the queries, and, where the retained set may change within
// the block, all of these for every query. So a key that joins the retained set has its scores.
//
//   tiles               scores of all queries and of the keys retained before the first of them
//   query by query      softmax, relevance, competition; a change of the retained set moves the
//                       columns of later queries
//   tiles               outputs: of the retained set for runs of queries that share it, and of the
//                       window
//
// Every sum of a query has one order, by rank or by position in the whole sequence: blocks may begin
// anywhere, and a sequence split into calls has the bits of one call.
#pragma once

#include "relevancy/cpu/forward.h"
#include "relevancy/cpu/products.h"
#include "relevancy/cpu/screening.h"

namespace throughtime {
namespace {

// Queries of a block: at most `most`, and as few as reach the border if that is worth its while.
TT_INLINE int64_t block_length(int64_t most, int64_t every, int64_t to_border) {
  return every < most ? most : divide_up(to_border, divide_up(to_border, most));
}

// Sizes of the matrices of a block.
template <typename S>
struct BlockShape {
  int64_t kept_vectors, vectors;

  TT_INLINE BlockShape(const ScreeningShape& shape, int64_t queries, int64_t most_retained)
      : kept_vectors(most(1, divide_up(most_retained, kLanes<S>))),
        vectors(
            divide_up(least(shape.most_in_window() + queries - 1, shape.positions()), kLanes<S>) +
            1) {}
  TT_INLINE int64_t kept() const { return kept_vectors * kLanes<S>; }
  TT_INLINE int64_t columns() const { return vectors * kLanes<S>; }
};

// Some columns of a row of scores, in whole vectors.
template <typename S>
struct Columns {
  S* at;
  int64_t begin, end;

  // Calls f(vector, which of its lanes are columns).
  template <typename F>
  TT_INLINE void each(const F& f) const {
    for (int64_t v = begin / kLanes<S> * kLanes<S>; v < end; v += kLanes<S>)
      f(at + v, lanes_between<S>(v, begin, end));
  }
};

// Turns the products of a query with its retained keys and with its window into weights, zero in the
// other lanes. Lanes of the window are those of positions in the whole sequence.
template <typename S>
SumOfExponentials<S> softmax(S scale, const Columns<S>& kept, const Columns<S>& window) {
  const Vec<S> nothing = splat(-static_cast<S>(__builtin_inff()));
  Vec<S> highest = nothing;
  const auto scaled = [&](S* at, auto own) {
    const Vec<S> x = own ? load(at) * scale : nothing;
    store(at, x);
    highest = x > highest ? x : highest;
  };
  kept.each(scaled);
  window.each(scaled);
  const S top = highest_lane<S>(highest);
  const auto exponentials = [&](const Columns<S>& columns) {
    Vec<S> sum{};
    columns.each([&](S* at, auto own) {
      const Vec<S> e = exp_nonpositive<S>(load(at) - splat(top));
      store(at, e);
      sum += own ? e : Vec<S>{};
    });
    return sum;
  };
  const Vec<S> of_kept = exponentials(kept);
  const S sum = sum_of_lanes<S>(of_kept + exponentials(window)), factor = S(1) / sum;
  const auto weights = [&](S* at, auto own) { store(at, own ? load(at) * factor : Vec<S>{}); };
  kept.each(weights);
  window.each(weights);
  return {top, sum};
}

template <typename S>
class ProductForwardPass {
 public:
  ProductForwardPass(const RelevancyForward<S>& args, const Runtime& runtime)
      : p_(args),
        in_(args.in),
        shape_(args.in.shape),
        schedule_(schedule_sequences(shape_, runtime.threads)),
        block_(shape_.screening, kQueries, shape_.screening.most_retained()),
        scratch_(runtime) {
    const auto per_worker = [&](auto number, int64_t count) {
      return scratch_.template reserve<decltype(number)>(schedule_.teams, count);
    };
    const ScreeningShape& s = shape_.screening;
    relevance_ = per_worker(S(), s.positions());
    retained_ = per_worker(int64_t(), s.most_retained() + 1);
    keys_ = per_worker(S(), Turned<S>::numbers(shape_.D, block_.vectors));
    kept_keys_ = per_worker(S(), Turned<S>::numbers(shape_.D, block_.kept_vectors));
    values_ = per_worker(S(), WholeRows<S>::numbers(s.positions(), shape_.Dv));
    outputs_ = per_worker(S(), WholeRows<S>::numbers(s.T, shape_.Dv));
    scores_ = per_worker(S(), times(kQueries, block_.columns()));
    kept_scores_ = per_worker(S(), times(kQueries, block_.kept()));
    rows_ = per_worker(static_cast<const S*>(nullptr), block_.columns());
    kept_rows_ = per_worker(static_cast<const S*>(nullptr), block_.kept());
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
  static constexpr int64_t L = kLanes<S>;
  static constexpr int64_t kQueries = 18;  // of a block; more would have more scores in vain

  struct Sequence {
    const Borders* borders;
    int64_t length, shift;  // position p has number p + shift, but for a multiple of kLinks
    const S *query, *key;
    const int64_t* retained;
    WholeRows<S> value;
    WholeResults<S> output;
    Turned<S> keys, kept_keys;
    S *scores, *kept_scores;
    const S **rows, **kept_rows;
    int64_t turned;       // vectors of keys up to this one have been turned
    int64_t checked;      // values before this position have been looked at
    int64_t infinite;     // no value after this position, of those, is infinite or NaN
    int64_t kept_count;   // of kept_rows
    int64_t kept_turned;  // so many retained keys lie turned as they are
  };

  // Queries [first, first + count) and the numbers of their keys, counted from a whole vector.
  struct Block {
    int64_t first, count, origin, end;
    bool changes;  // the retained set may change before the last query
  };

  void walk_sequence(const Member& member, int64_t n) {
    const int64_t worker = member.team;
    const ScreeningShape& s = shape_.screening;
    const int64_t b = n / shape_.heads, h = n % shape_.heads;
    const Steps steps = in_.steps(b);
    Screening<S> screening(s, steps, relevance_of(p_, n), {p_.relevance + n * s.P, 1},
                           {p_.last + n * s.positions(), 1}, relevance_(worker), retained_(worker));
    const S* value = in_.value.sequence(b, h);
    const int64_t positions = s.P + steps.length;
    Timing timing(member.watch, kGather);
    Sequence w{.borders = &screening.borders(),
               .length = steps.length,
               .shift = (steps.seen % kLinks - s.P % kLinks + kLinks) % kLinks,
               .query = in_.query.sequence(b, h),
               .key = in_.key.sequence(b, h),
               .retained = retained_(worker),
               .value = {value, in_.value.stride_t, positions, shape_.Dv, values_(worker)},
               .output = {p_.output + n * s.T * shape_.Dv, shape_.Dv, outputs_(worker)},
               .keys = {keys_(worker), shape_.D, block_.vectors},
               .kept_keys = {kept_keys_(worker), shape_.D, block_.kept_vectors},
               .scores = scores_(worker),
               .kept_scores = kept_scores_(worker),
               .rows = rows_(worker),
               .kept_rows = kept_rows_(worker),
               .turned = -1,
               .checked = 0,
               .infinite = -1,
               .kept_count = 0,
               .kept_turned = 0};
    const Candidates& candidates = screening.candidates(0);
    for (; w.kept_count < candidates.kept_count; ++w.kept_count)
      w.kept_rows[w.kept_count] = w.value(w.retained[w.kept_count]);
    for (int64_t first = 0; first < w.length;) {
      const int64_t to_border = w.borders->until(first) + 1;
      const int64_t count =
          least(block_length(kQueries, s.screen_every, to_border), w.length - first);
      walk_block(w, screening, first, count, to_border < count && s.top_k > 0, p_.lse + n * s.T,
                 timing);
      first += count;
    }
    screening.finish({p_.memory_index + n * s.memory_after(), 1},
                     {p_.memory_relevance + n * s.memory_after(), 1});
    if (p_.received)
      std::memcpy(p_.received + n * s.positions(), relevance_(worker), s.positions() * sizeof(S));
    w.output.copy(w.length);
    std::memset(p_.output + (n * s.T + w.length) * shape_.Dv, 0,
                (s.T - w.length) * shape_.Dv * sizeof(S));
    std::memset(p_.lse + n * s.T + w.length, 0, (s.T - w.length) * sizeof(S));
  }

  void walk_block(Sequence& w, Screening<S>& screening, int64_t first, int64_t count, bool changes,
                  S* lse, Timing& timing) {
    const int64_t P = shape_.screening.P;
    const int64_t begin = w.borders->begin(first) + w.shift;
    const Block block{first, count, begin / L * L, P + first + count + w.shift, changes};
    timing.turn(kPack);
    turn_keys(w, block, begin);
    timing.turn(kScores);
    multiply_keys(w, block);
    int64_t run = 0;  // first query of those that share the retained set
    for (int64_t tile = 0; tile < count; tile += kRegisterRows) {
      const int64_t height = least(kRegisterRows, count - tile);
      const Columns<S> all = columns_of(w, block, tile, height);
      for (int64_t q = tile; q < tile + height; ++q) {
        const Columns<S> own = columns_of(w, block, q, 1);
        S* kept = w.kept_scores + q * block_.kept();
        for (int64_t c = all.begin; c < own.begin; ++c) own.at[c] = S(0);
        for (int64_t c = own.end; c < all.end; ++c) own.at[c] = S(0);
        timing.turn(kScores);
        lse[first + q] = softmax(in_.scale, {kept, 0, w.kept_count}, own).log();
        timing.turn(kScreening);
        screening.candidates(first + q);
        screening.advance(first + q, own.at - block.origin + w.shift,
                          [&](int64_t rank, int64_t position) {
                            sum_kept(w, first, run, q + 1);
                            run = q + 1;
                            replace(w, block, q + 1, rank, position);
                          });
      }
    }
    timing.turn(kSums);
    sum_kept(w, first, run, count);
    // A tile has zeros where one of its queries attends what another does not.
    const int64_t tallest = w.infinite + w.shift >= begin ? 1 : kRegisterRows;
    for (int64_t tile = 0; tile < count; tile += tallest) {
      const int64_t height = least(tallest, count - tile);
      const Columns<S> all = columns_of(w, block, tile, height);
      S* to[kRegisterRows];
      for (int64_t q = 0; q < height; ++q) to[q] = w.output(first + tile + q);
      sum_rows<S>({w.scores + tile * block_.columns(), block_.columns(), 1, w.rows, all.begin,
                   all.end, block.origin, to, true},
                  height, divide_up(shape_.Dv, L));
    }
    timing.turn(kOther);
  }

  // Columns that `height` queries attend of their windows; `at` is the first query's row.
  TT_INLINE Columns<S> columns_of(const Sequence& w, const Block& block, int64_t query,
                                  int64_t height) const {
    const int64_t before = w.shift - block.origin, step = block.first + query;
    return {w.scores + query * block_.columns(), w.borders->begin(step) + before,
            shape_.screening.P + step + height + before};
  }

  // Turns the keys that the block brings, and those of the retained set that have changed.
  void turn_keys(Sequence& w, const Block& block, int64_t begin) {
    const int64_t stride = in_.key.stride_t;
    for (int64_t v = most(w.turned + 1, block.origin / L); v * L < block.end; ++v) {
      w.keys.put(v, [&](int64_t lane) {
        const int64_t position = v * L + lane - w.shift;
        const bool known = v * L + lane >= begin && position < shape_.screening.P + w.length;
        return known ? w.key + position * stride : nullptr;
      });
      w.turned = v;
    }
    const int64_t end = block.end - w.shift, from = most(w.checked, begin - w.shift);
    if (!all_finite(w.value(from), w.value.stride, end - from, shape_.Dv)) w.infinite = end - 1;
    w.checked = end;
    for (int64_t number = begin; number < block.end; ++number)
      w.rows[number - block.origin] = w.value(number - w.shift);
    for (int64_t v = w.kept_turned / L; v * L < w.kept_count; ++v)
      w.kept_keys.put(v, [&](int64_t lane) {
        const int64_t rank = v * L + lane;
        return rank < w.kept_count ? w.key + w.retained[rank] * stride : nullptr;
      });
    w.kept_turned = round_up(w.kept_count, L);
  }

  void multiply_keys(const Sequence& w, const Block& block) {
    const int64_t stride = in_.query.stride_t, first = block.origin / L;
    for (int64_t tile = 0; tile < block.count; tile += kRegisterRows) {
      const int64_t height = least(kRegisterRows, block.count - tile);
      const S* query = w.query + (block.first + tile) * stride;
      const Columns<S> own = columns_of(w, block, tile, height);
      const int64_t begin = block.changes ? 0 : own.begin / L;
      multiply_turned(query, stride, height, w.kept_keys, 0, divide_up(w.kept_count, L),
                      w.kept_scores + tile * block_.kept(), block_.kept());
      multiply_turned(query, stride, height, w.keys, first + begin, first + divide_up(own.end, L),
                      own.at + begin * L, block_.columns());
    }
  }

  // The part of the retained set in the outputs of queries [begin, end), which share it.
  void sum_kept(const Sequence& w, int64_t first, int64_t begin, int64_t end) {
    for_row_tiles(begin, end, [&](int64_t tile, int64_t height) {
      S* to[kRegisterRows];
      for (int64_t q = 0; q < height; ++q) to[q] = w.output(first + tile + q);
      sum_rows<S>({w.kept_scores + tile * block_.kept(), block_.kept(), 1, w.kept_rows, 0,
                   w.kept_count, 0, to, false},
                  height, divide_up(shape_.Dv, L));
    });
  }

  // The key of a rank leaves the retained set (-1: none), another joins at its end: of the queries
  // from `query` on.
  void replace(Sequence& w, const Block& block, int64_t query, int64_t rank, int64_t position) {
    const int64_t count = rank < 0 ? w.kept_count : w.kept_count - 1;
    const auto renew = [&](auto* list, auto newest) {
      if (rank >= 0) std::memmove(list + rank, list + rank + 1, (count - rank) * sizeof(*list));
      list[count] = newest;
    };
    for (int64_t q = query; q < block.count; ++q)
      renew(w.kept_scores + q * block_.kept(),
            w.scores[q * block_.columns() + position + w.shift - block.origin]);
    renew(w.kept_rows, w.value(position));
    w.kept_count = count + 1;
    w.kept_turned = least(w.kept_turned, rank < 0 ? count : rank);
  }

  const RelevancyForward<S>& p_;
  const RelevancyInput<S>& in_;
  const RelevancyShape shape_;
  const SequenceSchedule schedule_;
  const BlockShape<S> block_;
  Scratch scratch_;
  Span<S> relevance_, keys_, kept_keys_, values_, outputs_, scores_, kept_scores_;
  Span<int64_t> retained_;
  Span<const S*> rows_, kept_rows_;
  Span<Barrier> barriers_;
};

}  // namespace
}  // namespace throughtime
