#include "common/cpu/pool.h"

#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <list>
#include <mutex>
#include <new>
#include <unordered_map>

#include <pthread.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace throughtime {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kHugePage = size_t(2) << 20;
constexpr size_t kSmall = size_t(1) << 18;  // malloc recycles smaller blocks itself

struct Block {
  void* memory;
  size_t bytes;
};

using Blocks = std::list<Block>;

struct Pool {
  std::mutex mutex;
  Blocks used;                                     // large blocks
  Blocks idle;                                     // large blocks, the least recently freed first
  std::unordered_map<void*, Blocks::iterator> at;  // of used blocks; used.end() for a small one
  PoolStatistics statistics{0, 0, 0};
};

Pool& pool();
void lock_pool() { pool().mutex.lock(); }
void unlock_pool() { pool().mutex.unlock(); }

// Never destroyed: tensors may outlive every static object of this library. A fork takes the lock: of
// another thread that held it the child would have no more than the lock.
Pool& pool() {
  static Pool* const instance = (pthread_atfork(lock_pool, unlock_pool, unlock_pool), new Pool);
  return *instance;
}

size_t rounded(size_t bytes) {
  const size_t unit = bytes < kHugePage ? kSmall : kHugePage;
  return (bytes + unit - 1) / unit * unit;
}

void* allocate(size_t bytes, size_t alignment) {
  void* memory = nullptr;
  if (posix_memalign(&memory, alignment, bytes) != 0) throw std::bad_alloc();
  return memory;
}

void* allocate_large(size_t bytes) {
  void* memory = allocate(bytes, bytes < kHugePage ? kAlignment : kHugePage);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes >= kHugePage) madvise(memory, bytes, MADV_HUGEPAGE);  // a hint: failure is harmless
#endif
  return memory;
}

// The smallest idle block of at least `bytes` and at most twice as many.
Blocks::iterator best_fit(Pool& p, size_t bytes) {
  auto best = p.idle.end();
  for (auto it = p.idle.begin(); it != p.idle.end(); ++it)
    if (it->bytes >= bytes && it->bytes <= 2 * bytes &&
        (best == p.idle.end() || it->bytes < best->bytes))
      best = it;
  return best;
}

void drop_idle(Pool& p, size_t limit) {
  while (!p.idle.empty() && p.statistics.used_bytes + p.statistics.idle_bytes > limit) {
    p.statistics.idle_bytes -= p.idle.front().bytes;
    std::free(p.idle.front().memory);
    p.idle.pop_front();
  }
}

// Makes an idle block; frees all other idle blocks before it throws.
Blocks::iterator new_block(Pool& p, size_t bytes) {
  const PoolStatistics& s = p.statistics;
  const size_t in_use = s.used_bytes + bytes;  // together with this one
  drop_idle(p, (in_use > s.peak_used_bytes ? in_use : s.peak_used_bytes) - bytes);
  p.idle.push_back({nullptr, 0});
  const auto block = std::prev(p.idle.end());
  try {
    block->memory = allocate_large(bytes);
  } catch (const std::bad_alloc&) {
    p.idle.erase(block);
    if (p.idle.empty()) throw;
    drop_idle(p, s.used_bytes);
    return new_block(p, bytes);
  }
  block->bytes = bytes;
  p.statistics.idle_bytes += bytes;
  return block;
}

}  // namespace

// If this throws, the pool is as before, perhaps with fewer idle blocks.
void* pool_acquire(size_t bytes) {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  if (bytes < kSmall) {
    void* const memory = allocate(bytes ? bytes : 1, kAlignment);
    try {
      p.at.emplace(memory, p.used.end());
    } catch (...) {
      std::free(memory);
      throw;
    }
    return memory;
  }
  if (bytes > SIZE_MAX / 2) throw std::bad_alloc();
  bytes = rounded(bytes);
  auto block = best_fit(p, bytes);
  if (block == p.idle.end()) block = new_block(p, bytes);
  p.at.emplace(block->memory, block);
  p.used.splice(p.used.end(), p.idle, block);
  PoolStatistics& s = p.statistics;
  s.idle_bytes -= block->bytes;
  s.used_bytes += block->bytes;
  if (s.used_bytes > s.peak_used_bytes) s.peak_used_bytes = s.used_bytes;
  return block->memory;
}

// Runs in destructors of tensors: allocates nothing, throws nothing.
void pool_release(void* memory) {
  if (!memory) return;
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  const auto found = p.at.find(memory);
  const auto block = found->second;
  p.at.erase(found);
  if (block == p.used.end()) {
    std::free(memory);
    return;
  }
  p.statistics.used_bytes -= block->bytes;
  p.statistics.idle_bytes += block->bytes;
  p.idle.splice(p.idle.end(), p.used, block);
}

void pool_empty() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  drop_idle(p, p.statistics.used_bytes);
  p.statistics.peak_used_bytes = p.statistics.used_bytes;
}

PoolStatistics pool_statistics() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  return p.statistics;
}

}  // namespace throughtime
