// LSTM backward on a CPU, with h-detach.
//
// From the last step of the walk to the first, da_t the gradient before the nonlinearities:
//
//   dh_t = dy_t + (da_{t+1} W_hh, unless step t+1 is detached)     do = dh tanh(c)
//   dc_t = dc_{t+1} f_{t+1} + dh o (1 - tanh(c)^2)                 di = dc g, df = dc c_{t-1}, dg = dc i
//   da = di i(1-i), df f(1-f), dg (1-g^2), do o(1-o)
//   dW_hh = sum da_t^T h_{t-1}     dW_ih = sum da_t^T x_t     db = sum da_t     dx_t = da_t W_ih
//
// At a detached step the product da W_hh is not computed and nobody waits for anybody.
//
// da is stored in blocks of units: [block][slot][row][4L], slot a ring over the steps of one chunk
// plus the one before. So one layout serves as the left operand of da W (scalars) and as the right
// operand of the weight gradient (vectors), and both read memory in order. Weight gradients are
// summed per chunk in registers, then per group, then over groups, always in the same order:
// results are bit-equal for every number of threads.
#pragma once

#include "cpu_pack.h"
#include "plan.h"

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
        width_(panel_width()),
        panels_(divide_up(blocks_, width_)),
        panels_x_(divide_up(divide_up(shape_.I, L), kPanelVectors)),
        most_rows_(divide_up(shape_.B, plan_.groups)),
        slots_(plan_.chunk + 1),
        columns_(shape_.H + shape_.I + 1),
        scratch_(runtime) {
    panel_h_ = scratch_.template reserve<S>(blocks_ * L * blocks_ * kGates);
    panel_x_ = scratch_.template reserve<S>(p_.dx ? panels_x_ * kPanelVectors * L * blocks_ * kGates : 0);
    da_ = scratch_.template reserve<S>(schedule_.lanes * da_size());
    dc_ = scratch_.template reserve<S>(schedule_.lanes * dc_size());
    hx_ = scratch_.template reserve<S>(p_.dweight_hh ? schedule_.lanes * hx_size() : 0);
    dw_ = scratch_.template reserve<S>(p_.dweight_hh ? plan_.groups * dw_size() : 0);
    barriers_ = scratch_.template reserve<Barrier>(schedule_.lanes + 1);
    scratch_.allocate();
    run_workers(runtime, schedule_, barriers_(), *this);
  }

  int64_t blocks() const { return blocks_; }

  void prepare(Share blocks) {
    const auto part = [&](int64_t count) {
      return Share(count, blocks.begin, blocks.end, blocks_);
    };
    pack_column_panels(in_.weight_hh, shape_.H, shape_.H, width_, panel_h_(), part(panels_));
    if (p_.dx)
      pack_column_panels(in_.weight_ih, shape_.H, shape_.I, kPanelVectors, panel_x_(),
                         part(panels_x_));
  }

  void walk(const Member& member) {
    for (int64_t group = member.lane; group < plan_.groups; group += schedule_.lanes)
      walk_group(member, group, Share(shape_.B, group, plan_.groups));
  }

  // Sums the groups' weight gradients and puts them into PyTorch's order.
  void finish(Share blocks) {
    if (!p_.dweight_hh) return;
    for (int64_t block = blocks.begin; block < blocks.end; ++block)
      for (int64_t column = 0; column < columns_; column += kScatter) {
        const int64_t end = column + kScatter < columns_ ? column + kScatter : columns_;
        scatter_columns(block, column, end);
      }
  }

 private:
  static constexpr int64_t kScatter = 16;

  struct Walk {
    const Member& member;
    Share panels;       // own panels of width_ blocks
    Share blocks;       // the blocks in them
    int64_t row0, rows; // the group's rows
    S* da;              // [blocks, slots, rows, 4L]
    S* dc;              // [blocks, rows, L]
    S* hx;              // h_{t-1}, x_t, 1 in tiles: [columns / kRegisterRows, chunk * rows, ..]
    S* dw;              // [blocks, columns, 4L]
  };

  // Blocks of units per panel of W_hh: wide tiles, but at least one panel for every worker.
  int64_t panel_width() const {
    int64_t width = kPanelVectors;
    while (width > 1 && divide_up(blocks_, width) < schedule_.team) width /= 2;
    return width;
  }
  int64_t da_size() const { return blocks_ * slots_ * most_rows_ * kGates; }
  int64_t dc_size() const { return blocks_ * most_rows_ * L; }
  int64_t hx_size() const { return plan_.chunk * most_rows_ * (columns_ + kRegisterRows); }
  int64_t dw_size() const { return blocks_ * columns_ * kGates; }
  int64_t tail(int64_t block) const { return shape_.H - block * L; }
  S* da_at(const Walk& w, int64_t block, int64_t slot, int64_t row) const {
    return w.da + ((block * slots_ + slot) * w.rows + row) * kGates;
  }

  void walk_group(const Member& member, int64_t group, Share rows) {
    const Share panels(panels_, member.begin, member.end, schedule_.team);
    Share blocks = panels;
    blocks.begin = panels.begin * width_;
    blocks.end = panels.end * width_ < blocks_ ? panels.end * width_ : blocks_;
    Walk w{member,
           panels,
           blocks,
           rows.begin,
           rows.end - rows.begin,
           da_() + member.lane * da_size(),
           dc_() + member.lane * dc_size(),
           p_.dweight_hh ? hx_() + member.lane * hx_size() : nullptr,
           p_.dweight_hh ? dw_() + group * dw_size() : nullptr};
    if (w.dw)
      std::memset(w.dw + w.blocks.begin * columns_ * kGates, 0,
                  (w.blocks.end - w.blocks.begin) * columns_ * kGates * sizeof(S));
    pass_through_empty(w);
    const int64_t longest = in_.length(w.row0);
    const int64_t first = in_.reverse ? shape_.T - longest : 0;
    int64_t step = in_.reverse ? shape_.T : longest;  // one past the step that comes next
    int64_t walked = 0;                               // rows of the step before this one
    for (int64_t n = 0; step > first;) {
      const int64_t steps = step - first < plan_.chunk ? step - first : plan_.chunk;
      if (w.hx) gather_operands(w, step, steps);
      for (int64_t k = 0; k < steps; ++k, ++n) {
        --step;
        const int64_t t = in_.time(step);
        const int64_t active = active_rows(in_, t, w.row0, w.rows);
        retreat(w, step, n, active, walked);
        walked = active;
        if (k + 1 < steps && !all_cut(w, t, 0, active)) member.wait();
      }
      member.wait();
      if (w.dw) add_weight_gradients(w, step, steps, n - steps);
      if (p_.dx) input_gradients(w, step, steps, n - steps);
      if (step == first) leave(w, first, (n - 1) % slots_, 0, walked);
      member.wait();
    }
  }

  // A row without any step hands its state, and so its gradient, straight through.
  void pass_through_empty(const Walk& w) {
    for (int64_t row = w.rows - 1; row >= 0 && in_.length(w.row0 + row) == 0; --row)
      for (int64_t block = w.blocks.begin; block < w.blocks.end; ++block) {
        const int64_t at = in_.order[w.row0 + row] * shape_.H + block * L;
        store_part(p_.dh0 + at, load_or_zero(p_.dh_n, at, tail(block)), tail(block));
        store_part(p_.dc0 + at, load_or_zero(p_.dc_n, at, tail(block)), tail(block));
      }
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

  // Left operands of the weight gradient for steps [step - steps, step), the last one first.
  void gather_operands(const Walk& w, int64_t step, int64_t steps) {
    const Share own(steps * w.rows, w.member.begin, w.member.end, schedule_.team);
    const S one = 1;
    for (int64_t r = own.begin; r < own.end; ++r) {
      const int64_t at = w.row0 + r % w.rows, sample = in_.order[at];
      const int64_t s = step - 1 - r / w.rows, t = in_.time(s);
      if (t >= in_.length(at)) continue;
      const S* h = nullptr;
      if (!in_.resets(t, at))
        h = t == in_.first_time(at)
                ? in_.h0 + sample * shape_.H
                : p_.y + (in_.time(s - 1) * shape_.B + sample) * shape_.H;
      put_columns(w, r, 0, h, shape_.H);
      put_columns(w, r, shape_.H, in_.x + t * in_.x_stride_t + sample * in_.x_stride_b, shape_.I);
      put_columns(w, r, shape_.H + shape_.I, &one, 1);
    }
  }

  // Tiles of kRegisterRows columns: the tile's k loop reads one contiguous piece.
  S* hx_at(const Walk& w, int64_t row, int64_t column) const {
    const int64_t tile = column / kRegisterRows * plan_.chunk * w.rows + row;
    return w.hx + tile * kRegisterRows + column % kRegisterRows;
  }

  TT_INLINE void put_columns(const Walk& w, int64_t row, int64_t column, const S* from,
                             int64_t count) {
    S* to = hx_at(w, row, column);
    int64_t in_tile = column % kRegisterRows;
    for (int64_t k = 0; k < count; ++k) {
      *to++ = from ? from[k] : S(0);
      if (++in_tile == kRegisterRows) {
        in_tile = 0;
        to += (plan_.chunk * w.rows - 1) * kRegisterRows;
      }
    }
  }

  // One step back in time: rows [0, active) are inside their sequence at this step, rows
  // [0, walked) were at the step after it.
  void retreat(const Walk& w, int64_t step, int64_t n, int64_t active, int64_t walked) {
    const int64_t going_on = active < walked ? active : walked;
    const int64_t slot = n % slots_, slot_after = (n + slots_ - 1) % slots_;
    const int64_t t = in_.time(step), t_after = in_.time(step + 1);
    if (active < walked) leave(w, step + 1, slot_after, active, walked);
    for (int64_t q = w.panels.begin; q < w.panels.end; ++q)
      with_vectors(vectors_of(q), [&](auto vectors) {
        constexpr int NV = decltype(vectors)::value;
        for_row_tiles(0, going_on, [&](int64_t row, auto count) {
          constexpr int MR = decltype(count)::value;
          Tile<S, MR, NV> dh;
          dh.clear();
          if (!all_cut(w, t_after, row, row + MR)) {
            multiply_gates(w, slot_after, row, panel_h_() + q * panel_size(), &dh);
            drop_cut_rows(w, t_after, row, &dh);
          }
          gates_of_tile(w, dh, step, t, slot, q * width_, row);
        });
        for_row_tiles(going_on, active, [&](int64_t row, auto count) {
          constexpr int MR = decltype(count)::value;
          Tile<S, MR, NV> dh;
          enter(w, q * width_, row, &dh);
          gates_of_tile(w, dh, step, t, slot, q * width_, row);
        });
      });
  }

  int64_t vectors_of(int64_t panel) const {
    const int64_t left = blocks_ - panel * width_;
    return left < width_ ? left : width_;
  }
  int64_t panel_size() const { return width_ * L * blocks_ * kGates; }

  // tile += da W for one panel of W's columns.
  template <int MR, int NV>
  TT_INLINE void multiply_gates(const Walk& w, int64_t slot, int64_t row, const S* panel,
                                Tile<S, MR, NV>* tile) {
    Tile<S, MR, NV> sum = *tile;
    const S* a = da_at(w, 0, slot, row);
    for (int64_t block = 0; block < blocks_; ++block) {
      sum.multiply(a, kGates, 1, panel, kGates);
      a += slots_ * w.rows * kGates;
      panel += kGates * NV * L;
    }
    *tile = sum;
  }

  template <int MR, int NV>
  TT_INLINE void drop_cut_rows(const Walk& w, int64_t t, int64_t row, Tile<S, MR, NV>* dh) {
    if (!p_.detach && !in_.reset) return;
    for (int i = 0; i < MR; ++i)
      if (p_.cuts(t, w.row0 + row + i))
        for (int j = 0; j < NV; ++j) dh->v[i][j] = Vec<S>{};
  }

  // The last step of a sequence gets its gradients from h_n and c_n.
  template <int MR, int NV>
  TT_INLINE void enter(const Walk& w, int64_t block, int64_t row, Tile<S, MR, NV>* dh) {
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < NV; ++j) {
        const int64_t from = in_.order[w.row0 + row + i] * shape_.H + (block + j) * L;
        const int64_t here = tail(block + j);
        dh->v[i][j] = load_or_zero(p_.dh_n, from, here);
        store(w.dc + ((block + j) * w.rows + row + i) * L, load_or_zero(p_.dc_n, from, here));
      }
  }

  template <int MR, int NV>
  TT_INLINE void gates_of_tile(const Walk& w, const Tile<S, MR, NV>& dh, int64_t step, int64_t t,
                               int64_t slot, int64_t block, int64_t row) {
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < NV; ++j) cell(w, dh.v[i][j], step, t, slot, block + j, row + i);
  }

  TT_INLINE void cell(const Walk& w, Vec<S> dh, int64_t step, int64_t t, int64_t slot,
                      int64_t block, int64_t row) {
    const int64_t at = w.row0 + row, sample = in_.order[at];
    const S* saved = p_.saved + ((t * blocks_ + block) * shape_.B + at) * (kSavedVectors * L);
    const Vec<S> i = load(saved), f = load(saved + L), g = load(saved + 2 * L),
                 o = load(saved + 3 * L), tanh_c = tanh<S>(load(saved + 4 * L));
    const bool reset = in_.resets(t, at);
    if (step > 0) {
      const int64_t next = in_.time(step - 1);
      const S* to_come =
          p_.saved + ((next * blocks_ + block) * shape_.B + at) * (kSavedVectors * L);
      for (int v = 0; v < kSavedVectors; ++v) __builtin_prefetch(to_come + v * L);
      if (p_.dy)
        __builtin_prefetch(p_.dy + next * p_.dy_stride_t + sample * p_.dy_stride_b + block * L);
    }
    Vec<S> c_before;
    if (reset) {
      c_before = Vec<S>{};
    } else if (t == in_.first_time(at)) {
      c_before = load_part(in_.c0 + sample * shape_.H + block * L, tail(block));
    } else {
      const int64_t t_before = in_.time(step - 1);
      c_before = load(p_.saved + ((t_before * blocks_ + block) * shape_.B + at) *
                                     (kSavedVectors * L) + 4 * L);
    }
    if (p_.dy) {
      const S* dy = p_.dy + t * p_.dy_stride_t + sample * p_.dy_stride_b;
      dh += p_.dy_same ? splat(*dy) : load_part(dy + block * L, tail(block));
    }
    S* carried = w.dc + (block * w.rows + row) * L;
    const Vec<S> dc = load(carried) + dh * o * (S(1) - tanh_c * tanh_c);
    store(carried, reset ? Vec<S>{} : dc * f);
    S* da = da_at(w, block, slot, row);
    store(da, dc * g * i * (S(1) - i));
    store(da + L, dc * c_before * f * (S(1) - f));
    store(da + 2 * L, dc * i * (S(1) - g * g));
    store(da + 3 * L, dh * tanh_c * o * (S(1) - o));
  }

  // Rows [begin, end) took their first step at `step`: what is left goes to h_0 and c_0.
  void leave(const Walk& w, int64_t step, int64_t slot, int64_t begin, int64_t end) {
    const int64_t t = in_.time(step);
    for (int64_t q = w.panels.begin; q < w.panels.end; ++q)
      with_vectors(vectors_of(q), [&](auto vectors) {
        constexpr int NV = decltype(vectors)::value;
        for_row_tiles(begin, end, [&](int64_t row, auto count) {
          constexpr int MR = decltype(count)::value;
          Tile<S, MR, NV> dh;
          dh.clear();
          if (!all_cut(w, t, row, row + MR)) {
            multiply_gates(w, slot, row, panel_h_() + q * panel_size(), &dh);
            drop_cut_rows(w, t, row, &dh);
          }
          for (int i = 0; i < MR; ++i)
            for (int j = 0; j < NV; ++j) {
              const int64_t block = q * width_ + j;
              const int64_t to = in_.order[w.row0 + row + i] * shape_.H + block * L;
              store_part(p_.dh0 + to, dh.v[i][j], tail(block));
              store_part(p_.dc0 + to, load(w.dc + (block * w.rows + row + i) * L), tail(block));
            }
        });
      });
  }

  // Calls f(slot, index, rows) for the runs of (step, row) pairs that lie side by side in both
  // operands; index counts rows of the chunk from the step walked first, which had number n.
  template <typename F>
  TT_INLINE void for_runs(const Walk& w, int64_t step, int64_t steps, int64_t n, const F& f) {
    for (int64_t k = 0; k < steps;) {
      const int64_t slot = (n + k) % slots_;
      const int64_t active = active_rows(in_, in_.time(step + steps - 1 - k), w.row0, w.rows);
      int64_t whole = 1;
      if (active == w.rows)
        while (k + whole < steps && slot + whole < slots_ &&
               active_rows(in_, in_.time(step + steps - 1 - k - whole), w.row0, w.rows) == active)
          ++whole;
      f(slot, k * w.rows, whole == 1 ? active : whole * w.rows);
      k += whole;
    }
  }

  void add_weight_gradients(const Walk& w, int64_t step, int64_t steps, int64_t n) {
    for (int64_t block = w.blocks.begin; block < w.blocks.end; ++block)
      for (int64_t column = 0; column < columns_; column += kRegisterRows)
        with_rows(columns_ - column < kRegisterRows ? columns_ - column : kRegisterRows,
                  [&](auto count) {
                    Tile<S, decltype(count)::value, 4> sum;
                    S* to = w.dw + (block * columns_ + column) * kGates;
                    sum.prefetch(to);
                    sum.clear();
                    for_runs(w, step, steps, n, [&](int64_t slot, int64_t index, int64_t rows) {
                      sum.multiply(hx_at(w, index, column), 1, kRegisterRows,
                                   da_at(w, block, slot, 0), rows);
                    });
                    sum.add_to(to);
                  });
  }

  void input_gradients(const Walk& w, int64_t step, int64_t steps, int64_t n) {
    const int64_t vectors_in_all = divide_up(shape_.I, L);
    for_runs(w, step, steps, n, [&](int64_t slot, int64_t index, int64_t rows) {
      const Share own(rows, w.member.begin, w.member.end, schedule_.team);
      for (int64_t q = 0; q < panels_x_; ++q) {
        const int64_t left = vectors_in_all - q * kPanelVectors;
        const S* panel = panel_x_() + q * kPanelVectors * L * blocks_ * kGates;
        with_vectors(left, [&](auto vectors) {
          constexpr int NV = decltype(vectors)::value;
          for_row_tiles(own.begin, own.end, [&](int64_t row, auto count) {
            constexpr int MR = decltype(count)::value;
            Tile<S, MR, NV> dx;
            dx.clear();
            multiply_gates(w, slot, row, panel, &dx);
            for (int i = 0; i < MR; ++i) {
              const int64_t r = index + row + i;
              const int64_t t = in_.time(step + steps - 1 - r / w.rows);
              const int64_t sample = in_.order[w.row0 + r % w.rows];
              for (int j = 0; j < NV; ++j) {
                const int64_t column = (q * kPanelVectors + j) * L;
                store_part(p_.dx + (t * shape_.B + sample) * shape_.I + column, dx.v[i][j],
                           shape_.I - column);
              }
            }
          });
        });
      }
    });
  }

  void scatter_columns(int64_t block, int64_t begin, int64_t end) {
    alignas(64) S sums[kScatter * kGates];
    std::memcpy(sums, dw_() + (block * columns_ + begin) * kGates,
                (end - begin) * kGates * sizeof(S));
    for (int64_t group = 1; group < plan_.groups; ++group) {
      const S* from = dw_() + group * dw_size() + (block * columns_ + begin) * kGates;
      for (int64_t v = 0; v < (end - begin) * kGates; v += L)
        store(sums + v, load(sums + v) + load(from + v));
    }
    const int64_t units = tail(block) < L ? tail(block) : L;
    for (int64_t gate = 0; gate < 4; ++gate)
      for (int64_t lane = 0; lane < units; ++lane) {
        const int64_t row = gate * shape_.H + block * L + lane;
        for (int64_t column = begin; column < end; ++column) {
          const S value = sums[((column - begin) * 4 + gate) * L + lane];
          if (column < shape_.H) {
            p_.dweight_hh[row * shape_.H + column] = value;
          } else if (column < shape_.H + shape_.I) {
            p_.dweight_ih[row * shape_.I + column - shape_.H] = value;
          } else {
            p_.dbias[row] = value;
          }
        }
      }
  }

  const LstmBackward<S>& p_;
  const LstmInput<S>& in_;
  const LstmShape shape_;
  const LstmPlan plan_;
  const LstmSchedule schedule_;
  const int64_t blocks_, width_, panels_, panels_x_, most_rows_, slots_, columns_;
  Scratch scratch_;
  Span<S> panel_h_, panel_x_, da_, dc_, hx_, dw_;
  Span<Barrier> barriers_;
};

}  // namespace
}  // namespace throughtime
