// The LSTM's CPU kernels of one instruction set.
#pragma once

#include "common/cpu/kernels.h"
#include "lstm/cpu/params.h"

namespace throughtime {

struct LstmKernels {
  Kernel<LstmForward> forward;
  Kernel<LstmBackward> backward;
  // The machine's rate, for `bench`: multiplies tiles that lie in the first-level cache and returns
  // the number of multiply-adds.
  int64_t (*multiply_adds)(int64_t repeats);
  void (*meet)(const Runtime& runtime, int members, int64_t times);  // at a barrier
  int64_t vector_bytes;
};

// With bfloat16 operands: of instruction sets that multiply them faster than float32.
struct LstmBFloat16Kernels {
  void (*forward)(const LstmForward<BFloat16>& args, const Runtime& runtime);
  void (*backward)(const LstmBackward<BFloat16>& args, const Runtime& runtime);
  int64_t (*multiply_adds)(int64_t repeats);  // as above
};

// float32 by a matrix unit, each number in so many bfloat16 parts (common/cpu/split.h): of one, two or
// three parts. They take numbers of some range only; see lstm/cpu/float32.h.
struct LstmSplitKernels {
  void (*forward)(const LstmForward<float>& args, int parts, const Runtime& runtime);
  void (*backward)(const LstmBackward<float>& args, int parts, const Runtime& runtime);
  int64_t (*multiply_adds)(int64_t repeats, int parts);  // as above
};

// Those of the instruction set that runs; null if it has none.
const LstmBFloat16Kernels* lstm_bfloat16_kernels();
const LstmSplitKernels* lstm_split_kernels();

// bfloat16 parts of a float32 number in the products of a call of that shape now; 0: vectors multiply.
int float32_parts(const LstmShape& shape);

// Those of the instruction set that runs.
const LstmKernels& lstm_kernels();

}  // namespace throughtime
