// 16-bit floating point numbers as bits; arithmetic happens in float.
#pragma once

#include <cstdint>

namespace throughtime::device {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

}  // namespace throughtime::device
