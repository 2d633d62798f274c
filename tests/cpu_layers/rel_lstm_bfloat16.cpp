// rel_lstm/cpu/bfloat16_kernels.cpp: RelLSTM with bfloat16 operands, also on a stand-in for AMX.
#include "export.h"
#include "pointers.h"
#include "rel_lstm/cpu/bfloat16_kernels.cpp"
#include "threads.h"

using namespace throughtime;

namespace {

// sizes: T, B, I, H, A, P, retained, window_size, top_k, keep_first, threads.
RelLstmShape shape_of(const int64_t* n) {
  return {n[1], n[2], n[3], n[4], {n[0], n[5], n[6], n[7], n[8]}};
}

int64_t saved_size(const BFloat16*, const int64_t* sizes) { return saved_numbers(shape_of(sizes)); }

RelLstmInput<BFloat16> input(const int64_t* sizes, Pointers& next) {
  return {.shape = shape_of(sizes),
          .x = next,
          .x_stride_t = sizes[1] * sizes[2],
          .x_stride_b = sizes[2],
          .weight_ih = next,
          .weight_hh = next,
          .weight_query = next,
          .weight_key = next,
          .weight_score = next,
          .lengths = next,
          .order = next};
}

void run_forward(const int64_t* sizes, void* const* arguments) {
  Pointers next{arguments};
  const RelLstmForward<BFloat16> pass{.in = input(sizes, next),
                                      .h0 = next,
                                      .c0 = next,
                                      .context0 = next,
                                      .bias = next,
                                      .memory = next,
                                      .relevance = next,
                                      .keep_first = sizes[9] != 0,
                                      .y = next,
                                      .h_n = next,
                                      .c_n = next,
                                      .context_n = next,
                                      .last = next,
                                      .memory_index = next,
                                      .memory_relevance = next,
                                      .saved = next};
  TT_KERNELS(rel_lstm_bfloat16).forward(pass, on_threads(sizes[10]));
}

void run_backward(const int64_t* sizes, void* const* arguments) {
  Pointers next{arguments};
  const RelLstmBackward<BFloat16> pass{.in = input(sizes, next),
                                       .c0 = next,
                                       .last = next,
                                       .saved = next,
                                       .dy = next,
                                       .dy_stride_t = sizes[1] * sizes[3],
                                       .dy_stride_b = sizes[3],
                                       .dh_n = next,
                                       .dc_n = next,
                                       .dcontext_n = next,
                                       .detach = next,
                                       .detach_stride_t = sizes[1],
                                       .detach_stride_b = 1,
                                       .dx = next,
                                       .dh0 = next,
                                       .dc0 = next,
                                       .dcontext0 = next,
                                       .dmemory = next,
                                       .dweight_ih = next,
                                       .dweight_hh = next,
                                       .dbias = next,
                                       .dweight_query = next,
                                       .dweight_key = next,
                                       .dweight_score = next};
  TT_KERNELS(rel_lstm_bfloat16).backward(pass, on_threads(sizes[10]));
}

}  // namespace

EXPORT_AS(saved_size_bf16, saved_size)
EXPORT_AS(forward_bf16, run_forward)
EXPORT_AS(backward_bf16, run_backward)
