// The forward walk through time on the CPU, for any cell.
//
//   a_t = b + W_ih x_t + W_hh h_{t-1}            the cell: a_t, c_{t-1} to c_t, h_t
//                                                with a projection h_t = W_hr of the cell's output
//
// A Cell (see lstm/cpu/cell.h) has the mathematics of one step on vectors of units, the number of
// its gates (at most four), what it saves, and whether it carries c beside h. A new cell is one file
// and one line in a kernels.cpp; a new storage type of operands one specialisation of Numbers.
//
// Weights are packed once per call into panels, by one group of rows right before a block is used for
// the first time: for a block of L units (the elements of a vector)
// the panel holds, for every k, the L weights of each gate. A register tile of rows x G L
// therefore ends with all gates of its units in registers, and the cell follows at once; no gate
// sum ever goes through memory.
//
// With a projection the members of a team meet once more per step: the cell's output of all units
// first.
//
// Cost per step and group: 2 G m H (H + I) operations, m rows; weights are read from the cache once
// per tile of rows.
#pragma once

#include "common/cpu/team.h"
#include "recurrence/cpu/pack.h"
#include "recurrence/cpu/params.h"
#include "recurrence/cpu/plan.h"
#include "recurrence/cpu/saved.h"
#include "recurrence/cpu/straight.h"

namespace throughtime {
namespace {

// Operand is the type of x, h and the weights in products, X what x and y have in memory; sums and the
// cell are Cell::Number.
template <typename Cell, typename Operand = typename Cell::Number>
class ForwardWalk {
  using S = typename Cell::Number;
  using X = GivenAs<Operand>;
  using Activations = Saved<Cell, Operand>;
  static constexpr int64_t kTileRows = Tiling<Operand>::kRows;
  static constexpr int G = Cell::kGates;
  static constexpr int64_t L = kLanes<S>;
  static constexpr int64_t kGates = G * L;
  static_assert(G <= kPanelVectors && Cell::kHeld <= G, "all gates of a unit lie in one tile");

 public:
  ForwardWalk(const WalkForward<X>& args, const Runtime& runtime)
      : p_(args),
        in_(args.in),
        shape_(args.in.shape),
        plan_(plan_forward(shape_, G, sizeof(Operand), Tiling<Operand>::kMatrixUnit,
                           runtime.threads, L)),
        schedule_(schedule_walk(shape_, G, plan_, runtime.threads, L)),
        blocks_(divide_up(shape_.H, L)),
        outputs_(divide_up(shape_.R, L)),
        projected_(in_.weight_hr != nullptr),
        width_out_(panel_width(outputs_, schedule_.members)),
        most_rows_(divide_up(shape_.B, plan_.groups)),
        whole_rows_(round_up(most_rows_, Tiling<Operand>::kPadding)),
        chunk_rows_(times(plan_.chunk, most_rows_) + Tiling<Operand>::kPadding - 1),
        ld_x_(leading_dimension<Operand>(shape_.I)),
        ld_h_(leading_dimension<Operand>(outputs_ * L)),
        ld_u_(leading_dimension<Operand>(blocks_ * L)),
        straight_(kMayGoStraight && goes_straight(shape_, L)),
        late_(plan_.groups == 1),
        x_once_(late_ && !plan_.fuse_input && plan_.chunk == shape_.T),
        h_once_(late_ && shape_.T == 1),
        saved_vectors_(p_.cell_only ? 1 : Activations::kVectors),
        stream_(saved_activations(shape_, saved_vectors_) * static_cast<int64_t>(sizeof(S)) >
                kStreamBytes),
        scratch_(runtime) {
    const int64_t places_x = x_once_ ? schedule_.members : blocks_;
    const int64_t places_h = h_once_ ? schedule_.members : blocks_;
    panel_x_ = scratch_.template reserve<Operand>(straight_ ? 0 : places_x,
                                                  Panels<Operand>::numbers(shape_.I, G));
    panel_h_ = scratch_.template reserve<Operand>(straight_ ? 0 : places_h,
                                                  Panels<Operand>::numbers(shape_.R, G));
    panel_r_ = scratch_.template reserve<Operand>(projected_,
                                                  Panels<Operand>::numbers(shape_.H, outputs_));
    bias_ = scratch_.template reserve<S>(blocks_, kGates);
    x_ = scratch_.template reserve<Operand>(schedule_.teams, chunk_rows_, ld_x_);
    gates_x_ = scratch_.template reserve<S>(plan_.fuse_input || straight_ ? 0 : schedule_.teams,
                                            blocks_, plan_.chunk, most_rows_, kGates);
    h_ = scratch_.template reserve<Operand>(2 * schedule_.teams, whole_rows_, ld_h_);
    c_ = scratch_.template reserve<S>(Cell::kCarriesCell ? schedule_.teams : 0, blocks_, most_rows_,
                                      L);
    u_ = scratch_.template reserve<Operand>(projected_ ? schedule_.teams : 0, whole_rows_, ld_u_);
    barriers_ = scratch_.template reserve<Barrier>(schedule_.teams + 1);
  }

  void run(const Runtime& runtime) {
    scratch_.allocate();
    run_workers(runtime, schedule_, barriers_(), *this);
  }

  void prepare(Share blocks) {
    for (int64_t block = blocks.begin; !late_ && !straight_ && block < blocks.end; ++block) {
      pack(panel_x(), block, block, in_.weight_ih);
      pack(panel_h(), block, block, in_.weight_hh);
    }
    pack_gate_bias<G>(in_.bias, shape_.H, bias_(), blocks);
    if (!projected_) return;
    pack_rows_as_columns(panel_r(), blocks.of(panel_r().count(), blocks_), [&](int64_t n) {
      return n < shape_.R ? in_.weight_hr + n * shape_.H : nullptr;
    });
  }

  int64_t blocks() const { return blocks_; }

  void walk(const Member& member) {
    for (int64_t group = member.team; group < plan_.groups; group += schedule_.teams)
      walk_group(member, group_rows(shape_, plan_, group));
  }

  void finish(Share) {
    if (stream_) stream_fence();
  }

 private:
  // Saved activations beyond this are not read again before they have left every cache.
  static constexpr int64_t kStreamBytes = 64 << 20;

  // What one member of a team needs while its group walks through time.
  struct Group {
    const Member& member;
    Share blocks;        // own blocks of units
    Share outputs;       // own vectors of outputs
    int64_t row0, rows;  // the group's rows
    Operand* x;          // [chunk * rows, ld_x], and those that the last tile reads
    S* gates_x;          // [blocks, chunk * rows, G L]
    Operand* h[2];       // [rows, ld_h]
    S* c;                // [blocks, rows, L]
    Operand* u;          // [rows, ld_u]: the cell's output before a projection
  };

  static constexpr bool kMayGoStraight = throughtime::kMayGoStraight<Cell, Operand>;
  static constexpr bool kPads =
      Numbers<Operand>::kDepth > 1;  // products read zeros past the last k

  Panels<Operand> panel_x() const { return {panel_x_(), shape_.I, blocks_ * G, G}; }
  Panels<Operand> panel_h() const { return {panel_h_(), shape_.R, blocks_ * G, G}; }
  Panels<Operand> panel_r() const { return {panel_r_(), shape_.H, outputs_, width_out_}; }
  // Where the block of a panel is that is used for one product only.
  int64_t place(bool once, const Group& g, int64_t block) const {
    return once ? g.member.begin : block;
  }
  void pack(const Panels<Operand>& to, int64_t place, int64_t block, const S* weight) {
    pack_rows_as_columns(to, Share(place + 1, place, place + 1), [&](int64_t n) {
      return gate_row<G>(weight, shape_.H, to.k_count, n + (block - place) * kGates);
    });
  }
  // A block's weights right before their first use.
  void pack_late(const Group& g, bool once, const Panels<Operand>& to, int64_t block,
                 const S* weight) {
    const Timing timing(g.member.watch, kPack);
    pack(to, place(once, g, block), block, weight);
  }
  int64_t tail(int64_t block) const { return shape_.H - block * L; }
  int64_t tail_out(int64_t vector) const { return shape_.R - vector * L; }

  void walk_group(const Member& member, Share rows) {
    const int64_t team = member.team;
    const Group g{.member = member,
                  .blocks = member_blocks(blocks_, 1, member.begin, member.end, schedule_.members),
                  .outputs = Share(outputs_, member.begin, member.end, schedule_.members),
                  .row0 = rows.begin,
                  .rows = rows.end - rows.begin,
                  .x = x_(team),
                  .gates_x = gates_x_(team),
                  .h = {h_(2 * team), h_(2 * team + 1)},
                  .c = c_(team),
                  .u = projected_ ? u_(team) : nullptr};
    if (kPads) clear_padding(g);
    begin_state(g);
    int64_t longest = in_.length(g.row0);
    const int64_t first = in_.reverse ? shape_.T - longest : 0;
    const int64_t last = in_.reverse ? shape_.T : longest;
    zero_padding(g);
    for (int64_t step = first; step < last; step += plan_.chunk) {
      const int64_t steps = least(plan_.chunk, last - step);
      gather_inputs(g, step, steps);
      member.wait();
      if constexpr (kMayGoStraight)
        if (straight_) {
          advance_straight(g, step);
          if (!projected_) return;
          member.wait();
          return project_outputs(g, step);
        }
      if (!plan_.fuse_input) project_inputs(g, steps, step == first);
      for (int64_t k = 0; k < steps; ++k) {
        advance(g, step + k, k, step + k == first);
        member.wait();
        if (projected_) {
          project_outputs(g, step + k);
          member.wait();
        }
      }
    }
  }

  // Products read zeros past the last k, and whole tiles of rows.
  void clear_padding(const Group& g) {
    const auto clear = [&](Operand* rows, int64_t count, int64_t ld) {
      const Share own(count, g.member.begin, g.member.end, schedule_.members);
      std::memset(rows + own.begin * ld, 0, (own.end - own.begin) * ld * sizeof(Operand));
    };
    for (Operand* h : g.h) clear(h, whole_rows_, ld_h_);
    clear(g.x, chunk_rows_, ld_x_);
    if (g.u) clear(g.u, whole_rows_, ld_u_);
    g.member.wait();
  }

  // A row starts from (h0, c0), or anew where its first step resets; both copies of h, as a shorter
  // row of a reversed walk starts late.
  void begin_state(const Group& g) {
    for (int64_t row = 0; row < g.rows; ++row) {
      const int64_t at = g.row0 + row, sample = in_.order[at];
      const int64_t length = in_.length(at), first = in_.first_time(at);
      const bool anew = length > 0 && in_.resets(first, at);
      for (int64_t vector = g.outputs.begin; vector < g.outputs.end; ++vector) {
        const int64_t from = sample * shape_.R + vector * L;
        const Vec<S> h = Numbers<X>::vector_part(in_.h0 + from, tail_out(vector));
        if (length == 0) store_part(p_.h_n + from, h, tail_out(vector));
        for (Operand* copy : g.h) put_state(copy, row, vector, anew ? new_h(first, at, vector) : h);
      }
      for (int64_t block = g.blocks.begin; Cell::kCarriesCell && block < g.blocks.end; ++block) {
        const int64_t from = sample * shape_.H + block * L;
        const Vec<S> c = load_part(in_.c0 + from, tail(block));
        if (length == 0) store_part(p_.c_n + from, c, tail(block));
        store(g.c + (block * g.rows + row) * L, anew ? new_c(first, at, block) : c);
      }
    }
  }

  // What a row starts anew from at a step that resets.
  Vec<S> new_h(int64_t t, int64_t at, int64_t vector) const {
    const X* from = in_.reset_h_at(t, at);
    return from ? Numbers<X>::vector_part(from + vector * L, tail_out(vector)) : Vec<S>{};
  }
  Vec<S> new_c(int64_t t, int64_t at, int64_t block) const {
    const S* from = in_.reset_c_at(t, at);
    return from ? load_part(from + block * L, tail(block)) : Vec<S>{};
  }

  void zero_padding(const Group& g) {
    if (!in_.lengths) return;
    const Share own(g.rows, g.member.begin, g.member.end, schedule_.members);
    for (int64_t row = own.begin; row < own.end; ++row)
      for (int64_t t = in_.length(g.row0 + row); t < shape_.T; ++t)
        std::memset(p_.y + (t * in_.batch + in_.order[g.row0 + row]) * shape_.R, 0,
                    shape_.R * sizeof(X));
  }

  void gather_inputs(const Group& g, int64_t step, int64_t steps) {
    const Timing timing(g.member.watch, kGather);
    const Share own(steps * g.rows, g.member.begin, g.member.end, schedule_.members);
    for (int64_t r = own.begin; r < own.end; ++r) {
      const int64_t t = in_.time(step + r / g.rows), sample = in_.order[g.row0 + r % g.rows];
      copy_row(g.x + r * ld_x_, in_.x + t * in_.x_stride_t + sample * in_.x_stride_b, shape_.I);
    }
  }

  void project_inputs(const Group& g, int64_t steps, bool first) {
    const Timing timing(g.member.watch, kInput);
    const int64_t rows = steps * g.rows;
    for (int64_t block = g.blocks.begin; block < g.blocks.end; ++block) {
      S* out = g.gates_x + block * plan_.chunk * g.rows * kGates;
      if (late_ && first) pack_late(g, x_once_, panel_x(), block, in_.weight_ih);
      multiply_panel<Operand>({.at = g.x, .row_stride = ld_x_, .k_count = shape_.I}, rows,
                              panel_x(), place(x_once_, g, block),
                              {.at = out, .row_stride = kGates, .bias = bias_() + block * kGates});
    }
  }

  void advance(const Group& g, int64_t step, int64_t k, bool first) {
    const int64_t t = in_.time(step);
    const int64_t active = active_rows(in_, t, g.row0, g.rows);
    const Operand* h = g.h[step & 1];
    for (int64_t block = g.blocks.begin; block < g.blocks.end; ++block) {
      if (late_ && first) {
        if (plan_.fuse_input) pack_late(g, false, this->panel_x(), block, in_.weight_ih);
        pack_late(g, h_once_, this->panel_h(), block, in_.weight_hh);
      }
      const Operand* panel_x = this->panel_x().panel(place(x_once_, g, block));
      const Operand* panel_h = this->panel_h().panel(place(h_once_, g, block));
      const S* gates_x = g.gates_x + (block * plan_.chunk + k) * g.rows * kGates;
      for_product_rows<Operand>(0, active, [&](int64_t row, int64_t height) {
        TileBuffer<S, kTileRows> gates;
        const Left<Operand> h_rows{h + row * ld_h_, ld_h_, shape_.R};
        Timing timing(g.member.watch, kRecurrent);
        if (plan_.fuse_input) {
          const Left<Operand> x_rows{g.x + (k * g.rows + row) * ld_x_, ld_x_, shape_.I};
          sum_gates<G, Operand>({x_rows, panel_x}, {h_rows, panel_h}, height,
                                {.at = gates.numbers,
                                 .row_stride = kGates,
                                 .bias = bias_() + block * kGates,
                                 .whole = true},
                                [&](int n) { timing.turn(n == 0 ? kRecurrent : kInput); });
        } else {
          sum_products<G, 1, Operand>({{h_rows, panel_h}}, height,
                                      {.at = gates.numbers,
                                       .row_stride = kGates,
                                       .addend = gates_x + row * kGates,
                                       .addend_stride = kGates,
                                       .whole = true},
                                      [](int) {});
        }
        cells(g, gates.numbers, height, step, t, block, row);
      });
    }
  }

  // The one step of a walk that packs no weights.
  void advance_straight(const Group& g, int64_t step) {
    const int64_t t = in_.time(step), active = active_rows(in_, t, g.row0, g.rows);
    for (int64_t block = g.blocks.begin; block < g.blocks.end; ++block) {
      const StraightBlock<S> from{
          {{g.h[step & 1], ld_h_, in_.weight_hh, shape_.R}, {g.x, ld_x_, in_.weight_ih, shape_.I}},
          shape_.H,
          block * L,
          bias_() + block * kGates};
      for_row_tiles(0, active, [&](int64_t row, int64_t height) {
        TileBuffer<S> gates;
        {
          const Timing timing(g.member.watch, kRecurrent);
          straight_sums(from, row, height, gates.numbers);
        }
        cells(g, gates.numbers, height, step, t, block, row);
      });
    }
  }

  // Gate sums of `height` rows and one block of units, to c, h and what is saved. Two loops: in one,
  // h of a row would wait for c, and the processor sees too few rows at once to fill the time.
  void cells(const Group& g, S* sums, int64_t height, int64_t step, int64_t t, int64_t block,
             int64_t row) {
    const Timing timing(g.member.watch, kPointwise);
    const int64_t at = g.row0 + row, next_ld = g.u ? ld_u_ : ld_h_, unit = block * L;
    const int64_t* order = in_.order + at;
    const bool watch = in_.lengths || in_.reset || t == in_.last_time(at);
    const bool put = !g.u && (watch || tail(block) < L);  // more to do than to store whole vectors
    S* state = g.c + (block * g.rows + row) * L;
    Operand* next = (g.u ? g.u : g.h[(step + 1) & 1]) + row * next_ld;
    X* y = p_.y + t * in_.batch * shape_.R;
    S* saved = p_.saved;
    if (saved) saved += (t * blocks_ + block) * in_.batch * saved_vectors_ * L;
    S* cells = p_.cells ? p_.cells + t * in_.batch * shape_.H + unit : nullptr;
    for (int64_t r = 0; r < height; ++r) {
      Vec<S> a[G], c{}, kept[Cell::kSaved];
      load_vectors<G>(sums + r * kGates, L, a);
      if (Cell::kCarriesCell) c = load(state + r * L);
      Cell::advance(a, &c, kept);
      store_vectors<Cell::kHeld>(sums + r * kGates, L, a);
      if (saved) save(saved + order[r] * saved_vectors_ * L, kept);
      if (!Cell::kCarriesCell) continue;
      if (cells) store_part(cells + order[r] * shape_.H, c, tail(block));
      if (watch) c = carried_cell(c, step, t, block, at + r);
      store(state + r * L, c);
    }
    for (int64_t r = 0; r < height; ++r, sums += kGates, next += next_ld) {
      Vec<S> held[Cell::kHeld];
      load_vectors<Cell::kHeld>(sums, L, held);
      const Vec<S> h = Cell::output(held);
      if (put) {
        put_output(g, h, step, t, block, row + r);
      } else {
        Numbers<Operand>::put_part(next, unit, h, kPads ? tail(block) : L);
        if (!g.u) Numbers<X>::put(y + order[r] * shape_.R, unit, h);
      }
    }
  }

  TT_INLINE void save(S* to, const Vec<S>* kept) const {
    if (p_.cell_only) {
      store(to, kept[Cell::kSaved - 1]);
    } else if (stream_) {
      Activations::stream(to, kept);
    } else {
      Activations::put(to, kept);
    }
  }

  // What the next step takes: another c where it resets. The last step of a row is c_n.
  Vec<S> carried_cell(Vec<S> c, int64_t step, int64_t t, int64_t block, int64_t at) const {
    if (t == in_.last_time(at)) {
      store_part(p_.c_n + in_.order[at] * shape_.H + block * L, c, tail(block));
      return c;
    }
    const int64_t next = in_.time(step + 1);
    return in_.resets(next, at) ? new_c(next, at, block) : c;
  }

  void project_outputs(const Group& g, int64_t step) {
    const int64_t t = in_.time(step);
    const int64_t active = active_rows(in_, t, g.row0, g.rows);
    const Timing timing(g.member.watch, kProjection);
    const Panels<Operand> weight = panel_r();
    const Share own(weight.count(), g.member.begin, g.member.end, schedule_.members);
    for (int64_t q = own.begin; q < own.end; ++q) {
      const int64_t vectors = weight.width_of(q);
      for_product_rows<Operand>(0, active, [&](int64_t row, int64_t height) {
        TileBuffer<S, kTileRows> h;
        product<Operand>({.at = g.u + row * ld_u_, .row_stride = ld_u_, .k_count = shape_.H},
                         weight, q, height,
                         {.at = h.numbers, .row_stride = vectors * L, .whole = true});
        for (int64_t i = 0; i < height; ++i)
          for (int64_t j = 0; j < vectors; ++j)
            put_output(g, load(h.numbers + (i * vectors + j) * L), step, t, q * width_out_ + j,
                       row + i);
      });
    }
  }

  TT_INLINE void put_output(const Group& g, Vec<S> h, int64_t step, int64_t t, int64_t vector,
                            int64_t row) {
    const int64_t at = g.row0 + row, sample = in_.order[at];
    Numbers<X>::put_part(p_.y + (t * in_.batch + sample) * shape_.R, vector * L, h,
                         tail_out(vector));
    if (t == in_.last_time(at)) {
      store_part(p_.h_n + sample * shape_.R + vector * L, h, tail_out(vector));
    } else if (in_.reset && in_.resets(in_.time(step + 1), at)) {
      h = new_h(in_.time(step + 1), at, vector);
    }
    put_state(g.h[(step + 1) & 1], row, vector, h);
  }

  TT_INLINE void put_state(Operand* to, int64_t row, int64_t vector, Vec<S> h) {
    Numbers<Operand>::put_part(to + row * ld_h_, vector * L, h, kPads ? tail_out(vector) : L);
  }

  const WalkForward<X>& p_;
  const WalkInput<X>& in_;
  const WalkShape shape_;
  const WalkPlan plan_;
  const WalkSchedule schedule_;
  const int64_t blocks_, outputs_;
  const bool projected_;
  const int64_t width_out_;
  const int64_t most_rows_, whole_rows_, chunk_rows_;  // of a group, in whole tiles, of a chunk
  const int64_t ld_x_, ld_h_, ld_u_;
  const bool straight_;          // weights are not packed
  const bool late_;              // weights are packed right before their first use
  const bool x_once_, h_once_;   // a panel's place for every member, not for every block
  const int64_t saved_vectors_;  // per step, row and block of units
  const bool stream_;
  Scratch scratch_;
  Span<Operand> panel_x_, panel_h_, panel_r_, x_, h_, u_;
  Span<S> bias_, gates_x_, c_;
  Span<Barrier> barriers_;
};

}  // namespace
}  // namespace throughtime
