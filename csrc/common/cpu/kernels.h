// How the kernels of one instruction set are named and listed.
//
// Each op's cpu_kernels.cpp is compiled once per instruction set, with -DTT_ISA=<its name>, and
// defines one constant table, <op>_kernels_<isa>.
#pragma once

#include "common/cpu/runtime.h"
#include "common/inline.h"

#define TT_JOIN_(name, isa) name##_##isa
#define TT_JOIN(name, isa) TT_JOIN_(name, isa)
#define TT_KERNELS(op) TT_JOIN(op##_kernels, TT_ISA)

namespace throughtime {

// One kernel in both precisions.
template <template <typename> class Args>
struct Kernel {
  void (*f32)(const Args<float>&, const Runtime&);
  void (*f64)(const Args<double>&, const Runtime&);

  TT_INLINE void operator()(const Args<float>& args, const Runtime& runtime) const {
    f32(args, runtime);
  }
  TT_INLINE void operator()(const Args<double>& args, const Runtime& runtime) const {
    f64(args, runtime);
  }
};

}  // namespace throughtime
