// The LSTM's recurrence on GPUs, backward, all T steps in one launch, against the travel.
//
//     dh_t += dy_t                     da_t, dc_{t-1}: cell.cuh
//     dh_{t-1} = da_t W_hh, and 0 where step t is detached
//
// Partition
//     grid    a group of `ranks` blocks per 8 kTiles samples and direction: group.cuh
//     block   `units` units with all four gates; their rows of W_hh stay in registers and shared memory
//     warp    8 units, and jobs: the product for 32 of all H units with one of `parts` parts of the
//             block's gate rows (backward_jobs in layout.h)
//     lane    one unit of 2 samples per tile: dh and dc, in registers
//
// A step: the cell, da_t of the block's units into shared memory, the block's product: partial dh_{t-1}
// of all H units. Each part goes to the block that owns the units, which adds the parts in the order of
// their sources, so that repeats are bit-equal. This reduce-scatter moves half the bytes that gathering
// da_t would, and no product is computed twice.
//
// At a step where every sample of the group is detached, reset or past its end, the group multiplies
// nothing, sends nothing and does not wait. All warps know that from the masks alone. The other steps
// are rounds, numbered from 0. In a cluster the sums received, and da_t, have two buffers: see forward.cuh.
//
// Cost of a round and block: 32 units H multiply-adds per sample; 4 H floats per sample and part sent,
// and as many received.
#pragma once

#include "lstm/cuda/group.cuh"
#include "lstm/cuda/product.cuh"

namespace throughtime {

template <typename S, int kTiles, int kHeld, bool kGrid>
class BackwardBlock {
 public:
  TT_DEVICE explicit BackwardBlock(const RecurrenceBackward<S>& p)
      : p_(p),
        partition_(p.in.partition),
        slabs_(partition_.units / kSlabUnits),
        warps_(threads() / 32),
        share_(p.in, warp()),
        T_(share_.T),
        H_(share_.H),
        stride_(operand_stride(4 * partition_.units, sizeof(S))),
        sources_of_warp_((partition_.ranks * partition_.parts + warps_ - 1) / warps_),
        jobs_(backward_jobs(H_, partition_.units, partition_.parts, warps_)),
        first_job_{warp() / jobs_.slabs32, warp() % jobs_.slabs32},
        layout_(backward_layout(H_, partition_.units, partition_.ranks, partition_.parts, warps_,
                                kGrid, kTiles, kHeld, sizeof(S))),
        barrier_(partition_, share_.group, Site::kBackwardStep, layout_.mbarriers,
                 received_bytes_here()),
        row_(share_.row(T_ - 1)) {
    const int64_t n = share_.sample0 + lane();
    if (lane() < share_.samples) length_ = p.in.lengths ? static_cast<int>(p.in.lengths[n]) : T_;
  }

  TT_DEVICE void run() {
    const bool owner = warp() < slabs_ && share_.unit0 < H_;
    start();
    Input next;
    Marks marks = marks_at(T_ - 1);
    if (owner) {
      load_state();
      load(next, T_ - 1, row_);
    }
    barrier_.start();
    for (int s = T_ - 1; s >= 0; --s) {
      const Flags flagged(marks);
      const bool exchange = flagged.open != 0;
      if (s > 0) marks = marks_at(s - 1);
      if (owner) {
        step(share_.time(s), next, flagged, exchange);
        row_ -= share_.next_row;
        if (s > 0) load(next, s - 1, row_);
      }
      if (!exchange) continue;
      block_barrier(Site::kBackwardGates);
      multiply();
      // Other warps of this block may still multiply: they read another buffer than the next round's.
      barrier_.arrive();
      barrier_.wait(round_);
      receive(flagged, owner);
      ++round_;
    }
    if (owner) store_state();
  }

 private:
  struct Input {
    Stored<SavedGate<S>> gates[kTiles][4];
    Stored<S> dy[kTiles];
    Fragment<float, kTiles> before;  // c of the step before
  };
  // Of the lane's sample: loaded a step before it is needed.
  struct Marks {
    bool active, reset, detached;
  };
  // Bit n: sample n of the group.
  struct Flags {
    uint32_t open;  // lets a gradient through to h of the step before
    uint32_t reset;
    TT_DEVICE explicit Flags(const Marks& m)
        : open(warp_ballot(m.active && !m.reset && !m.detached)),
          reset(warp_ballot(m.active && m.reset)) {}
    TT_DEVICE static bool bit(uint32_t flags, Place at) { return flags >> at.sample & 1u; }
  };
  // Job i is the product of one part for 32 units.
  struct Job {
    int part, slab32;
    // To a job of another warp, `jobs` further.
    TT_DEVICE void advance(int jobs, int slabs32) {
      slab32 += jobs;
      while (slab32 >= slabs32) {
        slab32 -= slabs32;
        ++part;
      }
    }
  };

  // Of this block's units, from the products of all blocks, in a round.
  TT_DEVICE uint32_t received_bytes_here() const {
    const int left = (H_ - share_.rank * partition_.units) / kSlabUnits;
    const int slabs = left < slabs_ ? left : slabs_;
    return partition_.ranks * partition_.parts * slabs * slab_sum_bytes(kTiles);
  }

  TT_DEVICE S* operand(unsigned round) const {
    const unsigned copy = barrier_.in_cluster() ? round % 2 : 0;
    return reinterpret_cast<S*>(shared_memory()) + copy * (8 * kTiles * stride_);
  }

  // Pairs that one block receives, and where: with `grid` the blocks of a group have one array, in a cluster
  // it is the same place in every block.
  TT_DEVICE int received_pairs() const {
    return received_bytes(partition_.units, partition_.ranks, partition_.parts, kTiles) /
           kPairBytes;
  }
  TT_DEVICE Pair* received() const {
    const unsigned turn = round_ % 2;
    if constexpr (kGrid) {
      const int64_t at = (share_.group * 2 + static_cast<int64_t>(turn)) * partition_.ranks;
      return static_cast<Pair*>(partition_.exchange) + at * received_pairs();
    } else {
      return reinterpret_cast<Pair*>(shared_memory() + layout_.sums) + turn * received_pairs();
    }
  }
  TT_DEVICE int place(int source, int slab) const { return (source * slabs_ + slab) * kTiles * 32; }
  TT_DEVICE Destination* destinations() const {
    return reinterpret_cast<Destination*>(shared_memory() + layout_.destinations);
  }

  // Weights into registers and shared memory. The operand needs no zeros: samples beyond the batch
  // have gradients 0, and so have units beyond H, which are written here.
  TT_DEVICE void start() {
    const int count = jobs_.all > warp() ? (jobs_.all - warp() - 1) / warps_ + 1 : 0;
    tiles_ = count * jobs_.run;
    product_.load(tiles_, p_.in.tf32, shared_memory() + layout_.tail + warp() * layout_.warp_tail,
                  [&](int tile, int r, int row, int at) { return weight(tile, r, row, at); });
    for (int i = thread(); i < 4 * jobs_.all; i += threads()) {
      const int part = i / 4 / jobs_.slabs32, slab = i % (4 * jobs_.slabs32), rank = slab / slabs_;
      destinations()[i] = {slab * kSlabUnits < H_ ? rank : -1,
                           place(share_.rank * partition_.parts + part, slab % slabs_) +
                               (kGrid ? rank * received_pairs() : 0)};
    }
    if (warp() < slabs_ && share_.unit0 >= H_) {
      for (unsigned round = 0; round < 2; ++round) {
        for_each<kTiles>([&](Place at) { write_operand(round, at, {}); });
      }
    }
  }

  // From element `at` of a tile: row `row` of slab r in the job's 32 units. Element 4 u + r is
  // gate r of the block's unit u.
  TT_DEVICE Words weight(int tile, int r, int row, int at) const {
    const int of = warp() + tile / jobs_.run * warps_, part = of / jobs_.slabs32;
    const int to = of % jobs_.slabs32 * 32 + 8 * r + row;
    const int k = (part * jobs_.run + tile % jobs_.run) * kTileK + at;
    const auto element = [&](int from) {
      const int unit = share_.rank * partition_.units + from / 4;
      const int64_t gate = (share_.direction * 4 + static_cast<int64_t>(from % 4)) * H_ + unit;
      return unit < H_ && to < H_ ? p_.in.weight[gate * H_ + to] : S{};
    };
    Words words;
    TT_UNROLL
    for (int w = 0; w < 4; ++w) {
      if constexpr (kIsFloat<S>) {
        words.v[w] = bits_of(element(k + w));
      } else {
        words.v[w] = element(k + 2 * w).bits | static_cast<uint32_t>(element(k + 2 * w + 1).bits)
                                                   << 16;
      }
    }
    return words;
  }

  TT_DEVICE void load_state() {
    const int t = share_.time(T_ - 1);
    const auto dh_n = share_.state(p_.dh_n);
    const auto dc_n = share_.state(p_.dc_n);
    const auto c0 = share_.state(p_.in.c0);
    const auto cells = share_.units(p_.cells, row_);
    for_each<kTiles>([&](Place at) {
      dh_[at] = dh_n.has(at) ? to_float(*dh_n.at(at)) : 0.0f;
      dc_[at] = dc_n.has(at) ? *dc_n.at(at) : 0.0f;
      c0_[at] = c0.has(at) ? *c0.at(at) : 0.0f;
      c_[at] = t < share_.length[at] ? *cells.at(at) : 0.0f;
    });
  }

  TT_DEVICE Marks marks_at(int s) const {
    const int64_t t = share_.time(s), n = share_.sample0 + lane();
    const bool active = t < length_;
    return {active, active && p_.in.is_reset(share_.direction, t, n),
            active && p_.is_detached(share_.direction, t, n)};
  }

  // What step s takes.
  TT_DEVICE void load(Input& to, int s, int64_t row) const {
    const int before = share_.time(s - 1);
    const int64_t ahead = -kPrefetchSteps * share_.next_row;
    const auto gates = share_.gates(p_.gates, row);
    const auto cells = share_.units(p_.cells, s > 0 ? row - share_.next_row : row);
    TT_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      TT_UNROLL
      for (int r = 0; r < 4; ++r) to.gates[tile][r] = gates.load(tile, r * H_);
      to.dy[tile] = p_.dy ? share_.units(p_.dy, row).load(tile) : Stored<S>{};
      if (s <= kPrefetchSteps) continue;
      gates.prefetch(tile, 4 * ahead, 4);
      cells.prefetch(tile, ahead, 1);
      if (p_.dy) share_.units(p_.dy, row).prefetch(tile, ahead, 1);
    }
    for_each<kTiles>([&](Place at) {
      to.before[at] = c0_[at];
      if (before >= 0 && before < share_.length[at]) to.before[at] = *cells.at(at);
    });
  }

  TT_DEVICE void step(int t, const Input& now, const Flags& flagged, bool exchange) {
    TT_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      float gates[4][2], dy[2], da[4][2];
      TT_UNROLL
      for (int r = 0; r < 4; ++r) now.gates[tile][r].value(gates[r]);
      now.dy[tile].value(dy);
      for_each_of_tile(tile, [&](Place at) {
        const bool reset = Flags::bit(flagged.reset, at);
        const float saved[4] = {gates[0][at.e], gates[1][at.e], gates[2][at.e], gates[3][at.e]};
        const float dh = dh_[at] + (p_.dy ? dy[at.e] : 0.0f);
        const CellGradient cell =
            cell_backward<S>(saved, c_[at], now.before[at], reset, dh, dc_[at]);
        const bool active = t < share_.length[at];
        TT_UNROLL
        for (int r = 0; r < 4; ++r) da[r][at.e] = active ? cell.sums[r] : 0.0f;
        if (active) {
          dc_[at] = cell.c_before;
          dh_[at] = 0.0f;  // until receive()
        }
        c_[at] = now.before[at];
        if (exchange) {
          write_operand(round_, at, {da[0][at.e], da[1][at.e], da[2][at.e], da[3][at.e]});
        }
      });
      TT_UNROLL
      for (int r = 0; r < 4; ++r) {
        share_.gates(p_.dgates, row_).store(tile, da[r], r * H_);
      }
    }
  }

  TT_DEVICE void write_operand(unsigned round, Place at, const Quad& da) {
    S* to = operand(round) + at.sample * stride_ + (warp() * kSlabUnits + at.unit) * 4;
    if constexpr (kIsFloat<S>) {
      *reinterpret_cast<Quad*>(to) = da;
    } else {
      *reinterpret_cast<PackedGates*>(to) = {pack<S>(da.v[0], da.v[1]), pack<S>(da.v[2], da.v[3])};
    }
  }

  // Partial dh of 32 units at a time, 8 of them to each block that owns them.
  TT_DEVICE void multiply() {
    Job job = first_job_;
    product_.multiply(
        tiles_, jobs_.run, stride_,
        [&](int) { return operand(round_) + job.part * jobs_.run * kTileK; },
        [&](int) {
          send(job);
          job.advance(warps_, jobs_.slabs32);
        });
  }

  TT_DEVICE void send(const Job& job) {
    const Destination* const to = destinations() + 4 * (job.part * jobs_.slabs32 + job.slab32);
    Pair* const first = received() + lane();
    TT_UNROLL
    for (int r = 0; r < 4; ++r) {
      const Destination at = to[r];
      if (at.rank < 0) break;
      TT_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        Pair* const place = first + at.place + tile * 32;
        const Pair sums = product_.sums().pair(tile, r);
        if (barrier_.in_cluster()) {
          store_remote(place, sums, barrier_.mbarrier(round_), at.rank);
        } else {
          *place = sums;
        }
      }
    }
  }

  // dh from the parts of all sources, added in their order. A grid's lie in global memory, where a load takes
  // long: each warp adds those of some sources first.
  TT_DEVICE void receive(const Flags& flagged, bool owner) {
    const int sources = partition_.ranks * partition_.parts, next = slabs_ * kTiles * 32;
    if constexpr (kGrid) {
      auto* const sums = reinterpret_cast<Pair*>(shared_memory() + layout_.sums) + lane();
      const int first = warp() * sources_of_warp_;
      const int count = sources - first < sources_of_warp_ ? sources - first : sources_of_warp_;
      const Pair* from = received() + share_.rank * received_pairs() + first * next + lane();
      for (int i = 0; i < slabs_ * kTiles; ++i) {
        sums[(i * warps_ + warp()) * 32] = sum_of<true>(from + i * 32, count, next);
      }
      block_barrier(Site::kBackwardParts);
      if (owner) take(flagged, sums + warp() * kTiles * warps_ * 32, warps_ * 32, warps_, 32);
    } else {
      if (owner) take(flagged, received() + warp() * kTiles * 32 + lane(), 32, sources, next);
    }
  }

  // Of tile i the `count` parts from `from` + i `tile` on.
  TT_DEVICE void take(const Flags& flagged, const Pair* from, int tile, int count, int next) {
    TT_UNROLL
    for (int i = 0; i < kTiles; ++i) {
      const Pair sum = sum_of<false>(from + i * tile, count, next);
      for_each_of_tile(i, [&](Place at) {
        if (Flags::bit(flagged.open, at)) dh_[at] = at.e == 0 ? sum.a : sum.b;
      });
    }
  }

  // Of `count` parts in global or shared memory; several loads are in flight.
  template <bool kGlobal>
  TT_DEVICE static Pair sum_of(const Pair* from, int count, int next) {
    constexpr int kAtOnce = 8;
    Pair sum{0.0f, 0.0f};
    TT_DO_NOT_UNROLL
    for (int i = 0; i < count; i += kAtOnce) {
      Pair parts[kAtOnce];
      TT_UNROLL
      for (int k = 0; k < kAtOnce; ++k) {
        parts[k] = {0.0f, 0.0f};
        if (i + k < count) parts[k] = kGlobal ? load_past_l1(from + k * next) : from[k * next];
      }
      TT_UNROLL
      for (const Pair& part : parts) {
        sum.a += part.a;
        sum.b += part.b;
      }
      from += kAtOnce * next;
    }
    return sum;
  }

  TT_DEVICE void store_state() {
    TT_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      share_.state(p_.dh0).store(tile, dh_.v[tile]);
      share_.state(p_.dc0).store(tile, dc_.v[tile]);
    }
  }

  struct alignas(8) PackedGates {
    uint32_t if_, go;
  };

  const RecurrenceBackward<S>& p_;
  const Partition& partition_;
  const int slabs_, warps_;
  const WarpShare<S, kTiles> share_;
  const int T_, H_, stride_;
  const int sources_of_warp_;  // whose parts it adds, with a grid
  const Jobs jobs_;
  const Job first_job_;
  const SharedLayout layout_;
  const GroupBarrier<kGrid> barrier_;
  Product<S, kTiles, kHeld> product_;
  int tiles_;
  unsigned round_ = 0;
  int length_ = 0;  // of the lane's sample, as in Marks
  Fragment<float, kTiles> c_, dh_, dc_, c0_;
  int64_t row_;  // of the step, see WarpShare
};

template <typename S, int kTiles, int kHeld, bool kGrid>
TT_KERNEL(most_threads(sizeof(S), kTiles, kHeld))
lstm_walk_backward(TT_PARAMS RecurrenceBackward<S> p) {
  BackwardBlock<S, kTiles, kHeld, kGrid>(p).run();
}

}  // namespace throughtime
