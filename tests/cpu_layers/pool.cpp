// common/cpu/pool.h, as C functions; 0 is where an allocation has thrown.
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include <sys/wait.h>
#include <unistd.h>

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

// Threads hold four blocks each. Returns how often a block was not what its thread had made it.
int64_t hold(int64_t threads, int64_t turns) {
  std::atomic<int64_t> wrong{0};
  std::vector<std::thread> running;
  for (int64_t mark = 1; mark <= threads; ++mark)
    running.emplace_back([&wrong, mark, turns] {
      std::mt19937 choose(static_cast<unsigned>(mark));
      std::pair<char*, size_t> held[4] = {};
      for (int64_t turn = 0; turn < turns; ++turn) {
        auto& [block, size] = held[choose() % 4];
        if (block) wrong += block[0] != mark || block[size - 1] != mark;
        pool_release(block);
        size = choose() % (1 << 20) + 1;
        block = static_cast<char*>(pool_acquire(size));
        block[0] = block[size - 1] = static_cast<char>(mark);
      }
      for (const auto& [block, size] : held) pool_release(block);
    });
  for (std::thread& thread : running) thread.join();
  return wrong;
}

// Forks `count` children while a thread takes blocks and gives them back; each does so too. Returns how
// many were at it for more than five seconds.
int64_t forks(int64_t count) {
  std::atomic<bool> going{true};
  std::thread running([&going] {
    while (going) pool_release(pool_acquire(1 << 20));
  });
  int64_t hung = 0;
  for (int64_t child = 0; child < count && hung < 3; ++child) {
    const pid_t id = fork();
    if (id == 0) {
      std::signal(SIGALRM, SIG_DFL);
      alarm(5);
      pool_release(pool_acquire(1 << 20));
      _exit(0);
    }
    int status = 0;
    waitpid(id, &status, 0);
    hung += !WIFEXITED(status);
  }
  going = false;
  running.join();
  return hung;
}

}  // namespace

EXPORT_PLAIN(acquire)
EXPORT_PLAIN(release)
EXPORT_PLAIN(pool_empty)
EXPORT_PLAIN(fail)
EXPORT_PLAIN(statistics)
EXPORT_PLAIN(hold)
EXPORT_PLAIN(forks)
