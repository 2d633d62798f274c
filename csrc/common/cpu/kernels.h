// How the kernels of every instruction set are named, listed and chosen.
//
// Each op's kernels.cpp is compiled once per instruction set, with -DTT_ISA=<its name>, and defines
// one constant table, <op>_kernels_<isa>. The op's operators.cpp lists them:
//
//   TT_KERNEL_TABLES(LstmKernels, lstm)   // defines const LstmKernels& lstm_kernels()
#pragma once

#include "common/cpu/runtime.h"
#include "common/inline.h"

#define TT_JOIN_(name, isa) name##_##isa
#define TT_JOIN(name, isa) TT_JOIN_(name, isa)
#define TT_KERNELS(op) TT_JOIN(op##_kernels, TT_ISA)

// TT_EACH_ISA(f, ...) is f(isa, ...) for every compiled instruction set, largest first.
#if defined(TT_HAVE_AVX512)
#define TT_AVX512(f, ...) f(avx512, __VA_ARGS__)
#else
#define TT_AVX512(f, ...)
#endif
#if defined(TT_HAVE_AVX2)
#define TT_AVX2(f, ...) f(avx2, __VA_ARGS__)
#else
#define TT_AVX2(f, ...)
#endif
#if defined(TT_HAVE_SSE2)
#define TT_SSE2(f, ...) f(sse2, __VA_ARGS__)
#else
#define TT_SSE2(f, ...)
#endif
#if defined(TT_HAVE_NEON)
#define TT_NEON(f, ...) f(neon, __VA_ARGS__)
#else
#define TT_NEON(f, ...)
#endif
#define TT_EACH_ISA(f, ...) \
  TT_AVX512(f, __VA_ARGS__) \
  TT_AVX2(f, __VA_ARGS__) TT_SSE2(f, __VA_ARGS__) TT_NEON(f, __VA_ARGS__)

#define TT_DECLARE_KERNELS(isa, Kernels, op) extern const Kernels op##_kernels_##isa;
#define TT_ADDRESS_OF_KERNELS(isa, Kernels, op) &op##_kernels_##isa,
#define TT_KERNEL_TABLES(Kernels, op)                                                         \
  TT_EACH_ISA(TT_DECLARE_KERNELS, Kernels, op)                                                \
  const Kernels& op##_kernels() {                                                             \
    static const Kernels* const tables[] = {TT_EACH_ISA(TT_ADDRESS_OF_KERNELS, Kernels, op)}; \
    return *tables[chosen_isa()];                                                             \
  }

namespace throughtime {

// Place of the instruction set whose kernels run, in the order of TT_EACH_ISA.
int chosen_isa();

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
