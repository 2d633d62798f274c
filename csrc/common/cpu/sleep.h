// Sleep of a worker that waits for others, told apart from the time in which it wants a CPU.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <ctime>

#if defined(__linux__)
#include <fcntl.h>
#include <unistd.h>
#endif

namespace throughtime {

// Nanoseconds that this thread has slept of its own will.
inline constinit thread_local int64_t slept = 0;

namespace {

inline int64_t nanoseconds(clockid_t clock) {
  timespec time;
  clock_gettime(clock, &time);
  return int64_t(time.tv_sec) * 1'000'000'000 + time.tv_nsec;
}

// Nanoseconds that this thread was ready to run and had no CPU; 0 where the system does not tell.
inline int64_t queued() {
#if defined(__linux__)
  const int file = open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC);
  if (file < 0) return 0;
  char text[64];  // "RAN QUEUED SLICES"
  const ssize_t bytes = read(file, text, sizeof(text) - 1);
  close(file);
  if (bytes <= 0) return 0;
  text[bytes] = 0;
  char* rest;
  std::strtoll(text, &rest, 10);
  return std::strtoll(rest, nullptr, 10);
#else
  return 0;
#endif
}

// Time that this thread neither ran nor was ready to, but for a constant.
inline int64_t idle() {
  return nanoseconds(CLOCK_MONOTONIC) - nanoseconds(CLOCK_THREAD_CPUTIME_ID) - queued();
}

// Sleeps a little, again and again until done(). Where the system does not tell how long a thread
// waits for a CPU after its sleep, that counts as sleep too.
template <typename Done>
inline void sleep_until(const Done& done) {
  const int64_t before = idle();
  // Not sched_yield: Linux lets a thread that yields often wait for hundreds of milliseconds.
  for (const timespec interval{0, 20'000}; !done();) nanosleep(&interval, nullptr);
  slept += idle() - before;
}

}  // namespace
}  // namespace throughtime
