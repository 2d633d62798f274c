// Where the time of a kernel call goes, for `python -m bench profile`.
//
// Every worker has a stopwatch, and a Timing in the scope of each piece of work names its phase. An
// ordinary call has no profile: then a Timing is two tests of a null pointer, a few times per
// register tile at most.
#pragma once

#include <cstdint>

#include "common/inline.h"

namespace throughtime {

enum Phase {
  kPack,            // weights into the order in which they are read
  kGather,          // rows into the order in which they are read
  kInput,           // products with x
  kRecurrent,       // products with the state, or with the gate gradients of the step after
  kPointwise,       // nonlinearities, states, and what is saved of them
  kProjection,      // products with W_hr
  kScores,          // of attention, and their gradient
  kSums,            // of attended rows
  kScreening,       // the choice of the attended keys
  kWeights,         // weight gradients
  kInputGradients,  // dx
  kFinish,          // weight gradients into PyTorch's order
  kWait,            // for the other workers
  kOther,           // first and last states, padding
  kPhases
};

// Sums over calls, in ticks of read_ticks().
struct Profile {
  int64_t phases[kPhases];  // of all workers together
  int64_t calls, workers;   // workers of all calls together
  int64_t allocate;         // memory for results and scratch
  int64_t whole;            // from the operator's first line to its last
};

TT_INLINE int64_t read_ticks() {
#if defined(__x86_64__)
  return static_cast<int64_t>(__builtin_ia32_rdtsc());
#elif defined(__aarch64__)
  int64_t ticks;
  asm volatile("mrs %0, cntvct_el0" : "=r"(ticks));
  return ticks;
#else
  return 0;
#endif
}

// Not thread-safe: one per worker. Its destructor adds what it has counted to the profile.
class Stopwatch {
 public:
  TT_INLINE explicit Stopwatch(Profile* profile) : profile_(profile) {
    if (!profile_) return;
    for (int64_t& phase : phases_) phase = 0;
    last_ = read_ticks();
  }
  TT_INLINE ~Stopwatch() {
    if (!profile_) return;
    lap(phase_);
    for (int phase = 0; phase < kPhases; ++phase)
      __atomic_fetch_add(&profile_->phases[phase], phases_[phase], __ATOMIC_RELAXED);
  }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

  // What follows is spent on another phase; returns the one before.
  TT_INLINE Phase turn(Phase next) {
    const Phase before = phase_;
    lap(before);
    phase_ = next;
    return before;
  }

  // The time since the lap before was spent on this.
  TT_INLINE void lap(Phase phase) {
    if (!profile_) return;
    const int64_t now = read_ticks();
    phases_[phase] += now - last_;
    last_ = now;
  }

 private:
  Profile* const profile_;
  Phase phase_ = kOther;
  int64_t last_;
  int64_t phases_[kPhases];
};

// The time of its scope is spent on `phase`, but for that of scopes within.
class Timing {
 public:
  TT_INLINE Timing(Stopwatch* watch, Phase phase) : watch_(watch), before_(watch->turn(phase)) {}
  TT_INLINE ~Timing() { watch_->turn(before_); }
  // What follows in the scope is spent on another phase.
  TT_INLINE void turn(Phase phase) { watch_->turn(phase); }
  Timing(const Timing&) = delete;
  Timing& operator=(const Timing&) = delete;

 private:
  Stopwatch* const watch_;
  const Phase before_;
};

}  // namespace throughtime
