// bfloat16 as the operand of products, with float sums, for each instruction set.
//
// A step of a product takes two neighbouring k: a pair of the left operand, and a vector of pairs of
// the panel, [element][2]. AVX512-BF16 has an instruction for it; elsewhere two multiply-adds do it.
// AMX multiplies 32 k at once (amx.h).
#pragma once

#include "common/cpu/vec.h"

namespace throughtime {
namespace {

template <>
struct Numbers<BFloat16> {
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint16_t AnyHalves __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
  typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
  static constexpr int64_t L = kLanes<float>;

  static constexpr int kPair = 2;
  static constexpr int kRun = 1;
  static constexpr bool kBounded = false;
#if defined(TT_AMX)
  static constexpr int kDepth = 32;
#else
  static constexpr int kDepth = 2;
#endif

  TT_INLINE static BFloat16 one() { return {0x3f80}; }

  TT_INLINE static float wide(BFloat16 number) { return throughtime::wide(number); }

  // To the nearest, ties to even, in the upper halves; a NaN stays one.
  TT_INLINE static Words rounded(Vec<float> v) {
    const Words words = (Words)v;
    const Words nearest = words + 0x7fff + (words >> 16 & 1);
    return v == v ? nearest : words | 0x400000u;
  }

  TT_INLINE static Vec<float> vector(const BFloat16* from) {
    const Halves halves = *reinterpret_cast<const AnyHalves*>(from);
    return (Vec<float>)(__builtin_convertvector(halves, Words) << 16);
  }
  // Nothing past `count` numbers is read.
  TT_INLINE static Vec<float> vector_part(const BFloat16* from, int64_t count) {
    if (count >= L) return vector(from);
    Halves halves{};
    if (count > 0) std::memcpy(&halves, from, count * sizeof(BFloat16));
    return (Vec<float>)(__builtin_convertvector(halves, Words) << 16);
  }
  TT_INLINE static Halves halves(Vec<float> v) {
#if defined(__AVX512BF16__)
    return (Halves)_mm512_cvtneps_pbh((__m512)v);
#else
    return __builtin_convertvector(rounded(v) >> 16, Halves);
#endif
  }
  TT_INLINE static void put(BFloat16* row, int64_t column, Vec<float> v) {
    *reinterpret_cast<AnyHalves*>(row + column) = halves(v);
  }
  TT_INLINE static void put_part(BFloat16* row, int64_t column, Vec<float> v, int64_t count) {
    if (count >= L) {
      put(row, column, v);
      return;
    }
    const Halves narrow = halves(v);
    if (count > 0) std::memcpy(row + column, &narrow, count * sizeof(BFloat16));
  }
  // Numbers of two rows side by side, [element][2]; zeros for a row that is null, or past `count`.
  TT_INLINE static Words pairs(const BFloat16* first, const BFloat16* second, int64_t count) {
    const auto words = [&](const BFloat16* row) {
      Halves halves{};
      if (row && count >= L) {
        halves = *reinterpret_cast<const AnyHalves*>(row);
      } else if (row) {
        std::memcpy(&halves, row, count * sizeof(BFloat16));
      }
      return __builtin_convertvector(halves, Words);
    };
    return words(first) | words(second) << 16;
  }

  TT_INLINE static void put_step(BFloat16* to, int64_t k, const Vec<float>* v) {
    const Words pairs = rounded(v[0]) >> 16 | (rounded(v[1]) & 0xffff0000u);
    std::memcpy(to + k * L, &pairs, sizeof pairs);
  }
  // The same of two rows, from a column on.
  TT_INLINE static void put_pair(BFloat16* to, int64_t k, const BFloat16* first,
                                 const BFloat16* second, int64_t column) {
    const Words words =
        pairs(first ? first + column : nullptr, second ? second + column : nullptr, L);
    std::memcpy(to + k * L, &words, sizeof words);
  }

  // Numbers [k, k + 2 L) of the rows of `to`, ld numbers apart: the columns of as many rows, zeros
  // for a row that is null.
  TT_INLINE static void put_transposed(BFloat16* to, int64_t ld, int64_t k,
                                       const BFloat16* const* from, int64_t columns) {
    for (int64_t column = 0; column < columns; column += L) {
      const int64_t count = least(columns - column, L);
      Vec<float> v[L];
#pragma GCC unroll 16
      for (int64_t pair = 0; pair < L; ++pair) {
        const auto at = [&](int64_t r) { return from[r] ? from[r] + column : nullptr; };
        v[pair] = (Vec<float>)pairs(at(2 * pair), at(2 * pair + 1), count);
      }
      transpose<float>(v);
      for (int64_t c = 0; c < count; ++c)
        std::memcpy(to + (column + c) * ld + k, &v[c], sizeof v[c]);
    }
  }

  // A vector of pairs of a panel.
  TT_INLINE static Words step(const BFloat16* from) {
    Words words;
    std::memcpy(&words, from, sizeof words);
#if defined(__AVX512BF16__)
    asm("" : "+v"(words));  // GCC would load it again for every row
#endif
    return words;
  }

  // The pair that a step is multiplied by.
  TT_INLINE static uint32_t factor(const BFloat16* from) {
    uint32_t pair;
    std::memcpy(&pair, from, sizeof pair);
    return pair;
  }

  // sum + a[0] b[.][0] + a[1] b[.][1] in every element, for the pair a and a vector of pairs b.
  TT_INLINE static Vec<float> multiply_add(Vec<float> sum, uint32_t pair, Words b) {
#if defined(__AVX512BF16__)
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(pair - Words{}), (__m512bh)b);
#else
    const Words first = (pair << 16) - Words{}, second = (pair & 0xffff0000u) - Words{};
    sum += (Vec<float>)(b & 0xffff0000u) * (Vec<float>)second;
    return sum + (Vec<float>)(b << 16) * (Vec<float>)first;
#endif
  }
};

}  // namespace
}  // namespace throughtime
