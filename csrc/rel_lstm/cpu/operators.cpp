// throughtime::rel_lstm_forward and rel_lstm_backward on the CPU: check, lay out, run.
// rel_lstm_backward_trace also gives the gradients of h_t and c_t of every n-th step.
//
// What the arguments mean: python/throughtime/ops/rel_lstm/arguments.py.
#include <tuple>

#include "common/cpu/call.h"
#include "common/cpu/row_order.h"
#include "common/operator.h"
#include "recurrence/cpu/trace_tensors.h"
#include "rel_lstm/cpu/kernels.h"
#include "relevancy/cpu/checks.h"

namespace throughtime {

TT_KERNEL_TABLES(RelLstmKernels, rel_lstm)
TT_BFLOAT16_TABLES(RelLstmBFloat16Kernels, rel_lstm_bfloat16)

namespace {

// Initial is Tensor, or Maybe in the backward pass, which does not read it; nor what is optional
// before lengths.
template <typename Initial>
struct RelLstmArguments {
  Tensor input;
  Initial h_0;
  Tensor c_0;
  Initial context_0;
  Maybe memory, relevance;
  Tensor weight_ih, weight_hh;
  Maybe bias_ih, bias_hh;
  Tensor weight_query, weight_key, weight_score;
  Maybe lengths, detach_mask;
  int64_t retained, window_size, top_k;
  bool keep_first;
};

struct ForwardCall {
  RelLstmArguments<Tensor> args;
  bool save;
};

struct BackwardCall {
  Maybe grad_output, grad_h_n, grad_c_n, grad_context_n;
  RelLstmArguments<Maybe> args;
  Tensor last, saved;
  bool need_input, need_weights;
};

struct TraceCall {
  BackwardCall gradients;
  int64_t trace_every;
};

// Sizes of a call after `earlier` positions of another one, whose arguments fit.
template <typename Initial>
RelLstmShape checked(const RelLstmArguments<Initial>& a, int64_t earlier) {
  check_dims("input", a.input, "[T, B, I]");
  check_dims("weight_hh", a.weight_hh, "[4H, H]");
  check_dims("weight_score", a.weight_score, "[A]");
  check_dtype("input", a.input, rel_lstm_bfloat16_kernels());
  const int64_t T = a.input.size(0);
  TT_CHECK(T > 0, "Expected sequence length to be larger than 0 in RNN");
  const ScreeningShape screening{T, earlier, a.retained, a.window_size, a.top_k};
  check_memory(screening);
  const RelLstmShape s{a.input.size(1), a.input.size(2), a.weight_hh.size(1),
                       a.weight_score.size(0), screening};
  TT_CHECK_CALL(s.H > 0 && s.A > 0,
                "weight_hh should be [4H, H] and weight_score [A] of at least one unit");
  const ScalarType dtype = a.input.scalar_type(), weights = weight_dtype(a.input, a.weight_ih);
  const int64_t B = s.B, H = s.H, gates = times(4, H);
  check_argument("input", a.input, {T, B, s.I}, dtype);
  check_argument("weight_hh", a.weight_hh, {gates, H}, weights);
  check_argument("weight_ih", a.weight_ih, {gates, s.I}, weights);
  check_argument("weight_query", a.weight_query, {s.A, H}, weights);
  check_argument("weight_key", a.weight_key, {s.A, H}, weights);
  check_argument("weight_score", a.weight_score, {s.A}, weights);
  check_argument("h_0", a.h_0, {B, H}, dtype);
  check_argument("c_0", a.c_0, {B, H}, dtype);
  check_argument("context_0", a.context_0, {B, H}, dtype);
  check_argument("bias_ih", a.bias_ih, {gates}, weights);
  check_argument("bias_hh", a.bias_hh, {gates}, weights);
  check_argument("memory", a.memory, {earlier, B, H}, dtype);
  check_argument("relevance", a.relevance, {earlier, B}, sums_of(dtype));
  check_argument("detach_mask", a.detach_mask, {T, B}, ScalarType::Bool);
  return s;
}

// The tensors that both passes take, dense and as the kernels want them; all are checked before any
// is copied.
class Layer {
 public:
  template <typename Initial>
  Layer(const RelLstmArguments<Initial>& args, int64_t earlier)
      : shape(checked(args, earlier)),
        dtype(args.input.scalar_type()),
        sums(sums_of(dtype)),
        weights(weight_dtype(args.input, args.weight_ih)),
        input_(args.input),
        weights_{args.weight_ih, args.weight_hh, args.weight_query, args.weight_key,
                 args.weight_score},
        rows_(args.lengths, shape.B, shape.T()) {}

  void lay_out() {
    if (input_.stride(2) != 1) input_ = dense(input_);
    for (Tensor& weight : weights_) weight = converted(weight, sums);
  }

  // last [S, B], dense.
  void check_last(const Tensor& last) const {
    LastCheck check(shape.screening);
    for (int64_t row = 0; row < shape.B; ++row)
      check(data<int64_t>(last) + rows_.order()[row], shape.B,
            {rows_.lengths() ? rows_.lengths()[row] : shape.T()});
  }

  // Of what has T steps, and of all else.
  Tensor make(std::initializer_list<int64_t> sizes, bool wanted = true) const {
    return wanted ? pooled(sizes, dtype) : pooled({0}, dtype);
  }
  Tensor make_sums(std::initializer_list<int64_t> sizes, bool wanted = true) const {
    return wanted ? pooled(sizes, sums) : pooled({0}, sums);
  }

  template <typename X>
  RelLstmInput<X> as() const {
    using S = SumOf<X>;
    return {.shape = shape,
            .x = data<X>(input_),
            .x_stride_t = input_.stride(0),
            .x_stride_b = input_.stride(1),
            .weight_ih = data<S>(weights_[0]),
            .weight_hh = data<S>(weights_[1]),
            .weight_query = data<S>(weights_[2]),
            .weight_key = data<S>(weights_[3]),
            .weight_score = data<S>(weights_[4]),
            .lengths = rows_.lengths(),
            .order = rows_.order()};
  }

  const RelLstmShape shape;
  const ScalarType dtype, sums, weights;

 private:
  Tensor input_, weights_[5];
  RowOrder rows_;
};

void run(const RelLstmForward<BFloat16>& pass, const Runtime& runtime) {
  rel_lstm_bfloat16_kernels()->forward(pass, runtime);
}
void run(const RelLstmBackward<BFloat16>& pass, const Runtime& runtime) {
  rel_lstm_bfloat16_kernels()->backward(pass, runtime);
}
template <typename S>
void run(const RelLstmForward<S>& pass, const Runtime& runtime) {
  rel_lstm_kernels().forward(pass, runtime);
}
template <typename S>
void run(const RelLstmBackward<S>& pass, const Runtime& runtime) {
  rel_lstm_kernels().backward(pass, runtime);
}

Operator forward_operator("rel_lstm_forward"), backward_operator("rel_lstm_backward"),
    trace_operator("rel_lstm_backward_trace");

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    ForwardCall& call) {
  Call operation(forward_operator);
  const auto& a = call.args;
  TT_CHECK_CALL(a.memory.has_value() == a.relevance.has_value(),
                "memory and relevance should be given together");
  if (a.memory) check_dims("memory", *a.memory, "[P, B, H]");
  Layer layer(a, a.memory ? a.memory->size(0) : 0);
  const RelLstmShape& s = layer.shape;
  operation.checked();
  const int64_t B = s.B, left = s.screening.memory_after();
  const Tensor output = layer.make({s.T(), B, s.H}), h_n = layer.make_sums({B, s.H}),
               c_n = layer.make_sums({B, s.H}), context_n = layer.make_sums({B, s.H}),
               last = pooled({s.screening.positions(), B}, ScalarType::Long),
               memory_index = pooled({left, B}, ScalarType::Long),
               memory_relevance = layer.make_sums({left, B}),
               saved = layer.make_sums({saved_numbers(s)}, call.save);
  operation.allocated();
  if (B > 0) {
    layer.lay_out();
    const auto wide = [&](const auto& x) { return converted(x, layer.sums); };
    const Tensor h_0 = wide(a.h_0), c_0 = wide(a.c_0), context_0 = wide(a.context_0);
    const OptionalTensor bias = sum_of(wide(a.bias_ih), wide(a.bias_hh)), memory = wide(a.memory),
                         relevance = dense(a.relevance);
    with_number(layer.dtype, [&](auto zero) {
      using X = decltype(zero);
      using S = SumOf<X>;
      const RelLstmForward<X> pass{.in = layer.as<X>(),
                                   .h0 = data<S>(h_0),
                                   .c0 = data<S>(c_0),
                                   .context0 = data<S>(context_0),
                                   .bias = data<S>(bias),
                                   .memory = data<S>(memory),
                                   .relevance = data<S>(relevance),
                                   .keep_first = a.keep_first,
                                   .y = mutable_data<X>(output),
                                   .h_n = mutable_data<S>(h_n),
                                   .c_n = mutable_data<S>(c_n),
                                   .context_n = mutable_data<S>(context_n),
                                   .last = mutable_data<int64_t>(last),
                                   .memory_index = mutable_data<int64_t>(memory_index),
                                   .memory_relevance = mutable_data<S>(memory_relevance),
                                   .saved = call.save ? mutable_data<S>(saved) : nullptr};
      run(pass, operation.runtime());
    });
  }
  const auto narrow = [&](const Tensor& x) { return converted(x, layer.dtype); };
  return {output, narrow(h_n),  narrow(c_n),      narrow(context_n),
          last,   memory_index, memory_relevance, saved};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                             Tensor, Tensor, Tensor>;

Gradients run_backward(Operator& op, BackwardCall& call, TraceTensors* trace) {
  Call operation(op);
  auto& a = call.args;
  check_dims("input", a.input, "[T, B, I]");
  check_dims("last", call.last, "[P + T, B]");
  TT_CHECK_CALL(call.last.size(0) >= a.input.size(0),
                "last should be [P + T, B] for an input [T, B, I]");
  // No key joins the retained set here: `last` says what was attended.
  a.top_k = a.retained;
  Layer layer(a, call.last.size(0) - a.input.size(0));
  const RelLstmShape& s = layer.shape;
  const int64_t B = s.B, H = s.H;
  if (trace) trace->check();
  check_argument("grad_output", call.grad_output, {s.T(), B, H}, layer.dtype);
  check_argument("grad_h_n", call.grad_h_n, {B, H}, layer.dtype);
  check_argument("grad_c_n", call.grad_c_n, {B, H}, layer.dtype);
  check_argument("grad_context_n", call.grad_context_n, {B, H}, layer.dtype);
  check_argument("saved", call.saved, {saved_numbers(s)}, layer.sums);
  check_argument("last", call.last, {s.screening.positions(), B}, ScalarType::Long);
  operation.checked();
  const bool weights = call.need_weights;
  const Tensor dx = layer.make({s.T(), B, s.I}, call.need_input), dh_0 = layer.make_sums({B, H}),
               dc_0 = layer.make_sums({B, H}), dcontext_0 = layer.make_sums({B, H}),
               dmemory = layer.make_sums({s.screening.P, B, H}),
               dweight_ih = layer.make_sums({4 * H, s.I}, weights),
               dweight_hh = layer.make_sums({4 * H, H}, weights),
               dbias = layer.make_sums({4 * H}, weights),
               dweight_query = layer.make_sums({s.A, H}, weights),
               dweight_key = layer.make_sums({s.A, H}, weights),
               dweight_score = layer.make_sums({s.A}, weights);
  if (trace) trace->make(s.T(), B, H, H, layer.sums, a.lengths.has_value());
  operation.allocated();
  if (call.need_input && a.lengths) fill_zero(dx);
  if (B == 0) {
    for (const Tensor& x :
         {dweight_ih, dweight_hh, dbias, dweight_query, dweight_key, dweight_score})
      fill_zero(x);
  } else {
    layer.lay_out();
    const auto wide = [&](const auto& x) { return converted(x, layer.sums); };
    OptionalTensor grad = call.grad_output;
    if (grad && H > 1 && grad->stride(2) != 1) grad = dense(grad);
    const OptionalTensor grad_h_n = wide(call.grad_h_n), grad_c_n = wide(call.grad_c_n),
                         grad_context_n = wide(call.grad_context_n);
    const OptionalTensor& mask = a.detach_mask;
    const Tensor c_0 = wide(a.c_0), last = dense(call.last), saved = dense(call.saved);
    layer.check_last(last);
    with_number(layer.dtype, [&](auto zero) {
      using X = decltype(zero);
      using S = SumOf<X>;
      const auto weight = [&](const Tensor& x) { return weights ? mutable_data<S>(x) : nullptr; };
      const RelLstmBackward<X> pass{.in = layer.as<X>(),
                                    .c0 = data<S>(c_0),
                                    .last = data<int64_t>(last),
                                    .saved = data<S>(saved),
                                    .dy = data<X>(grad),
                                    .dy_stride_t = grad ? grad->stride(0) : 0,
                                    .dy_stride_b = grad ? grad->stride(1) : 0,
                                    .dh_n = data<S>(grad_h_n),
                                    .dc_n = data<S>(grad_c_n),
                                    .dcontext_n = data<S>(grad_context_n),
                                    .detach = data<bool>(mask),
                                    .detach_stride_t = mask ? mask->stride(0) : 0,
                                    .detach_stride_b = mask ? mask->stride(1) : 0,
                                    .dx = call.need_input ? mutable_data<X>(dx) : nullptr,
                                    .dh0 = mutable_data<S>(dh_0),
                                    .dc0 = mutable_data<S>(dc_0),
                                    .dcontext0 = mutable_data<S>(dcontext_0),
                                    .dmemory = mutable_data<S>(dmemory),
                                    .dweight_ih = weight(dweight_ih),
                                    .dweight_hh = weight(dweight_hh),
                                    .dbias = weight(dbias),
                                    .dweight_query = weight(dweight_query),
                                    .dweight_key = weight(dweight_key),
                                    .dweight_score = weight(dweight_score),
                                    .trace = TraceTensors::of<S>(trace)};
      run(pass, operation.runtime());
    });
  }
  const auto state = [&](const Tensor& x) { return converted(x, layer.dtype); };
  const auto weight = [&](const Tensor& x) { return converted(x, layer.weights); };
  const Tensor dbias_ih = weight(dbias), dbias_hh = pooled({dbias_ih.numel()}, layer.weights);
  copy(dbias_ih, dbias_hh);
  return {dx,
          state(dh_0),
          state(dc_0),
          state(dcontext_0),
          state(dmemory),
          weight(dweight_ih),
          weight(dweight_hh),
          dbias_ih,
          dbias_hh,
          weight(dweight_query),
          weight(dweight_key),
          weight(dweight_score)};
}

Gradients backward(BackwardCall& call) { return run_backward(backward_operator, call, nullptr); }

auto backward_trace(TraceCall& call) {
  TraceTensors trace{call.trace_every, {}, {}};
  const Gradients gradients = run_backward(trace_operator, call.gradients, &trace);
  return std::tuple_cat(gradients, std::tuple(trace.h, trace.c));
}

}  // namespace
}  // namespace throughtime

STABLE_TORCH_LIBRARY_IMPL(throughtime, CPU, library) {
  library.impl("rel_lstm_forward", &throughtime::boxed<throughtime::forward>);
  library.impl("rel_lstm_backward", &throughtime::boxed<throughtime::backward>);
  library.impl("rel_lstm_backward_trace", &throughtime::boxed<throughtime::backward_trace>);
}
