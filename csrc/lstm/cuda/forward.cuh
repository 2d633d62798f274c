// The LSTM's recurrence on GPUs, forward, all T steps in one launch.
//
//     a_t = projected_t + bias + h_{t-1} W_hh^T      c_t, h_t: cell.cuh
//
// Partition
//     grid    a group of `ranks` blocks per 8 kTiles samples and direction: group.cuh
//     block   `units` units with all four gates; their rows of W_hh stay in registers and shared memory
//     warp    8 units; `parts` warps may share the inner dimension of the product, then the first
//             of them adds the sums and owns the units
//     lane    one unit of 2 samples per tile: c, h and the sums of the gates, in registers
//
// A step: the product with h in shared memory, the cell, h_t into every block of the group. In a cluster
// st.async writes it into the blocks' shared memory, in a grid it goes through global memory. The step's
// other results are stored after the arrival, so that no barrier waits for them. projected of the next
// step is loaded before the wait; the L2 cache fetched it several steps earlier.
//
// In a cluster h has two buffers, and no barrier is needed before a block overwrites one: a warp writes
// and sends h_t only after it has read h_{t-1}. A block that has received all of h_t therefore knows that
// no warp still reads the buffer of h_{t-1}, where it writes next.
//
// Few warps walk through a step one instruction after the other, so instructions are what it costs:
// offsets are made once, and one row moves from step to step.
//
// Rounded to S: y, h_n, and h_{t-1} as operand of the product. Saved: c_t, gates (cell.cuh). A sample past
// its end keeps its state, and nothing that is loaded for it is used.
//
// Cost of a step and block: 8 units H multiply-adds per sample, 8 kTiles H elements of h received.
#pragma once

#include "lstm/cuda/group.cuh"
#include "lstm/cuda/product.cuh"

namespace throughtime {

template <typename S, int kTiles, int kHeld, bool kGrid>
class ForwardBlock {
 public:
  TT_DEVICE explicit ForwardBlock(const RecurrenceForward<S>& p)
      : p_(p),
        partition_(p.in.partition),
        slabs_(partition_.units / kSlabUnits),
        slab_(warp() % slabs_),
        part_(warp() / slabs_),
        share_(p.in, slab_),
        T_(share_.T),
        H_(share_.H),
        stride_(operand_stride(H_, sizeof(S))),
        layout_(forward_layout(H_, partition_.units, partition_.parts, kGrid, kTiles, kHeld,
                               sizeof(S))),
        barrier_(partition_, share_.group, Site::kForwardStep, layout_.mbarriers,
                 8 * kTiles * H_ * sizeof(S)),
        row_(share_.row(0)) {}

  TT_DEVICE void run() {
    const bool inside = share_.unit0 < H_, owner = part_ == 0 && inside;
    start();
    Input now;
    if (owner) {
      load_state();
      if (kLoadEarly) load(now, 0, row_);
    }
    barrier_.start();
    // Warps with no units and no share of the product exit; no barrier counts them.
    if (!inside && partition_.parts == 1 && barrier_.in_cluster()) return;
    for (int s = 0; s < T_; ++s) {
      const bool last = s + 1 == T_;
      if (!kLoadEarly && owner) load(now, s, row_);
      Fragment4<kTiles> sums;
      multiply(kGrid ? 0 : s & 1, sums);
      if (partition_.parts > 1) add_parts(sums);
      if (owner) {
        step(share_.time(s), now, sums);
        if (!last) send(s);
      }
      if (!last) barrier_.arrive();
      if (owner) {
        record(share_.time(s), sums);
        row_ += share_.next_row;
        if (kLoadEarly && !last) load(now, s + 1, row_);
      }
      if (last) break;
      barrier_.wait(s);
      if constexpr (kGrid) copy((s + 1) & 1);
    }
    if (owner) store_state();
  }

 private:
  // Before the wait, unless registers would spill.
  static constexpr bool kLoadEarly = kTiles < 4;

  struct Input {
    Fragment4<kTiles> projected;
    Fragment<bool, kTiles> reset;
  };

  TT_DEVICE S* operand(int copy) const {
    return reinterpret_cast<S*>(shared_memory()) + copy * 8 * kTiles * stride_;
  }
  // The group's h in global memory: [2][samples][H].
  TT_DEVICE S* exchanged(int copy) const {
    return static_cast<S*>(partition_.exchange) +
           (share_.group * 2 + copy) * (8 * kTiles * p_.in.H);
  }

  // Weights into registers and shared memory; h_0 and zeros into the operand.
  TT_DEVICE void start() {
    const Split split = split_k(H_, partition_.parts);
    first_tile_ = part_ * split.run;
    tiles_ = split.tiles - first_tile_ < split.run ? split.tiles - first_tile_ : split.run;
    product_.load(tiles_, p_.in.tf32, shared_memory() + layout_.tail + warp() * layout_.warp_tail,
                  [&](int tile, int gate, int row, int at) {
                    const int k = (first_tile_ + tile) * kTileK + at, unit = share_.unit0 + row;
                    const int64_t gates = share_.direction * 4 + gate;
                    const S* p = p_.in.weight + (gates * H_ + unit) * H_ + k;
                    return unit < H_ && k < H_ ? *reinterpret_cast<const Words*>(p) : Words{};
                  });
    const int copies = kGrid ? 1 : 2;
    for (int i = thread(); i < 8 * kTiles * stride_; i += threads()) {
      const int n = i / stride_, k = i % stride_;
      const int64_t row = share_.direction * p_.in.B + share_.sample0 + n;
      operand(0)[i] = n < share_.samples && k < H_ ? p_.h0[row * H_ + k] : S{};
      if (copies > 1) operand(1)[i] = S{};
    }
  }

  TT_DEVICE void load_state() {
    const auto c0 = share_.state(p_.in.c0);
    const auto h0 = share_.state(p_.h0);
    for_each<kTiles>([&](Place at) {
      c_[at] = c0.has(at) ? *c0.at(at) : 0.0f;
      h_[at] = h0.has(at) ? to_float(*h0.at(at)) : 0.0f;
    });
    TT_UNROLL
    for (int r = 0; r < 4; ++r) {
      const int64_t gate = (share_.direction * 4 + r) * p_.in.H + share_.unit0 + lane_row();
      bias_[r] = p_.bias ? p_.bias[gate] : 0.0f;
    }
  }

  // What step s takes.
  TT_DEVICE void load(Input& to, int s, int64_t row) {
    const int t = share_.time(s);
    const auto projected = share_.gates(p_.projected, row);
    if (s + kPrefetchSteps < T_) {
      TT_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        projected.prefetch(tile, 4 * kPrefetchSteps * share_.next_row, 4);
      }
    }
    for_each<kTiles>([&](Place at) {
      const bool active = t < share_.length[at];
      TT_UNROLL
      for (int r = 0; r < 4; ++r) {
        to.projected(at, r) = active ? *projected.at(at, r * H_) : 0.0f;
      }
      to.reset[at] = active && p_.in.is_reset(share_.direction, t, share_.sample0 + at.sample);
    });
  }

  // The sums of a part without tiles are 0.
  TT_DEVICE void multiply(int copy, Fragment4<kTiles>& sums) const {
    product_.multiply_all(tiles_, stride_, operand(copy) + first_tile_ * kTileK);
    sums = product_.sums();
  }

  // The sums of all parts, added in the order of the parts.
  TT_DEVICE void add_parts(Fragment4<kTiles>& sums) {
    auto* shared = reinterpret_cast<Pair*>(shared_memory() + layout_.sums);
    const auto at = [&](int part, int tile, int r) {
      return (((part - 1) * slabs_ + slab_) * kTiles + tile) * 128 + r * 32 + lane();
    };
    // A warp without units writes nothing here: no barrier says when these places are free again.
    const bool inside = share_.unit0 < H_;
    if (part_ > 0 && inside) {
      TT_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        TT_UNROLL
        for (int r = 0; r < 4; ++r) shared[at(part_, tile, r)] = sums.pair(tile, r);
      }
    }
    block_barrier(Site::kForwardParts);
    if (part_ > 0 || !inside) return;
    for (int part = 1; part < partition_.parts; ++part) {
      TT_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        TT_UNROLL
        for (int r = 0; r < 4; ++r) {
          const Pair other = shared[at(part, tile, r)];
          sums.v[tile][2 * r] += other.a;
          sums.v[tile][2 * r + 1] += other.b;
        }
      }
    }
  }

  // The cell; replaces the sums of the gates by what is saved of them.
  TT_DEVICE void step(int t, const Input& now, Fragment4<kTiles>& sums) {
    for_each<kTiles>([&](Place at) {
      const bool reset = now.reset[at];
      float a[4];
      TT_UNROLL
      for (int r = 0; r < 4; ++r) {
        a[r] = now.projected(at, r) + bias_[r] + (reset ? 0.0f : sums(at, r));
      }
      const CellResult<S> cell = cell_forward<S>(a, c_[at], reset);
      TT_UNROLL
      for (int r = 0; r < 4; ++r) sums(at, r) = cell.saved[r];
      if (t < share_.length[at]) {
        c_[at] = cell.c;
        h_[at] = to_float(cell.h);
      }
    });
  }

  // A step's results in global memory.
  TT_DEVICE void record(int t, const Fragment4<kTiles>& saved) const {
    TT_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      const float y[2] = {t < share_.length.v[tile][0] ? h_.v[tile][0] : 0.0f,
                          t < share_.length.v[tile][1] ? h_.v[tile][1] : 0.0f};
      share_.units(p_.y, row_).store(tile, y);
      if (!p_.gates) continue;
      TT_UNROLL
      for (int r = 0; r < 4; ++r) {
        const Pair gate = saved.pair(tile, r);
        share_.gates(p_.gates, row_).store(tile, {gate.a, gate.b}, r * H_);
      }
      share_.units(p_.cells, row_).store(tile, c_.v[tile]);
    }
  }

  // h_s of this warp's units to every block of the group.
  TT_DEVICE void send(int s) {
    const int copy = (s + 1) % 2;
    TT_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      const Stored<S> h = Stored<S>::of(h_.v[tile]);
      Stored<S>::for_each(h.words, tile, [&](uint32_t word, int sample, int unit) {
        S* to = kGrid ? exchanged(copy) + sample * p_.in.H : operand(copy) + sample * stride_;
        *reinterpret_cast<uint32_t*>(to + share_.unit0 + unit) = word;
      });
    }
    if (barrier_.in_cluster()) send_to_cluster(copy, barrier_.mbarrier(s));
  }

  // The warp's units as they lie in this block's operand: 16 bytes a lane, several blocks at a time.
  TT_DEVICE void send_to_cluster(int copy, Mbarrier* mbarrier) {
    constexpr int kWide = sizeof(Words) / sizeof(S), kOfSample = kSlabUnits / kWide;
    constexpr int kOfBlock = 8 * kOfSample, kBlocks = 32 / kOfBlock;
    const int sample = lane() % kOfBlock / kOfSample, unit = lane() % kOfSample * kWide;
    Words* const own =
        reinterpret_cast<Words*>(operand(copy) + sample * stride_ + share_.unit0 + unit);
    const int tile_stride = 8 * stride_ / kWide;
    warp_barrier();
    Words h[kTiles];
    TT_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) h[tile] = own[tile * tile_stride];
    warp_barrier();  // a block sends to itself too, over what the others read here
    for (int rank = lane() / kOfBlock; rank < partition_.ranks; rank += kBlocks) {
      TT_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        store_remote(own + tile * tile_stride, h[tile], mbarrier, rank);
      }
    }
  }

  // h that the grid exchanged, into shared memory: a warp per sample, all copies in flight.
  TT_DEVICE void copy(int copy) {
    constexpr int kWide = sizeof(Words) / sizeof(S);
    for (int row = warp(); row < 8 * kTiles; row += threads() / 32) {
      const S* from = exchanged(copy) + row * p_.in.H;
      for (int k = lane() * kWide; k < H_; k += 32 * kWide) {
        copy_async(reinterpret_cast<Words*>(operand(0) + row * stride_ + k),
                   reinterpret_cast<const Words*>(from + k));
      }
    }
    copies_wait();
    block_barrier(Site::kForwardCopy);
  }

  TT_DEVICE void store_state() {
    TT_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      share_.state(p_.h_n).store(tile, h_.v[tile]);
      share_.state(p_.c_n).store(tile, c_.v[tile]);
    }
  }

  const RecurrenceForward<S>& p_;
  const Partition& partition_;
  const int slabs_, slab_, part_;
  const WarpShare<S, kTiles> share_;
  const int T_, H_, stride_;
  const SharedLayout layout_;
  const GroupBarrier<kGrid> barrier_;
  Product<S, kTiles, kHeld> product_;
  int first_tile_, tiles_;
  float bias_[4];  // of the lane's unit
  Fragment<float, kTiles> c_, h_;
  int64_t row_;  // of the step, see WarpShare
};

template <typename S, int kTiles, int kHeld, bool kGrid>
TT_KERNEL(most_threads(sizeof(S), kTiles, kHeld))
lstm_walk_forward(TT_PARAMS RecurrenceForward<S> p) {
  ForwardBlock<S, kTiles, kHeld, kGrid>(p).run();
}

}  // namespace throughtime
