// What one lane of a warp holds, and how it moves to and from global memory.
//
// A warp works on 8 units and 8 kTiles samples, a lane on one unit of two samples in each tile of 8
// samples: the layout in which mma.m16n8k16 leaves its sums. Lane 4 g + q, with row g and column q:
//
//     as sums          unit g of samples 2 q and 2 q + 1
//     as pairs         units 2 q and 2 q + 1 of sample g: 16-bit numbers in global memory
//
// transpose_8x8() turns one into the other. Apart from this file only product.cuh, which feeds mma, uses
// rows and columns of lanes.
#pragma once

#include <type_traits>

#include "lstm/cuda/cell.cuh"
#include "lstm/cuda/layout.h"

namespace throughtime {

TT_DEVICE int lane_row() { return lane() / 4; }
TT_DEVICE int lane_column() { return lane() % 4; }

// One of the numbers that a lane holds.
struct Place {
  int unit;     // of the warp's 8
  int sample;   // of the group's 8 kTiles
  int tile, e;  // its place in a Fragment
};

// visit(Place) for the two numbers of a tile that this lane holds, and for those of all tiles.
template <typename Visit>
TT_DEVICE void for_each_of_tile(int tile, const Visit& visit) {
  TT_UNROLL
  for (int e = 0; e < 2; ++e) visit(Place{lane_row(), 8 * tile + 2 * lane_column() + e, tile, e});
}
template <int kTiles, typename Visit>
TT_DEVICE void for_each(const Visit& visit) {
  TT_UNROLL
  for (int tile = 0; tile < kTiles; ++tile) for_each_of_tile(tile, visit);
}

// One number per unit and sample.
template <typename V, int kTiles>
struct Fragment {
  V v[kTiles][2];
  TT_DEVICE V& operator[](Place at) { return v[at.tile][at.e]; }
  TT_DEVICE const V& operator[](Place at) const { return v[at.tile][at.e]; }
};

// Four numbers per unit and sample: of its gates, or of four units 8 apart.
template <int kTiles>
struct Fragment4 {
  float v[kTiles][8];
  TT_DEVICE float& operator()(Place at, int r) { return v[at.tile][2 * r + at.e]; }
  TT_DEVICE float operator()(Place at, int r) const { return v[at.tile][2 * r + at.e]; }
  TT_DEVICE Pair pair(int tile, int r) const { return {v[tile][2 * r], v[tile][2 * r + 1]}; }
};

// A lane's two numbers of a tile as 32-bit words of memory: one pair of 16-bit numbers or two floats.
template <typename V>
struct Stored {
  uint32_t words[sizeof(V) / 2];

  TT_DEVICE static Stored of(const float (&value)[2]) {
    if constexpr (sizeof(V) == 2) {
      return {{transpose_8x8(pack<V>(value[0], value[1]))}};
    } else {
      return {{bits_of(value[0]), bits_of(value[1])}};
    }
  }
  TT_DEVICE void value(float (&to)[2]) const {
    if constexpr (sizeof(V) == 2) {
      const uint32_t samples = transpose_8x8(words[0]);
      to[0] = low_half<V>(samples);
      to[1] = high_half<V>(samples);
    } else {
      to[0] = from_bits(words[0]);
      to[1] = from_bits(words[1]);
    }
  }
  // visit(word, sample, unit) for the words of a tile; `unit` is the first in a word.
  template <typename Word, typename Visit>
  TT_DEVICE static void for_each(Word (&words)[sizeof(V) / 2], int tile, const Visit& visit) {
    if constexpr (sizeof(V) == 2) {
      visit(words[0], 8 * tile + lane_row(), 2 * lane_column());
    } else {
      for_each_of_tile(tile, [&](Place at) { visit(words[at.e], at.sample, at.unit); });
    }
  }
};

// Where a lane's numbers of tile 0 lie in an array with one row per sample: elements from the start of the
// row of the group's first sample.
struct LaneOffsets {
  int stride;       // from one sample to the next
  int sums, pairs;  // of the lane's place as sums, and as pairs
  int sector;       // of the sector that the lane prefetches: of a sample and one of 4 columns

  // `column`: elements from one of the 4 columns to the next.
  TT_DEVICE LaneOffsets(int row, int column, int unit0)
      : stride(row),
        sums(2 * lane_column() * row + unit0 + lane_row()),
        pairs(lane_row() * row + unit0 + 2 * lane_column()),
        sector(lane() % 8 * row + lane() / 8 * column + unit0) {}

  // For those that every step needs.
  TT_DEVICE void keep() {
    hold(sums);
    hold(pairs);
  }
};

// A warp's 8 units in an array in global memory that has one row per sample.
template <typename V>
struct UnitRows {
  V* first;  // the row of the group's first sample
  LaneOffsets lane_at;
  int samples;  // of the group that the batch has

  TT_DEVICE bool has(Place at) const { return at.sample < samples; }
  TT_DEVICE V* at(Place place, int column = 0) const {
    return first + (lane_at.sums + (8 * place.tile + place.e) * lane_at.stride + column);
  }

  // The units from `column` on, as they lie in memory.
  TT_DEVICE auto load(int tile, int column = 0) const {
    using Scalar = std::remove_const_t<V>;
    Stored<Scalar> stored{};
    visit(tile, column, stored.words,
          [](uint32_t& word, V* at) { word = *reinterpret_cast<const uint32_t*>(at); });
    return stored;
  }
  TT_DEVICE void store(int tile, const float (&value)[2], int column = 0) const {
    Stored<V> stored = Stored<V>::of(value);
    visit(tile, column, stored.words,
          [](uint32_t word, V* at) { *reinterpret_cast<uint32_t*>(at) = word; });
  }
  // Fetches what lies `ahead` elements further into the L2 cache: 8 samples, of each `columns` (at most 4).
  TT_DEVICE void prefetch(int tile, int64_t ahead, int columns) const {
    if (8 * tile + lane() % 8 < samples && lane() / 8 < columns) {
      device::prefetch(first + (lane_at.sector + 8 * tile * lane_at.stride) + ahead);
    }
  }

 private:
  // move(word, where) for the words of a tile that the batch has.
  template <typename Words, typename Move>
  TT_DEVICE void visit(int tile, int column, Words& words, const Move& move) const {
    if constexpr (sizeof(V) == 2) {
      if (8 * tile + lane_row() < samples) {
        move(words[0], first + (lane_at.pairs + 8 * tile * lane_at.stride + column));
      }
    } else {
      for_each_of_tile(tile, [&](Place place) {
        if (has(place)) move(words[place.e], at(place, column));
      });
    }
  }
};

}  // namespace throughtime
