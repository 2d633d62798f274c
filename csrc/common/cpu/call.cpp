#include "common/cpu/call.h"

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

namespace {

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
  RegionWatch region(workers);
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

namespace {

Operator* first_operator = nullptr;
std::atomic<bool> profiling{false};

}  // namespace

Operator::Operator(const char* name_) : name(name_), next(first_operator) { first_operator = this; }

const Operator* operator_named(const char* name) {
  const Operator* op = first_operator;
  while (op && std::strcmp(op->name, name) != 0) op = op->next;
  return op;
}

void set_profiling(bool on) {
  profiling.store(on, std::memory_order_relaxed);
  for (Operator* op = first_operator; on && op; op = op->next) op->profile = Profile{};
}

void out_of_memory(double bytes) {
  std::ostringstream text;
  text << std::fixed << std::setprecision(0) << "throughtime::" << running_operator
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

Call::Call(Operator& op) : runtime_(cpu_runtime()), start_(0), last_(0) {
  running_operator = op.name;
  if (!profiling.load(std::memory_order_relaxed)) return;
  runtime_.profile = &op.profile;
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
