// The CPU side of the process: which instruction set runs, threads and memory for the kernels.
#pragma once

#include "common/cpu/runtime.h"
#include "lstm/cpu/kernels.h"
#include "rel_lstm/cpu/kernels.h"
#include "relevancy/cpu/kernels.h"

namespace throughtime {

// All kernels of one instruction set.
struct CpuKernels {
  const char* isa;
  int mark;  // what they write into saved activations, which no other set can read
  const LstmKernels* lstm;
  const RelevancyKernels* relevancy;
  const RelLstmKernels* rel_lstm;
};

// The kernels of the best instruction set that this machine has, or of the one chosen since.
const CpuKernels& cpu_kernels();

// All that this machine can run, best first; ends with null.
const CpuKernels* const* runnable_cpu_kernels();

// False if no runnable kernels have that name. For tests.
bool choose_cpu_kernels(const char* isa);

// pool_acquire for the running operator: raises torch's kind of error if there is no memory.
void* acquire(size_t bytes);

// Raises it, with the operator's name, the bytes and the way out.
[[noreturn]] void out_of_memory(double bytes);

Runtime cpu_runtime();  // without a profile

// Operators whose time can be told apart.
enum Operator {
  kLstmForward,
  kLstmBackward,
  kRelLstmForward,
  kRelLstmBackward,
  kRelevancyForward,
  kRelevancyBackward,
  kOperators
};

// As in torch.ops.throughtime.
const char* name_of(Operator op);

// Starts all profiles anew, or stops profiling. Not while an operator runs.
void set_profiling(bool on);

const Profile& profile_of(Operator op);

// The runtime of one call of an operator; its life is the time of the call.
class Call {
 public:
  explicit Call(Operator op);
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  void checked();    // the arguments are: what follows is allocation
  void allocated();  // what follows is the kernel
  const Runtime& runtime() const { return runtime_; }

 private:
  Runtime runtime_;
  int64_t start_, last_;
};

}  // namespace throughtime
