// recurrence/cpu/: a walk through time with a cell that the package does not have, tanh_cell.h, and
// with operands of 16 bits.
#include "export.h"
#include "recurrence/cpu/backward.h"
#include "recurrence/cpu/forward.h"
#include "tanh_cell.h"
#include "threads.h"

using namespace throughtime;

namespace {

// sizes: T, B, I, H, reverse, threads, columns of the mask: 1 or B.
template <typename X, typename S = SumOf<X>>
WalkInput<X> input(const int64_t* sizes, const int64_t* lengths, const int64_t* order, const X* x,
                   const X* h0, const S* weight_ih, const S* weight_hh, const S* bias) {
  WalkInput<X> in{};
  in.shape = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[3]};
  in.batch = sizes[1];
  in.x = x;
  in.x_stride_t = sizes[1] * sizes[2];
  in.x_stride_b = sizes[2];
  in.h0 = h0;
  in.weight_ih = weight_ih;
  in.weight_hh = weight_hh;
  in.bias = bias;
  in.lengths = lengths;
  in.order = order;
  in.reverse = sizes[4] != 0;
  return in;
}

template <typename X>
int64_t saved_size(const X*, const int64_t* sizes) {
  return saved_activations({sizes[0], sizes[1], sizes[2], sizes[3], sizes[3]},
                           TanhCell<SumOf<X>>::kSaved);
}

template <typename X, typename S = SumOf<X>>
void forward(const int64_t* sizes, const int64_t* lengths, const int64_t* order, const X* x,
             const X* h0, const S* weight_ih, const S* weight_hh, const S* bias, X* y, S* h_n,
             S* saved) {
  WalkForward<X> args{};
  args.in = input(sizes, lengths, order, x, h0, weight_ih, weight_hh, bias);
  args.y = y;
  args.h_n = h_n;
  args.saved = saved;
  const Runtime threads = on_threads(sizes[5]);
  ForwardWalk<TanhCell<S>, X>(args, threads).run(threads);
}

template <typename X, typename S = SumOf<X>>
void backward(const int64_t* sizes, const int64_t* lengths, const int64_t* order, const X* x,
              const X* h0, const S* weight_ih, const S* weight_hh, const S* bias, const X* y,
              const S* saved, const bool* detach, const X* dy, const S* dh_n, X* dx, S* dh0,
              S* dweight_ih, S* dweight_hh, S* dbias) {
  WalkBackward<X> args{};
  args.in = input(sizes, lengths, order, x, h0, weight_ih, weight_hh, bias);
  args.y = y;
  args.saved = saved;
  args.dy = dy;
  args.dy_stride_t = sizes[1] * sizes[3];
  args.dy_stride_b = sizes[3];
  args.dh_n = dh_n;
  args.detach = detach;
  args.detach_stride_t = sizes[6];
  args.detach_stride_b = sizes[6] > 1;
  args.dx = dx;
  args.dh0 = dh0;
  args.dweight_ih = dweight_ih;
  args.dweight_hh = dweight_hh;
  args.dbias = dbias;
  const Runtime threads = on_threads(sizes[5]);
  BackwardWalk<TanhCell<S>, X>(args, threads).run(threads);
}

}  // namespace

EXPORT(saved_size)
EXPORT(forward)
EXPORT(backward)
EXPORT_AS(saved_size_bf16, saved_size<BFloat16>)
EXPORT_AS(forward_bf16, forward<BFloat16>)
EXPORT_AS(backward_bf16, backward<BFloat16>)
