// The recurrent product of a warp: 32 rows of the weight times 8 kTiles samples.
//
//     acc[r][n] += sum_k  weight(row r, k) * operand(sample n, k)
//
// Lane l = 4 g + q holds, for each tile j of 8 samples, rows g, g + 8, g + 16, g + 24 of samples
// 8 j + 2 q and + 1: acc[j][2 * group + sample]. In the forward the four groups of rows are the four
// gates of 8 units, in the backward 4 x 8 units: either way a lane owns (unit g, two samples), and
// both passes exchange sums in this layout.
//
// The inner dimension is cut into tiles of 32. 16-bit: a lane's share of a tile are 4 x 16 bytes of
// weights, which stay in registers for all steps as far as kHeld goes and lie in shared memory
// beyond, and 16 bytes per 8 samples from shared memory. The matrix unit sums over k in any order, so
// slot pairs (2q, 2q+1) and (2q+8, 2q+9) of its two fragments are k = 8q .. 8q+7: one wide load.
// float: fused multiply-adds, weights in shared memory as [k][g][group].
//
// Cost of a tile per warp: 16-bit 4 kTiles mma; float 256 kTiles multiply-adds per lane.
#pragma once

#include "common/cuda/device.cuh"
#include "lstm/cuda/layout.h"

namespace throughtime {

using namespace device;  // NOLINT: kernels are written in its words

template <typename S>
constexpr bool kMatrixUnit = sizeof(S) == 2;

template <typename S, int kTiles, int kHeld>
class Product {
  static_assert(kMatrixUnit<S> || kHeld == 0, "float weights lie in shared memory");

 public:
  // Two chains of sums where neither tiles of samples nor many warps cover the matrix unit's latency.
  static constexpr int kChains =
      kMatrixUnit<S> && kTiles == 1 && most_threads(kTiles, kHeld) <= 256 ? 2 : 1;

  // weight(tile, group, i): elements 8q .. 8q+7 of row g of the group, as Words (16-bit), or element
  // i of the tile (float). `tail` are this warp's (tiles - kHeld) tiles in shared memory.
  template <typename Weight>
  TT_DEVICE void load(int tiles, char* tail, const Weight& weight) {
    tail_ = tail;
    if constexpr (kMatrixUnit<S>) {
      TT_UNROLL
      for (int i = 0; i < kHeld; ++i) {
        TT_UNROLL
        for (int r = 0; r < 4; ++r) held_[i][r] = i < tiles ? weight(i, r, 0) : Words{};
      }
      TT_DO_NOT_UNROLL
      for (int i = kHeld; i < tiles; ++i) {
        TT_DO_NOT_UNROLL
        for (int r = 0; r < 4; ++r) {
          reinterpret_cast<Words*>(tail)[(i - kHeld) * 128 + r * 32 + lane()] = weight(i, r, 0);
        }
      }
    } else {
      // Lane 4 g + q brings the quarter q of row g's elements.
      for (int i = 0; i < tiles; ++i) {
        for (int r = 0; r < 4; ++r) {
          for (int k = 0; k < 8; ++k) {
            const int at = lane() % 4 * 8 + k;
            reinterpret_cast<float*>(tail)[i * 1024 + at * 32 + lane() / 4 * 4 + r] =
                weight(i, r, k);
          }
        }
      }
    }
  }

  // Adds tiles [0, tiles); `operand` points at this warp's first k of sample 0. After each run of
  // `run` tiles, done(index of the run) takes the sums, which start anew; the next run reads the
  // operand from where next(index) says.
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
      TT_DO_NOT_UNROLL  // registers are what there is least of
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

  // [tile of samples][2 * group of rows + sample], valid in done().
  TT_DEVICE float sum(int j, int i) const { return acc_[0][j][i]; }

 private:
  TT_DEVICE void clear() const {
    TT_UNROLL
    for (int c = 0; c < kChains; ++c) {
      TT_UNROLL
      for (int j = 0; j < kTiles; ++j) {
        TT_UNROLL
        for (int i = 0; i < 8; ++i) acc_[c][j][i] = 0.0f;
      }
    }
  }

  TT_DEVICE void collect() const {
    if constexpr (kChains == 2) {
      TT_UNROLL
      for (int j = 0; j < kTiles; ++j) {
        TT_UNROLL
        for (int i = 0; i < 8; ++i) acc_[0][j][i] += acc_[1][j][i];
      }
    }
  }

  TT_DEVICE void add(const Words (&rows)[4], const S* x, int stride) const {
    TT_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      const Words b =
          *reinterpret_cast<const Words*>(x + (8 * j + lane() / 4) * stride + lane() % 4 * 8);
      TT_UNROLL
      for (int e = 0; e < 2; ++e) {
        TT_UNROLL
        for (int m = 0; m < 2; ++m) {
          mma_16x8x16(S{}, &acc_[e % kChains][j][4 * m], rows[2 * m].v[2 * e],
                      rows[2 * m + 1].v[2 * e], rows[2 * m].v[2 * e + 1],
                      rows[2 * m + 1].v[2 * e + 1], b.v[2 * e], b.v[2 * e + 1]);
        }
      }
    }
  }

  TT_DEVICE void add(const float* weights, const float* x, int stride) const {
    const float* w = weights + lane() / 4 * 4;
    const float* x0 = x + 2 * (lane() % 4) * stride;
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
            for (int r = 0; r < 4; ++r) acc_[0][j][2 * r + n] += a[i].v[r] * b.v[i];
          }
        }
      }
    }
  }

  Words held_[kHeld > 0 ? kHeld : 1][4];
  const char* tail_;
  mutable float acc_[kChains][kTiles][8];
};

}  // namespace throughtime
