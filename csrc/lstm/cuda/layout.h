// The layout of the GPU kernels' shared memory, for the kernels and for plan().
#pragma once

namespace throughtime {

constexpr int kSlabUnits = 8;  // units that a warp owns; also samples of a tile
constexpr int kTileK = 32;     // of the inner dimension of a product

// Elements from one sample's row of a product's operand to the next: 64 bytes past a multiple of 128
// (16 bits), 16 past a multiple of 128 (float). A wide load of a warp then meets all banks.
constexpr int operand_stride(int k, int scalar_bytes) {
  return scalar_bytes == 2 ? (k + 63) / 64 * 64 + 32 : (k + 31) / 32 * 32 + 4;
}

struct SharedLayout {
  int tail;  // weights that are not in registers, warp by warp; the operand lies before them
  int sums;  // of products
  int destinations;  // of the backward's products, behind their sums
  int mbarriers;     // two, in a cluster
  int bytes;         // of all
  int warp_tail;     // bytes of a warp's weights
};

constexpr int kMbarrierBytes = 16;

// [operand: copies x samples x stride][tail][sums][mbarriers]
constexpr SharedLayout shared_layout(int copies, int samples, int k, int warps, int warp_tiles,
                                     int held, int sum_bytes, int scalar_bytes) {
  const int operand = copies * samples * operand_stride(k, scalar_bytes) * scalar_bytes;
  const int beyond = warp_tiles > held ? warp_tiles - held : 0;
  SharedLayout layout{};
  layout.warp_tail = beyond * 32 * kTileK * scalar_bytes;
  layout.tail = (operand + 127) / 128 * 128;
  layout.sums = layout.tail + warps * layout.warp_tail;
  layout.mbarriers = layout.sums + sum_bytes;
  layout.bytes = layout.mbarriers + kMbarrierBytes;
  return layout;
}

// Which instances of the kernels are built: what registers hold without spilling.
constexpr bool instance_exists(int scalar_bytes, bool backward, int tiles_n, int held) {
  if (tiles_n == 4) return held == 0 && !backward && scalar_bytes == 2;
  if (held == 0) return tiles_n == 1 || tiles_n == 2;
  if (scalar_bytes == 4) return held == 4 && tiles_n == 1;
  return held == 4 || (held == 8 && tiles_n == 1);
}

// Threads of a block, at most: 128, 168 or 255 registers each. Products of floats take more of them.
constexpr int most_threads(int scalar_bytes, int tiles_n, int held) {
  if (held > 0 || tiles_n == 4) return 256;
  if (scalar_bytes == 4) return tiles_n == 1 ? 384 : 256;
  return tiles_n == 1 ? 512 : 384;
}

struct Split {
  int tiles;  // of the inner dimension
  int run;    // of them, one part's; the last part may have fewer
};
constexpr Split split_k(int k, int parts) {
  const int tiles = (k + kTileK - 1) / kTileK;
  return {tiles, (tiles + parts - 1) / parts};
}
// 9 tiles in 4 parts make runs of 3: the last part is empty.
constexpr bool has_empty_part(int k, int parts) {
  const Split split = split_k(k, parts);
  return (parts - 1) * split.run >= split.tiles;
}

// Sums travel as one Pair (two samples) per lane: per slab of 8 units and tile of 8 samples.
constexpr int kPairBytes = 8;
constexpr int slab_sum_bytes(int tiles_n) { return tiles_n * 32 * kPairBytes; }

// Forward. Operand: h, twice in a cluster (read and written at the same time). Sums: the parts
// beyond the first, of 4 gates.
constexpr SharedLayout forward_layout(int H, int units, int parts, bool grid, int tiles_n, int held,
                                      int scalar_bytes) {
  const int slabs = units / kSlabUnits;
  return shared_layout(grid ? 1 : 2, 8 * tiles_n, H, slabs * parts, split_k(H, parts).run, held,
                       (parts - 1) * slabs * 4 * slab_sum_bytes(tiles_n), scalar_bytes);
}

// Backward. A job is the product for 32 of all H units with one part of the block's own 4 * units
// gate rows; job i belongs to warp i % warps. Parts are equal: units / 8 is a multiple of them.
struct Jobs {
  int slabs32;  // slabs of 32 units, of all H
  int all;
  int of_warp;  // at most
  int run;      // tiles of one
};
constexpr Jobs backward_jobs(int H, int units, int parts, int warps) {
  const int slabs32 = (H + 31) / 32, all = slabs32 * parts;
  return {slabs32, all, (all + warps - 1) / warps, 4 * units / kTileK / parts};
}

// What one block receives in an exchange: [source block and part][slab][tile][lane] Pair.
constexpr int received_bytes(int units, int ranks, int parts, int tiles_n) {
  return ranks * parts * units / kSlabUnits * slab_sum_bytes(tiles_n);
}

// Where the sums of 8 of a job's 32 units go.
struct Destination {
  int rank;  // block of the group; -1: there are no such units
  int place;  // Pair of its tile 0 and lane 0, from the start of what the block (with `grid`, the group) receives
};

// Operand: gradients of the block's gates, twice in a cluster, where a warp may still read those of the
// step before. Sums: received, twice; with `grid` these are in global memory, and here what each warp adds
// of them: [slab][tile][warp][lane] Pair.
constexpr SharedLayout backward_layout(int H, int units, int ranks, int parts, int warps, bool grid,
                                       int tiles_n, int held, int scalar_bytes) {
  const Jobs jobs = backward_jobs(H, units, parts, warps);
  const int sums = grid ? units / kSlabUnits * warps * slab_sum_bytes(tiles_n)
                        : 2 * received_bytes(units, ranks, parts, tiles_n);
  const int destinations = jobs.all * 4 * static_cast<int>(sizeof(Destination));
  SharedLayout layout =
      shared_layout(!grid && ranks > 1 ? 2 : 1, 8 * tiles_n, 4 * units, warps,
                    jobs.of_warp * jobs.run, held, sums + destinations, scalar_bytes);
  layout.destinations = layout.sums + sums;
  return layout;
}

}  // namespace throughtime
