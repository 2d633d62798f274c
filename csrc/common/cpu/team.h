// Teams of workers that step through time together.
#pragma once

#include "common/cpu/amx.h"
#include "common/cpu/runtime.h"
#include "common/cpu/sleep.h"
#include "common/cpu/vec.h"
#include "common/sizes.h"

namespace throughtime {
namespace {

TT_INLINE void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield" ::: "memory");
#endif
}

// A barrier of `members` workers. One thread may stand for several of them (the pool may give
// fewer threads than asked for): it does the work of each and then arrives once with their number.
class alignas(64) Barrier {
 public:
  void reset(int members) {
    members_ = members;
    arrived_ = 0;
    phase_ = 0;
  }

  void arrive_and_wait(int weight) {
    if (weight == members_) return;
    const uint32_t phase = __atomic_load_n(&phase_, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&arrived_, weight, __ATOMIC_ACQ_REL) == members_) {
      __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&phase_, phase + 1, __ATOMIC_RELEASE);
      return;
    }
    const auto passed = [&] { return __atomic_load_n(&phase_, __ATOMIC_ACQUIRE) != phase; };
    for (int spins = 0; spins < kSpinsBeforeSleep; ++spins) {
      if (passed()) return;
      pause_briefly();
    }
    sleep_until(passed);  // another process has a partner's core: let it have this one
  }

 private:
  static constexpr int kSpinsBeforeSleep = 4096;
  int members_ = 1;
  alignas(64) int arrived_ = 0;
  alignas(64) uint32_t phase_ = 0;
};

// A thread's place: members [begin, end) of one team.
struct Member {
  int64_t team, begin, end;
  Barrier* barrier;
  Stopwatch* watch;
  TT_INLINE void wait() const {
    const Timing timing(watch, kWait);
    barrier->arrive_and_wait(static_cast<int>(end - begin));
  }
};

// Scratch memory of one call: reserve every part, allocate once, then use the parts.
class Scratch;

template <typename S>
class Span {
 public:
  // Item `index` of the first count that was reserved.
  TT_INLINE S* operator()(int64_t index = 0) const {
    return reinterpret_cast<S*>(*base_ + offset_) + index * stride_;
  }

 private:
  friend class Scratch;
  char* const* base_ = nullptr;
  size_t offset_ = 0;
  int64_t stride_ = 0;
};

class Scratch {
 public:
  explicit Scratch(const Runtime& runtime) : runtime_(runtime) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    if (base_) runtime_.release(base_);
  }

  // Room for as many S as the product of the counts.
  template <typename S, typename... Counts>
  Span<S> reserve(int64_t count, Counts... each) {
    Span<S> span;
    span.base_ = &base_;
    span.offset_ = bytes_;
    span.stride_ = times(1, 1, each...);
    bytes_ += round_up(times(sizeof(S), count, each...), kLine);
    return span;
  }

  void allocate() {
    const int64_t start = runtime_.profile ? read_ticks() : 0;
    base_ = static_cast<char*>(runtime_.acquire(bytes_));
    if (runtime_.profile) runtime_.profile->allocate += read_ticks() - start;
  }

 private:
  static constexpr int64_t kLine = 64;
  const Runtime& runtime_;
  char* base_ = nullptr;
  int64_t bytes_ = 0;  // of each part at most kTooMany, so of all of them no overflow
};

// Runs pass.prepare(share of blocks), pass.walk(member) and pass.finish(share of blocks) on all
// workers of a schedule, a barrier between them. `barriers` holds one per team and one for all.
template <typename Schedule, typename Pass>
void run_workers(const Runtime& runtime, const Schedule& schedule, Barrier* barriers, Pass& pass) {
  struct Context {
    const Schedule& schedule;
    Barrier* barriers;
    Pass& pass;
    Profile* profile;
  } context{schedule, barriers, pass, runtime.profile};
  if (runtime.profile) runtime.profile->workers += schedule.workers();
  for (int team = 0; team < schedule.teams; ++team) barriers[team].reset(schedule.members);
  barriers[schedule.teams].reset(schedule.workers());
  const auto body = [](void* raw, int begin, int end) {
    auto& [schedule, barriers, pass, profile] = *static_cast<Context*>(raw);
    const MatrixUnit unit;
    Stopwatch watch(profile);
    const int workers = schedule.workers(), members = schedule.members;
    Barrier& all = barriers[schedule.teams];
    const auto wait_for_all = [&] {
      const Timing timing(&watch, kWait);
      all.arrive_and_wait(end - begin);
    };
    const auto own_blocks = [&] { return Share(pass.blocks(), begin, end, workers); };
    {
      const Timing timing(&watch, kPack);
      pass.prepare(own_blocks());
    }
    wait_for_all();
    for (int team = begin / members; team * members < end; ++team) {
      const int first = begin > team * members ? begin - team * members : 0;
      const int last = end < (team + 1) * members ? end - team * members : members;
      pass.walk(Member{team, first, last, &barriers[team], &watch});
    }
    wait_for_all();
    const Timing timing(&watch, kFinish);
    pass.finish(own_blocks());
  };
  runtime.parallel(schedule.workers(), body, &context);
}

}  // namespace
}  // namespace throughtime
