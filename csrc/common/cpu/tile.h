// The register tile that every matrix product of the CPU kernels is made of.
//
// A tile of MR rows by NV vectors of columns is held in registers and takes, for k = 0, 1, ...,
// the product of column k of A (MR scalars) and row k of B (NV vectors, "a panel": k-major,
// contiguous). Every element is made of chains of kChain multiply-adds in the order of k, whatever
// the tile: the partition of rows and columns among tiles and threads never changes a bit of the
// result. What a product is added to (a bias, another product) comes last, for its size would round
// every link of a chain.
//
// A and B hold any Operand that Numbers knows; the tile holds the sums, of type S = SumOf<Operand>.
// An operand of pairs takes two k at a time: A's rows hold them side by side, B is [k / 2][column][2].
#pragma once

#include "common/cpu/bfloat16.h"
#include "common/sizes.h"

namespace throughtime {
namespace {

constexpr int kPanelVectors = 4;  // four gates of one block of units, or four blocks of columns

// Rows by vectors in registers.
template <typename S, int MR, int NV>
struct Tile {
  Vec<S> v[MR][NV];

  TT_INLINE void clear() {
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) v[i][j] = Vec<S>{};
  }

  // The same row to every row.
  TT_INLINE void add_row(const S* row) {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      const Vec<S> value = load(row + j * kLanes<S>);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) v[i][j] += value;
    }
  }

  TT_INLINE void add(const S* from, int64_t row_stride) {
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) v[i][j] += load(from + i * row_stride + j * kLanes<S>);
  }

  TT_INLINE void write(S* to, int64_t row_stride) const {
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) store(to + i * row_stride + j * kLanes<S>, v[i][j]);
  }

  // A is addressed as a[i * row_stride + k * k_stride]; pairs have a k_stride of 1.
  template <typename Operand>
  TT_INLINE void multiply(const Operand* a, int64_t row_stride, int64_t k_stride,
                          const Operand* panel, int64_t k_count, int64_t panel_stride) {
    using Step = Numbers<Operand>;
    constexpr int64_t kPair = Step::kPair;
    for (int64_t k = 0; k < k_count; k += kPair) {
      decltype(Step::step(panel)) b[NV];
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) b[j] = Step::step(panel + j * kPair * kLanes<S>);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const auto factor = Step::factor(a + i * row_stride);
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) v[i][j] = Step::multiply_add(v[i][j], factor, b[j]);
      }
      a += kPair * k_stride;
      panel += kPair * panel_stride;
    }
  }
};

constexpr int64_t kChain = 256;  // to end one costs about 1 % of it, in a full tile of AVX-512

// A tile's sum of products on its way to rows in memory, where chains that have ended are added up.
// One chain of thousands would lose digits: its error grows with the square root of its length.
template <typename S, int MR, int NV>
class Sum {
 public:
  // `begun`: what lies there is added to, not replaced.
  TT_INLINE Sum(S* to, int64_t row_stride, bool begun)
      : to_(to), row_stride_(row_stride), begun_(begun) {
    chain_.clear();
  }

  // See Tile::multiply.
  template <typename Operand>
  TT_INLINE void multiply(const Operand* a, int64_t row_stride, int64_t k_stride,
                          const Operand* panel, int64_t k_count,
                          int64_t panel_stride = NV * kLanes<S>) {
    while (k_count > 0) {
      if (links_ == kChain) {
        put();
        chain_.clear();
        begun_ = true;
        links_ = 0;
      }
      const int64_t count = least(k_count, kChain - links_);
      chain_.multiply(a, row_stride, k_stride, panel, count, panel_stride);
      a += count * k_stride;
      panel += count * panel_stride;
      links_ += round_up(count, Numbers<Operand>::kDepth);
      k_count -= count;
    }
  }

  TT_INLINE void put() {
    put([](auto&) {});
  }

  // After f(the whole sum, a Tile).
  template <typename F>
  TT_INLINE void put(const F& f) {
    if (begun_) chain_.add(to_, row_stride_);
    f(chain_);
    chain_.write(to_, row_stride_);
  }

 private:
  Tile<S, MR, NV> chain_;
  S* to_;
  int64_t row_stride_;
  bool begun_;
  int64_t links_ = 0;
};

// Room for the result of one product.
template <typename S, int64_t kRows = kRegisterRows>
struct alignas(kVectorBytes) TileBuffer {
  S numbers[kRows * kPanelVectors * kLanes<S>];
};

template <int N>
struct Constant {
  static constexpr int value = N;
};

// Calls f(Constant<n>) for n of 1 .. Most; traps at any other.
template <int Most, typename F>
TT_INLINE void with_constant(int64_t n, const F& f) {
  if (n == Most) {
    f(Constant<Most>{});
  } else if constexpr (Most > 1) {
    with_constant<Most - 1>(n, f);
  } else {
    __builtin_trap();
  }
}

// Calls f(row, height) for tiles of nearly equal height that cover [begin, end): 25 rows are 5 x 5,
// not 4 x 6 + 1.
template <int64_t kRows = kRegisterRows, typename F>
TT_INLINE void for_row_tiles(int64_t begin, int64_t end, const F& f) {
  const int64_t rows = end - begin;
  if (rows <= 0) return;
  const int64_t tiles = divide_up(rows, kRows);
  const int64_t base = rows / tiles, extra = rows % tiles;
  int64_t row = begin;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t height = base + (tile < extra ? 1 : 0);
    f(row, height);
    row += height;
  }
}

// Calls f(Constant<width>, first) for groups of at most kPanelVectors vectors of [begin, end), of
// nearly equal width.
template <typename F>
TT_INLINE void for_vector_groups(int64_t begin, int64_t end, const F& f) {
  for_row_tiles<kPanelVectors>(begin, end, [&](int64_t first, int64_t width) {
    with_constant<kPanelVectors>(width, [&](auto count) { f(count, first); });
  });
}

}  // namespace
}  // namespace throughtime
