// The recurrent product of a warp: 32 rows of the weight times 8 kTiles samples.
//
//     sums[r][n] += sum_k  weight(row r, k) * operand(sample n, k)
//
// The 32 rows are four groups of 8: in the forward the four gates of 8 units, in the backward 4 x 8
// units. A lane holds the sums of one row of each group for 2 samples per tile (Fragment4).
//
// The inner dimension is divided into tiles of 32. 16 bits: of a tile a lane holds 4 x 16 bytes of
// weights, in registers for the first kHeld tiles and in shared memory for the rest, and reads 16 bytes
// per 8 samples from shared memory. The matrix unit sums over k in any order, so slot pairs
// (2q, 2q+1) and (2q+8, 2q+9) of its two fragments are k = 8q .. 8q+7: one wide load.
// float: fused multiply-adds, weights in shared memory as [k][row][group].
//
// Cost of a tile per warp: 16 bits 4 kTiles mma; float 256 kTiles multiply-adds per lane.
#pragma once

#include "lstm/cuda/fragment.cuh"

namespace throughtime {

template <typename S>
constexpr bool kMatrixUnit = sizeof(S) == 2;

// How many elements of the inner dimension a weight callback returns: 8 of 16 bits, or one float.
template <typename S>
using WeightElement = std::conditional_t<kMatrixUnit<S>, Words, float>;

template <typename S, int kTiles, int kHeld>
class Product {
  static_assert(kMatrixUnit<S> || kHeld == 0, "float weights lie in shared memory");

 public:
  // Two chains of sums where neither tiles of samples nor many warps cover the matrix unit's latency.
  static constexpr int kChains =
      kMatrixUnit<S> && kTiles == 1 && most_threads(kTiles, kHeld) <= 256 ? 2 : 1;

  // weight(tile, group, row, k): WeightElement from element k of the tile, in a row of 8 of a group.
  // `tail` are this warp's (tiles - kHeld) tiles in shared memory.
  template <typename Weight>
  TT_DEVICE void load(int tiles, char* tail, const Weight& weight) {
    tail_ = tail;
    const int row = lane_row(), k = 8 * lane_column();
    if constexpr (kMatrixUnit<S>) {
      TT_UNROLL
      for (int i = 0; i < kHeld; ++i) {
        TT_UNROLL
        for (int r = 0; r < 4; ++r) held_[i][r] = i < tiles ? weight(i, r, row, k) : Words{};
      }
      TT_DO_NOT_UNROLL
      for (int i = kHeld; i < tiles; ++i) {
        TT_DO_NOT_UNROLL
        for (int r = 0; r < 4; ++r) {
          reinterpret_cast<Words*>(tail)[(i - kHeld) * 128 + r * 32 + lane()] =
              weight(i, r, row, k);
        }
      }
    } else {
      for (int i = 0; i < tiles; ++i) {
        for (int r = 0; r < 4; ++r) {
          for (int at = k; at < k + 8; ++at) {
            reinterpret_cast<float*>(tail)[i * 1024 + at * 32 + row * 4 + r] =
                weight(i, r, row, at);
          }
        }
      }
    }
  }

  // Adds tiles [0, tiles); operand(0) points at this warp's first k of sample 0. After each run of
  // `run` tiles, done(index of the run) takes sums(), which restart at 0; the next run reads
  // operand(index).
  template <typename Operand, typename Done>
  TT_DEVICE void multiply(int tiles, int run, int stride, const Operand& operand,
                          const Done& done) const {
    clear();
    int index = 0, at = 0;
    const S* x = operand(0);
    const auto step = [&](const auto& tile) {
      tile(x + at * kTileK);
      if (++at == run) {
        collect();
        done(index++);
        clear();
        at = 0;
        x = operand(index);
      }
    };
    if constexpr (kMatrixUnit<S>) {
      TT_UNROLL
      for (int i = 0; i < kHeld; ++i) {
        if (i < tiles) step([&](const S* at_x) { add(held_[i], at_x, stride); });
      }
      TT_DO_NOT_UNROLL  // registers are scarce
          for (int i = kHeld; i < tiles; ++i) {
        step([&](const S* at_x) {
          const Words* w = reinterpret_cast<const Words*>(tail_) + (i - kHeld) * 128 + lane();
          const Words rows[4] = {w[0], w[32], w[64], w[96]};
          add(rows, at_x, stride);
        });
      }
    } else {
      for (int i = 0; i < tiles; ++i) {
        step([&](const S* at_x) {
          add(reinterpret_cast<const float*>(tail_) + i * 1024, at_x, stride);
        });
      }
    }
  }

  // Of the four groups of rows; valid in done().
  TT_DEVICE const Fragment4<kTiles>& sums() const { return sums_[0]; }

 private:
  TT_DEVICE void clear() const {
    TT_UNROLL
    for (int c = 0; c < kChains; ++c) sums_[c] = {};
  }

  TT_DEVICE void collect() const {
    if constexpr (kChains == 2) {
      TT_UNROLL
      for (int j = 0; j < kTiles; ++j) {
        TT_UNROLL
        for (int i = 0; i < 8; ++i) sums_[0].v[j][i] += sums_[1].v[j][i];
      }
    }
  }

  TT_DEVICE void add(const Words (&rows)[4], const S* x, int stride) const {
    TT_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      const S* row = x + (8 * j + lane_row()) * stride;
      const Words b = *reinterpret_cast<const Words*>(row + 8 * lane_column());
      TT_UNROLL
      for (int e = 0; e < 2; ++e) {
        TT_UNROLL
        for (int m = 0; m < 2; ++m) {
          mma_16x8x16(S{}, &sums_[e % kChains].v[j][4 * m], rows[2 * m].v[2 * e],
                      rows[2 * m + 1].v[2 * e], rows[2 * m].v[2 * e + 1],
                      rows[2 * m + 1].v[2 * e + 1], b.v[2 * e], b.v[2 * e + 1]);
        }
      }
    }
  }

  TT_DEVICE void add(const float* weights, const float* x, int stride) const {
    const float* w = weights + 4 * lane_row();
    const float* x0 = x + 2 * lane_column() * stride;
    for (int k = 0; k < kTileK; k += 4) {
      Quad a[4];
      TT_UNROLL
      for (int i = 0; i < 4; ++i) a[i] = *reinterpret_cast<const Quad*>(w + (k + i) * 32);
      TT_UNROLL
      for (int j = 0; j < kTiles; ++j) {
        TT_UNROLL
        for (int n = 0; n < 2; ++n) {
          const Quad b = *reinterpret_cast<const Quad*>(x0 + (8 * j + n) * stride + k);
          TT_UNROLL
          for (int i = 0; i < 4; ++i) {
            TT_UNROLL
            for (int r = 0; r < 4; ++r) sums_[0].v[j][2 * r + n] += a[i].v[r] * b.v[i];
          }
        }
      }
    }
  }

  Words held_[kHeld > 0 ? kHeld : 1][4];
  const char* tail_;
  mutable Fragment4<kTiles> sums_[kChains];
};

}  // namespace throughtime
