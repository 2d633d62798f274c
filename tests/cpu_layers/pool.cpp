// common/cpu/pool.h, as C functions; 0 is where an allocation has thrown.
#include <cerrno>
#include <cstdint>
#include <cstdlib>

namespace {

int64_t failures = 0;

int allocate_or_fail(void** memory, size_t alignment, size_t bytes) {
  return failures > 0 ? (--failures, ENOMEM) : posix_memalign(memory, alignment, bytes);
}

}  // namespace

#define posix_memalign allocate_or_fail
#include "common/cpu/pool.cpp"
#include "export.h"

using namespace throughtime;

namespace {

int64_t acquire(int64_t bytes) {
  try {
    return reinterpret_cast<int64_t>(pool_acquire(static_cast<size_t>(bytes)));
  } catch (const std::bad_alloc&) {
    return 0;
  }
}

void release(int64_t memory) { pool_release(reinterpret_cast<void*>(memory)); }

// The system refuses the next `count` allocations.
void fail(int64_t count) { failures = count; }

// [used, idle, peak of used] in bytes.
void statistics(int64_t* out) {
  const PoolStatistics now = pool_statistics();
  out[0] = static_cast<int64_t>(now.used_bytes);
  out[1] = static_cast<int64_t>(now.idle_bytes);
  out[2] = static_cast<int64_t>(now.peak_used_bytes);
}

}  // namespace

EXPORT_PLAIN(acquire)
EXPORT_PLAIN(release)
EXPORT_PLAIN(pool_empty)
EXPORT_PLAIN(fail)
EXPORT_PLAIN(statistics)
