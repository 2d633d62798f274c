// The arguments of the GPU kernels: the recurrence of one layer in one direction.
//
// The input projection comes in, the gradient of the gates goes out; what lies outside of the
// recurrence are large library products (python/throughtime/ops/lstm_gpu.py).
//
// Shapes: T steps (below 2^31), B samples, H units (a multiple of 8). Gate rows in PyTorch's order i, f, g, o.
// S is float, Float16 or BFloat16; gate sums and c are float.
#pragma once

#include <cstdint>

namespace throughtime {

// How the persistent kernels cut the work; made by plan() in plan.h.
struct RecurrenceCut {
  int ranks;           // blocks that share the units of one group of samples
  int units;           // of a block, a multiple of 8; ranks * units >= H
  int parts;           // warps that share the inner dimension of one product
  bool grid;           // blocks meet in global memory; otherwise they are one cluster
  unsigned* arrivals;  // [groups], 0 at the start; with `grid`
  void* exchange;      // what the blocks of a group tell each other; with `grid`
};

template <typename S>
struct RecurrenceInput {
  int64_t T, B, H;
  const S* weight;         // [4H, H]
  const float* c0;         // [B, H]
  const int64_t* lengths;  // [B], or null: every sample has T steps
  const bool* reset;       // [T, B] or null: the state is zero before step t
  bool reverse;            // travel from T-1 to 0
  RecurrenceCut cut;
};

template <typename S>
struct RecurrenceForward {
  RecurrenceInput<S> in;
  const float* projected;  // [T, B, 4H]: x W_ih^T
  const float* bias;       // [4H] or null
  const S* h0;             // [B, H]
  S* y;                    // [T, B, H], zero past a sample's end
  S* h_n;                  // [B, H]
  float* c_n;              // [B, H]
  S* gates;                // [T, B, 4H] after their nonlinearity, or null; unset past the end
  float* cells;            // [T, B, H], c_t, or null; unset past the end
};

template <typename S>
struct RecurrenceBackward {
  RecurrenceInput<S> in;
  const S* gates;      // of the forward
  const float* cells;  // of the forward
  const S* dy;         // [T, B, H] or null: zero
  const S* dh_n;       // [B, H] or null
  const float* dc_n;   // [B, H] or null
  const bool* detach;  // null, or true at (t, sample) where the gradient into h_{t-1} is cut
  int64_t detach_stride_t, detach_stride_b;  // stride_b is 0 for a mask shared by the batch
  S* dgates;                                 // [T, B, 4H], zero past a sample's end
  float* dh0;                                // [B, H]
  float* dc0;                                // [B, H]
};

}  // namespace throughtime
