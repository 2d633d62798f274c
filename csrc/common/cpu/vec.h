// Vectors of one CPU instruction set, and the nonlinearities of a recurrent cell on them.
//
// Only the kernel sources include this file; they are compiled once per instruction set. Everything
// is in an anonymous namespace: the linker cannot pick an AVX-512 copy of a function for a machine
// without AVX-512. Vector extensions of GCC and Clang, and few intrinsics.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
// GCC's header initialises unused operands with themselves, and GCC warns about that.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "common/inline.h"
#include "common/scalars.h"
#include "common/sizes.h"

namespace throughtime {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRegisterRows = 6;  // 6 x 4 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kRegisterRows = 3;  // 3 x 4 accumulators of 16 registers
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kRegisterRows = 6;
#else
constexpr int kVectorBytes = 16;
constexpr int kRegisterRows = 3;
#endif

template <typename S>
struct Traits;

template <>
struct Traits<float> {
  using Int = int32_t;
  static constexpr int kMantissaBits = 23;
  static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLog2E = 1.44269504088896341f;
  static constexpr float kLn2Hi = 0.693359375f;  // 10 bits: n * kLn2Hi is exact
  static constexpr float kLn2Lo = -2.12194440054690583e-4f;
  static constexpr float kLeastLog = -87.33654022f;  // e^x is a normal number from here on
  static constexpr float kExpClamp = 89.0f;          // the bits of 2^n are those of infinity
  static constexpr float kTanhClamp = 10.0f;         // tanh(10) rounds to 1
};

template <>
struct Traits<double> {
  using Int = int64_t;
  static constexpr int kMantissaBits = 52;
  static constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLog2E = 1.44269504088896340736;
  static constexpr double kLn2Hi = 6.93145751953125e-1;
  static constexpr double kLn2Lo = 1.42860682030941723212e-6;
  static constexpr double kLeastLog = -708.3964185322641;
  static constexpr double kExpClamp = 710.0;
  static constexpr double kTanhClamp = 20.0;
};

template <typename S>
struct VecOf {
  typedef S type __attribute__((vector_size(kVectorBytes)));
  typedef S unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(S)), may_alias));
  typedef typename Traits<S>::Int integers __attribute__((vector_size(kVectorBytes)));
};

template <typename S>
using Vec = typename VecOf<S>::type;

template <typename S>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(S));

template <typename S>
TT_INLINE Vec<S> load(const S* from) {
  return *reinterpret_cast<const typename VecOf<S>::unaligned*>(from);
}

template <typename S>
TT_INLINE void store(S* to, Vec<S> v) {
  *reinterpret_cast<typename VecOf<S>::unaligned*>(to) = v;
}

// Stores to an aligned address past the caches. Other threads may read there once this thread has
// called stream_fence() and met them at a barrier.
template <typename S>
TT_INLINE void stream(S* to, Vec<S> v) {
#if defined(__clang__)
  __builtin_nontemporal_store(v, reinterpret_cast<Vec<S>*>(to));
#elif defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) __builtin_ia32_movntps512(to, v);
  if constexpr (sizeof(S) == 8) __builtin_ia32_movntpd512(to, v);
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 4) __builtin_ia32_movntps256(to, v);
  if constexpr (sizeof(S) == 8) __builtin_ia32_movntpd256(to, v);
#else
  store(to, v);
#endif
}

TT_INLINE void stream_fence() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

// Several vectors, `stride` numbers from each other.
template <int Count, typename S>
TT_INLINE void load_vectors(const S* from, int64_t stride, Vec<S>* to) {
#pragma GCC unroll 8
  for (int v = 0; v < Count; ++v) to[v] = load(from + v * stride);
}
template <int Count, typename S>
TT_INLINE void stream_vectors(S* to, int64_t stride, const Vec<S>* from) {
#pragma GCC unroll 8
  for (int v = 0; v < Count; ++v) stream(to + v * stride, from[v]);
}

#if defined(__AVX512F__)
template <typename S>
TT_INLINE unsigned first_lanes(int64_t count) {
  return (1u << count) - 1;
}
#elif defined(__AVX2__)
// All bits set in the first `count` lanes.
template <typename S>
TT_INLINE typename VecOf<S>::integers first_lanes(int64_t count) {
  typename VecOf<S>::integers lane;
  for (int i = 0; i < kLanes<S>; ++i) lane[i] = i;
  return lane < static_cast<typename Traits<S>::Int>(count);
}
#endif

// Loads the first `count` lanes; the others are zero. Nothing past them is read.
template <typename S>
TT_INLINE Vec<S> load_part(const S* from, int64_t count) {
  if (count >= kLanes<S>) return load(from);
  if (count <= 0) return Vec<S>{};
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) {
    return (Vec<S>)_mm512_maskz_loadu_ps(static_cast<__mmask16>(first_lanes<S>(count)), from);
  } else {
    return (Vec<S>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(first_lanes<S>(count)), from);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 4) {
    return (Vec<S>)_mm256_maskload_ps(from, (__m256i)first_lanes<S>(count));
  } else {
    return (Vec<S>)_mm256_maskload_pd(from, (__m256i)first_lanes<S>(count));
  }
#else
  alignas(kVectorBytes) S lanes[kLanes<S>] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
  return load(lanes);
#endif
}

// Stores the first `count` lanes. Nothing past them is written.
template <typename S>
TT_INLINE void store_part(S* to, Vec<S> v, int64_t count) {
  if (count >= kLanes<S>) {
    store(to, v);
    return;
  }
  if (count <= 0) return;
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) {
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>(first_lanes<S>(count)), (__m512)v);
  } else {
    _mm512_mask_storeu_pd(to, static_cast<__mmask8>(first_lanes<S>(count)), (__m512d)v);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 4) {
    _mm256_maskstore_ps(to, (__m256i)first_lanes<S>(count), (__m256)v);
  } else {
    _mm256_maskstore_pd(to, (__m256i)first_lanes<S>(count), (__m256d)v);
  }
#else
  alignas(kVectorBytes) S lanes[kLanes<S>];
  store(lanes, v);
  for (int64_t i = 0; i < count; ++i) to[i] = lanes[i];
#endif
}

// Numbers as they lie in memory, apart from those that the kernels compute with: an operand of a
// product may be narrower than the sums, as bfloat16.h has it.
template <typename Storage>
struct Numbers {
  static constexpr int kPair = 1;   // k that one step of a product multiplies
  static constexpr int kDepth = 1;  // operands are padded with zeros to a multiple of so many k
  static constexpr int kRun = 1;    // only multiples of so many numbers have an address
  static constexpr bool kBounded = false;  // whether products take numbers of some range only

  TT_INLINE static Storage one() { return 1; }
  TT_INLINE static Storage wide(Storage number) { return number; }
  TT_INLINE static Vec<Storage> vector_part(const Storage* from, int64_t count) {
    return load_part(from, count);
  }
  // Numbers [column, column + a vector) of a row.
  TT_INLINE static void put(Storage* row, int64_t column, Vec<Storage> v) {
    store(row + column, v);
  }
  TT_INLINE static void put_part(Storage* row, int64_t column, Vec<Storage> v, int64_t count) {
    store_part(row + column, v, count);
  }
  // Step k of kDepth of a panel.
  TT_INLINE static void put_step(Storage* to, int64_t, const Vec<Storage>* v) { store(to, *v); }
  // A step of a panel, what it is multiplied by, and the sum with their product.
  TT_INLINE static Vec<Storage> step(const Storage* from) { return load(from); }
  TT_INLINE static Storage factor(const Storage* from) { return *from; }
  TT_INLINE static Vec<Storage> multiply_add(Vec<Storage> sum, Storage factor, Vec<Storage> b) {
    return sum + b * factor;
  }
};

template <int Count, typename Storage>
TT_INLINE void store_vectors(Storage* to, int64_t stride, const Vec<SumOf<Storage>>* from) {
#pragma GCC unroll 8
  for (int v = 0; v < Count; ++v) Numbers<Storage>::put(to, v * stride, from[v]);
}

template <typename S>
TT_INLINE Vec<S> splat(S value) {
  return value - Vec<S>{};
}

template <typename S>
TT_INLINE Vec<S> absolute(Vec<S> x) {
  typedef typename VecOf<S>::integers Ints;
  return (Vec<S>)((Ints)x & ~(Ints)splat(S(-0.0)));
}

// `magnitude`, which is not negative, with the sign of x.
template <typename S>
TT_INLINE Vec<S> with_sign(Vec<S> magnitude, Vec<S> x) {
  typedef typename VecOf<S>::integers Ints;
  return (Vec<S>)((Ints)magnitude | ((Ints)x & (Ints)splat(S(-0.0))));
}

// NaN where x is NaN: the x86 instructions then return their second operand, which is x, and the
// comparison is false.
template <typename S>
TT_INLINE Vec<S> at_most(Vec<S> x, S bound) {
  const Vec<S> high = splat(bound);
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) return (Vec<S>)_mm512_min_ps((__m512)high, (__m512)x);
  if constexpr (sizeof(S) == 8) return (Vec<S>)_mm512_min_pd((__m512d)high, (__m512d)x);
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 4) return (Vec<S>)_mm256_min_ps((__m256)high, (__m256)x);
  if constexpr (sizeof(S) == 8) return (Vec<S>)_mm256_min_pd((__m256d)high, (__m256d)x);
#else
  return x > high ? high : x;
#endif
}

// x = n ln(2) + rest with n the nearest integer. `power` holds n in the bits of an exponent: added
// to the bits of a number, it multiplies the number by 2^n if the result is a normal number.
template <typename S>
TT_INLINE Vec<S> reduce(Vec<S> x, typename VecOf<S>::integers* power) {
  using K = Traits<S>;
  const Vec<S> shifted = x * K::kLog2E + K::kMagic;
  const Vec<S> n = shifted - K::kMagic;
  *power = (typename VecOf<S>::integers)shifted
           << K::kMantissaBits;  // the magic number is shifted out
  return (x - n * K::kLn2Hi) - n * K::kLn2Lo;
}

// (e^r - 1 - r) / r^2 for |r| <= ln(2) / 2.
template <typename S>
TT_INLINE Vec<S> second_order(Vec<S> r) {
  if constexpr (sizeof(S) == 4) {
    // Minimax for the relative error of e^r - 1: 1.4e-8.
    Vec<S> p = r * S(1.388253861e-3) + S(8.366519386e-3);
    p = p * r + S(4.166719949e-2);
    p = p * r + S(1.666654363e-1);
    return p * r + S(4.999999816e-1);
  } else {
    // Taylor's series in pairs of terms: a shorter chain of operations than by Horner's rule.
    const Vec<S> r2 = r * r;
    const Vec<S> p2 = r * S(1.0 / 6) + S(0.5);
    const Vec<S> p4 = r * S(1.0 / 120) + S(1.0 / 24);
    const Vec<S> p6 = r * S(1.0 / 5040) + S(1.0 / 720);
    const Vec<S> p8 = r * S(1.0 / 362880) + S(1.0 / 40320);
    const Vec<S> p10 = r * S(1.0 / 39916800) + S(1.0 / 3628800);
    const Vec<S> p12 = r * S(1.0 / 6227020800.0) + S(1.0 / 479001600);
    return ((((p12 * r2 + p10) * r2 + p8) * r2 + p6) * r2 + p4) * r2 + p2;
  }
}

// e^x = scale + scale q.
template <typename S>
struct Exponential {
  Vec<S> scale, q;
};

// For x in [kLeastLog, kExpClamp]. q carries NaN: adding `power` to its bits would change it.
template <typename S>
TT_INLINE Exponential<S> exponential(Vec<S> x) {
  typename VecOf<S>::integers power;
  const Vec<S> r = reduce<S>(x, &power);
  const Vec<S> q = (second_order<S>(r) * r) * r + r;
  return {(Vec<S>)((typename VecOf<S>::integers)splat(S(1)) + power), q};
}

// 1 / (1 + e^|x|) is sigmoid(-|x|), and exactly 0 where e^|x| is infinite. sigmoid(|x|) is 1 minus
// that, rounded once near 1: a forget gate's error adds up over all steps.
template <typename S>
TT_INLINE Vec<S> sigmoid(Vec<S> x) {
  const auto [scale, q] = exponential<S>(at_most(absolute<S>(x), Traits<S>::kExpClamp));
  const Vec<S> below = S(1) / (scale * (q + S(1)) + S(1));
  return x > Vec<S>{} ? S(1) - below : below;
}

// tanh |x| = m / (m + 2) with m = e^2|x| - 1, which keeps full relative accuracy near zero.
template <typename S>
TT_INLINE Vec<S> tanh(Vec<S> x) {
  const Vec<S> a = at_most(absolute<S>(x), Traits<S>::kTanhClamp);
  const auto [scale, q] = exponential<S>(a * S(2));
  const Vec<S> m = scale * q + (scale - S(1));
  return with_sign<S>(m / (m + S(2)), x);
}

// e^x for x <= 0; exactly 0 where e^x is no normal number.
template <typename S>
TT_INLINE Vec<S> exp_nonpositive(Vec<S> x) {
  const auto [scale, q] = exponential<S>(-at_most<S>(-x, -Traits<S>::kLeastLog));
  // Not scale * q + scale: without a fused operation the product may be subnormal, hence flushed.
  return x < splat(Traits<S>::kLeastLog) ? Vec<S>{} : scale * (q + S(1));
}

// One level of `transpose`: a and b exchange the lanes off the diagonal of blocks of W.
template <typename S, int W>
TT_INLINE void exchange_across(Vec<S>* a, Vec<S>* b) {
#if defined(__clang__)
  const Vec<S> first = *a, second = *b;
  for (int lane = 0; lane < kLanes<S>; ++lane) {
    (*a)[lane] = lane & W ? second[lane ^ W] : first[lane];
    (*b)[lane] = lane & W ? second[lane] : first[lane ^ W];
  }
#else
  typename VecOf<S>::integers low, high;
  for (int lane = 0; lane < kLanes<S>; ++lane) {
    low[lane] = lane & W ? kLanes<S> + (lane ^ W) : lane;
    high[lane] = lane & W ? kLanes<S> + lane : lane ^ W;
  }
  const Vec<S> first = *a;
  *a = __builtin_shuffle(first, *b, low);
  *b = __builtin_shuffle(first, *b, high);
#endif
}

template <typename S, int W>
TT_INLINE void transpose_levels(Vec<S>* rows) {
#pragma GCC unroll 16
  for (int row = 0; row < kLanes<S>; ++row)
    if (!(row & W)) exchange_across<S, W>(&rows[row], &rows[row + W]);
  if constexpr (W > 1) transpose_levels<S, W / 2>(rows);
}

// Transposes as many rows as a vector has lanes.
template <typename S>
TT_INLINE void transpose(Vec<S>* rows) {
  transpose_levels<S, kLanes<S> / 2>(rows);
}

// Calls f(k, v) for k = 0, step, ... below `padded`, v the columns k, k + 1, ... of rows: element
// `lane` of a column is rows(lane)[k], zero where rows(lane) is null or k is not below `columns`.
template <typename S, typename F, typename G>
TT_INLINE void transpose_rows(const F& rows, int64_t columns, int64_t padded, int64_t step,
                              const G& f) {
  constexpr int64_t L = kLanes<S>;
  const S* from[L];
  for (int64_t lane = 0; lane < L; ++lane) from[lane] = rows(lane);
  for (int64_t k = 0; k < padded; k += L) {
    Vec<S> v[L];
#pragma GCC unroll 16
    for (int64_t lane = 0; lane < L; ++lane) {
      const S* row = from[lane];
      v[lane] = row ? load_part(row + k, columns - k) : Vec<S>{};
      if (row)
        __builtin_prefetch(row + k + 4 * L);  // so many rows at once escape the processor's own
    }
    transpose<S>(v);
    for (int64_t j = 0; j < L && k + j < padded; j += step) f(k + j, v + j);
  }
}

// Lane l of the result is lane l ^ W.
template <typename S, int W>
TT_INLINE Vec<S> lanes_exchanged(Vec<S> v) {
#if defined(__clang__)
  Vec<S> exchanged;
  for (int lane = 0; lane < kLanes<S>; ++lane) exchanged[lane] = v[lane ^ W];
  return exchanged;
#else
  typename VecOf<S>::integers other;
  for (int lane = 0; lane < kLanes<S>; ++lane) other[lane] = lane ^ W;
  return __builtin_shuffle(v, other);
#endif
}

// f of all lanes, in pairs of pairs: f takes two vectors and is commutative.
template <typename S, int W = kLanes<S> / 2, typename F>
TT_INLINE S over_lanes(Vec<S> v, const F& f) {
  v = f(v, lanes_exchanged<S, W>(v));
  if constexpr (W > 1) return over_lanes<S, W / 2>(v, f);
  return v[0];
}

// One level of `sums_of_rows`. A lane whose index has bit W comes from b, another from a; it is the
// sum of the two lanes of its vector whose indices differ in that bit.
template <typename S, int W>
TT_INLINE Vec<S> add_across(Vec<S> a, Vec<S> b) {
#if defined(__clang__)
  Vec<S> sum;
  for (int lane = 0; lane < kLanes<S>; ++lane)
    sum[lane] = lane & W ? b[lane] + b[lane ^ W] : a[lane] + a[lane ^ W];
  return sum;
#else
  typename VecOf<S>::integers own, other;
  for (int lane = 0; lane < kLanes<S>; ++lane) {
    own[lane] = lane & W ? kLanes<S> + lane : lane;
    other[lane] = lane & W ? kLanes<S> + (lane ^ W) : lane ^ W;
  }
  return __builtin_shuffle(a, b, own) + __builtin_shuffle(a, b, other);
#endif
}

template <typename S, int W>
TT_INLINE void add_levels(Vec<S>* rows) {
  for (int row = 0; row < W; ++row) rows[row] = add_across<S, W>(rows[row], rows[row + W]);
  if constexpr (W > 1) add_levels<S, W / 2>(rows);
}

// Lane j of the result is the sum of the lanes of rows[j], for as many rows as a vector has lanes.
// Overwrites the rows.
template <typename S>
TT_INLINE Vec<S> sums_of_rows(Vec<S>* rows) {
  add_levels<S, kLanes<S> / 2>(rows);
  return rows[0];
}

}  // namespace
}  // namespace throughtime
