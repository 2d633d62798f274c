// lstm/cpu/bfloat16_kernels.cpp: the LSTM with bfloat16 operands, also on a stand-in for AMX.
#include "export.h"
#include "lstm/cpu/bfloat16_kernels.cpp"
#include "threads.h"

using namespace throughtime;

namespace {

// sizes: T, B, I, H, R, reverse, threads, cell_only.
LstmInput<BFloat16> input(const int64_t* sizes, const int64_t* lengths, const int64_t* order,
                          const bool* reset, const BFloat16* x, const BFloat16* h0, const float* c0,
                          const float* weight_ih, const float* weight_hh, const float* weight_hr,
                          const float* bias) {
  return {.shape = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]},
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

int64_t saved_size(const BFloat16*, const int64_t* sizes) {
  return saved_activations<BFloat16>({sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]},
                                     sizes[7] != 0);
}

void run_forward(const int64_t* sizes, const int64_t* lengths, const int64_t* order,
                 const bool* reset, const BFloat16* x, const BFloat16* h0, const float* c0,
                 const float* weight_ih, const float* weight_hh, const float* weight_hr,
                 const float* bias, BFloat16* y, float* h_n, float* c_n, float* saved) {
  const LstmInput<BFloat16> in =
      input(sizes, lengths, order, reset, x, h0, c0, weight_ih, weight_hh, weight_hr, bias);
  TT_KERNELS(lstm_bfloat16).forward({in, y, h_n, c_n, saved, sizes[7] != 0}, on_threads(sizes[6]));
}

void run_backward(const int64_t* sizes, const int64_t* lengths, const int64_t* order,
                  const bool* reset, const BFloat16* x, const BFloat16* h0, const float* c0,
                  const float* weight_ih, const float* weight_hh, const float* weight_hr,
                  const float* bias, const BFloat16* y, const float* saved, const bool* detach,
                  const BFloat16* dy, const float* dh_n, const float* dc_n, BFloat16* dx,
                  float* dh0, float* dc0, float* dweight_ih, float* dweight_hh, float* dweight_hr,
                  float* dbias) {
  const LstmInput<BFloat16> in =
      input(sizes, lengths, order, reset, x, h0, c0, weight_ih, weight_hh, weight_hr, bias);
  TT_KERNELS(lstm_bfloat16)
      .backward({.in = in,
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
                 .dweight_hr = dweight_hr},
                on_threads(sizes[6]));
}

}  // namespace

EXPORT_AS(saved_size_bf16, saved_size)
EXPORT_AS(forward_bf16, run_forward)
EXPORT_AS(backward_bf16, run_backward)
