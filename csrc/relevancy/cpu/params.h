// Arguments of the relevancy attention kernels: plain structures without torch.
//
// Positions are counted on one axis of P + T keys: R slots of the retained set and V slots of the
// window of an earlier call, pending keys included (P = R + V, a slot may be empty), then the T keys
// of this call.
#pragma once

#include <cstdint>

#include "common/inline.h"
#include "common/scalars.h"
#include "common/sizes.h"

namespace throughtime {

// The sizes that decide which keys a query attends.
struct ScreeningShape {
  int64_t T, P, R;
  int64_t window_size;       // >= 1
  int64_t top_k;             // >= 0
  int64_t screen_every = 1;  // queries from one border to the next, >= 1: see screening.h

  TT_INLINE int64_t positions() const { return P + T; }
  // Sizes of the memory for the next call.
  TT_INLINE int64_t retained_after() const {
    // window_size + top_k would overflow: both may be the largest integer.
    return least(top_k, R + most(0, (P - R) + T - (window_size - 1)));
  }
  TT_INLINE int64_t window_after() const { return least(most_recent() - 1, (P - R) + T); }
  TT_INLINE int64_t memory_after() const { return retained_after() + window_after(); }
  // Keys of the window, and pending ones before it.
  TT_INLINE int64_t most_recent() const {
    return least(window_size, kTooMany) + least(screen_every, kTooMany) - 1;
  }
  TT_INLINE int64_t most_in_window() const { return least(most_recent(), positions()); }
  TT_INLINE int64_t most_retained() const { return least(top_k, positions()); }
};

// What one sequence has of them.
struct Steps {
  int64_t length;    // queries in this call
  int64_t seen = 0;  // queries of earlier calls
};

struct SampleSteps {
  int64_t T;
  const int64_t* lengths;           // [B] or null
  const int64_t* seen;              // [B], queries of earlier calls, or null
  const int64_t* starts = nullptr;  // [B + 1], or null: see RelevancyShape

  TT_INLINE Steps operator()(int64_t b) const {
    const int64_t length = starts ? starts[b + 1] - starts[b] : lengths ? lengths[b] : T;
    return {length, seen ? seen[b] : 0};
  }
};

// A sequence is a sample and a head of keys, which `group` consecutive heads of queries attend.
//
// Samples lie in a batch, or packed: one behind the other in the time of a batch of one, sample b in
// [starts[b], starts[b + 1]).
struct RelevancyShape {
  int64_t B, heads, D, Dv;
  ScreeningShape screening;  // T is that of the longest sample
  int64_t group = 1;
  int64_t total = screening.T;  // queries in the time of a tensor

  TT_INLINE int64_t T() const { return screening.T; }
  TT_INLINE int64_t sequences() const { return times(B, heads); }
  TT_INLINE int64_t query_sequences() const { return times(B, heads, group); }
};

// Where a sequence lies: in tensors of the batch, of queries [.., total] and of keys [.., P + total].
struct SequencePlace {
  int64_t number, sample, head;  // number = sample heads + head
  Steps steps;
  ScreeningShape screening;  // T: queries that there is room for
  int64_t batch, first;      // index in the batch, and first query in its time
  int64_t first_query;       // among all rows of queries, of the first head of the group
  int64_t next_head;         // so many rows later the next head of the group has its own
  int64_t first_position;    // among all rows of keys

  TT_INLINE SequencePlace(const RelevancyShape& shape, const SampleSteps& samples, int64_t n)
      : number(n),
        sample(n / shape.heads),
        head(n % shape.heads),
        steps(samples(sample)),
        screening(shape.screening),
        batch(samples.starts ? 0 : sample),
        first(samples.starts ? samples.starts[sample] : 0),
        first_query((batch * shape.heads + head) * shape.group * shape.total + first),
        next_head(shape.total),
        first_position((batch * shape.heads + head) * (screening.P + shape.total) + first) {
    if (samples.starts) screening.T = steps.length;
  }
  TT_INLINE int64_t positions() const { return screening.P + steps.length; }  // that are there
};

// A tensor [B, heads, time, features] with contiguous features.
template <typename S>
struct Sequences {
  const S* at;
  int64_t stride_b, stride_h, stride_t;

  // Rows of a sequence, of the first of `heads` heads.
  TT_INLINE const S* of(const SequencePlace& place, int64_t heads = 1) const {
    return at + place.batch * stride_b + place.head * heads * stride_h + place.first * stride_t;
  }
};

enum class ScoreKind { kDot, kAdditive };  // see scores.h

// X is the type of what has features; all else has the type of the sums.
template <typename X>
struct RelevancyInput {
  using S = SumOf<X>;

  RelevancyShape shape;
  Sequences<X> query, key, value;
  ScoreKind score;
  const X* score_weight;  // [heads group, D], or null for a score without
  SampleSteps steps;
  S scale;  // of the dot product

  TT_INLINE SequencePlace place(int64_t n) const { return {shape, steps, n}; }
};

template <typename X>
struct RelevancyForward {
  using S = SumOf<X>;

  RelevancyInput<X> in;
  const S* relevance;     // [B, heads, P], negative where a slot is empty; null if P = 0
  bool keep_first;        // relevance stays zero, so the first keys are retained
  const S* given;         // [B, heads, T], relevance of this call's keys, or null
  bool normalize;         // attention counts as often as its query has candidates
  X* output;              // [B, heads group, T, Dv]
  S* lse;                 // [B, heads group, T]
  int64_t* last;          // [B, heads, P + T]
  int64_t* memory_index;  // [B, heads, memory_after], or null: no call follows
  S* memory_relevance;    // [B, heads, memory_after]
  S* received;            // [B, heads, P + T], relevance after the last query, or null
};

template <typename X>
struct RelevancyBackward {
  RelevancyInput<X> in;
  Sequences<X> grad_output;
  const int64_t* last;   // [B, heads, P + T]
  X* grad_query;         // [B, heads group, T, D]
  X* grad_key;           // [B, heads, P + T, D]
  X* grad_value;         // [B, heads, P + T, Dv]
  X* grad_score_weight;  // [heads group, D] or null
};

}  // namespace throughtime
