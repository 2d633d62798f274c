// LSTM forward on a CPU.
//
//   a_t = b + W_ih x_t + W_hh h_{t-1}            i, f, o = sigmoid(a), g = tanh(a)
//   c_t = f c_{t-1} + i g                        h_t = o tanh(c_t)
//
// Weights are packed once per call into panels: for a block of L units (L lanes of a vector) the
// panel holds, for every k, the L weights of gate i, then f, g, o. A register tile of rows x 4L
// therefore ends with all four gates of its units in registers, and the nonlinearities, c and h
// follow at once; no gate sum ever goes through memory.
//
// Cost per step and group: 8 m H (H + I) operations, m rows; weights are read from the cache once
// per tile of rows. Saved for the backward pass: i, f, g, o, c.
#pragma once

#include "../common/team.h"
#include "../common/tile.h"
#include "cpu_pack.h"
#include "params.h"
#include "plan.h"

namespace throughtime {
namespace {

template <typename S>
class Forward {
  static constexpr int64_t L = kLanes<S>;
  static constexpr int64_t kGates = 4 * L;

 public:
  Forward(const LstmForward<S>& args, const Runtime& runtime)
      : p_(args),
        in_(args.in),
        shape_(args.in.shape),
        plan_(plan_lstm(shape_, sizeof(S))),
        schedule_(schedule_lstm(shape_, plan_, runtime.threads)),
        blocks_(divide_up(shape_.H, L)),
        most_rows_(divide_up(shape_.B, plan_.groups)),
        ld_x_(leading_dimension<S>(shape_.I)),
        ld_h_(leading_dimension<S>(blocks_ * L)),
        scratch_(runtime) {
    panel_x_ = scratch_.template reserve<S>(blocks_ * shape_.I * kGates);
    panel_h_ = scratch_.template reserve<S>(blocks_ * shape_.H * kGates);
    bias_ = scratch_.template reserve<S>(blocks_ * kGates);
    x_ = scratch_.template reserve<S>(schedule_.lanes * x_size());
    gates_x_ = scratch_.template reserve<S>(schedule_.lanes * gates_x_size());
    h_ = scratch_.template reserve<S>(schedule_.lanes * 2 * h_size());
    c_ = scratch_.template reserve<S>(schedule_.lanes * c_size());
    barriers_ = scratch_.template reserve<Barrier>(schedule_.lanes + 1);
    scratch_.allocate();
    run_workers(runtime, schedule_, barriers_(), *this);
  }

  void prepare(Share blocks) {
    pack_gate_panels(in_.weight_ih, shape_.H, shape_.I, panel_x_(), blocks);
    pack_gate_panels(in_.weight_hh, shape_.H, shape_.H, panel_h_(), blocks);
    pack_gate_bias(in_.bias, shape_.H, bias_(), blocks);
  }

  int64_t blocks() const { return blocks_; }

  void walk(const Member& member) {
    for (int64_t group = member.lane; group < plan_.groups; group += schedule_.lanes)
      walk_group(member, Share(shape_.B, group, plan_.groups));
  }

  void finish(Share) {}

 private:
  // What one member of a lane needs while its group walks through time.
  struct Walk {
    const Member& member;
    Share blocks;       // own blocks of units
    int64_t row0, rows; // the group's rows
    S* x;               // [chunk * rows, ld_x]
    S* gates_x;         // [blocks, chunk * rows, 4L]
    S* h[2];            // [rows, ld_h]
    S* c;               // [blocks, rows, L]
  };

  int64_t x_size() const { return plan_.chunk * most_rows_ * ld_x_; }
  int64_t gates_x_size() const {
    return plan_.fuse_input ? 0 : blocks_ * plan_.chunk * most_rows_ * kGates;
  }
  int64_t h_size() const { return most_rows_ * ld_h_; }
  int64_t c_size() const { return blocks_ * most_rows_ * L; }
  int64_t tail(int64_t block) const { return shape_.H - block * L; }

  void walk_group(const Member& member, Share rows) {
    const int64_t lane = member.lane;
    Walk w{member,
           Share(blocks_, member.begin, member.end, schedule_.team),
           rows.begin,
           rows.end - rows.begin,
           x_() + lane * x_size(),
           gates_x_() + lane * gates_x_size(),
           {h_() + lane * 2 * h_size(), h_() + (lane * 2 + 1) * h_size()},
           c_() + lane * c_size()};
    begin_state(w);
    int64_t longest = in_.length(w.row0);
    const int64_t first = in_.reverse ? shape_.T - longest : 0;
    const int64_t last = in_.reverse ? shape_.T : longest;
    zero_padding(w);
    for (int64_t step = first; step < last; step += plan_.chunk) {
      const int64_t steps = step + plan_.chunk < last ? plan_.chunk : last - step;
      gather_inputs(w, step, steps);
      member.wait();
      if (!plan_.fuse_input) project_inputs(w, steps);
      for (int64_t k = 0; k < steps; ++k) {
        advance(w, step + k, k);
        member.wait();
      }
    }
  }

  // A row starts from (h0, c0), or from zero where its first step resets; both copies of h, as a
  // shorter row of a reversed walk starts late.
  void begin_state(const Walk& w) {
    for (int64_t row = 0; row < w.rows; ++row) {
      const int64_t at = w.row0 + row, sample = in_.order[at];
      const int64_t length = in_.length(at);
      const bool zero = length > 0 && in_.resets(in_.first_time(at), at);
      for (int64_t block = w.blocks.begin; block < w.blocks.end; ++block) {
        const int64_t from = sample * shape_.H + block * L;
        const Vec<S> h = load_part(in_.h0 + from, tail(block));
        const Vec<S> c = load_part(in_.c0 + from, tail(block));
        if (length == 0) {
          store_part(p_.h_n + from, h, tail(block));
          store_part(p_.c_n + from, c, tail(block));
        }
        for (S* copy : w.h) store(copy + row * ld_h_ + block * L, zero ? Vec<S>{} : h);
        store(w.c + (block * w.rows + row) * L, zero ? Vec<S>{} : c);
      }
    }
  }

  void zero_padding(const Walk& w) {
    if (!in_.lengths) return;
    const Share own(w.rows, w.member.begin, w.member.end, schedule_.team);
    for (int64_t row = own.begin; row < own.end; ++row)
      for (int64_t t = in_.length(w.row0 + row); t < shape_.T; ++t)
        std::memset(p_.y + (t * shape_.B + in_.order[w.row0 + row]) * shape_.H, 0,
                    shape_.H * sizeof(S));
  }

  void gather_inputs(const Walk& w, int64_t step, int64_t steps) {
    const Share own(steps * w.rows, w.member.begin, w.member.end, schedule_.team);
    for (int64_t r = own.begin; r < own.end; ++r) {
      const int64_t t = in_.time(step + r / w.rows), sample = in_.order[w.row0 + r % w.rows];
      copy_row(w.x + r * ld_x_, in_.x + t * in_.x_stride_t + sample * in_.x_stride_b, shape_.I);
    }
  }

  void project_inputs(const Walk& w, int64_t steps) {
    const int64_t rows = steps * w.rows;
    for (int64_t block = w.blocks.begin; block < w.blocks.end; ++block) {
      const S* panel = panel_x_() + block * shape_.I * kGates;
      S* out = w.gates_x + block * plan_.chunk * w.rows * kGates;
      for_row_tiles(0, rows, [&](int64_t row, auto count) {
        Tile<S, decltype(count)::value, 4> tile;
        tile.fill(bias_() + block * kGates);
        tile.multiply(w.x + row * ld_x_, ld_x_, 1, panel, shape_.I);
        tile.write(out + row * kGates);
      });
    }
  }

  void advance(const Walk& w, int64_t step, int64_t k) {
    const int64_t t = in_.time(step);
    const int64_t active = active_rows(in_, t, w.row0, w.rows);
    const S* h = w.h[step & 1];
    for (int64_t block = w.blocks.begin; block < w.blocks.end; ++block) {
      const S* panel_x = panel_x_() + block * shape_.I * kGates;
      const S* panel_h = panel_h_() + block * shape_.H * kGates;
      const S* gates_x = w.gates_x + (block * plan_.chunk + k) * w.rows * kGates;
      for_row_tiles(0, active, [&](int64_t row, auto count) {
        Tile<S, decltype(count)::value, 4> tile;
        if (plan_.fuse_input) {
          tile.fill(bias_() + block * kGates);
          tile.multiply(w.x + (k * w.rows + row) * ld_x_, ld_x_, 1, panel_x, shape_.I);
        } else {
          tile.read(gates_x + row * kGates);
        }
        tile.multiply(h + row * ld_h_, ld_h_, 1, panel_h, shape_.H);
        for (int i = 0; i < decltype(count)::value; ++i)
          cell(w, tile.v[i], step, t, block, row + i);
      });
    }
  }

  TT_INLINE void cell(const Walk& w, const Vec<S>* a, int64_t step, int64_t t, int64_t block,
                      int64_t row) {
    const int64_t at = w.row0 + row, sample = in_.order[at];
    const Vec<S> i = sigmoid<S>(a[0]), f = sigmoid<S>(a[1]), g = tanh<S>(a[2]),
                 o = sigmoid<S>(a[3]);
    S* state = w.c + (block * w.rows + row) * L;
    Vec<S> c = f * load(state) + i * g;
    Vec<S> h = o * tanh<S>(c);
    if (p_.saved) {
      S* saved = p_.saved + ((t * blocks_ + block) * shape_.B + at) * (kSavedVectors * L);
      store(saved, i);
      store(saved + L, f);
      store(saved + 2 * L, g);
      store(saved + 3 * L, o);
      store(saved + 4 * L, c);
    }
    const int64_t unit = block * L;
    store_part(p_.y + (t * shape_.B + sample) * shape_.H + unit, h, tail(block));
    if (t == in_.last_time(at)) {
      store_part(p_.h_n + sample * shape_.H + unit, h, tail(block));
      store_part(p_.c_n + sample * shape_.H + unit, c, tail(block));
    } else if (in_.reset && in_.resets(in_.time(step + 1), at)) {
      h = c = Vec<S>{};
    }
    store(state, c);
    store(w.h[(step + 1) & 1] + row * ld_h_ + unit, h);
  }

  const LstmForward<S>& p_;
  const LstmInput<S>& in_;
  const LstmShape shape_;
  const LstmPlan plan_;
  const LstmSchedule schedule_;
  const int64_t blocks_, most_rows_, ld_x_, ld_h_;
  Scratch scratch_;
  Span<S> panel_x_, panel_h_, bias_, x_, gates_x_, h_, c_;
  Span<Barrier> barriers_;
};

}  // namespace
}  // namespace throughtime
