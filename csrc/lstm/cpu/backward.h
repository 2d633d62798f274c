// LSTM backward on a CPU, with h-detach.
//
// From the last step of the walk to the first, da_t the gradient before the nonlinearities:
//
//   dh_t = dy_t + (da_{t+1} W_hh, unless step t+1 is detached)     do = dh tanh(c)
//   dc_t = dc_{t+1} f_{t+1} + dh o (1 - tanh(c)^2)                 di = dc g, df = dc c_{t-1}, dg = dc i
//   da = di i(1-i), df f(1-f), dg (1-g^2), do o(1-o)
//   dW_hh = sum da_t^T h_{t-1}     dW_ih = sum da_t^T x_t     db = sum da_t     dx_t = da_t W_ih
//
// With a projection the first line gives dr_t, then dh_t = dr_t W_hr, dW_hr = sum dr_t^T (o tanh c).
//
// At a detached step the product da W_hh is not computed and nobody waits for anybody.
//
// da is stored in blocks of units: [block][slot][row][4L], slot a ring over the steps of one chunk
// plus the one before. So one layout serves as the left operand of da W (scalars) and as the right
// operand of the weight gradient (vectors), and both read memory in order. Weight gradients are
// summed per chunk in registers, then per group, then over groups, always in the same order:
// results are bit-equal for every number of threads.
#pragma once

#include "lstm/cpu/pack.h"
#include "lstm/cpu/plan.h"
#include "lstm/cpu/ring.h"
#include "lstm/cpu/weight_gradients.h"

namespace throughtime {
namespace {

template <typename S>
class Backward {
  static constexpr int64_t L = kLanes<S>;
  static constexpr int64_t kGates = 4 * L;

 public:
  Backward(const LstmBackward<S>& args, const Runtime& runtime)
      : p_(args),
        in_(args.in),
        shape_(args.in.shape),
        plan_(plan_lstm(shape_, sizeof(S))),
        schedule_(schedule_lstm(shape_, plan_, runtime.threads)),
        blocks_(divide_up(shape_.H, L)),
        outputs_(divide_up(shape_.R, L)),
        projected_(in_.weight_hr != nullptr),
        width_(panel_width()),
        panels_(divide_up(blocks_, width_)),
        panels_out_(divide_up(outputs_, width_)),
        most_rows_(divide_up(shape_.B, plan_.groups)),
        slots_(plan_.chunk + 1),
        ld_dr_(leading_dimension<S>(outputs_ * L)),
        scratch_(runtime),
        weights_(args, plan_, schedule_, &scratch_) {
    const auto per_lane = [&](bool wanted, int64_t size) {
      return scratch_.template reserve<S>(wanted ? schedule_.lanes : 0, size);
    };
    panel_h_ = scratch_.template reserve<S>(Panels<S>::numbers(blocks_ * kGates, outputs_));
    panel_x_ = scratch_.template reserve<S>(
        p_.dx ? Panels<S>::numbers(blocks_ * kGates, divide_up(shape_.I, L)) : 0);
    panel_r_ = scratch_.template reserve<S>(projected_, Panels<S>::numbers(shape_.R, blocks_));
    da_ = per_lane(true, da_size());
    dc_ = per_lane(true, dc_size());
    dr_ = per_lane(projected_, dr_size());
    u_ = per_lane(projected_, u_size());
    barriers_ = scratch_.template reserve<Barrier>(schedule_.lanes + 1);
    scratch_.allocate();
    run_workers(runtime, schedule_, barriers_(), *this);
  }

  int64_t blocks() const { return blocks_; }

  void prepare(Share blocks) {
    const auto part = [&](int64_t count) {
      return Share(count, blocks.begin, blocks.end, blocks_);
    };
    pack_rows(panel_h(), shape_.R, part(panels_out_),
              [&](int64_t n) { return gate_row(in_.weight_hh, shape_.H, shape_.R, n); });
    if (p_.dx)
      pack_rows(panel_x(), shape_.I, part(panel_x().count()),
                [&](int64_t n) { return gate_row(in_.weight_ih, shape_.H, shape_.I, n); });
    if (projected_)
      pack_rows(panel_r(), shape_.H, part(panels_),
                [&](int64_t n) { return in_.weight_hr + n * shape_.H; });
  }

  void walk(const Member& member) {
    for (int64_t group = member.lane; group < plan_.groups; group += schedule_.lanes)
      walk_group(member, group, Share(shape_.B, group, plan_.groups));
  }

  void finish(Share blocks) {
    if (weights_.wanted()) weights_.finish(blocks);
  }

 private:
  struct Walk : GroupPart {
    Share panels;      // own panels of width_ blocks of units: those of `blocks`
    Share panels_out;  // own panels of width_ vectors of outputs; without a projection, the same
    Ring<S> da;        // [blocks][slots][rows][4L]
    S* dc;             // [blocks, rows, L]
    Ring<S> dr;        // [1][slots][rows][ld_dr], with a projection only, as the next
    Ring<S> u;         // [blocks][slots][rows][L]: o tanh(c)
  };

  // Blocks of units per panel of W_hh: wide tiles, but at least one panel for every worker.
  int64_t panel_width() const {
    int64_t width = kPanelVectors;
    while (width > 1 && divide_up(blocks_, width) < schedule_.team) width /= 2;
    return width;
  }
  Panels<S> panel_h() const { return {panel_h_(), blocks_ * kGates, outputs_, width_}; }
  Panels<S> panel_x() const { return {panel_x_(), blocks_ * kGates, divide_up(shape_.I, L)}; }
  Panels<S> panel_r() const { return {panel_r_(), shape_.R, blocks_, width_}; }
  int64_t da_size() const { return times(blocks_, slots_, most_rows_, kGates); }
  int64_t dc_size() const { return times(blocks_, most_rows_, L); }
  int64_t dr_size() const { return times(slots_, most_rows_, ld_dr_); }
  int64_t u_size() const { return times(blocks_, slots_, most_rows_, L); }
  int64_t tail(int64_t block) const { return shape_.H - block * L; }
  int64_t tail_out(int64_t vector) const { return shape_.R - vector * L; }

  void walk_group(const Member& member, int64_t group, Share group_rows) {
    const int64_t lane = member.lane, rows = group_rows.end - group_rows.begin;
    const Share panels(panels_, member.begin, member.end, schedule_.team);
    Share blocks = panels;
    blocks.begin = panels.begin * width_;
    blocks.end = panels.end * width_ < blocks_ ? panels.end * width_ : blocks_;
    const Walk w{{member, schedule_.team, group_rows.begin, rows, blocks},
                 panels,
                 Share(panels_out_, member.begin, member.end, schedule_.team),
                 {da_() + lane * da_size(), slots_, rows, kGates},
                 dc_() + lane * dc_size(),
                 {projected_ ? dr_() + lane * dr_size() : nullptr, slots_, rows, ld_dr_},
                 {projected_ ? u_() + lane * u_size() : nullptr, slots_, rows, L}};
    const int64_t longest = in_.length(w.row0);
    if (weights_.wanted() && longest == 0) weights_.clear(w, group);
    pass_through_empty(w);
    const auto lap = [&](Phase phase) { member.watch->lap(phase); };
    lap(kOther);
    const int64_t first = in_.reverse ? shape_.T - longest : 0;
    Chunk chunk{in_.reverse ? shape_.T : longest, 0, 0};
    for (int64_t walked = 0; chunk.step > first; chunk.n += chunk.steps) {
      chunk.steps = chunk.step - first < plan_.chunk ? chunk.step - first : plan_.chunk;
      chunk.step -= chunk.steps;
      if (weights_.wanted()) weights_.gather(w, chunk);
      lap(kGather);
      for (int64_t k = 0; k < chunk.steps; ++k) {
        const int64_t step = chunk.step + chunk.steps - 1 - k, t = in_.time(step);
        const int64_t active = active_rows(in_, t, w.row0, w.rows);
        retreat(w, step, chunk.n + k, active, walked);
        walked = active;
        if (k + 1 < chunk.steps && !all_cut(w, t, 0, active)) member.wait();
      }
      member.wait();
      if (weights_.wanted()) {
        weights_.add(w, group, chunk, w.da);
        if (projected_) weights_.add_projection(w, group, chunk, w.dr, w.u);
        lap(kWeights);
      }
      if (p_.dx) {
        input_gradients(w, chunk);
        lap(kInputGradients);
      }
      if (chunk.step == first) leave(w, first, (chunk.n + chunk.steps - 1) % slots_, 0, walked);
      lap(kOther);
      member.wait();
    }
  }

  // A row without any step hands its state, and so its gradient, straight through.
  void pass_through_empty(const Walk& w) {
    for (int64_t row = w.rows - 1; row >= 0 && in_.length(w.row0 + row) == 0; --row) {
      const int64_t sample = in_.order[w.row0 + row];
      for_own_outputs(w, [&](int64_t vector) {
        const int64_t at = sample * shape_.R + vector * L;
        store_part(p_.dh0 + at, load_or_zero(p_.dh_n, at, tail_out(vector)), tail_out(vector));
      });
      for (int64_t block = w.blocks.begin; block < w.blocks.end; ++block) {
        const int64_t at = sample * shape_.H + block * L;
        store_part(p_.dc0 + at, load_or_zero(p_.dc_n, at, tail(block)), tail(block));
      }
    }
  }

  template <typename F>
  TT_INLINE void for_own_outputs(const Walk& w, const F& f) {
    for (int64_t q = w.panels_out.begin; q < w.panels_out.end; ++q)
      for (int64_t j = 0; j < vectors_of(q, outputs_); ++j) f(q * width_ + j);
  }

  TT_INLINE static Vec<S> load_or_zero(const S* from, int64_t at, int64_t count) {
    return from ? load_part(from + at, count) : Vec<S>{};
  }

  bool all_cut(const Walk& w, int64_t t, int64_t begin, int64_t end) const {
    if (!p_.detach && !in_.reset) return false;
    if (p_.detach && p_.detach_stride_b == 0 && p_.detach[t * p_.detach_stride_t]) return true;
    for (int64_t row = begin; row < end; ++row)
      if (!p_.cuts(t, w.row0 + row)) return false;
    return true;
  }

  // One step back in time: rows [0, active) are inside their sequence at this step, rows
  // [0, walked) were at the step after it.
  void retreat(const Walk& w, int64_t step, int64_t n, int64_t active, int64_t walked) {
    const int64_t going_on = active < walked ? active : walked;
    const int64_t slot = n % slots_, slot_after = (n + slots_ - 1) % slots_;
    const int64_t t = in_.time(step), t_after = in_.time(step + 1);
    if (active < walked) leave(w, step + 1, slot_after, active, walked);
    enter_cells(w, going_on, active);
    w.member.watch->lap(kOther);
    for (int64_t q = w.panels_out.begin; q < w.panels_out.end; ++q) {
      const int64_t vector = q * width_, vectors = vectors_of(q, outputs_);
      for_row_tiles(0, going_on, [&](int64_t row, int64_t height) {
        TileBuffer<S> dh;
        recurrent_gradient(w, t_after, slot_after, row, height, q, dh.numbers);
        w.member.watch->lap(kRecurrent);
        put_gradient(w, dh.numbers, height, vectors, step, t, slot, vector, row);
      });
      for_row_tiles(going_on, active, [&](int64_t row, int64_t height) {
        TileBuffer<S> dh;
        load_h_n(w, row, height, vector, vectors, dh.numbers);
        put_gradient(w, dh.numbers, height, vectors, step, t, slot, vector, row);
      });
    }
    if (projected_) {
      w.member.wait();
      unproject(w, step, t, slot, active);
    }
  }

  int64_t vectors_of(int64_t panel, int64_t all) const {
    const int64_t left = all - panel * width_;
    return left < width_ ? left : width_;
  }

  // Rows of da as the left operand of a product.
  Left<S> da_rows(const Walk& w, int64_t slot, int64_t row) const {
    return {w.da.at(0, slot, row), kGates, kGates, blocks_, slots_ * w.rows * kGates};
  }

  // What the gates of the step at t_after hand to the outputs before it.
  void recurrent_gradient(const Walk& w, int64_t t_after, int64_t slot_after, int64_t row,
                          int64_t height, int64_t panel, S* dh) {
    const int64_t size = vectors_of(panel, outputs_) * L;
    if (all_cut(w, t_after, row, row + height)) {
      std::memset(dh, 0, height * size * sizeof(S));
      return;
    }
    product(da_rows(w, slot_after, row), panel_h(), panel, height, {dh, size});
    if (!p_.detach && !in_.reset) return;
    for (int64_t i = 0; i < height; ++i)
      if (p_.cuts(t_after, w.row0 + row + i)) std::memset(dh + i * size, 0, size * sizeof(S));
  }

  void load_h_n(const Walk& w, int64_t row, int64_t height, int64_t vector, int64_t vectors,
                S* dh) {
    for (int64_t i = 0; i < height; ++i)
      for (int64_t j = 0; j < vectors; ++j, dh += L) {
        const int64_t from = in_.order[w.row0 + row + i] * shape_.R + (vector + j) * L;
        store(dh, load_or_zero(p_.dh_n, from, tail_out(vector + j)));
      }
  }

  // The gradient of an output goes on to the cells, or waits for the others before a projection.
  void put_gradient(const Walk& w, S* dh, int64_t height, int64_t vectors, int64_t step, int64_t t,
                    int64_t slot, int64_t vector, int64_t row) {
    if (p_.dy) add_output_gradient(w, dh, height, vectors, t, vector, row);
    if (projected_) {
      for (int64_t i = 0; i < height; ++i)
        std::memcpy(w.dr.at(0, slot, row + i) + vector * L, dh + i * vectors * L,
                    vectors * L * sizeof(S));
    } else {
      cells(w, dh, height, vectors, step, t, slot, vector, row);
    }
    w.member.watch->lap(kPointwise);
  }

  void add_output_gradient(const Walk& w, S* dh, int64_t height, int64_t vectors, int64_t t,
                           int64_t vector, int64_t row) {
    for (int64_t i = 0; i < height; ++i) {
      const int64_t sample = in_.order[w.row0 + row + i];
      const S* dy = p_.dy + t * p_.dy_stride_t + sample * p_.dy_stride_b;
      for (int64_t j = 0; j < vectors; ++j, dh += L)
        store(dh, load(dh) + (p_.dy_same ? splat(*dy)
                                         : load_part(dy + (vector + j) * L, tail_out(vector + j))));
    }
  }

  void unproject(const Walk& w, int64_t step, int64_t t, int64_t slot, int64_t active) {
    for (int64_t q = w.panels.begin; q < w.panels.end; ++q) {
      for_row_tiles(0, active, [&](int64_t row, int64_t height) {
        TileBuffer<S> dh;
        product<S>({w.dr.at(0, slot, row), ld_dr_, shape_.R}, panel_r(), q, height,
                   {dh.numbers, vectors_of(q, blocks_) * L});
        w.member.watch->lap(kProjection);
        cells(w, dh.numbers, height, vectors_of(q, blocks_), step, t, slot, q * width_, row);
        w.member.watch->lap(kPointwise);
      });
    }
  }

  // The last step of a sequence gets the gradient of its cell state from c_n.
  void enter_cells(const Walk& w, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t block = w.blocks.begin; block < w.blocks.end; ++block) {
        const int64_t from = in_.order[w.row0 + row] * shape_.H + block * L;
        store(w.dc + (block * w.rows + row) * L, load_or_zero(p_.dc_n, from, tail(block)));
      }
  }

  // Gradients of the outputs of `height` rows and `vectors` blocks to those of the gate sums.
  void cells(const Walk& w, const S* dh, int64_t height, int64_t vectors, int64_t step, int64_t t,
             int64_t slot, int64_t block, int64_t row) {
    for (int64_t j = 0; j < vectors; ++j)
      cells_of_block(w, dh + j * L, vectors * L, height, step, t, slot, block + j, row);
  }

  void cells_of_block(const Walk& w, const S* dh, int64_t dh_stride, int64_t height, int64_t step,
                      int64_t t, int64_t slot, int64_t block, int64_t row) {
    const int64_t at = w.row0 + row;
    const bool watch = in_.lengths || in_.reset || t == in_.first_time(at);
    const S* saved = saved_at(t, block, at);
    const S* before = step > 0 ? saved_at(in_.time(step - 1), block, at) : saved;
    S* carried = w.dc + (block * w.rows + row) * L;
    S* da = w.da.at(block, slot, row);
    S* u = projected_ ? w.u.at(block, slot, row) : nullptr;
    for (int64_t r = 0; r < height; ++r) {
      const Vec<S> i = load(saved), f = load(saved + L), g = load(saved + 2 * L),
                   o = load(saved + 3 * L), tanh_c = tanh<S>(load(saved + 4 * L));
      const Vec<S> c_before = watch ? cell_before(t, block, at + r, before) : load(before + 4 * L);
      for (int v = 0; v < kSavedVectors - 1; ++v) __builtin_prefetch(before + v * L);
      const Vec<S> d = load(dh);
      const Vec<S> dc = load(carried) + d * o * (S(1) - tanh_c * tanh_c);
      store(carried, watch && in_.resets(t, at + r) ? Vec<S>{} : dc * f);
      store(da, dc * g * i * (S(1) - i));
      store(da + L, dc * c_before * f * (S(1) - f));
      store(da + 2 * L, dc * i * (S(1) - g * g));
      store(da + 3 * L, d * tanh_c * o * (S(1) - o));
      if (u) {
        store(u, o * tanh_c);
        u += L;
      }
      saved += kSavedVectors * L;
      before += kSavedVectors * L;
      dh += dh_stride;
      carried += L;
      da += kGates;
    }
    if (tail(block) < L) clear_padding(w.da.at(block, slot, row), height * 4, tail(block));
  }

  // There are no units past the last, but lanes: infinity times a weight of zero has made them NaN.
  TT_INLINE static void clear_padding(S* gates, int64_t count, int64_t units) {
    for (; count > 0; --count, gates += L) store(gates, load_part(gates, units));
  }

  const S* saved_at(int64_t t, int64_t block, int64_t at) const {
    return p_.saved + ((t * blocks_ + block) * shape_.B + at) * (kSavedVectors * L);
  }

  Vec<S> cell_before(int64_t t, int64_t block, int64_t at, const S* before) const {
    if (in_.resets(t, at)) return Vec<S>{};
    if (t != in_.first_time(at)) return load(before + 4 * L);
    return load_part(in_.c0 + in_.order[at] * shape_.H + block * L, tail(block));
  }

  // Rows [begin, end) took their first step at `step`: what is left goes to h_0 and c_0.
  void leave(const Walk& w, int64_t step, int64_t slot, int64_t begin, int64_t end) {
    const int64_t t = in_.time(step);
    for (int64_t q = w.panels_out.begin; q < w.panels_out.end; ++q)
      for_row_tiles(begin, end, [&](int64_t row, int64_t height) {
        TileBuffer<S> dh;
        recurrent_gradient(w, t, slot, row, height, q, dh.numbers);
        const int64_t vectors = vectors_of(q, outputs_);
        for (int64_t i = 0; i < height; ++i)
          for (int64_t j = 0; j < vectors; ++j) {
            const int64_t vector = q * width_ + j;
            const int64_t to = in_.order[w.row0 + row + i] * shape_.R + vector * L;
            store_part(p_.dh0 + to, load(dh.numbers + (i * vectors + j) * L), tail_out(vector));
          }
      });
    for (int64_t row = begin; row < end; ++row)
      for (int64_t block = w.blocks.begin; block < w.blocks.end; ++block) {
        const int64_t to = in_.order[w.row0 + row] * shape_.H + block * L;
        store_part(p_.dc0 + to, load(w.dc + (block * w.rows + row) * L), tail(block));
      }
  }

  void input_gradients(const Walk& w, const Chunk& chunk) {
    const Panels<S> weight = panel_x();
    for_runs(in_, w, chunk, slots_, [&](int64_t slot, int64_t index, int64_t rows) {
      const Share own = w.own(rows);
      for (int64_t q = 0; q < weight.count(); ++q)
        for_row_tiles(own.begin, own.end, [&](int64_t row, int64_t height) {
          TileBuffer<S> dx;
          const int64_t vectors = weight.width_of(q);
          product(da_rows(w, slot, row), weight, q, height, {dx.numbers, vectors * L});
          for (int64_t i = 0; i < height; ++i) {
            const int64_t r = index + row + i;
            const int64_t t = in_.time(chunk.step + chunk.steps - 1 - r / w.rows);
            const int64_t sample = in_.order[w.row0 + r % w.rows];
            S* to = p_.dx + (t * shape_.B + sample) * shape_.I;
            for (int64_t j = 0; j < vectors; ++j) {
              const int64_t column = (q * kPanelVectors + j) * L;
              store_part(to + column, load(dx.numbers + (i * vectors + j) * L), shape_.I - column);
            }
          }
        });
    });
  }

  const LstmBackward<S>& p_;
  const LstmInput<S>& in_;
  const LstmShape shape_;
  const LstmPlan plan_;
  const LstmSchedule schedule_;
  const int64_t blocks_, outputs_;
  const bool projected_;
  const int64_t width_, panels_, panels_out_, most_rows_, slots_, ld_dr_;
  Scratch scratch_;
  WeightGradients<S> weights_;
  Span<S> panel_h_, panel_x_, panel_r_, da_, dc_, dr_, u_;
  Span<Barrier> barriers_;
};

}  // namespace
}  // namespace throughtime
