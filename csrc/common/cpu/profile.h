// Where the time of a kernel call goes, for `python -m bench profile`.
//
// Every worker carries a stopwatch and tells it after each piece of work which phase that was. The
// runtime of an ordinary call has no profile: then a lap is the test of a null pointer, once per
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
  kScreening,       // who is attended
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

// Not thread-safe: one per worker. What it has counted goes to the profile when it is destroyed.
class Stopwatch {
 public:
  TT_INLINE explicit Stopwatch(Profile* profile) : profile_(profile) {
    if (!profile_) return;
    for (int64_t& phase : phases_) phase = 0;
    last_ = read_ticks();
  }
  TT_INLINE ~Stopwatch() {
    if (!profile_) return;
    for (int phase = 0; phase < kPhases; ++phase)
      __atomic_fetch_add(&profile_->phases[phase], phases_[phase], __ATOMIC_RELAXED);
  }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

  // The time since the lap before was spent on this.
  TT_INLINE void lap(Phase phase) {
    if (!profile_) return;
    const int64_t now = read_ticks();
    phases_[phase] += now - last_;
    last_ = now;
  }

 private:
  Profile* const profile_;
  int64_t last_;
  int64_t phases_[kPhases];
};

}  // namespace throughtime
