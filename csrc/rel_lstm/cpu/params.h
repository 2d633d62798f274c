// The arguments of the CPU RelLSTM kernels: one layer.
//
//   s_t = (h_{t-1} + o_{t-1}) / 2,   o_{-1} = context_0
//   gates_t = W_ih x_t + b + W_hh s_t;   c_t, h_t as in an LSTM, gate rows i, f, g, o
//   o_t = attention of the query V_a s_t over keys U_a h_j and values h_j, j <= t, with the score
//         w . tanh(V_a s_t + U_a h_j), over the candidates of relevancy screening
//
// Shapes: T time steps, B samples, I inputs, H units, A attention units. Positions: see
// relevancy/cpu/params.h; those of an earlier call hold its hidden states (`memory`).
//
// Rows j of the kernels are samples order[j], ordered by falling length, as in the LSTM.
#pragma once

#include <cstdint>

#include "common/inline.h"
#include "common/scalars.h"
#include "common/sizes.h"
#include "recurrence/cpu/trace.h"
#include "relevancy/cpu/params.h"

namespace throughtime {

// Units are padded to a multiple of this in what is saved, whatever the instruction set.
constexpr int64_t kRelLstmUnits = 16;

struct RelLstmShape {
  int64_t B, I, H, A;
  ScreeningShape screening;

  TT_INLINE int64_t T() const { return screening.T; }
  TT_INLINE int64_t units() const { return round_up(H, kRelLstmUnits); }
  TT_INLINE int64_t attention_units() const { return round_up(A, kRelLstmUnits); }
  // h_j, and what the score makes of U_a h_j (relevancy/cpu/scores.h)
  TT_INLINE int64_t key_numbers() const { return units() + attention_units() + kRelLstmUnits; }
  TT_INLINE int64_t step_numbers() const { return 6 * units() + attention_units(); }
};

// What the forward pass leaves for the backward pass, per row in padded units:
//   keys   [P + T][B]: h_j, the score's key made of U_a h_j
//   steps  [T][B]: i, f, g, o, c, s, V_a s
TT_INLINE int64_t saved_numbers(const RelLstmShape& s) {
  return times(s.B,
               times(s.screening.positions(), s.key_numbers()) + times(s.T(), s.step_numbers()));
}

// X is the type of what has T steps: x, y and their gradients. All else has the type of the sums.
template <typename X>
struct RelLstmInput {
  using S = SumOf<X>;

  RelLstmShape shape;
  const X* x;  // [T, B, I], contiguous inputs
  int64_t x_stride_t, x_stride_b;
  const S* weight_ih;      // [4H, I]
  const S* weight_hh;      // [4H, H]
  const S* weight_query;   // [A, H]
  const S* weight_key;     // [A, H]
  const S* weight_score;   // [A]
  const int64_t* lengths;  // falling, one per row, or null
  const int64_t* order;    // sample of each row

  TT_INLINE int64_t length(int64_t row) const { return lengths ? lengths[row] : shape.T(); }
};

template <typename X>
struct RelLstmForward {
  using S = SumOf<X>;

  RelLstmInput<X> in;
  const S* h0;  // [B, H], as the next two
  const S* c0;
  const S* context0;
  const S* bias;       // [4H] or null
  const S* memory;     // [P, B, H] or null
  const S* relevance;  // [P, B] or null
  bool keep_first;
  X* y;  // [T, B, H]
  S* h_n;
  S* c_n;
  S* context_n;
  int64_t* last;          // [P + T, B]
  int64_t* memory_index;  // [memory_after, B]
  S* memory_relevance;    // the same
  S* saved;               // saved_numbers, or null
};

template <typename X>
struct RelLstmBackward {
  using S = SumOf<X>;

  RelLstmInput<X> in;
  const S* c0;          // [B, H]
  const int64_t* last;  // [P + T, B]
  const S* saved;
  const X* dy;  // [T, B, H] or null, contiguous units
  int64_t dy_stride_t, dy_stride_b;
  const S* dh_n;  // [B, H] or null, as the next two
  const S* dc_n;
  const S* dcontext_n;
  const bool* detach;  // null, or true at (t, sample) where h_{t-1} is detached
  int64_t detach_stride_t, detach_stride_b;  // stride_b is 0 for a mask shared by the batch
  X* dx;                                     // [T, B, I] or null
  S* dh0;                                    // [B, H], as the next two
  S* dc0;
  S* dcontext0;
  S* dmemory;        // [P, B, H]
  S* dweight_ih;     // [4H, I] or null, together with those below
  S* dweight_hh;     // [4H, H]
  S* dbias;          // [4H]
  S* dweight_query;  // [A, H]
  S* dweight_key;    // [A, H]
  S* dweight_score;  // [A]
  Trace<S> trace{};  // [traced_steps, B, H] each

  TT_INLINE bool detaches(int64_t t, int64_t row) const {
    return detach && detach[t * detach_stride_t + in.order[row] * detach_stride_b];
  }
};

}  // namespace throughtime
