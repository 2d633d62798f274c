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
// du_j and dh_j of a key lie in a slot from the last query that attends it until its own step: as many
// slots as candidates. Weight gradients are summed over chunks of rows per group, then over groups:
// bit-equal for every number of threads.
#pragma once

#include "rel_lstm/cpu/weights.h"
#include "relevancy/cpu/scores.h"
#include "relevancy/cpu/screening.h"

namespace throughtime {
namespace {

// Slots for the gradients of the keys of one row that are attended.
struct Slots {
  int64_t* of;    // by position, -1 without
  int64_t* free;  // a stack
  int64_t free_count;
};

template <typename S>
class RelLstmBackwardPass {
  using Cell = LstmCell<S>;
  static constexpr int64_t L = kLanes<S>;

 public:
  RelLstmBackwardPass(const RelLstmBackward<S>& args, const Runtime& runtime)
      : p_(args),
        in_(args.in),
        shape_(args.in.shape),
        screen_(args.in.shape.screening),
        at_(shape_),
        plan_(plan_rel_lstm(shape_, sizeof(S))),
        schedule_(schedule_rel_lstm(shape_, plan_, runtime.threads)),
        most_rows_(divide_up(shape_.B, plan_.groups)),
        slots_(count_slots()),
        most_(padded<S>(slots_)),
        scratch_(runtime) {
    const auto per_team = [&](int64_t count) {
      return scratch_.template reserve<S>(schedule_.teams, count);
    };
    const auto per_group = [&](int64_t count) {
      return scratch_.template reserve<S>(p_.dweight_hh ? plan_.groups : 0, count);
    };
    stacked_ = scratch_.template reserve<S>(Panels<S>::numbers(at_.stacked, at_.units / L));
    key_ = scratch_.template reserve<S>(Panels<S>::numbers(shape_.A, at_.units / L));
    inputs_ = scratch_.template reserve<S>(
        p_.dx ? Panels<S>::numbers(at_.gates, divide_up(shape_.I, L)) : 0);
    score_ = scratch_.template reserve<S>(at_.attention);
    da_ = per_team(times(plan_.chunk_rows, at_.stacked));
    sx_ = per_team(times(plan_.chunk_rows, at_.units + at_.inputs));
    keys_ = per_team(times(plan_.chunk_rows, at_.key));
    dx_ = per_team(p_.dx ? times(most_rows_, at_.inputs) : 0);
    dh_ = per_team(times(most_rows_, at_.units));
    ds_ = per_team(times(most_rows_, at_.units));
    direct_ = per_team(times(most_rows_, at_.units));
    context_ = per_team(times(most_rows_, at_.units));
    dc_ = per_team(times(most_rows_, at_.units));
    c_0_ = per_team(at_.units);
    slot_ = per_team(times(most_rows_, slots_, at_.key));
    weights_ = per_team(most_);
    grad_ = per_team(most_);
    query_ = per_team(score().query_numbers());
    tanh_ = per_team(times(slots_, at_.attention));
    lost_score_ = per_team(at_.attention);
    sum_s_ = per_group(times(at_.stacked, at_.units));
    sum_x_ = per_group(times(at_.gates, at_.inputs));
    sum_key_ = per_group(times(at_.attention, at_.units));
    sum_score_ = scratch_.template reserve<S>(plan_.groups, at_.attention);
    const auto positions = [&](int64_t count) {
      return scratch_.template reserve<int64_t>(schedule_.teams, most_rows_, count);
    };
    ended_ = positions(screen_.T);
    next_ = positions(screen_.positions());
    kept_ = positions(screen_.positions());
    slot_of_ = positions(screen_.positions());
    free_ = positions(slots_);
    slots_of_row_ = scratch_.template reserve<Slots>(schedule_.teams, most_rows_);
    replay_ = scratch_.template reserve<Replay>(schedule_.teams, most_rows_);
    keys_of_ = scratch_.template reserve<const S*>(schedule_.teams, most_);
    hidden_of_ = scratch_.template reserve<const S*>(schedule_.teams, most_);
    dkeys_of_ = scratch_.template reserve<S*>(schedule_.teams, most_);
    dhidden_of_ = scratch_.template reserve<S*>(schedule_.teams, most_);
    barriers_ = scratch_.template reserve<Barrier>(schedule_.teams + 1);
  }

  void run(const Runtime& runtime) {
    scratch_.allocate();
    run_workers(runtime, schedule_, barriers_(), *this);
  }

  int64_t blocks() const { return at_.stacked; }

  void prepare(Share blocks) {
    const auto own = [&](const Panels<S>& panels) {
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
  void finish(Share rows) {
    if (!p_.dweight_hh) return;
    for (int64_t n = rows.begin; n < rows.end; ++n) {
      const int64_t q = n - at_.gates, unit = n % at_.units;
      if (n < at_.gates && unit < shape_.H) {
        const int64_t row = n / at_.units * shape_.H + unit;
        total(sum_s_(), at_.stacked, n, at_.units, shape_.H, p_.dweight_hh + row * shape_.H);
        total(sum_x_(), at_.gates, n, at_.inputs, shape_.I, p_.dweight_ih + row * shape_.I);
        total(sum_x_() + shape_.I, at_.gates, n, at_.inputs, 1, p_.dbias + row);
      } else if (q >= 0 && q < shape_.A) {
        total(sum_s_(), at_.stacked, n, at_.units, shape_.H, p_.dweight_query + q * shape_.H);
        total(sum_key_(), at_.attention, q, at_.units, shape_.H, p_.dweight_key + q * shape_.H);
        total(sum_score_() + q, 1, 0, at_.attention, 1, p_.dweight_score + q);
      }
    }
  }

 private:
  struct Group {
    int64_t team, group, row0, rows;
    Slots* slots;
    Replay* replay;
    S *da, *sx, *keys, *dx, *dh, *ds, *direct, *context, *dc, *slot, *weights, *grad, *query, *tanh;
    S* lost_score;  // by rounding the group's sum_score
    Stopwatch* watch;
  };

  Panels<S> stacked() const { return {stacked_(), at_.stacked, at_.units / L}; }
  Panels<S> key() const { return {key_(), shape_.A, at_.units / L}; }
  Panels<S> inputs() const { return {inputs_(), at_.gates, divide_up(shape_.I, L)}; }

  ScoreAdditive<S> score() const { return {at_.attention, score_()}; }

  int64_t count_slots() const {
    int64_t retained = 0;
    for (int64_t row = 0; row < shape_.B; ++row)
      retained = most(retained, retained_at_end(screen_, {in_.length(row)},
                                                {p_.last + in_.order[row], shape_.B}));
    return screen_.most_in_window() + retained + 1;
  }

  const S* key_row(int64_t position, int64_t row) const {
    return p_.saved + (position * shape_.B + row) * at_.key;
  }
  const S* step_row(int64_t t, int64_t row) const {
    return p_.saved + screen_.positions() * shape_.B * at_.key + (t * shape_.B + row) * at_.step;
  }

  void walk_group(const Member& member, int64_t group, Share rows) {
    const int64_t team = member.team;
    const int64_t first = team * most_rows_, chunk = team * plan_.chunk_rows, n = at_.units;
    const Group w{.team = team,
                  .group = group,
                  .row0 = rows.begin,
                  .rows = rows.end - rows.begin,
                  .slots = slots_of_row_() + first,
                  .replay = replay_() + first,
                  .da = da_() + chunk * at_.stacked,
                  .sx = sx_() + chunk * (n + at_.inputs),
                  .keys = keys_() + chunk * at_.key,
                  .dx = p_.dx ? dx_() + first * at_.inputs : nullptr,
                  .dh = dh_() + first * n,
                  .ds = ds_() + first * n,
                  .direct = direct_() + first * n,
                  .context = context_() + first * n,
                  .dc = dc_() + first * n,
                  .slot = slot_() + first * slots_ * at_.key,
                  .weights = weights_() + team * most_,
                  .grad = grad_() + team * most_,
                  .query = query_(team),
                  .tanh = tanh_() + team * slots_ * at_.attention,
                  .lost_score = lost_score_() + team * at_.attention,
                  .watch = member.watch};
    begin(w);
    int64_t active = 0, filled = 0;
    for (int64_t t = screen_.T - 1; t >= 0; --t) {
      for (; active < w.rows && in_.length(w.row0 + active) > t; ++active) enter(w, active);
      if (active == 0) continue;
      if (filled + active > plan_.chunk_rows) {
        add_weights(w, filled);
        filled = 0;
      }
      retreat(w, t, active, filled);
      filled += active;
    }
    add_weights(w, filled);
    for (int64_t row = 0; row < w.rows; ++row) leave(w, row, row < active);
    for (int64_t j = 0; j < screen_.P; ++j) leave_memory(w, j);
  }

  void begin(const Group& w) {
    const int64_t first = w.team * most_rows_;
    for (int64_t row = 0; row < w.rows; ++row) {
      const int64_t at = w.row0 + row, sample = in_.order[at];
      w.replay[row] = Replay(screen_, {in_.length(at)}, {p_.last + sample, shape_.B},
                             ended_() + (first + row) * screen_.T,
                             next_() + (first + row) * screen_.positions(),
                             kept_() + (first + row) * screen_.positions());
      w.slots[row] = {slot_of_() + (first + row) * screen_.positions(),
                      free_() + (first + row) * slots_, slots_};
      for (int64_t j = 0; j < screen_.positions(); ++j) w.slots[row].of[j] = -1;
      for (int64_t k = 0; k < slots_; ++k) w.slots[row].free[k] = k;
    }
    std::memset(sum_score_() + w.group * at_.attention, 0, at_.attention * sizeof(S));
    std::memset(w.lost_score, 0, at_.attention * sizeof(S));
    if (!p_.dweight_hh) return;
    const auto clear = [&](S* sums, int64_t size) {
      std::memset(sums + w.group * size, 0, size * sizeof(S));
    };
    clear(sum_s_(), at_.stacked * at_.units);
    clear(sum_x_(), at_.gates * at_.inputs);
    clear(sum_key_(), at_.attention * at_.units);
  }

  // The last step of a row gets the gradients of the final state.
  void enter(const Group& w, int64_t row) {
    const int64_t from = in_.order[w.row0 + row] * shape_.H, to = row * at_.units;
    const auto load_or_zero = [&](S* into, const S* grad) {
      load_row(into + to, grad ? grad + from : nullptr, shape_.H, at_.units);
    };
    load_or_zero(w.direct, p_.dh_n);
    load_or_zero(w.dc, p_.dc_n);
    load_or_zero(w.context, p_.dcontext_n);
  }

  void retreat(const Group& w, int64_t t, int64_t active, int64_t filled) {
    const int64_t n = at_.units;
    Timing timing(w.watch, kGather);
    S* da = w.da + filled * at_.stacked;
    S* keys = w.keys + filled * at_.key;
    for (int64_t row = 0; row < active; ++row) {
      read_ahead(t, w.row0 + row);
      attend(w, t, row, da + row * at_.stacked + at_.gates);
      take_slot(w, screen_.P + t, row, w.dh + row * n, keys + row * at_.key);
    }
    timing.turn(kRecurrent);
    multiply<S>({keys + n, at_.key, shape_.A}, active, key(), {w.dh, n, true});
    timing.turn(kPointwise);
    for (int64_t row = 0; row < active; ++row) cells(w, t, row, da + row * at_.stacked);
    timing.turn(kRecurrent);
    multiply<S>({da, at_.stacked, at_.stacked}, active, stacked(), {w.ds, n});
    timing.turn(kGather);
    for (int64_t row = 0; row < active; ++row) {
      const bool detached = p_.detaches(t, w.row0 + row);
      for (int64_t k = row * n; k < (row + 1) * n; k += L) {
        const Vec<S> half = S(0.5) * load(w.ds + k);
        store(w.context + k, half);
        store(w.direct + k, detached ? Vec<S>{} : half);
      }
      gather(t, w.row0 + row, w.sx + (filled + row) * (n + at_.inputs));
    }
    timing.turn(kInputGradients);
    if (p_.dx) input_gradients(w, t, active, da);
  }

  // Asks for what the step before t is the first to read; the caches have lost it since the forward
  // pass. Inline, or GCC drops the call: a function that only prefetches does nothing.
  TT_INLINE void read_ahead(int64_t t, int64_t row) const {
    const int64_t position = screen_.P + t - screen_.window_size;
    if (t > 0) prefetch_row(step_row(t - 1, row), at_.step);
    if (t > 0 && position >= 0) prefetch_row(key_row(position, row), at_.key);
  }

  // Gradients of one query: dq, and the parts of its candidates' gradients, in their slots.
  void attend(const Group& w, int64_t t, int64_t row, S* dq) {
    Timing timing(w.watch, kScreening);
    const int64_t n = at_.units, at = w.row0 + row;
    const int64_t first = w.team * most_;
    const S** keys = keys_of_() + first;
    const S** hidden = hidden_of_() + first;
    S** dkeys = dkeys_of_() + first;
    S** dhidden = dhidden_of_() + first;
    const Candidates& candidates = w.replay[row].candidates(t);
    const int64_t count = candidates.count();
    candidates.each([&](int64_t c, int64_t position) {
      hidden[c] = key_row(position, at);
      keys[c] = hidden[c] + n;
      dhidden[c] = slot_of(w, position, row);
      dkeys[c] = dhidden[c] + n;
    });
    const S* q = step_row(t, at) + 6 * n;
    const S* grad_context = w.context + row * n;
    timing.turn(kScores);
    const S* query = score().query(q, w.query);
    score().scores(query, keys, count, w.weights, w.tanh);
    softmax(w.weights, count);
    dot_products(grad_context, n, hidden, count, w.grad);
    softmax_gradient(w.weights, w.grad, count);
    timing.turn(kSums);
    add_to_rows(w.weights, S(1), grad_context, n, dhidden, count);
    timing.turn(kScores);
    std::memset(dq, 0, at_.attention * sizeof(S));
    score().gradients(query, keys, w.tanh, count, w.grad,
                      {dq, dkeys, sum_score_() + w.group * at_.attention, w.lost_score});
  }

  // The slot of a key, cleared when the key first needs one.
  S* slot_of(const Group& w, int64_t position, int64_t row) {
    Slots& slots = w.slots[row];
    int64_t slot = slots.of[position];
    S* base = w.slot + row * slots_ * at_.key;
    if (slot < 0) {
      slot = slots.of[position] = slots.free[--slots.free_count];
      std::memset(base + slot * at_.key, 0, at_.key * sizeof(S));
    }
    return base + slot * at_.key;
  }

  // Gives a key's slot back: dh of attention, and [h, du] for the weight gradient.
  void take_slot(const Group& w, int64_t position, int64_t row, S* dh, S* h_du) {
    Slots& slots = w.slots[row];
    const int64_t slot = slots.of[position], n = at_.units;
    const S* from = w.slot + (row * slots_ + slot) * at_.key;
    std::memcpy(dh, from, n * sizeof(S));
    std::memcpy(h_du, key_row(position, w.row0 + row), n * sizeof(S));
    std::memcpy(h_du + n, from + n, at_.attention * sizeof(S));
    slots.free[slots.free_count++] = slot;
  }

  void cells(const Group& w, int64_t t, int64_t row, S* da) {
    const int64_t n = at_.units, at = w.row0 + row, sample = in_.order[at];
    const S* saved = step_row(t, at);
    const S* c_before = t > 0 ? step_row(t - 1, at) + 4 * n : c_0_() + w.team * n;
    if (t == 0) load_row(c_0_() + w.team * n, p_.c0 + sample * shape_.H, shape_.H, n);
    const S* dy = p_.dy ? p_.dy + t * p_.dy_stride_t + sample * p_.dy_stride_b : nullptr;
    const S* direct = w.direct + row * n;
    const S* dh = w.dh + row * n;
    S* carried = w.dc + row * n;
    for (int64_t k = 0; k < n; k += L) {
      Vec<S> kept[Cell::kSaved], gates[Cell::kGates], dc = load(carried + k);
      load_vectors<Cell::kSaved>(saved + k, n, kept);
      Vec<S> d = load(dh + k) + load(direct + k);
      if (dy) d += load_part(dy + k, shape_.H - k);
      Cell::retreat(kept, load(c_before + k), d, &dc, gates);
      store(carried + k, dc);
      store_vectors<Cell::kGates>(da + k, n, gates);
    }
    for (int gate = 0; gate < Cell::kGates; ++gate) clear_padding(da + gate * n, shape_.H, n);
  }

  // [s, x, 1] of one row.
  void gather(int64_t t, int64_t at, S* to) {
    if (!p_.dweight_hh) return;
    std::memcpy(to, step_row(t, at) + 5 * at_.units, at_.units * sizeof(S));
    to += at_.units;
    load_row(to, in_.x + t * in_.x_stride_t + in_.order[at] * in_.x_stride_b, shape_.I, at_.inputs);
    to[shape_.I] = 1;
  }

  void input_gradients(const Group& w, int64_t t, int64_t active, const S* da) {
    multiply<S>({da, at_.stacked, at_.gates}, active, inputs(), {w.dx, at_.inputs});
    for (int64_t row = 0; row < active; ++row)
      store_row(p_.dx + (t * shape_.B + in_.order[w.row0 + row]) * shape_.I,
                w.dx + row * at_.inputs, shape_.I);
  }

  // Adds the products of the rows collected so far to the group's own sums.
  void add_weights(const Group& w, int64_t rows) {
    if (!p_.dweight_hh) return;
    const Timing timing(w.watch, kWeights);
    const int64_t n = at_.units, ld = n + at_.inputs;
    add_outer_products<S>(w.da, at_.stacked, at_.stacked, w.sx, ld, n / L, rows,
                          sum_s_() + w.group * at_.stacked * n, n);
    add_outer_products<S>(w.da, at_.stacked, at_.gates, w.sx + n, ld, at_.inputs / L, rows,
                          sum_x_() + w.group * at_.gates * at_.inputs, at_.inputs);
    add_key_weights(w, rows);
  }

  void add_key_weights(const Group& w, int64_t rows) {
    const int64_t n = at_.units;
    add_outer_products<S>(w.keys + n, at_.key, at_.attention, w.keys, at_.key, n / L, rows,
                          sum_key_() + w.group * at_.attention * n, n);
  }

  // What is left before the first step goes to the initial state; a row without any step hands
  // its gradients straight through.
  void leave(const Group& w, int64_t row, bool walked) {
    if (!walked) enter(w, row);
    const int64_t to = in_.order[w.row0 + row] * shape_.H, from = row * at_.units;
    store_row(p_.dh0 + to, w.direct + from, shape_.H);
    store_row(p_.dc0 + to, w.dc + from, shape_.H);
    store_row(p_.dcontext0 + to, w.context + from, shape_.H);
  }

  // Gradients of the hidden states of an earlier call, at one position.
  void leave_memory(const Group& w, int64_t position) {
    const int64_t n = at_.units;
    for (int64_t row = 0; row < w.rows; ++row) {
      if (w.slots[row].of[position] >= 0) {
        take_slot(w, position, row, w.dh + row * n, w.keys + row * at_.key);
      } else {
        std::memset(w.dh + row * n, 0, n * sizeof(S));
        std::memset(w.keys + row * at_.key, 0, at_.key * sizeof(S));
      }
    }
    multiply<S>({w.keys + n, at_.key, shape_.A}, w.rows, key(), {w.dh, n, true});
    for (int64_t row = 0; row < w.rows; ++row)
      store_row(p_.dmemory + (position * shape_.B + in_.order[w.row0 + row]) * shape_.H,
                w.dh + row * n, shape_.H);
    if (p_.dweight_hh) add_key_weights(w, w.rows);
  }

  // to [count] = row n of the sums [groups][rows][columns], added over the groups.
  void total(const S* sums, int64_t rows, int64_t n, int64_t columns, int64_t count, S* to) const {
    for (int64_t k = 0; k < count; k += L) {
      Vec<S> sum = load_part(sums + n * columns + k, count - k);
      for (int64_t group = 1; group < plan_.groups; ++group)
        sum += load_part(sums + (group * rows + n) * columns + k, count - k);
      store_part(to + k, sum, count - k);
    }
  }

  const RelLstmBackward<S>& p_;
  const RelLstmInput<S>& in_;
  const RelLstmShape shape_;
  const ScreeningShape screen_;
  const RelLstmLayout<S> at_;
  const RelLstmPlan plan_;
  const WalkSchedule schedule_;
  const int64_t most_rows_, slots_, most_;
  Scratch scratch_;
  Span<S> stacked_, key_, inputs_, score_;
  Span<S> da_, sx_, keys_, dx_, dh_, ds_, direct_, context_, dc_, c_0_;
  Span<S> slot_, weights_, grad_, query_, tanh_, lost_score_;
  Span<S> sum_s_, sum_x_, sum_key_, sum_score_;  // per group
  Span<int64_t> ended_, next_, kept_, slot_of_, free_;
  Span<Slots> slots_of_row_;
  Span<Replay> replay_;
  Span<const S*> keys_of_, hidden_of_;
  Span<S*> dkeys_of_, dhidden_of_;
  Span<Barrier> barriers_;
};

}  // namespace
}  // namespace throughtime
