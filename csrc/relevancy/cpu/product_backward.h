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
#include "relevancy/cpu/products.h"
#include "relevancy/cpu/rows.h"
#include "relevancy/cpu/screening.h"
#include "relevancy/cpu/sequence.h"
#include "relevancy/cpu/weights.h"

namespace throughtime {
namespace {

template <typename S>
class ProductBackwardPass : public SequencePass {
 public:
  ProductBackwardPass(const RelevancyBackward<S>& args, const Runtime& runtime)
      : SequencePass(plan_relevancy(args.in.shape, runtime.threads, true), runtime),
        p_(args),
        in_(args.in),
        shape_(args.in.shape),
        block_(shape_.screening, kQueries, most_retained(in_, p_.last)),
        row_(block_.kept() + block_.columns()) {
    const ScreeningShape& s = shape_.screening;
    const int64_t slots = plan_.members() > 1 ? kGroup : 1;
    const auto whole = [&](int64_t rows, int64_t features) {
      return per_team<S>(WholeRows<S>::numbers(rows, features));
    };
    ended_ = per_worker<int64_t>(s.T);
    next_ = per_worker<int64_t>(s.positions());
    retained_ = per_worker<int64_t>(s.positions());
    turned_ = per_worker<int64_t>(block_.kept());
    keys_ = per_worker<S>(Turned<S>::numbers(shape_.D, block_.vectors));
    values_ = per_worker<S>(Turned<S>::numbers(shape_.Dv, block_.vectors));
    kept_keys_ = per_worker<S>(Turned<S>::numbers(shape_.D, block_.kept_vectors));
    kept_values_ = per_worker<S>(Turned<S>::numbers(shape_.Dv, block_.kept_vectors));
    query_rows_ = whole(times(shape_.group, s.T), shape_.D);
    key_rows_ = whole(s.positions(), shape_.D);
    output_rows_ = whole(times(shape_.group, s.T), shape_.Dv);
    grad_query_ = whole(times(shape_.group, s.T), shape_.D);
    grad_key_ = whole(s.positions(), shape_.D);
    grad_value_ = whole(s.positions(), shape_.Dv);
    const auto per_block = [&](auto number, int64_t count) {
      return scratch_.template reserve<decltype(number)>(times(plan_.workers(), slots), count);
    };
    blocks_ = per_block(Block(), 1);
    weights_ = per_block(S(), times(shape_.group, kQueries, row_));
    grad_ = per_block(S(), times(shape_.group, kQueries, row_));
    since_ = per_block(S(), row_);
    until_ = per_block(S(), row_);
    rows_ = per_block(static_cast<const S*>(nullptr), row_);
    grad_keys_ = per_block(static_cast<S*>(nullptr), row_);
    grad_values_ = per_block(static_cast<S*>(nullptr), row_);
  }

  void run(const Runtime& runtime) { run_parts(runtime, *this); }

  void walk(const Member& member) {
    for_sequences(member, [&](int64_t n) { walk_sequence(member, n); });
  }

 private:
  static constexpr int64_t L = kLanes<S>;
  static constexpr int64_t kQueries = 36;  // of a block, over which gradients of keys are summed
  static constexpr int64_t kGroup = 4;     // blocks of a member between two barriers

  // A sequence as a member sees it.
  struct Sequence {
    SequenceRows<S> rows;
    const int64_t* last;
    WholeRows<S> query_rows, key_rows, output_rows;
    WholeResults<S> grad_query, grad_key, grad_value;
    Turned<S> keys, values, kept_keys, kept_values;
    int64_t* turned;     // positions of the retained keys that lie turned
    int64_t kept_count;  // how many
    int64_t from;        // vectors of keys from this one on have been turned
  };

  // Queries [first, first + count). The retained keys have columns [0, kept), the others from `begin`
  // on: position p has column p + before.
  struct Block {
    int64_t first, count, kept, begin, end, before;
    bool finite;  // what is multiplied by zeros
    S *weights, *grad;
    S *since, *until;  // by column: queries of the block that attend it; none if since is `count`
    const S** rows;    // keys by column, and where their gradients go
    S **grad_keys, **grad_values;
  };

  // Some queries of a block, of one head of the group.
  struct Rows {
    int64_t head, query, count;
  };
  // Rows of a block's matrices: the queries of the first head of the group, of the second, ...
  TT_INLINE int64_t row_of(int64_t head, int64_t query) const {
    return (head * kQueries + query) * row_;
  }

  void walk_sequence(const Member& member, int64_t n) {
    const int64_t own = worker(member), team = member.team, D = shape_.D, Dv = shape_.Dv;
    const SequenceRows<S> rows(in_, n);
    const ScreeningShape& s = rows.screening;
    const int64_t length = rows.steps.length;
    Timing timing(member.watch, kGather);
    const int64_t* last = p_.last + rows.first_position;
    const S* output = p_.grad_output.of(rows, shape_.group);
    Sequence w{.rows = rows,
               .last = last,
               .query_rows = {rows.query, in_.query.stride_t, D, query_rows_(team),
                              in_.query.stride_h, s.T},
               .key_rows = {rows.key, in_.key.stride_t, D, key_rows_(team)},
               .output_rows = {output, p_.grad_output.stride_t, Dv, output_rows_(team),
                               p_.grad_output.stride_h, s.T},
               .grad_query = {p_.grad_query + rows.first_query * D, D, grad_query_(team),
                              rows.next_head, s.T},
               .grad_key = {p_.grad_key + rows.first_position * D, D, grad_key_(team)},
               .grad_value = {p_.grad_value + rows.first_position * Dv, Dv, grad_value_(team)},
               .keys = {keys_(own), D, block_.vectors},
               .values = {values_(own), Dv, block_.vectors},
               .kept_keys = {kept_keys_(own), D, block_.kept_vectors},
               .kept_values = {kept_values_(own), Dv, block_.kept_vectors},
               .turned = turned_(own),
               .kept_count = 0,
               .from = divide_up(rows.positions(), L)};
    const Share of_queries = share(member, length), of_keys = share(member, s.positions());
    w.query_rows.copy(of_queries, shape_.group);
    w.output_rows.copy(of_queries, shape_.group);
    w.key_rows.copy(share(member, rows.positions()));
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
        blocks[count] = block_at(member.team * round + count, end, queries, keys);
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

  Block block_at(int64_t slot, int64_t first, int64_t count, const Candidates& keys) const {
    return {.first = first,
            .count = count,
            .kept = keys.kept_count,
            .begin = keys.window_begin,
            .end = shape_.screening.P + first + count,
            .before = block_.kept() - keys.window_begin / L * L,
            .finite = false,
            .weights = weights_(slot),
            .grad = grad_(slot),
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
      for (int64_t query = 0; query < block.count; query += kRegisterRows) {
        const int64_t height = least(kRegisterRows, block.count - query);
        const int64_t end = shape_.screening.P + block.first + query + height;
        while (w.last[left] < block.first + query) ++left;
        const auto columns = Columns<S>::around(nullptr, left + block.before, end + block.before);
        const Rows tile{head, query, height};
        timing.turn(kScores);
        fetch_before(w, block, tile);
        multiply(w, block, tile, columns);
        const bool finite = weigh(block, tile, columns);
        block.finite &= finite;
        timing.turn(kSums);
        sum_keys(w, block, tile, columns, finite);
      }
    }
  }

  // Asks for rows of the block before. Keys and values are turned by whole vectors, so early.
  TT_INLINE void fetch_before(const Sequence& w, const Block& block, const Rows& tile) const {
    const auto of = [&](const S* rows, int64_t stride, int64_t end, int64_t features) {
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
    put_nothing(block.kept, round_up(block.kept, L));
    const int64_t begin = block.begin + block.before, end = block.end + block.before;
    put_nothing(begin / L * L, begin);
    for (int64_t p = block.begin; p < block.end; ++p)
      put(p + block.before, p, most(0, p - shape_.screening.P - block.first));
    put_nothing(end, round_up(end, L));
  }

  void turn_rows(Sequence& w, const Block& block, const int64_t* kept) const {
    const int64_t of_key = in_.key.stride_t, of_value = in_.value.stride_t;
    w.from = least(w.from, divide_up(block.end, L));
    for (; w.from > block.begin / L; --w.from) {
      const auto put = [&](const Turned<S>& to, const S* rows, int64_t stride) {
        to.put(w.from - 1, [&](int64_t lane) {
          const int64_t position = (w.from - 1) * L + lane;
          return position < w.rows.positions() ? rows + position * stride : nullptr;
        });
      };
      put(w.keys, w.rows.key, of_key);
      put(w.values, w.rows.value, of_value);
    }
    int64_t same = 0;
    while (same < least(w.kept_count, block.kept) && w.turned[same] == kept[same]) ++same;
    for (int64_t v = same / L; v * L < block.kept && same < block.kept; ++v) {
      const auto put = [&](const Turned<S>& to, const S* rows, int64_t stride) {
        to.put(v, [&](int64_t lane) {
          const int64_t rank = v * L + lane;
          return rank < block.kept ? rows + kept[rank] * stride : nullptr;
        });
      };
      put(w.kept_keys, w.rows.key, of_key);
      put(w.kept_values, w.rows.value, of_value);
    }
    for (w.kept_count = same; w.kept_count < block.kept; ++w.kept_count)
      w.turned[w.kept_count] = kept[w.kept_count];
  }

  // Products of queries with keys, and of gradients of outputs with values.
  void multiply(const Sequence& w, const Block& block, const Rows& tile,
                const Columns<S>& columns) const {
    const int64_t first = block.first + tile.query, kept = divide_up(block.kept, L);
    const int64_t row = row_of(tile.head, tile.query);
    const int64_t begin = (columns.begin - block.before) / L;
    const int64_t end = (columns.end - block.before) / L;
    const auto both = [&](const WholeRows<S>& rows, const Turned<S>& of_kept,
                          const Turned<S>& of_window, S* to) {
      const S* queries = rows(first, tile.head);
      multiply_turned(queries, rows.stride, tile.count, of_kept, 0, kept, to, row_);
      multiply_turned(queries, rows.stride, tile.count, of_window, begin, end, to + columns.begin,
                      row_);
    };
    both(w.query_rows, w.kept_keys, w.keys, block.weights + row);
    both(w.output_rows, w.kept_values, w.values, block.grad + row);
  }

  // Makes weights and gradients of products. Returns whether all products are finite.
  bool weigh(const Block& block, const Rows& tile, const Columns<S>& columns) const {
    QueryGradients<S> queries[kRegisterRows];
    for (int64_t q = 0; q < tile.count; ++q) {
      const int64_t row = row_of(tile.head, tile.query + q);
      queries[q] = {block.weights + row, block.grad + row, static_cast<S>(tile.query + q)};
    }
    const bool finite = softmax_backward(
        in_.scale, {block.since, block.until, block.kept, columns.begin, columns.end}, queries,
        tile.count);
    // A tile of keys has some that none of these queries attends.
    const int64_t begin = (most(block.begin + block.before, columns.first - kRegisterRows)) / L * L;
    const int64_t end = round_up(least(block.end + block.before, columns.last + kRegisterRows), L);
    const auto clear = [&](int64_t from, int64_t until) {
      for (int64_t q = 0; q < tile.count; ++q)
        for (int64_t v = from; v < until; v += L) {
          store(queries[q].scores + v, Vec<S>{});
          store(queries[q].grad + v, Vec<S>{});
        }
    };
    clear(begin, columns.begin);
    clear(columns.end, end);
    return finite;
  }

  // Gradients of queries: sums over keys.
  void sum_keys(const Sequence& w, const Block& block, const Rows& tile, const Columns<S>& columns,
                bool finite) const {
    S* to[kRegisterRows];
    for (int64_t q = 0; q < tile.count; ++q)
      to[q] = w.grad_query(block.first + tile.query + q, tile.head);
    const auto add = [&](int64_t q, int64_t rows, int64_t from, int64_t until, bool begun) {
      const S* grad = block.grad + row_of(tile.head, tile.query + q);
      sum_rows<S>({grad, row_, 1, block.rows, from, until, 0, to + q, begun}, rows, 0,
                  divide_up(shape_.D, L));
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
    const S *queries[kQueries], *outputs[kQueries];
    for (int64_t head = 0; head < shape_.group; ++head) {
      for (int64_t q = 0; q < block.count; ++q) {
        queries[q] = w.query_rows(block.first + q, head);
        outputs[q] = w.output_rows(block.first + q, head);
      }
      const int64_t row = row_of(head, 0);
      const auto add = [&](int64_t column, int64_t height) {
        const int64_t since = static_cast<int64_t>(block.since[column]);
        int64_t until = 0;
        for (int64_t c = column; c < column + height; ++c)
          until = most(until, least(static_cast<int64_t>(block.until[c]) + 1, block.count));
        if (until <= since) return;
        sum_rows<S>({block.weights + row + column, 1, row_, outputs, since, until, 0,
                     block.grad_values + column, true},
                    height, own.begin, least(own.end, of_values));
        sum_rows<S>({block.grad + row + column, 1, row_, queries, since, until, 0,
                     block.grad_keys + column, true},
                    height, most(own.begin - of_values, 0), own.end - of_values);
      };
      const auto add_all = [&](int64_t begin, int64_t end) {
        if (block.finite) {
          for_row_tiles(begin, end, add);
        } else {
          for (int64_t c = begin; c < end; ++c) add(c, 1);
        }
      };
      add_all(0, block.kept);
      add_all(block.begin + block.before, block.end + block.before);
    }
  }

  const RelevancyBackward<S>& p_;
  const RelevancyInput<S>& in_;
  const RelevancyShape shape_;
  const BlockShape<S> block_;
  const int64_t row_;  // columns of a block
  Span<Block> blocks_;
  Span<S> keys_, values_, kept_keys_, kept_values_, query_rows_, key_rows_, output_rows_,
      grad_query_, grad_key_, grad_value_, weights_, grad_, since_, until_;
  Span<int64_t> ended_, next_, retained_, turned_;
  Span<const S*> rows_;
  Span<S*> grad_keys_, grad_values_;
};

}  // namespace
}  // namespace throughtime
