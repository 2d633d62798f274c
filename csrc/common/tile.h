// The register tile that every matrix product of the CPU kernels is made of.
//
// A tile of MR rows by NV vectors of columns is held in registers and takes, for k = 0, 1, ...,
// the product of column k of A (MR scalars) and row k of B (NV vectors, "a panel": k-major,
// contiguous). Every element is one chain of multiply-adds in the order of k, whatever the tile:
// how rows and columns are cut among tiles and threads never changes a bit of the result.
#pragma once

#include "vec.h"

namespace throughtime {
namespace {

constexpr int kPanelVectors = 4;  // four gates of one block of units, or four blocks of columns

template <typename S, int MR, int NV>
struct Tile {
  Vec<S> v[MR][NV];

  TT_INLINE void clear() {
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < NV; ++j) v[i][j] = Vec<S>{};
  }

  TT_INLINE void fill(const S* row) {
    for (int j = 0; j < NV; ++j) {
      const Vec<S> value = load(row + j * kLanes<S>);
      for (int i = 0; i < MR; ++i) v[i][j] = value;
    }
  }

  TT_INLINE void read(const S* from) {
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < NV; ++j) v[i][j] = load(from + (i * NV + j) * kLanes<S>);
  }

  TT_INLINE void write(S* to) const {
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < NV; ++j) store(to + (i * NV + j) * kLanes<S>, v[i][j]);
  }

  TT_INLINE void add_to(S* to) const {
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < NV; ++j) {
        S* at = to + (i * NV + j) * kLanes<S>;
        store(at, load(at) + v[i][j]);
      }
  }

  TT_INLINE void prefetch(const S* to) const {
    for (int i = 0; i < MR * NV; ++i) __builtin_prefetch(to + i * kLanes<S>);
  }

  TT_INLINE void read_rows(const S* from, int64_t row_stride) {
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < NV; ++j) v[i][j] = load(from + i * row_stride + j * kLanes<S>);
  }

  TT_INLINE void write_rows(S* to, int64_t row_stride) const {
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < NV; ++j) store(to + i * row_stride + j * kLanes<S>, v[i][j]);
  }

  // A is addressed as a[i * row_stride + k * k_stride].
  TT_INLINE void multiply(const S* a, int64_t row_stride, int64_t k_stride, const S* panel,
                          int64_t k_count, int64_t panel_stride = NV * kLanes<S>) {
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
  Tile<S, MR, NV> tile;
  tile.clear();
  for (int64_t block = 0; block < a.blocks; ++block) {
    tile.multiply(a.at, a.row_stride, 1, panel, a.k_count);
    a.at += a.block_stride;
    panel += a.k_count * NV * kLanes<S>;
  }
  tile.write(out);
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

// Room for the result of one product.
template <typename S>
struct alignas(kVectorBytes) TileBuffer {
  S numbers[kRegisterRows * kPanelVectors * kLanes<S>];
};

}  // namespace
}  // namespace throughtime
