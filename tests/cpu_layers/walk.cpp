// recurrence/cpu/: a walk through time with a cell that the package does not have, tanh_cell.h, and
// with operands of 16 bits.
#include "export.h"
#include "pointers.h"
#include "recurrence/cpu/backward.h"
#include "recurrence/cpu/forward.h"
#include "tanh_cell.h"
#include "threads.h"

using namespace throughtime;

namespace {

// sizes: T, B, I, H, reverse, threads, columns of the mask: 1 or B.
template <typename X>
WalkInput<X> input(const int64_t* sizes, Pointers& next) {
  return {.shape = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[3]},
          .batch = sizes[1],
          .x = next,
          .x_stride_t = sizes[1] * sizes[2],
          .x_stride_b = sizes[2],
          .h0 = next,
          .c0 = nullptr,
          .weight_ih = next,
          .weight_hh = next,
          .weight_hr = nullptr,
          .bias = next,
          .lengths = next,
          .order = next,
          .reset = nullptr,
          .reverse = sizes[4] != 0};
}

template <typename X>
int64_t saved_size(const X*, const int64_t* sizes) {
  return saved_activations({sizes[0], sizes[1], sizes[2], sizes[3], sizes[3]},
                           TanhCell<SumOf<X>>::kSaved);
}

template <typename X>
void forward(const int64_t* sizes, void* const* arguments) {
  Pointers next{arguments};
  const WalkForward<X> args{.in = input<X>(sizes, next),
                            .y = next,
                            .h_n = next,
                            .c_n = nullptr,
                            .saved = next,
                            .cell_only = false};
  const Runtime threads = on_threads(sizes[5]);
  ForwardWalk<TanhCell<SumOf<X>>, X>(args, threads).run(threads);
}

template <typename X>
void backward(const int64_t* sizes, void* const* arguments) {
  Pointers next{arguments};
  const WalkBackward<X> args{.in = input<X>(sizes, next),
                             .y = next,
                             .saved = next,
                             .cell_only = false,
                             .dy = next,
                             .dy_stride_t = sizes[1] * sizes[3],
                             .dy_stride_b = sizes[3],
                             .dy_same = false,
                             .dh_n = next,
                             .dc_n = nullptr,
                             .detach = next,
                             .detach_stride_t = sizes[6],
                             .detach_stride_b = sizes[6] > 1,
                             .dx = next,
                             .dh0 = next,
                             .dc0 = nullptr,
                             .dweight_ih = next,
                             .dweight_hh = next,
                             .dbias = next,
                             .dweight_hr = nullptr,
                             .beyond = nullptr};
  const Runtime threads = on_threads(sizes[5]);
  BackwardWalk<TanhCell<SumOf<X>>, X>(args, threads).run(threads);
}

}  // namespace

EXPORT(saved_size)
EXPORT(forward)
EXPORT(backward)
EXPORT_AS(saved_size_bf16, saved_size<BFloat16>)
EXPORT_AS(forward_bf16, forward<BFloat16>)
EXPORT_AS(backward_bf16, backward<BFloat16>)
