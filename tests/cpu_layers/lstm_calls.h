// One call of an LSTM's kernels, from plain pointers: of inputs of type X by Kernels::run.
#pragma once

#include "lstm/cpu/kernels.h"
#include "threads.h"

namespace throughtime {
namespace {

// sizes: T, B, I, H, R, reverse, threads, cell_only, and what else Kernels take.
TT_INLINE LstmShape shape_of(const int64_t* sizes) {
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
}

template <typename X>
int64_t saved_size(const X*, const int64_t* sizes) {
  return saved_activations<X>(shape_of(sizes), sizes[7] != 0);
}

template <typename X>
LstmInput<X> input(const int64_t* sizes, const int64_t* lengths, const int64_t* order,
                   const bool* reset, const X* x, const X* h0, const float* c0,
                   const float* weight_ih, const float* weight_hh, const float* weight_hr,
                   const float* bias) {
  return {.shape = shape_of(sizes),
          .batch = sizes[1],
          .x = x,
          .x_stride_t = sizes[1] * sizes[2],
          .x_stride_b = sizes[2],
          .h0 = h0,
          .c0 = c0,
          .weight_ih = weight_ih,
          .weight_hh = weight_hh,
          .weight_hr = weight_hr,
          .bias = bias,
          .lengths = lengths,
          .order = order,
          .reset = reset,
          .reverse = sizes[5] != 0};
}

template <typename X, typename Kernels>
void run_forward(const int64_t* sizes, const int64_t* lengths, const int64_t* order,
                 const bool* reset, const X* x, const X* h0, const float* c0,
                 const float* weight_ih, const float* weight_hh, const float* weight_hr,
                 const float* bias, X* y, float* h_n, float* c_n, float* saved, float* cells) {
  const LstmInput<X> in =
      input(sizes, lengths, order, reset, x, h0, c0, weight_ih, weight_hh, weight_hr, bias);
  const LstmForward<X> pass{in, y, h_n, c_n, saved, sizes[7] != 0, cells};
  Kernels::run(pass, sizes, on_threads(sizes[6]));
}

template <typename X, typename Kernels>
void run_backward(const int64_t* sizes, const int64_t* lengths, const int64_t* order,
                  const bool* reset, const X* x, const X* h0, const float* c0,
                  const float* weight_ih, const float* weight_hh, const float* weight_hr,
                  const float* bias, const X* y, const float* saved, const bool* detach,
                  const X* dy, const float* dh_n, const float* dc_n, X* dx, float* dh0, float* dc0,
                  float* dweight_ih, float* dweight_hh, float* dweight_hr, float* dbias,
                  float* trace_h, float* trace_c) {
  const LstmInput<X> in =
      input(sizes, lengths, order, reset, x, h0, c0, weight_ih, weight_hh, weight_hr, bias);
  const LstmBackward<X> pass{.in = in,
                             .y = y,
                             .saved = saved,
                             .cell_only = sizes[7] != 0,
                             .dy = dy,
                             .dy_stride_t = sizes[1] * sizes[4],
                             .dy_stride_b = sizes[4],
                             .dy_same = false,
                             .dh_n = dh_n,
                             .dc_n = dc_n,
                             .detach = detach,
                             .detach_stride_t = sizes[1],
                             .detach_stride_b = 1,
                             .dx = dx,
                             .dh0 = dh0,
                             .dc0 = dc0,
                             .dweight_ih = dweight_ih,
                             .dweight_hh = dweight_hh,
                             .dbias = dbias,
                             .dweight_hr = dweight_hr,
                             .beyond = nullptr,
                             .trace = {trace_h, trace_c}};
  Kernels::run(pass, sizes, on_threads(sizes[6]));
}

}  // namespace
}  // namespace throughtime
