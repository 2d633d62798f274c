// The CPU kernels of one instruction set, as a table of functions.
#pragma once

#include "../common/runtime.h"
#include "params.h"

namespace throughtime {

struct CpuKernels {
  const char* isa;
  int vector_bytes;
  void (*lstm_forward_f32)(const LstmForward<float>&, const Runtime&);
  void (*lstm_forward_f64)(const LstmForward<double>&, const Runtime&);
  void (*lstm_backward_f32)(const LstmBackward<float>&, const Runtime&);
  void (*lstm_backward_f64)(const LstmBackward<double>&, const Runtime&);
  // For tests of accuracy: the kernels' own sigmoid and tanh on `count` numbers, in place.
  void (*nonlinearity_f32)(float* values, int64_t count, bool is_tanh);
  void (*nonlinearity_f64)(double* values, int64_t count, bool is_tanh);
};

}  // namespace throughtime
