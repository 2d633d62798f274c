// How the kernels of every instruction set are named, listed and chosen.
//
// Each op's kernels.cpp is compiled once per instruction set, with -DTT_ISA=<its name>, and defines
// one constant table, <op>_kernels_<isa>. The op's operators.cpp lists them:
//
//   TT_KERNEL_TABLES(LstmKernels, lstm)   // defines const LstmKernels& lstm_kernels()
//
// Instruction sets that multiply bfloat16 have tables of their own, of bfloat16_kernels.cpp, and share
// all others with AVX-512:
//
//   TT_BFLOAT16_TABLES(LstmBFloat16Kernels, lstm_bfloat16)   // lstm_bfloat16_kernels(), or null
//
// TT_MATRIX_TABLES is the same for those that have a matrix unit.
#pragma once

#include "common/cpu/runtime.h"
#include "common/inline.h"

#define TT_JOIN_(name, isa) name##_##isa
#define TT_JOIN(name, isa) TT_JOIN_(name, isa)
#define TT_KERNELS(op) TT_JOIN(op##_kernels, TT_ISA)

// TT_EACH_BFLOAT16_ISA(f, ...) and TT_EACH_BASE_ISA(f, ...) are f(isa, ...) for every compiled
// instruction set of the kind, largest first; TT_EACH_ISA for all, those with bfloat16 first.
#if defined(TT_HAVE_AMX)
#define TT_AMX_ISA(f, ...) f(amx, __VA_ARGS__)
#else
#define TT_AMX_ISA(f, ...)
#endif
#if defined(TT_HAVE_AVX512_BF16)
#define TT_AVX512_BF16(f, ...) f(avx512_bf16, __VA_ARGS__)
#else
#define TT_AVX512_BF16(f, ...)
#endif
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
#define TT_EACH_BFLOAT16_ISA(f, ...) TT_AMX_ISA(f, __VA_ARGS__) TT_AVX512_BF16(f, __VA_ARGS__)
#define TT_EACH_BASE_ISA(f, ...) \
  TT_AVX512(f, __VA_ARGS__)      \
  TT_AVX2(f, __VA_ARGS__) TT_SSE2(f, __VA_ARGS__) TT_NEON(f, __VA_ARGS__)

#define TT_EACH_ISA(f, ...) TT_EACH_BFLOAT16_ISA(f, __VA_ARGS__) TT_EACH_BASE_ISA(f, __VA_ARGS__)

#define TT_DECLARE_KERNELS(isa, Kernels, op) extern const Kernels op##_kernels_##isa;
#define TT_ADDRESS_OF_KERNELS(isa, Kernels, op) &op##_kernels_##isa,
#define TT_ADDRESS_OF_AVX512(isa, Kernels, op) &op##_kernels_avx512,
#define TT_NO_ADDRESS(isa, Kernels, op) nullptr,
#define TT_KERNEL_TABLES(Kernels, op)                                                             \
  TT_EACH_BASE_ISA(TT_DECLARE_KERNELS, Kernels, op)                                               \
  const Kernels& op##_kernels() {                                                                 \
    static const Kernels* const tables[] = {TT_EACH_BFLOAT16_ISA(                                 \
        TT_ADDRESS_OF_AVX512, Kernels, op) TT_EACH_BASE_ISA(TT_ADDRESS_OF_KERNELS, Kernels, op)}; \
    return *tables[chosen_isa()];                                                                 \
  }
#define TT_BFLOAT16_TABLES(Kernels, op)                                                    \
  TT_EACH_BFLOAT16_ISA(TT_DECLARE_KERNELS, Kernels, op)                                    \
  const Kernels* op##_kernels() {                                                          \
    static const Kernels* const tables[] = {TT_EACH_BFLOAT16_ISA(                          \
        TT_ADDRESS_OF_KERNELS, Kernels, op) TT_EACH_BASE_ISA(TT_NO_ADDRESS, Kernels, op)}; \
    return tables[chosen_isa()];                                                           \
  }
#define TT_MATRIX_TABLES(Kernels, op)                                                              \
  TT_AMX_ISA(TT_DECLARE_KERNELS, Kernels, op)                                                      \
  const Kernels* op##_kernels() {                                                                  \
    static const Kernels* const tables[] = {TT_AMX_ISA(TT_ADDRESS_OF_KERNELS, Kernels, op)         \
                                                TT_AVX512_BF16(TT_NO_ADDRESS, Kernels, op)         \
                                                    TT_EACH_BASE_ISA(TT_NO_ADDRESS, Kernels, op)}; \
    return tables[chosen_isa()];                                                                   \
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
