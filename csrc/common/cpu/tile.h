// The register tile that every matrix product of the CPU kernels is made of.
//
// A tile of MR rows by NV vectors of columns is held in registers and takes, for k = 0, 1, ...,
// the product of column k of A (MR scalars) and row k of B (NV vectors, "a panel": k-major,
// contiguous). Every element is made of chains of kChain multiply-adds in the order of k, whatever
// the tile: how rows and columns are cut among tiles and threads never changes a bit of the result.
// What a product is added to (a bias, another product) comes last, for its size would round every
// link of a chain.
#pragma once

#include "common/cpu/vec.h"
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

  // A is addressed as a[i * row_stride + k * k_stride].
  TT_INLINE void multiply(const S* a, int64_t row_stride, int64_t k_stride, const S* panel,
                          int64_t k_count, int64_t panel_stride) {
    for (int64_t k = 0; k < k_count; ++k) {
      Vec<S> b[NV];
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) b[j] = load(panel + j * kLanes<S>);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const S scalar = a[i * row_stride];
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) v[i][j] += b[j] * scalar;
      }
      a += k_stride;
      panel += panel_stride;
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
  TT_INLINE void multiply(const S* a, int64_t row_stride, int64_t k_stride, const S* panel,
                          int64_t k_count, int64_t panel_stride = NV * kLanes<S>) {
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
      links_ += count;
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

// Room for the result of one tile.
template <typename S>
struct alignas(kVectorBytes) TileBuffer {
  S numbers[kRegisterRows * kPanelVectors * kLanes<S>];
};

template <int N>
struct Constant {
  static constexpr int value = N;
};

// Calls f(Constant<n>) for n = 1 .. kRegisterRows.
template <typename F>
TT_INLINE void with_rows(int64_t n, const F& f) {
  switch (n) {
    case 1:
      return f(Constant<1>{});
    case 2:
      return f(Constant<2>{});
    case 3:
      return f(Constant<3>{});
#if defined(__AVX512F__) || defined(__aarch64__)
    case 4:
      return f(Constant<4>{});
    case 5:
      return f(Constant<5>{});
    case 6:
      return f(Constant<6>{});
#endif
  }
}

template <typename F>
TT_INLINE void with_vectors(int64_t n, const F& f) {
  switch (n) {
    case 1:
      return f(Constant<1>{});
    case 2:
      return f(Constant<2>{});
    case 3:
      return f(Constant<3>{});
    default:
      return f(Constant<4>{});
  }
}

// Calls f(row, height) for tiles of nearly equal height that cover [begin, end): 25 rows are 5 x 5,
// not 4 x 6 + 1.
template <typename F>
TT_INLINE void for_row_tiles(int64_t begin, int64_t end, const F& f) {
  const int64_t rows = end - begin;
  if (rows <= 0) return;
  const int64_t tiles = (rows + kRegisterRows - 1) / kRegisterRows;
  const int64_t base = rows / tiles, extra = rows % tiles;
  int64_t row = begin;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t height = base + (tile < extra ? 1 : 0);
    f(row, height);
    row += height;
  }
}

// The left operand of a product: rows of `blocks` pieces of k_count numbers.
template <typename S>
struct Left {
  const S* at;
  int64_t row_stride;
  int64_t block_stride;
  int64_t blocks;
  int64_t k_count;
};

template <typename S, int MR, int NV>
TT_INLINE void product_tile(Left<S> a, const S* panel, S* out) {
  Sum<S, MR, NV> sum(out, NV * kLanes<S>, false);
  for (int64_t block = 0; block < a.blocks; ++block) {
    sum.multiply(a.at, a.row_stride, 1, panel, a.k_count);
    a.at += a.block_stride;
    panel += a.k_count * NV * kLanes<S>;
  }
  sum.put();
}

// out [rows, vectors * L] = A [rows, k] B [k, vectors * L]; at most kRegisterRows rows and
// kPanelVectors vectors. One function for all products of a run-time shape: the tiles are many.
template <typename S>
__attribute__((noinline)) void product(const Left<S>& a, const S* panel, int64_t rows,
                                       int64_t vectors, S* out) {
  with_vectors(vectors, [&](auto columns) {
    with_rows(rows, [&](auto count) {
      product_tile<S, decltype(count)::value, decltype(columns)::value>(a, panel, out);
    });
  });
}

}  // namespace
}  // namespace throughtime
