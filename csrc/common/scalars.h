// Numbers as they lie in memory. 16-bit ones are bits here; arithmetic happens in float.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/inline.h"

namespace throughtime {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
// A float32 as the sum of so many bfloat16 numbers: an operand of products (common/cpu/split.h).
template <int kParts>
struct SplitFloat {
  uint16_t parts[kParts];
};
// Such products take numbers, and weights, below these.
constexpr float kSplitBound = 0x1p31f, kSplitWeightBound = 0x1p16f;

namespace detail {
template <typename Storage>
struct Sum {
  using type = Storage;
};
template <>
struct Sum<BFloat16> {
  using type = float;
};
template <int kParts>
struct Sum<SplitFloat<kParts>> {
  using type = float;
};
template <typename Operand>
struct Given {
  using type = Operand;
};
template <int kParts>
struct Given<SplitFloat<kParts>> {
  using type = float;
};
}  // namespace detail

// The type in which products of such numbers are added up.
template <typename Storage>
using SumOf = typename detail::Sum<Storage>::type;

// The type that an operand of products has outside of them.
template <typename Operand>
using GivenAs = typename detail::Given<Operand>::type;

TT_INLINE float wide(BFloat16 number) {
  const uint32_t word = uint32_t(number.bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

// To the nearest, ties to even; a NaN stays one.
TT_INLINE BFloat16 narrow(float number) {
  uint32_t word;
  std::memcpy(&word, &number, sizeof word);
  const uint32_t nearest = word + 0x7fff + (word >> 16 & 1);
  return {static_cast<uint16_t>((number == number ? nearest : word | 0x400000) >> 16)};
}

namespace device {
using throughtime::BFloat16;
using throughtime::Float16;
}  // namespace device

}  // namespace throughtime
