// Samples as a warp sees them, and how it moves its 8 units of them to and from global memory.
//
// Lane 4 g + q works on unit g of samples 8 j + 2 q and + 1, for each tile j.
#pragma once

#include "product.cuh"
#include "recurrence.h"

namespace throughtime {

// Steps between the hint that a number will be read and its reading: several steps that a detach
// mask leaves without a product last as long as one access to memory.
constexpr int kPrefetchSteps = 6;

template <typename S, int kTiles>
struct Samples {
  int64_t first;          // the group's first sample
  int length[kTiles][2];  // of 8 j + 2 q + e; 0 beyond the batch

  TT_DEVICE Samples(const RecurrenceInput<S>& in, int group) : first(8 * kTiles * group) {
    TT_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      TT_UNROLL
      for (int e = 0; e < 2; ++e) {
        const int64_t n = at(j, e);
        length[j][e] = static_cast<int>(n >= in.B ? 0 : in.lengths ? in.lengths[n] : in.T);
      }
    }
  }
  TT_DEVICE int64_t at(int j, int e) const { return first + 8 * j + 2 * (lane() % 4) + e; }
  // After a transposition a lane holds sample g instead.
  TT_DEVICE int64_t transposed(int j) const { return first + 8 * j + lane() / 4; }
};

// A lane's two samples of one unit, as they come from memory: 16-bit numbers of 8 units travel
// together and are transposed by value().
template <typename S>
struct Fetched {
  uint32_t raw;
  TT_DEVICE void value(float (&to)[2]) const {
    const uint32_t samples = transpose_8x8(raw);
    to[0] = low_half<S>(samples);
    to[1] = high_half<S>(samples);
  }
};
template <>
struct Fetched<float> {
  float raw[2];
  TT_DEVICE void value(float (&to)[2]) const {
    to[0] = raw[0];
    to[1] = raw[1];
  }
};

// From rows n of a [.., B, row] array; `column` is the warp's first unit in it. `later`, unless 0,
// is how far away the numbers lie that will be wanted kPrefetchSteps on.
template <typename S, int kTiles>
TT_DEVICE Fetched<S> fetch(const S* from, int64_t B, int64_t row, int64_t column,
                           const Samples<S, kTiles>& samples, int j, int64_t later) {
  Fetched<S> fetched{};
  if constexpr (kMatrixUnit<S>) {
    const int64_t n = samples.transposed(j);
    if (n < B) {
      const S* p = from + n * row + column + 2 * (lane() % 4);
      fetched.raw = *reinterpret_cast<const uint32_t*>(p);
      if (later != 0) prefetch(p + later);
    }
  } else {
    TT_UNROLL
    for (int e = 0; e < 2; ++e) {
      if (samples.at(j, e) < B) {
        const S* p = from + samples.at(j, e) * row + column + lane() / 4;
        fetched.raw[e] = *p;
        if (later != 0) prefetch(p + later);
      }
    }
  }
  return fetched;
}

template <typename S, int kTiles>
TT_DEVICE void store(S* to, int64_t B, int64_t row, int64_t column,
                     const Samples<S, kTiles>& samples, int j, const float (&value)[2]) {
  if constexpr (kMatrixUnit<S>) {
    const uint32_t units = transpose_8x8(pack<S>(value[0], value[1]));
    const int64_t n = samples.transposed(j);
    if (n < B) *reinterpret_cast<uint32_t*>(to + n * row + column + 2 * (lane() % 4)) = units;
  } else {
    TT_UNROLL
    for (int e = 0; e < 2; ++e) {
      if (samples.at(j, e) < B) to[samples.at(j, e) * row + column + lane() / 4] = value[e];
    }
  }
}

}  // namespace throughtime
