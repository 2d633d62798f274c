// What blocks of a cluster send each other through shared memory: the exchange of one step by
// st.async, and the bandwidth of remote stores.
#pragma once

#include <cstdint>

#include "device_ops.cuh"
#include "measure.h"

namespace latency {

constexpr int kExchangeThreads = 256;

// Word `at` of what `from` sends to `to` in a round below 4096.
LATENCY_DEVICE unsigned message(int round, int from, int to, int at) {
  return static_cast<unsigned>(round | from << 12 | to << 16 | at << 20);
}

// Every block sends `bytes` to each block of its cluster, itself included, and has them from each:
// the h of a step. The receiver's mbarrier counts bytes. Rounds use two buffers and two mbarriers in
// turn. No block is two rounds ahead: round r + 2 needs this block's part of r + 1, which it sends
// after it has read round r. kWide: bytes of one store.
template <int kWide>
__global__ void __launch_bounds__(kExchangeThreads, 1)
    exchange_kernel(int rounds, int bytes, Report report) {
  extern __shared__ __align__(16) char buffers[];  // [2][source][bytes]
  __shared__ uint64_t barriers[2];
  const int ranks = cluster_size(), rank = cluster_rank(), stores = bytes / kWide;
  const int thread = static_cast<int>(threadIdx.x);
  const uint32_t memory = shared_address(buffers), first_barrier = shared_address(barriers);
  if (thread < 2) barrier_init(first_barrier + 8 * thread, 1);
  Patience patience;
  unsigned wrong = 0;
  __syncthreads();
  cluster_barrier();
  const long long start = now();
  for (int round = 0; round < rounds; ++round) {
    const int turn = round % 2;
    const uint32_t buffer = memory + turn * ranks * bytes, barrier = first_barrier + 8 * turn;
    if (thread == 0) arrive_and_expect(barrier, ranks * bytes);
    for (int i = thread; i < ranks * stores; i += kExchangeThreads) {
      const int to = i / stores, word = i % stores * (kWide / 4);
      const uint32_t place = at_rank(buffer + rank * bytes + word * 4, to);
      const uint2 value =
          make_uint2(message(round, rank, to, word), message(round, rank, to, word + 1));
      store_async<kWide>(place, value, at_rank(barrier, to));
    }
    wait(barrier, round / 2 % 2, patience);
    // 16 bytes per thread of what came; the round after next may overwrite them.
    const int i = thread % (ranks * bytes / 16), from = i / (bytes / 16),
              word = i % (bytes / 16) * 4;
    const uint4 got = load_remote(buffer + i * 16);
    wrong += got.x != message(round, from, rank, word) ||
             got.y != message(round, from, rank, word + 1) ||
             got.z != message(round, from, rank, word + 2) ||
             got.w != message(round, from, rank, word + 3);
    __syncthreads();
  }
  const long long cycles = now() - start;
  wrong = __syncthreads_count(wrong + patience.given_up() != 0);
  if (thread == 0) {
    report.cycles[blockIdx.x] = cycles;
    report.wrong[blockIdx.x] = wrong;
  }
  cluster_barrier();  // no block leaves while another may write to it
}

template <int kWide>
void measure_exchanges(Gpu& gpu) {
  constexpr int kRounds = 2048;
  for (int size = 1; size <= 16; size *= 2) {
    for (const int bytes : {256, 2048}) {
      Clusters clusters(&exchange_kernel<kWide>, size, kExchangeThreads, 2 * size * bytes);
      for (const bool all : {false, true}) {
        const std::string parameter = text("store=%d;blocks=%d;bytes=%d;clusters=%s", kWide, size,
                                           bytes, all ? "all" : "one");
        if (clusters.most() == 0) {
          skipped("exchange", parameter, clusters.why_not());
          continue;
        }
        const int many = all ? std::min(clusters.most(), gpu.multiprocessors() / size) : 1;
        measure("exchange", parameter, "cycles", [&] {
          return gpu.cycles(size * many, [&] {
            return clusters.launch(many, kRounds, bytes, gpu.report());
          }) / kRounds;
        });
      }
    }
  }
}

inline void measure_exchange(Gpu& gpu) {
  if (!has_clusters(gpu, "exchange")) return;
  measure_exchanges<4>(gpu);  // what the forward and the backward of csrc/lstm send
  measure_exchanges<8>(gpu);
}

// ---- Bandwidth ----
constexpr int kStreamThreads = 512, kStreamVectors = 8;
constexpr int kStreamBytes = kStreamThreads * kStreamVectors * 16;

// Every block writes to the memory of the next one, over and over.
__global__ void __launch_bounds__(kStreamThreads, 1) stream_kernel(int rounds, Report report) {
  extern __shared__ __align__(16) char buffer[];
  const int thread = static_cast<int>(threadIdx.x);
  auto* own = reinterpret_cast<uint4*>(buffer);
  __syncthreads();
  cluster_barrier();
  const uint32_t peer =
      at_rank(shared_address(buffer), (cluster_rank() + 1) % cluster_size()) + thread * 16;
  const long long start = now();
  for (int round = 0; round < rounds; ++round) {
#pragma unroll
    for (int i = 0; i < kStreamVectors; ++i) {
      store_remote(peer + i * kStreamThreads * 16, make_uint4(round, i, thread, round));
    }
  }
  cluster_barrier();  // what was stored is there
  const long long cycles = now() - start;
  const uint4 last = own[thread];
  const unsigned wrong =
      __syncthreads_count(last.x != static_cast<unsigned>(rounds - 1) || last.z != threadIdx.x);
  if (thread == 0) {
    report.cycles[blockIdx.x] = cycles;
    report.wrong[blockIdx.x] = wrong;
  }
}

inline void measure_stream(Gpu& gpu) {
  constexpr int kRounds = 512;
  if (!has_clusters(gpu, "dsmem_store")) return;
  for (int size = 1; size <= 16; size *= 2) {
    Clusters clusters(&stream_kernel, size, kStreamThreads, kStreamBytes);
    for (const bool all : {false, true}) {
      const std::string parameter = text("blocks=%d;clusters=%s", size, all ? "all" : "one");
      if (clusters.most() == 0) {
        skipped("dsmem_store", parameter, clusters.why_not());
        continue;
      }
      const int many = all ? std::min(clusters.most(), gpu.multiprocessors() / size) : 1;
      measure("dsmem_store", parameter, "bytes/cycle/SM", [&] {
        return static_cast<double>(kRounds) * kStreamBytes / gpu.cycles(size * many, [&] {
          return clusters.launch(many, kRounds, gpu.report());
        });
      });
    }
  }
}

// How many clusters of blocks that fill an SM each run at once: parts of a GPU have odd numbers of
// SMs, so some stay idle.
inline void measure_active_clusters(Gpu& gpu) {
  if (!has_clusters(gpu, "active_clusters")) return;
  for (int size = 1; size <= 16; size *= 2) {
    const Clusters clusters(&stream_kernel, size, kStreamThreads, gpu.shared_bytes());
    const std::string parameter = text("blocks=%d", size);
    if (clusters.most() == 0) {
      skipped("active_clusters", parameter, clusters.why_not());
    } else {
      row("active_clusters", parameter, clusters.most(), "clusters");
    }
  }
}

}  // namespace latency
