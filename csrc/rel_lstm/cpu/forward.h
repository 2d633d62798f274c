// RelLSTM forward on a CPU: every group of rows walks through time alone.
//
// Per step: [gates | query] = [x_t, 1] W_ih^T + s [W_hh; V_a]^T, cells, u = h U_a^T, and for every
// row its attention and screening. A key is the row [h_j, what the score makes of U_a h_j], computed
// once when h_j is born. Cost per row and step: (4H + 2A) H + 4H I multiply-adds and 2A exponentials,
// and per candidate A divisions and H multiply-adds; nothing grows with t.
#pragma once

#include "rel_lstm/cpu/weights.h"
#include "relevancy/cpu/scores.h"
#include "relevancy/cpu/screening.h"

namespace throughtime {
namespace {

template <typename S>
class RelLstmForwardPass {
  using Cell = LstmCell<S>;
  static constexpr int64_t L = kLanes<S>;

 public:
  RelLstmForwardPass(const RelLstmForward<S>& args, const Runtime& runtime)
      : p_(args),
        in_(args.in),
        shape_(args.in.shape),
        screen_(args.in.shape.screening),
        at_(shape_),
        plan_(plan_rel_lstm(shape_, sizeof(S))),
        schedule_(schedule_rel_lstm(shape_, plan_, runtime.threads)),
        most_rows_(divide_up(shape_.B, plan_.groups)),
        most_(padded<S>(screen_.most_in_window() + screen_.most_retained())),
        scratch_(runtime) {
    const auto per_team = [&](int64_t count) {
      return scratch_.template reserve<S>(schedule_.teams, count);
    };
    stacked_ = scratch_.template reserve<S>(Panels<S>::numbers(shape_.H, at_.stacked / L));
    inputs_ = scratch_.template reserve<S>(Panels<S>::numbers(shape_.I, at_.gates / L));
    key_ = scratch_.template reserve<S>(Panels<S>::numbers(shape_.H, at_.attention / L));
    bias_ = scratch_.template reserve<S>(at_.stacked);
    score_ = scratch_.template reserve<S>(at_.attention);
    z_ = per_team(times(most_rows_, at_.stacked));
    x_ = per_team(times(most_rows_, at_.inputs));
    c_ = per_team(times(most_rows_, at_.units));
    h_0_ = per_team(times(most_rows_, at_.units));
    context_ = per_team(times(most_rows_, at_.units));
    scores_ = per_team(most_);
    query_ = per_team(score().query_numbers());
    relevance_ = per_team(times(most_rows_, screen_.positions()));
    kept_ = scratch_.template reserve<int64_t>(schedule_.teams, most_rows_, kept_size());
    screenings_ = scratch_.template reserve<Screening<S>>(schedule_.teams, most_rows_);
    keys_of_ = scratch_.template reserve<const S*>(schedule_.teams, most_);
    hidden_of_ = scratch_.template reserve<const S*>(schedule_.teams, most_);
    // Without a backward pass keys must last as long, but of each step only one.
    keys_ = scratch_.template reserve<S>(p_.saved ? 0 : screen_.positions(), shape_.B, at_.key);
    step_ = scratch_.template reserve<S>(p_.saved ? 0 : schedule_.teams, most_rows_, at_.step);
    barriers_ = scratch_.template reserve<Barrier>(schedule_.teams + 1);
  }

  void run(const Runtime& runtime) {
    scratch_.allocate();
    run_workers(runtime, schedule_, barriers_(), *this);
  }

  int64_t blocks() const { return stacked().count(); }

  void prepare(Share blocks) {
    pack_rows_as_columns(stacked(), blocks, [&](int64_t n) { return at_.stacked_row(in_, n); });
    pack_rows_as_columns(inputs(), blocks.of(inputs().count(), this->blocks()),
                         [&](int64_t n) { return at_.gate_row(in_.weight_ih, shape_.I, n); });
    pack_rows_as_columns(key(), blocks.of(key().count(), this->blocks()),
                         [&](int64_t n) { return at_.attention_row(in_.weight_key, n); });
    if (blocks.begin > 0 || blocks.end == 0) return;  // for one worker
    for (int64_t n = 0; n < at_.stacked; ++n) {
      const S* bias = n < at_.gates && p_.bias ? at_.gate_row(p_.bias, 1, n) : nullptr;
      bias_()[n] = bias ? *bias : S(0);
    }
    load_row(score_(), in_.weight_score, shape_.A, at_.attention);
  }

  void walk(const Member& member) {
    for (int64_t group = member.team; group < plan_.groups; group += schedule_.teams)
      walk_group(member, Share(shape_.B, group, plan_.groups));
  }

  void finish(Share) {}

 private:
  struct Group {
    int64_t row0, rows;
    S *z, *x, *c, *h_0, *context, *scores, *query, *step;
    Screening<S>* screening;
    const S** keys;
    const S** hidden;
    Stopwatch* watch;
  };

  Panels<S> stacked() const { return {stacked_(), shape_.H, at_.stacked / L}; }
  Panels<S> inputs() const { return {inputs_(), shape_.I, at_.gates / L}; }
  Panels<S> key() const { return {key_(), shape_.H, at_.attention / L}; }
  ScoreAdditive<S> score() const { return {at_.attention, score_()}; }
  int64_t kept_size() const { return screen_.most_retained() + 1; }

  S* key_row(int64_t position, int64_t row) const {
    S* base = p_.saved ? p_.saved : keys_();
    return base + (position * shape_.B + row) * at_.key;
  }
  // i, f, g, o, c, s, q of the first row of a group; the rows follow.
  S* step_rows(const Group& w, int64_t t) const {
    if (!p_.saved) return w.step;
    return p_.saved + screen_.positions() * shape_.B * at_.key + (t * shape_.B + w.row0) * at_.step;
  }

  void walk_group(const Member& member, Share rows) {
    const int64_t team = member.team;
    const int64_t m = most_rows_, first = team * m;
    const Group w{.row0 = rows.begin,
                  .rows = rows.end - rows.begin,
                  .z = z_() + first * at_.stacked,
                  .x = x_() + first * at_.inputs,
                  .c = c_() + first * at_.units,
                  .h_0 = h_0_() + first * at_.units,
                  .context = context_() + first * at_.units,
                  .scores = scores_() + team * most_,
                  .query = query_(team),
                  .step = p_.saved ? nullptr : step_() + first * at_.step,
                  .screening = screenings_() + first,
                  .keys = keys_of_() + team * most_,
                  .hidden = hidden_of_() + team * most_,
                  .watch = member.watch};
    begin(w, team);
    int64_t active = w.rows;
    for (int64_t t = 0; t < screen_.T; ++t) {
      active = active_rows(in_, t, w.row0, active);
      if (active == 0) break;
      advance(w, t, active);
    }
    for (int64_t row = 0; row < w.rows; ++row) end(w, row);
  }

  void begin(const Group& w, int64_t team) {
    for (int64_t row = 0; row < w.rows; ++row) {
      const int64_t at = w.row0 + row, sample = in_.order[at], scratch = team * most_rows_ + row;
      load_row(w.h_0 + row * at_.units, p_.h0 + sample * shape_.H, shape_.H, at_.units);
      load_row(w.c + row * at_.units, p_.c0 + sample * shape_.H, shape_.H, at_.units);
      load_row(w.context + row * at_.units, p_.context0 + sample * shape_.H, shape_.H, at_.units);
      w.screening[row] = Screening<S>(
          screen_, {in_.length(at)}, {p_.keep_first}, {p_.relevance + sample, shape_.B},
          {p_.last + sample, shape_.B}, relevance_() + scratch * screen_.positions(),
          kept_() + scratch * kept_size());
      for (int64_t j = 0; j < screen_.P; ++j)
        load_row(key_row(j, at), p_.memory + (j * shape_.B + sample) * shape_.H, shape_.H,
                 at_.units);
    }
    for (int64_t j = 0; j < screen_.P; ++j) make_keys(w, j, w.rows);
  }

  // The score's keys, of U_a h, for the rows of one position.
  void make_keys(const Group& w, int64_t position, int64_t rows) {
    S* first = key_row(position, w.row0);
    multiply<S>({first, at_.key, shape_.H}, rows, key(), {first + at_.units, at_.key});
    const Timing timing(w.watch, kScores);
    for (int64_t row = 0; row < rows; ++row) {
      S* key = first + row * at_.key + at_.units;
      clear_padding(key, shape_.A, at_.attention);
      score().key(key, key);
    }
  }

  void advance(const Group& w, int64_t t, int64_t active) {
    Timing timing(w.watch, kGather);
    S* step = step_rows(w, t);
    S* s = step + 5 * at_.units;
    const int64_t position = screen_.P + t;
    for (int64_t row = 0; row < active; ++row) {
      const S* h = t > 0 ? key_row(position - 1, w.row0 + row) : w.h_0 + row * at_.units;
      const S* context = w.context + row * at_.units;
      for (int64_t k = 0; k < at_.units; k += L)
        store(s + row * at_.step + k, S(0.5) * (load(h + k) + load(context + k)));
      load_row(w.x + row * at_.inputs,
               in_.x + t * in_.x_stride_t + in_.order[w.row0 + row] * in_.x_stride_b, shape_.I,
               at_.inputs);
    }
    // The query has no input; its bias is zero.
    for (int64_t row = 0; row < active; ++row)
      std::memset(w.z + row * at_.stacked + at_.gates, 0, at_.attention * sizeof(S));
    timing.turn(kInput);
    multiply<S>({w.x, at_.inputs, shape_.I}, active, inputs(), {w.z, at_.stacked, false, bias_()});
    timing.turn(kRecurrent);
    multiply<S>({s, at_.step, shape_.H}, active, stacked(), {w.z, at_.stacked, true});
    timing.turn(kPointwise);
    for (int64_t row = 0; row < active; ++row) cells(w, t, row, step + row * at_.step);
    timing.turn(kRecurrent);
    make_keys(w, position, active);
    for (int64_t row = 0; row < active; ++row) attend(w, t, row);
  }

  void cells(const Group& w, int64_t t, int64_t row, S* step) {
    S* z = w.z + row * at_.stacked;
    const int64_t n = at_.units;
    S* c = w.c + row * n;
    S* h = key_row(screen_.P + t, w.row0 + row);
    S* y = p_.y + (t * shape_.B + in_.order[w.row0 + row]) * shape_.H;
    for (int64_t k = 0; k < n; k += L) {
      Vec<S> sums[Cell::kGates], saved[Cell::kSaved], now = load(c + k);
      load_vectors<Cell::kGates>(z + k, n, sums);
      Cell::advance(sums, &now, saved);
      const Vec<S> out = Cell::output(sums);
      store(c + k, now);
      store(h + k, out);
      store_part(y + k, out, shape_.H - k);
      store_vectors<Cell::kSaved>(step + k, n, saved);
    }
    clear_padding(h, shape_.H, n);
    clear_padding(z + at_.gates, shape_.A, at_.attention);
    std::memcpy(step + 6 * n, z + at_.gates, at_.attention * sizeof(S));
  }

  void attend(const Group& w, int64_t t, int64_t row) {
    Timing timing(w.watch, kScreening);
    const Candidates& candidates = w.screening[row].candidates(t);
    candidates.each([&](int64_t c, int64_t position) {
      w.hidden[c] = key_row(position, w.row0 + row);
      w.keys[c] = w.hidden[c] + at_.units;
    });
    timing.turn(kScores);
    const S* query = score().query(w.z + row * at_.stacked + at_.gates, w.query);
    score().scores(query, w.keys, candidates.count(), w.scores, nullptr);
    softmax(w.scores, candidates.count());
    timing.turn(kSums);
    weighted_sum(w.scores, w.hidden, candidates.count(), at_.units, S(1),
                 w.context + row * at_.units);
    timing.turn(kScreening);
    w.screening[row].advance(t, candidates.by_position(w.scores));
  }

  void end(const Group& w, int64_t row) {
    const int64_t at = w.row0 + row, sample = in_.order[at], length = in_.length(at);
    const S* h = length > 0 ? key_row(screen_.P + length - 1, at) : w.h_0 + row * at_.units;
    store_row(p_.h_n + sample * shape_.H, h, shape_.H);
    store_row(p_.c_n + sample * shape_.H, w.c + row * at_.units, shape_.H);
    store_row(p_.context_n + sample * shape_.H, w.context + row * at_.units, shape_.H);
    w.screening[row].finish({p_.memory_index + sample, shape_.B},
                            {p_.memory_relevance + sample, shape_.B});
    for (int64_t t = length; t < screen_.T; ++t)
      std::memset(p_.y + (t * shape_.B + sample) * shape_.H, 0, shape_.H * sizeof(S));
  }

  const RelLstmForward<S>& p_;
  const RelLstmInput<S>& in_;
  const RelLstmShape shape_;
  const ScreeningShape screen_;
  const RelLstmLayout<S> at_;
  const RelLstmPlan plan_;
  const WalkSchedule schedule_;
  const int64_t most_rows_, most_;
  Scratch scratch_;
  Span<S> stacked_, inputs_, key_, bias_, score_;
  Span<S> z_, x_, c_, h_0_, context_, scores_, query_, relevance_, keys_, step_;
  Span<int64_t> kept_;
  Span<Screening<S>> screenings_;
  Span<const S*> keys_of_, hidden_of_;
  Span<Barrier> barriers_;
};

}  // namespace
}  // namespace throughtime
