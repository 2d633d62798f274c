// rel_lstm/cpu/bfloat16_kernels.cpp: RelLSTM with bfloat16 operands, also on a stand-in for AMX.
#include "export.h"
#include "rel_lstm/cpu/bfloat16_kernels.cpp"
#include "threads.h"

using namespace throughtime;

namespace {

// sizes: T, B, I, H, A, P, retained, window_size, top_k, keep_first, threads.
RelLstmShape shape_of(const int64_t* n) {
  return {n[1], n[2], n[3], n[4], {n[0], n[5], n[6], n[7], n[8]}};
}

int64_t saved_size(const BFloat16*, const int64_t* sizes) { return saved_numbers(shape_of(sizes)); }

// weights: W_ih, W_hh, V_a, U_a, w.
RelLstmInput<BFloat16> input(const int64_t* sizes, const int64_t* lengths, const int64_t* order,
                             const BFloat16* x, const float* const* weights) {
  return {.shape = shape_of(sizes),
          .x = x,
          .x_stride_t = sizes[1] * sizes[2],
          .x_stride_b = sizes[2],
          .weight_ih = weights[0],
          .weight_hh = weights[1],
          .weight_query = weights[2],
          .weight_key = weights[3],
          .weight_score = weights[4],
          .lengths = lengths,
          .order = order};
}

void run_forward(const int64_t* sizes, const int64_t* lengths, const int64_t* order,
                 const BFloat16* x, const float* weight_ih, const float* weight_hh,
                 const float* weight_query, const float* weight_key, const float* weight_score,
                 const float* bias, const float* h0, const float* c0, const float* context0,
                 const float* memory, const float* relevance, BFloat16* y, float* h_n, float* c_n,
                 float* context_n, int64_t* last, int64_t* memory_index, float* memory_relevance,
                 float* saved) {
  const float* const weights[] = {weight_ih, weight_hh, weight_query, weight_key, weight_score};
  const RelLstmForward<BFloat16> pass{.in = input(sizes, lengths, order, x, weights),
                                      .h0 = h0,
                                      .c0 = c0,
                                      .context0 = context0,
                                      .bias = bias,
                                      .memory = memory,
                                      .relevance = relevance,
                                      .keep_first = sizes[9] != 0,
                                      .y = y,
                                      .h_n = h_n,
                                      .c_n = c_n,
                                      .context_n = context_n,
                                      .last = last,
                                      .memory_index = memory_index,
                                      .memory_relevance = memory_relevance,
                                      .saved = saved};
  TT_KERNELS(rel_lstm_bfloat16).forward(pass, on_threads(sizes[10]));
}

void run_backward(const int64_t* sizes, const int64_t* lengths, const int64_t* order,
                  const BFloat16* x, const float* weight_ih, const float* weight_hh,
                  const float* weight_query, const float* weight_key, const float* weight_score,
                  const float* c0, const int64_t* last, const float* saved, const bool* detach,
                  const BFloat16* dy, const float* dh_n, const float* dc_n, const float* dcontext_n,
                  BFloat16* dx, float* dh0, float* dc0, float* dcontext0, float* dmemory,
                  float* dweight_ih, float* dweight_hh, float* dbias, float* dweight_query,
                  float* dweight_key, float* dweight_score) {
  const float* const weights[] = {weight_ih, weight_hh, weight_query, weight_key, weight_score};
  const RelLstmBackward<BFloat16> pass{.in = input(sizes, lengths, order, x, weights),
                                       .c0 = c0,
                                       .last = last,
                                       .saved = saved,
                                       .dy = dy,
                                       .dy_stride_t = sizes[1] * sizes[3],
                                       .dy_stride_b = sizes[3],
                                       .dh_n = dh_n,
                                       .dc_n = dc_n,
                                       .dcontext_n = dcontext_n,
                                       .detach = detach,
                                       .detach_stride_t = sizes[1],
                                       .detach_stride_b = 1,
                                       .dx = dx,
                                       .dh0 = dh0,
                                       .dc0 = dc0,
                                       .dcontext0 = dcontext0,
                                       .dmemory = dmemory,
                                       .dweight_ih = dweight_ih,
                                       .dweight_hh = dweight_hh,
                                       .dbias = dbias,
                                       .dweight_query = dweight_query,
                                       .dweight_key = dweight_key,
                                       .dweight_score = dweight_score};
  TT_KERNELS(rel_lstm_bfloat16).backward(pass, on_threads(sizes[10]));
}

}  // namespace

EXPORT_AS(saved_size_bf16, saved_size)
EXPORT_AS(forward_bf16, run_forward)
EXPORT_AS(backward_bf16, run_backward)
