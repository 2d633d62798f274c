// Samples as a warp sees them, and how it moves its 8 units of them to and from global memory.
//
// Lane 4 g + q works on unit g of samples 8 j + 2 q and + 1, for each tile j.
#pragma once

#include "lstm/cuda/gates.cuh"
#include "lstm/cuda/product.cuh"

namespace throughtime {

// Steps between the hint that a number will be read and its reading: several steps that a detach
// mask leaves without a product last as long as one access to memory.
constexpr int kPrefetchSteps = 6;

// Where the rows of an array lie that has one per sample: row(n) = first + n * step.
struct Rows {
  int64_t first, step;
  TT_DEVICE int64_t at(int64_t n) const { return first + n * step; }
};

template <typename S, int kTiles>
struct Samples {
  int direction;
  int64_t first;          // the group's first sample
  int length[kTiles][2];  // of 8 j + 2 q + e; 0 beyond the batch

  // `group` counts those of direction 0 first.
  TT_DEVICE Samples(const RecurrenceInput<S>& in, int group)
      : direction(group / in.cut.groups), first(8 * kTiles * (group % in.cut.groups)) {
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
  // Rows of [T, B, D, ..] at step t, and of [D, B, ..].
  TT_DEVICE Rows rows(const RecurrenceInput<S>& in, int64_t t) const {
    return {t * in.B * in.D + direction, in.D};
  }
  TT_DEVICE Rows states(const RecurrenceInput<S>& in) const { return {direction * in.B, 1}; }
  // Of step s in this direction's travel.
  TT_DEVICE int time(const RecurrenceInput<S>& in, int s) const {
    return in.reverse != (direction == 1) ? static_cast<int>(in.T) - 1 - s : s;
  }
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

// From `width` numbers in each row; `column` is the warp's first unit in them. `later`, unless 0, is
// how far away the numbers lie that will be wanted kPrefetchSteps on.
template <typename V, typename S, int kTiles>
TT_DEVICE Fetched<V> fetch(const V* from, int64_t B, const Rows& rows, int64_t width,
                           int64_t column, const Samples<S, kTiles>& samples, int j,
                           int64_t later) {
  Fetched<V> fetched{};
  if constexpr (sizeof(V) == 2) {
    const int64_t n = samples.transposed(j);
    if (n < B) {
      const V* p = from + rows.at(n) * width + column + 2 * (lane() % 4);
      fetched.raw = *reinterpret_cast<const uint32_t*>(p);
      if (later != 0) prefetch(p + later);
    }
  } else {
    TT_UNROLL
    for (int e = 0; e < 2; ++e) {
      if (samples.at(j, e) < B) {
        const V* p = from + rows.at(samples.at(j, e)) * width + column + lane() / 4;
        fetched.raw[e] = *p;
        if (later != 0) prefetch(p + later);
      }
    }
  }
  return fetched;
}

template <typename V, typename S, int kTiles>
TT_DEVICE void store(V* to, int64_t B, const Rows& rows, int64_t width, int64_t column,
                     const Samples<S, kTiles>& samples, int j, const float (&value)[2]) {
  if constexpr (sizeof(V) == 2) {
    const uint32_t units = transpose_8x8(pack<V>(value[0], value[1]));
    const int64_t n = samples.transposed(j);
    if (n < B) {
      *reinterpret_cast<uint32_t*>(to + rows.at(n) * width + column + 2 * (lane() % 4)) = units;
    }
  } else {
    TT_UNROLL
    for (int e = 0; e < 2; ++e) {
      const int64_t n = samples.at(j, e);
      if (n < B) to[rows.at(n) * width + column + lane() / 4] = value[e];
    }
  }
}

}  // namespace throughtime
