// The device layer (csrc/common/cuda/device.cuh) on the CPU: one thread per CUDA thread, real barriers,
// and collectives that exchange data between lanes in the hardware's fragment layouts.
//
// Shared memory starts as NaN, so reading uninitialised shared memory shows in the results.
//
// A program that defines TT_OBSERVE(what, numbers...) is told what a kernel does: trace.cpp.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include <pthread.h>
#include <sched.h>

#define TT_DEVICE inline
#define TT_KERNEL(threads) void
#define TT_PARAMS const
#define TT_UNROLL
#define TT_DO_NOT_UNROLL

#ifndef TT_OBSERVE
#define TT_OBSERVE(...)
#endif

namespace throughtime::device {

// ---- The machine ----
class Barrier {
 public:
  explicit Barrier(unsigned threads) { pthread_barrier_init(&barrier_, nullptr, threads); }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  Barrier(const Barrier&) = delete;
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

// Two sets of slots in turn: before a lane writes into a set again, all lanes have passed a later
// barrier, so one barrier per collective is enough.
struct Warp {
  Barrier barrier{32};
  uint32_t slots[2][6][32] = {};
};

struct Block {
  Block(int threads, size_t shared_bytes) : barrier(threads), warps(threads / 32) {
    for (auto& w : warps) w = std::make_unique<Warp>();
    shared.resize(shared_bytes / sizeof(Line) + 1);
    std::memset(shared.data(), 0xff, shared.size() * sizeof(Line));
  }
  struct alignas(128) Line {
    char bytes[128];
  };
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<Line> shared;
};

struct Cluster {
  Cluster(int blocks, int threads, size_t shared_bytes) : barrier(blocks * threads) {
    for (int i = 0; i < blocks; ++i) {
      this->blocks.push_back(std::make_unique<Block>(threads, shared_bytes));
    }
  }
  Barrier barrier;
  std::vector<std::unique_ptr<Block>> blocks;
};

struct Here {
  Cluster* cluster;
  Block* block;
  int block_index, thread, threads;
  int turn;  // which set of slots the next collective takes
};
inline thread_local Here here;

// Counts of what the kernels did: products of tiles, waits for other blocks.
struct Work {
  int64_t products, waits;
};
inline Work work{};
inline void count(int64_t& counter) { __atomic_fetch_add(&counter, 1, __ATOMIC_RELAXED); }

// The barrier that a mutation test leaves out; kCount: none.
inline Site dropped = Site::kCount;

// ---- Indices ----
inline int thread() { return here.thread; }
inline int threads() { return here.threads; }
inline int block() { return here.block_index; }
inline char* shared_memory() { return here.block->shared.front().bytes; }

// ---- Barriers ----
inline void block_barrier(Site site) {
  TT_OBSERVE("block", site);
  if (site != dropped) here.block->barrier.wait();
}
inline void cluster_barrier(Site site) {
  TT_OBSERVE("cluster", site);
  if (site != dropped) here.cluster->barrier.wait();
}
inline void grid_arrive(Site site, unsigned* arrivals) {
  block_barrier(site);
  // Counted even if left out, else all later barriers would wait for ever.
  const int order = site == dropped ? __ATOMIC_RELAXED : __ATOMIC_RELEASE;
  if (here.thread == 0) {
    TT_OBSERVE("add");
    __atomic_fetch_add(arrivals, 1u, order);
  }
}
inline void grid_wait(Site site, const unsigned* arrivals, unsigned all) {
  count(work.waits);
  if (site == dropped) return;
  if (here.thread == 0) {
    TT_OBSERVE("poll", all);
    while (__atomic_load_n(arrivals, __ATOMIC_ACQUIRE) < all) sched_yield();
  }
  block_barrier(site);
}

// ---- Shared memory of other blocks of the cluster ----
inline int64_t shared_offset(const void* p) {
  return static_cast<const char*>(p) - shared_memory();
}
template <typename T>
T* map_to_rank(T* p, int rank) {
  return reinterpret_cast<T*>(here.cluster->blocks[rank]->shared.front().bytes + shared_offset(p));
}

// Here an mbarrier counts the bytes of all rounds. A store releases and does not acquire, as on the GPU.
inline void mbarrier_expect([[maybe_unused]] Mbarrier* barrier, [[maybe_unused]] uint32_t bytes) {
  TT_OBSERVE("expect", shared_offset(barrier), bytes);
}
inline void mbarrier_init(Mbarrier* barrier, uint32_t bytes) {
  *barrier = 0;
  mbarrier_expect(barrier, bytes);
}
template <typename T>
void store_remote(T* to, T value, Mbarrier* barrier, int rank) {
  TT_OBSERVE("send", rank, shared_offset(to), sizeof(T), shared_offset(barrier));
  *map_to_rank(to, rank) = value;
  __atomic_fetch_add(map_to_rank(barrier, rank), sizeof(T), __ATOMIC_RELEASE);
}
inline void mbarrier_wait(Site site, Mbarrier* barrier, uint32_t round, uint32_t bytes) {
  TT_OBSERVE("wait", shared_offset(barrier), round);
  count(work.waits);
  if (site == dropped) return;
  const Mbarrier all = (round + Mbarrier{1}) * bytes;
  while (__atomic_load_n(barrier, __ATOMIC_ACQUIRE) < all) sched_yield();
}

// ---- Global memory ----
template <typename T>
T load_past_l1(const T* p) {
  return *p;
}
// As late as it may be.
inline thread_local std::vector<std::pair<Words*, const Words*>> copies;
inline void copy_async(Words* to, const Words* from) { copies.emplace_back(to, from); }
inline void copies_wait() {
  for (const auto& [to, from] : copies) *to = *from;
  copies.clear();
}
inline void prefetch(const void*) {}

// ---- Warp ----
inline void warp_barrier() {
  TT_OBSERVE("warp");
  here.block->warps[here.thread / 32]->barrier.wait();
}

// Shares `count` words of every lane with all lanes.
inline const uint32_t (*exchange(const uint32_t* words, int count))[32] {
  TT_OBSERVE("warp");
  Warp& warp = *here.block->warps[here.thread / 32];
  auto* slots = warp.slots[here.turn];
  here.turn ^= 1;
  for (int i = 0; i < count; ++i) slots[i][here.thread % 32] = words[i];
  warp.barrier.wait();
  return slots;
}

inline uint32_t warp_ballot(bool value) {
  const uint32_t word = value;
  const auto* all = exchange(&word, 1);
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= all[0][i] << i;
  return bits;
}

inline uint32_t transpose_8x8(uint32_t pair) {
  const auto* all = exchange(&pair, 1);
  const int row = here.thread % 32 / 4, column = here.thread % 4 * 2;
  // Element (i, row) lies in lane 4 i + row / 2.
  const auto element = [&](int i) { return all[0][4 * i + row / 2] >> (row % 2 * 16) & 0xffffu; };
  return element(column) | element(column + 1) << 16;
}

template <typename Int>
void hold(Int&) {}

// ---- Numbers ----
inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline bool is_finite(float x) { return std::isfinite(x); }
inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31u,
                 fraction = x.bits & 0x3ffu;
  if (exponent == 31) return from_bits(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0) {  // subnormal: fraction * 2^-24
    return from_bits(sign | bits_of(std::ldexp(static_cast<float>(fraction), -24)));
  }
  return from_bits(sign | (exponent + 112) << 23 | fraction << 13);
}

template <typename S>
S from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = bits_of(x);
  if (std::isnan(x)) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <>
inline Float16 from_float<Float16>(float x) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000u;
  const float size = std::fabs(x);
  if (std::isnan(x)) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (size < from_bits(0x38800000u)) {  // below 2^-14: multiples of 2^-24, rounded to even
    return {
        static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(std::ldexp(size, 24))))};
  }
  const uint32_t bits = bits_of(size) - (112u << 23);
  return {static_cast<uint16_t>(sign | (bits + 0xfffu + (bits >> 13 & 1u)) >> 13)};
}

// The fast ones have the largest error that the hardware's may have.
inline float exponential(float x) { return std::exp(x); }
inline float fast_exponential(float x) {
  return std::isfinite(x) ? std::exp(x) * (1.0f + 1e-7f * std::fabs(x)) : std::exp(x);
}
inline float reciprocal(float x) { return 1.0f / x; }
inline float tangent(float x) { return std::tanh(x); }
inline float fast_tangent(float x) { return std::tanh(x) * (1.0f - 0x1p-11f); }

// ---- Matrix unit ----
template <typename S>
void mma_16x8(S, float* c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
              uint32_t b1) {
  const uint32_t words[] = {a0, a1, a2, a3, b0, b1};
  const auto* all = exchange(words, 6);
  if (here.thread % 32 == 0) count(work.products);
  const int g = here.thread % 32 / 4, q = here.thread % 4;
  const auto half = [](uint32_t word, int high) {
    return to_float(S{static_cast<uint16_t>(word >> (16 * high))});
  };
  // a0: rows 0-7, k 0-7; a1: rows 8-15, k 0-7; a2, a3: the same, k 8-15. b0: k 0-7; b1: k 8-15.
  const auto a = [&](int row, int k) {
    return half(all[row / 8 + k / 8 * 2][row % 8 * 4 + k % 8 / 2], k % 2);
  };
  const auto b = [&](int k, int column) {
    return half(all[4 + k / 8][column * 4 + k % 8 / 2], k % 2);
  };
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, column = 2 * q + i % 2;
    for (int k = 0; k < 16; ++k) c[i] += a(row, k) * b(k, column);
  }
}

// Rounded to nearest; NaN stays NaN.
inline uint32_t to_tf32(float x) {
  const uint32_t bits = bits_of(x);
  if (std::isnan(x)) return bits | 0x400000u;
  return (bits + 0xfffu + (bits >> 13 & 1u)) & ~0x1fffu;
}

// The unit drops the lower 13 bits of a and b, and rounds its sums toward zero.
inline void mma_16x8(float, float* c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                     uint32_t b0, uint32_t b1) {
  const uint32_t words[] = {a0, a1, a2, a3, b0, b1};
  const auto* all = exchange(words, 6);
  if (here.thread % 32 == 0) count(work.products);
  const int g = here.thread % 32 / 4, q = here.thread % 4;
  const auto number = [&](int word, int row, int k) {
    return static_cast<double>(from_bits(all[word][row * 4 + k] & ~0x1fffu));
  };
  // a0: rows 0-7, k 0-3; a1: rows 8-15, k 0-3; a2, a3: the same, k 4-7. b0: k 0-3; b1: k 4-7.
  for (int i = 0; i < 4; ++i) {
    const int upper = i / 2, column = 2 * q + i % 2;
    double sum = c[i];
    for (int k = 0; k < 8; ++k) {
      sum += number(upper + k / 4 * 2, g, k % 4) * number(4 + k / 4, column, k % 4);
    }
    c[i] = static_cast<float>(sum);
    if (std::fabs(static_cast<double>(c[i])) > std::fabs(sum)) c[i] = std::nextafter(c[i], 0.0f);
  }
}

// ---- Launching ----
// Without shared memory, barriers and collectives: one thread after the other.
template <typename Params>
void launch_in_turn(void (*kernel)(Params), const Params& params, int blocks, int threads) {
  for (int b = 0; b < blocks; ++b) {
    for (int t = 0; t < threads; ++t) {
      here = {nullptr, nullptr, b, t, threads, 0};
      kernel(params);
    }
  }
}

// Blocks 0 .. blocks - 1 in clusters of `cluster`; all at once if `together` (one block per SM that
// may wait for each other), otherwise cluster by cluster.
template <typename Params>
void launch(void (*kernel)(Params), const Params& params, int blocks, int threads, int cluster,
            size_t shared_bytes, bool together) {
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<std::thread> running;
  const auto join = [&] {
    for (auto& t : running) t.join();
    running.clear();
    clusters.clear();
  };
  for (int first = 0; first < blocks; first += cluster) {
    clusters.push_back(std::make_unique<Cluster>(cluster, threads, shared_bytes));
    Cluster* c = clusters.back().get();
    for (int b = 0; b < cluster; ++b) {
      for (int t = 0; t < threads; ++t) {
        running.emplace_back([=] {
          here = {c, c->blocks[b].get(), first + b, t, threads, 0};
          kernel(params);
        });
      }
    }
    if (!together) join();
  }
  join();
}

}  // namespace throughtime::device
