// RelLSTM backward on a CPU.
//
// From the last step to the first, with ds_{t+1} known:
//
//   do_t = ds_{t+1} / 2        dh_t = dy_t + ds_{t+1} / 2, the latter unless step t+1 is detached
//   attention (relevancy/cpu/backward.h): dq_t, and to every candidate j its part of du_j, dh_j
//   no later query attends key t, so du_t is whole:   dh_t += du_t U_a + (what attention gave h_t)
//   cell: da_t before the nonlinearities, dc_{t-1}    ds_t = [da_t, dq_t] [W_hh; V_a]
//   [dW_hh; dV_a] = sum [da, dq]^T s      dW_ih, db = sum da^T [x, 1]      dU_a = sum du^T h
//
// du_j and dh_j of a key lie in a slot (candidates.h). Weight gradients are summed over chunks of rows per
// group, then over groups (weight_sums.h): bit-equal for every number of threads.
//
// The phases of a step, with a barrier between them, for the members of a team:
//
//   scores     own part of the candidates: scores, and do . h_j
//   attention  softmax; own units of dh_j; own attention units of dq, du_j, dw
//   cells      own units: dh_t whole, da_t, dc_{t-1}; a trace keeps dh_t and dc_t of every n-th step
//   states     own units: ds_t
//
// The first two take as many rows at a time as there are members.
#pragma once

#include "rel_lstm/cpu/candidates.h"
#include "rel_lstm/cpu/weight_sums.h"
#include "relevancy/cpu/scores.h"

namespace throughtime {
namespace {

// Operand is the type of the gradients and weights in products, X what x, y and their gradients have in
// memory; all else is S.
template <typename S, typename Operand = S>
class RelLstmBackwardPass {
  using X = GivenAs<Operand>;
  using Cell = LstmCell<S>;
  static constexpr int64_t L = kLanes<S>;

 public:
  RelLstmBackwardPass(const RelLstmBackward<X>& args, const Runtime& runtime)
      : p_(args),
        in_(args.in),
        shape_(args.in.shape),
        screen_(args.in.shape.screening),
        at_(shape_),
        plan_(plan_rel_lstm(shape_, sizeof(Operand))),
        schedule_(schedule_rel_lstm(shape_, plan_, runtime.threads, L)),
        blocks_(at_.units / L),
        width_(panel_width(blocks_, schedule_.members)),
        most_rows_(divide_up(shape_.B, plan_.groups)),
        together_(least(most_rows_, schedule_.members)),
        candidates_(args, at_),
        most_(candidates_.most_numbers()),
        rows_(least(plan_.chunk_rows, times(screen_.T, most_rows_))),
        ld_da_(round_up(at_.stacked, Numbers<Operand>::kDepth)),
        ld_sx_(at_.units + at_.inputs),
        ld_keys_(leading_dimension<Operand>(at_.units + at_.attention)),
        scratch_(runtime),
        sums_(args, at_, plan_, schedule_, most(rows_, most_rows_), &scratch_) {
    const auto per_row = [&](auto number, int64_t count) {
      return scratch_.template reserve<decltype(number)>(schedule_.teams, most_rows_, count);
    };
    const auto operands = [&](int64_t columns) {
      return scratch_.template reserve<Operand>(
          schedule_.teams, most(rows_, most_rows_) + Tiling<Operand>::kPadding - 1, columns);
    };
    const auto per_worker = [&](int64_t count) {
      return scratch_.template reserve<S>(schedule_.workers(), count);
    };
    stacked_ = scratch_.template reserve<Operand>(Panels<Operand>::numbers(at_.stacked, blocks_));
    key_ = scratch_.template reserve<Operand>(Panels<Operand>::numbers(shape_.A, blocks_));
    inputs_ = scratch_.template reserve<Operand>(
        p_.dx ? Panels<Operand>::numbers(at_.gates, divide_up(shape_.I, L)) : 0);
    score_ = scratch_.template reserve<S>(at_.attention);
    da_ = operands(ld_da_);
    sx_ = operands(ld_sx_);
    keys_ = operands(ld_keys_);
    context_ = per_row(S(), at_.units);
    // What has columns of its own lies apart: prefetching would take lines from another worker.
    const auto own = [&](auto number, int64_t count) {
      return scratch_.template reserve<decltype(number)>(schedule_.workers(), most_rows_, count);
    };
    dh_ = own(S(), at_.units);
    ds_ = own(S(), at_.units);
    direct_ = own(S(), at_.units);
    dc_ = own(S(), at_.units);
    dq_ = own(S(), at_.attention);
    weights_ = per_worker(most_);
    grad_ = per_worker(most_);
    query_ = per_worker(score().query_numbers());
    tanh_ = per_worker(times(candidates_.slots(), at_.attention));
    const auto together = [&](int64_t count) {
      return scratch_.template reserve<S>(schedule_.teams, together_, count);
    };
    scores_ = together(most_);
    products_ = together(most_);
    lost_score_ = scratch_.template reserve<S>(schedule_.teams, at_.attention);
    candidates_.reserve(schedule_.workers(), most_rows_, &scratch_);
    barriers_ = scratch_.template reserve<Barrier>(schedule_.teams + 1);
  }

  void run(const Runtime& runtime) {
    scratch_.allocate();
    run_workers(runtime, schedule_, barriers_(), *this);
  }

  int64_t blocks() const { return at_.stacked; }

  void prepare(Share blocks) {
    const auto own = [&](const Panels<Operand>& panels) {
      return blocks.of(panels.count(), this->blocks());
    };
    pack_rows(stacked(), shape_.H, own(stacked()),
              [&](int64_t n) { return at_.stacked_row(in_, n); });
    pack_rows(key(), shape_.H, own(key()),
              [&](int64_t n) { return in_.weight_key + n * shape_.H; });
    if (p_.dx)
      pack_rows(inputs(), shape_.I, own(inputs()),
                [&](int64_t n) { return at_.gate_row(in_.weight_ih, shape_.I, n); });
    if (blocks.begin > 0 || blocks.end == 0) return;  // for one worker
    load_row(score_(), in_.weight_score, shape_.A, at_.attention);
  }

  void walk(const Member& member) {
    for (int64_t group = member.team; group < plan_.groups; group += schedule_.teams)
      walk_group(member, group, Share(shape_.B, group, plan_.groups));
  }

  // Adds up the groups and puts the sums into PyTorch's order.
  void finish(Share rows) { sums_.finish(rows); }

 private:
  struct Group {
    const Member& member;
    int64_t group, row0, rows;
    Share panels, blocks;     // own panels of units, and their blocks
    Share attention;          // own blocks of attention units
    Share inputs;             // own panels of inputs
    Share own;                // own rows
    Operand *da, *sx, *keys;  // [chunk, ld]
    S* context;               // [rows, units]
    S *scores, *products;     // of the rows that are taken together
    S* lost_score;            // by rounding the sum of the score's gradients
    // The member's own, of which it uses its own columns.
    int64_t worker;
    S *dh, *ds, *direct, *dc;  // [rows, units]
    S* dq;                     // [rows, attention]
    S *weights, *grad, *query, *tanh;
    Stopwatch* watch;
  };

  Panels<Operand> stacked() const { return {stacked_(), at_.stacked, blocks_, width_}; }
  Panels<Operand> key() const { return {key_(), shape_.A, blocks_, width_}; }
  Panels<Operand> inputs() const { return {inputs_(), at_.gates, divide_up(shape_.I, L)}; }

  ScoreAdditive<S> score() const { return {at_.attention, score_()}; }

  const S* step_row(int64_t t, int64_t row) const {
    return p_.saved + screen_.positions() * shape_.B * at_.key + (t * shape_.B + row) * at_.step;
  }

  // f(unit) for the first units of the vectors of own blocks.
  template <typename F>
  TT_INLINE void for_units(const Group& w, const F& f) const {
    for (int64_t k = w.blocks.begin * L; k < w.blocks.end * L; k += L) f(k);
  }

  void walk_group(const Member& member, int64_t group, Share rows) {
    const int64_t team = member.team, count = rows.end - rows.begin;
    const int64_t worker = team * schedule_.members + member.begin;
    const auto own = [&](int64_t all) {
      return Share(all, member.begin, member.end, schedule_.members);
    };
    const Group w{
        .member = member,
        .group = group,
        .row0 = rows.begin,
        .rows = count,
        .panels = own(stacked().count()),
        .blocks = member_blocks(blocks_, width_, member.begin, member.end, schedule_.members),
        .attention = own(at_.attention / L),
        .inputs = own(inputs().count()),
        .own = own(count),
        .da = da_(team),
        .sx = sx_(team),
        .keys = keys_(team),
        .context = context_(team),
        .scores = scores_(team),
        .products = products_(team),
        .lost_score = lost_score_(team),
        .worker = worker,
        .dh = dh_(worker),
        .ds = ds_(worker),
        .direct = direct_(worker),
        .dc = dc_(worker),
        .dq = dq_(worker),
        .weights = weights_(worker),
        .grad = grad_(worker),
        .query = query_(worker),
        .tanh = tanh_(worker),
        .watch = member.watch};
    begin(w);
    int64_t active = 0, filled = 0;
    for (int64_t t = screen_.T - 1; t >= 0; --t) {
      for (; active < w.rows && in_.length(w.row0 + active) > t; ++active) enter(w, active);
      if (active == 0) continue;
      {
        const Timing timing(w.watch, kScreening);
        for (int64_t row = 0; row < active; ++row)
          candidates_.list(w.worker, row, w.row0 + row, t, w.blocks, w.attention);
      }
      member.wait();
      if (filled + active > rows_) {
        add_weights(w, filled);
        filled = 0;
      }
      retreat(w, t, active, filled);
      filled += active;
    }
    member.wait();
    add_weights(w, filled);
    for (int64_t row = 0; row < w.rows; ++row) leave(w, row, row < active);
    for (int64_t j = 0; j < screen_.P; ++j) leave_memory(w, j);
    member.wait();
  }

  void begin(const Group& w) {
    const int64_t members = schedule_.members;
    for (int64_t row = 0; row < w.rows; ++row) candidates_.begin(w.worker, row, w.row0 + row);
    sums_.clear(w.member, w.group);
    clear_operands(w.lost_score, at_.attention / L, L, w.member, members);
    // A product of the chunk's last rows reads a whole tile of them.
    const int64_t rows = most(rows_, w.rows) + Tiling<Operand>::kPadding - 1;
    clear_operands(w.da, rows, ld_da_, w.member, members);
    clear_operands(w.sx, rows, ld_sx_, w.member, members);
    clear_operands(w.keys, rows, ld_keys_, w.member, members);
    w.member.wait();
  }

  // The last step of a row gets the gradients of the final state.
  void enter(const Group& w, int64_t row) {
    const int64_t from = in_.order[w.row0 + row] * shape_.H, to = row * at_.units;
    for_units(w, [&](int64_t k) {
      const auto load_or_zero = [&](S* into, const S* grad) {
        store(into + to + k, grad ? load_part(grad + from + k, shape_.H - k) : Vec<S>{});
      };
      load_or_zero(w.direct, p_.dh_n);
      load_or_zero(w.dc, p_.dc_n);
      load_or_zero(w.context, p_.dcontext_n);
    });
  }

  void retreat(const Group& w, int64_t t, int64_t active, int64_t filled) {
    for (int64_t first = 0; first < active; first += together_) {
      const int64_t rows = least(together_, active - first);
      scores(w, t, first, rows);
      w.member.wait();
      for (int64_t row = first; row < first + rows; ++row)
        attention(w, t, row, row - first, filled + row);
      if (first + rows < active) w.member.wait();
    }
    w.member.wait();
    cells(w, t, active, filled);
    w.member.wait();
    states(w, t, active, filled);
  }

  // Asks for what the step before t is the first to read; the caches have lost it since the forward
  // pass. Inline, or GCC drops the call: a function that only prefetches does nothing.
  TT_INLINE void read_ahead(int64_t t, int64_t row) const {
    const int64_t position = screen_.P + t - screen_.window_size;
    if (t > 0) prefetch_row(step_row(t - 1, row), at_.step);
    if (t > 0 && position >= 0) prefetch_row(candidates_.key_row(position, row), at_.key);
  }

  // Scores of own candidates, and the gradients of their weights.
  void scores(const Group& w, int64_t t, int64_t first, int64_t rows) {
    const Timing timing(w.watch, kScores);
    const auto candidates = [&](int64_t row) -> const RowCandidates<S>& {
      return candidates_.of(w.worker, first + row);
    };
    const auto count = [&](int64_t row) { return candidates(row).count; };
    for_own_candidates<S>(
        w.member, schedule_.members, rows, count, [&](int64_t n, int64_t begin, int64_t end) {
          const int64_t row = first + n, at = w.row0 + row;
          if (begin == 0) read_ahead(t, at);
          const S* query = score().query(step_row(t, at) + 6 * at_.units, w.query);
          score().scores(query, candidates(n).keys + begin, end - begin,
                         w.scores + n * most_ + begin, alone() ? w.tanh : nullptr);
          dot_products(w.context + row * at_.units, at_.units, candidates(n).hidden + begin,
                       end - begin, w.products + n * most_ + begin);
        });
  }

  // Own columns of what one query gives its candidates, of dq, and of key t, which is whole then. `n`:
  // its place among the rows that are taken together; `place`: in the chunk.
  void attention(const Group& w, int64_t t, int64_t row, int64_t n, int64_t place) {
    Timing timing(w.watch, kScores);
    const auto& [hidden, keys, dhidden, dkeys, count] = candidates_.of(w.worker, row);
    const int64_t units = at_.units;
    std::memcpy(w.weights, w.scores + n * most_, padded<S>(count) * sizeof(S));
    std::memcpy(w.grad, w.products + n * most_, padded<S>(count) * sizeof(S));
    softmax(w.weights, count);
    softmax_gradient(w.weights, w.grad, count);
    timing.turn(kSums);
    add_to_rows(w.weights, S(1), w.context + row * units, w.blocks.begin * L, w.blocks.end * L,
                dhidden, count);
    timing.turn(kScores);
    S* dq = w.dq + row * at_.attention;
    const int64_t begin = w.attention.begin * L, end = w.attention.end * L;
    if (!alone()) {  // others have made the scores of some candidates
      const S* query = score().query(step_row(t, w.row0 + row) + 6 * units, w.query);
      score().keep(begin, end, query, keys, count, w.tanh);
    }
    std::memset(dq + begin, 0, (end - begin) * sizeof(S));
    score().gradients_of(begin, end, w.tanh, count, w.grad,
                         {dq, dkeys, sums_.score(w.group), w.lost_score});
    timing.turn(kGather);
    Operand* key = w.keys + place * ld_keys_;
    const S* h = candidates_.key_row(screen_.P + t, w.row0 + row);
    for_units(w, [&](int64_t k) {
      store(w.dh + row * units + k, load(dhidden[count - 1] + k));
      put(key, k, load(h + k), shape_.H - k);
    });
    for (int64_t k = begin; k < end; k += L) {
      put(key + units, k, load(dkeys[count - 1] + k), shape_.A - k);
      put(w.da + place * ld_da_ + at_.gates, k, load(dq + k), shape_.A - k);
    }
  }

  TT_INLINE static void put(Operand* row, int64_t column, Vec<S> v, int64_t count) {
    Numbers<Operand>::put_part(row, column, v, count);
  }

  bool alone() const { return schedule_.members == 1; }

  // dh += du U_a in own units.
  void add_key_gradients(const Group& w, const Operand* keys, int64_t rows) {
    const Timing timing(w.watch, kRecurrent);
    for (int64_t q = w.panels.begin; q < w.panels.end; ++q)
      multiply_panel<Operand>({keys + at_.units, ld_keys_, shape_.A}, rows, key(), q,
                              {w.dh + q * width_ * L, at_.units, true});
  }

  void cells(const Group& w, int64_t t, int64_t active, int64_t filled) {
    add_key_gradients(w, w.keys + filled * ld_keys_, active);
    const Timing timing(w.watch, kPointwise);
    const int64_t n = at_.units;
    const bool traces = p_.trace.keeps(screen_.T - 1 - t);
    for (int64_t row = 0; row < active; ++row) {
      const int64_t at = w.row0 + row, sample = in_.order[at];
      const int64_t traced = (p_.trace.place(t) * shape_.B + sample) * shape_.H;
      const S* saved = step_row(t, at);
      const S* c_before = t > 0 ? step_row(t - 1, at) + 4 * n : p_.c0 + sample * shape_.H;
      const X* dy = p_.dy ? p_.dy + t * p_.dy_stride_t + sample * p_.dy_stride_b : nullptr;
      Operand* da = w.da + (filled + row) * ld_da_;
      for_units(w, [&](int64_t k) {
        const int64_t part = shape_.H - k;
        Vec<S> kept[Cell::kSaved], gates[Cell::kGates], dc = load(w.dc + row * n + k);
        load_vectors<Cell::kSaved>(saved + k, n, kept);
        Vec<S> d = load(w.dh + row * n + k) + load(w.direct + row * n + k);
        if (dy) d += Numbers<X>::vector_part(dy + k, part);
        const Vec<S> before = t > 0 ? load(c_before + k) : load_part(c_before + k, part);
        Cell::retreat(kept, before, d, &dc, gates);
        if (traces) {
          store_part(p_.trace.h + traced + k, d, part);
          store_part(p_.trace.c + traced + k, dc, part);
        }
        store(w.dc + row * n + k, Cell::hand_on(kept, dc));
        for (int gate = 0; gate < Cell::kGates; ++gate) put(da + gate * n, k, gates[gate], part);
      });
    }
  }

  void states(const Group& w, int64_t t, int64_t active, int64_t filled) {
    const int64_t n = at_.units;
    const Operand* da = w.da + filled * ld_da_;
    Timing timing(w.watch, kRecurrent);
    for (int64_t q = w.panels.begin; q < w.panels.end; ++q)
      multiply_panel<Operand>({da, ld_da_, at_.stacked}, active, stacked(), q,
                              {w.ds + q * width_ * L, n});
    timing.turn(kGather);
    for (int64_t row = 0; row < active; ++row) {
      const bool detached = p_.detaches(t, w.row0 + row);
      for_units(w, [&](int64_t k) {
        const Vec<S> half = S(0.5) * load(w.ds + row * n + k);
        store(w.context + row * n + k, half);
        store(w.direct + row * n + k, detached ? Vec<S>{} : half);
      });
    }
    for (int64_t row = 0; row < active; ++row) candidates_.give_back(w.worker, row, screen_.P + t);
    for (int64_t row = w.own.begin; row < least(w.own.end, active); ++row)
      gather(t, w.row0 + row, w.sx + (filled + row) * ld_sx_);
    timing.turn(kInputGradients);
    if (p_.dx) input_gradients(w, t, active, da);
  }

  // [s, x, 1] of one row.
  void gather(int64_t t, int64_t at, Operand* to) {
    if (!sums_.wanted()) return;
    const S* s = step_row(t, at) + 5 * at_.units;
    for (int64_t k = 0; k < at_.units; k += L) put(to, k, load(s + k), shape_.H - k);
    to += at_.units;
    copy_row(to, in_.x + t * in_.x_stride_t + in_.order[at] * in_.x_stride_b, shape_.I);
    to[shape_.I] = Numbers<Operand>::one();
  }

  void input_gradients(const Group& w, int64_t t, int64_t active, const Operand* da) {
    constexpr int64_t kTileRows = Tiling<Operand>::kRows;
    for (int64_t q = w.inputs.begin; q < w.inputs.end; ++q) {
      const int64_t vectors = inputs().width_of(q), column = q * kPanelVectors * L;
      for_product_rows<Operand>(0, active, [&](int64_t row, int64_t height) {
        TileBuffer<S, kTileRows> dx;
        product<Operand>({da + row * ld_da_, ld_da_, at_.gates}, inputs(), q, height,
                         {.at = dx.numbers, .row_stride = vectors * L, .whole = true});
        for (int64_t r = 0; r < height; ++r)
          for (int64_t v = 0; v < vectors; ++v)
            Numbers<X>::put_part(p_.dx + (t * shape_.B + in_.order[w.row0 + row + r]) * shape_.I,
                                 column + v * L, load(dx.numbers + (r * vectors + v) * L),
                                 shape_.I - column - v * L);
      });
    }
  }

  // Adds the products of the rows collected so far to the group's own sums.
  void add_weights(const Group& w, int64_t rows) {
    if (!sums_.wanted()) return;
    const Timing timing(w.watch, kWeights);
    sums_.add(w.member, w.group, w.da, ld_da_, w.sx, ld_sx_, rows);
    sums_.add_keys(w.member, w.group, w.keys, ld_keys_, rows);
  }

  // What is left before the first step goes to the initial state; a row without any step hands
  // its gradients straight through.
  void leave(const Group& w, int64_t row, bool walked) {
    if (!walked) enter(w, row);
    const int64_t to = in_.order[w.row0 + row] * shape_.H, from = row * at_.units;
    for_units(w, [&](int64_t k) {
      const int64_t part = shape_.H - k;
      store_part(p_.dh0 + to + k, load(w.direct + from + k), part);
      store_part(p_.dc0 + to + k, load(w.dc + from + k), part);
      store_part(p_.dcontext0 + to + k, load(w.context + from + k), part);
    });
  }

  // Gradients of the hidden states of an earlier call, at one position.
  void leave_memory(const Group& w, int64_t position) {
    const int64_t n = at_.units;
    w.member.wait();  // for others that are still at the position before
    for (int64_t row = 0; row < w.rows; ++row) {
      const S* from = candidates_.slot_of(w.worker, row, position);
      const S* h = from ? candidates_.key_row(position, w.row0 + row) : nullptr;
      const auto at = [&](const S* numbers, int64_t k) {
        return numbers ? load(numbers + k) : Vec<S>{};
      };
      Operand* key = w.keys + row * ld_keys_;
      for_units(w, [&](int64_t k) {
        store(w.dh + row * n + k, at(from, k));
        put(key, k, at(h, k), shape_.H - k);
      });
      for (int64_t k = w.attention.begin * L; k < w.attention.end * L; k += L)
        put(key + n, k, at(from, n + k), shape_.A - k);
    }
    w.member.wait();
    add_key_gradients(w, w.keys, w.rows);
    for (int64_t row = 0; row < w.rows; ++row)
      for_units(w, [&](int64_t k) {
        store_part(p_.dmemory + (position * shape_.B + in_.order[w.row0 + row]) * shape_.H + k,
                   load(w.dh + row * n + k), shape_.H - k);
      });
    if (sums_.wanted()) sums_.add_keys(w.member, w.group, w.keys, ld_keys_, w.rows);
  }

  const RelLstmBackward<X>& p_;
  const RelLstmInput<X>& in_;
  const RelLstmShape shape_;
  const ScreeningShape screen_;
  const RelLstmLayout<S> at_;
  const RelLstmPlan plan_;
  const WalkSchedule schedule_;
  const int64_t blocks_, width_, most_rows_;
  const int64_t together_;  // rows whose scores are in memory at a time
  RelLstmCandidates<X> candidates_;
  const int64_t most_;
  const int64_t rows_;  // of a chunk
  const int64_t ld_da_, ld_sx_, ld_keys_;
  Scratch scratch_;
  RelLstmWeightSums<S, Operand> sums_;
  Span<Operand> stacked_, key_, inputs_, da_, sx_, keys_;
  Span<S> score_, dh_, ds_, direct_, context_, dc_, dq_;
  Span<S> scores_, products_, lost_score_;
  Span<S> weights_, grad_, query_, tanh_;  // per worker
  Span<Barrier> barriers_;
};

}  // namespace
}  // namespace throughtime
