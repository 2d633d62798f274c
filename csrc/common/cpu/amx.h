// Products by the matrix unit of Intel processors (AMX): tiles of 16 rows of 64 bytes.
//
// One instruction adds the product of 16 rows by 32 k of bfloat16 and a panel's 32 k by 16 columns to
// 16 x 16 floats. Two rows of tiles by two columns of them are in registers at a time: four sums, two
// left and two right operands. Rows past the last one of a left operand are multiplied too, and
// dropped: memory has them (Tiling::kPadding), and no row reaches another.
//
// Compiled with TT_AMX_STAND_IN, functions with the instruction's bits take its place, so that tests
// run these kernels on other machines.
#pragma once

#include "common/cpu/operands.h"

namespace throughtime {
namespace {

#if defined(TT_AMX)

namespace amx {

constexpr int64_t kRows = 16, kColumns = 16, kDepth = 32;
constexpr int64_t kTile = kColumns * kDepth;  // numbers of a tile of a panel

#if defined(TT_AMX_STAND_IN)

struct Tile16 {
  alignas(64) char bytes[kRows][64];
};
inline thread_local Tile16 tiles[8];

TT_INLINE void configure() {}
TT_INLINE void release() {}

template <int tile>
TT_INLINE void load(const void* from, int64_t stride) {
  for (int64_t row = 0; row < kRows; ++row)
    std::memcpy(tiles[tile].bytes[row], static_cast<const char*>(from) + row * stride, 64);
}
template <int tile>
TT_INLINE void store(void* to, int64_t stride) {
  for (int64_t row = 0; row < kRows; ++row)
    std::memcpy(static_cast<char*>(to) + row * stride, tiles[tile].bytes[row], 64);
}
template <int tile>
TT_INLINE void clear() {
  std::memset(&tiles[tile], 0, sizeof(Tile16));
}
// TDPBF16PS. Two chains of fused multiply-adds from zero, one of the first and one of the second k of
// every pair; their sum is added. Subnormal numbers are zero, which the caller's flushing does here.
template <int sum, int left, int right>
TT_INLINE void multiply_add() {
  using Words = Numbers<BFloat16>::Words;
  for (int64_t row = 0; row < kRows; ++row) {
    Vec<float> first{}, second{}, total;
    for (int64_t k = 0; k < kDepth / 2; ++k) {
      uint32_t pair;
      std::memcpy(&pair, tiles[left].bytes[row] + 4 * k, sizeof pair);
      Words b;
      std::memcpy(&b, tiles[right].bytes[k], sizeof b);
      const Words a0 = (pair << 16) - Words{}, a1 = (pair & 0xffff0000u) - Words{};
      first = (Vec<float>)_mm512_fmadd_ps((__m512)a0, (__m512)(b << 16), (__m512)first);
      second = (Vec<float>)_mm512_fmadd_ps((__m512)a1, (__m512)(b & 0xffff0000u), (__m512)second);
    }
    std::memcpy(&total, tiles[sum].bytes[row], sizeof total);
    total += first + second;
    std::memcpy(tiles[sum].bytes[row], &total, sizeof total);
  }
}

#else

// The instructions name their memory: the compiler must not move stores past them.
struct alignas(64) Configuration {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

TT_INLINE void configure() {
  const Configuration configuration;
  asm volatile("ldtilecfg %0" ::"m"(configuration));
}
// Torch's own kernels may run on this thread next, with a configuration of theirs.
TT_INLINE void release() { asm volatile("tilerelease" ::: "memory"); }

template <int tile>
TT_INLINE void load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
TT_INLINE void store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
TT_INLINE void clear() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
template <int sum, int left, int right>
TT_INLINE void multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(left), "i"(right));
}

#endif

// f(Constant<0>{}), ... f(Constant<N - 1>{}).
template <int N, typename F>
TT_INLINE void each(const F& f) {
  if constexpr (N > 1) each<N - 1>(f);
  f(Constant<N - 1>{});
}

// f(rows, row stride, panel) for every kDepth of k of the terms; the panel from a vector of columns on.
template <typename Operand, typename F>
TT_INLINE void each_step(const Term<Operand>* terms, int count, int64_t width, int64_t column,
                         const F& f) {
  for (int n = 0; n < count; ++n) {
    const Left<Operand>& left = terms[n].left;
    const Operand* panel = terms[n].panel + column * kTile;
    for (int64_t block = 0; block < left.blocks; ++block) {
      const Operand* rows = left.at + block * left.block_stride;
      for (int64_t k = 0; k < left.k_count; k += kDepth, panel += width * kTile)
        f(rows + k, left.row_stride, panel);
    }
  }
}

// R by C tiles of the sums, C of the `width` vectors of columns of a panel from `column` on.
template <int R, int C>
TT_INLINE void multiply_block(const Term<BFloat16>* terms, int count, int64_t width, int64_t column,
                              const Target<float>& to) {
  static_assert(R * C <= 4);
  float* const out = to.at + column * kColumns;
  each<R * C>([&](auto n) {
    constexpr int tile = decltype(n)::value, r = tile / C, c = tile % C;
    const int64_t at = (column + c) * kColumns;
    if (to.begun) {
      load<tile>(out + r * kRows * to.row_stride + c * kColumns, to.row_stride * 4);
    } else if (to.addend) {
      load<tile>(to.addend + r * kRows * to.addend_stride + at, to.addend_stride * 4);
    } else if (to.bias) {
      load<tile>(to.bias + at, 0);
    } else {
      clear<tile>();
    }
  });
  const auto step = [](const BFloat16* rows, int64_t row_stride, const BFloat16* panel) {
    each<R>([&](auto r) {
      load<4 + decltype(r)::value>(rows + r.value * kRows * row_stride, row_stride * 2);
    });
    each<C>([&](auto c) {
      constexpr int right = 6 + decltype(c)::value % 2;
      load<right>(panel + c.value * kTile, 64);
      each<R>([&](auto r) {
        multiply_add<decltype(r)::value * C + decltype(c)::value, 4 + decltype(r)::value, right>();
      });
    });
  };
  each_step(terms, count, width, column, step);
  each<R * C>([&](auto n) {
    constexpr int tile = decltype(n)::value, r = tile / C, c = tile % C;
    store<tile>(out + r * kRows * to.row_stride + c * kColumns, to.row_stride * 4);
  });
}

}  // namespace amx

// See sum_products in matrix.h. What is added comes first: the unit adds to it.
template <int NV>
TT_INLINE void multiply_tiles(const Term<BFloat16>* terms, int count, int64_t rows,
                              const Target<float>& to) {
  constexpr int64_t width = NV * amx::kColumns;
  const auto copy_rows = [&](const float* from, int64_t from_stride, float* dest, int64_t stride) {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t k = 0; k < width; k += amx::kColumns)
        throughtime::store(dest + row * stride + k,
                           throughtime::load(from + row * from_stride + k));
  };
  TileBuffer<float, 32> buffer;
  Target<float> whole = to;
  const bool part = rows % amx::kRows != 0;  // a whole tile reaches rows that may not be ours
  const bool apart = part && !to.whole;
  if (apart) {
    whole.at = buffer.numbers;
    whole.row_stride = width;
    if (to.begun) copy_rows(to.at, to.row_stride, whole.at, width);
  }
  if (part && !to.begun && to.addend) {
    copy_rows(to.addend, to.addend_stride, whole.at, whole.row_stride);
    whole.begun = true;
  }
  if (rows > amx::kRows) {
    constexpr int two = NV > 1 ? 2 : 1;
    for (int64_t column = 0; column + two <= NV; column += two)
      amx::multiply_block<2, two>(terms, count, NV, column, whole);
    if constexpr (NV == 3) amx::multiply_block<2, 1>(terms, count, NV, 2, whole);
  } else {
    amx::multiply_block<1, NV>(terms, count, NV, 0, whole);
  }
  if (apart) copy_rows(buffer.numbers, width, to.at, to.row_stride);
}

// A worker's hold on the unit.
class MatrixUnit {
 public:
  MatrixUnit() { amx::configure(); }
  ~MatrixUnit() { amx::release(); }
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;
};

#else

class MatrixUnit {
 public:
  MatrixUnit() {}
};

// Only kernels for AMX multiply by tiles.
template <int NV, typename Operand>
void multiply_tiles(const Term<Operand>*, int, int64_t, const Target<SumOf<Operand>>&);

#endif

}  // namespace
}  // namespace throughtime
