// throughtime::relevancy_forward and relevancy_backward on the CPU: check, lay out, run.
//
// Schemas and their documentation: python/throughtime/ops/relevancy.py.
#include "../common/cpu.h"

#include <tuple>

#include "../common/tensors.h"
#include "params.h"

namespace throughtime {
namespace {

Tensor with_dense_rows(const Tensor& tensor) {
  return tensor.dim() == 4 && tensor.stride(3) == 1 ? tensor : dense(tensor);
}

template <typename S>
Sequences<S> sequences(const Tensor& tensor) {
  return {data<S>(tensor), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// The tensors that both passes take, checked, and as the kernels want them.
class Arguments {
 public:
  Arguments(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
            const OptionalTensor& score_weight, const OptionalTensor& lengths, int64_t retained,
            int64_t window_size, int64_t top_k, double scale)
      : query_(with_dense_rows(query)),
        key_(with_dense_rows(key)),
        value_(with_dense_rows(value)),
        score_weight_(dense(score_weight)),
        lengths_(dense(lengths)),
        scale_(scale) {
    for (const Tensor* tensor : {&query, &key, &value})
      STD_TORCH_CHECK(tensor->dim() == 4, op,
                      ": query, key and value should have 4 dimensions [B, heads, T, features], ",
                      "got ", tensor->dim());
    const int64_t T = query.size(2), P = key.size(2) - T;
    dtype = query.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, op,
                    ": query should be float32 or float64, got ",
                    torch::headeronly::toString(dtype));
    STD_TORCH_CHECK(P >= 0 && 0 <= retained && retained <= P, op, ": key should have the T = ", T,
                    " keys of query and at least `retained` more, got ", key.size(2),
                    " with retained = ", retained);
    STD_TORCH_CHECK(window_size >= 1 && top_k >= 0, op,
                    ": window_size should be at least 1 and top_k at least 0, got ", window_size,
                    " and ", top_k);
    STD_TORCH_CHECK(retained <= top_k && P - retained <= window_size - 1, op,
                    ": an earlier call leaves at most top_k = ", top_k,
                    " retained keys and window_size - 1 = ", window_size - 1, " others, got ",
                    retained, " and ", P - retained);
    shape = {query.size(0),
             query.size(1),
             query.size(3),
             value.size(3),
             {T, P, retained, window_size, top_k}};
    STD_TORCH_CHECK(shape.D > 0, op, ": query should have at least one feature, got none");
    check_cpu(op, "query", query);
    check(op, "key", key, {shape.B, shape.heads, P + T, shape.D});
    check(op, "value", value, {shape.B, shape.heads, P + T, shape.Dv});
    if (score_weight) check(op, "score_weight", *score_weight, {shape.heads, shape.D});
    if (lengths) {
      check_cpu(op, "lengths", *lengths);
      check_shape(op, "lengths", *lengths, {shape.B});
      check_dtype(op, "lengths", *lengths, ScalarType::Long);
      for (int64_t b = 0; b < shape.B; ++b) {
        const int64_t length = data<int64_t>(lengths_)[b];
        STD_TORCH_CHECK(0 <= length && length <= T, op, ": lengths should be in [0, ", T,
                        "], the number of queries; got ", length, " for sample ", b);
      }
    }
  }

  void check(const char* op, const char* name, const Tensor& tensor,
             std::initializer_list<int64_t> sizes) const {
    check_cpu(op, name, tensor);
    check_shape(op, name, tensor, sizes);
    check_dtype(op, name, tensor, dtype);
  }

  template <typename S>
  RelevancyInput<S> as() const {
    return {shape,
            sequences<S>(query_),
            sequences<S>(key_),
            sequences<S>(value_),
            data<S>(score_weight_),
            data<int64_t>(lengths_),
            static_cast<S>(scale_)};
  }

  RelevancyShape shape;
  ScalarType dtype;

 private:
  Tensor query_, key_, value_;
  OptionalTensor score_weight_, lengths_;
  double scale_;
};

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename S>
void forward_as(const Runtime& runtime, const Arguments& args, const OptionalTensor& relevance,
                bool keep_first, const ForwardResult& result) {
  const auto& [output, lse, last, memory_index, memory_relevance] = result;
  const RelevancyForward<S> call{args.as<S>(),
                                 data<S>(relevance),
                                 keep_first,
                                 mutable_data<S>(output),
                                 mutable_data<S>(lse),
                                 mutable_data<int64_t>(last),
                                 mutable_data<int64_t>(memory_index),
                                 mutable_data<S>(memory_relevance)};
  cpu_kernels().relevancy->forward(call, runtime);
}

ForwardResult relevancy_forward(const Tensor query, const Tensor key, const Tensor value,
                                const OptionalTensor score_weight, const OptionalTensor lengths,
                                const OptionalTensor relevance, int64_t retained,
                                int64_t window_size, int64_t top_k, double scale, bool keep_first) {
  Call operation(kRelevancyForward);
  const char* op = "throughtime::relevancy_forward";
  const Arguments args(op, query, key, value, score_weight, lengths, retained, window_size, top_k,
                       scale);
  const RelevancyShape& s = args.shape;
  STD_TORCH_CHECK(relevance || s.screening.P == 0, op, ": relevance should be given for the ",
                  s.screening.P, " keys of an earlier call");
  if (relevance) args.check(op, "relevance", *relevance, {s.B, s.heads, s.screening.P});
  const OptionalTensor before = dense(relevance);
  const int64_t left = s.screening.memory_after();
  operation.checked();
  const ForwardResult result{
      pooled({s.B, s.heads, s.T(), s.Dv}, args.dtype), pooled({s.B, s.heads, s.T()}, args.dtype),
      pooled({s.B, s.heads, s.screening.S()}, ScalarType::Long),
      pooled({s.B, s.heads, left}, ScalarType::Long), pooled({s.B, s.heads, left}, args.dtype)};
  operation.allocated();
  if (s.sequences() == 0) return result;
  if (args.dtype == ScalarType::Float) {
    forward_as<float>(operation.runtime(), args, before, keep_first, result);
  } else {
    forward_as<double>(operation.runtime(), args, before, keep_first, result);
  }
  return result;
}

using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <typename S>
void backward_as(const Runtime& runtime, const Arguments& args, const Tensor& grad_output,
                 const Tensor& last, const BackwardResult& result) {
  const auto& [grad_query, grad_key, grad_value, grad_score_weight] = result;
  const RelevancyBackward<S> call{args.as<S>(),
                                  sequences<S>(grad_output),
                                  data<int64_t>(last),
                                  mutable_data<S>(grad_query),
                                  mutable_data<S>(grad_key),
                                  mutable_data<S>(grad_value),
                                  mutable_data<S>(grad_score_weight)};
  cpu_kernels().relevancy->backward(call, runtime);
}

BackwardResult relevancy_backward(const Tensor grad_output, const Tensor query, const Tensor key,
                                  const Tensor value, const OptionalTensor score_weight,
                                  const OptionalTensor lengths, const Tensor output,
                                  const Tensor lse, const Tensor last, int64_t retained,
                                  int64_t window_size, double scale) {
  Call operation(kRelevancyBackward);
  const char* op = "throughtime::relevancy_backward";
  const Arguments args(op, query, key, value, score_weight, lengths, retained, window_size,
                       retained, scale);
  const RelevancyShape& s = args.shape;
  args.check(op, "grad_output", grad_output, {s.B, s.heads, s.T(), s.Dv});
  args.check(op, "output", output, {s.B, s.heads, s.T(), s.Dv});
  args.check(op, "lse", lse, {s.B, s.heads, s.T()});
  check_cpu(op, "last", last);
  check_shape(op, "last", last, {s.B, s.heads, s.screening.S()});
  check_dtype(op, "last", last, ScalarType::Long);
  operation.checked();
  const BackwardResult result{
      pooled({s.B, s.heads, s.T(), s.D}, args.dtype),
      pooled({s.B, s.heads, s.screening.S(), s.D}, args.dtype),
      pooled({s.B, s.heads, s.screening.S(), s.Dv}, args.dtype),
      score_weight ? pooled({s.heads, s.D}, args.dtype) : pooled({0}, args.dtype)};
  operation.allocated();
  if (s.sequences() == 0) {
    fill_zero(std::get<3>(result));
    return result;
  }
  const Tensor grad = with_dense_rows(grad_output), until = dense(last);
  if (args.dtype == ScalarType::Float) {
    backward_as<float>(operation.runtime(), args, grad, until, result);
  } else {
    backward_as<double>(operation.runtime(), args, grad, until, result);
  }
  return result;
}

}  // namespace
}  // namespace throughtime

STABLE_TORCH_LIBRARY_IMPL(throughtime, CPU, library) {
  library.impl("relevancy_forward", TORCH_BOX(&throughtime::relevancy_forward));
  library.impl("relevancy_backward", TORCH_BOX(&throughtime::relevancy_backward));
}
