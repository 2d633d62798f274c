// The arguments of the GPU kernels: the recurrence of one layer, in one direction or in both at once.
//
// The input projection comes in, the gradient of the gates goes out. The products outside of the
// recurrence are the library's (python/throughtime/ops/lstm/gpu.py).
//
// Shapes: T steps (below 2^31), B samples, D directions (1 or 2), H units (a multiple of 8). Gate rows
// in PyTorch's order i, f, g, o. S is float, Float16 or BFloat16; gate sums and c are float.
#pragma once

#include <cstdint>

#include "common/scalars.h"

namespace throughtime {

// How the forward saves a gate for the backward: cell.cuh.
template <typename S>
struct SavedGateOf {
  using Type = device::Float16;
};
template <>
struct SavedGateOf<float> {
  using Type = float;
};
template <typename S>
using SavedGate = typename SavedGateOf<S>::Type;

// Numbers from one group's counter of arrivals to the next: each has a cache line of its own, so the
// polls of one group do not hold up the arrivals of another.
constexpr int kArrivalStride = 32;

// How plan() in plan.h divides the work of a persistent kernel among blocks and warps.
struct Partition {
  int groups;          // of samples, in each direction
  int ranks;           // blocks that share the units of one group
  int units;           // of a block, a multiple of 8; ranks * units >= H
  int parts;           // warps that share the inner dimension of one product
  bool grid;           // the blocks of a group exchange through global memory, else in a cluster
  unsigned* arrivals;  // [D groups, kArrivalStride], 0 at the start; with `grid`
  void* exchange;      // h or partial dh of the groups in global memory; with `grid`
};

template <typename S>
struct RecurrenceInput {
  int64_t T, B, D, H;
  const S* weight;         // [D, 4H, H]
  const float* c0;         // [D, B, H]
  const int64_t* lengths;  // [B], or null: every sample has T steps
  const bool* reset;       // [D, T, B] or null: the state is zero before step t
  bool reverse;            // direction 0 travels from T-1 to 0; direction 1 travels the other way
  bool tf32;               // float: the recurrent product takes numbers rounded to 11 bits
  Partition partition;

  // The position t of step s in the travel of direction d.
  template <typename Int>
  constexpr Int time(int64_t d, Int s) const {
    return reverse != (d == 1) ? static_cast<Int>(T) - 1 - s : s;
  }
  // The row of an array [T, B, D, ..].
  constexpr int64_t row(int64_t t, int64_t n, int64_t d) const { return (t * B + n) * D + d; }
  constexpr bool is_reset(int64_t d, int64_t t, int64_t n) const {
    return reset && reset[(d * T + t) * B + n];
  }
};

template <typename S>
struct RecurrenceForward {
  RecurrenceInput<S> in;
  const float* projected;  // [T, B, D, 4H]: x W_ih^T
  const float* bias;       // [D, 4H] or null
  const S* h0;             // [D, B, H]
  S* y;                    // [T, B, D, H], zero past a sample's end
  S* h_n;                  // [D, B, H]
  float* c_n;              // [D, B, H]
  SavedGate<S>* gates;     // [T, B, D, 4H], or null; unset past the end
  float* cells;            // [T, B, D, H], c_t, or null; unset past the end
};

template <typename S>
struct RecurrenceBackward {
  RecurrenceInput<S> in;
  const SavedGate<S>* gates;  // of the forward
  const float* cells;         // of the forward
  const S* dy;                // [T, B, D, H] or null: zero
  const S* dh_n;              // [D, B, H] or null
  const float* dc_n;          // [D, B, H] or null
  const bool* detach;         // [D, T, B] by its strides, or null: no gradient into h_{t-1}
  int64_t detach_stride_d, detach_stride_t, detach_stride_b;  // of b: 0 where the batch shares one
  S* dgates;                                                  // [T, B, D, 4H], zero past the end
  float* dh0;                                                 // [D, B, H]
  float* dc0;                                                 // [D, B, H]

  constexpr bool is_detached(int64_t d, int64_t t, int64_t n) const {
    return detach && detach[d * detach_stride_d + t * detach_stride_t + n * detach_stride_b];
  }
};

}  // namespace throughtime
