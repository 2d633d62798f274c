// What blocks of a cluster tell each other through shared memory: one step's exchange by several
// means, and the bandwidth of remote stores and loads.
#pragma once

#include <cstdint>

#include "device_ops.cuh"
#include "measure.h"

namespace latency {

constexpr int kExchangeThreads = 256;

enum class Means {
  kClusterBarrier,  // remote stores, barrier.cluster
  kAsyncStore,      // st.async; the receiver's mbarrier counts bytes
  kRemoteArrive     // remote stores, one arrival per warp and receiver at its mbarrier
};

// Word `at` of what `from` tells `to` in a round below 4096.
LATENCY_DEVICE unsigned message(int round, int from, int to, int at) {
  return static_cast<unsigned>(round | from << 12 | to << 16 | at << 20);
}

// Every block sends `bytes` to each block of its cluster, itself included, and has them from each:
// the h of a step. Rounds use two buffers and two mbarriers in turn. Nobody is two rounds ahead:
// round r + 2 needs this block's part of r + 1, which it sends after it has read round r.
// kWide: bytes of one store.
template <Means kMeans, int kWide>
__global__ void __launch_bounds__(kExchangeThreads, 1)
    exchange_kernel(int rounds, int bytes, Report report) {
  extern __shared__ __align__(16) char buffers[];  // [2][source][bytes]
  __shared__ uint64_t barriers[2];
  const int ranks = cluster_size(), rank = cluster_rank(), stores = bytes / kWide;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const uint32_t memory = shared_address(buffers), first_barrier = shared_address(barriers);
  if (thread < 2) {
    barrier_init(first_barrier + 8 * thread,
                 kMeans == Means::kAsyncStore ? 1 : ranks * (kExchangeThreads / 32));
  }
  Patience patience;
  unsigned wrong = 0;
  __syncthreads();
  cluster_barrier<Order::kReleaseAcquire>();
  const long long start = now();
  for (int round = 0; round < rounds; ++round) {
    const int turn = round % 2;
    const uint32_t buffer = memory + turn * ranks * bytes, barrier = first_barrier + 8 * turn;
    if (kMeans == Means::kAsyncStore && thread == 0) arrive_and_expect(barrier, ranks * bytes);
    for (int i = thread; i < ranks * stores; i += kExchangeThreads) {
      const int to = i / stores, word = i % stores * (kWide / 4);
      const uint32_t place = at_rank(buffer + rank * bytes + word * 4, to);
      const uint4 value =
          make_uint4(message(round, rank, to, word), message(round, rank, to, word + 1),
                     message(round, rank, to, word + 2), message(round, rank, to, word + 3));
      if (kMeans == Means::kAsyncStore) {
        store_async<kWide>(place, value, at_rank(barrier, to));
      } else {
        store_remote(place, value);
      }
    }
    if (kMeans == Means::kClusterBarrier) {
      cluster_barrier<Order::kReleaseAcquire>();
    } else {
      if (kMeans == Means::kRemoteArrive) {
        __syncwarp();  // a lane's arrival releases what its warp wrote
        if (lane < ranks) arrive_remote(at_rank(barrier, lane));
      }
      wait(barrier, round / 2 % 2, patience);
    }
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
  cluster_barrier<Order::kReleaseAcquire>();  // nobody leaves while a peer may write to it
}

template <Means kMeans, int kWide>
void measure_exchanges(Gpu& gpu, const char* means) {
  static_assert(kMeans == Means::kAsyncStore || kWide == 16, "plain stores are 16 bytes wide");
  constexpr int kRounds = 2048;
  for (int size = 1; size <= 16; size *= 2) {
    for (const int bytes : {256, 2048}) {
      Clusters clusters(&exchange_kernel<kMeans, kWide>, size, kExchangeThreads, 2 * size * bytes);
      for (const bool all : {false, true}) {
        const std::string parameter = text("means=%s;blocks=%d;bytes=%d;clusters=%s", means, size,
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
  measure_exchanges<Means::kClusterBarrier, 16>(gpu, "cluster-barrier");
  measure_exchanges<Means::kRemoteArrive, 16>(gpu, "remote-arrive");
  // What the forward and the backward of csrc/lstm send, and the widest that there is.
  measure_exchanges<Means::kAsyncStore, 4>(gpu, "st.async-4");
  measure_exchanges<Means::kAsyncStore, 8>(gpu, "st.async-8");
  measure_exchanges<Means::kAsyncStore, 16>(gpu, "st.async-16");
}

// ---- Bandwidth ----
constexpr int kStreamThreads = 512, kStreamVectors = 8;
constexpr int kStreamBytes = kStreamThreads * kStreamVectors * 16;

// Every block writes to, or reads from, the memory of the next one, over and over.
template <bool kStore>
__global__ void __launch_bounds__(kStreamThreads, 1) stream_kernel(int rounds, Report report) {
  extern __shared__ __align__(16) char buffer[];
  const int thread = static_cast<int>(threadIdx.x);
  auto* own = reinterpret_cast<uint4*>(buffer);
  for (int i = 0; i < kStreamVectors; ++i)
    own[i * kStreamThreads + thread] = make_uint4(i, i, i, i);
  __syncthreads();
  cluster_barrier<Order::kReleaseAcquire>();
  const uint32_t peer =
      at_rank(shared_address(buffer), (cluster_rank() + 1) % cluster_size()) + thread * 16;
  uint4 sum = make_uint4(0, 0, 0, 0);
  const long long start = now();
  for (int round = 0; round < rounds; ++round) {
    uint4 v[kStreamVectors];
#pragma unroll
    for (int i = 0; i < kStreamVectors; ++i) {
      if (kStore) {
        store_remote(peer + i * kStreamThreads * 16, make_uint4(round, i, thread, round));
      } else {
        v[i] = load_remote(peer + i * kStreamThreads * 16);
      }
    }
    if (!kStore) {
#pragma unroll
      for (int i = 0; i < kStreamVectors; ++i) {
        sum = make_uint4(sum.x + v[i].x, sum.y ^ v[i].y, sum.z + v[i].z, sum.w ^ v[i].w);
      }
    }
  }
  cluster_barrier<Order::kReleaseAcquire>();  // what was stored is there
  const long long cycles = now() - start;
  unsigned wrong = 0;
  if (kStore) {
    const uint4 last = own[thread];
    wrong = last.x != static_cast<unsigned>(rounds - 1) || last.z != threadIdx.x;
  } else {
    wrong = sum.x != rounds * (kStreamVectors * (kStreamVectors - 1) / 2u);
  }
  wrong = __syncthreads_count(wrong);
  if (thread == 0) {
    report.cycles[blockIdx.x] = cycles;
    report.wrong[blockIdx.x] = wrong;
    report.sink[blockIdx.x] = sum.y ^ sum.z ^ sum.w;
  }
}

template <bool kStore>
void measure_streams(Gpu& gpu) {
  constexpr int kRounds = 512;
  const char* name = kStore ? "dsmem_store" : "dsmem_load";
  for (int size = 1; size <= 16; size *= 2) {
    Clusters clusters(&stream_kernel<kStore>, size, kStreamThreads, kStreamBytes);
    for (const bool all : {false, true}) {
      const std::string parameter = text("blocks=%d;clusters=%s", size, all ? "all" : "one");
      if (clusters.most() == 0) {
        skipped(name, parameter, clusters.why_not());
        continue;
      }
      const int many = all ? std::min(clusters.most(), gpu.multiprocessors() / size) : 1;
      measure(name, parameter, "bytes/cycle/SM", [&] {
        return static_cast<double>(kRounds) * kStreamBytes / gpu.cycles(size * many, [&] {
          return clusters.launch(many, kRounds, gpu.report());
        });
      });
    }
  }
}

inline void measure_stream(Gpu& gpu) {
  if (!has_clusters(gpu, "dsmem_store")) return;
  measure_streams<true>(gpu);
  measure_streams<false>(gpu);
}

// How many clusters of blocks that fill an SM each run at once: parts of a GPU have odd numbers of
// SMs, so some stay idle.
inline void measure_active_clusters(Gpu& gpu) {
  if (!has_clusters(gpu, "active_clusters")) return;
  for (int size = 1; size <= 16; size *= 2) {
    const Clusters clusters(&stream_kernel<true>, size, kStreamThreads, gpu.shared_bytes());
    const std::string parameter = text("blocks=%d", size);
    if (clusters.most() == 0) {
      skipped("active_clusters", parameter, clusters.why_not());
    } else {
      row("active_clusters", parameter, clusters.most(), "clusters");
    }
  }
}

}  // namespace latency
