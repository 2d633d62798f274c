// The backward walk through time on the CPU, with h-detach, for any cell.
//
// From the last step of the walk to the first, da_t the gradient of the gate sums:
//
//   dh_t = dy_t + (da_{t+1} W_hh, unless step t+1 is detached)     the cell: dh_t, dc_t to da_t, dc_{t-1}
//   A trace keeps dh_t and dc_t of every n-th step.
//   dW_hh = sum da_t^T h_{t-1}     dW_ih = sum da_t^T x_t     db = sum da_t     dx_t = da_t W_ih
//
// With a projection of the cell's output u the first line gives dr_t, then dh_t = dr_t W_hr,
// dW_hr = sum dr_t^T u_t.
//
// At a detached step there is no product da W_hh, and so no barrier.
//
// da is stored in blocks of units: [block][slot][row][G L], slot a ring over the steps of one chunk
// plus the one before. So one layout serves as the left operand of da W (scalars) and as the right
// operand of the weight gradient (vectors), and both read memory in order. Weight gradients are
// summed per chunk in registers, then per group, then over groups, always in the same order:
// results are bit-equal for every number of threads.
#pragma once

#include "recurrence/cpu/pack.h"
#include "recurrence/cpu/paired_weight_gradients.h"
#include "recurrence/cpu/plan.h"
#include "recurrence/cpu/recompute.h"
#include "recurrence/cpu/ring.h"
#include "recurrence/cpu/saved.h"

namespace throughtime {
namespace {

// Operand is the type of the gradients, states and weights in products, X what x, y and their gradients
// have in memory; sums are Cell::Number.
template <typename Cell, typename Operand = typename Cell::Number>
class BackwardWalk {
  using S = typename Cell::Number;
  using X = GivenAs<Operand>;
  using Activations = Saved<Cell, Operand>;
  static constexpr int64_t kTileRows = Tiling<Operand>::kRows, kPadding = Tiling<Operand>::kPadding;
  static constexpr bool kPads =
      Numbers<Operand>::kDepth > 1;  // products read zeros past the last k
  static constexpr int G = Cell::kGates;
  static constexpr int64_t L = kLanes<S>;
  static constexpr int64_t kGates = G * L;
  static_assert(walk_plan_detail::kWidestPanel == kPanelVectors, "a product takes every panel");
  static_assert(kGates % Numbers<Operand>::kDepth == 0, "da is multiplied block by block");

 public:
  BackwardWalk(const WalkBackward<X>& args, const Runtime& runtime)
      : p_(args),
        in_(args.in),
        shape_(args.in.shape),
        plan_(plan_walk(shape_, G, sizeof(Operand), Tiling<Operand>::kMatrixUnit)),
        schedule_(schedule_walk(shape_, G, plan_, runtime.threads, L)),
        blocks_(divide_up(shape_.H, L)),
        outputs_(divide_up(shape_.R, L)),
        projected_(in_.weight_hr != nullptr),
        width_(panel_width(blocks_, schedule_.members)),
        width_out_(panel_width(outputs_, schedule_.members)),
        most_rows_(divide_up(shape_.B, plan_.groups)),
        slots_(plan_.chunk + 1),
        ld_dr_(leading_dimension<Operand>(outputs_ * L)),
        ld_u_(round_up(L, Numbers<Operand>::kRun)),
        saved_numbers_(L * (p_.cell_only ? 1 : Activations::kVectors)),
        stream_trace_(traces_whole_vectors() &&
                      times(sizeof(S), traced_steps(shape_.T, p_.trace.every), in_.batch,
                            shape_.H) > kStreamBytes),
        scratch_(runtime),
        weights_(args, plan_, schedule_, &scratch_),
        again_(args, plan_, schedule_, slots_, &scratch_) {
    panel_h_ =
        scratch_.template reserve<Operand>(Panels<Operand>::numbers(blocks_ * kGates, outputs_));
    panel_x_ = scratch_.template reserve<Operand>(
        p_.dx ? Panels<Operand>::numbers(blocks_ * kGates, divide_up(shape_.I, L)) : 0);
    panel_r_ =
        scratch_.template reserve<Operand>(projected_, Panels<Operand>::numbers(shape_.R, blocks_));
    const int64_t teams = schedule_.teams, projecting = projected_ ? teams : 0;
    da_ = scratch_.template reserve<Operand>(teams, blocks_, slots_, rows_of(most_rows_), kGates);
    dc_ = scratch_.template reserve<S>(Cell::kCarriesCell ? teams : 0, blocks_, most_rows_, L);
    dr_ = scratch_.template reserve<Operand>(projecting, slots_, rows_of(most_rows_), ld_dr_);
    u_ = scratch_.template reserve<Operand>(projecting, blocks_, slots_, most_rows_, ld_u_);
    barriers_ = scratch_.template reserve<Barrier>(schedule_.teams + 1);
  }

  void run(const Runtime& runtime) {
    scratch_.allocate();
    run_workers(runtime, schedule_, barriers_(), *this);
  }

  int64_t blocks() const { return blocks_; }

  void prepare(Share blocks) {
    pack_rows(panel_h(), shape_.R, blocks.of(panel_h().count(), blocks_),
              [&](int64_t n) { return gate_row<G>(in_.weight_hh, shape_.H, shape_.R, n); });
    if (p_.dx)
      pack_rows(panel_x(), shape_.I, blocks.of(panel_x().count(), blocks_),
                [&](int64_t n) { return gate_row<G>(in_.weight_ih, shape_.H, shape_.I, n); });
    if (again_.wanted()) again_.prepare(blocks);
    if (projected_)
      pack_rows(panel_r(), shape_.H, blocks.of(panel_r().count(), blocks_),
                [&](int64_t n) { return in_.weight_hr + n * shape_.H; });
  }

  void walk(const Member& member) {
    for (int64_t group = member.team; group < plan_.groups; group += schedule_.teams)
      walk_group(member, group, group_rows(shape_, plan_, group));
  }

  void finish(Share blocks) {
    if (weights_.wanted() && !finishes_early()) weights_.finish(blocks);
    if (stream_trace_) stream_fence();
  }

 private:
  struct Group : GroupPart {
    Share panels;      // own panels of units: those of `blocks`
    Share panels_out;  // own panels of outputs; without a projection, the same
    Ring<Operand> da;  // [blocks][slots][rows][G L]
    S* dc;             // [blocks, rows, L]
    Ring<Operand> dr;  // [1][slots][rows][ld_dr], with a projection only, as the next
    Ring<Operand> u;   // [blocks][slots][rows][ld_u]: the cell's output
    Ring<S> again;     // [blocks][slots][rows][kSaved L]: what is not saved
  };

  // A trace beyond this leaves the cache to the walk.
  static constexpr int64_t kStreamBytes = 2 << 20;

  template <bool kValue>
  struct Flag {
    static constexpr bool value = kValue;
  };

  // A step of the walk, its time, and its slot in the rings.
  struct Step {
    int64_t step, t, slot;
  };

  Panels<Operand> panel_h() const { return {panel_h_(), blocks_ * kGates, outputs_, width_out_}; }
  Panels<Operand> panel_x() const { return {panel_x_(), blocks_ * kGates, divide_up(shape_.I, L)}; }
  Panels<Operand> panel_r() const { return {panel_r_(), shape_.R, blocks_, width_}; }
  int64_t tail(int64_t block) const { return shape_.H - block * L; }
  int64_t tail_out(int64_t vector) const { return shape_.R - vector * L; }

  void walk_group(const Member& member, int64_t group, Share group_rows) {
    const int64_t team = member.team, rows = group_rows.end - group_rows.begin;
    const auto own = [&](int64_t count) {
      return Share(count, member.begin, member.end, schedule_.members);
    };
    const Share blocks =
        member_blocks(blocks_, width_, member.begin, member.end, schedule_.members);
    const Group g{{member, schedule_.members, group_rows.begin, rows, blocks},
                  own(panel_r().count()),
                  own(panel_h().count()),
                  {da_(team), slots_, rows_of(rows), kGates},
                  dc_(team),
                  {projected_ ? dr_(team) : nullptr, slots_, rows_of(rows), ld_dr_},
                  {projected_ ? u_(team) : nullptr, slots_, rows, ld_u_},
                  again_.ring(team, rows)};
    if (kPads) clear_rings(g);
    const int64_t longest = in_.length(g.row0);
    if (weights_.wanted() && longest == 0) weights_.clear(g, group);
    pass_through_empty(g);
    const int64_t first = in_.reverse ? shape_.T - longest : 0;
    Chunk chunk{in_.reverse ? shape_.T : longest, 0, 0, false};
    for (int64_t walked = 0; chunk.step > first; chunk.n += chunk.steps) {
      chunk.steps = least(chunk.step - first, plan_.chunk);
      chunk.step -= chunk.steps;
      chunk.last = finishes_early() && chunk.step == first;
      if (weights_.wanted()) weights_.gather(g, chunk);
      if (again_.wanted()) {
        again_.gather(g, chunk);
        member.wait();
        again_.run(g, chunk, g.again, [&](int64_t step, int64_t block, int64_t at) {
          return cell_before(step, in_.time(step), block, at);
        });
      }
      for (int64_t k = 0; k < chunk.steps; ++k) {
        const Step now = step_at(chunk.step + chunk.steps - 1 - k, chunk.n + k);
        const int64_t active = active_rows(in_, now.t, g.row0, g.rows);
        retreat(g, now, step_at(now.step + 1, chunk.n + k + slots_ - 1), active, walked);
        walked = active;
        if (k + 1 < chunk.steps && !all_detached(g, now.t, 0, active)) member.wait();
      }
      member.wait();
      if (weights_.wanted()) {
        weights_.add(g, group, chunk, g.da);
        if (projected_) weights_.add_projection(g, group, chunk, g.dr, g.u);
      }
      if (p_.dx) input_gradients(g, chunk);
      if (chunk.step == first) leave(g, step_at(first, chunk.n + chunk.steps - 1), 0, walked);
      member.wait();
    }
  }

  // One group finishes the weight gradients of a block where it has their sums.
  bool finishes_early() const { return plan_.groups == 1 && in_.length(0) > 0; }

  // Rows in memory of so many rows of a group, where products read them.
  static int64_t rows_of(int64_t rows) { return round_up(rows, kPadding); }

  // Products read zeros past the last k, and whole tiles of rows.
  void clear_rings(const Group& g) {
    const auto clear = [](const Ring<Operand>& ring, Share blocks) {
      const int64_t size = ring.slots * ring.rows * ring.width;
      std::memset(ring.base + blocks.begin * size, 0,
                  (blocks.end - blocks.begin) * size * sizeof(Operand));
    };
    clear(g.da, g.blocks);
    if (!projected_) return;
    if (g.member.begin == 0) clear(g.dr, Share(1, 0, 1));
    g.member.wait();
  }

  // A row without any step hands its state, and so its gradient, straight through.
  void pass_through_empty(const Group& g) {
    for (int64_t row = g.rows - 1; row >= 0 && in_.length(g.row0 + row) == 0; --row) {
      const int64_t sample = in_.order[g.row0 + row];
      const Share own = member_blocks(outputs_, width_out_, g.member.begin, g.member.end, g.team);
      for (int64_t vector = own.begin; vector < own.end; ++vector) {
        const int64_t at = sample * shape_.R + vector * L;
        store_part(p_.dh0 + at, load_or_zero(p_.dh_n, at, tail_out(vector)), tail_out(vector));
      }
      for (int64_t block = g.blocks.begin; Cell::kCarriesCell && block < g.blocks.end; ++block) {
        const int64_t at = sample * shape_.H + block * L;
        store_part(p_.dc0 + at, load_or_zero(p_.dc_n, at, tail(block)), tail(block));
      }
    }
  }

  TT_INLINE static Vec<S> load_or_zero(const S* from, int64_t at, int64_t count) {
    return from ? load_part(from + at, count) : Vec<S>{};
  }

  bool all_detached(const Group& g, int64_t t, int64_t begin, int64_t end) const {
    if (!p_.detach && !in_.reset) return false;
    if (p_.detach && p_.detach_stride_b == 0 && p_.detach[t * p_.detach_stride_t]) return true;
    for (int64_t row = begin; row < end; ++row)
      if (!p_.detaches(t, g.row0 + row)) return false;
    return true;
  }

  // The n-th step that is walked.
  Step step_at(int64_t step, int64_t n) const { return {step, in_.time(step), n % slots_}; }

  // One step back in time: rows [0, active) are inside their sequence at this step, rows
  // [0, walked) were at the step after it.
  void retreat(const Group& g, Step now, Step after, int64_t active, int64_t walked) {
    const int64_t going_on = least(active, walked);
    if (active < walked) leave(g, after, active, walked);
    enter_cells(g, going_on, active);
    if (p_.dcells) add_cell_gradient(g, now.t, active);
    for (int64_t q = g.panels_out.begin; q < g.panels_out.end; ++q) {
      const int64_t vector = q * width_out_, vectors = panel_h().width_of(q);
      for_product_rows<Operand>(0, going_on, [&](int64_t row, int64_t height) {
        TileBuffer<S, kTileRows> dh;
        {
          const Timing timing(g.member.watch, kRecurrent);
          recurrent_gradient(g, after, row, height, q, dh.numbers);
        }
        put_gradient(g, dh.numbers, height, vectors, now, vector, row);
      });
      for_product_rows<Operand>(going_on, active, [&](int64_t row, int64_t height) {
        TileBuffer<S, kTileRows> dh;
        load_h_n(g, row, height, vector, vectors, dh.numbers);
        put_gradient(g, dh.numbers, height, vectors, now, vector, row);
      });
    }
    if (projected_) {
      g.member.wait();
      unproject(g, now, active);
    }
  }

  // Rows of da as the left operand of a product.
  Left<Operand> da_rows(const Group& g, int64_t slot, int64_t row) const {
    return {g.da.at(0, slot, row), kGates, kGates, blocks_, slots_ * g.da.rows * kGates};
  }

  // What the gates of a step hand to the outputs before it, to a TileBuffer.
  void recurrent_gradient(const Group& g, Step after, int64_t row, int64_t height, int64_t panel,
                          S* dh) {
    const int64_t size = panel_h().width_of(panel) * L;
    if (all_detached(g, after.t, row, row + height)) {
      std::memset(dh, 0, height * size * sizeof(S));
      return;
    }
    product(da_rows(g, after.slot, row), panel_h(), panel, height,
            {.at = dh, .row_stride = size, .whole = true});
    if (!p_.detach && !in_.reset) return;
    for (int64_t i = 0; i < height; ++i) {
      const int64_t at = g.row0 + row + i;
      const bool detached = p_.detaches(after.t, at);
      if (!detached && !in_.resets(after.t, at)) continue;
      if (!detached) put_reset_gradient(after.t, at, panel, dh + i * size);
      std::memset(dh + i * size, 0, size * sizeof(S));
    }
  }

  // The gradient of the h that a step starts anew from.
  void put_reset_gradient(int64_t t, int64_t at, int64_t panel, const S* dh) {
    for (int64_t j = 0; j < panel_h().width_of(panel); ++j) {
      const int64_t vector = panel * width_out_ + j;
      S* to = p_.dreset_h + (t * in_.batch + in_.order[at]) * shape_.R + vector * L;
      store_part(to, load(dh + j * L), tail_out(vector));
    }
  }

  void load_h_n(const Group& g, int64_t row, int64_t height, int64_t vector, int64_t vectors,
                S* dh) {
    for (int64_t i = 0; i < height; ++i)
      for (int64_t j = 0; j < vectors; ++j, dh += L) {
        const int64_t from = in_.order[g.row0 + row + i] * shape_.R + (vector + j) * L;
        store(dh, load_or_zero(p_.dh_n, from, tail_out(vector + j)));
      }
  }

  // The gradient of an output goes on to the cells, or waits for the others before a projection.
  void put_gradient(const Group& g, S* dh, int64_t height, int64_t vectors, Step now,
                    int64_t vector, int64_t row) {
    const Timing timing(g.member.watch, kPointwise);
    if (p_.dy) add_output_gradient(g, dh, height, vectors, now.t, vector, row);
    if (traces(now)) trace_output(g, dh, height, vectors, now.t, vector, row);
    if (projected_) {
      for (int64_t i = 0; i < height; ++i)
        for (int64_t j = 0; j < vectors; ++j, dh += L) {
          watch_range(row + g.row0 + i, load(dh));
          Numbers<Operand>::put_part(g.dr.at(0, now.slot, row + i), (vector + j) * L, load(dh),
                                     kPads ? tail_out(vector + j) : L);
        }
    } else {
      cells(g, dh, height, vectors, now, vector, row);
    }
  }

  void add_output_gradient(const Group& g, S* dh, int64_t height, int64_t vectors, int64_t t,
                           int64_t vector, int64_t row) {
    for (int64_t i = 0; i < height; ++i) {
      const int64_t sample = in_.order[g.row0 + row + i];
      const X* dy = p_.dy + t * p_.dy_stride_t + sample * p_.dy_stride_b;
      for (int64_t j = 0; j < vectors; ++j, dh += L)
        store(dh, load(dh) + (p_.dy_same ? splat(Numbers<X>::wide(*dy))
                                         : Numbers<X>::vector_part(dy + (vector + j) * L,
                                                                   tail_out(vector + j))));
    }
  }

  bool traces(Step now) const { return p_.trace.keeps(shape_.T - 1 - now.step); }

  // Whether each vector of a trace has a place of its own size and alignment.
  bool traces_whole_vectors() const {
    const auto aligned = [](const S* at) {
      return reinterpret_cast<uintptr_t>(at) % (L * sizeof(S)) == 0;
    };
    return p_.trace.c && shape_.H % L == 0 && shape_.R % L == 0 && aligned(p_.trace.h) &&
           aligned(p_.trace.c);
  }

  TT_INLINE void put_trace(S* to, Vec<S> v, int64_t count) const {
    stream_trace_ ? stream(to, v) : store_part(to, v, count);
  }

  void trace_output(const Group& g, const S* dh, int64_t height, int64_t vectors, int64_t t,
                    int64_t vector, int64_t row) {
    for (int64_t i = 0; i < height; ++i) {
      S* to = p_.trace.h + (p_.trace.place(t) * in_.batch + in_.order[g.row0 + row + i]) * shape_.R;
      for (int64_t j = 0; j < vectors; ++j, dh += L)
        put_trace(to + (vector + j) * L, load(dh), tail_out(vector + j));
    }
  }

  void unproject(const Group& g, Step now, int64_t active) {
    const Timing timing(g.member.watch, kProjection);
    for (int64_t q = g.panels.begin; q < g.panels.end; ++q) {
      for_product_rows<Operand>(0, active, [&](int64_t row, int64_t height) {
        TileBuffer<S, kTileRows> dh;
        product<Operand>(
            {g.dr.at(0, now.slot, row), ld_dr_, shape_.R}, panel_r(), q, height,
            {.at = dh.numbers, .row_stride = panel_r().width_of(q) * L, .whole = true});
        const Timing timing(g.member.watch, kPointwise);
        cells(g, dh.numbers, height, panel_r().width_of(q), now, q * width_, row);
      });
    }
  }

  // The last step of a sequence gets the gradient of its cell state from c_n.
  void enter_cells(const Group& g, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t block = g.blocks.begin; Cell::kCarriesCell && block < g.blocks.end; ++block) {
        const int64_t from = in_.order[g.row0 + row] * shape_.H + block * L;
        store(g.dc + (block * g.rows + row) * L, load_or_zero(p_.dc_n, from, tail(block)));
      }
  }

  // What a user of c_t itself hands to it.
  void add_cell_gradient(const Group& g, int64_t t, int64_t active) {
    const Timing timing(g.member.watch, kPointwise);
    for (int64_t block = g.blocks.begin; Cell::kCarriesCell && block < g.blocks.end; ++block)
      for (int64_t row = 0; row < active; ++row) {
        const int64_t from = (t * in_.batch + in_.order[g.row0 + row]) * shape_.H + block * L;
        S* dc = g.dc + (block * g.rows + row) * L;
        store(dc, load(dc) + load_part(p_.dcells + from, tail(block)));
      }
  }

  // Gradients of the outputs of `height` rows and `vectors` blocks to those of the gate sums.
  void cells(const Group& g, const S* dh, int64_t height, int64_t vectors, Step now, int64_t block,
             int64_t row) {
    for (int64_t j = 0; j < vectors; ++j) {
      const auto run = [&](auto again, auto traces) {
        cells_of_block<again.value, traces.value>(g, dh + j * L, vectors * L, height, now,
                                                  block + j, row);
      };
      const auto traces_if = [&](auto again) {
        traces(now) ? run(again, Flag<true>{}) : run(again, Flag<false>{});
      };
      again_.wanted() ? traces_if(Flag<true>{}) : traces_if(Flag<false>{});
    }
  }

  // kAgain: only c was saved. kTraces: dc is kept.
  template <bool kAgain, bool kTraces>
  void cells_of_block(const Group& g, const S* dh, int64_t dh_stride, int64_t height, Step now,
                      int64_t block, int64_t row) {
    const int64_t at = g.row0 + row, t = now.t, slot = now.slot;
    const bool watch = in_.lengths || in_.reset || t == in_.first_time(at);
    const int64_t* order = in_.order + at;
    const S* saved_step = saved_at(t, block);
    const S* step_before = now.step > 0 ? saved_at(in_.time(now.step - 1), block) : saved_step;
    const S* again = kAgain ? g.again.at(block, slot, row) : nullptr;
    constexpr int64_t saved_numbers = kAgain ? L : Activations::kVectors * L;
    S* carried = g.dc + (block * g.rows + row) * L;
    Operand* da = g.da.at(block, slot, row);
    Operand* u = projected_ ? g.u.at(block, slot, row) : nullptr;
    S* trace =
        kTraces ? p_.trace.c + p_.trace.place(t) * in_.batch * shape_.H + block * L : nullptr;
    for (int64_t r = 0; r < height; ++r) {
      const S *saved = saved_step + order[r] * saved_numbers,
              *before = step_before + order[r] * saved_numbers;
      Vec<S> kept[Cell::kSaved], gates[G], c_before{}, dc{};
      if constexpr (kAgain) {
        load_vectors<Cell::kSaved>(again, L, kept);
        again += Cell::kSaved * L;
      } else {
        Activations::get(saved, kept);
      }
      if (Cell::kCarriesCell) {
        c_before = watch    ? cell_before(now.step, t, block, at + r)
                   : kAgain ? load(before)
                            : Activations::cell(before);
        for (int64_t v = 0; v < saved_numbers - L; v += L) __builtin_prefetch(before + v);
        dc = load(carried);
      }
      const Vec<S> output = Cell::retreat(kept, c_before, load(dh), &dc, gates);
      if constexpr (Cell::kCarriesCell) {
        if (kTraces) put_trace(trace + order[r] * shape_.H, dc, tail(block));
        dc = Cell::hand_on(kept, dc);
        if (watch && in_.resets(t, at + r)) {
          if (p_.dreset_c) {
            S* to = p_.dreset_c + (t * in_.batch + in_.order[at + r]) * shape_.H + block * L;
            store_part(to, dc, tail(block));
          }
          dc = Vec<S>{};
        }
        store(carried, dc);
        carried += L;
      }
      if (tail(block) < L) clear_padding(gates, tail(block));
      for (const Vec<S>& gate : gates) watch_range(at + r, gate);
      store_vectors<G>(da, L, gates);
      if (u) {
        Numbers<Operand>::put(u, 0, output);
        u += ld_u_;
      }
      dh += dh_stride;
      da += kGates;
    }
  }

  // Elements past the last unit: infinity times a weight of zero has made them NaN.
  TT_INLINE static void clear_padding(Vec<S>* gates, int64_t units) {
    for (int gate = 0; gate < G; ++gate) {
      alignas(kVectorBytes) S lanes[L];
      store(lanes, gates[gate]);
      gates[gate] = load_part(lanes, units);
    }
  }

  // Products of bounded numbers take no others: the caller learns which sample has them.
  TT_INLINE void watch_range(int64_t at, Vec<S> v) const {
    if constexpr (Numbers<Operand>::kBounded)
      if (__builtin_expect(!Numbers<Operand>::holds(v), 0))
        __atomic_store_n(p_.beyond + in_.order[at], true, __ATOMIC_RELAXED);
  }

  // What was saved of the first sample.
  const S* saved_at(int64_t t, int64_t block) const {
    return p_.saved + (t * blocks_ + block) * in_.batch * saved_numbers_;
  }
  TT_INLINE Vec<S> cell(const S* saved) const {
    return p_.cell_only ? load(saved) : Activations::cell(saved);
  }

  Vec<S> cell_before(int64_t step, int64_t t, int64_t block, int64_t at) const {
    if (in_.resets(t, at)) {
      const S* from = in_.reset_c_at(t, at);
      return from ? load_part(from + block * L, tail(block)) : Vec<S>{};
    }
    if (t != in_.first_time(at))
      return cell(saved_at(in_.time(step - 1), block) + in_.order[at] * saved_numbers_);
    return load_part(in_.c0 + in_.order[at] * shape_.H + block * L, tail(block));
  }

  // Rows [begin, end) took their first step then: what is left goes to h_0 and c_0. A whole tile of rows
  // may begin before them: past the last row others write the next step.
  void leave(const Group& g, Step first, int64_t begin, int64_t end) {
    const int64_t whole = begin / kPadding * kPadding;
    for (int64_t q = g.panels_out.begin; q < g.panels_out.end; ++q)
      for_product_rows<Operand>(whole, end, [&](int64_t row, int64_t height) {
        TileBuffer<S, kTileRows> dh;
        recurrent_gradient(g, first, row, height, q, dh.numbers);
        const int64_t vectors = panel_h().width_of(q);
        for (int64_t i = most(begin - row, 0); i < height; ++i)
          for (int64_t j = 0; j < vectors; ++j) {
            const int64_t vector = q * width_out_ + j;
            const int64_t to = in_.order[g.row0 + row + i] * shape_.R + vector * L;
            store_part(p_.dh0 + to, load(dh.numbers + (i * vectors + j) * L), tail_out(vector));
          }
      });
    for (int64_t row = begin; row < end; ++row)
      for (int64_t block = g.blocks.begin; Cell::kCarriesCell && block < g.blocks.end; ++block) {
        const int64_t to = in_.order[g.row0 + row] * shape_.H + block * L;
        store_part(p_.dc0 + to, load(g.dc + (block * g.rows + row) * L), tail(block));
      }
  }

  void input_gradients(const Group& g, const Chunk& chunk) {
    const Timing timing(g.member.watch, kInputGradients);
    const Panels<Operand> weight = panel_x();
    for_runs(in_, g, chunk, g.da, [&](int64_t slot, int64_t index, int64_t rows) {
      const Share tiles =
          g.own(divide_up(rows, kPadding));  // none reaches past the rows of the ring
      const int64_t begin = tiles.begin * kPadding, end = least(tiles.end * kPadding, rows);
      for (int64_t q = 0; q < weight.count(); ++q)
        for_product_rows<Operand>(begin, end, [&](int64_t row, int64_t height) {
          TileBuffer<S, kTileRows> dx;
          const int64_t vectors = weight.width_of(q);
          // Vectors sum a few blocks at a time: the fewer inputs, the shorter are the chains of BLAS.
          const int64_t part = Tiling<Operand>::kMatrixUnit ? blocks_ : 2;
          for (int64_t block = 0; block < blocks_; block += part) {
            Left<Operand> rows_of_part = da_rows(g, slot, row);
            rows_of_part.at += block * rows_of_part.block_stride;
            rows_of_part.blocks = least(part, blocks_ - block);
            const Panels<Operand> columns{weight.place(q, block * kGates, 0),
                                          rows_of_part.blocks * kGates, vectors, vectors};
            product(
                rows_of_part, columns, 0, height,
                {.at = dx.numbers, .row_stride = vectors * L, .begun = block > 0, .whole = true});
          }
          for (int64_t i = 0; i < height; ++i) {
            const int64_t r = index + row + i;
            const int64_t t = in_.time(chunk.step + chunk.steps - 1 - r / g.rows);
            const int64_t sample = in_.order[g.row0 + r % g.rows];
            X* to = p_.dx + (t * in_.batch + sample) * shape_.I;
            for (int64_t j = 0; j < vectors; ++j) {
              const int64_t column = (q * kPanelVectors + j) * L;
              Numbers<X>::put_part(to, column, load(dx.numbers + (i * vectors + j) * L),
                                   shape_.I - column);
            }
          }
        });
    });
  }

  const WalkBackward<X>& p_;
  const WalkInput<X>& in_;
  const WalkShape shape_;
  const WalkPlan plan_;
  const WalkSchedule schedule_;
  const int64_t blocks_, outputs_;
  const bool projected_;
  const int64_t width_, width_out_, most_rows_, slots_, ld_dr_, ld_u_;
  const int64_t saved_numbers_;  // per step, row and block of units
  const bool stream_trace_;
  Scratch scratch_;
  WeightGradients<Cell, Operand> weights_;
  Recomputation<Cell, Operand> again_;
  Span<Operand> panel_h_, panel_x_, panel_r_, da_, dr_, u_;
  Span<S> dc_;
  Span<Barrier> barriers_;
};

}  // namespace
}  // namespace throughtime
