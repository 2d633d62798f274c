// relevancy/cpu/screening.h: one sequence, forward by Screening and backward by Replay.
#include "relevancy/cpu/screening.h"

#include <vector>

#include "export.h"

using namespace throughtime;

namespace {

// shape: T, P, R, window_size, top_k, length, screen_every, seen. attention [T, S] is by position; listed [2, T, S] are
// the candidates of every step, -1 after them, by Screening and by Replay. Returns retained_at_end.
template <typename S>
int64_t screen(const int64_t* shape, int64_t keep_first, const S* before, const S* attention,
               int64_t* listed, int64_t* last, int64_t* index, S* relevance) {
  const ScreeningShape s{shape[0], shape[1], shape[2], shape[3], shape[4], shape[6]};
  const int64_t length = shape[5], positions = s.positions();
  const Steps steps{length, shape[7]};
  std::vector<S> scratch(positions);
  std::vector<int64_t> kept(positions + 1), ended(s.T), next(positions), kept_again(positions);
  const auto list = [&](const Candidates& candidates, int64_t* to) {
    candidates.each([&](int64_t c, int64_t position) { to[c] = position; });
  };
  Screening<S> screening(s, steps, {keep_first != 0}, {before, 1}, {last, 1}, scratch.data(),
                         kept.data());
  for (int64_t step = 0; step < length; ++step) {
    list(screening.candidates(step), listed + step * positions);
    screening.advance(step, attention + step * positions);
  }
  screening.finish();
  screening.leave({index, 1}, {relevance, 1});
  Replay replay(s, steps, {last, 1}, ended.data(), next.data(), kept_again.data());
  for (int64_t step = length - 1; step >= 0; --step)
    list(replay.candidates(step), listed + (s.T + step) * positions);
  return retained_at_end(s, steps, {last, 1});
}

// Sizes of what is left for the next call: retained, window.
void sizes_after(const int64_t* shape, int64_t* out) {
  const ScreeningShape s{shape[0], shape[1], shape[2], shape[3], shape[4], shape[6]};
  out[0] = s.retained_after();
  out[1] = s.window_after();
}

}  // namespace

EXPORT(screen)
EXPORT_PLAIN(sizes_after)
