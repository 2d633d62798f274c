// throughtime::rel_lstm_forward and rel_lstm_backward on the CPU: check, lay out, run.
//
// Schemas and their documentation: python/throughtime/ops/rel_lstm.py.
#include "../common/cpu.h"

#include <tuple>

#include "../common/row_order.h"
#include "../common/tensors.h"
#include "params.h"

namespace throughtime {
namespace {

// The tensors that both passes take, checked, and as the kernels want them.
class Arguments {
 public:
  Arguments(const char* op, const Tensor& input, int64_t earlier, const Tensor& weight_ih,
            const Tensor& weight_hh, const Tensor& weight_query, const Tensor& weight_key,
            const Tensor& weight_score, const OptionalTensor& lengths, int64_t retained,
            int64_t window_size, int64_t top_k)
      : op_(op),
        input_(input.dim() == 3 && input.stride(2) == 1 ? input : dense(input)),
        weight_ih_(dense(weight_ih)),
        weight_hh_(dense(weight_hh)),
        weight_query_(dense(weight_query)),
        weight_key_(dense(weight_key)),
        weight_score_(dense(weight_score)) {
    STD_TORCH_CHECK(input.dim() == 3, op, ": input should have 3 dimensions [T, B, I], got ",
                    input.dim());
    STD_TORCH_CHECK(weight_hh.dim() == 2 && weight_score.dim() == 1, op,
                    ": weight_hh should be [4H, H] and weight_score [A], got ", weight_hh.dim(),
                    " and ", weight_score.dim(), " dimensions");
    dtype = input.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, op,
                    ": input should be float32 or float64, got ",
                    torch::headeronly::toString(dtype));
    const int64_t T = input.size(0);
    STD_TORCH_CHECK(T > 0, "Expected sequence length to be larger than 0 in RNN");
    STD_TORCH_CHECK(window_size >= 1 && top_k >= 0, op,
                    ": window_size should be at least 1 and top_k at least 0, got ", window_size,
                    " and ", top_k);
    STD_TORCH_CHECK(0 <= retained && retained <= earlier, op, ": retained should be in [0, ",
                    earlier, "], the positions of an earlier call; got ", retained);
    STD_TORCH_CHECK(retained <= top_k && earlier - retained <= window_size - 1, op,
                    ": an earlier call leaves at most top_k = ", top_k,
                    " retained states and window_size - 1 = ", window_size - 1, " others, got ",
                    retained, " and ", earlier - retained);
    shape = {input.size(1),
             input.size(2),
             weight_hh.size(1),
             weight_score.size(0),
             {T, earlier, retained, window_size, top_k}};
    const int64_t H = shape.H, A = shape.A;
    check("weight_ih", weight_ih, {4 * H, shape.I});
    check("weight_hh", weight_hh, {4 * H, H});
    check("weight_query", weight_query, {A, H});
    check("weight_key", weight_key, {A, H});
    check("weight_score", weight_score, {A});
    rows_.emplace(op, lengths, shape.B, T);
  }

  void check(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes) const {
    check_cpu(op_, name, tensor);
    check_shape(op_, name, tensor, sizes);
    check_dtype(op_, name, tensor, dtype);
  }
  void check(const char* name, const OptionalTensor& tensor,
             std::initializer_list<int64_t> sizes) const {
    if (tensor) check(name, *tensor, sizes);
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
            rows_->lengths(),
            rows_->order()};
  }

  RelLstmShape shape;
  ScalarType dtype;

 private:
  const char* op_;
  Tensor input_, weight_ih_, weight_hh_, weight_query_, weight_key_, weight_score_;
  std::optional<RowOrder> rows_;
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
                               const OptionalTensor lengths, const OptionalTensor, int64_t retained,
                               int64_t window_size, int64_t top_k, bool keep_first, bool save) {
  Call operation(kRelLstmForward);
  const char* op = "throughtime::rel_lstm_forward";
  STD_TORCH_CHECK(memory.has_value() == relevance.has_value(), op,
                  ": memory and relevance should be given together");
  const Arguments args(op, input, memory ? memory->size(0) : 0, weight_ih, weight_hh, weight_query,
                       weight_key, weight_score, lengths, retained, window_size, top_k);
  const RelLstmShape& s = args.shape;
  const int64_t B = s.B, H = s.H, P = s.screening.P, left = s.screening.memory_after();
  args.check("h_0", h_0, {B, H});
  args.check("c_0", c_0, {B, H});
  args.check("context_0", context_0, {B, H});
  args.check("bias_ih", bias_ih, {4 * H});
  args.check("bias_hh", bias_hh, {4 * H});
  args.check("memory", memory, {P, B, H});
  args.check("relevance", relevance, {P, B});
  operation.checked();
  const ForwardResult result{args.make({s.T(), B, H}),
                             args.make({B, H}),
                             args.make({B, H}),
                             args.make({B, H}),
                             pooled({s.screening.S(), B}, ScalarType::Long),
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
  STD_TORCH_CHECK(input.dim() == 3 && last.dim() == 2 && last.size(0) >= input.size(0), op,
                  ": last should be [P + T, B] for an input [T, B, I]");
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
  check_cpu(op, "last", last);
  check_shape(op, "last", last, {s.screening.S(), B});
  check_dtype(op, "last", last, ScalarType::Long);
  if (detach_mask) {
    check_cpu(op, "detach_mask", *detach_mask);
    check_dtype(op, "detach_mask", *detach_mask, ScalarType::Bool);
    if (detach_mask->dim() == 2) {
      check_shape(op, "detach_mask", *detach_mask, {s.T(), B});
    } else {
      check_shape(op, "detach_mask", *detach_mask, {s.T()});
    }
  }
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
