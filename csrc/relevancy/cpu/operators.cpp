// throughtime::relevancy_forward and relevancy_backward on the CPU: check, lay out, run.
//
// Schemas and their documentation: python/throughtime/ops/relevancy.py.
#include <tuple>

#include "common/cpu/cpu.h"
#include "common/cpu/row_order.h"
#include "common/tensors.h"
#include "relevancy/cpu/checks.h"
#include "relevancy/cpu/params.h"

namespace throughtime {
namespace {

Tensor with_dense_rows(const Tensor& tensor) {
  return tensor.stride(3) == 1 ? tensor : dense(tensor);
}

template <typename S>
Sequences<S> sequences(const Tensor& tensor) {
  return {data<S>(tensor), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// Sizes of a call, once all that both passes take is known to fit.
RelevancyShape checked(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
                       const OptionalTensor& score_weight, int64_t retained, int64_t window_size,
                       int64_t top_k) {
  check_dims(op, "query", query, "[B, heads, T, D]");
  check_dims(op, "key", key, "[B, heads, P + T, D]");
  check_dims(op, "value", value, "[B, heads, P + T, Dv]");
  check_real(op, "query", query);
  const int64_t T = query.size(2), P = key.size(2) - T;
  TT_CHECK(P >= 0 && retained <= P, op, ": key should have the T = ", T,
           " keys of query and at least `retained` more, got ", key.size(2),
           " with retained = ", retained);
  check_memory(op, {T, P, retained, window_size, top_k});
  const RelevancyShape s{query.size(0),
                         query.size(1),
                         query.size(3),
                         value.size(3),
                         {T, P, retained, window_size, top_k}};
  TT_CHECK(s.D > 0, op, ": query should have at least one feature, got none");
  const ScalarType dtype = query.scalar_type();
  check_argument(op, "query", query, {s.B, s.heads, T, s.D}, dtype);
  check_argument(op, "key", key, {s.B, s.heads, P + T, s.D}, dtype);
  check_argument(op, "value", value, {s.B, s.heads, P + T, s.Dv}, dtype);
  check_argument(op, "score_weight", score_weight, {s.heads, s.D}, dtype);
  return s;
}

// The tensors that both passes take, dense and as the kernels want them; all are checked before any
// is copied.
class Arguments {
 public:
  Arguments(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
            const OptionalTensor& score_weight, const OptionalTensor& lengths, int64_t retained,
            int64_t window_size, int64_t top_k, double scale)
      : shape(checked(op, query, key, value, score_weight, retained, window_size, top_k)),
        dtype(query.scalar_type()),
        op_(op),
        query_(with_dense_rows(query)),
        key_(with_dense_rows(key)),
        value_(with_dense_rows(value)),
        score_weight_(dense(score_weight)),
        lengths_(checked_lengths(op, lengths, shape.B, shape.T())),
        scale_(scale) {}

  void check(const char* name, const OptionalTensor& tensor,
             std::initializer_list<int64_t> sizes) const {
    check_argument(op_, name, tensor, sizes, dtype);
  }

  // last [B, heads, P + T], dense.
  void check_last(const Tensor& last) const {
    LastCheck check(op_, shape.screening);
    for (int64_t n = 0; n < shape.sequences(); ++n)
      check(data<int64_t>(last) + n * shape.screening.positions(), 1,
            lengths_ ? data<int64_t>(lengths_)[n / shape.heads] : shape.T());
  }

  Tensor make(std::initializer_list<int64_t> sizes, bool wanted = true) const {
    return wanted ? pooled(sizes, dtype) : pooled({0}, dtype);
  }

  template <typename S>
  RelevancyInput<S> as() const {
    return {shape,
            sequences<S>(query_),
            sequences<S>(key_),
            sequences<S>(value_),
            score_weight_ ? ScoreKind::kAdditive : ScoreKind::kDot,
            data<S>(score_weight_),
            data<int64_t>(lengths_),
            static_cast<S>(scale_)};
  }

  RelevancyShape shape;
  ScalarType dtype;

 private:
  const char* op_;
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
  TT_CHECK(relevance || s.screening.P == 0, op, ": relevance should be given for the ",
           s.screening.P, " keys of an earlier call");
  args.check("relevance", relevance, {s.B, s.heads, s.screening.P});
  const OptionalTensor before = dense(relevance);
  const int64_t left = s.screening.memory_after();
  operation.checked();
  const ForwardResult result{
      args.make({s.B, s.heads, s.T(), s.Dv}), args.make({s.B, s.heads, s.T()}),
      pooled({s.B, s.heads, s.screening.positions()}, ScalarType::Long),
      pooled({s.B, s.heads, left}, ScalarType::Long), args.make({s.B, s.heads, left})};
  operation.allocated();
  if (s.sequences() == 0 || s.screening.positions() == 0) return result;
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
  args.check("grad_output", grad_output, {s.B, s.heads, s.T(), s.Dv});
  args.check("output", output, {s.B, s.heads, s.T(), s.Dv});
  args.check("lse", lse, {s.B, s.heads, s.T()});
  check_argument(op, "last", last, {s.B, s.heads, s.screening.positions()}, ScalarType::Long);
  operation.checked();
  const BackwardResult result{args.make({s.B, s.heads, s.T(), s.D}),
                              args.make({s.B, s.heads, s.screening.positions(), s.D}),
                              args.make({s.B, s.heads, s.screening.positions(), s.Dv}),
                              args.make({s.heads, s.D}, score_weight.has_value())};
  operation.allocated();
  if (s.sequences() == 0 || s.screening.positions() == 0) {
    fill_zero(std::get<3>(result));
    return result;
  }
  const Tensor grad = with_dense_rows(grad_output), until = dense(last);
  args.check_last(until);
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
