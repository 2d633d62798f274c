// How the GPU kernels divide a recurrence: a pure function of the shape, the dtype and the GPU.
//
// plan() times every partition that fits by the model below, in cycles per step, and takes the
// fastest. The model and its sources: csrc/lstm/README.md.
#pragma once

#include <cstdint>
#include <string_view>

#include "common/sizes.h"
#include "lstm/cuda/layout.h"
#include "lstm/cuda/params.h"

namespace throughtime {

struct Gpu {
  int compute;          // capability, 10 * major + minor
  int multiprocessors;  // SMs
  int shared_bytes;     // that a block may have, at most
  int cluster;          // blocks of a cluster, at most; 1 where there are no clusters
  double ghz;
  double memory_gbs;  // GB/s
};

struct RecurrenceShape {
  int64_t T, B, D, H;  // D directions, 1 or 2; H a multiple of 8
  int scalar_bytes;    // of weights, h and gates: 2 or 4
  bool backward;
  bool tf32 = false;  // of float: params.h
};

enum class Tier {
  kNone,      // nothing runs; see reason
  kResident,  // weights on the chip, the units of a group of samples in one cluster of blocks
  kGrid,      // weights on the chip, the blocks of a group exchange through global memory
  kStepwise   // a library's product and one kernel per step
};

constexpr const char* kTierNames[] = {"none", "resident", "grid", "stepwise"};

inline const char* tier_name(Tier tier) { return kTierNames[static_cast<int>(tier)]; }

// False if no tier has that name; "" is kNone.
inline bool tier_named(std::string_view name, Tier* tier) {
  *tier = Tier::kNone;
  if (name.empty()) return true;
  for (const Tier t : {Tier::kResident, Tier::kGrid, Tier::kStepwise}) {
    if (name == tier_name(t)) return *tier = t, true;
  }
  return false;
}

struct RecurrencePlan {
  Tier tier;
  const char* reason;   // with kNone
  Partition partition;  // without its pointers
  int directions;
  int tiles_n;          // samples of a group / 8
  int held;             // tiles of weights in registers
  int threads;          // of a block
  int shared_bytes;     // of a block
  double microseconds;  // per step, by the model

  int blocks() const { return directions * partition.groups * partition.ranks; }
  int cluster() const { return tier == Tier::kResident ? partition.ranks : 1; }
  // Barriers between the blocks of a group in T steps.
  int64_t barriers(int64_t T) const { return partition.ranks > 1 ? T : 0; }
  // Bytes of partition.exchange; 0 without `grid`.
  int64_t exchange_bytes(const RecurrenceShape& s) const {
    if (tier != Tier::kGrid) return 0;
    const Partition& p = partition;
    const int64_t of_group = s.backward ? static_cast<int64_t>(p.ranks) *
                                              received_bytes(p.units, p.ranks, p.parts, tiles_n)
                                        : 8 * tiles_n * s.H * s.scalar_bytes;
    return 2 * s.D * p.groups * of_group;
  }
};

namespace plan_detail {

// Cycles, as measured on an H200 by bench/gpu/latency.cu: csrc/lstm/README.md.
constexpr double kBlockBarrier = 150;
constexpr double kMessage = 460;  // to all blocks of a cluster, until it is seen
constexpr double kGridBarrier = 1400;
constexpr double kSharedBytesPerCycle = 125, kRemoteBytesPerCycle = 8, kL2BytesPerCycle = 62;
constexpr double kL2Latency = 280;
constexpr double kMatrixFlopsPerCycle = 2700;                   // mma.sync, 16-bit, of an SM
constexpr double kFmasPerCycle = 120;                           // float, of an SM
constexpr double kMatrixLatency = 25;                           // of one mma
constexpr double kStepLatency = 182, kPointwisePerUnit = 0.58;  // of a sample
constexpr double kKernelMicroseconds = 6.5;  // of a step's kernel or product, which the host starts
// Slopes of these, and by clocks in the kernels on the same GPU.
constexpr double kMessagePerRank = 30, kGridBarrierPerRank = 3.2;
constexpr double kLoadsAtOnce = 8;                      // from L2
constexpr double kLoadedL2Latency = 2.32 * kL2Latency;  // while all SMs load
constexpr double kTailLatency = 60;                     // of a tile's weights in shared memory
constexpr double kJobLatency = 350;  // of a product of the backward, beside its tiles
constexpr double kRecord = 900;      // results stored and inputs loaded, per tile of 8 samples

// What a warp takes for a tile of a product, as counted in its machine code (tests/gpu/test_nvcc.py): mma for
// 8 samples, and bytes of shared memory, for the weights and for 8 samples.
constexpr int tile_mma(int scalar_bytes, bool split) {
  return scalar_bytes == 2 ? 4 : split ? 24 : 8;
}
constexpr int mma_flops(int scalar_bytes) { return 2 * 16 * 8 * (scalar_bytes == 2 ? 16 : 8); }
constexpr int tile_weight_bytes(int scalar_bytes) { return 1024 * scalar_bytes; }
constexpr int tile_sample_bytes(int scalar_bytes) { return 256 * scalar_bytes; }

// Cycles of the tiles of a product in a block's warps, `most` of them in one.
inline double product_cycles(const RecurrenceShape& s, const RecurrencePlan& plan, int all,
                             int most) {
  const bool is_float = s.scalar_bytes == 4, split = is_float && !s.tf32;
  const double rate = is_float ? kMatrixFlopsPerCycle / 2 : kMatrixFlopsPerCycle;
  const double samples = all * plan.tiles_n;  // 8 at a time
  const double work = samples * tile_mma(s.scalar_bytes, split) * mma_flops(s.scalar_bytes) / rate;
  const int warps = plan.threads / 32, beyond = most > plan.held ? most - plan.held : 0;
  const double bytes = static_cast<double>(beyond) * warps * tile_weight_bytes(s.scalar_bytes) +
                       samples * tile_sample_bytes(s.scalar_bytes);
  const double memory = bytes / kSharedBytesPerCycle;
  // mma of a tile that wait for each other or stand in line, and with split their rounding.
  const double tile = (split ? 16 : is_float ? 5 : 2) * plan.tiles_n * kMatrixLatency;
  // Between the tiles of the backward, and of split floats, there are branches.
  const double apart = s.backward || split ? kMatrixLatency : 0;
  const double chain = most * (tile + apart) + beyond * kTailLatency;
  const double bound = work > memory ? work : memory;
  return chain > bound ? chain : bound;
}

// Microseconds per step of tier kResident or kGrid, or -1 if the partition does not fit.
inline double time(const RecurrenceShape& s, const Gpu& gpu, const RecurrencePlan& plan) {
  const Partition& p = plan.partition;
  const int H = static_cast<int>(s.H), slabs = p.units / kSlabUnits, samples = 8 * plan.tiles_n;
  const int warps = plan.threads / 32;
  const int64_t groups = s.D * p.groups;
  if (plan.shared_bytes > gpu.shared_bytes) return -1;
  if ((p.grid ? groups * p.ranks : p.ranks) > gpu.multiprocessors) return -1;

  // What hides behind a barrier or messages: results and inputs, which wait for no other block.
  const double record = kRecord * plan.tiles_n;
  double wait = kBlockBarrier + record;
  if (p.ranks > 1) {
    wait = p.grid ? kGridBarrier + kGridBarrierPerRank * p.ranks
                  : kMessage + kMessagePerRank * p.ranks;
    if (wait < record) wait = record;
  }
  double product, exchange;
  if (s.backward) {
    const Jobs jobs = backward_jobs(H, p.units, p.parts, warps);
    product = product_cycles(s, plan, jobs.all * jobs.run, jobs.of_warp * jobs.run) +
              kJobLatency * jobs.of_warp + kBlockBarrier;
    const double sources = static_cast<double>(p.ranks) * p.parts;
    const double bytes = 4.0 * H * samples * p.parts;  // sent by a block, and received
    if (p.grid) {
      const double loads = divide_up(static_cast<int64_t>(sources), warps) * slabs * plan.tiles_n;
      exchange = 2 * bytes / kL2BytesPerCycle + kBlockBarrier +
                 (1 + loads / kLoadsAtOnce) * kLoadedL2Latency;
    } else {
      exchange = bytes / (p.ranks > 1 ? kRemoteBytesPerCycle : kSharedBytesPerCycle) +
                 bytes / kSharedBytesPerCycle + 30 * sources;
    }
    wait += record;  // before the product, which others wait for
  } else {
    const Split split = split_k(H, p.parts);
    product = product_cycles(s, plan, slabs * split.tiles, split.run);
    if (p.parts > 1) product += kBlockBarrier + (p.parts - 1) * 60.0;
    const double bytes = static_cast<double>(samples) * s.scalar_bytes;
    if (p.grid) {
      const double loads = bytes * H / 16 / plan.threads;  // of 16 bytes, by each thread
      exchange = bytes * H / kL2BytesPerCycle + kLoadedL2Latency + loads * 30 + kBlockBarrier;
    } else {
      exchange = bytes * p.units *
                 (p.ranks > 1 ? p.ranks / kRemoteBytesPerCycle : 1 / kSharedBytesPerCycle);
    }
  }
  const double pointwise = kStepLatency * plan.tiles_n + kPointwisePerUnit * p.units * samples;
  const double step = (product + exchange + wait + pointwise) / gpu.ghz / 1000;

  // Groups that do not fit at once follow in further rounds. A cluster lies within one of the GPU's
  // eight or so processing clusters, which leaves some SMs idle: of 132 two in 16, of larger clusters more.
  int64_t at_once = gpu.multiprocessors / p.ranks;
  if (!p.grid && p.ranks > 8) {
    at_once = gpu.multiprocessors / 16 > 1 ? gpu.multiprocessors / 16 - 1 : 1;
  } else if (!p.grid && p.ranks > 2) {
    at_once = at_once * 9 / 10 > 0 ? at_once * 9 / 10 : 1;
  }
  const int64_t rounds = divide_up(groups, at_once);
  const double memory = s.D * s.B * s.H * (20.0 + 5.0 * s.scalar_bytes) / gpu.memory_gbs / 1000;
  return rounds * step > memory ? rounds * step : memory;
}

inline double stepwise_time(const RecurrenceShape& s, const Gpu& gpu) {
  const double bytes =
      s.D * (4.0 * s.H * s.H * s.scalar_bytes + s.B * s.H * (40.0 + 5 * s.scalar_bytes));
  const double flops = s.scalar_bytes == 2 ? kMatrixFlopsPerCycle : 2 * kFmasPerCycle;
  const double work = 8.0 * s.D * s.B * s.H * s.H / (flops * gpu.multiprocessors * gpu.ghz * 1000);
  // Weights that every step reads stay in the L2 cache, which is about three times as fast.
  const double memory = bytes / (3 * gpu.memory_gbs * 1000);
  const double kernels = (1 + s.D) * kKernelMicroseconds * (s.backward ? 1.5 : 1);
  return kernels + (work > memory ? work : memory);
}

}  // namespace plan_detail

inline RecurrencePlan plan_stepwise(const RecurrenceShape& s, const Gpu& gpu) {
  RecurrencePlan plan{};
  plan.tier = Tier::kStepwise;
  plan.directions = static_cast<int>(s.D);
  plan.partition.ranks = 1;
  plan.microseconds = plan_detail::stepwise_time(s, gpu);
  return plan;
}

// The plan of tier kResident or kGrid that has these sizes, without its time. In the forward `parts` says
// how many warps there are.
inline RecurrencePlan plan_with(const RecurrenceShape& s, Tier tier, int ranks, int tiles_n,
                                int held, int parts, int warps) {
  const int H = static_cast<int>(s.H);
  const int units = static_cast<int>(round_up(divide_up(H, ranks), kSlabUnits));
  const bool grid = tier == Tier::kGrid;
  if (!s.backward) warps = units / kSlabUnits * parts;
  RecurrencePlan plan{};
  plan.tier = tier;
  plan.partition.groups = static_cast<int>(divide_up(s.B, 8 * tiles_n));
  plan.partition.ranks = ranks;
  plan.partition.units = units;
  plan.partition.parts = parts;
  plan.partition.grid = grid;
  plan.directions = static_cast<int>(s.D);
  plan.tiles_n = tiles_n;
  plan.held = held;
  plan.threads = 32 * warps;
  plan.shared_bytes =
      s.backward
          ? backward_layout(H, units, ranks, parts, warps, grid, tiles_n, held, s.scalar_bytes)
                .bytes
          : forward_layout(H, units, parts, grid, tiles_n, held, s.scalar_bytes).bytes;
  return plan;
}

// The fastest plan of tier kResident or kGrid, or kNone.
inline RecurrencePlan plan_persistent(const RecurrenceShape& s, const Gpu& gpu, Tier tier) {
  RecurrencePlan best{};
  best.reason = "no partition of the weights fits the registers and shared memory of this GPU";
  if (s.H > 8192) return best;  // sizes in bytes are int; nothing fits by far
  const int H = static_cast<int>(s.H);
  const auto consider = [&](int ranks, int tiles_n, int held, int parts, int warps) {
    RecurrencePlan plan = plan_with(s, tier, ranks, tiles_n, held, parts, warps);
    const int slabs = plan.partition.units / kSlabUnits;
    if (!instance_exists(s.scalar_bytes, s.backward, tiles_n, held)) return;
    if (plan.threads > most_threads(s.scalar_bytes, tiles_n, held)) return;
    if (s.backward ? warps < slabs || slabs % parts != 0 : has_empty_part(H, parts)) return;
    plan.microseconds = plan_detail::time(s, gpu, plan);
    if (plan.microseconds < 0) return;
    if (best.tier == Tier::kNone || plan.microseconds < best.microseconds) best = plan;
  };
  for (int tiles_n = 1; tiles_n <= 4; tiles_n *= 2) {
    for (const int held : {0, 4, 8}) {
      int last_units = 0;
      const int most_ranks = tier == Tier::kGrid ? gpu.multiprocessors : gpu.cluster;
      for (int wanted = 1; wanted <= most_ranks; ++wanted) {
        const int units = static_cast<int>(round_up(divide_up(H, wanted), kSlabUnits));
        if (units == last_units) continue;
        last_units = units;
        const int ranks = static_cast<int>(divide_up(H, units));
        for (int parts = 1; parts <= 8; parts *= 2) {
          if (!s.backward) {
            consider(ranks, tiles_n, held, parts, 0);
            continue;
          }
          for (int warps = units / kSlabUnits; warps <= 16; warps *= 2) {
            consider(ranks, tiles_n, held, parts, warps);
          }
          consider(ranks, tiles_n, held, parts, 16);
        }
      }
    }
  }
  return best;
}

// `only`, unless kNone, is the tier to take.
inline RecurrencePlan plan(const RecurrenceShape& s, const Gpu& gpu, Tier only = Tier::kNone) {
  RecurrencePlan best{};
  if (gpu.compute < 80) {
    best.reason = "the kernels are built for GPUs of compute capability 8.0 and later";
    return best;
  }
  if (s.H % kSlabUnits != 0 || s.T < 1 || s.B < 1 || s.H < 1 || s.T >= INT32_MAX || s.D < 1 ||
      s.D > 2) {
    best.reason = "T, B and H should be at least 1, T below 2^31 - 1, H a multiple of 8, D 1 or 2";
    return best;
  }
  if (only == Tier::kStepwise) return plan_stepwise(s, gpu);
  if (only != Tier::kNone) return plan_persistent(s, gpu, only);
  best = plan_stepwise(s, gpu);
  for (const Tier tier : {Tier::kResident, Tier::kGrid}) {
    const RecurrencePlan other = plan_persistent(s, gpu, tier);
    if (other.tier != Tier::kNone && other.microseconds < best.microseconds) best = other;
  }
  return best;
}

// plan() for the room that has_room(plan) reports, which may be less than the whole GPU: a MIG partition may
// have fewer multiprocessors than a cluster may have blocks, and a process may have a share of them.
template <typename HasRoom>
RecurrencePlan plan_where_room(const RecurrenceShape& s, Gpu gpu, Tier only,
                               const HasRoom& has_room) {
  RecurrencePlan made = plan(s, gpu, only);
  while ((made.tier == Tier::kResident || made.tier == Tier::kGrid) && !has_room(made)) {
    if (made.tier == Tier::kGrid) {
      gpu.multiprocessors = made.blocks() - 1;
    } else {
      gpu.cluster = made.partition.ranks - 1;
    }
    made = plan(s, gpu, only);
  }
  return made;
}

}  // namespace throughtime
