#pragma once

#include "common/cpu/vec.h"

namespace throughtime {
namespace {

// A storage type of 16 bits with float sums: all that the kernels need of it is how one number and
// one vector of them are read and written.
struct BFloat16 {
  uint16_t bits;
};

template <>
struct Numbers<BFloat16> {
  using Sum = float;
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
  typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));

  static float one(BFloat16 number) {
    const uint32_t word = uint32_t(number.bits) << 16;
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
  }
  static BFloat16 narrow(float number) {  // to nearest, of finite numbers
    uint32_t word;
    std::memcpy(&word, &number, sizeof word);
    return {static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16)};
  }
  static Vec<float> vector(const BFloat16* from) {
    const Halves halves = *reinterpret_cast<const Halves*>(from);
    return (Vec<float>)(__builtin_convertvector(halves, Words) << 16);
  }
  static void put(BFloat16* to, Vec<float> v) {
    const Words words = (Words)v;
    *reinterpret_cast<Halves*>(to) =
        __builtin_convertvector((words + 0x7fff + (words >> 16 & 1)) >> 16, Halves);
  }
};

}  // namespace
}  // namespace throughtime
