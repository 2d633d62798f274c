// Numbers below the smallest normal one (2^-126 in float32, 2^-1022 in float64) count as zero.
//
// A gradient that shrinks by a factor per step gets there after 130 to 200 steps and stays. Many
// processors then need a hundred cycles or more for one operation.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace throughtime {

// While it lives, this thread reads and writes subnormal numbers as zero. Afterwards the thread's
// control register is what it was.
class FlushSubnormals {
 public:
  FlushSubnormals() : before_(read()) { write(before_ | kFlush); }
  ~FlushSubnormals() { write(before_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
#if defined(__SSE2__)
  using Register = uint32_t;
  static constexpr Register kFlush = 0x8040;  // MXCSR: results to zero, operands are zero
  static Register read() { return _mm_getcsr(); }
  static void write(Register value) { _mm_setcsr(value); }
#elif defined(__aarch64__)  // untried
  using Register = uint64_t;
  static constexpr Register kFlush = 1 << 24;  // FPCR.FZ: both
  static Register read() {
    Register value;
    asm volatile("mrs %0, fpcr" : "=r"(value));
    return value;
  }
  static void write(Register value) { asm volatile("msr fpcr, %0" ::"r"(value) : "memory"); }
#else
  using Register = uint32_t;
  static constexpr Register kFlush = 0;
  static Register read() { return 0; }
  static void write(Register) {}
#endif

  const Register before_;
};

}  // namespace throughtime
