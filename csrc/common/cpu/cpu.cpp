#include "common/cpu/cpu.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <iomanip>
#include <new>
#include <sstream>
#include <stdexcept>
#include <thread>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "common/cpu/cpus.h"
#include "common/cpu/pool.h"
#include "common/cpu/subnormals.h"

namespace throughtime {

// Marks are numbers that any floating point type holds, and that no activation has.
#define TT_DECLARE(isa, mark)                                                                      \
  extern const LstmKernels lstm_kernels_##isa;                                                     \
  extern const RelevancyKernels relevancy_kernels_##isa;                                           \
  extern const RelLstmKernels rel_lstm_kernels_##isa;                                              \
  const CpuKernels cpu_kernels_##isa = {#isa, mark, &lstm_kernels_##isa, &relevancy_kernels_##isa, \
                                        &rel_lstm_kernels_##isa};
#if defined(TT_HAVE_AVX512)
TT_DECLARE(avx512, 129)
#endif
#if defined(TT_HAVE_AVX2)
TT_DECLARE(avx2, 130)
#endif
#if defined(TT_HAVE_SSE2)
TT_DECLARE(sse2, 131)
#endif
#if defined(TT_HAVE_NEON)
TT_DECLARE(neon, 132)
#endif

namespace {

struct Runnable {
  const CpuKernels* list[5] = {};  // ends with null

  Runnable() {
    const CpuKernels** next = list;
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
#if defined(TT_HAVE_AVX512)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      *next++ = &cpu_kernels_avx512;
#endif
#if defined(TT_HAVE_AVX2)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2"))
      *next++ = &cpu_kernels_avx2;
#endif
#if defined(TT_HAVE_SSE2)
    *next++ = &cpu_kernels_sse2;
#endif
#if defined(TT_HAVE_NEON)
    *next++ = &cpu_kernels_neon;
#endif
  }
};

const Runnable& runnable() {
  static const Runnable instance;
  return instance;
}

std::atomic<const CpuKernels*> chosen{nullptr};

int torch_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

// Calls work(begin, end) on threads that live as long as that takes. Torch would wake all of its
// own, also those that get no work.
template <typename Work>
void run_on_own_threads(int workers, const Work& work) {
  std::vector<std::thread> threads;
  threads.reserve(workers - 1);
  int rest = workers;
  try {
    for (; rest > 1; --rest) threads.emplace_back(work, rest - 1, rest);
  } catch (const std::exception&) {  // no more threads: this one does the rest
  }
  work(0, rest);
  for (std::thread& thread : threads) thread.join();
}

// All kernels of all operators start here, on every thread that takes part.
void run_parallel(int workers, void (*body)(void*, int, int), void* context) {
  if (workers == 1) {
    const FlushSubnormals flush;
    body(context, 0, 1);
    return;
  }
  RegionWatch region;
  const auto work = [&](int64_t begin, int64_t end) {
    const RegionWatch::Worker worker(&region);
    const FlushSubnormals flush;
    body(context, static_cast<int>(begin), static_cast<int>(end));
  };
  if (torch_threads() > cpus().usable()) {
    run_on_own_threads(workers, work);
  } else {
    torch::stable::parallel_for(0, workers, 1, work);
  }
}

}  // namespace

const CpuKernels* const* runnable_cpu_kernels() { return runnable().list; }

const CpuKernels& cpu_kernels() {
  const CpuKernels* const choice = chosen.load(std::memory_order_relaxed);
  return choice ? *choice : *runnable().list[0];
}

bool choose_cpu_kernels(const char* isa) {
  for (const CpuKernels* const* k = runnable().list; *k; ++k)
    if (std::strcmp((*k)->isa, isa) == 0) {
      chosen.store(*k, std::memory_order_relaxed);
      return true;
    }
  return false;
}

namespace {

// Of a failed allocation the message names the operator.
thread_local const char* running = "kernels";

constexpr const char* kNames[kOperators] = {"lstm_forward",      "lstm_backward",
                                            "rel_lstm_forward",  "rel_lstm_backward",
                                            "relevancy_forward", "relevancy_backward"};

std::atomic<bool> profiling{false};
Profile profiles[kOperators];

}  // namespace

void set_profiling(bool on) {
  profiling.store(on, std::memory_order_relaxed);
  if (on) std::fill_n(profiles, static_cast<int>(kOperators), Profile{});
}

const Profile& profile_of(Operator op) { return profiles[op]; }

const char* name_of(Operator op) { return kNames[op]; }

void out_of_memory(double bytes) {
  std::ostringstream text;
  text << std::fixed << std::setprecision(0) << "throughtime::" << running
       << ": can't allocate memory: you tried to allocate " << bytes << " bytes, beside "
       << pool_statistics().used_bytes
       << " bytes of earlier results and of what they keep for the backward pass. Take fewer steps "
          "at a time (pass the detached state on), a smaller batch, or torch.no_grad() where no "
          "gradient is wanted";
  throw std::runtime_error(text.str());
}

void* acquire(size_t bytes) {
  try {
    return pool_acquire(bytes);
  } catch (const std::bad_alloc&) {
    out_of_memory(bytes);
  }
}

Runtime cpu_runtime() {
  return {std::min(torch_threads(), cpus().usable()), run_parallel, acquire, pool_release, nullptr};
}

Call::Call(Operator op) : runtime_(cpu_runtime()), start_(0), last_(0) {
  running = kNames[op];
  if (!profiling.load(std::memory_order_relaxed)) return;
  runtime_.profile = &profiles[op];
  start_ = read_ticks();
}

Call::~Call() {
  if (!runtime_.profile) return;
  ++runtime_.profile->calls;
  runtime_.profile->whole += read_ticks() - start_;
}

void Call::checked() {
  if (runtime_.profile) last_ = read_ticks();
}

void Call::allocated() {
  if (runtime_.profile) runtime_.profile->allocate += read_ticks() - last_;
}

}  // namespace throughtime
