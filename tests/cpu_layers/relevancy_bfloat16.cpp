// relevancy/cpu/bfloat16_kernels.cpp: relevancy attention with bfloat16 operands, also on a stand-in for
// AMX.
#include "export.h"
#include "pointers.h"
#include "relevancy/cpu/bfloat16_kernels.cpp"
#include "threads.h"

using namespace throughtime;

namespace {

// sizes: samples, heads of keys, group, D, Dv, T of the longest, P, retained, window_size, top_k,
// screen_every, T of the tensors, keep_first, normalize, threads.
RelevancyInput<BFloat16> input(const int64_t* n, Pointers& next) {
  const int64_t total = n[11], keys = n[6] + total;
  const auto dense = [&](int64_t heads, int64_t rows, int64_t features) {
    return Sequences<BFloat16>{next, heads * rows * features, rows * features, features};
  };
  return {.shape = {.B = n[0],
                    .heads = n[1],
                    .D = n[3],
                    .Dv = n[4],
                    .screening = {n[5], n[6], n[7], n[8], n[9], n[10]},
                    .group = n[2],
                    .total = total},
          .query = dense(n[1] * n[2], total, n[3]),
          .key = dense(n[1], keys, n[3]),
          .value = dense(n[1], keys, n[4]),
          .score = ScoreKind::kDot,
          .score_weight = nullptr,
          .steps = {n[5], next, next, next},
          .scale = *static_cast<const float*>(next)};
}

void run_forward(const int64_t* sizes, void* const* arguments) {
  Pointers next{arguments};
  const RelevancyForward<BFloat16> pass{.in = input(sizes, next),
                                        .relevance = next,
                                        .keep_first = sizes[12] != 0,
                                        .given = next,
                                        .normalize = sizes[13] != 0,
                                        .output = next,
                                        .lse = next,
                                        .last = next,
                                        .memory_index = next,
                                        .memory_relevance = next,
                                        .received = next};
  TT_KERNELS(relevancy_bfloat16).forward(pass, on_threads(sizes[14]));
}

void run_backward(const int64_t* sizes, void* const* arguments) {
  Pointers next{arguments};
  const auto in = input(sizes, next);
  const int64_t row = sizes[4], head = sizes[11] * row;
  const RelevancyBackward<BFloat16> pass{
      .in = in,
      .grad_output = {next, sizes[1] * sizes[2] * head, head, row},
      .last = next,
      .grad_query = next,
      .grad_key = next,
      .grad_value = next,
      .grad_score_weight = nullptr};
  TT_KERNELS(relevancy_bfloat16).backward(pass, on_threads(sizes[14]));
}

}  // namespace

EXPORT_AS(forward_bf16, run_forward)
EXPORT_AS(backward_bf16, run_backward)
