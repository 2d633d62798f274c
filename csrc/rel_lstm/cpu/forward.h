// RelLSTM forward on a CPU: every group of rows walks through time alone.
//
// A step of a group belongs to one team. Its phases, with a barrier between them:
//
//   gates     s_t = (h + o) / 2 lies ready; own units: [x_t, 1] W_ih^T + s W_hh^T, cells; own part of
//             the query s V_a^T
//   keys      own part of u = h U_a^T
//   scores    own part of the candidates of all rows; what the score makes of u, once, for all steps
//   context   softmax; own units: o_t, then s_{t+1}
//
// A key is the row [h_j, what the score makes of U_a h_j]. Cost per row and step: (4H + 2A) H + 4H I
// multiply-adds and 2A exponentials, and per candidate A divisions and H multiply-adds; nothing grows
// with t.
#pragma once

#include "rel_lstm/cpu/weights.h"
#include "relevancy/cpu/scores.h"
#include "relevancy/cpu/screening.h"

namespace throughtime {
namespace {

// Operand is the type of x, s, h and the weights in products, X what x and y have in memory; all else
// is S.
template <typename S, typename Operand = S>
class RelLstmForwardPass {
  using X = GivenAs<Operand>;
  using Cell = LstmCell<S>;
  static constexpr int64_t L = kLanes<S>;
  static constexpr int G = Cell::kGates;
  static constexpr int64_t kGates = G * L;

 public:
  RelLstmForwardPass(const RelLstmForward<X>& args, const Runtime& runtime)
      : p_(args),
        in_(args.in),
        shape_(args.in.shape),
        screen_(args.in.shape.screening),
        at_(shape_),
        plan_(plan_rel_lstm_forward(shape_, sizeof(Operand), runtime.threads)),
        schedule_(schedule_rel_lstm(shape_, plan_, runtime.threads, L)),
        blocks_(at_.units / L),
        width_(panel_width(at_.attention / L, schedule_.members)),
        most_rows_(divide_up(shape_.B, plan_.groups)),
        ld_x_(leading_dimension<Operand>(shape_.I)),
        ld_h_(leading_dimension<Operand>(at_.units)),
        most_(padded<S>(screen_.most_in_window() + screen_.most_retained())),
        scratch_(runtime) {
    const auto per_row = [&](auto number, int64_t count) {
      return scratch_.template reserve<decltype(number)>(schedule_.teams, most_rows_, count);
    };
    const auto operands = [&](int64_t count) {
      return scratch_.template reserve<Operand>(
          schedule_.teams, round_up(most_rows_, Tiling<Operand>::kPadding), count);
    };
    hidden_ = scratch_.template reserve<Operand>(Panels<Operand>::numbers(shape_.H, blocks_ * G));
    inputs_ = scratch_.template reserve<Operand>(Panels<Operand>::numbers(shape_.I, blocks_ * G));
    const int64_t attention = Panels<Operand>::numbers(shape_.H, at_.attention / L);
    query_ = scratch_.template reserve<Operand>(attention);
    key_ = scratch_.template reserve<Operand>(attention);
    bias_ = scratch_.template reserve<S>(blocks_, kGates);
    score_ = scratch_.template reserve<S>(at_.attention);
    x_ = operands(ld_x_);
    s_ = operands(ld_h_);
    h_ = operands(ld_h_);
    // What has columns of its own lies apart: prefetching would take lines from another worker.
    const auto own = [&](auto number, int64_t rows, int64_t count) {
      return scratch_.template reserve<decltype(number)>(schedule_.workers(), rows, count);
    };
    c_ = own(S(), most_rows_, at_.units);
    context_ = own(S(), most_rows_, at_.units);
    z_ = per_row(S(), blocks_ * kGates);
    q_ = per_row(S(), at_.attention);
    scores_ = per_row(S(), most_);
    relevance_ = own(S(), most_rows_, screen_.positions());
    kept_ = own(int64_t(), most_rows_, kept_size());
    screening_ = scratch_.template reserve<Screening<S>>(schedule_.workers(), most_rows_);
    count_ = own(int64_t(), most_rows_, 1);
    keys_of_ = own(static_cast<const S*>(nullptr), most_rows_, most_);
    hidden_of_ = own(static_cast<const S*>(nullptr), most_rows_, most_);
    unused_ = own(int64_t(), 1, 1);
    weights_ = own(S(), 1, most_);
    made_query_ = own(S(), 1, score().query_numbers());
    // Without a backward pass keys must last as long, but of each step only one.
    keys_ = scratch_.template reserve<S>(p_.saved ? 0 : screen_.positions(), shape_.B, at_.key);
    step_ = scratch_.template reserve<S>(p_.saved ? 0 : schedule_.teams, most_rows_, at_.step);
    barriers_ = scratch_.template reserve<Barrier>(schedule_.teams + 1);
  }

  void run(const Runtime& runtime) {
    scratch_.allocate();
    run_workers(runtime, schedule_, barriers_(), *this);
  }

  int64_t blocks() const { return blocks_; }

  void prepare(Share blocks) {
    const auto pack = [&](const Panels<Operand>& to, const auto& row) {
      pack_rows_as_columns(to, blocks.of(to.count(), this->blocks()), row);
    };
    pack(hidden(), [&](int64_t n) { return gate_row<G>(in_.weight_hh, shape_.H, shape_.H, n); });
    pack(inputs(), [&](int64_t n) { return gate_row<G>(in_.weight_ih, shape_.H, shape_.I, n); });
    pack(query(), [&](int64_t n) { return at_.attention_row(in_.weight_query, n); });
    pack(key(), [&](int64_t n) { return at_.attention_row(in_.weight_key, n); });
    pack_gate_bias<G>(p_.bias, shape_.H, bias_(), blocks);
    if (blocks.begin > 0 || blocks.end == 0) return;  // for one worker
    load_row(score_(), in_.weight_score, shape_.A, at_.attention);
  }

  void walk(const Member& member) {
    for (int64_t group = member.team; group < plan_.groups; group += schedule_.teams)
      walk_group(member, Share(shape_.B, group, plan_.groups));
  }

  void finish(Share) {}

 private:
  struct Group {
    const Member& member;
    int64_t row0, rows;
    Share blocks;     // own blocks of units
    Share attention;  // own panels of attention units
    Share own;        // own rows
    Operand *x, *s, *h;
    S *z, *q, *scores, *step;  // z: gate sums, [rows, blocks, G L]
    // The member's own, of which it uses its own columns.
    S *c, *context;
    // Every member screens all rows for itself: to share lists takes longer than to make them.
    int64_t worker;
    Screening<S>* screening;
    int64_t* count;  // of candidates, by row
    const S **keys, **hidden;
    S *weights, *query;
    Stopwatch* watch;
  };

  Panels<Operand> hidden() const { return {hidden_(), shape_.H, blocks_ * G, G}; }
  Panels<Operand> inputs() const { return {inputs_(), shape_.I, blocks_ * G, G}; }
  Panels<Operand> query() const { return {query_(), shape_.H, at_.attention / L, width_}; }
  Panels<Operand> key() const { return {key_(), shape_.H, at_.attention / L, width_}; }
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
    const int64_t team = member.team, count = rows.end - rows.begin;
    const int64_t worker = team * schedule_.members + member.begin;
    const auto own = [&](int64_t all) {
      return Share(all, member.begin, member.end, schedule_.members);
    };
    const Group w{.member = member,
                  .row0 = rows.begin,
                  .rows = count,
                  .blocks = own(blocks_),
                  .attention = own(key().count()),
                  .own = own(count),
                  .x = x_(team),
                  .s = s_(team),
                  .h = h_(team),
                  .z = z_(team),
                  .q = q_(team),
                  .scores = scores_(team),
                  .step = p_.saved ? nullptr : step_(team),
                  .c = c_(worker),
                  .context = context_(worker),
                  .worker = worker,
                  .screening = screening_(worker),
                  .count = count_(worker),
                  .keys = keys_of_(worker),
                  .hidden = hidden_of_(worker),
                  .weights = weights_(worker),
                  .query = made_query_(worker),
                  .watch = member.watch};
    begin(w);
    int64_t active = w.rows;
    for (int64_t t = 0; t < screen_.T; ++t) {
      active = active_rows(in_, t, w.row0, active);
      if (active == 0) break;
      gather(w, t, active);
      member.wait();
      gates(w, t, active);
      member.wait();
      keys(w, screen_.P + t, active);
      member.wait();
      scores(w, t, active);
      member.wait();
      contexts(w, t, active);
    }
    for (int64_t row = 0; row < w.rows; ++row) leave(w, row);
    for (int64_t row = w.own.begin; row < w.own.end; ++row) end(w, row);
    member.wait();
  }

  void begin(const Group& w) {
    const int64_t rows = round_up(w.rows, Tiling<Operand>::kPadding);
    clear_operands(w.s, rows, ld_h_, w.member, schedule_.members);
    clear_operands(w.h, rows, ld_h_, w.member, schedule_.members);
    clear_operands(w.x, rows, ld_x_, w.member, schedule_.members);
    for (int64_t row = 0; row < w.rows; ++row) {
      const int64_t from = in_.order[w.row0 + row] * shape_.H, to = row * at_.units;
      for (int64_t k = w.blocks.begin * L; k < w.blocks.end * L; k += L) {
        store(w.c + to + k, load_part(p_.c0 + from + k, shape_.H - k));
        store(w.context + to + k, load_part(p_.context0 + from + k, shape_.H - k));
      }
    }
    for (int64_t row = 0; row < w.rows; ++row) {
      const int64_t at = w.row0 + row, sample = in_.order[at];
      const Column<int64_t> last = owns(w, row) ? Column<int64_t>{p_.last + sample, shape_.B}
                                                : Column<int64_t>{unused_(w.worker), 0};
      w.screening[row] = Screening<S>(
          screen_, {in_.length(at)}, {p_.keep_first}, {p_.relevance + sample, shape_.B}, last,
          relevance_(w.worker) + row * screen_.positions(), kept_(w.worker) + row * kept_size());
    }
    w.member.wait();
    for (int64_t j = 0; j < screen_.P; ++j) remember(w, j);
  }

  // The key of a hidden state of an earlier call.
  void remember(const Group& w, int64_t position) {
    for (int64_t row = w.own.begin; row < w.own.end; ++row) {
      const int64_t sample = in_.order[w.row0 + row];
      S* h = key_row(position, w.row0 + row);
      load_row(h, p_.memory + (position * shape_.B + sample) * shape_.H, shape_.H, at_.units);
      for (int64_t k = 0; k < at_.units; k += L) put(w.h + row * ld_h_, k, load(h + k));
    }
    w.member.wait();
    keys(w, position, w.rows);
    w.member.wait();
    for (int64_t row = w.own.begin; row < w.own.end; ++row) make_key(w, position, row);
  }

  static bool owns(const Group& w, int64_t row) { return row >= w.own.begin && row < w.own.end; }

  TT_INLINE void put(Operand* row, int64_t unit, Vec<S> v) const {
    Numbers<Operand>::put_part(row, unit, v, shape_.H - unit);
  }

  // x_t of own rows, s_t in own units, and candidates.
  void gather(const Group& w, int64_t t, int64_t active) {
    const Timing timing(w.watch, kGather);
    S* s = step_rows(w, t) + 5 * at_.units;
    for (int64_t row = 0; row < active; ++row) {
      const int64_t at = w.row0 + row;
      const S* before = t > 0 ? key_row(screen_.P + t - 1, at) : p_.h0 + in_.order[at] * shape_.H;
      const S* context = w.context + row * at_.units;
      for (int64_t k = w.blocks.begin * L; k < w.blocks.end * L; k += L) {
        const Vec<S> h = t > 0 ? load(before + k) : load_part(before + k, shape_.H - k);
        const Vec<S> mean = S(0.5) * (h + load(context + k));
        store(s + row * at_.step + k, mean);
        put(w.s + row * ld_h_, k, mean);
      }
    }
    for (int64_t row = w.own.begin; row < least(w.own.end, active); ++row)
      copy_row(w.x + row * ld_x_,
               in_.x + t * in_.x_stride_t + in_.order[w.row0 + row] * in_.x_stride_b, shape_.I);
    for (int64_t row = 0; row < active; ++row) list(w, t, row);
  }

  void gates(const Group& w, int64_t t, int64_t active) {
    Timing timing(w.watch, kInput);
    const auto to = [&](int64_t block, bool begun) -> Target<S> {
      return {w.z + block * kGates, blocks_ * kGates, begun,
              begun ? nullptr : bias_() + block * kGates};
    };
    for (int64_t block = w.blocks.begin; block < w.blocks.end; ++block)
      multiply_panel<Operand>({w.x, ld_x_, shape_.I}, active, inputs(), block, to(block, false));
    timing.turn(kRecurrent);
    for (int64_t block = w.blocks.begin; block < w.blocks.end; ++block)
      multiply_panel<Operand>({w.s, ld_h_, shape_.H}, active, hidden(), block, to(block, true));
    queries(w, t, active);
    timing.turn(kPointwise);
    for (int64_t row = 0; row < active; ++row) cells(w, t, row);
  }

  void queries(const Group& w, int64_t t, int64_t active) {
    const int64_t n = at_.attention;
    S* saved = step_rows(w, t) + 6 * at_.units;
    for (int64_t q = w.attention.begin; q < w.attention.end; ++q) {
      const int64_t begin = q * width_ * L, end = begin + query().width_of(q) * L;
      multiply_panel<Operand>({w.s, ld_h_, shape_.H}, active, query(), q, {w.q + begin, n});
      for (int64_t row = 0; row < active; ++row) {
        clear_padding(w.q + row * n + begin, shape_.A - begin, end - begin);
        std::memcpy(saved + row * at_.step + begin, w.q + row * n + begin,
                    (end - begin) * sizeof(S));
      }
    }
  }

  // Gate sums of a row to c, h and what is saved, in own units.
  void cells(const Group& w, int64_t t, int64_t row) {
    const int64_t n = at_.units, at = w.row0 + row;
    const S* sums = w.z + row * blocks_ * kGates;
    S* step = step_rows(w, t) + row * at_.step;
    S* c = w.c + row * n;
    S* h = key_row(screen_.P + t, at);
    X* y = p_.y + (t * shape_.B + in_.order[at]) * shape_.H;
    for (int64_t block = w.blocks.begin; block < w.blocks.end; ++block) {
      const int64_t unit = block * L, part = shape_.H - unit;
      Vec<S> a[G], saved[Cell::kSaved], now = load(c + unit);
      load_vectors<G>(sums + block * kGates, L, a);
      Cell::advance(a, &now, saved);
      const Vec<S> out = Cell::output(a);
      store(c + unit, now);
      store(h + unit, out);
      clear_padding(h + unit, part, L);
      put(w.h + row * ld_h_, unit, out);
      Numbers<X>::put_part(y, unit, out, part);
      store_vectors<Cell::kSaved>(step + unit, n, saved);
    }
  }

  // Own part of U_a h for the rows of one position.
  void keys(const Group& w, int64_t position, int64_t rows) {
    const Timing timing(w.watch, kRecurrent);
    S* to = key_row(position, w.row0) + at_.units;
    for (int64_t q = w.attention.begin; q < w.attention.end; ++q)
      multiply_panel<Operand>({w.h, ld_h_, shape_.H}, rows, key(), q,
                              {to + q * width_ * L, at_.key});
  }

  void make_key(const Group& w, int64_t position, int64_t row) {
    S* key = key_row(position, w.row0 + row) + at_.units;
    clear_padding(key, shape_.A, at_.attention);
    score().key(key, key);
  }

  // The candidates of a row's query.
  void list(const Group& w, int64_t t, int64_t row) {
    const Timing timing(w.watch, kScreening);
    const Candidates& candidates = w.screening[row].candidates(t);
    const S** hidden = w.hidden + row * most_;
    const S** keys = w.keys + row * most_;
    candidates.each([&](int64_t c, int64_t position) {
      hidden[c] = key_row(position, w.row0 + row);
      keys[c] = hidden[c] + at_.units;
    });
    w.count[row] = candidates.count();
  }

  // A part has whole vectors of scores. The one with the last candidate, which is the step itself, makes
  // its key.
  void scores(const Group& w, int64_t t, int64_t active) {
    const Timing timing(w.watch, kScores);
    const auto count = [&](int64_t row) { return w.count[row]; };
    for_own_candidates<S>(w.member, schedule_.members, active, count,
                          [&](int64_t row, int64_t begin, int64_t end) {
                            if (end == count(row)) make_key(w, screen_.P + t, row);
                            const S* query = score().query(w.q + row * at_.attention, w.query);
                            score().scores(query, w.keys + row * most_ + begin, end - begin,
                                           w.scores + row * most_ + begin, nullptr);
                          });
  }

  void contexts(const Group& w, int64_t t, int64_t active) {
    for (int64_t row = 0; row < active; ++row) {
      Timing timing(w.watch, kScores);
      const int64_t count = w.count[row], first = w.blocks.begin * L;
      std::memcpy(w.weights, w.scores + row * most_, padded<S>(count) * sizeof(S));
      softmax(w.weights, count);
      timing.turn(kSums);
      weighted_sum(w.weights, w.hidden + row * most_, count, first, w.blocks.end * L, S(1),
                   w.context + row * at_.units);
      timing.turn(kScreening);
      Screening<S>& screening = w.screening[row];
      screening.advance(t, screening.candidates(t).by_position(w.weights));
    }
  }

  // The last state of a row, in own units.
  void leave(const Group& w, int64_t row) {
    const int64_t at = w.row0 + row, length = in_.length(at), H = shape_.H;
    const int64_t to = in_.order[at] * H, n = at_.units;
    const S* h = length > 0 ? key_row(screen_.P + length - 1, at) : p_.h0 + to;
    for (int64_t k = w.blocks.begin * L; k < w.blocks.end * L; k += L) {
      store_part(p_.h_n + to + k, load_part(h + k, H - k), H - k);
      store_part(p_.c_n + to + k, load(w.c + row * n + k), H - k);
      store_part(p_.context_n + to + k, load(w.context + row * n + k), H - k);
    }
  }

  // What is left of the row as a whole.
  void end(const Group& w, int64_t row) {
    const int64_t at = w.row0 + row, length = in_.length(at), H = shape_.H;
    const int64_t sample = in_.order[at];
    w.screening[row].finish();
    w.screening[row].leave({p_.memory_index + sample, shape_.B},
                           {p_.memory_relevance + sample, shape_.B});
    for (int64_t t = length; t < screen_.T; ++t)
      std::memset(p_.y + (t * shape_.B + sample) * H, 0, H * sizeof(X));
  }

  const RelLstmForward<X>& p_;
  const RelLstmInput<X>& in_;
  const RelLstmShape shape_;
  const ScreeningShape screen_;
  const RelLstmLayout<S> at_;
  const RelLstmPlan plan_;
  const WalkSchedule schedule_;
  const int64_t blocks_, width_, most_rows_, ld_x_, ld_h_, most_;
  Scratch scratch_;
  Span<Operand> hidden_, inputs_, query_, key_, x_, s_, h_;
  Span<S> bias_, score_, c_, context_, z_, q_, scores_, relevance_, keys_, step_;
  Span<S> weights_, made_query_;  // per worker
  Span<int64_t> kept_, count_, unused_;
  Span<Screening<S>> screening_;
  Span<const S*> keys_of_, hidden_of_;
  Span<Barrier> barriers_;
};

}  // namespace
}  // namespace throughtime
