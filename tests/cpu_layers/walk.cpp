// recurrence/cpu/: a walk through time with a cell that the package does not have, tanh_cell.h, and
// with operands of 16 bits.
#include <cstdlib>
#include <thread>

#include "bfloat16.h"
#include "export.h"
#include "recurrence/cpu/backward.h"
#include "recurrence/cpu/forward.h"
#include "tanh_cell.h"

using namespace throughtime;

namespace {

Runtime runtime(int threads) {
  Runtime made{};
  made.threads = threads;
  made.parallel = [](int workers, void (*body)(void*, int, int), void* context) {
    std::thread other(body, context, workers / 2, workers);
    if (workers > 1) body(context, 0, workers / 2);
    other.join();
  };
  made.acquire = [](size_t bytes) { return std::aligned_alloc(64, bytes); };
  made.release = std::free;
  return made;
}

// sizes: T, B, I, H, reverse, threads, columns of the mask: 1 or B.
template <typename S>
WalkInput<S> input(const int64_t* sizes, const int64_t* lengths, const int64_t* order, const S* x,
                   const S* h0, const S* weight_ih, const S* weight_hh, const S* bias) {
  WalkInput<S> in{};
  in.shape = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[3]};
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

template <typename S>
int64_t saved_size(const S*, const int64_t* sizes) {
  return saved_activations({sizes[0], sizes[1], sizes[2], sizes[3], sizes[3]}, TanhCell<S>::kSaved);
}

template <typename S, typename Operand = S>
void forward(const int64_t* sizes, const int64_t* lengths, const int64_t* order, const S* x,
             const S* h0, const S* weight_ih, const S* weight_hh, const S* bias, S* y, S* h_n,
             S* saved) {
  WalkForward<S> args{};
  args.in = input(sizes, lengths, order, x, h0, weight_ih, weight_hh, bias);
  args.y = y;
  args.h_n = h_n;
  args.saved = saved;
  const Runtime threads = runtime(static_cast<int>(sizes[5]));
  ForwardWalk<TanhCell<S>, Operand>(args, threads).run(threads);
}

template <typename S, typename Operand = S>
void backward(const int64_t* sizes, const int64_t* lengths, const int64_t* order, const S* x,
              const S* h0, const S* weight_ih, const S* weight_hh, const S* bias, const S* y,
              const S* saved, const bool* detach, const S* dy, const S* dh_n, S* dx, S* dh0,
              S* dweight_ih, S* dweight_hh, S* dbias) {
  WalkBackward<S> args{};
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
  const Runtime threads = runtime(static_cast<int>(sizes[5]));
  BackwardWalk<TanhCell<S>, Operand>(args, threads).run(threads);
}

}  // namespace

EXPORT(saved_size)
EXPORT(forward)
EXPORT(backward)
EXPORT_AS(forward_narrow_f32, forward<float, BFloat16>)
EXPORT_AS(backward_narrow_f32, backward<float, BFloat16>)
