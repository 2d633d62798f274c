// common/cpu/team.h: barriers, shares of work, runs of whole teams, scratch memory.
#include "common/cpu/team.h"

#include <chrono>
#include <cstdlib>
#include <future>
#include <memory>
#include <thread>
#include <vector>

#include "export.h"

using namespace throughtime;

namespace {

// What f returns, or -1 if a barrier keeps it for a minute.
template <typename F>
int64_t within_a_minute(const F& f) {
  const auto task = std::make_shared<std::packaged_task<int64_t()>>(f);
  std::future<int64_t> result = task->get_future();
  std::thread([task] { (*task)(); }).detach();
  const bool done = result.wait_for(std::chrono::minutes(1)) == std::future_status::ready;
  return done ? result.get() : -1;
}

// Threads that stand for weights[i] members meet `steps` times. Before every meeting each adds its
// weight; returns how often a thread found less than all of it behind the barrier.
int64_t meet_all(const int64_t* weights, int64_t threads, int64_t steps) {
  int64_t members = 0, early = 0;
  for (int64_t i = 0; i < threads; ++i) members += weights[i];
  std::vector<int64_t> arrived(steps);
  Barrier barrier;
  barrier.reset(static_cast<int>(members));
  std::vector<std::thread> running;
  for (int64_t i = 0; i < threads; ++i)
    running.emplace_back([&, weight = weights[i]] {
      for (int64_t step = 0; step < steps; ++step) {
        __atomic_fetch_add(&arrived[step], weight, __ATOMIC_RELAXED);
        barrier.arrive_and_wait(static_cast<int>(weight));
        if (__atomic_load_n(&arrived[step], __ATOMIC_RELAXED) != members)
          __atomic_fetch_add(&early, 1, __ATOMIC_RELAXED);
      }
    });
  for (std::thread& thread : running) thread.join();
  return early;
}

int64_t meet(const int64_t* weights, int64_t threads, int64_t steps) {
  return within_a_minute([=] { return meet_all(weights, threads, steps); });
}

// [begin, end) of the workers [first, last).
void share(int64_t count, int64_t first, int64_t last, int64_t workers, int64_t* out) {
  const Share own(count, first, last, workers);
  out[0] = own.begin;
  out[1] = own.end;
}

const int64_t* thread_ends;  // of the run in progress: thread i takes workers up to thread_ends[i]

void run_on_threads(int workers, void (*body)(void*, int, int), void* context) {
  std::vector<std::thread> threads;
  for (int begin = 0, i = 0; begin < workers; begin = static_cast<int>(thread_ends[i++]))
    threads.emplace_back(body, context, begin, static_cast<int>(thread_ends[i]));
  for (std::thread& thread : threads) thread.join();
}

void* acquire(size_t bytes) { return std::aligned_alloc(64, bytes); }

struct Schedule {
  int teams, members;
  int workers() const { return teams * members; }
};

// Counts what run_workers calls, and what is called too early.
struct Pass {
  int64_t *prepared, *walked, *finished;
  int64_t count, members, steps;
  std::vector<int64_t> arrived;  // by team and step
  int64_t early = 0;

  int64_t blocks() const { return count; }
  void add(int64_t* to, Share own) {
    for (int64_t block = own.begin; block < own.end; ++block)
      __atomic_fetch_add(&to[block], 1, __ATOMIC_RELAXED);
  }
  void expect(bool condition) {
    if (!condition) __atomic_fetch_add(&early, 1, __ATOMIC_RELAXED);
  }
  void prepare(Share own) { add(prepared, own); }
  void walk(const Member& member) {
    for (int64_t block = 0; block < count; ++block)
      expect(__atomic_load_n(&prepared[block], __ATOMIC_RELAXED) == 1);
    for (int64_t step = 0; step < steps; ++step) {
      int64_t* here = &arrived[member.team * steps + step];
      __atomic_fetch_add(here, member.end - member.begin, __ATOMIC_RELAXED);
      member.wait();
      expect(__atomic_load_n(here, __ATOMIC_RELAXED) == members);
    }
    for (int64_t i = member.begin; i < member.end; ++i)
      __atomic_fetch_add(&walked[member.team * members + i], 1, __ATOMIC_RELAXED);
  }
  void finish(Share own) {
    for (size_t i = 0; i < arrived.size() / steps * members; ++i)
      expect(__atomic_load_n(&walked[i], __ATOMIC_RELAXED) == 1);
    add(finished, own);
  }
};

// Counts of prepare and finish by block, of walk by worker; returns how many calls were too early.
int64_t run_all(int64_t teams, int64_t team, const int64_t* ends, int64_t blocks, int64_t steps,
                int64_t* prepared, int64_t* walked, int64_t* finished) {
  thread_ends = ends;
  const Runtime runtime{0, run_on_threads, nullptr, nullptr, nullptr};
  const Schedule schedule{static_cast<int>(teams), static_cast<int>(team)};
  std::vector<Barrier> barriers(teams + 1);
  Pass pass{prepared, walked, finished, blocks, team, steps, std::vector<int64_t>(teams * steps)};
  run_workers(runtime, schedule, barriers.data(), pass);
  return pass.early;
}

int64_t run(int64_t teams, int64_t team, const int64_t* ends, int64_t blocks, int64_t steps,
            int64_t* prepared, int64_t* walked, int64_t* finished) {
  return within_a_minute(
      [=] { return run_all(teams, team, ends, blocks, steps, prepared, walked, finished); });
}

// Offsets of spans of `counts` numbers from the first, in bytes.
template <typename S>
void spans(const S*, const int64_t* counts, int64_t parts, int64_t* offsets) {
  const Runtime runtime{1, nullptr, acquire, std::free, nullptr};
  Scratch scratch(runtime);
  std::vector<Span<S>> reserved;
  for (int64_t i = 0; i < parts; ++i) reserved.push_back(scratch.reserve<S>(counts[i]));
  scratch.allocate();
  for (int64_t i = 0; i < parts; ++i) {
    for (int64_t k = 0; k < counts[i]; ++k) reserved[i]()[k] = S(i);
    offsets[i] = reinterpret_cast<char*>(reserved[i]()) - reinterpret_cast<char*>(reserved[0]());
  }
  for (int64_t i = 0; i < parts; ++i)
    for (int64_t k = 0; k < counts[i]; ++k)
      if (reserved[i]()[k] != S(i)) offsets[i] = -1;  // another span lies there
}

}  // namespace

EXPORT_PLAIN(meet)
EXPORT_PLAIN(share)
EXPORT_PLAIN(run)
EXPORT(spans)
