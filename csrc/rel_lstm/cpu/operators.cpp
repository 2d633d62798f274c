// throughtime::rel_lstm_forward and rel_lstm_backward on the CPU: check, lay out, run.
//
// Schemas and their documentation: python/throughtime/ops/rel_lstm.py.
#include <tuple>

#include "common/cpu/cpu.h"
#include "common/cpu/row_order.h"
#include "common/tensors.h"
#include "rel_lstm/cpu/params.h"
#include "relevancy/cpu/checks.h"

namespace throughtime {
namespace {

// Sizes of a call after `earlier` positions of another, once all that both passes take is known to
// fit.
RelLstmShape checked(const char* op, const Tensor& input, int64_t earlier, const Tensor& weight_ih,
                     const Tensor& weight_hh, const Tensor& weight_query, const Tensor& weight_key,
                     const Tensor& weight_score, int64_t retained, int64_t window_size,
                     int64_t top_k) {
  check_dims(op, "input", input, "[T, B, I]");
  check_dims(op, "weight_hh", weight_hh, "[4H, H]");
  check_dims(op, "weight_score", weight_score, "[A]");
  check_real(op, "input", input);
  const int64_t T = input.size(0);
  TT_CHECK(T > 0, "Expected sequence length to be larger than 0 in RNN");
  check_memory(op, {T, earlier, retained, window_size, top_k});
  const RelLstmShape s{input.size(1),
                       input.size(2),
                       weight_hh.size(1),
                       weight_score.size(0),
                       {T, earlier, retained, window_size, top_k}};
  TT_CHECK(s.H > 0 && s.A > 0, op,
           ": weight_hh should be [4H, H] and weight_score [A] of at least one unit");
  const ScalarType dtype = input.scalar_type();
  check_argument(op, "input", input, {T, s.B, s.I}, dtype);
  check_argument(op, "weight_hh", weight_hh, {times(4, s.H), s.H}, dtype);
  check_argument(op, "weight_ih", weight_ih, {times(4, s.H), s.I}, dtype);
  check_argument(op, "weight_query", weight_query, {s.A, s.H}, dtype);
  check_argument(op, "weight_key", weight_key, {s.A, s.H}, dtype);
  check_argument(op, "weight_score", weight_score, {s.A}, dtype);
  return s;
}

// The tensors that both passes take, dense and as the kernels want them; all are checked before any
// is copied.
class Arguments {
 public:
  Arguments(const char* op, const Tensor& input, int64_t earlier, const Tensor& weight_ih,
            const Tensor& weight_hh, const Tensor& weight_query, const Tensor& weight_key,
            const Tensor& weight_score, const OptionalTensor& lengths, int64_t retained,
            int64_t window_size, int64_t top_k)
      : shape(checked(op, input, earlier, weight_ih, weight_hh, weight_query, weight_key,
                      weight_score, retained, window_size, top_k)),
        dtype(input.scalar_type()),
        op_(op),
        input_(input.stride(2) == 1 ? input : dense(input)),
        weight_ih_(dense(weight_ih)),
        weight_hh_(dense(weight_hh)),
        weight_query_(dense(weight_query)),
        weight_key_(dense(weight_key)),
        weight_score_(dense(weight_score)),
        rows_(op, lengths, shape.B, shape.T()) {}

  void check(const char* name, const OptionalTensor& tensor,
             std::initializer_list<int64_t> sizes) const {
    check_argument(op_, name, tensor, sizes, dtype);
  }

  // last [P + T, B], dense.
  void check_last(const Tensor& last) const {
    LastCheck check(op_, shape.screening);
    for (int64_t row = 0; row < shape.B; ++row)
      check(data<int64_t>(last) + rows_.order()[row], shape.B,
            rows_.lengths() ? rows_.lengths()[row] : shape.T());
  }

  Tensor make(std::initializer_list<int64_t> sizes, bool wanted = true) const {
    return wanted ? pooled(sizes, dtype) : pooled({0}, dtype);
  }

  template <typename S>
  RelLstmInput<S> as() const {
    return {shape,
            data<S>(input_),
            input_.stride(0),
            input_.stride(1),
            data<S>(weight_ih_),
            data<S>(weight_hh_),
            data<S>(weight_query_),
            data<S>(weight_key_),
            data<S>(weight_score_),
            rows_.lengths(),
            rows_.order()};
  }

  RelLstmShape shape;
  ScalarType dtype;

 private:
  const char* op_;
  Tensor input_, weight_ih_, weight_hh_, weight_query_, weight_key_, weight_score_;
  RowOrder rows_;
};

// What an earlier call left, and the bias: everything that only the forward pass reads.
struct Initial {
  Tensor h_0, c_0, context_0;
  OptionalTensor bias, memory, relevance;
};

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename S>
void forward_as(const Runtime& runtime, const Arguments& args, const Initial& initial,
                bool keep_first, bool save, const ForwardResult& result) {
  const auto& [output, h_n, c_n, context_n, last, index, relevance, saved] = result;
  const RelLstmForward<S> call{args.as<S>(),
                               data<S>(initial.h_0),
                               data<S>(initial.c_0),
                               data<S>(initial.context_0),
                               data<S>(initial.bias),
                               data<S>(initial.memory),
                               data<S>(initial.relevance),
                               keep_first,
                               mutable_data<S>(output),
                               mutable_data<S>(h_n),
                               mutable_data<S>(c_n),
                               mutable_data<S>(context_n),
                               mutable_data<int64_t>(last),
                               mutable_data<int64_t>(index),
                               mutable_data<S>(relevance),
                               save ? mutable_data<S>(saved) : nullptr};
  cpu_kernels().rel_lstm->forward(call, runtime);
}

ForwardResult rel_lstm_forward(const Tensor input, const Tensor h_0, const Tensor c_0,
                               const Tensor context_0, const OptionalTensor memory,
                               const OptionalTensor relevance, const Tensor weight_ih,
                               const Tensor weight_hh, const OptionalTensor bias_ih,
                               const OptionalTensor bias_hh, const Tensor weight_query,
                               const Tensor weight_key, const Tensor weight_score,
                               const OptionalTensor lengths, const OptionalTensor detach_mask,
                               int64_t retained, int64_t window_size, int64_t top_k,
                               bool keep_first, bool save) {
  Call operation(kRelLstmForward);
  const char* op = "throughtime::rel_lstm_forward";
  TT_CHECK(memory.has_value() == relevance.has_value(), op,
           ": memory and relevance should be given together");
  if (memory) check_dims(op, "memory", *memory, "[P, B, H]");
  const Arguments args(op, input, memory ? memory->size(0) : 0, weight_ih, weight_hh, weight_query,
                       weight_key, weight_score, lengths, retained, window_size, top_k);
  const RelLstmShape& s = args.shape;
  const int64_t B = s.B, H = s.H, P = s.screening.P, left = s.screening.memory_after();
  args.check("h_0", h_0, {B, H});
  args.check("c_0", c_0, {B, H});
  args.check("context_0", context_0, {B, H});
  args.check("bias_ih", bias_ih, {4 * H});
  args.check("bias_hh", bias_hh, {4 * H});
  check_steps(op, "detach_mask", detach_mask, s.T(), B);
  args.check("memory", memory, {P, B, H});
  args.check("relevance", relevance, {P, B});
  operation.checked();
  const ForwardResult result{args.make({s.T(), B, H}),
                             args.make({B, H}),
                             args.make({B, H}),
                             args.make({B, H}),
                             pooled({s.screening.positions(), B}, ScalarType::Long),
                             pooled({left, B}, ScalarType::Long),
                             args.make({left, B}),
                             args.make({saved_numbers(s)}, save)};
  operation.allocated();
  if (B == 0) return result;
  const Initial initial{dense(h_0),    dense(c_0),      dense(context_0), sum_of(bias_ih, bias_hh),
                        dense(memory), dense(relevance)};
  if (args.dtype == ScalarType::Float) {
    forward_as<float>(operation.runtime(), args, initial, keep_first, save, result);
  } else {
    forward_as<double>(operation.runtime(), args, initial, keep_first, save, result);
  }
  return result;
}

struct Gradients {
  OptionalTensor output, h_n, c_n, context_n, detach_mask;
};

using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                  Tensor, Tensor, Tensor, Tensor>;

template <typename S>
void backward_as(const Runtime& runtime, const Arguments& args, const Gradients& grad,
                 const Tensor& c_0, const Tensor& last, const Tensor& saved, bool need_input,
                 bool need_weights, const BackwardResult& result) {
  const auto& [dx, dh_0, dc_0, dcontext_0, dmemory, dweight_ih, dweight_hh, dbias_ih, dbias_hh,
               dweight_query, dweight_key, dweight_score] = result;
  const auto weight = [&](const Tensor& tensor) {
    return need_weights ? mutable_data<S>(tensor) : nullptr;
  };
  const OptionalTensor& mask = grad.detach_mask;
  const RelLstmBackward<S> call{args.as<S>(),
                                data<S>(c_0),
                                data<int64_t>(last),
                                data<S>(saved),
                                data<S>(grad.output),
                                grad.output ? grad.output->stride(0) : 0,
                                grad.output ? grad.output->stride(1) : 0,
                                data<S>(grad.h_n),
                                data<S>(grad.c_n),
                                data<S>(grad.context_n),
                                data<bool>(mask),
                                mask ? mask->stride(0) : 0,
                                mask && mask->dim() == 2 ? mask->stride(1) : 0,
                                need_input ? mutable_data<S>(dx) : nullptr,
                                mutable_data<S>(dh_0),
                                mutable_data<S>(dc_0),
                                mutable_data<S>(dcontext_0),
                                mutable_data<S>(dmemory),
                                weight(dweight_ih),
                                weight(dweight_hh),
                                weight(dbias_ih),
                                weight(dweight_query),
                                weight(dweight_key),
                                weight(dweight_score)};
  cpu_kernels().rel_lstm->backward(call, runtime);
}

BackwardResult rel_lstm_backward(const OptionalTensor grad_output, const OptionalTensor grad_h_n,
                                 const OptionalTensor grad_c_n, const OptionalTensor grad_context_n,
                                 const Tensor input, const Tensor c_0, const Tensor weight_ih,
                                 const Tensor weight_hh, const Tensor weight_query,
                                 const Tensor weight_key, const Tensor weight_score,
                                 const OptionalTensor lengths, const OptionalTensor detach_mask,
                                 const Tensor last, const Tensor saved, int64_t retained,
                                 int64_t window_size, bool need_input, bool need_weights) {
  Call operation(kRelLstmBackward);
  const char* op = "throughtime::rel_lstm_backward";
  check_dims(op, "input", input, "[T, B, I]");
  check_dims(op, "last", last, "[P + T, B]");
  TT_CHECK(last.size(0) >= input.size(0), op, ": last should be [P + T, B] for an input [T, B, I]");
  const Arguments args(op, input, last.size(0) - input.size(0), weight_ih, weight_hh, weight_query,
                       weight_key, weight_score, lengths, retained, window_size, retained);
  const RelLstmShape& s = args.shape;
  const int64_t B = s.B, H = s.H;
  args.check("grad_output", grad_output, {s.T(), B, H});
  args.check("grad_h_n", grad_h_n, {B, H});
  args.check("grad_c_n", grad_c_n, {B, H});
  args.check("grad_context_n", grad_context_n, {B, H});
  args.check("c_0", c_0, {B, H});
  args.check("saved", saved, {saved_numbers(s)});
  check_argument(op, "last", last, {s.screening.positions(), B}, ScalarType::Long);
  check_steps(op, "detach_mask", detach_mask, s.T(), B);
  operation.checked();
  const BackwardResult result{args.make({s.T(), B, s.I}, need_input),
                              args.make({B, H}),
                              args.make({B, H}),
                              args.make({B, H}),
                              args.make({s.screening.P, B, H}),
                              args.make({4 * H, s.I}, need_weights),
                              args.make({4 * H, H}, need_weights),
                              args.make({4 * H}, need_weights),
                              args.make({4 * H}, need_weights),
                              args.make({s.A, H}, need_weights),
                              args.make({s.A, H}, need_weights),
                              args.make({s.A}, need_weights)};
  operation.allocated();
  if (need_input && lengths) fill_zero(std::get<0>(result));
  if (B == 0) {
    fill_zero(std::get<5>(result));
    fill_zero(std::get<6>(result));
    fill_zero(std::get<7>(result));
    fill_zero(std::get<8>(result));
    fill_zero(std::get<9>(result));
    fill_zero(std::get<10>(result));
    fill_zero(std::get<11>(result));
    return result;
  }
  const bool dense_units = !grad_output || H == 1 || grad_output->stride(2) == 1;
  const Gradients grad{dense_units ? grad_output : dense(grad_output), dense(grad_h_n),
                       dense(grad_c_n), dense(grad_context_n), detach_mask};
  const Tensor cells = dense(c_0), until = dense(last), kept = dense(saved);
  args.check_last(until);
  if (args.dtype == ScalarType::Float) {
    backward_as<float>(operation.runtime(), args, grad, cells, until, kept, need_input,
                       need_weights, result);
  } else {
    backward_as<double>(operation.runtime(), args, grad, cells, until, kept, need_input,
                        need_weights, result);
  }
  copy(std::get<7>(result), std::get<8>(result));
  return result;
}

}  // namespace
}  // namespace throughtime

STABLE_TORCH_LIBRARY_IMPL(throughtime, CPU, library) {
  library.impl("rel_lstm_forward", TORCH_BOX(&throughtime::rel_lstm_forward));
  library.impl("rel_lstm_backward", TORCH_BOX(&throughtime::rel_lstm_backward));
}
