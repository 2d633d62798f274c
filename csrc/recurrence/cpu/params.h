// The arguments of a walk through time on the CPU: one layer, one direction, any cell.
//
// Shapes: T time steps, B samples, I inputs, H units, R outputs: H, or fewer with a projection of
// the cell's output, G gates. Gate rows in PyTorch's order.
// "Travel" is the order of the steps: t = 0 .. T-1, or T-1 .. 0 when `reverse`.
// Row j of the kernels is sample order[j]; samples are ordered by falling length, so that the rows
// which are inside their sequence at time t are always the first ones.
// X is the type of what has T steps: x, y and their gradients. All else has the type of the sums.
#pragma once

#include <cstdint>

#include "common/inline.h"
#include "common/scalars.h"
#include "common/sizes.h"
#include "recurrence/cpu/trace.h"

namespace throughtime {

struct WalkShape {
  int64_t T, B, I, H, R;
};

template <typename X>
struct WalkInput {
  using S = SumOf<X>;

  WalkShape shape;  // B: the rows that are walked
  int64_t batch;    // samples in memory: B of the tensors
  const X* x;       // [T, B, I], the last dimension contiguous
  int64_t x_stride_t, x_stride_b;
  const X* h0;             // [B, R]
  const S* c0;             // [B, H], of a cell that carries c
  const S* weight_ih;      // [G H, I]
  const S* weight_hh;      // [G H, R]
  const S* weight_hr;      // [R, H] or null: no projection, R = H
  const S* bias;           // [G H] or null
  const int64_t* lengths;  // by row, falling; or null: every sample has T steps
  const int64_t* order;    // the sample of each row
  const bool* reset;       // [T, B] or null: before step t the state starts anew
  bool reverse;
  // [T, B, R], [T, B, H], the last dimension contiguous: the state that a reset starts from; both may
  // be null, for zeros.
  const X* reset_h = nullptr;
  const S* reset_c = nullptr;
  int64_t reset_h_stride_t = 0, reset_h_stride_b = 0, reset_c_stride_t = 0, reset_c_stride_b = 0;

  TT_INLINE int64_t time(int64_t step) const { return reverse ? shape.T - 1 - step : step; }
  TT_INLINE int64_t length(int64_t row) const { return lengths ? lengths[row] : shape.T; }
  TT_INLINE int64_t first_time(int64_t row) const { return reverse ? length(row) - 1 : 0; }
  TT_INLINE int64_t last_time(int64_t row) const { return reverse ? 0 : length(row) - 1; }
  TT_INLINE bool resets(int64_t t, int64_t row) const {
    return reset && reset[t * batch + order[row]];
  }
  TT_INLINE const X* reset_h_at(int64_t t, int64_t row) const {
    return reset_h ? reset_h + t * reset_h_stride_t + order[row] * reset_h_stride_b : nullptr;
  }
  TT_INLINE const S* reset_c_at(int64_t t, int64_t row) const {
    return reset_c ? reset_c + t * reset_c_stride_t + order[row] * reset_c_stride_b : nullptr;
  }
};

template <typename X>
struct WalkForward {
  using S = SumOf<X>;

  WalkInput<X> in;
  X* y;                // [T, B, R]
  S* h_n;              // [B, R]
  S* c_n;              // [B, H]
  S* saved;            // saved_activations, or null; layout private to the kernels
  bool cell_only;      // of the activations, only c is saved
  S* cells = nullptr;  // [T, B, H] or null: every c_t; not written past the end of a sample
};

template <typename X>
struct WalkBackward {
  using S = SumOf<X>;

  WalkInput<X> in;
  const X* y;      // of the forward
  const S* saved;  // of the forward
  bool cell_only;  // as in the forward; the gates are computed again
  const X* dy;     // [T, B, R], or null: zero
  int64_t dy_stride_t, dy_stride_b;
  bool dy_same;        // one value for all units (the gradient of a sum), else contiguous units
  const S* dh_n;       // [B, R] or null
  const S* dc_n;       // [B, H] or null
  const bool* detach;  // null, or true at (t, sample) where h_{t-1} is detached
  int64_t detach_stride_t, detach_stride_b;  // stride_b is 0 for a mask shared by the batch
  X* dx;                                     // [T, B, I] or null
  S* dh0;                                    // [B, R]
  S* dc0;                                    // [B, H]
  S* dweight_ih;                             // [G H, I] or null, together with those below
  S* dweight_hh;                             // [G H, R]
  S* dbias;                                  // [G H]
  S* dweight_hr;                             // [R, H], only with a projection
  bool* beyond;  // [B] or null: becomes true where a gradient is in no range that products take
  S* dreset_h = nullptr;      // [T, B, R] of zeros or null, together with the next
  S* dreset_c = nullptr;      // [T, B, H] of zeros
  const S* dcells = nullptr;  // [T, B, H] or null: what every c_t gets beside the recurrence
  Trace<S> trace{};           // [traced_steps, B, R] and [traced_steps, B, H]

  // Whether nothing wants the gradient of the h that enters a step.
  TT_INLINE bool detaches(int64_t t, int64_t row) const {
    return (detach && detach[t * detach_stride_t + in.order[row] * detach_stride_b]) ||
           (in.resets(t, row) && !dreset_h);
  }
};

// Units are padded to a multiple of this in what is saved, whatever the instruction set.
constexpr int64_t kSavedUnits = 16;

// Numbers of type S saved for the backward pass: so many per step, row and unit.
TT_INLINE int64_t saved_activations(const WalkShape& s, int per_unit) {
  return times(per_unit, s.T, s.B, round_up(s.H, kSavedUnits));
}

}  // namespace throughtime
