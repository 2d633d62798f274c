// What a step saves of its cell for the backward pass, and how it lies in memory.
//
// Kernels that multiply in full precision save vectors of S. Those with narrower operands save 12
// bytes a unit instead of 20: the carried cell as it is, everything else as float16, whose 2^-11 is
// finer than an operand's 2^-8. A gate near 1 is the exception: a forget gate of 0.999 decides how
// far a gradient reaches, and its distance to 1 would have two digits. So the smaller of f and 1 - f
// is saved, with a sign that tells which: both ends keep 2^-11 of their own size.
#pragma once

#include "common/cpu/bfloat16.h"

namespace throughtime {
namespace {

// Cell::kSaved vectors of one step, row and block of units.
template <typename Cell, typename Operand>
struct Saved {
  using S = typename Cell::Number;
  static constexpr int64_t L = kLanes<S>;
  static constexpr int kVectors = Cell::kSaved;  // of S, in memory

  TT_INLINE static void put(S* to, const Vec<S>* v) { store_vectors<kVectors>(to, L, v); }
  TT_INLINE static void stream(S* to, const Vec<S>* v) { stream_vectors<kVectors>(to, L, v); }
  TT_INLINE static void get(const S* from, Vec<S>* v) { load_vectors<kVectors>(from, L, v); }
  // The last vector: the carried cell.
  TT_INLINE static Vec<S> cell(const S* from) { return load(from + (kVectors - 1) * L); }
};

#if defined(__AVX512F__)
template <typename Cell>
requires Cell::kCarriesCell struct Saved<Cell, BFloat16> {
  using S = float;
  static constexpr int64_t L = kLanes<S>;
  static constexpr int kVectors = (Cell::kSaved + 2) / 2;
  static_assert(Cell::kSaved % 2 == 1, "the cell comes last, everything else in pairs");

  TT_INLINE static void put(S* to, const Vec<S>* v) { write(v, to, throughtime::store<S>); }
  TT_INLINE static void stream(S* to, const Vec<S>* v) { write(v, to, throughtime::stream<S>); }

  TT_INLINE static void get(const S* from, Vec<S>* v) {
    for (int pair = 0; pair < kVectors - 1; ++pair) {
      const __m512i both = (__m512i)load(from + pair * L);
      v[2 * pair] = (Vec<S>)_mm512_cvtph_ps(_mm512_castsi512_si256(both));
      v[2 * pair + 1] = (Vec<S>)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1));
    }
    Vec<S>& f = v[Cell::kForget];
    f = (typename VecOf<S>::integers)f < 0 ? f + S(1) : f;  // by its sign: -0 is a gate of 1
    v[Cell::kSaved - 1] = cell(from);
  }
  TT_INLINE static Vec<S> cell(const S* from) { return load(from + (kVectors - 1) * L); }

 private:
  template <typename Write>
  TT_INLINE static void write(const Vec<S>* v, S* to, const Write& write) {
    for (int pair = 0; pair < kVectors - 1; ++pair) {
      const __m512i low = _mm512_castsi256_si512(half(v, 2 * pair));
      write(to + pair * L, (Vec<S>)_mm512_inserti64x4(low, half(v, 2 * pair + 1), 1));
    }
    write(to + (kVectors - 1) * L, v[Cell::kSaved - 1]);
  }
  TT_INLINE static __m256i half(const Vec<S>* v, int n) {
    constexpr int nearest = 8;  // to the nearest, no exceptions
    const Vec<S> nearer = v[n] > S(0.5) ? -(S(1) - v[n]) : v[n];
    return _mm512_cvtps_ph((__m512)(n == Cell::kForget ? nearer : v[n]), nearest);
  }
};
#endif

}  // namespace
}  // namespace throughtime
