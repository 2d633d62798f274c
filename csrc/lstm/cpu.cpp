// throughtime::lstm_forward and lstm_backward on the CPU: check, lay out, run.
//
// Schemas and their documentation: python/throughtime/ops/lstm.py.
#include "../common/cpu.h"

#include <tuple>

#include "../common/row_order.h"
#include "../common/tensors.h"
#include "params.h"

namespace throughtime {
namespace {

// The tensors that both passes take, dense, checked, and as the kernels want them.
class Arguments {
 public:
  Arguments(const char* op, const Tensor& input, const Tensor& h_0, const Tensor& c_0,
            const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
            const OptionalTensor& bias_hh, const OptionalTensor& weight_hr,
            const OptionalTensor& lengths, const OptionalTensor& reset, bool reverse)
      : input_(with_dense_rows(input)),
        h_0_(dense(h_0)),
        c_0_(dense(c_0)),
        weight_ih_(dense(weight_ih)),
        weight_hh_(dense(weight_hh)),
        weight_hr_(dense(weight_hr)),
        reset_(dense(reset)),
        reverse_(reverse) {
    STD_TORCH_CHECK(input.dim() == 3, op, ": input should have 3 dimensions [T, B, I], got ",
                    input.dim());
    STD_TORCH_CHECK(weight_hh.dim() == 2, op, ": weight_hh should be [4H, H or P], got ",
                    weight_hh.dim(), " dimensions");
    const int64_t hidden = weight_hh.size(0) / 4;
    shape = {input.size(0), input.size(1), input.size(2), hidden,
             weight_hr ? weight_hr->size(0) : hidden};
    dtype = input.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, op,
                    ": input should be float32 or float64, got ",
                    torch::headeronly::toString(dtype));
    STD_TORCH_CHECK(shape.T > 0, "Expected sequence length to be larger than 0 in RNN");
    const auto check = [&](const char* name, const Tensor& tensor,
                           std::initializer_list<int64_t> sizes, ScalarType wanted) {
      check_cpu(op, name, tensor);
      check_shape(op, name, tensor, sizes);
      check_dtype(op, name, tensor, wanted);
    };
    check("h_0", h_0, {shape.B, shape.R}, dtype);
    check("c_0", c_0, {shape.B, shape.H}, dtype);
    check("weight_ih", weight_ih, {4 * shape.H, shape.I}, dtype);
    check("weight_hh", weight_hh, {4 * shape.H, shape.R}, dtype);
    if (weight_hr) check("weight_hr", *weight_hr, {shape.R, shape.H}, dtype);
    if (bias_ih) check("bias_ih", *bias_ih, {4 * shape.H}, dtype);
    if (bias_hh) check("bias_hh", *bias_hh, {4 * shape.H}, dtype);
    bias_ = sum_of(bias_ih, bias_hh);
    if (reset) check("reset", *reset, {shape.T, shape.B}, ScalarType::Bool);
    rows_.emplace(op, lengths, shape.B, shape.T);
  }

  template <typename S>
  LstmInput<S> as() const {
    return {shape,
            data<S>(input_),
            input_.stride(0),
            input_.stride(1),
            data<S>(h_0_),
            data<S>(c_0_),
            data<S>(weight_ih_),
            data<S>(weight_hh_),
            data<S>(weight_hr_),
            data<S>(bias_),
            rows_->lengths(),
            rows_->order(),
            data<bool>(reset_),
            reverse_};
  }

  LstmShape shape;
  ScalarType dtype;

 private:
  static Tensor with_dense_rows(const Tensor& input) {
    return input.dim() == 3 && input.stride(2) == 1 ? input : dense(input);
  }

  Tensor input_, h_0_, c_0_, weight_ih_, weight_hh_;
  OptionalTensor bias_, weight_hr_, reset_;
  std::optional<RowOrder> rows_;
  bool reverse_;
};

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <typename S>
void forward_as(const Runtime& runtime, const Arguments& args, const ForwardResult& result,
                bool save) {
  const auto& [output, h_n, c_n, saved] = result;
  const LstmForward<S> call{args.as<S>(), mutable_data<S>(output), mutable_data<S>(h_n),
                            mutable_data<S>(c_n), save ? mutable_data<S>(saved) : nullptr};
  cpu_kernels().lstm->forward(call, runtime);
}

ForwardResult lstm_forward(const Tensor input, const Tensor h_0, const Tensor c_0,
                           const Tensor weight_ih, const Tensor weight_hh,
                           const OptionalTensor bias_ih, const OptionalTensor bias_hh,
                           const OptionalTensor weight_hr, const OptionalTensor lengths,
                           const OptionalTensor reset, const OptionalTensor, bool reverse,
                           bool save) {
  Call operation(kLstmForward);
  const Arguments args("throughtime::lstm_forward", input, h_0, c_0, weight_ih, weight_hh, bias_ih,
                       bias_hh, weight_hr, lengths, reset, reverse);
  const LstmShape& s = args.shape;
  operation.checked();
  const ForwardResult result{pooled({s.T, s.B, s.R}, args.dtype), pooled({s.B, s.R}, args.dtype),
                             pooled({s.B, s.H}, args.dtype),
                             pooled({save ? saved_numbers(s) : 0}, args.dtype)};
  operation.allocated();
  if (s.B == 0) return result;
  if (args.dtype == ScalarType::Float) {
    forward_as<float>(operation.runtime(), args, result, save);
  } else {
    forward_as<double>(operation.runtime(), args, result, save);
  }
  return result;
}

struct Gradients {
  OptionalTensor output, h_n, c_n;
  OptionalTensor detach_mask;
};

using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename S>
void backward_as(const Runtime& runtime, const Arguments& args, const Gradients& grad,
                 const Tensor& output, const Tensor& saved, const BackwardResult& result,
                 bool need_input, bool need_weights) {
  const auto& [dx, dh0, dc0, dweight_ih, dweight_hh, dbias_ih, dbias_hh, dweight_hr] = result;
  const auto& mask = grad.detach_mask;
  const LstmBackward<S> call{args.as<S>(),
                             data<S>(output),
                             data<S>(saved),
                             data<S>(grad.output),
                             grad.output ? grad.output->stride(0) : 0,
                             grad.output ? grad.output->stride(1) : 0,
                             grad.output && args.shape.R > 1 && grad.output->stride(2) == 0,
                             data<S>(grad.h_n),
                             data<S>(grad.c_n),
                             data<bool>(mask),
                             mask ? mask->stride(0) : 0,
                             mask && mask->dim() == 2 ? mask->stride(1) : 0,
                             need_input ? mutable_data<S>(dx) : nullptr,
                             mutable_data<S>(dh0),
                             mutable_data<S>(dc0),
                             need_weights ? mutable_data<S>(dweight_ih) : nullptr,
                             need_weights ? mutable_data<S>(dweight_hh) : nullptr,
                             need_weights ? mutable_data<S>(dbias_ih) : nullptr,
                             need_weights ? mutable_data<S>(dweight_hr) : nullptr};
  cpu_kernels().lstm->backward(call, runtime);
}

BackwardResult lstm_backward(const OptionalTensor grad_output, const OptionalTensor grad_h_n,
                             const OptionalTensor grad_c_n, const Tensor input, const Tensor h_0,
                             const Tensor c_0, const Tensor weight_ih, const Tensor weight_hh,
                             const OptionalTensor weight_hr, const OptionalTensor lengths,
                             const OptionalTensor reset, const OptionalTensor detach_mask,
                             const Tensor output, const Tensor saved, bool reverse, bool need_input,
                             bool need_weights) {
  Call operation(kLstmBackward);
  const char* op = "throughtime::lstm_backward";
  const Arguments args(op, input, h_0, c_0, weight_ih, weight_hh, std::nullopt, std::nullopt,
                       weight_hr, lengths, reset, reverse);
  const LstmShape& s = args.shape;
  const auto check = [&](const char* name, const OptionalTensor& tensor,
                         std::initializer_list<int64_t> sizes) {
    if (!tensor) return;
    check_shape(op, name, *tensor, sizes);
    check_dtype(op, name, *tensor, args.dtype);
  };
  check("grad_output", grad_output, {s.T, s.B, s.R});
  check("grad_h_n", grad_h_n, {s.B, s.R});
  check("grad_c_n", grad_c_n, {s.B, s.H});
  check("output", output, {s.T, s.B, s.R});
  check("saved", saved, {saved_numbers(s)});
  if (detach_mask) {
    check_dtype(op, "detach_mask", *detach_mask, ScalarType::Bool);
    if (detach_mask->dim() == 2) {
      check_shape(op, "detach_mask", *detach_mask, {s.T, s.B});
    } else {
      check_shape(op, "detach_mask", *detach_mask, {s.T});
    }
  }
  const Gradients grad{grad_output && grad_output->stride(2) > 1 ? dense(grad_output) : grad_output,
                       dense(grad_h_n), dense(grad_c_n), detach_mask};
  const int64_t rows = need_weights ? 4 * s.H : 0;
  operation.checked();
  const BackwardResult result{
      need_input ? pooled({s.T, s.B, s.I}, args.dtype) : pooled({0}, args.dtype),
      pooled({s.B, s.R}, args.dtype),
      pooled({s.B, s.H}, args.dtype),
      need_weights ? pooled({rows, s.I}, args.dtype) : pooled({0}, args.dtype),
      need_weights ? pooled({rows, s.R}, args.dtype) : pooled({0}, args.dtype),
      pooled({rows}, args.dtype),
      pooled({rows}, args.dtype),
      need_weights && weight_hr ? pooled({s.R, s.H}, args.dtype) : pooled({0}, args.dtype)};
  operation.allocated();
  if (need_input && lengths) fill_zero(std::get<0>(result));
  if (s.B == 0) {
    fill_zero(std::get<3>(result));
    fill_zero(std::get<4>(result));
    fill_zero(std::get<5>(result));
    fill_zero(std::get<6>(result));
    fill_zero(std::get<7>(result));
    return result;
  }
  const Tensor output_dense = dense(output), saved_dense = dense(saved);
  if (args.dtype == ScalarType::Float) {
    backward_as<float>(operation.runtime(), args, grad, output_dense, saved_dense, result,
                       need_input, need_weights);
  } else {
    backward_as<double>(operation.runtime(), args, grad, output_dense, saved_dense, result,
                        need_input, need_weights);
  }
  copy(std::get<5>(result), std::get<6>(result));
  return result;
}

}  // namespace
}  // namespace throughtime

STABLE_TORCH_LIBRARY_IMPL(throughtime, CPU, library) {
  library.impl("lstm_forward", TORCH_BOX(&throughtime::lstm_forward));
  library.impl("lstm_backward", TORCH_BOX(&throughtime::lstm_backward));
}
