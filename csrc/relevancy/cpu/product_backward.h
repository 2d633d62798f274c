// Relevancy attention with the score scale q . k, backward.
//
// A worker walks a sequence from its last block of queries to its first. A block has two matrices: of
// weights p, which come from the scores again (see backward.h), and of gradients. Their columns are
// the keys retained at the block's first query, then the keys that lie side by side. A key is attended
// by an unbroken run of queries, so `last` says which entries are not zero.
//
//   dp = do v^T      ds = scale p (dp - p . dp)      dv += p^T do      dk += ds^T q      dq = ds k
//
// All five are products of tiles. Rows of dk and dv are added to in place, since a sequence belongs to
// one worker.
#pragma once

#include "relevancy/cpu/product_forward.h"

namespace throughtime {
namespace {

template <typename S>
class ProductBackwardPass {
 public:
  ProductBackwardPass(const RelevancyBackward<S>& args, const Runtime& runtime)
      : p_(args),
        in_(args.in),
        shape_(args.in.shape),
        schedule_(schedule_sequences(shape_, runtime.threads)),
        block_(shape_.screening, kQueries, most_retained()),
        row_(block_.kept() + block_.columns()),
        scratch_(runtime) {
    const auto per_worker = [&](auto number, int64_t count) {
      return scratch_.template reserve<decltype(number)>(schedule_.teams, count);
    };
    const auto whole = [&](int64_t rows, int64_t features) {
      return per_worker(S(), WholeRows<S>::numbers(rows, features));
    };
    const ScreeningShape& s = shape_.screening;
    ended_ = per_worker(int64_t(), s.T);
    next_ = per_worker(int64_t(), s.positions());
    retained_ = per_worker(int64_t(), s.positions());
    turned_ = per_worker(int64_t(), block_.kept());
    keys_ = per_worker(S(), Turned<S>::numbers(shape_.D, block_.vectors));
    values_ = per_worker(S(), Turned<S>::numbers(shape_.Dv, block_.vectors));
    kept_keys_ = per_worker(S(), Turned<S>::numbers(shape_.D, block_.kept_vectors));
    kept_values_ = per_worker(S(), Turned<S>::numbers(shape_.Dv, block_.kept_vectors));
    query_rows_ = whole(s.T, shape_.D);
    key_rows_ = whole(s.positions(), shape_.D);
    output_rows_ = whole(s.T, shape_.Dv);
    grad_query_ = whole(s.T, shape_.D);
    grad_key_ = whole(s.positions(), shape_.D);
    grad_value_ = whole(s.positions(), shape_.Dv);
    weights_ = per_worker(S(), times(kQueries, row_));
    grad_ = per_worker(S(), times(kQueries, row_));
    since_ = per_worker(S(), row_);
    until_ = per_worker(S(), row_);
    rows_ = per_worker(static_cast<const S*>(nullptr), row_);
    grad_keys_ = per_worker(static_cast<S*>(nullptr), row_);
    grad_values_ = per_worker(static_cast<S*>(nullptr), row_);
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
  static constexpr int64_t kQueries = 36;  // of a block, over which gradients of keys are summed

  int64_t most_retained() const {
    const ScreeningShape& s = shape_.screening;
    int64_t retained = 0;
    for (int64_t n = 0; n < shape_.sequences(); ++n)
      retained = most(retained, retained_at_end(s, in_.steps(n / shape_.heads),
                                                {p_.last + n * s.positions(), 1}));
    return retained;
  }

  struct Sequence {
    const int64_t* last;
    const S *key, *value;
    int64_t positions;
    WholeRows<S> query_rows, key_rows, output_rows;
    WholeResults<S> grad_query, grad_key, grad_value;
    Turned<S> keys, values, kept_keys, kept_values;
    S *weights, *grad;
    S *since, *until;  // by column: queries of the block that attend it; none if since is `count`
    const S** rows;    // keys by column, and where their gradients go
    S **grad_keys, **grad_values;
    int64_t* turned;     // positions of the retained keys that lie turned
    int64_t kept_count;  // how many
    int64_t infinite;    // no key before this position, of those turned, is infinite or NaN
    int64_t from;        // vectors of keys from this one on have been turned
  };

  // Queries [first, first + count). The retained keys have columns [0, kept), the others from `begin`
  // on: position p has column p + before.
  struct Block {
    int64_t first, count, kept, begin, end, before;
    bool finite;  // what is multiplied by zeros

    // Columns of positions from `position` to the last one that a query attends, in whole vectors.
    TT_INLINE Columns<S> columns(S* row, int64_t position, int64_t query, int64_t P) const {
      return {row, (position + before) / L * L, round_up(P + first + query + 1 + before, L)};
    }
  };

  void walk_sequence(const Member& member, int64_t n) {
    const int64_t worker = member.team, D = shape_.D, Dv = shape_.Dv;
    const ScreeningShape& s = shape_.screening;
    const int64_t b = n / shape_.heads, h = n % shape_.heads;
    const Steps steps = in_.steps(b);
    const int64_t length = steps.length, positions = s.P + length;
    const S* query = in_.query.sequence(b, h);
    const S* key = in_.key.sequence(b, h);
    const S* value = in_.value.sequence(b, h);
    const S* output = p_.grad_output.sequence(b, h);
    Timing timing(member.watch, kGather);
    const int64_t* last = p_.last + n * s.positions();
    Sequence w{.last = last,
               .key = key,
               .value = value,
               .positions = positions,
               .query_rows = {query, in_.query.stride_t, length, D, query_rows_(worker)},
               .key_rows = {key, in_.key.stride_t, positions, D, key_rows_(worker)},
               .output_rows = {output, p_.grad_output.stride_t, length, Dv, output_rows_(worker)},
               .grad_query = {p_.grad_query + n * s.T * D, D, grad_query_(worker)},
               .grad_key = {p_.grad_key + n * s.positions() * D, D, grad_key_(worker)},
               .grad_value = {p_.grad_value + n * s.positions() * Dv, Dv, grad_value_(worker)},
               .keys = {keys_(worker), D, block_.vectors},
               .values = {values_(worker), Dv, block_.vectors},
               .kept_keys = {kept_keys_(worker), D, block_.kept_vectors},
               .kept_values = {kept_values_(worker), Dv, block_.kept_vectors},
               .weights = weights_(worker),
               .grad = grad_(worker),
               .since = since_(worker),
               .until = until_(worker),
               .rows = rows_(worker),
               .grad_keys = grad_keys_(worker),
               .grad_values = grad_values_(worker),
               .turned = turned_(worker),
               .kept_count = 0,
               .infinite = positions,
               .from = divide_up(positions, L)};
    for (int64_t t = length; t < s.T; ++t) w.grad_query.clear(t);
    for (int64_t p = 0; p < s.positions(); ++p)
      if (last[p] < 0) clear(w, p);
    Replay replay(s, steps, {last, 1}, ended_(worker), next_(worker), retained_(worker));
    const Borders borders(s, steps);
    for (int64_t end = length; end > 0;) {
      const int64_t passed = borders.passed(end - 1);
      const int64_t count = least(block_length(kQueries, s.screen_every, passed), end);
      walk_block(w, replay, end - count, count, timing);
      end -= count;
    }
    w.grad_query.copy(s.T);
    w.grad_key.copy(s.positions());
    w.grad_value.copy(s.positions());
  }

  void walk_block(Sequence& w, Replay& replay, int64_t first, int64_t count, Timing& timing) {
    const int64_t P = shape_.screening.P;
    timing.turn(kScreening);
    for (int64_t step = first + count - 1; step > first; --step) replay.candidates(step);
    const Candidates& keys = replay.candidates(first);
    const int64_t begin = keys.window_begin, origin = begin / L * L;
    Block block{.first = first,
                .count = count,
                .kept = keys.kept_count,
                .begin = begin,
                .end = P + first + count,
                .before = block_.kept() - origin,
                .finite = false};
    list_columns(w, block, keys.kept);
    timing.turn(kPack);
    turn_rows(w, block, keys.kept);
    block.finite = is_finite(w, block);
    int64_t left = begin;  // the first position after the retained keys that the tile attends
    for (int64_t tile = 0; tile < count; tile += kRegisterRows) {
      const int64_t height = least(kRegisterRows, count - tile);
      while (w.last[left] < first + tile) ++left;
      const Columns<S> all = block.columns(nullptr, left, tile + height - 1, P);
      timing.turn(kScores);
      multiply(w, block, tile, height, all);
      for (int64_t q = tile; q < tile + height; ++q) weigh(w, block, q, all);
      timing.turn(kSums);
      sum_keys(w, block, tile, height, left);
    }
    sum_queries(w, block, 0, block.kept);
    sum_queries(w, block, begin + block.before, block.end + block.before);
    timing.turn(kOther);
  }

  void clear(const Sequence& w, int64_t position) const {
    w.grad_key.clear(position);
    w.grad_value.clear(position);
  }

  // Where the rows of each column lie, and which queries attend it. Gradients begin as zeros.
  void list_columns(const Sequence& w, const Block& block, const int64_t* kept) const {
    const int64_t count = block.count;
    const auto put = [&](int64_t column, int64_t position, int64_t since) {
      w.rows[column] = w.key_rows(position);
      w.grad_keys[column] = w.grad_key(position);
      w.grad_values[column] = w.grad_value(position);
      w.since[column] = static_cast<S>(since);
      w.until[column] = static_cast<S>(least(w.last[position] - block.first, count));
      if (w.last[position] < block.first + count) clear(w, position);
    };
    const auto put_nothing = [&](int64_t begin, int64_t end) {
      for (int64_t column = begin; column < end; ++column) w.since[column] = static_cast<S>(count);
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
    for (; w.from > block.begin / L; --w.from) {
      const auto put = [&](const Turned<S>& to, const S* rows, int64_t stride) {
        to.put(w.from - 1, [&](int64_t lane) {
          const int64_t position = (w.from - 1) * L + lane;
          return position < w.positions ? rows + position * stride : nullptr;
        });
      };
      put(w.keys, w.key, of_key);
      put(w.values, w.value, of_value);
      const int64_t position = (w.from - 1) * L, rows = least(L, w.positions - position);
      if (!all_finite(w.key + position * of_key, of_key, rows, shape_.D)) w.infinite = position;
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
      put(w.kept_keys, w.key, of_key);
      put(w.kept_values, w.value, of_value);
    }
    for (w.kept_count = same; w.kept_count < block.kept; ++w.kept_count)
      w.turned[w.kept_count] = kept[w.kept_count];
  }

  // Whether sums over the block may add products with zero.
  bool is_finite(const Sequence& w, const Block& block) const {
    bool finite = w.infinite >= block.end;
    for (int64_t c = 0; c < block.kept; ++c) finite &= all_finite(w.rows[c], 0, 1, shape_.D);
    const WholeRows<S>&queries = w.query_rows, &outputs = w.output_rows;
    return finite && all_finite(queries(block.first), queries.stride, block.count, shape_.D) &&
           all_finite(outputs(block.first), outputs.stride, block.count, shape_.Dv);
  }

  // Products of queries with keys, and of gradients of outputs with values.
  void multiply(const Sequence& w, const Block& block, int64_t tile, int64_t height,
                const Columns<S>& all) const {
    const int64_t query = block.first + tile, kept = divide_up(block.kept, L);
    const int64_t begin = (all.begin - block.before) / L, end = (all.end - block.before) / L;
    const auto both = [&](const WholeRows<S>& rows, const Turned<S>& of_kept,
                          const Turned<S>& of_window, S* to) {
      multiply_turned(rows(query), rows.stride, height, of_kept, 0, kept, to, row_);
      multiply_turned(rows(query), rows.stride, height, of_window, begin, end, to + all.begin,
                      row_);
    };
    both(w.query_rows, w.kept_keys, w.keys, w.weights + tile * row_);
    both(w.output_rows, w.kept_values, w.values, w.grad + tile * row_);
  }

  // Makes weights and the gradients of products of the row of a query; zero where it attends nothing.
  void weigh(const Sequence& w, const Block& block, int64_t q, const Columns<S>& all) const {
    S *weights = w.weights + q * row_, *grad = w.grad + q * row_;
    const Vec<S> row = splat(static_cast<S>(q)), nothing = splat(-static_cast<S>(__builtin_inff()));
    const auto each = [&](const auto& f) {
      const auto part = [&](int64_t begin, int64_t end) {
        for (int64_t v = begin; v < end; v += L)
          f(weights + v, grad + v, (load(w.since + v) <= row) & (row <= load(w.until + v)));
      };
      part(0, block.kept);
      part(all.begin, all.end);
    };
    Vec<S> highest = nothing;
    each([&](S* p, S*, auto own) {
      const Vec<S> x = own ? load(p) * in_.scale : nothing;
      store(p, x);
      highest = x > highest ? x : highest;
    });
    const S top = highest_lane<S>(highest);
    Vec<S> sums{}, means{};
    each([&](S* p, S* dp, auto own) {
      const Vec<S> e = own ? exp_nonpositive<S>(load(p) - splat(top)) : Vec<S>{};
      store(p, e);
      sums += e;
      means += own ? e * load(dp) : Vec<S>{};
    });
    const S factor = S(1) / sum_of_lanes<S>(sums), mean = sum_of_lanes<S>(means) * factor;
    each([&](S* p, S* dp, auto own) {
      const Vec<S> weight = load(p) * factor;
      store(p, own ? weight : Vec<S>{});
      store(dp, own ? weight * (load(dp) - splat(mean)) * in_.scale : Vec<S>{});
    });
    const int64_t begin = (block.begin + block.before) / L * L;
    for (int64_t v = begin; v < round_up(block.end + block.before, L); v += L)
      if (v < all.begin || v >= all.end) {
        store(weights + v, Vec<S>{});
        store(grad + v, Vec<S>{});
      }
  }

  // Gradients of queries: sums over keys.
  void sum_keys(const Sequence& w, const Block& block, int64_t tile, int64_t height,
                int64_t left) const {
    const int64_t begin = left + block.before;
    const int64_t end = shape_.screening.P + block.first + tile + height + block.before;
    S* to[kRegisterRows];
    for (int64_t q = 0; q < height; ++q) to[q] = w.grad_query(block.first + tile + q);
    const auto add = [&](int64_t q, int64_t rows, int64_t from, int64_t until, bool begun) {
      sum_rows<S>({w.grad + (tile + q) * row_, row_, 1, w.rows, from, until, 0, to + q, begun},
                  rows, divide_up(shape_.D, L));
    };
    if (block.finite) {
      add(0, height, 0, block.kept, false);
      add(0, height, begin, end, true);
      return;
    }
    for (int64_t q = 0; q < height; ++q) {  // one key after the other
      const S row = static_cast<S>(tile + q);
      add(q, 1, 0, 0, false);
      const auto add_own = [&](int64_t from, int64_t until) {
        for (int64_t c = from; c < until; ++c)
          if (w.since[c] <= row && row <= w.until[c]) add(q, 1, c, c + 1, true);
      };
      add_own(0, block.kept);
      add_own(begin, end);
    }
  }

  // Gradients of the keys and values of some columns: sums over queries.
  void sum_queries(const Sequence& w, const Block& block, int64_t begin, int64_t end) const {
    const S *queries[kQueries], *outputs[kQueries];
    for (int64_t q = 0; q < block.count; ++q) {
      queries[q] = w.query_rows(block.first + q);
      outputs[q] = w.output_rows(block.first + q);
    }
    const auto add = [&](int64_t column, int64_t height) {
      const int64_t since = static_cast<int64_t>(w.since[column]);
      int64_t until = 0;
      for (int64_t c = column; c < column + height; ++c)
        until = most(until, least(static_cast<int64_t>(w.until[c]) + 1, block.count));
      if (until <= since) return;
      sum_rows<S>(
          {w.weights + column, 1, row_, outputs, since, until, 0, w.grad_values + column, true},
          height, divide_up(shape_.Dv, L));
      sum_rows<S>({w.grad + column, 1, row_, queries, since, until, 0, w.grad_keys + column, true},
                  height, divide_up(shape_.D, L));
    };
    if (block.finite) {
      for_row_tiles(begin, end, add);
    } else {
      for (int64_t c = begin; c < end; ++c) add(c, 1);
    }
  }

  const RelevancyBackward<S>& p_;
  const RelevancyInput<S>& in_;
  const RelevancyShape shape_;
  const SequenceSchedule schedule_;
  const BlockShape<S> block_;
  const int64_t row_;  // columns of a block
  Scratch scratch_;
  Span<S> keys_, values_, kept_keys_, kept_values_, query_rows_, key_rows_, output_rows_,
      grad_query_, grad_key_, grad_value_, weights_, grad_, since_, until_;
  Span<int64_t> ended_, next_, retained_, turned_;
  Span<const S*> rows_;
  Span<S*> grad_keys_, grad_values_;
  Span<Barrier> barriers_;
};

}  // namespace
}  // namespace throughtime
