// One call of a walk's kernels, from a list of addresses: of inputs of type X by Kernels::run.
#pragma once

#include "pointers.h"
#include "recurrence/cpu/params.h"
#include "threads.h"

namespace throughtime {
namespace {

// sizes: T, B, I, H, R, reverse, threads, cell_only, columns of the mask (1 or B), and what else Kernels
// take.
TT_INLINE WalkShape shape_of(const int64_t* sizes) {
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
}

template <typename X>
WalkInput<X> input(const int64_t* sizes, Pointers& next) {
  return {.shape = shape_of(sizes),
          .batch = sizes[1],
          .x = next,
          .x_stride_t = sizes[1] * sizes[2],
          .x_stride_b = sizes[2],
          .h0 = next,
          .c0 = next,
          .weight_ih = next,
          .weight_hh = next,
          .weight_hr = next,
          .bias = next,
          .lengths = next,
          .order = next,
          .reset = next,
          .reverse = sizes[5] != 0};
}

template <typename X, typename Kernels>
void run_forward(const int64_t* sizes, void* const* arguments) {
  Pointers next{arguments};
  const WalkForward<X> pass{.in = input<X>(sizes, next),
                            .y = next,
                            .h_n = next,
                            .c_n = next,
                            .saved = next,
                            .cell_only = sizes[7] != 0,
                            .cells = next};
  Kernels::run(pass, sizes, on_threads(sizes[6]));
}

template <typename X, typename Kernels>
void run_backward(const int64_t* sizes, void* const* arguments) {
  Pointers next{arguments};
  const WalkBackward<X> pass{.in = input<X>(sizes, next),
                             .y = next,
                             .saved = next,
                             .cell_only = sizes[7] != 0,
                             .dy = next,
                             .dy_stride_t = sizes[1] * sizes[4],
                             .dy_stride_b = sizes[4],
                             .dy_same = false,
                             .dh_n = next,
                             .dc_n = next,
                             .detach = next,
                             .detach_stride_t = sizes[8],
                             .detach_stride_b = sizes[8] > 1,
                             .dx = next,
                             .dh0 = next,
                             .dc0 = next,
                             .dweight_ih = next,
                             .dweight_hh = next,
                             .dbias = next,
                             .dweight_hr = next,
                             .beyond = nullptr,
                             .trace = {next, next}};
  Kernels::run(pass, sizes, on_threads(sizes[6]));
}

}  // namespace
}  // namespace throughtime
