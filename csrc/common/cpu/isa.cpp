#include "common/cpu/isa.h"

#include <atomic>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "common/cpu/kernels.h"

namespace throughtime {
namespace {

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}
bool has_sse2() { return true; }

bool cpuid_bit(unsigned leaf, unsigned subleaf, int reg, int bit) {
  unsigned registers[4];
  return __get_cpuid_count(leaf, subleaf, &registers[0], &registers[1], &registers[2],
                           &registers[3]) &&
         registers[reg] >> bit & 1;
}
bool has_avx512_bf16() { return has_avx512() && cpuid_bit(7, 1, 0, 5); }
// Linux gives a process the unit's registers, 8 KB a thread, only when it asks for them.
bool has_amx() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return has_avx512_bf16() && cpuid_bit(7, 0, 3, 24) && cpuid_bit(7, 0, 3, 22) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#else
bool has_neon() { return true; }
#endif

constexpr int mark_avx512 = 129, mark_avx2 = 130, mark_sse2 = 131, mark_neon = 132;
// Those that multiply bfloat16 share kernels, except for bfloat16 itself, and what these save.
constexpr int mark_avx512_bf16 = mark_avx512, mark_amx = mark_avx512;

#define TT_ISA_ENTRY(isa, unused) {#isa, mark_##isa, has_##isa()},

int largest() {
  int at = 0;
  while (!isas()[at].runs_here) ++at;
  return at;
}

std::atomic<int> chosen{-1};

}  // namespace

const Isa* isas() {
  static const Isa list[] = {TT_EACH_ISA(TT_ISA_ENTRY, ){nullptr, 0, false}};
  return list;
}

int chosen_isa() {
  const int choice = chosen.load(std::memory_order_relaxed);
  if (choice >= 0) return choice;
  static const int best = largest();
  return best;
}

const Isa& isa() { return isas()[chosen_isa()]; }

bool choose_isa(const char* name) {
  for (int at = 0; isas()[at].name; ++at)
    if (isas()[at].runs_here && std::strcmp(isas()[at].name, name) == 0) {
      chosen.store(at, std::memory_order_relaxed);
      return true;
    }
  return false;
}

}  // namespace throughtime
