#include "pool.h"

#include <cstdlib>
#include <list>
#include <mutex>
#include <new>
#include <unordered_map>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace throughtime {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kHugePage = size_t(2) << 20;
constexpr size_t kSmall = size_t(1) << 18;  // below: malloc recycles such blocks itself

struct Block {
  void* memory;
  size_t bytes;
};

struct Pool {
  std::mutex mutex;
  std::unordered_map<void*, size_t> used;  // size 0: a small block
  std::list<Block> idle;                   // least recently freed first
  PoolStatistics statistics{0, 0, 0};
};

// Never destroyed: tensors may outlive every static object of this library.
Pool& pool() {
  static Pool* const instance = new Pool;
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

// The smallest idle block that fits and is not more than twice as large as asked for.
std::list<Block>::iterator best_fit(Pool& p, size_t bytes) {
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

}  // namespace

void* pool_acquire(size_t bytes) {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  if (bytes < kSmall) {
    void* const memory = allocate(bytes ? bytes : 1, kAlignment);
    p.used.emplace(memory, 0);
    return memory;
  }
  bytes = rounded(bytes);
  Block block{nullptr, bytes};
  const auto fit = best_fit(p, bytes);
  if (fit != p.idle.end()) {
    block = *fit;
    p.statistics.idle_bytes -= fit->bytes;
    p.idle.erase(fit);
  }
  PoolStatistics& s = p.statistics;
  s.used_bytes += block.bytes;
  if (s.used_bytes > s.peak_used_bytes) s.peak_used_bytes = s.used_bytes;
  drop_idle(p, s.peak_used_bytes);
  if (!block.memory) {
    try {
      block.memory = allocate_large(bytes);
    } catch (...) {
      s.used_bytes -= bytes;
      throw;
    }
  }
  p.used.emplace(block.memory, block.bytes);
  return block.memory;
}

void pool_release(void* memory) {
  if (!memory) return;
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  const auto found = p.used.find(memory);
  const size_t bytes = found->second;
  p.used.erase(found);
  if (bytes == 0) {
    std::free(memory);
    return;
  }
  p.statistics.used_bytes -= bytes;
  p.statistics.idle_bytes += bytes;
  p.idle.push_back({memory, bytes});
}

void pool_empty() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  drop_idle(p, p.statistics.used_bytes);
}

PoolStatistics pool_statistics() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  return p.statistics;
}

}  // namespace throughtime
