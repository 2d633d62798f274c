// common/cpu/cpus.h: regions in made-up time on a machine of any size, and regions of real threads
// that meet at the barrier of common/cpu/team.h.
#include <cstdint>
#include <ctime>
#include <thread>
#include <vector>

namespace {

int machine_cpus = 0;
bool made_up = false;  // the time is
int64_t made_up_wall = 1;
thread_local int64_t made_up_ran = 0;

int read_clock(clockid_t clock, timespec* time) {
  if (!made_up) return clock_gettime(clock, time);
  const int64_t now = clock == CLOCK_MONOTONIC ? made_up_wall : made_up_ran;
  *time = {now / 1'000'000'000, now % 1'000'000'000};
  return 0;
}

}  // namespace

#define clock_gettime read_clock
#include "common/cpu/cpus.cpp"
#include "common/cpu/team.h"
#include "export.h"

extern "C" int omp_get_num_procs() { return machine_cpus; }

using namespace throughtime;

namespace {

int64_t usable() { return cpus().usable(); }

// Time is made up from now on, and the machine has that many CPUs, all free as far as is known.
void machine(int64_t cpus) {
  made_up = true;
  machine_cpus = static_cast<int>(cpus);
  taken = 0;
}

void pass(int64_t time) { made_up_wall += time; }

// A region that takes `length`. Worker 0 is the calling thread and begins after `launch`; worker i
// begins late[i] after it, does not run for off[i], and sleeps for asleep[i] of that.
void region(int64_t workers, int64_t length, int64_t launch, const int64_t* late,
            const int64_t* off, const int64_t* asleep) {
  const int64_t called = made_up_wall + launch, end = made_up_wall + length;
  RegionWatch region(static_cast<int>(workers));
  const auto work = [&](int64_t i) {
    made_up_wall = called + late[i];
    const RegionWatch::Worker worker(&region);
    made_up_ran += end - made_up_wall - off[i];
    slept += asleep[i];
    made_up_wall = end;
  };
  work(0);
  std::thread([&] {
    for (int64_t i = 1; i < workers; ++i) work(i);
  }).join();
}

#if defined(__linux__)
// The calling thread and those that it starts have one CPU together, if so wanted.
class OneCpu {
 public:
  explicit OneCpu(bool wanted) {
    sched_getaffinity(0, sizeof(own_), &own_);
    cpu_set_t one;
    CPU_ZERO(&one);
    for (int cpu = 0; CPU_COUNT(&one) == 0; ++cpu)
      if (CPU_ISSET(cpu, &own_)) CPU_SET(cpu, &one);
    if (wanted) sched_setaffinity(0, sizeof(one), &one);
  }
  ~OneCpu() { sched_setaffinity(0, sizeof(own_), &own_); }

 private:
  cpu_set_t own_;
};
#else
struct OneCpu {
  explicit OneCpu(bool) {}
};
#endif

// Two real threads, on as many CPUs as far as is known. Each runs for work[i] of its own time, and
// then they meet, `steps` times.
// Returns how long one lacked a CPU, by its own clocks and by what the system tells.
int64_t real_region(const int64_t* work, int64_t steps, bool same_cpu) {
  made_up = false;
  machine_cpus = 2;
  taken = 0;
  Barrier barrier;
  barrier.reset(2);
  int64_t lacked[2], began[2];
  const OneCpu one(same_cpu);
  {
    RegionWatch region(2);
    const auto run = [&](int i) {
      began[i] = nanoseconds(CLOCK_MONOTONIC);
      const int64_t queued_before = queued();
      lacked[i] = 0;
      {
        const RegionWatch::Worker worker(&region);
        for (int64_t step = 0; step < steps; ++step) {
          const int64_t start = nanoseconds(CLOCK_MONOTONIC);
          const int64_t end = nanoseconds(CLOCK_THREAD_CPUTIME_ID) + work[i];
          while (nanoseconds(CLOCK_THREAD_CPUTIME_ID) < end) continue;
          lacked[i] += nanoseconds(CLOCK_MONOTONIC) - start - work[i];
          barrier.arrive_and_wait(1);
        }
      }
      lacked[i] = std::max(lacked[i], queued() - queued_before);
    };
    std::thread other(run, 1);
    run(0);
    other.join();
  }
  return std::max(lacked[0], lacked[1]) + std::max<int64_t>(0, began[1] - began[0]);
}

// A thread sleeps until another has run for `work` on the same CPU.
// Nanoseconds: [its life less its sleep and the time it ran, that in which it wanted the CPU].
void sleep_beside(int64_t work, int64_t* out) {
  made_up = false;
  const OneCpu one(true);
  bool over = false;
  std::thread sleeper([&] {
    const int64_t before = nanoseconds(CLOCK_MONOTONIC) - slept;
    const int64_t ran = nanoseconds(CLOCK_THREAD_CPUTIME_ID), waited = queued();
    sleep_until([&] { return __atomic_load_n(&over, __ATOMIC_RELAXED); });
    out[0] = nanoseconds(CLOCK_MONOTONIC) - slept - before;
    out[0] -= nanoseconds(CLOCK_THREAD_CPUTIME_ID) - ran;
    out[1] = queued() - waited;
  });
  const int64_t end = nanoseconds(CLOCK_THREAD_CPUTIME_ID) + work;
  while (nanoseconds(CLOCK_THREAD_CPUTIME_ID) < end) continue;
  __atomic_store_n(&over, true, __ATOMIC_RELAXED);
  sleeper.join();
}

}  // namespace

EXPORT_PLAIN(usable)
EXPORT_PLAIN(machine)
EXPORT_PLAIN(pass)
EXPORT_PLAIN(region)
EXPORT_PLAIN(real_region)
EXPORT_PLAIN(sleep_beside)
