// A group: the blocks that walk through all steps of the same samples in one direction.
//
// Block b has rank b % ranks in group b / ranks; the groups of direction 0 come first. Rank r owns
// `units` units of the group's samples, a warp of it 8 units at a time.
#pragma once

#include "lstm/cuda/fragment.cuh"

namespace throughtime {

// How many steps before its use an element is prefetched into the L2 cache. Steps without a product are
// short: several of them take as long as one access to memory.
constexpr int kPrefetchSteps = 6;

// The units and samples of one warp.
template <typename S, int kTiles>
struct WarpShare {
  const RecurrenceInput<S>& in;
  int T, H, rank, group, direction, unit0;
  int64_t sample0;  // the group's first
  int samples;      // of the group that the batch has
  // Of arrays [D, B, H], [T, B, D, H] and [T, B, D, 4H].
  LaneOffsets of_state, of_units, of_gates;
  int64_t next_row;  // elements from the row of a step in [T, B, D, H] to that of the next
  Fragment<int, kTiles> length;

  // `slab`: which 8 of the block's units.
  TT_DEVICE WarpShare(const RecurrenceInput<S>& input, int slab)
      : in(input),
        T(static_cast<int>(in.T)),
        H(static_cast<int>(in.H)),
        rank(block() % in.partition.ranks),
        group(block() / in.partition.ranks),
        direction(group / in.partition.groups),
        unit0(rank * in.partition.units + slab * kSlabUnits),
        sample0(8 * kTiles * (group % in.partition.groups)),
        samples(static_cast<int>(in.B - sample0 < 8 * kTiles ? in.B - sample0 : 8 * kTiles)),
        of_state(H, 0, unit0),
        of_units(static_cast<int>(in.D) * H, 0, unit0),
        of_gates(static_cast<int>(in.D) * 4 * H, H, unit0),
        next_row((time(1) > time(0) ? 1 : -1) * in.B * in.D * in.H) {
    of_units.keep();
    of_gates.keep();
    for_each<kTiles>([&](Place at) {
      length[at] = at.sample >= samples ? 0
                   : in.lengths         ? static_cast<int>(in.lengths[sample0 + at.sample])
                                        : T;
    });
  }

  TT_DEVICE int time(int s) const { return in.time(direction, s); }
  // Elements from the start of an array [T, B, D, H] to the row of the group's first sample at step s.
  TT_DEVICE int64_t row(int64_t s) const {
    return in.row(in.time(direction, s), sample0, direction) * in.H;
  }
  // The warp's units in arrays [T, B, D, H] and [T, B, D, 4H] at such a row.
  template <typename V>
  TT_DEVICE UnitRows<V> units(V* array, int64_t row) const {
    return {array + row, of_units, samples};
  }
  template <typename V>
  TT_DEVICE UnitRows<V> gates(V* array, int64_t row) const {
    return {array + 4 * row, of_gates, samples};
  }
  // In an array [D, B, H]; without samples if it is null.
  template <typename V>
  TT_DEVICE UnitRows<V> state(V* array) const {
    if (!array) return {array, of_state, 0};
    return {array + (direction * in.B + sample0) * in.H, of_state, samples};
  }
};

// How the blocks of a group wait for each other at the end of a round, rounds numbered from 0.
//
//     one block   a barrier of the block
//     a cluster   an mbarrier in each block counts the bytes that arrive in its shared memory; two
//                 mbarriers, for even and odd rounds
//     a grid      a counter in global memory, in two halves: arrive() and wait()
template <bool kGrid>
class GroupBarrier {
 public:
  // `bytes`: what a block receives in a round, in a cluster.
  TT_DEVICE GroupBarrier(const Partition& partition, int group, Site site, int mbarriers,
                         uint32_t bytes)
      : partition_(partition), group_(group), site_(site), mbarriers_(mbarriers), bytes_(bytes) {}

  TT_DEVICE bool in_cluster() const { return !kGrid && partition_.ranks > 1; }
  TT_DEVICE Mbarrier* mbarrier(int round) const {
    return reinterpret_cast<Mbarrier*>(shared_memory() + mbarriers_) + round % 2;
  }

  // Before the first round. Makes earlier writes visible to the block, or to the cluster.
  TT_DEVICE void start() const {
    if (!in_cluster()) return block_barrier(Site::kStart);
    if (thread() == 0) {
      mbarrier_init(mbarrier(0), bytes_);
      mbarrier_init(mbarrier(1), bytes_);
    }
    cluster_barrier(Site::kStart);
  }
  // All blocks see after wait() what a block wrote before arrive().
  TT_DEVICE void arrive() const {
    if (kGrid) grid_arrive(site_, arrivals());
  }
  TT_DEVICE void wait(int round) const {
    if (kGrid) {
      const unsigned all = static_cast<unsigned>(partition_.ranks) * (round + 1u);
      grid_wait(site_, arrivals(), all);
    } else if (in_cluster()) {
      mbarrier_wait(site_, mbarrier(round), round / 2, bytes_);
      if (thread() == 0) mbarrier_expect(mbarrier(round), bytes_);
    } else {
      block_barrier(site_);
    }
  }

 private:
  TT_DEVICE unsigned* arrivals() const { return partition_.arrivals + group_ * kArrivalStride; }

  const Partition& partition_;
  const int group_;
  const Site site_;
  const int mbarriers_;  // where they lie in shared memory
  const uint32_t bytes_;
};

}  // namespace throughtime
