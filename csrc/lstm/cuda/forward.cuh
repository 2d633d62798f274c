// The LSTM's recurrence on GPUs, forward, all T steps in one launch.
//
//     a_t = projected_t + bias + h_{t-1} W_hh^T   i, f, g, o = sigmoid, sigmoid, tanh, sigmoid of a_t
//     c_t = f c_{t-1} + i g                       h_t = o tanh(c_t)
//
// Grid: a group of `ranks` blocks walks 8 kTiles samples in one direction; group = block / ranks,
// those of direction 0 first. Block `rank` owns
// `units` units, a warp 8 of them with all four gates, a lane one unit of 2 samples per tile: c, h and
// the gates' sums stay in its registers. The inner dimension of the product may be cut among `parts`
// warps; then the first of them adds up and owns the units.
//
// A step: product of the block's rows of W_hh with h (shared memory), the cell, and h_t sent into every
// block of the group: by mail in a cluster, through global memory and a barrier between blocks of a
// grid. What else leaves is stored afterwards, since a barrier would wait for it; projected of the next
// step is loaded then too, and was asked into the L2 cache several steps before.
//
// Mail needs no barrier, as h has two places: whoever has all mail of a step knows that every block has
// read what lies where the next mail goes, because a block sends only after it has read.
//
// Rounded to S: what leaves (y, h_n) and h_{t-1} as the product's operand; gates: see gates.cuh. A sample
// past its end keeps its state; what is loaded for it is never used.
#pragma once

#include "lstm/cuda/samples.cuh"

namespace throughtime {

template <typename S, int kTiles, int kHeld>
class ForwardBlock {
 public:
  TT_DEVICE explicit ForwardBlock(const RecurrenceForward<S>& p)
      : p_(p),
        in_(p.in),
        T_(static_cast<int>(p.in.T)),
        H_(static_cast<int>(p.in.H)),
        rank_(block() % in_.cut.ranks),
        group_(block() / in_.cut.ranks),
        slabs_(in_.cut.units / kSlabUnits),
        slab_(warp() % slabs_),
        part_(warp() / slabs_),
        unit0_(rank_ * in_.cut.units + slab_ * kSlabUnits),
        stride_(operand_stride(H_, sizeof(S))),
        layout_(forward_layout(H_, in_.cut.units, in_.cut.parts, in_.cut.grid, kTiles, kHeld,
                               sizeof(S))),
        samples_(p.in, group_) {}

  TT_DEVICE void run() {
    const bool owner = part_ == 0 && unit0_ < H_;
    start();
    Loaded now;
    if (owner) {
      load_state();
      if (kLoadEarly) load(now, 0);
    }
    begin();
    // Nobody needs a warp without units that shares no product, and nobody would wait for it.
    const bool idle = unit0_ >= H_ && in_.cut.parts == 1 && !in_.cut.grid && in_.cut.ranks > 1;
    for (int s = 0; s < T_ && !idle; ++s) {
      const bool last = s + 1 == T_;
      if (!kLoadEarly && owner) load(now, s);
      float sums[kTiles][8];
      multiply(in_.cut.grid ? 0 : s & 1, sums);
      if (in_.cut.parts > 1) add_parts(sums);
      if (owner) {
        step(samples_.time(in_, s), now, sums);
        if (!last) push(s);
      }
      if (!last) arrive();
      if (owner) {
        record(samples_.time(in_, s), sums);
        if (kLoadEarly && !last) load(now, s + 1);
      }
      if (last) break;
      wait(s);
      if (in_.cut.grid) copy((s + 1) & 1);
    }
    if (owner) store_state();
  }

 private:
  // Before the wait, unless registers would spill.
  static constexpr bool kLoadEarly = kTiles < 4;

  struct Loaded {
    float projected[kTiles][8];
    bool reset[kTiles][2];
  };

  TT_DEVICE S* operand(int copy) const {
    return reinterpret_cast<S*>(shared_memory()) + copy * 8 * kTiles * stride_;
  }
  // The group's h in global memory: [2][samples][H].
  TT_DEVICE S* exchanged(int copy) const {
    return static_cast<S*>(in_.cut.exchange) + (group_ * 2 + copy) * (8 * kTiles * in_.H);
  }
  TT_DEVICE Mailbox* mailbox(int s) const {
    return reinterpret_cast<Mailbox*>(shared_memory() + layout_.mail) + s % 2;
  }
  TT_DEVICE uint32_t mail_bytes() const { return 8 * kTiles * H_ * sizeof(S); }

  // All that start() does is seen by those whom it concerns.
  TT_DEVICE void begin() {
    if (!in_.cut.grid && in_.cut.ranks > 1) {
      if (thread() == 0) {
        open_mailbox(mailbox(0), mail_bytes());
        open_mailbox(mailbox(1), mail_bytes());
      }
      cluster_barrier(Site::kStart);
    } else {
      block_barrier(Site::kStart);
    }
  }

  // What was sent before the arrival at the end of step s is there after the wait.
  TT_DEVICE void arrive() {
    if (in_.cut.grid) grid_arrive(Site::kForwardStep, in_.cut.arrivals + group_);
  }
  TT_DEVICE void wait(int s) {
    constexpr Site site = Site::kForwardStep;
    if (in_.cut.grid) {
      grid_wait(site, in_.cut.arrivals + group_, in_.cut.ranks * ++round_);
    } else if (in_.cut.ranks > 1) {
      wait_for_mail(site, mailbox(s), s / 2, mail_bytes());
      if (thread() == 0) expect_mail(mailbox(s), mail_bytes());
    } else {
      block_barrier(site);
    }
  }

  // Weights into registers and shared memory; h_0 and zeros into the operand.
  TT_DEVICE void start() {
    const Split split = split_k(H_, in_.cut.parts);
    first_tile_ = part_ * split.run;
    tiles_ = split.tiles - first_tile_ < split.run ? split.tiles - first_tile_ : split.run;
    product_.load(tiles_, shared_memory() + layout_.tail + warp() * layout_.warp_tail,
                  [&](int tile, int gate, int i) {
                    const int k = (first_tile_ + tile) * kTileK + lane() % 4 * 8;
                    const int unit = unit0_ + lane() / 4;
                    const int64_t gates = samples_.direction * 4 + gate;
                    const S* row = in_.weight + (gates * H_ + unit) * H_ + k;
                    const bool inside = unit < H_ && k < H_;
                    if constexpr (kMatrixUnit<S>) {
                      return inside ? *reinterpret_cast<const Words*>(row) : Words{};
                    } else {
                      return inside ? row[i] : 0.0f;
                    }
                  });
    const int copies = in_.cut.grid ? 1 : 2;
    for (int i = thread(); i < 8 * kTiles * stride_; i += threads()) {
      const int64_t n = samples_.first + i / stride_;
      const int k = i % stride_;
      operand(0)[i] = n < in_.B && k < H_ ? p_.h0[samples_.states(in_).at(n) * H_ + k] : S{};
      if (copies > 1) operand(1)[i] = S{};
    }
  }

  TT_DEVICE void load_state() {
    TT_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      TT_UNROLL
      for (int e = 0; e < 2; ++e) {
        const int64_t row = samples_.states(in_).at(samples_.at(j, e));
        const int64_t at = row * H_ + unit0_ + lane() / 4;
        const bool inside = samples_.at(j, e) < in_.B;
        c_[j][e] = inside ? in_.c0[at] : 0.0f;
        h_[j][e] = inside ? to_float(p_.h0[at]) : 0.0f;
      }
    }
  }

  TT_DEVICE void load(Loaded& to, int s) const {
    const int t = samples_.time(in_, s);
    const Rows rows = samples_.rows(in_, t);
    const int64_t steps = s + kPrefetchSteps < T_ ? samples_.time(in_, s + kPrefetchSteps) - t : 0;
    const int64_t later = steps * in_.B * in_.D * 4 * H_;
    TT_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      TT_UNROLL
      for (int e = 0; e < 2; ++e) {
        const bool active = t < samples_.length[j][e];
        const int64_t row = rows.at(samples_.at(j, e));
        TT_UNROLL
        for (int r = 0; r < 4; ++r) {
          const float* p = p_.projected + (row * 4 + r) * H_ + unit0_ + lane() / 4;
          to.projected[j][2 * r + e] = active ? *p : 0.0f;
          if (later != 0 && samples_.at(j, e) < in_.B) prefetch(p + later);
        }
        to.reset[j][e] = active && in_.reset &&
                         in_.reset[(samples_.direction * in_.T + t) * in_.B + samples_.at(j, e)];
      }
    }
  }

  // The sums of a part without tiles are 0.
  TT_DEVICE void multiply(int copy, float (&sums)[kTiles][8]) {
    TT_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      TT_UNROLL
      for (int i = 0; i < 8; ++i) sums[j][i] = 0.0f;
    }
    product_.multiply(
        tiles_, tiles_, stride_, [&](int) { return operand(copy) + first_tile_ * kTileK; },
        [&](int) {
          TT_UNROLL
          for (int j = 0; j < kTiles; ++j) {
            TT_UNROLL
            for (int i = 0; i < 8; ++i) sums[j][i] = product_.sum(j, i);
          }
        });
  }

  // The parts' sums, added in their order.
  TT_DEVICE void add_parts(float (&sums)[kTiles][8]) {
    auto* shared = reinterpret_cast<Pair*>(shared_memory() + layout_.sums);
    const auto at = [&](int part, int j, int r) {
      return (((part - 1) * slabs_ + slab_) * kTiles + j) * 128 + r * 32 + lane();
    };
    const bool inside = unit0_ < H_;  // without units nobody says when these places are free again
    if (part_ > 0 && inside) {
      TT_UNROLL
      for (int j = 0; j < kTiles; ++j) {
        TT_UNROLL
        for (int r = 0; r < 4; ++r) {
          shared[at(part_, j, r)] = {sums[j][2 * r], sums[j][2 * r + 1]};
        }
      }
    }
    block_barrier(Site::kForwardParts);
    if (part_ == 0 && inside) {
      for (int part = 1; part < in_.cut.parts; ++part) {
        TT_UNROLL
        for (int j = 0; j < kTiles; ++j) {
          TT_UNROLL
          for (int r = 0; r < 4; ++r) {
            const Pair other = shared[at(part, j, r)];
            sums[j][2 * r] += other.a;
            sums[j][2 * r + 1] += other.b;
          }
        }
      }
    }
  }

  // The cell; leaves what is saved of the gates in place of their sums.
  TT_DEVICE void step(int t, const Loaded& now, float (&sums)[kTiles][8]) {
    TT_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      TT_UNROLL
      for (int e = 0; e < 2; ++e) {
        const bool reset = now.reset[j][e];
        float gates[4];
        TT_UNROLL
        for (int r = 0; r < 4; ++r) {
          const int64_t row = samples_.direction * 4 + r;
          const float bias = p_.bias ? p_.bias[row * H_ + unit0_ + lane() / 4] : 0.0f;
          const float a = now.projected[j][2 * r + e] + bias + (reset ? 0.0f : sums[j][2 * r + e]);
          gates[r] = gate_of<S>(r, a);
          sums[j][2 * r + e] = to_save<S>(a, gates[r]);
        }
        const float c = gates[1] * (reset ? 0.0f : c_[j][e]) + gates[0] * gates[2];
        if (t < samples_.length[j][e]) {
          c_[j][e] = c;
          h_[j][e] = to_float(from_float<S>(gates[3] * hyperbolic_tangent<S>(c)));
        }
      }
    }
  }

  // What a step leaves in global memory.
  TT_DEVICE void record(int t, const float (&saved)[kTiles][8]) const {
    const int64_t B = in_.B, H = in_.H;
    const Rows rows = samples_.rows(in_, t);
    TT_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      const float y[2] = {t < samples_.length[j][0] ? h_[j][0] : 0.0f,
                          t < samples_.length[j][1] ? h_[j][1] : 0.0f};
      store(p_.y, B, rows, H, unit0_, samples_, j, y);
      if (!p_.gates) continue;
      TT_UNROLL
      for (int r = 0; r < 4; ++r) {
        const float gate[2] = {saved[j][2 * r], saved[j][2 * r + 1]};
        store(p_.gates, B, rows, 4 * H, r * H + unit0_, samples_, j, gate);
      }
      TT_UNROLL
      for (int e = 0; e < 2; ++e) {
        if (samples_.at(j, e) < B) {
          p_.cells[rows.at(samples_.at(j, e)) * H + unit0_ + lane() / 4] = c_[j][e];
        }
      }
    }
  }

  // h_s of this warp's units to every block of the group.
  TT_DEVICE void push(int s) {
    TT_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      if constexpr (kMatrixUnit<S>) {
        const uint32_t units = transpose_8x8(pack<S>(h_[j][0], h_[j][1]));
        push(s, 8 * j + lane() / 4, 2 * (lane() % 4), units);
      } else {
        push(s, 8 * j + 2 * (lane() % 4), lane() / 4, bits_of(h_[j][0]));
        push(s, 8 * j + 2 * (lane() % 4) + 1, lane() / 4, bits_of(h_[j][1]));
      }
    }
  }

  TT_DEVICE void push(int s, int row, int unit, uint32_t value) {
    const int copy = (s + 1) % 2;
    if (in_.cut.grid) {
      *reinterpret_cast<uint32_t*>(exchanged(copy) + row * in_.H + unit0_ + unit) = value;
      return;
    }
    auto* own = reinterpret_cast<uint32_t*>(operand(copy) + row * stride_ + unit0_ + unit);
    if (in_.cut.ranks == 1) {
      *own = value;
    } else {
      for (int rank = 0; rank < in_.cut.ranks; ++rank) send(own, value, mailbox(s), rank);
    }
  }

  // What the grid wrote, into shared memory.
  TT_DEVICE void copy(int copy) {
    constexpr int kWide = sizeof(Words) / sizeof(S);
    const int wide = H_ / kWide;
    for (int i = thread(); i < 8 * kTiles * wide; i += threads()) {
      const int row = i / wide, k = i % wide * kWide;
      *reinterpret_cast<Words*>(operand(0) + row * stride_ + k) =
          load_fresh(reinterpret_cast<const Words*>(exchanged(copy) + row * in_.H + k));
    }
    block_barrier(Site::kForwardCopy);
  }

  TT_DEVICE void store_state() {
    TT_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      const Rows rows = samples_.states(in_);
      store(p_.h_n, in_.B, rows, in_.H, unit0_, samples_, j, h_[j]);
      TT_UNROLL
      for (int e = 0; e < 2; ++e) {
        if (samples_.at(j, e) < in_.B) {
          p_.c_n[rows.at(samples_.at(j, e)) * H_ + unit0_ + lane() / 4] = c_[j][e];
        }
      }
    }
  }

  const RecurrenceForward<S>& p_;
  const RecurrenceInput<S>& in_;
  const int T_, H_, rank_, group_, slabs_, slab_, part_, unit0_, stride_;
  const SharedLayout layout_;
  const Samples<S, kTiles> samples_;
  Product<S, kTiles, kHeld> product_;
  int first_tile_, tiles_;
  unsigned round_ = 0;
  float c_[kTiles][2], h_[kTiles][2];
};

template <typename S, int kTiles, int kHeld>
TT_KERNEL(most_threads(kTiles, kHeld))
lstm_forward(TT_PARAMS RecurrenceForward<S> p) {
  ForwardBlock<S, kTiles, kHeld>(p).run();
}

}  // namespace throughtime
