// The LSTM's recurrence on GPUs, backward, all T steps in one launch, against the travel.
//
//     dh_t += dy_t                        dc_t += dh_t o (1 - tanh(c_t)^2)
//     da_t = gradients before the nonlinearities        dc_{t-1} = dc_t f
//     dh_{t-1} = da_t W_hh, and 0 where step t is detached
//
// Groups, units and lanes are those of the forward: a lane keeps dh and dc of one unit of 2 samples
// per tile. A block has the rows of W_hh that its units' gates own, so from its own da_t it makes a
// partial dh_{t-1} of all units, and sends each part to the block that owns the units (reduce-scatter:
// half the bytes of gathering da_t, which also every block would have to multiply). Owners add the
// parts in the order of their sources, so the result is the same from run to run.
//
// At a step where no sample of the group lets a gradient through - all of them detached, reset or past
// their end - nothing is multiplied, nothing sent, and nobody waits. All warps know that from the
// masks alone.
#pragma once

#include "lstm/cuda/samples.cuh"

namespace throughtime {

template <typename S, int kTiles, int kHeld>
class BackwardBlock {
 public:
  TT_DEVICE explicit BackwardBlock(const RecurrenceBackward<S>& p)
      : p_(p),
        in_(p.in),
        T_(static_cast<int>(p.in.T)),
        H_(static_cast<int>(p.in.H)),
        rank_(block() % in_.cut.ranks),
        group_(block() / in_.cut.ranks),
        slabs_(in_.cut.units / kSlabUnits),
        unit0_(rank_ * in_.cut.units + warp() * kSlabUnits),
        stride_(operand_stride(4 * in_.cut.units, sizeof(S))),
        warps_(threads() / 32),
        jobs_(backward_jobs(H_, in_.cut.units, in_.cut.parts, warps_)),
        layout_(backward_layout(H_, in_.cut.units, in_.cut.ranks, in_.cut.parts, warps_,
                                in_.cut.grid, kTiles, kHeld, sizeof(S))),
        samples_(p.in, group_) {}

  TT_DEVICE void run() {
    const bool owner = warp() < slabs_ && unit0_ < H_;
    start();
    Loaded next;
    Flags next_flags = flags(T_ - 1);
    if (owner) {
      load_state();
      load(next, T_ - 1);
    }
    begin();
    for (int s = T_ - 1; s >= 0; --s) {
      const Flags flagged = next_flags;
      const bool exchange = flagged.open != 0;
      if (owner) step(samples_.time(in_, s), next, flagged, exchange);
      if (s > 0) {
        next_flags = flags(s - 1);
        if (owner) load(next, s - 1);
      }
      if (!exchange) continue;
      block_barrier(Site::kBackwardGates);
      multiply();
      wait();
      if (owner) receive(flagged);
      ++exchanges_;
    }
    if (owner) store_state();
  }

 private:
  struct Loaded {
    Fetched<SavedGate<S>> gates[kTiles][4];
    Fetched<S> dy[kTiles];
    float before[kTiles][2];  // c of the step before
  };
  // Bit n: sample n of the group.
  struct Flags {
    uint32_t open;  // lets a gradient through to h of the step before
    uint32_t reset;
  };

  TT_DEVICE Mailbox* mailbox() const {
    return reinterpret_cast<Mailbox*>(shared_memory() + layout_.mail) + exchanges_ % 2;
  }
  // What an exchange brings this block: its units of everybody's products.
  TT_DEVICE uint32_t mail_bytes() const {
    const int left = (H_ - rank_ * in_.cut.units) / kSlabUnits;
    const int slabs = left < slabs_ ? left : slabs_;
    return in_.cut.ranks * in_.cut.parts * slabs * slab_sum_bytes(kTiles);
  }

  // All that start() does is seen by those whom it concerns.
  TT_DEVICE void begin() {
    if (!in_.cut.grid && in_.cut.ranks > 1) {
      if (thread() == 0) {
        open_mailbox(mailbox(), mail_bytes());
        open_mailbox(mailbox() + 1, mail_bytes());
      }
      cluster_barrier(Site::kStart);
    } else {
      block_barrier(Site::kStart);
    }
  }

  // For the end of an exchange. Mail says nothing of warps of this block that multiply for others yet:
  // they read another operand than the next exchange's.
  TT_DEVICE void wait() {
    if (in_.cut.grid) {
      grid_arrive(Site::kBackwardStep, in_.cut.arrivals + group_);
      grid_wait(Site::kBackwardStep, in_.cut.arrivals + group_, in_.cut.ranks * ++round_);
    } else if (in_.cut.ranks > 1) {
      wait_for_mail(Site::kBackwardStep, mailbox(), exchanges_ / 2, mail_bytes());
      if (thread() == 0) expect_mail(mailbox(), mail_bytes());
    } else {
      block_barrier(Site::kBackwardStep);
    }
  }

  TT_DEVICE S* operand(int exchange) const {
    const int copy = !in_.cut.grid && in_.cut.ranks > 1 ? exchange % 2 : 0;
    return reinterpret_cast<S*>(shared_memory()) + copy * 8 * kTiles * stride_;
  }

  // Where block `rank` receives; in a cluster everybody does so at the same place.
  TT_DEVICE Pair* received(int rank) const {
    const int bytes = received_bytes(in_.cut.units, in_.cut.ranks, in_.cut.parts, kTiles);
    const int turn = exchanges_ % 2;
    if (in_.cut.grid) {
      const int64_t at = (static_cast<int64_t>(group_) * 2 + turn) * in_.cut.ranks + rank;
      return reinterpret_cast<Pair*>(static_cast<char*>(in_.cut.exchange) + at * bytes);
    }
    return reinterpret_cast<Pair*>(shared_memory() + layout_.sums + turn * bytes);
  }
  TT_DEVICE int place(int source, int slab, int j) const {
    return ((source * slabs_ + slab) * kTiles + j) * 32 + lane();
  }

  TT_DEVICE int job(int index) const { return warp() + index * warps_; }

  // Weights into registers and shared memory. The operand needs no zeros: a group's samples beyond
  // the batch have gradients 0, and so have units beyond H, which step() writes as well.
  TT_DEVICE void start() {
    const int count = jobs_.all > warp() ? (jobs_.all - warp() - 1) / warps_ + 1 : 0;
    tiles_ = count * jobs_.run;
    product_.load(tiles_, shared_memory() + layout_.tail + warp() * layout_.warp_tail,
                  [&](int tile, int r, int i) {
                    const int of = job(tile / jobs_.run), part = of / jobs_.slabs32;
                    const int to = of % jobs_.slabs32 * 32 + 8 * r + lane() / 4;
                    const int k = (part * jobs_.run + tile % jobs_.run) * kTileK + lane() % 4 * 8;
                    const auto element = [&](int at) {  // gate at % 4 of a unit of this block
                      const int unit = rank_ * in_.cut.units + at / 4;
                      const int64_t row =
                          (samples_.direction * 4 + static_cast<int64_t>(at % 4)) * H_ + unit;
                      return unit < H_ && to < H_ ? in_.weight[row * H_ + to] : S{};
                    };
                    if constexpr (kMatrixUnit<S>) {
                      Words words;
                      TT_UNROLL
                      for (int w = 0; w < 4; ++w) {
                        words.v[w] = element(k + 2 * w).bits |
                                     static_cast<uint32_t>(element(k + 2 * w + 1).bits) << 16;
                      }
                      return words;
                    } else {
                      return element(k + i);
                    }
                  });
    if (warp() < slabs_ && unit0_ >= H_) {
      for (int exchange = 0; exchange < 2; ++exchange) {
        TT_UNROLL
        for (int j = 0; j < kTiles; ++j) {
          const float zeros[4][2] = {};
          write_operand(exchange, j, zeros);
        }
      }
    }
  }

  TT_DEVICE void load_state() {
    const int64_t t = samples_.time(in_, T_ - 1);
    TT_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      TT_UNROLL
      for (int e = 0; e < 2; ++e) {
        const int64_t n = samples_.at(j, e), unit = unit0_ + lane() / 4;
        const int64_t at = samples_.states(in_).at(n) * H_ + unit;
        const bool inside = n < in_.B, active = t < samples_.length[j][e];
        dh_[j][e] = inside && p_.dh_n ? to_float(p_.dh_n[at]) : 0.0f;
        dc_[j][e] = inside && p_.dc_n ? p_.dc_n[at] : 0.0f;
        c_[j][e] = active ? p_.cells[samples_.rows(in_, t).at(n) * H_ + unit] : 0.0f;
      }
    }
  }

  TT_DEVICE Flags flags(int s) const {
    const int64_t t = samples_.time(in_, s), n = samples_.first + lane();
    const int64_t row = (samples_.direction * in_.T + t) * in_.B + n;
    const bool inside = lane() < 8 * kTiles && n < in_.B;
    const bool active = inside && (!in_.lengths || t < in_.lengths[n]);
    const bool reset = active && in_.reset && in_.reset[row];
    const bool detach = active && p_.detach &&
                        p_.detach[samples_.direction * p_.detach_stride_d + t * p_.detach_stride_t +
                                  n * p_.detach_stride_b];
    return {warp_ballot(active && !reset && !detach), warp_ballot(reset)};
  }
  TT_DEVICE static bool bit(uint32_t flags, int j, int e) {
    return flags >> (8 * j + 2 * (lane() % 4) + e) & 1u;
  }

  TT_DEVICE void load(Loaded& to, int s) const {
    const int64_t t = samples_.time(in_, s), before = samples_.time(in_, s - 1), B = in_.B, H = H_;
    const int64_t steps = s < kPrefetchSteps ? 0 : samples_.time(in_, s - kPrefetchSteps) - t;
    const int64_t later = steps * B * in_.D * H;
    const Rows rows = samples_.rows(in_, t);
    TT_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      TT_UNROLL
      for (int r = 0; r < 4; ++r) {
        to.gates[j][r] = fetch(p_.gates, B, rows, 4 * H, r * H + unit0_, samples_, j, 4 * later);
      }
      to.dy[j] = p_.dy ? fetch(p_.dy, B, rows, H, unit0_, samples_, j, later) : Fetched<S>{};
      TT_UNROLL
      for (int e = 0; e < 2; ++e) {
        const int64_t n = samples_.at(j, e), unit = unit0_ + lane() / 4;
        if (n >= B) {
          to.before[j][e] = 0.0f;
        } else if (before < 0 || before >= samples_.length[j][e]) {
          to.before[j][e] = in_.c0[samples_.states(in_).at(n) * H + unit];
        } else {
          const float* p = p_.cells + samples_.rows(in_, before).at(n) * H + unit;
          to.before[j][e] = *p;
          if (s > kPrefetchSteps) prefetch(p + later);
        }
      }
    }
  }

  TT_DEVICE void step(int64_t t, const Loaded& now, const Flags& flagged, bool exchange) {
    const int64_t B = in_.B, H = H_;
    TT_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      float gates[4][2], dy[2], da[4][2];
      TT_UNROLL
      for (int r = 0; r < 4; ++r) now.gates[j][r].value(gates[r]);
      now.dy[j].value(dy);
      TT_UNROLL
      for (int e = 0; e < 2; ++e) {
        const bool active = t < samples_.length[j][e], reset = bit(flagged.reset, j, e);
        const float i = recall<S>(0, gates[0][e]), f = recall<S>(1, gates[1][e]);
        const float g = recall<S>(2, gates[2][e]), o = recall<S>(3, gates[3][e]);
        const float before = reset ? 0.0f : now.before[j][e];
        const float tanh_c = hyperbolic_tangent<SavedGate<S>>(c_[j][e]);
        const float dh = dh_[j][e] + (p_.dy ? dy[e] : 0.0f);
        const float dc = dc_[j][e] + dh * o * (1.0f - tanh_c * tanh_c);
        da[0][e] = active ? dc * g * i * (1.0f - i) : 0.0f;
        da[1][e] = active ? dc * before * f * (1.0f - f) : 0.0f;
        da[2][e] = active ? dc * i * (1.0f - g * g) : 0.0f;
        da[3][e] = active ? dh * tanh_c * o * (1.0f - o) : 0.0f;
        if (active) {
          dc_[j][e] = reset ? 0.0f : dc * f;
          dh_[j][e] = 0.0f;  // until receive()
        }
        c_[j][e] = now.before[j][e];
      }
      TT_UNROLL
      for (int r = 0; r < 4; ++r) {
        store(p_.dgates, B, samples_.rows(in_, t), 4 * H, r * H + unit0_, samples_, j, da[r]);
      }
      if (exchange) write_operand(exchanges_, j, da);
    }
  }

  TT_DEVICE void write_operand(int exchange, int j, const float (&da)[4][2]) {
    TT_UNROLL
    for (int e = 0; e < 2; ++e) {
      S* to = operand(exchange) + (8 * j + 2 * (lane() % 4) + e) * stride_ +
              (warp() * kSlabUnits + lane() / 4) * 4;
      if constexpr (kMatrixUnit<S>) {
        *reinterpret_cast<PackedGates*>(to) = {pack<S>(da[0][e], da[1][e]),
                                               pack<S>(da[2][e], da[3][e])};
      } else {
        *reinterpret_cast<Quad*>(to) = {{da[0][e], da[1][e], da[2][e], da[3][e]}};
      }
    }
  }

  // Partial dh of 32 units at a time, each 8 to the block that owns them.
  TT_DEVICE void multiply() {
    product_.multiply(
        tiles_, jobs_.run, stride_,
        [&](int index) {
          return operand(exchanges_) + job(index) / jobs_.slabs32 * jobs_.run * kTileK;
        },
        [&](int index) {
          const int of = job(index);
          const int source = rank_ * in_.cut.parts + of / jobs_.slabs32;
          TT_UNROLL
          for (int r = 0; r < 4; ++r) {
            const int slab = of % jobs_.slabs32 * 4 + r;
            if (slab * kSlabUnits >= H_) break;
            const int rank = slab / slabs_;
            TT_UNROLL
            for (int j = 0; j < kTiles; ++j) {
              Pair* to = received(rank) + place(source, slab % slabs_, j);
              const Pair sums{product_.sum(j, 2 * r), product_.sum(j, 2 * r + 1)};
              if (in_.cut.grid || in_.cut.ranks == 1) {
                *to = sums;
              } else {
                send(to, sums, mailbox(), rank);
              }
            }
          }
        });
  }

  TT_DEVICE void receive(const Flags& flagged) {
    const Pair* from = received(rank_);
    TT_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      float sum[2] = {};
      for (int source = 0; source < in_.cut.ranks * in_.cut.parts; ++source) {
        const Pair* p = from + place(source, warp(), j);
        const Pair part = in_.cut.grid ? load_fresh(p) : *p;
        sum[0] += part.a;
        sum[1] += part.b;
      }
      TT_UNROLL
      for (int e = 0; e < 2; ++e) {
        if (bit(flagged.open, j, e)) dh_[j][e] = sum[e];
      }
    }
  }

  TT_DEVICE void store_state() {
    TT_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      TT_UNROLL
      for (int e = 0; e < 2; ++e) {
        const int64_t row = samples_.states(in_).at(samples_.at(j, e));
        const int64_t at = row * H_ + unit0_ + lane() / 4;
        if (samples_.at(j, e) < in_.B) {
          p_.dh0[at] = dh_[j][e];
          p_.dc0[at] = dc_[j][e];
        }
      }
    }
  }

  struct alignas(8) PackedGates {
    uint32_t if_, go;
  };

  const RecurrenceBackward<S>& p_;
  const RecurrenceInput<S>& in_;
  const int T_, H_, rank_, group_, slabs_, unit0_, stride_, warps_;
  const Jobs jobs_;
  const SharedLayout layout_;
  const Samples<S, kTiles> samples_;
  Product<S, kTiles, kHeld> product_;
  int tiles_;
  int exchanges_ = 0;  // so far
  unsigned round_ = 0;
  float c_[kTiles][2], dh_[kTiles][2], dc_[kTiles][2];
};

template <typename S, int kTiles, int kHeld>
TT_KERNEL(most_threads(kTiles, kHeld))
lstm_backward(TT_PARAMS RecurrenceBackward<S> p) {
  BackwardBlock<S, kTiles, kHeld>(p).run();
}

}  // namespace throughtime
