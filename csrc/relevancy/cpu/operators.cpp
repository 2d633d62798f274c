// throughtime::relevancy_forward and relevancy_backward on the CPU: check, lay out, run.
//
// What the arguments mean: python/throughtime/ops/relevancy/arguments.py.
#include <tuple>

#include "common/cpu/call.h"
#include "common/cpu/row_order.h"
#include "common/operator.h"
#include "relevancy/cpu/checks.h"
#include "relevancy/cpu/kernels.h"

namespace throughtime {

TT_KERNEL_TABLES(RelevancyKernels, relevancy)
TT_BFLOAT16_TABLES(RelevancyBFloat16Kernels, relevancy_bfloat16)

namespace {

struct RelevancyArguments {
  Tensor query, key, value;
  Maybe score_weight, lengths, relevance;
  int64_t retained, window_size, top_k;
  double scale;
  bool keep_first;
  int64_t screen_every;
  Maybe seen, given;
  bool normalize, return_relevance;
  Maybe cu_seqlens;
};

struct ForwardCall {
  RelevancyArguments args;
};

struct BackwardCall {
  Tensor grad_output;
  RelevancyArguments args;
  Tensor output, lse, last;
};

Tensor with_dense_rows(const Tensor& tensor) {
  return tensor.stride(3) == 1 ? tensor : dense(tensor);
}

template <typename X>
Sequences<X> sequences(const Tensor& tensor) {
  return {data<X>(tensor), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// Sizes of a call whose arguments fit, but for those of packed samples.
RelevancyShape checked(const RelevancyArguments& a) {
  check_dims("query", a.query, "[B, heads, T, D]");
  check_dims("key", a.key, "[B, key heads, P + T, D]");
  check_dims("value", a.value, "[B, key heads, P + T, Dv]");
  check_dtype("query", a.query, relevancy_bfloat16_kernels() && !a.score_weight);
  const int64_t B = a.query.size(0), heads = a.query.size(1), of_keys = a.key.size(1);
  const int64_t T = a.query.size(2), P = a.key.size(2) - T;
  TT_CHECK_CALL(P >= 0 && a.retained <= P, "key should have the T = ", T,
                " keys of query and at least `retained` more, got ", a.key.size(2),
                " with retained = ", a.retained);
  TT_CHECK_CALL(of_keys ? heads % of_keys == 0 : heads == 0,
                "query should have a multiple of the key's ", of_keys, " heads, got ", heads);
  const ScreeningShape screening{T, P, a.retained, a.window_size, a.top_k, a.screen_every};
  check_memory(screening);
  const RelevancyShape s{.B = B,
                         .heads = of_keys,
                         .D = a.query.size(3),
                         .Dv = a.value.size(3),
                         .screening = screening,
                         .group = of_keys ? heads / of_keys : 1};
  TT_CHECK_CALL(s.D > 0, "query should have at least one feature, got none");
  const ScalarType dtype = a.query.scalar_type();
  check_argument("query", a.query, {B, heads, T, s.D}, dtype);
  check_argument("key", a.key, {B, of_keys, P + T, s.D}, dtype);
  check_argument("value", a.value, {B, of_keys, P + T, s.Dv}, dtype);
  check_argument("score_weight", a.score_weight, {heads, s.D}, dtype);
  check_argument("relevance", a.relevance, {B, of_keys, P}, sums_of(dtype));
  check_argument("given", a.given, {B, of_keys, T}, sums_of(dtype));
  return s;
}

// Where packed samples begin and end, checked and contiguous.
OptionalTensor checked_starts(const RelevancyArguments& a, const RelevancyShape& s) {
  if (!a.cu_seqlens) return {};
  check_dims("cu_seqlens", *a.cu_seqlens, "[samples + 1]");
  const int64_t count = a.cu_seqlens->size(0), T = s.total;
  check_argument("cu_seqlens", a.cu_seqlens, {count}, ScalarType::Long);
  TT_CHECK_CALL(s.B == 1 && s.screening.P == 0 && !a.lengths && !a.seen && count > 0,
                "cu_seqlens [samples + 1] should come with a batch of 1, without lengths and an "
                "earlier call");
  const OptionalTensor contiguous = dense(a.cu_seqlens);
  const int64_t* at = data<int64_t>(contiguous);
  TT_CHECK_CALL(at[0] == 0 && at[count - 1] == T,
                "cu_seqlens should begin with 0 and end with T = ", T, ", got ", at[0], " and ",
                at[count - 1]);
  for (int64_t b = 1; b < count; ++b)
    TT_CHECK_CALL(at[b - 1] <= at[b], "cu_seqlens should not fall, got ", at[b - 1], " and then ",
                  at[b]);
  return contiguous;
}

// The shape of packed samples, or of those of a batch.
RelevancyShape with_starts(RelevancyShape s, const OptionalTensor& starts) {
  if (!starts) return s;
  const int64_t* at = data<int64_t>(starts);
  s.B = starts->size(0) - 1;
  s.screening.T = 0;
  for (int64_t b = 0; b < s.B; ++b) s.screening.T = most(s.screening.T, at[b + 1] - at[b]);
  return s;
}

// Queries of earlier calls, checked and contiguous.
OptionalTensor checked_seen(const OptionalTensor& seen, int64_t batch) {
  check_argument("seen", seen, {batch}, ScalarType::Long);
  const OptionalTensor contiguous = dense(seen);
  const int64_t* values = data<int64_t>(contiguous);
  for (int64_t b = 0; values && b < batch; ++b)
    TT_CHECK_CALL(values[b] >= 0, "seen should be at least 0, got ", values[b], " for sample ", b);
  return contiguous;
}

// The tensors that both passes take, as the kernels want them; all are checked before any is copied.
class Attention {
 public:
  explicit Attention(const RelevancyArguments& args)
      : tensors(checked(args)),
        dtype(args.query.scalar_type()),
        sums(sums_of(dtype)),
        args_(args),
        lengths_(checked_lengths(args.lengths, tensors.B, tensors.T())),
        seen_(checked_seen(args.seen, tensors.B)),
        starts_(checked_starts(args, tensors)),
        shape(with_starts(tensors, starts_)) {}

  void lay_out() {
    for (Tensor* x : {&args_.query, &args_.key, &args_.value}) *x = with_dense_rows(*x);
    args_.score_weight = Maybe(dense(args_.score_weight));
  }

  // last [B, key heads, S], dense.
  void check_last(const Tensor& last) const {
    for (int64_t n = 0; n < shape.sequences(); ++n) {
      const SequencePlace at = place(n);
      LastCheck(at.screening)(data<int64_t>(last) + at.first_position, 1, at.steps);
    }
  }

  Tensor make(std::initializer_list<int64_t> sizes, bool wanted = true) const {
    return wanted ? pooled(sizes, dtype) : pooled({0}, dtype);
  }
  Tensor make_sums(std::initializer_list<int64_t> sizes) const { return pooled(sizes, sums); }

  // Relevance in place of attention, [B, key heads, T], dense.
  template <typename S>
  void check_given(const S* given) const {
    for (int64_t n = 0; given && n < shape.sequences(); ++n) {
      const SequencePlace at = place(n);
      const S* own = given + at.first_position - n * shape.screening.P;
      for (int64_t t = 0; t < at.steps.length; ++t)
        TT_CHECK_CALL(own[t] >= S(0), "given should hold numbers from 0, got ", own[t], " for key ",
                      t, " of sequence ", n);
    }
  }

  bool empty() const { return shape.sequences() == 0 || shape.screening.positions() == 0; }

  template <typename X>
  RelevancyInput<X> as() const {
    return {.shape = shape,
            .query = sequences<X>(args_.query),
            .key = sequences<X>(args_.key),
            .value = sequences<X>(args_.value),
            .score = args_.score_weight ? ScoreKind::kAdditive : ScoreKind::kDot,
            .score_weight = data<X>(args_.score_weight),
            .steps = steps(),
            .scale = static_cast<SumOf<X>>(args_.scale)};
  }

  const RelevancyShape tensors;  // of the tensors, whose batch packed samples share
  const ScalarType dtype, sums;

 private:
  SampleSteps steps() const {
    return {shape.T(), data<int64_t>(lengths_), data<int64_t>(seen_), data<int64_t>(starts_)};
  }
  SequencePlace place(int64_t n) const { return {shape, steps(), n}; }

  RelevancyArguments args_;
  OptionalTensor lengths_, seen_, starts_;

 public:
  const RelevancyShape shape;
};

void run(const RelevancyForward<BFloat16>& pass, const Runtime& runtime) {
  relevancy_bfloat16_kernels()->forward(pass, runtime);
}
void run(const RelevancyBackward<BFloat16>& pass, const Runtime& runtime) {
  relevancy_bfloat16_kernels()->backward(pass, runtime);
}
template <typename S>
void run(const RelevancyForward<S>& pass, const Runtime& runtime) {
  relevancy_kernels().forward(pass, runtime);
}
template <typename S>
void run(const RelevancyBackward<S>& pass, const Runtime& runtime) {
  relevancy_kernels().backward(pass, runtime);
}

Operator forward_operator("relevancy_forward"), backward_operator("relevancy_backward");

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(ForwardCall& call) {
  Call operation(forward_operator);
  Attention attention(call.args);
  const RelevancyShape& s = attention.tensors;
  TT_CHECK_CALL(call.args.relevance || s.screening.P == 0, "relevance should be given for the ",
                s.screening.P, " keys of an earlier call");
  attention.lay_out();
  const OptionalTensor before = dense(call.args.relevance), given = dense(call.args.given);
  const bool packed = call.args.cu_seqlens.has_value();  // no call follows
  const int64_t left = packed ? 0 : s.screening.memory_after(), heads = s.heads * s.group;
  operation.checked();
  const Tensor output = attention.make({s.B, heads, s.T(), s.Dv}),
               lse = attention.make_sums({s.B, heads, s.T()}),
               last = pooled({s.B, s.heads, s.screening.positions()}, ScalarType::Long),
               memory_index = pooled({s.B, s.heads, left}, ScalarType::Long),
               memory_relevance = attention.make_sums({s.B, s.heads, left}),
               received = attention.make_sums(
                   {s.B, s.heads, call.args.return_relevance ? s.screening.positions() : 0});
  operation.allocated();
  if (!attention.empty()) {
    with_number(attention.dtype, [&](auto zero) {
      using X = decltype(zero);
      using S = SumOf<X>;
      attention.check_given(data<S>(given));
      const RelevancyForward<X> pass{
          .in = attention.as<X>(),
          .relevance = data<S>(before),
          .keep_first = call.args.keep_first,
          .given = data<S>(given),
          .normalize = call.args.normalize,
          .output = mutable_data<X>(output),
          .lse = mutable_data<S>(lse),
          .last = mutable_data<int64_t>(last),
          .memory_index = packed ? nullptr : mutable_data<int64_t>(memory_index),
          .memory_relevance = mutable_data<S>(memory_relevance),
          .received = call.args.return_relevance ? mutable_data<S>(received) : nullptr};
      run(pass, operation.runtime());
    });
  }
  return {output, lse, last, memory_index, memory_relevance, received};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(BackwardCall& call) {
  Call operation(backward_operator);
  // No key joins the retained set here: `last` says what was attended.
  call.args.top_k = call.args.retained;
  Attention attention(call.args);
  const RelevancyShape& s = attention.tensors;
  const int64_t heads = s.heads * s.group;
  check_argument("grad_output", call.grad_output, {s.B, heads, s.T(), s.Dv}, attention.dtype);
  check_argument("output", call.output, {s.B, heads, s.T(), s.Dv}, attention.dtype);
  check_argument("lse", call.lse, {s.B, heads, s.T()}, attention.sums);
  check_argument("last", call.last, {s.B, s.heads, s.screening.positions()}, ScalarType::Long);
  attention.lay_out();
  operation.checked();
  const Tensor grad_query = attention.make({s.B, heads, s.T(), s.D}),
               grad_key = attention.make({s.B, s.heads, s.screening.positions(), s.D}),
               grad_value = attention.make({s.B, s.heads, s.screening.positions(), s.Dv}),
               grad_score_weight = attention.make({heads, s.D}, call.args.score_weight.has_value());
  operation.allocated();
  if (attention.empty()) {
    fill_zero(grad_score_weight);
  } else {
    const Tensor grad = with_dense_rows(call.grad_output), last = dense(call.last);
    attention.check_last(last);
    with_number(attention.dtype, [&](auto zero) {
      using X = decltype(zero);
      const RelevancyBackward<X> pass{.in = attention.as<X>(),
                                      .grad_output = sequences<X>(grad),
                                      .last = data<int64_t>(last),
                                      .grad_query = mutable_data<X>(grad_query),
                                      .grad_key = mutable_data<X>(grad_key),
                                      .grad_value = mutable_data<X>(grad_value),
                                      .grad_score_weight = mutable_data<X>(grad_score_weight)};
      run(pass, operation.runtime());
    });
  }
  return {grad_query, grad_key, grad_value, grad_score_weight};
}

}  // namespace
}  // namespace throughtime

STABLE_TORCH_LIBRARY_IMPL(throughtime, CPU, library) {
  library.impl("relevancy_forward", &throughtime::boxed<throughtime::forward>);
  library.impl("relevancy_backward", &throughtime::boxed<throughtime::backward>);
}
