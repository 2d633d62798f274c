// Relevancy attention with the score scale q . k, backward.
//
// A team walks a sequence from its last block of queries to its first. A block has two matrices: of
// weights p, which come from the scores again (see backward.h), and of gradients. Their columns are
// the keys retained at the block's first query, then the keys that lie side by side. A key is attended
// by an unbroken run of queries, so `last` says which entries are not zero.
//
//   dp = do v^T      ds = scale p (dp - p . dp)      dv += p^T do      dk += ds^T q      dq = ds k
//
// All five are products of tiles. A member of a team makes p, ds and dq of some blocks. Then all meet, and
// each member adds those of all to dk and dv, the later block first, in features of its own.
#pragma once

#include "relevancy/cpu/blocks.h"
#include "relevancy/cpu/factor_matrix.h"
#include "relevancy/cpu/products.h"
#include "relevancy/cpu/rows.h"
#include "relevancy/cpu/screening.h"
#include "relevancy/cpu/sequence.h"
#include "relevancy/cpu/weights.h"

namespace throughtime {
namespace {

template <typename X>
class ProductBackwardPass : public SequencePass {
  using S = SumOf<X>;

 public:
  ProductBackwardPass(const RelevancyBackward<X>& args, const Runtime& runtime)
      : SequencePass(plan_relevancy(args.in.shape, runtime.threads, true), runtime),
        p_(args),
        in_(args.in),
        shape_(args.in.shape),
        block_(shape_.screening, kQueries, most_retained(in_, p_.last)),
        row_(block_.kept + block_.columns) {
    const ScreeningShape& s = shape_.screening;
    const int64_t slots = plan_.members() > 1 ? kGroup : 1;
    const auto left = [&](int64_t rows, int64_t features) {
      return per_team<X>(LeftRows<X>::numbers(rows, features));
    };
    const auto results = [&](int64_t rows, int64_t features) {
      return per_team<S>(WholeResults<X>::numbers(rows, features));
    };
    ended_ = per_worker<int64_t>(s.T);
    next_ = per_worker<int64_t>(s.positions());
    retained_ = per_worker<int64_t>(s.positions());
    turned_ = per_worker<int64_t>(block_.kept);
    key_steps_ = steps_per_worker<X>(row_, shape_.D);
    query_steps_ = steps_per_worker<X>(kQueries, shape_.D);
    output_steps_ = steps_per_worker<X>(kQueries, shape_.Dv);
    keys_ = per_worker<X>(Turned<X>::numbers(shape_.D, block_.vectors(block_.columns)));
    values_ = per_worker<X>(Turned<X>::numbers(shape_.Dv, block_.vectors(block_.columns)));
    kept_keys_ = per_worker<X>(Turned<X>::numbers(shape_.D, block_.vectors(block_.kept)));
    kept_values_ = per_worker<X>(Turned<X>::numbers(shape_.Dv, block_.vectors(block_.kept)));
    query_rows_ = left(times(shape_.group, s.T), shape_.D);
    key_rows_ = per_team<X>(WholeRows<X>::numbers(s.positions(), shape_.D));
    output_rows_ = left(times(shape_.group, s.T), shape_.Dv);
    value_rows_ = per_team<X>(TurnedRows<X>::numbers(s.positions(), shape_.Dv));
    grad_query_ = results(times(shape_.group, s.T), shape_.D);
    grad_key_ = results(s.positions(), shape_.D);
    grad_value_ = results(s.positions(), shape_.Dv);
    const auto per_block = [&](auto number, int64_t count) {
      return scratch_.template reserve<decltype(number)>(times(plan_.workers(), slots), count);
    };
    blocks_ = per_block(Block(), 1);
    const auto matrix = [&]() -> typename Matrix::Room {
      return {row_, per_block(S(), Matrix::numbers(shape_.group, row_)),
              per_block(X(), Matrix::by_column(shape_.group, row_)),
              per_worker<X>(Matrix::by_row(row_))};
    };
    weights_ = matrix();
    grad_ = matrix();
    since_ = per_block(S(), row_);
    until_ = per_block(S(), row_);
    rows_ = per_block(static_cast<const X*>(nullptr), row_);
    grad_keys_ = per_block(static_cast<S*>(nullptr), row_);
    grad_values_ = per_block(static_cast<S*>(nullptr), row_);
  }

  void run(const Runtime& runtime) { run_parts(runtime, *this); }

  void walk(const Member& member) {
    for_sequences(member, [&](int64_t n) { walk_sequence(member, n); });
  }

 private:
  static constexpr int64_t L = kLanes<S>;
  // Of a block, over which gradients of keys are summed.
  static constexpr int64_t kQueries = kPaired<X> ? 2 * L : 36;
  static constexpr int64_t kGroup = 4;  // blocks of a member between two barriers

  using Matrix = FactorMatrix<X, kQueries>;

  // A sequence as a member sees it.
  struct Sequence {
    SequenceRows<X> rows;
    const int64_t* last;
    LeftRows<X> query_rows;
    WholeRows<X> key_rows;
    LeftRows<X> output_rows;
    TurnedRows<X> value_rows;
    WholeResults<X> grad_query, grad_key, grad_value;
    Turned<X> keys, values, kept_keys, kept_values;
    RowSteps<X> key_steps, query_steps, output_steps;
    int64_t* turned;     // positions of the retained keys that lie turned
    int64_t kept_count;  // how many
    int64_t from;        // vectors of keys from this one on have been turned
  };

  // Queries [first, first + count). The retained keys have columns [0, kept), the others from `begin`
  // on: position p has column p + before.
  struct Block {
    int64_t first, count, kept, begin, end, before;
    bool finite;  // what is multiplied by zeros
    Matrix weights, grad;
    S *since, *until;  // by column: queries of the block that attend it; none if since is `count`
    const X** rows;    // keys by column, and where their gradients go
    S **grad_keys, **grad_values;
  };

  // Some queries of a block, of one head of the group.
  struct Rows {
    int64_t head, query, count;
  };

  void walk_sequence(const Member& member, int64_t n) {
    const int64_t own = worker(member), team = member.team, D = shape_.D, Dv = shape_.Dv;
    const SequenceRows<X> rows(in_, n);
    const ScreeningShape& s = rows.screening;
    const int64_t length = rows.steps.length;
    Timing timing(member.watch, kGather);
    const int64_t* last = p_.last + rows.first_position;
    const X* output = p_.grad_output.of(rows, shape_.group);
    Sequence w{.rows = rows,
               .last = last,
               .query_rows = {rows.query, in_.query.stride_t, D, query_rows_(team),
                              in_.query.stride_h, s.T},
               .key_rows = {rows.key, in_.key.stride_t, D, key_rows_(team)},
               .output_rows = {output, p_.grad_output.stride_t, Dv, output_rows_(team),
                               p_.grad_output.stride_h, s.T},
               .value_rows = {rows.value, in_.value.stride_t, Dv, value_rows_(team)},
               .grad_query = {p_.grad_query + rows.first_query * D, D, grad_query_(team),
                              rows.next_head, s.T},
               .grad_key = {p_.grad_key + rows.first_position * D, D, grad_key_(team)},
               .grad_value = {p_.grad_value + rows.first_position * Dv, Dv, grad_value_(team)},
               .keys = {keys_(own), D, block_.vectors(block_.columns)},
               .values = {values_(own), Dv, block_.vectors(block_.columns)},
               .kept_keys = {kept_keys_(own), D, block_.vectors(block_.kept)},
               .kept_values = {kept_values_(own), Dv, block_.vectors(block_.kept)},
               .key_steps = key_steps_(own),
               .query_steps = query_steps_(own),
               .output_steps = output_steps_(own),
               .turned = turned_(own),
               .kept_count = 0,
               .from = group_end<X>(rows.positions()) / L};
    const Share of_queries = share(member, length), of_keys = share(member, s.positions());
    w.query_rows.copy(of_queries, shape_.group);
    w.output_rows.copy(of_queries, shape_.group);
    w.key_rows.copy(share(member, rows.positions()));
    w.value_rows.copy(share(member, rows.positions()));
    const Share past = share(member, s.T - length);
    for (int64_t head = 0; head < shape_.group; ++head)
      for (int64_t t = past.begin; t < past.end; ++t) w.grad_query.clear(length + t, head);
    for (int64_t p = of_keys.begin; p < of_keys.end; ++p)
      if (last[p] < 0) clear(w, p);
    member.wait();
    Replay replay(s, rows.steps, {last, 1}, ended_(own), next_(own), retained_(own));
    walk_blocks(member, w, replay, timing);
    w.grad_query.copy(share(member, s.T), shape_.group);
    w.grad_key.copy(of_keys);
    w.grad_value.copy(of_keys);
  }

  // The members of a team take turns: each has some blocks, and goes over those of the others.
  void walk_blocks(const Member& member, Sequence& w, Replay& replay, Timing& timing) {
    const Borders borders(w.rows.screening, w.rows.steps);
    const int64_t group = members() > 1 ? kGroup : 1, round = members() * group;
    const int64_t first = member.begin * group, last = member.end * group;
    Block* blocks = blocks_(member.team * round);
    for (int64_t end = w.rows.steps.length; end > 0;) {
      int64_t count = 0;
      for (; count < round && end > 0; ++count) {
        const int64_t passed = borders.passed(end - 1);
        const int64_t queries =
            least(block_length(kQueries, w.rows.screening.screen_every, passed), end);
        end -= queries;
        timing.turn(kScreening);
        for (int64_t step = end + queries - 1; step > end; --step) replay.candidates(step);
        const Candidates& keys = replay.candidates(end);
        if (count < first || count >= last) continue;
        blocks[count] = block_at(member.team * round + count, worker(member), end, queries, keys);
        make(w, blocks[count], keys.kept, timing);
      }
      timing.turn(kOther);
      member.wait();
      timing.turn(kSums);
      for (int64_t index = 0; index < count; ++index) sum_queries(member, w, blocks[index]);
      timing.turn(kOther);
      member.wait();
    }
  }

  Block block_at(int64_t slot, int64_t own, int64_t first, int64_t count,
                 const Candidates& keys) const {
    return {.first = first,
            .count = count,
            .kept = keys.kept_count,
            .begin = keys.window_begin,
            .end = shape_.screening.P + first + count,
            .before = block_.kept - group_begin<X>(keys.window_begin),
            .finite = false,
            .weights = weights_(slot, own),
            .grad = grad_(slot, own),
            .since = since_(slot),
            .until = until_(slot),
            .rows = rows_(slot),
            .grad_keys = grad_keys_(slot),
            .grad_values = grad_values_(slot)};
  }

  // Weights, their gradients, and the gradients of queries.
  void make(Sequence& w, Block& block, const int64_t* kept, Timing& timing) const {
    list_columns(w, block, kept);
    timing.turn(kPack);
    turn_rows(w, block, kept);
    block.finite = true;
    for (int64_t head = 0; head < shape_.group; ++head) {
      int64_t left = block.begin;  // of the keys side by side, the first that the tile attends
      for (int64_t query = 0; query < block.count; query += kTileRows<X>) {
        const int64_t height = least(kTileRows<X>, block.count - query);
        const int64_t end = shape_.screening.P + block.first + query + height;
        while (w.last[left] < block.first + query) ++left;
        const auto columns = Columns<X>::around(nullptr, left + block.before, end + block.before);
        const Rows tile{head, query, height};
        timing.turn(kScores);
        fetch_before(w, block, tile);
        multiply(w, block, tile, columns);
        const bool finite = weigh(block, tile, columns);
        block.finite &= finite;
        timing.turn(kSums);
        sum_keys(w, block, tile, columns, finite);
      }
      const auto turn = [&](int64_t begin, int64_t end) {
        block.weights.turn(head, block.count, begin, end);
        block.grad.turn(head, block.count, begin, end);
      };
      turn(0, group_end<X>(block.kept));
      turn(group_begin<X>(block.begin + block.before), group_end<X>(block.end + block.before));
    }
  }

  // Asks for rows of the block before. Keys and values are turned by whole vectors, so early.
  TT_INLINE void fetch_before(const Sequence& w, const Block& block, const Rows& tile) const {
    const auto of = [&](const auto* rows, int64_t stride, int64_t end, int64_t features) {
      fetch(rows, stride, most(0, end - tile.count), most(0, end), features);
    };
    if (tile.head == 0) {
      const int64_t key = block.begin - tile.query;
      of(w.rows.key, in_.key.stride_t, key - L, shape_.D);
      of(w.rows.value, in_.value.stride_t, key - L, shape_.Dv);
      of(w.grad_key.at, w.grad_key.stride, key, shape_.D);
      of(w.grad_value.at, w.grad_value.stride, key, shape_.Dv);
    }
    const int64_t query = block.first - tile.query;
    of(w.query_rows(0, tile.head), w.query_rows.stride, query, shape_.D);
    of(w.output_rows(0, tile.head), w.output_rows.stride, query, shape_.Dv);
    of(w.grad_query(0, tile.head), w.grad_query.stride, query, shape_.D);
  }

  void clear(const Sequence& w, int64_t position) const {
    w.grad_key.clear(position);
    w.grad_value.clear(position);
  }

  // Where the rows of each column lie, and which queries attend it. Gradients begin as zeros.
  void list_columns(const Sequence& w, const Block& block, const int64_t* kept) const {
    const int64_t count = block.count;
    const auto put = [&](int64_t column, int64_t position, int64_t since) {
      block.rows[column] = w.key_rows(position);
      block.grad_keys[column] = w.grad_key(position);
      block.grad_values[column] = w.grad_value(position);
      block.since[column] = static_cast<S>(since);
      block.until[column] = static_cast<S>(least(w.last[position] - block.first, count));
      if (w.last[position] < block.first + count) clear(w, position);
    };
    const auto put_nothing = [&](int64_t begin, int64_t end) {
      for (int64_t column = begin; column < end; ++column)
        block.since[column] = static_cast<S>(count);
    };
    for (int64_t c = 0; c < block.kept; ++c) put(c, kept[c], 0);
    put_nothing(block.kept, group_end<X>(block.kept));
    const int64_t begin = block.begin + block.before, end = block.end + block.before;
    put_nothing(group_begin<X>(begin), begin);
    for (int64_t p = block.begin; p < block.end; ++p)
      put(p + block.before, p, most(0, p - shape_.screening.P - block.first));
    put_nothing(end, group_end<X>(end));
  }

  void turn_rows(Sequence& w, const Block& block, const int64_t* kept) const {
    w.from = least(w.from, group_end<X>(block.end) / L);
    for (; w.from > group_begin<X>(block.begin) / L; --w.from) {
      const auto put = [&](const Turned<X>& to, const auto& rows) {
        to.put(w.from - 1, [&](int64_t lane) {
          const int64_t position = (w.from - 1) * L + lane;
          return position < w.rows.positions() ? rows(position) : nullptr;
        });
      };
      put(w.keys, w.key_rows);
      put(w.values, w.value_rows);
    }
    int64_t same = 0;
    while (same < least(w.kept_count, block.kept) && w.turned[same] == kept[same]) ++same;
    for (int64_t v = same / L; v * L < group_end<X>(block.kept) && same < block.kept; ++v) {
      const auto put = [&](const Turned<X>& to, const auto& rows) {
        to.put(v, [&](int64_t lane) {
          const int64_t rank = v * L + lane;
          return rank < block.kept ? rows(kept[rank]) : nullptr;
        });
      };
      put(w.kept_keys, w.key_rows);
      put(w.kept_values, w.value_rows);
    }
    for (w.kept_count = same; w.kept_count < block.kept; ++w.kept_count)
      w.turned[w.kept_count] = kept[w.kept_count];
  }

  // Products of queries with keys, and of gradients of outputs with values.
  void multiply(const Sequence& w, const Block& block, const Rows& tile,
                const Columns<X>& columns) const {
    const int64_t first = block.first + tile.query, kept = group_end<X>(block.kept) / L;
    const int64_t begin = (columns.begin - block.before) / L;
    const int64_t end = (columns.end - block.before) / L;
    const auto both = [&](const LeftRows<X>& rows, const Turned<X>& of_kept,
                          const Turned<X>& of_window, const Matrix& matrix) {
      const X* queries = rows(first, tile.head);
      S* const to = matrix.row(tile.head, tile.query);
      multiply_turned(queries, rows.stride, tile.count, of_kept, 0, kept, to, row_);
      multiply_turned(queries, rows.stride, tile.count, of_window, begin, end, to + columns.begin,
                      row_);
    };
    both(w.query_rows, w.kept_keys, w.keys, block.weights);
    both(w.output_rows, w.kept_values, w.values, block.grad);
  }

  // Makes weights and gradients of products. Returns whether all products are finite.
  bool weigh(const Block& block, const Rows& tile, const Columns<X>& columns) const {
    QueryGradients<S> queries[kTileRows<X>];
    X *weights[kTileRows<X>], *grad[kTileRows<X>];
    for (int64_t q = 0; q < tile.count; ++q) {
      const int64_t query = tile.query + q;
      queries[q] = {block.weights.row(tile.head, query), block.grad.row(tile.head, query),
                    static_cast<S>(query)};
      weights[q] = block.weights.factors(tile.head, query);
      grad[q] = block.grad.factors(tile.head, query);
    }
    const AttendedColumns<S> own{block.since, block.until, group_end<X>(block.kept), columns.begin,
                                 columns.end};
    const auto put = [&](int64_t q, int64_t column, Vec<S> p, Vec<S> dp) {
      Numbers<X>::put(weights[q], column, p);
      Numbers<X>::put(grad[q], column, dp);
    };
    const auto put_own = [&](int64_t q, int64_t column, const auto& lanes, Vec<S> p, Vec<S> dp) {
      if constexpr (kPaired<X>) {  // the other row of a pair may be zero, but a factor not finite
        put(q, column, lanes ? p : Vec<S>{}, lanes ? dp : Vec<S>{});
      } else {
        put(q, column, p, dp);
      }
    };
    const bool finite = softmax_backward(in_.scale, own, queries, tile.count, put_own);
    // A tile of keys has some that none of these queries attends.
    const int64_t reach = kPaired<X> ? kQueries : kTileRows<X>;
    const int64_t begin = group_begin<X>(most(block.begin + block.before, columns.first - reach));
    const int64_t end = group_end<X>(least(block.end + block.before, columns.last + reach));
    const auto clear = [&](int64_t from, int64_t until) {
      for (int64_t q = 0; q < tile.count; ++q)
        for (int64_t v = from; v < until; v += L) put(q, v, Vec<S>{}, Vec<S>{});
    };
    clear(begin, columns.begin);
    clear(columns.end, end);
    return finite;
  }

  // Gradients of queries: sums over keys.
  void sum_keys(const Sequence& w, const Block& block, const Rows& tile, const Columns<X>& columns,
                bool finite) const {
    S* to[kTileRows<X>];
    for (int64_t q = 0; q < tile.count; ++q)
      to[q] = w.grad_query(block.first + tile.query + q, tile.head);
    const auto add = [&](int64_t q, int64_t rows, int64_t from, int64_t until, bool begun) {
      sum_rows<X>({block.grad.along_row(tile.head, tile.query + q),
                   w.key_steps(block.rows, from, until), from, until, 0, to + q, begun},
                  rows, 0, divide_up(shape_.D, L));
    };
    if (finite) {
      if (block.kept > 0) add(0, tile.count, 0, block.kept, false);
      add(0, tile.count, columns.first, columns.last, block.kept > 0);
      return;
    }
    for (int64_t q = 0; q < tile.count; ++q) {  // one key after the other
      const S row = static_cast<S>(tile.query + q);
      add(q, 1, 0, 0, false);
      const auto add_own = [&](int64_t from, int64_t until) {
        for (int64_t c = from; c < until; ++c)
          if (block.since[c] <= row && row <= block.until[c]) add(q, 1, c, c + 1, true);
      };
      add_own(0, block.kept);
      add_own(columns.first, columns.last);
    }
  }

  // Gradients of keys and values: sums over queries, in the member's vectors of features.
  void sum_queries(const Member& member, const Sequence& w, const Block& block) const {
    const int64_t of_values = divide_up(shape_.Dv, L);
    const Share own = share(member, of_values + divide_up(shape_.D, L));
    const X *queries[kQueries], *outputs[kQueries];
    for (int64_t head = 0; head < shape_.group; ++head) {
      for (int64_t q = 0; q < block.count; ++q) {
        queries[q] = w.query_rows(block.first + q, head);
        outputs[q] = w.output_rows(block.first + q, head);
      }
      const X* const* query_steps = w.query_steps(queries, 0, block.count);
      const X* const* output_steps = w.output_steps(outputs, 0, block.count);
      const auto add = [&](int64_t column, int64_t height) {
        const int64_t since = static_cast<int64_t>(block.since[column]);
        int64_t until = 0;
        for (int64_t c = column; c < column + height; ++c)
          until = most(until, least(static_cast<int64_t>(block.until[c]) + 1, block.count));
        if (until <= since) return;
        if (!block.finite) {
          query_steps = w.query_steps(queries, since, until);
          output_steps = w.output_steps(outputs, since, until);
        }
        sum_rows<X>({block.weights.along_column(head, column), output_steps, since, until, 0,
                     block.grad_values + column, true},
                    height, own.begin, least(own.end, of_values));
        sum_rows<X>({block.grad.along_column(head, column), query_steps, since, until, 0,
                     block.grad_keys + column, true},
                    height, most(own.begin - of_values, 0), own.end - of_values);
      };
      const auto add_all = [&](int64_t begin, int64_t end) {
        if (block.finite) {
          for_row_tiles<kTileRows<X>>(begin, end, add);
        } else {
          for (int64_t c = begin; c < end; ++c) add(c, 1);
        }
      };
      add_all(0, block.kept);
      add_all(block.begin + block.before, block.end + block.before);
    }
  }

  const RelevancyBackward<X>& p_;
  const RelevancyInput<X>& in_;
  const RelevancyShape shape_;
  const BlockShape<X> block_;
  const int64_t row_;  // columns of a block
  Span<Block> blocks_;
  Span<X> keys_, values_, kept_keys_, kept_values_, query_rows_, key_rows_, output_rows_,
      value_rows_;
  Span<S> grad_query_, grad_key_, grad_value_, since_, until_;
  typename Matrix::Room weights_, grad_;
  typename RowSteps<X>::Room key_steps_, query_steps_, output_steps_;
  Span<int64_t> ended_, next_, retained_, turned_;
  Span<const X*> rows_;
  Span<S*> grad_keys_, grad_values_;
};

}  // namespace
}  // namespace throughtime
