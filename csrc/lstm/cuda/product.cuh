// The recurrent product of a warp: 32 rows of the weight times 8 kTiles samples, on the matrix unit.
//
//     sums[r][n] += sum_k  weight(row r, k) * operand(sample n, k)
//
// The 32 rows are four groups of 8: in the forward the four gates of 8 units, in the backward 4 x 8
// units. A lane holds the sums of one row of each group for 2 samples per tile (Fragment4).
//
// The inner dimension is divided into tiles of 32. Of a tile a lane holds 8 elements of its row in each
// group: in registers for the first kHeld tiles, in shared memory for the rest. It reads 8 elements per 8
// samples from shared memory, in one or two vectors of 16 bytes. The matrix unit sums over k in any order,
// so words 2e and 2e + 1 of a vector (each a float, or two numbers of 16 bits) are the lane's slots in the
// vector's mma e. Weights are stored as the fragments of an mma, 16 bytes. All loads are wide, and those of
// a warp meet all banks.
//
// The matrix unit takes floats of 11 significant bits (TF32) and rounds its sums toward zero. Two
// products of floats:
//
//     split     x = high + low, each of 11 bits; high high + (high low + low high), which leaves out 2^-22
//               of a product. The float unit adds the sums of high parts tile by tile, and so rounds to
//               nearest. The other sums are small: chains of their own, added at the end.
//     rounded   x to 11 bits: a relative error of 2^-12 per number.
//
// Cost of a tile per warp: 4 kTiles mma of 16 bits; of floats 24 kTiles, or 8 kTiles if rounded. Read:
// 2048 bytes of weights and 512 per 8 samples; of floats twice that.
#pragma once

#include "lstm/cuda/fragment.cuh"

namespace throughtime {

template <typename S>
constexpr bool kIsFloat = sizeof(S) == 4;

// A float as the sum of two that the matrix unit takes. Of an infinite one the low part is NaN.
struct Halves {
  uint32_t high, low;
};
TT_DEVICE Halves split(uint32_t word) {
  const uint32_t high = to_tf32(from_bits(word));
  return {high, bits_of(from_bits(word) - from_bits(high))};
}

template <typename S, int kTiles, int kHeld>
class Product {
  static constexpr int kVectors = sizeof(S) / 2;   // of 8 elements
  static constexpr int kFragments = 4 * kVectors;  // of a tile's weights: [vector][two groups][mma]
  // Chains of sums. 16 bits: two where neither tiles of samples nor many warps cover the matrix unit's
  // latency. float: the second is of low parts, or helps as well.
  static constexpr bool kFewWarps = kTiles == 1 && most_threads(sizeof(S), kTiles, kHeld) <= 256;
  static constexpr int kChains = kIsFloat<S> ? (kTiles == 1 && kHeld == 0 ? 3 : 2)
                                 : kFewWarps ? 2
                                             : 1;

 public:
  // weight(tile, group, row, k): 16 bytes from element k of the tile, in a row of 8 of a group.
  // `tail` are this warp's (tiles - kHeld) tiles in shared memory. `rounded`: which product of floats.
  template <typename Weight>
  TT_DEVICE void load(int tiles, const bool& rounded, char* tail, const Weight& weight) {
    rounded_ = &rounded;
    tail_ = reinterpret_cast<Words*>(tail) + lane();
    const auto fragment = [&](int tile, int at, int e) {
      const int k = 8 * lane_column() + 8 / kVectors * (at / 4), m = at / 2 % 2;
      const Words upper = weight(tile, 2 * m, lane_row(), k);
      const Words lower = weight(tile, 2 * m + 1, lane_row(), k);
      Words a = {{upper.v[2 * e], lower.v[2 * e], upper.v[2 * e + 1], lower.v[2 * e + 1]}};
      if (kIsFloat<S> && rounded) {
        TT_UNROLL
        for (uint32_t& word : a.v) word = to_tf32(from_bits(word));
      }
      return a;
    };
    TT_UNROLL
    for (int i = 0; i < kHeld; ++i) {
      TT_UNROLL
      for (int at = 0; at < kFragments; ++at) {
        held_[i][at] = i < tiles ? fragment(i, at, at % 2) : Words{};
      }
    }
    TT_DO_NOT_UNROLL
    for (int i = kHeld; i < tiles; ++i) {
      TT_DO_NOT_UNROLL
      for (int at = 0; at < kFragments; at += 2) {
        TT_UNROLL
        for (int e = 0; e < 2; ++e) *tail_at(i, at + e) = fragment(i, at, e);
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
    const auto step = [&](const auto& weight) {
      add(weight, x + at * kTileK, stride);
      if (++at == run) {
        collect();
        done(index++);
        clear();
        at = 0;
        x = operand(index);
      }
    };
    TT_UNROLL
    for (int i = 0; i < kHeld; ++i) {
      if (i < tiles) step([&](int at) { return held_[i][at]; });
    }
    TT_DO_NOT_UNROLL  // registers are scarce
        for (int i = kHeld; i < tiles; ++i) {
      step([&](int at) { return *tail_at(i, at); });
    }
  }

  // The same for one run of all tiles, whose sums() are valid then. Where registers allow it there is no branch
  // between tiles, so that the loads of one stand beside the products of another.
  TT_DEVICE void multiply_all(int tiles, int stride, const S* x) const {
    clear();
    if constexpr (kIsFloat<S>) {
      if (!*rounded_) {
        add_all(tiles, x, [&](const auto& weight, const S* at) { add_split(weight, at, stride); });
        return collect();
      }
    }
    add_all(tiles, x, [&](const auto& weight, const S* at) { add_rounded(weight, at, stride); });
    collect();
  }

  // Of the four groups of rows; valid in done(), and after multiply_all().
  TT_DEVICE const Fragment4<kTiles>& sums() const { return sums_[0]; }

 private:
  TT_DEVICE Words* tail_at(int tile, int at) const {
    return tail_ + ((tile - kHeld) * kFragments + at) * 32;
  }

  TT_DEVICE void clear() const {
    TT_UNROLL
    for (int c = 0; c < kChains; ++c) sums_[c] = {};
  }

  // A sum of low parts is finite unless a number is not, and then the sum of high parts is not either.
  TT_DEVICE void collect() const {
    if constexpr (kChains > 1) {
      const bool split = kIsFloat<S> && !*rounded_;
      TT_UNROLL
      for (int j = 0; j < kTiles; ++j) {
        TT_UNROLL
        for (int i = 0; i < 8; ++i) {
          float sum = sums_[1].v[j][i];
          if constexpr (kChains > 2) sum += sums_[2].v[j][i];
          sums_[0].v[j][i] += split & !is_finite(sum) ? 0.0f : sum;
        }
      }
    }
  }

  template <typename Add>
  TT_DEVICE void add_all(int tiles, const S* x, const Add& add) const {
    const auto held = [&](int i) { add([&](int at) { return held_[i][at]; }, x + i * kTileK); };
    if (!kIsFloat<S> && tiles >= kHeld) {
      TT_UNROLL
      for (int i = 0; i < kHeld; ++i) held(i);
    } else {
      TT_UNROLL
      for (int i = 0; i < kHeld; ++i) {
        if (i < tiles) held(i);
      }
    }
    const auto tail = [&](int i) { add([&](int at) { return *tail_at(i, at); }, x + i * kTileK); };
    int i = kHeld;
    if constexpr (kIsFloat<S> && kHeld == 0) {
      TT_DO_NOT_UNROLL
      for (; i + 1 < tiles; i += 2) {
        tail(i);
        tail(i + 1);
      }
    }
    TT_DO_NOT_UNROLL  // registers are scarce
        for (; i < tiles; ++i) tail(i);
  }

  // weight(at): a fragment of the tile's weights.
  template <typename Weight>
  TT_DEVICE void add(const Weight& weight, const S* x, int stride) const {
    if constexpr (kIsFloat<S>) {
      if (!*rounded_) return add_split(weight, x, stride);
    }
    add_rounded(weight, x, stride);
  }

  TT_DEVICE static Words samples(const S* x, int v, int stride, int j) {
    const S* row = x + (8 * j + lane_row()) * stride;
    return *reinterpret_cast<const Words*>(row + 8 * lane_column() + 8 / kVectors * v);
  }

  template <typename Weight>
  TT_DEVICE void add_rounded(const Weight& weight, const S* x, int stride) const {
    TT_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      Words a[4];
      TT_UNROLL
      for (int at = 0; at < 4; ++at) a[at] = weight(4 * v + at);
      TT_UNROLL
      for (int j = 0; j < kTiles; ++j) {
        Words b = samples(x, v, stride, j);
        if constexpr (kIsFloat<S>) {
          TT_UNROLL
          for (uint32_t& word : b.v) word = to_tf32(from_bits(word));
        }
        TT_UNROLL
        for (int e = 0; e < 2; ++e) {
          TT_UNROLL
          for (int m = 0; m < 2; ++m) {
            const Words& rows = a[2 * m + e];
            mma_16x8(S{}, sums_[kChains > 1 ? e : 0].v[j] + 4 * m, rows.v[0], rows.v[1], rows.v[2],
                     rows.v[3], b.v[2 * e], b.v[2 * e + 1]);
          }
        }
      }
    }
  }

  template <typename Weight>
  TT_DEVICE void add_split(const Weight& weight, const S* x, int stride) const {
    Fragment4<kTiles> high = {};  // sums of high parts
    TT_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      Words a[4], b[kTiles];
      TT_UNROLL
      for (int at = 0; at < 4; ++at) a[at] = weight(4 * v + at);
      TT_UNROLL
      for (int j = 0; j < kTiles; ++j) b[j] = samples(x, v, stride, j);
      TT_UNROLL
      for (int e = 0; e < 2; ++e) {
        TT_UNROLL
        for (int m = 0; m < 2; ++m) {
          const Words& rows = a[2 * m + e];
          const Halves a0 = split(rows.v[0]), a1 = split(rows.v[1]);
          const Halves a2 = split(rows.v[2]), a3 = split(rows.v[3]);
          TT_UNROLL
          for (int j = 0; j < kTiles; ++j) {
            const Halves b0 = split(b[j].v[2 * e]), b1 = split(b[j].v[2 * e + 1]);
            float *low = sums_[1].v[j] + 4 * m, *other = sums_[kChains - 1].v[j] + 4 * m;
            mma_16x8(S{}, low, a0.low, a1.low, a2.low, a3.low, b0.high, b1.high);
            mma_16x8(S{}, other, a0.high, a1.high, a2.high, a3.high, b0.low, b1.low);
            mma_16x8(S{}, high.v[j] + 4 * m, a0.high, a1.high, a2.high, a3.high, b0.high, b1.high);
          }
        }
      }
    }
    TT_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      TT_UNROLL
      for (int i = 0; i < 8; ++i) sums_[0].v[j][i] += high.v[j][i];
    }
  }

  const bool* rounded_;
  Words held_[kHeld > 0 ? kHeld : 1][kFragments];
  Words* tail_;
  mutable Fragment4<kTiles> sums_[kChains];
};

}  // namespace throughtime
