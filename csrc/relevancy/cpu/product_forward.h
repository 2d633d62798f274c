// Relevancy attention with the score scale q . k, forward: a team walks one sequence at a time, a block
// of queries at a time.
//
// A block has two matrices of scores, which become weights in place. That of the retained set has a
// column for each of its keys, by rank; the other has a column for each key that lies side by side:
// those pending, of the window of any of the queries, and, where the retained set may change within
// the block, all of these for every query. So a key that joins the retained set has its scores.
//
//   multiply   tiles               scores of all queries and of the keys that lie side by side
//   weigh      tiles               scores of the keys retained before the first query
//              query by query      softmax, relevance, competition; a change of the retained set moves
//                                  the columns of later queries
//   sum        tiles               outputs: of the retained set for runs of queries that share it, and
//                                  of the window
//
// Only `weigh` needs what it left of the block before: see stages.h.
//
// Every sum of a query has one order, by rank or by position in the whole sequence: blocks may begin
// anywhere, and a sequence split into calls has the bits of one call.
#pragma once

#include "relevancy/cpu/blocks.h"
#include "relevancy/cpu/products.h"
#include "relevancy/cpu/rows.h"
#include "relevancy/cpu/screening.h"
#include "relevancy/cpu/sequence.h"
#include "relevancy/cpu/stages.h"
#include "relevancy/cpu/weights.h"

namespace throughtime {
namespace {

template <typename X>
class ProductForwardPass : public SequencePass {
  using S = SumOf<X>;

 public:
  ProductForwardPass(const RelevancyForward<X>& args, const Runtime& runtime)
      : SequencePass(plan_relevancy(args.in.shape, runtime.threads, true), runtime),
        p_(args),
        in_(args.in),
        shape_(args.in.shape),
        block_(shape_.screening, kQueries, shape_.screening.most_retained()) {
    const ScreeningShape& s = shape_.screening;
    const int64_t slots = Stages::slots(plan_.members());
    meeting_ = per_team<Meeting>(1);
    starts_ = per_team<int64_t>(s.T + 1);
    relevance_ = per_team<S>(s.positions());
    retained_ = per_team<int64_t>(s.most_retained() + 1);
    kept_keys_ = per_team<X>(Turned<X>::numbers(shape_.D, block_.vectors(block_.kept)));
    kept_rows_ = per_team<const X*>(block_.kept);
    query_rows_ = per_team<X>(QueryRows::numbers(times(shape_.group, s.T), shape_.D));
    key_rows_ = per_team<X>(TurnedRows<X>::numbers(s.positions(), shape_.D));
    values_ = per_team<X>(WholeRows<X>::numbers(s.positions(), shape_.Dv));
    outputs_ = per_team<S>(WholeResults<X>::numbers(times(shape_.group, s.T), shape_.Dv));
    states_ = per_team<State>(slots);
    scores_ = per_team<S>(times(slots, rows_of_block(), block_.columns));
    kept_scores_ = per_team<S>(times(slots, rows_of_block(), block_.kept));
    lists_ = per_team<const X*>(times(slots, block_.kept));
    changes_ = per_team<Change>(times(slots, block_.columns));
    keys_ = per_worker<X>(Turned<X>::numbers(shape_.D, block_.vectors(block_.columns)));
    rows_ = per_worker<const X*>(block_.columns);
    steps_ = steps_per_worker<X>(block_.columns, shape_.Dv);
    kept_steps_ = steps_per_worker<X>(block_.kept, shape_.Dv);
    factors_ = per_worker<X>(kPaired<X> ? times(kTileRows<X>, most_columns()) : 0);
  }

  void run(const Runtime& runtime) { run_parts(runtime, *this); }

  void walk(const Member& member) {
    for_sequences(member, [&](int64_t n) { walk_sequence(member, n); });
  }

 private:
  static constexpr int64_t L = kLanes<S>;
  using QueryRows = LeftRows<X, Numbers<X>::kDepth>;
  // Of a block; more would have more scores in vain.
  static constexpr int64_t kQueries = Tiling<X>::kMatrixUnit ? 32 : 18;

  // What the members of a team tell each other.
  struct Meeting {
    Borders borders;
    Stages stages;
  };

  // The key of a rank leaves the retained set (-1: none), another joins at its end: of the queries
  // of a block from `query` on.
  struct Change {
    int64_t query, rank, position;
  };

  // What is known of a block beside its scores.
  struct State {
    bool finite;         // the values that lie side by side
    int64_t kept_count;  // before its first query
    int64_t changes;
  };

  // Of a row of weights.
  TT_INLINE int64_t most_columns() const { return most(block_.columns, block_.kept); }

  // Rows of scores: the queries of the first head of the group, of the second, ...
  TT_INLINE int64_t rows_of_block() const { return times(shape_.group, kQueries); }

  // A sequence as a member sees it.
  struct Sequence {
    SequenceRows<X> rows;
    Meeting* meeting;
    int64_t* starts;  // first queries of blocks
    int64_t shift;    // position p has number p + shift, but for a multiple of kLinks
    const int64_t* retained;
    QueryRows query;
    TurnedRows<X> key;
    WholeRows<X> value;
    WholeResults<X> output;
    Turned<X> keys, kept_keys;
    RowSteps<X> steps, kept_steps;
    const X **values, **kept_rows;
    X* factors;
    int64_t team;
    int64_t turned = -1;      // vectors of keys up to this one have been turned
    int64_t checked = 0;      // values before this position have been looked at
    int64_t infinite = -1;    // no value after this position, of those, is infinite or NaN
    int64_t kept_count = 0;   // of kept_rows
    int64_t kept_turned = 0;  // so many retained keys lie turned as they are
  };

  // Queries [first, first + count) and the numbers of their keys, counted from a whole vector.
  struct Block {
    int64_t first, count, begin, origin, end;
    bool changes;  // the retained set may change before the last query
    State* state;
    S *scores, *kept_scores;
    const X** kept_rows;
    Change* list;
  };

  void walk_sequence(const Member& member, int64_t n) {
    const SequenceRows<X> rows(in_, n);
    const ScreeningShape& s = rows.screening;
    const int64_t own = worker(member), team = member.team, length = rows.steps.length;
    Timing timing(member.watch, kGather);
    Sequence w{.rows = rows,
               .meeting = meeting_(team),
               .starts = starts_(team),
               .shift = (rows.steps.seen % kLinks - s.P % kLinks + kLinks) % kLinks,
               .retained = retained_(team),
               .query = {rows.query, in_.query.stride_t, shape_.D, query_rows_(team),
                         in_.query.stride_h, s.T},
               .key = {rows.key, in_.key.stride_t, shape_.D, key_rows_(team)},
               .value = {rows.value, in_.value.stride_t, shape_.Dv, values_(team)},
               .output = {p_.output + rows.first_query * shape_.Dv, shape_.Dv, outputs_(team),
                          rows.next_head, s.T},
               .keys = {keys_(own), shape_.D, block_.vectors(block_.columns)},
               .kept_keys = {kept_keys_(team), shape_.D, block_.vectors(block_.kept)},
               .steps = steps_(own),
               .kept_steps = kept_steps_(own),
               .values = rows_(own),
               .kept_rows = kept_rows_(team),
               .factors = factors_(own),
               .team = team};
    w.query.copy(share(member, length), shape_.group);
    w.key.copy(share(member, rows.positions()));
    w.value.copy(share(member, rows.positions()));
    if (member.begin == 0) {
      lead(member, w, timing);
    } else {
      walk_blocks(member, w, timing, [](const Block&) {});
    }
    w.output.copy(share(member, length), shape_.group);
    const Share past = share(member, s.T - length);
    const int64_t count = past.end - past.begin;
    for (int64_t head = 0; head < shape_.group; ++head) {
      const int64_t first = rows.first_query + head * rows.next_head + length + past.begin;
      std::memset(p_.output + first * shape_.Dv, 0, count * shape_.Dv * sizeof(X));
      std::memset(p_.lse + first, 0, count * sizeof(S));
    }
  }

  // The first member's walk: it chooses the keys.
  void lead(const Member& member, Sequence& w, Timing& timing) {
    const SequenceRows<X>& rows = w.rows;
    const ScreeningShape& s = rows.screening;
    const int64_t n = rows.number, length = rows.steps.length;
    Screening<S> screening(s, rows.steps, relevance_of(p_, rows), {p_.relevance + n * s.P, 1},
                           {p_.last + rows.first_position, 1}, relevance_(w.team),
                           retained_(w.team));
    w.kept_count = screening.candidates(0).kept_count;
    for (int64_t rank = 0; rank < w.kept_count; ++rank)
      w.kept_rows[rank] = w.value(w.retained[rank]);
    Meeting& meeting = *w.meeting;
    meeting.borders = screening.borders();
    int64_t blocks = 0;
    for (int64_t first = 0; first < length; ++blocks) {
      w.starts[blocks] = first;
      const int64_t to_border = meeting.borders.until(first) + 1;
      first += least(block_length(kQueries, s.screen_every, to_border), length - first);
    }
    w.starts[blocks] = length;
    meeting.stages.begin(blocks);
    walk_blocks(member, w, timing, [&](const Block& block) { weigh(w, block, screening, timing); });
    finish_screening(p_, rows, screening, relevance_(w.team));
  }

  // Makes all blocks; `weigh_block` is the first member's.
  template <typename F>
  void walk_blocks(const Member& member, Sequence& w, Timing& timing, const F& weigh_block) {
    member.wait();  // for borders, blocks, and copies of values
    w.meeting->stages.walk(
        member, members(), [&](int64_t index) { multiply(w, block_at(w, index), timing); },
        [&](int64_t index) { weigh_block(block_at(w, index)); },
        [&](int64_t index) { sum(w, block_at(w, index), timing); });
  }

  Block block_at(const Sequence& w, int64_t index) const {
    const int64_t first = w.starts[index], count = w.starts[index + 1] - first;
    const int64_t begin = w.meeting->borders.begin(first) + w.shift;
    const int64_t slot = index % Stages::slots(members());
    return {.first = first,
            .count = count,
            .begin = begin,
            .origin = group_begin<X>(begin),
            .end = shape_.screening.P + first + count + w.shift,
            .changes = w.meeting->borders.until(first) + 1 < count && shape_.screening.top_k > 0,
            .state = states_(w.team) + slot,
            .scores = scores_(w.team) + slot * rows_of_block() * block_.columns,
            .kept_scores = kept_scores_(w.team) + slot * rows_of_block() * block_.kept,
            .kept_rows = lists_(w.team) + slot * block_.kept,
            .list = changes_(w.team) + slot * block_.columns};
  }

  // Columns that `height` queries of a head attend of their windows; `at` is the first query's row.
  TT_INLINE Columns<X> columns_of(const Sequence& w, const Block& block, int64_t head,
                                  int64_t query, int64_t height) const {
    const int64_t before = w.shift - block.origin, step = block.first + query;
    return Columns<X>::around(block.scores + (head * kQueries + query) * block_.columns,
                              w.meeting->borders.begin(step) + before,
                              shape_.screening.P + step + height + before);
  }
  TT_INLINE S* kept_of(const Block& block, int64_t head, int64_t query) const {
    return block.kept_scores + (head * kQueries + query) * block_.kept;
  }

  // Calls f(head, query, height) for tiles of at most `tallest` queries of a head.
  template <typename F>
  TT_INLINE void for_tiles(const Block& block, int64_t tallest, const F& f) const {
    for (int64_t head = 0; head < shape_.group; ++head)
      for (int64_t query = 0; query < block.count; query += tallest)
        f(head, query, least(tallest, block.count - query));
  }

  void multiply(Sequence& w, const Block& block, Timing& timing) const {
    timing.turn(kPack);
    turn_keys(w, block);
    timing.turn(kScores);
    const int64_t first = block.origin / L;
    for_tiles(block, kTileRows<X>, [&](int64_t head, int64_t query, int64_t height) {
      const Columns<X> own = columns_of(w, block, head, query, height);
      const int64_t begin = block.changes ? 0 : own.begin;
      multiply_turned(w.query(block.first + query, head), w.query.stride, height, w.keys,
                      first + begin / L, first + own.end / L, own.at + begin, block_.columns);
    });
    timing.turn(kOther);
  }

  // Turns the keys that the block brings.
  void turn_keys(Sequence& w, const Block& block) const {
    for (int64_t v = most(w.turned + 1, block.origin / L); v * L < group_end<X>(block.end); ++v) {
      w.keys.put(v, [&](int64_t lane) {
        const int64_t position = v * L + lane - w.shift;
        const bool known = v * L + lane >= block.begin && position < w.rows.positions();
        return known ? w.key(position) : nullptr;
      });
      w.turned = v;
    }
    const int64_t end = block.end - w.shift, from = most(w.checked, block.begin - w.shift);
    if (!all_finite(w.value(from), w.value.stride, end - from, shape_.Dv)) w.infinite = end - 1;
    w.checked = end;
    block.state->finite = w.infinite + w.shift < block.begin;
  }

  void weigh(Sequence& w, const Block& block, Screening<S>& screening, Timing& timing) const {
    timing.turn(kPack);
    turn_kept(w);
    block.state->kept_count = w.kept_count;
    block.state->changes = 0;
    std::memcpy(block.kept_rows, w.kept_rows, w.kept_count * sizeof(*w.kept_rows));
    timing.turn(kScores);
    for_tiles(block, kTileRows<X>, [&](int64_t head, int64_t query, int64_t height) {
      multiply_turned(w.query(block.first + query, head), w.query.stride, height, w.kept_keys, 0,
                      group_end<X>(w.kept_count) / L, kept_of(block, head, query), block_.kept);
    });
    for (int64_t tile = 0; tile < block.count; tile += kTileRows<X>) {
      const int64_t end = least(tile + kTileRows<X>, block.count);
      const Columns<X> all = columns_of(w, block, 0, tile, end - tile);
      for (int64_t q = tile, next; q < end; q = next) {
        next = least(end, q + kRegisterRows);
        if (block.changes) next = least(next, q + w.meeting->borders.until(block.first + q) + 1);
        timing.turn(kScores);
        with_constant<kRegisterRows>(next - q, [&](auto count) {
          for (int64_t head = 0; head < shape_.group; ++head)
            weigh_queries<decltype(count)::value>(w, block, head, q, all);
        });
        timing.turn(kScreening);
        for (int64_t step = q; step < next; ++step) screen(w, block, step, screening);
      }
    }
    timing.turn(kOther);
  }

  // Makes the weights of Count queries that share the retained set, zeros where their tile attends more.
  template <int Count>
  __attribute__((noinline)) void weigh_queries(const Sequence& w, const Block& block, int64_t head,
                                               int64_t query, const Columns<X>& tile) const {
    QueryScores<X> queries[Count];
    for (int q = 0; q < Count; ++q) {
      queries[q].kept = Columns<X>::around(kept_of(block, head, query + q), 0, w.kept_count);
      queries[q].window = columns_of(w, block, head, query + q, 1);
    }
    const int64_t begin = queries[0].window.begin, end = queries[Count - 1].window.end;
    for (auto& [kept, window, total] : queries) {
      window.begin = begin;
      window.end = end;
      if constexpr (Count < kTileRows<X>) {
        for (int64_t v = tile.begin; v < begin; v += L) store(window.at + v, Vec<S>{});
        for (int64_t v = end; v < tile.end; v += L) store(window.at + v, Vec<S>{});
      }
    }
    softmax(in_.scale, queries);
    S* lse = p_.lse + w.rows.first_query + head * w.rows.next_head + block.first + query;
    for (int q = 0; q < Count; ++q) lse[q] = queries[q].total.log();
  }

  // The retained set after a query.
  void screen(Sequence& w, const Block& block, int64_t q, Screening<S>& screening) const {
    screening.candidates(block.first + q);
    for (int64_t head = 0; head < shape_.group; ++head)
      screening.receive(block.scores + (head * kQueries + q) * block_.columns - block.origin +
                        w.shift);
    screening.compete(block.first + q, [&](int64_t rank, int64_t position) {
      replace(w, block, {q + 1, rank, position});
    });
  }

  // Turns those keys of the retained set that have changed.
  void turn_kept(Sequence& w) const {
    for (int64_t v = w.kept_turned / L; v * L < group_end<X>(w.kept_count); ++v)
      w.kept_keys.put(v, [&](int64_t lane) {
        const int64_t rank = v * L + lane;
        return rank < w.kept_count ? w.key(w.retained[rank]) : nullptr;
      });
    w.kept_turned = group_end<X>(w.kept_count);
  }

  template <typename N>
  TT_INLINE static void renew(N* list, int64_t count, int64_t rank, N newest) {
    if (rank >= 0) std::memmove(list + rank, list + rank + 1, (count - rank) * sizeof(N));
    list[count] = newest;
  }

  void replace(Sequence& w, const Block& block, const Change& change) const {
    const auto [query, rank, position] = change;
    const int64_t count = rank < 0 ? w.kept_count : w.kept_count - 1;
    const int64_t column = position + w.shift - block.origin;
    for (int64_t head = 0; head < shape_.group; ++head)
      for (int64_t q = query; q < block.count; ++q)
        renew(kept_of(block, head, q), count, rank,
              block.scores[(head * kQueries + q) * block_.columns + column]);
    renew(w.kept_rows, count, rank, w.value(position));
    w.kept_count = count + 1;
    w.kept_turned = least(w.kept_turned, rank < 0 ? count : rank);
    if (query < block.count) block.list[block.state->changes++] = change;
  }

  void sum(const Sequence& w, const Block& block, Timing& timing) const {
    timing.turn(kSums);
    const State& state = *block.state;
    const bool retains = state.kept_count + state.changes > 0;
    int64_t run = 0, kept = state.kept_count;  // first query of those that share the retained set
    for (int64_t i = 0; i < state.changes; ++i) {
      const auto [query, rank, position] = block.list[i];
      if (query > run) sum_kept(w, block, run, query, kept);
      run = query;
      if (rank >= 0) --kept;
      renew(block.kept_rows, kept++, rank, w.value(position));
    }
    if (retains) sum_kept(w, block, run, block.count, kept);
    for (int64_t number = block.begin; number < block.end; ++number)
      w.values[number - block.origin] = w.value(number - w.shift);
    // A tile has zeros where one of its queries attends what another does not.
    const int64_t tallest = state.finite ? kTileRows<X> : 1;
    const X* const* steps =
        w.steps(w.values, block.begin - block.origin, block.end - block.origin, block.origin);
    for_tiles(block, tallest, [&](int64_t head, int64_t query, int64_t height) {
      const Columns<X> all = columns_of(w, block, head, query, height);
      if (!state.finite) steps = w.steps(w.values, all.first, all.last, block.origin);
      sum_tile(w, block, head, query, height, all, block_.columns, steps, block.origin, retains);
    });
    timing.turn(kOther);
  }

  // The part of the retained set in the outputs of queries [begin, end), which share it.
  void sum_kept(const Sequence& w, const Block& block, int64_t begin, int64_t end,
                int64_t kept) const {
    const X* const* steps = w.kept_steps(block.kept_rows, 0, kept);
    for (int64_t head = 0; head < shape_.group; ++head)
      for_row_tiles<kTileRows<X>>(begin, end, [&](int64_t query, int64_t height) {
        S* const at = kept_of(block, head, query);
        sum_tile(w, block, head, query, height, Columns<X>::around(at, 0, kept), block_.kept, steps,
                 0, false);
      });
  }

  // Sums for the outputs of some queries of a head: columns of rows of weights, `apart` numbers from each
  // other, whose chains end as `phase` says.
  TT_INLINE void sum_tile(const Sequence& w, const Block& block, int64_t head, int64_t query,
                          int64_t height, const Columns<X>& own, int64_t apart,
                          const X* const* steps, int64_t phase, bool begun) const {
    S* to[kTileRows<X>];
    for (int64_t q = 0; q < height; ++q) to[q] = w.output(block.first + query + q, head);
    const Factors<X> weights =
        factors<X>(own.at, apart, height, own.begin, own.end, w.factors, most_columns());
    sum_rows<X>({weights, steps, own.first, own.last, phase, to, begun}, height, 0,
                divide_up(shape_.Dv, L));
  }

  const RelevancyForward<X>& p_;
  const RelevancyInput<X>& in_;
  const RelevancyShape shape_;
  const BlockShape<X> block_;
  Span<Meeting> meeting_;
  Span<int64_t> starts_, retained_;
  Span<S> relevance_, outputs_, scores_, kept_scores_;
  Span<X> kept_keys_, query_rows_, key_rows_, values_, keys_, factors_;
  Span<const X*> kept_rows_, lists_, rows_;
  typename RowSteps<X>::Room steps_, kept_steps_;
  Span<State> states_;
  Span<Change> changes_;
};

}  // namespace
}  // namespace throughtime
