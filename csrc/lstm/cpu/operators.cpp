// throughtime::lstm_forward and lstm_backward on the CPU: check, lay out, run.
//
// Schemas and their documentation: python/throughtime/ops/lstm.py.
#include <tuple>

#include "common/cpu/cpu.h"
#include "common/cpu/row_order.h"
#include "common/tensors.h"
#include "lstm/cpu/params.h"

namespace throughtime {
namespace {

// Sizes of a call, once all that both passes take is known to fit.
LstmShape checked(const char* op, const Tensor& input, const Tensor& h_0, const Tensor& c_0,
                  const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                  const OptionalTensor& bias_hh, const OptionalTensor& weight_hr,
                  const OptionalTensor& reset) {
  check_dims(op, "input", input, "[T, B, I]");
  check_dims(op, "weight_hh", weight_hh, "[4H, H or P]");
  const int64_t H = weight_hh.size(0) / 4, R = weight_hr ? weight_hh.size(1) : H;
  const LstmShape s{input.size(0), input.size(1), input.size(2), H, R};
  check_real(op, "input", input);
  TT_CHECK(s.T > 0, "Expected sequence length to be larger than 0 in RNN");
  TT_CHECK(H > 0 && R > 0, op, ": weight_hh should be [4H, H or P] of at least one unit");
  const ScalarType dtype = input.scalar_type();
  check_argument(op, "input", input, {s.T, s.B, s.I}, dtype);
  check_argument(op, "h_0", h_0, {s.B, R}, dtype);
  check_argument(op, "c_0", c_0, {s.B, H}, dtype);
  check_argument(op, "weight_ih", weight_ih, {4 * H, s.I}, dtype);
  check_argument(op, "weight_hh", weight_hh, {4 * H, R}, dtype);
  check_argument(op, "weight_hr", weight_hr, {R, H}, dtype);
  check_argument(op, "bias_ih", bias_ih, {4 * H}, dtype);
  check_argument(op, "bias_hh", bias_hh, {4 * H}, dtype);
  check_argument(op, "reset", reset, {s.T, s.B}, ScalarType::Bool);
  return s;
}

// The tensors that both passes take, dense and as the kernels want them. All are checked before any
// is copied: one of another shape may be as large as `expand` makes it.
class Arguments {
 public:
  Arguments(const char* op, const Tensor& input, const Tensor& h_0, const Tensor& c_0,
            const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
            const OptionalTensor& bias_hh, const OptionalTensor& weight_hr,
            const OptionalTensor& lengths, const OptionalTensor& reset, bool reverse)
      : shape(
            checked(op, input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, reset)),
        dtype(input.scalar_type()),
        input_(input.stride(2) == 1 ? input : dense(input)),
        h_0_(dense(h_0)),
        c_0_(dense(c_0)),
        weight_ih_(dense(weight_ih)),
        weight_hh_(dense(weight_hh)),
        bias_(sum_of(bias_ih, bias_hh)),
        weight_hr_(dense(weight_hr)),
        reset_(dense(reset)),
        rows_(op, lengths, shape.B, shape.T),
        reverse_(reverse) {}

  Tensor make(std::initializer_list<int64_t> sizes, bool wanted = true) const {
    return wanted ? pooled(sizes, dtype) : pooled({0}, dtype);
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
            rows_.lengths(),
            rows_.order(),
            data<bool>(reset_),
            reverse_};
  }

  LstmShape shape;
  ScalarType dtype;

 private:
  Tensor input_, h_0_, c_0_, weight_ih_, weight_hh_;
  OptionalTensor bias_, weight_hr_, reset_;
  RowOrder rows_;
  bool reverse_;
};

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <typename S>
void forward_as(const Runtime& runtime, const Arguments& args, const ForwardResult& result,
                bool save) {
  const auto& [output, h_n, c_n, saved] = result;
  const LstmForward<S> call{args.as<S>(), mutable_data<S>(output), mutable_data<S>(h_n),
                            mutable_data<S>(c_n), save ? mutable_data<S>(saved) : nullptr};
  const CpuKernels& kernels = cpu_kernels();
  if (save) call.saved[saved_activations(args.shape)] = static_cast<S>(kernels.mark);
  if (args.shape.B > 0) kernels.lstm->forward(call, runtime);
}

ForwardResult lstm_forward(const Tensor input, const Tensor h_0, const Tensor c_0,
                           const Tensor weight_ih, const Tensor weight_hh,
                           const OptionalTensor bias_ih, const OptionalTensor bias_hh,
                           const OptionalTensor weight_hr, const OptionalTensor lengths,
                           const OptionalTensor reset, const OptionalTensor detach_mask,
                           bool reverse, bool save) {
  Call operation(kLstmForward);
  const Arguments args("throughtime::lstm_forward", input, h_0, c_0, weight_ih, weight_hh, bias_ih,
                       bias_hh, weight_hr, lengths, reset, reverse);
  const LstmShape& s = args.shape;
  check_steps("throughtime::lstm_forward", "detach_mask", detach_mask, s.T, s.B);
  operation.checked();
  const ForwardResult result{args.make({s.T, s.B, s.R}), args.make({s.B, s.R}),
                             args.make({s.B, s.H}), args.make({saved_numbers(s)}, save)};
  operation.allocated();
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
  const CpuKernels& kernels = cpu_kernels();
  const S mark = call.saved[saved_activations(args.shape)];
  TT_CHECK(mark == static_cast<S>(kernels.mark),
           "throughtime::lstm_backward: saved should be what lstm_forward saved with the "
           "same instruction set, ",
           kernels.isa, "; another one wrote it, or it was changed: run forward again");
  kernels.lstm->backward(call, runtime);
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
  check_argument(op, "grad_output", grad_output, {s.T, s.B, s.R}, args.dtype);
  check_argument(op, "grad_h_n", grad_h_n, {s.B, s.R}, args.dtype);
  check_argument(op, "grad_c_n", grad_c_n, {s.B, s.H}, args.dtype);
  check_argument(op, "output", output, {s.T, s.B, s.R}, args.dtype);
  check_argument(op, "saved", saved, {saved_numbers(s)}, args.dtype);
  check_steps(op, "detach_mask", detach_mask, s.T, s.B);
  const Gradients grad{grad_output && grad_output->stride(2) > 1 ? dense(grad_output) : grad_output,
                       dense(grad_h_n), dense(grad_c_n), detach_mask};
  operation.checked();
  const BackwardResult result{args.make({s.T, s.B, s.I}, need_input),
                              args.make({s.B, s.R}),
                              args.make({s.B, s.H}),
                              args.make({4 * s.H, s.I}, need_weights),
                              args.make({4 * s.H, s.R}, need_weights),
                              args.make({4 * s.H}, need_weights),
                              args.make({4 * s.H}, need_weights),
                              args.make({s.R, s.H}, need_weights && weight_hr.has_value())};
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
