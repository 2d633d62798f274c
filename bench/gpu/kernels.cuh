// Kernels that time what the model in csrc/lstm/cuda/plan.h assumes.
//
// They use the LSTM's own device layer, barriers, layout and cell. Each checks its result. They also run
// on the CPU, without meaningful times: tests/gpu/cuda_on_cpu/latency.cpp.
#pragma once

#include "lstm/cuda/group.cuh"

#if !defined(__CUDACC__)
#include <chrono>
#endif

namespace throughtime::latency {

constexpr int kMostThreads = 512;  // as in the LSTM's kernels
constexpr int kBuffers = 128;      // in shared memory; the mbarriers lie before them
constexpr int kReadsAtOnce = 8;

struct Probe {
  int rounds;
  Partition partition;  // of exchange(): `ranks` blocks in a cluster, or in a grid
  int size;             // exchange(): tiles of h that a warp sends; read(): vectors
  const Words* from;    // read(): zeros; chase(): v[0] is the index of the next one
  float half;           // 0.5, which the compiler must not know
  // Results, one per block: cycles from start to end, and whether a number was wrong.
  long long* cycles;
  unsigned* wrong;
};

TT_DEVICE long long now() {
#if defined(__CUDACC__)
  long long cycles;
  asm volatile("mov.u64 %0, %%clock64;" : "=l"(cycles)::"memory");
  return cycles;
#else
  return std::chrono::steady_clock::now().time_since_epoch().count();
#endif
}

// Ends the measurement when all warps of the block get here.
TT_DEVICE void report(const Probe& p, long long start, bool wrong) {
  block_barrier(Site::kStart);
  if (thread() == 0) p.cycles[block()] = now() - start;
  if (wrong) p.wrong[block()] = 1;
}

// ---- Barriers and messages ----
// 32-bit words of a row of h, 16-bit numbers, 8 units of each warp; and from one row to the next.
constexpr int row_words(int ranks, int warps) { return 4 * ranks * warps; }
constexpr int row_stride(int ranks, int warps) {
  return operand_stride(2 * row_words(ranks, warps), 2) / 2;
}
constexpr int exchange_shared_bytes(int ranks, int warps, int tiles) {
  return kBuffers + 2 * 8 * tiles * row_stride(ranks, warps) * 4;
}

TT_DEVICE uint32_t message(int round, int from, int to, int tile) {
  return ((static_cast<uint32_t>(round) * 16 + from) * 16 + to) * 4 + tile;
}

// The end of a step, `rounds` times: the barrier of a block or a grid, or, in a cluster, each block's
// part of h to every block, in the places and the order of the LSTM's forward. `V` is a message.
template <typename V, bool kGrid>
TT_DEVICE void exchange_steps(const Probe& p) {
  constexpr int kWords = sizeof(V) / 4,
                kOfBlock = 32 / kWords;  // lanes that send a tile to a block
  const int ranks = p.partition.ranks, rank = block() % ranks, warps = threads() / 32;
  const uint32_t bytes = 8 * p.size * row_words(ranks, warps) * 4;
  const GroupBarrier<kGrid> barrier(p.partition, block() / ranks, Site::kForwardStep, 0, bytes);
  const int at = lane() % kOfBlock * kWords;  // of the tile's 8 rows of 4 words
  auto* const first = reinterpret_cast<uint32_t*>(shared_memory() + kBuffers) +
                      at / 4 * row_stride(ranks, warps) + warp() * 4 + at % 4;
  const auto place = [&](int round, int tile, int from) {
    const int row = 8 * (round % 2 * p.size + tile);
    return first + row * row_stride(ranks, warps) + from * warps * 4;
  };
  barrier.start();
  const long long start = now();
  bool wrong = false;
  int from = 0, tile = 0;  // of the message that is checked
  for (int round = 0; round < p.rounds; ++round) {
    warp_barrier();  // all lanes have read the last round, also those that send nothing
    for (int to = lane() / kOfBlock; barrier.in_cluster() && to < ranks; to += kWords) {
      for (int i = 0; i < p.size; ++i) {
        // `wrong` orders the message after the last round's read, as the product does in the LSTM.
        const uint32_t word = message(round, rank, to, i) + wrong;
        V value;
        TT_UNROLL
        for (int k = 0; k < kWords; ++k) reinterpret_cast<uint32_t*>(&value)[k] = word;
        store_remote(reinterpret_cast<V*>(place(round, i, rank)), value, barrier.mbarrier(round),
                     to);
      }
    }
    barrier.arrive();
    barrier.wait(round);
    if (barrier.in_cluster()) {
      wrong |= *place(round, tile, from) != message(round, from, rank, tile);
      from = from + 1 == ranks ? 0 : from + 1;
      tile = tile + 1 == p.size ? 0 : tile + 1;
    }
  }
  report(p, start, wrong);
}

template <typename V>
TT_KERNEL(kMostThreads)
exchange(TT_PARAMS Probe p) {
  if (p.partition.grid) {
    exchange_steps<V, true>(p);
  } else {
    exchange_steps<V, false>(p);
  }
}

// ---- Memory ----
// Every block reads the same `size` vectors, as it does with h; they are a multiple of 8 per thread.
template <bool kShared>
TT_KERNEL(kMostThreads)
read(TT_PARAMS Probe p) {
  auto* const shared = reinterpret_cast<Words*>(shared_memory());
  for (int i = thread(); kShared && i < p.size; i += threads()) shared[i] = Words{};
  block_barrier(Site::kStart);
  const long long start = now();
  uint32_t sum = 0;
  for (int round = 0; round < p.rounds; ++round) {
    for (int i = thread(); i < p.size; i += kReadsAtOnce * threads()) {
      Words read[kReadsAtOnce];
      TT_UNROLL
      for (int k = 0; k < kReadsAtOnce; ++k) {
        const int at = i + k * threads();
        read[k] = kShared ? shared[at] : load_past_l1(p.from + at);
      }
      TT_UNROLL
      for (const Words& w : read) sum += w.v[0] ^ w.v[1] ^ w.v[2] ^ w.v[3];
    }
  }
  report(p, start, sum != 0);
}

// One load after the other. The last of `rounds` reads 1.
TT_KERNEL(kMostThreads) chase(TT_PARAMS Probe p) {
  const long long start = now();
  uint32_t at = 0;
  for (int round = 0; round < p.rounds; ++round) at = load_past_l1(p.from + at).v[0];
  report(p, start, at != 1);
}

// ---- Arithmetic: chains start at different numbers, else the compiler merges them ----
template <int kChains>
TT_KERNEL(kMostThreads)
mma(TT_PARAMS Probe p) {
  constexpr uint32_t kOnes = 0x3f803f80u;
  float c[kChains][4];
  TT_UNROLL
  for (int i = 0; i < 4 * kChains; ++i) c[i / 4][i % 4] = static_cast<float>(i / 4);
  block_barrier(Site::kStart);
  const long long start = now();
  for (int round = 0; round < p.rounds; ++round) {
    TT_UNROLL
    for (int i = 0; i < kChains; ++i) {
      mma_16x8(BFloat16{}, c[i], kOnes, kOnes, kOnes, kOnes, kOnes, kOnes);
    }
  }
  bool wrong = false;
  TT_UNROLL
  for (int i = 0; i < 4 * kChains; ++i) {
    wrong |= c[i / 4][i % 4] != static_cast<float>(i / 4 + 16 * p.rounds);
  }
  report(p, start, wrong);
}

constexpr int kFmaChains = 16;
TT_KERNEL(kMostThreads) fma(TT_PARAMS Probe p) {
  float x[kFmaChains];
  TT_UNROLL
  for (int i = 0; i < kFmaChains; ++i) x[i] = static_cast<float>(i + 2);
  block_barrier(Site::kStart);
  const long long start = now();
  for (int round = 0; round < p.rounds; ++round) {
    TT_UNROLL
    for (float& v : x) v = v * p.half + p.half;  // towards 1, which 40 rounds reach
  }
  bool wrong = false;
  TT_UNROLL
  for (const float v : x) wrong |= v != 1.0f;
  report(p, start, wrong);
}

// The cell, for two elements per thread; the next sums wait for h.
TT_KERNEL(kMostThreads) pointwise(TT_PARAMS Probe p) {
  float c[2] = {0.0f, p.half}, h[2] = {p.half, 0.0f};
  block_barrier(Site::kStart);
  const long long start = now();
  for (int round = 0; round < p.rounds; ++round) {
    TT_UNROLL
    for (int e = 0; e < 2; ++e) {
      const float sums[4] = {h[e], h[e] + p.half, p.half - h[e], h[e] - p.half};
      const CellResult<BFloat16> result = cell_forward<BFloat16>(sums, c[e], false);
      c[e] = result.c;
      h[e] = to_float(result.h);
    }
  }
  // In (-1, 1) and not 0 where i g and o are not.
  report(p, start, !(h[0] > 0.0f && h[0] < 1.0f && h[1] > 0.0f && h[1] < 1.0f));
}

}  // namespace throughtime::latency
