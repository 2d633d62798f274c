// float32 as the operand of products by a matrix unit that multiplies bfloat16: a number is the sum of
// up to three bfloat16 parts of falling size, and a product of numbers the sum of the products of parts.
//
// Three parts hold all 24 bits, two hold 17, one holds 8. Each is rounded, so that what it leaves has
// either sign: left out products of small parts cancel. The third is exact.
//
// The unit takes subnormal numbers as zero. So that a part of no normal number is one, numbers are
// multiplied by 2^24 before they are split, and sums of products by 2^-48 afterwards, both exactly.
// In return numbers must be below 2^31 and weights below 2^16: a sum of 2^17 products of them stays
// finite. Numbers beyond, infinities and NaN among them, are for other kernels.
//
// The parts of 32 numbers lie together, [part][32]: 64 bytes are one row of a tile. So an address of
// an operand is that of a multiple of 32 numbers.
#pragma once

#include "common/cpu/bfloat16.h"

namespace throughtime {
namespace {

constexpr float kSplitScale = 0x1p24f, kSplitUnscale = 0x1p-48f;

#if defined(TT_AMX)

template <int kParts>
struct Numbers<SplitFloat<kParts>> {
  using Narrow = Numbers<BFloat16>;
  using Words = Narrow::Words;
  using Operand = SplitFloat<kParts>;
  static constexpr int64_t L = kLanes<float>;
  static constexpr int kPair = 2, kDepth = Narrow::kDepth, kRun = kDepth;
  static constexpr bool kBounded = true;
  static constexpr int64_t kPanelPart = kDepth * L;  // bfloat16 numbers of a part of a panel's step

  TT_INLINE static float one() { return 1; }

  // Whether products take all of a vector's numbers.
  TT_INLINE static bool holds(Vec<float> v) {
    return _mm512_cmp_ps_mask((__m512)absolute<float>(v), (__m512)splat(kSplitBound), _CMP_LT_OQ) ==
           0xffff;
  }

  // The parts are the upper halves.
  TT_INLINE static void split(Vec<float> v, Words* parts) {
    v *= kSplitScale;
#pragma GCC unroll 3
    for (int part = 0; part < kParts - 1; ++part) {
      parts[part] = ((Words)v + 0x8000u) & 0xffff0000u;
      v -= (Vec<float>)parts[part];
    }
    parts[kParts - 1] = Narrow::rounded(v);
  }

  TT_INLINE static BFloat16* part_of(Operand* row, int64_t column, int part) {
    return reinterpret_cast<BFloat16*>(row + column / kRun * kRun) + part * kRun + column % kRun;
  }
  TT_INLINE static const BFloat16* part_of(const Operand* row, int64_t column, int part) {
    return part_of(const_cast<Operand*>(row), column, part);
  }

  TT_INLINE static void put(Operand* row, int64_t column, Vec<float> v) {
    Words parts[kParts];
    split(v, parts);
    for (int part = 0; part < kParts; ++part)
      *reinterpret_cast<Narrow::AnyHalves*>(part_of(row, column, part)) =
          __builtin_convertvector(parts[part] >> 16, Narrow::Halves);
  }
  // Zeros follow: rows are padded.
  TT_INLINE static void put_part(Operand* row, int64_t column, Vec<float> v, int64_t count) {
    if (count < L)
      v = (Vec<float>)_mm512_maskz_mov_ps(first_lanes<float>(count > 0 ? count : 0), (__m512)v);
    put(row, column, v);
  }
  TT_INLINE static void put_row(Operand* to, const float* from, int64_t count) {
    for (int64_t column = 0; column < count; column += L)
      put(to, column, load_part(from + column, count - column));
  }

  TT_INLINE static void put_step(Operand* to, int64_t k, const Vec<float>* v) {
    Words first[kParts], second[kParts];
    split(v[0], first);
    split(v[1], second);
    for (int part = 0; part < kParts; ++part)
      put_words(to, k, part, first[part] >> 16 | (second[part] & 0xffff0000u));
  }
  TT_INLINE static void put_pair(Operand* to, int64_t k, const Operand* first,
                                 const Operand* second, int64_t column) {
    for (int part = 0; part < kParts; ++part)
      put_words(to, k, part,
                Narrow::pairs(first ? part_of(first, column, part) : nullptr,
                              second ? part_of(second, column, part) : nullptr, L));
  }

  // See Numbers<BFloat16>.
  TT_INLINE static void put_transposed(Operand* to, int64_t ld, int64_t k, const float* const* from,
                                       int64_t columns) {
    for (int64_t column = 0; column < columns; column += L)
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t count = least(columns - column, L);
        Vec<float> v[L];
#pragma GCC unroll 16
        for (int64_t r = 0; r < L; ++r) {
          const float* row = from[half * L + r];
          v[r] = row ? load_part(row + column, count) : Vec<float>{};
        }
        transpose<float>(v);
        for (int64_t c = 0; c < count; ++c) put(to + (column + c) * ld, k + half * L, v[c]);
      }
  }
  TT_INLINE static void put_transposed(Operand* to, int64_t ld, int64_t k,
                                       const Operand* const* from, int64_t columns) {
    for (int64_t column = 0; column < columns; column += L)
      for (int part = 0; part < kParts; ++part) {
        const BFloat16* rows[2 * L];
        for (int64_t r = 0; r < 2 * L; ++r)
          rows[r] = from[r] ? part_of(from[r], column, part) : nullptr;
        Narrow::put_transposed(part_of(to + column * ld, k, part), kParts * ld, 0, rows,
                               least(columns - column, L));
      }
  }

 private:
  TT_INLINE static void put_words(Operand* to, int64_t k, int part, Words words) {
    std::memcpy(reinterpret_cast<BFloat16*>(to) + part * kPanelPart + k * L, &words, sizeof words);
  }
};

#endif

}  // namespace
}  // namespace throughtime
