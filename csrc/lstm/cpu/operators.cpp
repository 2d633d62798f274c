// throughtime::lstm_forward and lstm_backward on the CPU: check, lay out, run. lstm_cells_* give every
// c_t too and take its gradient, and lstm_backward_trace also gives the gradients of h_t and c_t of every
// n-th step.
//
// What the arguments mean: python/throughtime/ops/lstm/arguments.py.
#include <tuple>

#include "common/cpu/call.h"
#include "common/cpu/isa.h"
#include "common/cpu/precision.h"
#include "common/cpu/row_order.h"
#include "common/operator.h"
#include "lstm/cpu/float32.h"
#include "lstm/cpu/kernels.h"
#include "recurrence/cpu/trace_tensors.h"

namespace throughtime {

TT_KERNEL_TABLES(LstmKernels, lstm)
TT_BFLOAT16_TABLES(LstmBFloat16Kernels, lstm_bfloat16)
TT_MATRIX_TABLES(LstmSplitKernels, lstm_split)

int float32_parts(const LstmShape& shape) {
  return lstm_split_kernels() && fits_matrix_unit(shape) ? float32_parts_asked() : 0;
}

namespace {

struct LstmArguments {
  Tensor input, h_0, c_0, weight_ih, weight_hh;
  Maybe bias_ih, bias_hh, weight_hr, lengths, reset, reset_h, reset_c, detach_mask;
  bool reverse, recompute;
};

struct ForwardCall {
  LstmArguments args;
  bool save;
};

struct BackwardInputs {
  LstmArguments args;
  Tensor output, saved;
  bool need_input, need_weights, need_reset;
};

struct BackwardCall {
  Maybe grad_output, grad_h_n, grad_c_n;
  BackwardInputs of;
};

struct CellsBackwardCall {
  Maybe grad_output, grad_h_n, grad_c_n, grad_cells;
  BackwardInputs of;
};

struct TraceCall {
  CellsBackwardCall gradients;
  int64_t trace_every;
};

// Sizes of a call whose arguments fit.
LstmShape checked(const LstmArguments& a) {
  check_dims("input", a.input, "[T, B, I]");
  check_dims("weight_hh", a.weight_hh, "[4H, H or P]");
  const int64_t H = a.weight_hh.size(0) / 4, R = a.weight_hr ? a.weight_hh.size(1) : H;
  const LstmShape s{a.input.size(0), a.input.size(1), a.input.size(2), H, R};
  check_dtype("input", a.input, lstm_bfloat16_kernels());
  TT_CHECK(s.T > 0, "Expected sequence length to be larger than 0 in RNN");
  TT_CHECK_CALL(H > 0 && R > 0, "weight_hh should be [4H, H or P] of at least one unit");
  const ScalarType dtype = a.input.scalar_type(), weights = weight_dtype(a.input, a.weight_ih);
  check_argument("input", a.input, {s.T, s.B, s.I}, dtype);
  check_argument("h_0", a.h_0, {s.B, R}, dtype);
  check_argument("c_0", a.c_0, {s.B, H}, dtype);
  check_argument("weight_ih", a.weight_ih, {4 * H, s.I}, weights);
  check_argument("weight_hh", a.weight_hh, {4 * H, R}, weights);
  check_argument("weight_hr", a.weight_hr, {R, H}, weights);
  check_argument("bias_ih", a.bias_ih, {4 * H}, weights);
  check_argument("bias_hh", a.bias_hh, {4 * H}, weights);
  check_argument("reset", a.reset, {s.T, s.B}, ScalarType::Bool);
  check_argument("reset_h", a.reset_h, {s.T, s.B, R}, dtype);
  check_argument("reset_c", a.reset_c, {s.T, s.B, H}, dtype);
  TT_CHECK_CALL(a.reset_h.has_value() == a.reset_c.has_value(),
                "reset_h and reset_c should be given together");
  check_argument("detach_mask", a.detach_mask, {s.T, s.B}, ScalarType::Bool);
  return s;
}

// The tensors that both passes take, dense and as the kernels want them. All are checked before any
// is copied: one of another shape may be as large as `expand` makes it.
class Layer {
 public:
  explicit Layer(const LstmArguments& args)
      : shape(checked(args)),
        dtype(args.input.scalar_type()),
        sums(sums_of(dtype)),
        weights(weight_dtype(args.input, args.weight_ih)),
        args_(args),
        rows_(args.lengths, shape.B, shape.T) {}

  void lay_out() {
    if (args_.input.stride(2) != 1) args_.input = dense(args_.input);
    args_.h_0 = dense(args_.h_0);
    for (Tensor* x : {&args_.c_0, &args_.weight_ih, &args_.weight_hh}) *x = converted(*x, sums);
    bias_ = sum_of(converted(args_.bias_ih, sums), converted(args_.bias_hh, sums));
    args_.weight_hr = Maybe(converted(args_.weight_hr, sums));
    args_.reset = Maybe(dense(args_.reset));
    if (!args_.reset_h) return;
    if (dtype != sums) args_.reset_c = Maybe(converted(args_.reset_c, sums));
    for (Maybe* x : {&args_.reset_h, &args_.reset_c})
      if ((*x)->stride(2) != 1) *x = Maybe(dense(*x));
  }

  template <typename X>
  LstmInput<X> as() const {
    using S = SumOf<X>;
    return {.shape = shape,
            .batch = shape.B,
            .x = data<X>(args_.input),
            .x_stride_t = args_.input.stride(0),
            .x_stride_b = args_.input.stride(1),
            .h0 = data<X>(args_.h_0),
            .c0 = data<S>(args_.c_0),
            .weight_ih = data<S>(args_.weight_ih),
            .weight_hh = data<S>(args_.weight_hh),
            .weight_hr = data<S>(args_.weight_hr),
            .bias = data<S>(bias_),
            .lengths = rows_.lengths(),
            .order = rows_.order(),
            .reset = data<bool>(args_.reset),
            .reverse = args_.reverse,
            .reset_h = data<X>(args_.reset_h),
            .reset_c = data<S>(args_.reset_c),
            .reset_h_stride_t = stride(args_.reset_h, 0),
            .reset_h_stride_b = stride(args_.reset_h, 1),
            .reset_c_stride_t = stride(args_.reset_c, 0),
            .reset_c_stride_b = stride(args_.reset_c, 1)};
  }

  const LstmShape shape;
  const ScalarType dtype, sums, weights;

 private:
  static int64_t stride(const OptionalTensor& x, int64_t dim) { return x ? x->stride(dim) : 0; }

  LstmArguments args_;
  OptionalTensor bias_;
  RowOrder rows_;
};

void run(const LstmForward<double>& pass, const Runtime& runtime) {
  lstm_kernels().forward(pass, runtime);
}
void run(const LstmBackward<double>& pass, const Runtime& runtime) {
  lstm_kernels().backward(pass, runtime);
}
void run(const LstmForward<float>& pass, const Runtime& runtime) {
  const int parts = float32_parts(pass.in.shape);
  if (!parts) return lstm_kernels().forward(pass, runtime);
  run_split(*lstm_split_kernels(), lstm_kernels(), parts, pass, runtime);
}
void run(const LstmBackward<float>& pass, const Runtime& runtime) {
  const int parts = float32_parts(pass.in.shape);
  if (!parts) return lstm_kernels().backward(pass, runtime);
  run_split(*lstm_split_kernels(), lstm_kernels(), parts, pass, runtime);
}
void run(const LstmForward<BFloat16>& pass, const Runtime& runtime) {
  lstm_bfloat16_kernels()->forward(pass, runtime);
}
void run(const LstmBackward<BFloat16>& pass, const Runtime& runtime) {
  lstm_bfloat16_kernels()->backward(pass, runtime);
}

// Numbers of `dtype` that `saved` consists of.
int64_t saved_size(const LstmShape& s, ScalarType dtype, bool cell_only) {
  return dtype == ScalarType::BFloat16 ? 2 * saved_numbers<BFloat16>(s, cell_only)
                                       : saved_numbers<float>(s, cell_only);
}

// An uninitialised result, empty if it is not wanted.
Tensor make(std::initializer_list<int64_t> sizes, ScalarType dtype, bool wanted = true) {
  return wanted ? pooled(sizes, dtype) : pooled({0}, dtype);
}

Operator forward_operator("lstm_forward"), backward_operator("lstm_backward"),
    cells_forward_operator("lstm_cells_forward"), cells_backward_operator("lstm_cells_backward"),
    trace_operator("lstm_backward_trace");

// `cells` becomes every c_t if it is not null.
std::tuple<Tensor, Tensor, Tensor, Tensor> run_forward(Operator& op, ForwardCall& call,
                                                       Tensor* cells) {
  Call operation(op);
  Layer layer(call.args);
  layer.lay_out();
  const LstmShape& s = layer.shape;
  const bool recompute = call.args.recompute;
  operation.checked();
  const Tensor output = make({s.T, s.B, s.R}, layer.dtype), h_n = make({s.B, s.R}, layer.sums),
               c_n = make({s.B, s.H}, layer.sums),
               saved = make({saved_size(s, layer.dtype, recompute)}, layer.dtype, call.save);
  if (cells) *cells = make({s.T, s.B, s.H}, layer.sums);
  operation.allocated();
  if (cells && call.args.lengths) fill_zero(*cells);
  with_number(layer.dtype, [&](auto zero) {
    using X = decltype(zero);
    using S = SumOf<X>;
    const LstmForward<X> pass{.in = layer.as<X>(),
                              .y = mutable_data<X>(output),
                              .h_n = mutable_data<S>(h_n),
                              .c_n = mutable_data<S>(c_n),
                              .saved = call.save ? mutable_data<S>(saved) : nullptr,
                              .cell_only = recompute,
                              .cells = cells ? mutable_data<S>(*cells) : nullptr};
    if (call.save) pass.saved[saved_activations<X>(s, recompute)] = static_cast<S>(isa().mark);
    if (s.B > 0) run(pass, operation.runtime());
  });
  if (cells) *cells = converted(*cells, layer.dtype);
  return {output, converted(h_n, layer.dtype), converted(c_n, layer.dtype), saved};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(ForwardCall& call) {
  return run_forward(forward_operator, call, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cells_forward(ForwardCall& call) {
  Tensor cells;
  const auto [output, h_n, c_n, saved] = run_forward(cells_forward_operator, call, &cells);
  return {output, h_n, c_n, cells, saved};
}

using Gradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients run_backward(Operator& op, CellsBackwardCall& grads, TraceTensors* trace) {
  const BackwardInputs& call = grads.of;
  Call operation(op);
  Layer layer(call.args);
  const LstmShape& s = layer.shape;
  const bool recompute = call.args.recompute;
  if (trace) trace->check();
  check_argument("grad_output", grads.grad_output, {s.T, s.B, s.R}, layer.dtype);
  check_argument("grad_h_n", grads.grad_h_n, {s.B, s.R}, layer.dtype);
  check_argument("grad_c_n", grads.grad_c_n, {s.B, s.H}, layer.dtype);
  check_argument("grad_cells", grads.grad_cells, {s.T, s.B, s.H}, layer.dtype);
  check_argument("output", call.output, {s.T, s.B, s.R}, layer.dtype);
  check_argument("saved", call.saved, {saved_size(s, layer.dtype, recompute)}, layer.dtype);
  layer.lay_out();
  const OptionalTensor grad_h_n = converted(grads.grad_h_n, layer.sums),
                       grad_c_n = converted(grads.grad_c_n, layer.sums),
                       grad_cells = converted(grads.grad_cells, layer.sums);
  OptionalTensor grad = grads.grad_output;
  if (grad && grad->stride(2) > 1) grad = dense(grad);
  const OptionalTensor& mask = call.args.detach_mask;
  operation.checked();
  const bool weights = call.need_weights;
  const auto sums = [&](std::initializer_list<int64_t> sizes, bool wanted = true) {
    return make(sizes, layer.sums, wanted);
  };
  const Tensor dx = make({s.T, s.B, s.I}, layer.dtype, call.need_input), dh_0 = sums({s.B, s.R}),
               dc_0 = sums({s.B, s.H}), dweight_ih = sums({4 * s.H, s.I}, weights),
               dweight_hh = sums({4 * s.H, s.R}, weights), dbias = sums({4 * s.H}, weights),
               dweight_hr = sums({s.R, s.H}, weights && call.args.weight_hr.has_value());
  const bool resets = call.need_reset && call.args.reset_h.has_value();
  const Tensor dreset_h = sums({s.T, s.B, s.R}, resets), dreset_c = sums({s.T, s.B, s.H}, resets);
  if (trace) trace->make(s.T, s.B, s.R, s.H, layer.sums, call.args.lengths.has_value());
  operation.allocated();
  if (call.need_input && call.args.lengths) fill_zero(dx);
  for (const Tensor& x : {dreset_h, dreset_c}) fill_zero(x);
  if (s.B == 0) {
    for (const Tensor& x : {dweight_ih, dweight_hh, dbias, dweight_hr}) fill_zero(x);
  } else {
    const Tensor output = dense(call.output), saved = dense(call.saved);
    with_number(layer.dtype, [&](auto zero) {
      using X = decltype(zero);
      using S = SumOf<X>;
      const auto weight = [&](const Tensor& x) { return weights ? mutable_data<S>(x) : nullptr; };
      const LstmBackward<X> pass{.in = layer.as<X>(),
                                 .y = data<X>(output),
                                 .saved = data<S>(saved),
                                 .cell_only = recompute,
                                 .dy = data<X>(grad),
                                 .dy_stride_t = grad ? grad->stride(0) : 0,
                                 .dy_stride_b = grad ? grad->stride(1) : 0,
                                 .dy_same = grad && s.R > 1 && grad->stride(2) == 0,
                                 .dh_n = data<S>(grad_h_n),
                                 .dc_n = data<S>(grad_c_n),
                                 .detach = data<bool>(mask),
                                 .detach_stride_t = mask ? mask->stride(0) : 0,
                                 .detach_stride_b = mask ? mask->stride(1) : 0,
                                 .dx = call.need_input ? mutable_data<X>(dx) : nullptr,
                                 .dh0 = mutable_data<S>(dh_0),
                                 .dc0 = mutable_data<S>(dc_0),
                                 .dweight_ih = weight(dweight_ih),
                                 .dweight_hh = weight(dweight_hh),
                                 .dbias = weight(dbias),
                                 .dweight_hr = weight(dweight_hr),
                                 .beyond = nullptr,
                                 .dreset_h = resets ? mutable_data<S>(dreset_h) : nullptr,
                                 .dreset_c = resets ? mutable_data<S>(dreset_c) : nullptr,
                                 .dcells = data<S>(grad_cells),
                                 .trace = TraceTensors::of<S>(trace)};
      TT_CHECK_CALL(pass.saved[saved_activations<X>(s, recompute)] == static_cast<S>(isa().mark),
                    "saved should be what lstm_forward saved with the same instruction set, ",
                    isa().name, "; another one wrote it, or it was changed: run forward again");
      run(pass, operation.runtime());
    });
  }
  const auto weight = [&](const Tensor& x) { return converted(x, layer.weights); };
  const Tensor dbias_ih = weight(dbias), dbias_hh = make({dbias_ih.numel()}, layer.weights);
  copy(dbias_ih, dbias_hh);
  return {dx,
          converted(dh_0, layer.dtype),
          converted(dc_0, layer.dtype),
          weight(dweight_ih),
          weight(dweight_hh),
          dbias_ih,
          dbias_hh,
          weight(dweight_hr),
          converted(dreset_h, layer.dtype),
          converted(dreset_c, layer.dtype)};
}

Gradients backward(BackwardCall& call) {
  CellsBackwardCall whole{call.grad_output, call.grad_h_n, call.grad_c_n, Maybe(), call.of};
  return run_backward(backward_operator, whole, nullptr);
}

Gradients cells_backward(CellsBackwardCall& call) {
  return run_backward(cells_backward_operator, call, nullptr);
}

auto backward_trace(TraceCall& call) {
  TraceTensors trace{call.trace_every, {}, {}};
  const Gradients gradients = run_backward(trace_operator, call.gradients, &trace);
  return std::tuple_cat(gradients, std::tuple(trace.h, trace.c));
}

}  // namespace
}  // namespace throughtime

STABLE_TORCH_LIBRARY_IMPL(throughtime, CPU, library) {
  library.impl("lstm_forward", &throughtime::boxed<throughtime::forward>);
  library.impl("lstm_backward", &throughtime::boxed<throughtime::backward>);
  library.impl("lstm_cells_forward", &throughtime::boxed<throughtime::cells_forward>);
  library.impl("lstm_cells_backward", &throughtime::boxed<throughtime::cells_backward>);
  library.impl("lstm_backward_trace", &throughtime::boxed<throughtime::backward_trace>);
}
