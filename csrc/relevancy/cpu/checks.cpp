#include "relevancy/cpu/checks.h"

#include "common/tensors.h"

namespace throughtime {

void check_memory(const ScreeningShape& s) {
  TT_CHECK_CALL(s.window_size >= 1 && s.top_k >= 0,
                "window_size should be at least 1 and top_k at least 0, got ", s.window_size,
                " and ", s.top_k);
  TT_CHECK_CALL(s.screen_every >= 1, "screen_every should be at least 1, got ", s.screen_every);
  TT_CHECK_CALL(s.P < kTooMany && s.T < kTooMany, s.P, " positions of an earlier call and ", s.T,
                " of this one are more than any memory can hold");
  TT_CHECK_CALL(0 <= s.R && s.R <= s.P, "retained should be in [0, ", s.P,
                "], the positions of an earlier call; got ", s.R);
  TT_CHECK_CALL(s.R <= s.top_k && s.P - s.R <= s.most_recent() - 1,
                "an earlier call leaves at most top_k = ", s.top_k,
                " retained positions and window_size + screen_every - 2 = ", s.most_recent() - 1,
                " others, got ", s.R, " and ", s.P - s.R);
}

// In a call of n queries, key p (of the window or of query p - P) stays in the window until query
// p - P + window_size - 1, and is attended until the border after that. Then it is retained, or that
// border is its last query; at a later border a key that leaves may replace it. So a border is the
// last query of at most as many keys as compete there, and no other query is, but for the last one.
void LastCheck::operator()(const int64_t* last, int64_t stride, Steps steps) {
  const ScreeningShape& s = shape_;
  const int64_t n = steps.length;
  const auto fits = [&](bool truth, int64_t p) {
    TT_CHECK_CALL(truth, "last should be that of the forward pass, got ", last[p * stride],
                  " at position ", p, " of a sequence of ", n, " queries");
  };
  ends_.assign(s.T, 0);
  int64_t first = s.R;  // of the window: slots before it are empty
  while (first < s.P && last[first * stride] < 0) ++first;
  const int64_t window = least(s.window_size, kTooMany), every = least(s.screen_every, kTooMany);
  const int64_t full = first - s.P + window - 1;  // after this query the first key leaves
  // Queries after `step` until the next border.
  const auto to_border = [&](int64_t step) {
    return every - 1 - (steps.seen % every + step) % every;
  };
  for (int64_t p = 0; p < s.positions(); ++p) {
    const int64_t end = last[p * stride];
    const bool may_be_empty = p < first || p >= s.P + n;
    if (may_be_empty && end == -1) continue;
    fits(p < s.P + n && end >= 0 && end < n, p);
    if (end == n - 1) continue;
    const int64_t leaves = p < s.R ? 0 : most(0, p - s.P + window - 1);
    fits(to_border(end) == 0 && end >= leaves, p);
    fits(++ends_[end] <= least(every, end - full + 1), p);
  }
}

}  // namespace throughtime
