// Relevancy screening of one sequence: which keys a query attends.
//
//   relevance_j += attention that query i pays to j         for j in the window of i
//   after query i, j = (own position of i) - window_size + 1 leaves the window and is pending
//   after query i, if it is a border, the pending keys compete, one after the other, for the
//   retained set: the top_k of largest relevance, the earlier key first among equals
//
// Every screen_every-th query of a sequence is a border. Pending keys are attended.
//
// Consecutive queries attend a key. The backward pass needs only `last`, the last of them: from it
// `Replay` lists the same candidates, from the last step to the first. Candidates are listed by
// position: the retained set, then pending keys and the window.
#pragma once

#include <cstring>

#include "common/cpu/team.h"
#include "relevancy/cpu/params.h"

namespace throughtime {
namespace {

// A column of a matrix of per-sequence numbers.
template <typename N>
struct Column {
  N* at;
  int64_t stride;
  TT_INLINE N& operator[](int64_t i) const { return at[i * stride]; }
};

// Which queries are borders, and where the keys that lie side by side begin.
struct Borders {
  int64_t P, window_size, every, since;
  int64_t first = 0;  // position of the first of these keys in memory

  TT_INLINE Borders(const ScreeningShape& shape, const Steps& steps)
      : P(shape.P),
        window_size(least(shape.window_size, kTooMany)),
        every(least(shape.screen_every, kTooMany)),
        since(steps.seen % every) {}

  // How many queries follow until the next border, the query itself not counted.
  TT_INLINE int64_t until(int64_t step) const { return every - 1 - phase(step); }
  // How many queries up to this one come after the latest border.
  TT_INLINE int64_t passed(int64_t step) const { return phase(step) + 1; }
  // Position of the oldest key that a query attends of the window and the pending keys.
  TT_INLINE int64_t begin(int64_t step) const {
    return most(first, P + step + 1 - window_size - phase(step));
  }

 private:
  // Queries before it that come after the latest border; a division costs as much as ten keys.
  TT_INLINE int64_t phase(int64_t step) const { return every == 1 ? 0 : (since + step) % every; }
};

// Positions of the retained set, ascending, and where pending keys and the window begin.
struct Candidates {
  int64_t* kept;
  int64_t kept_count = 0;
  int64_t window_begin = 0, window_end = 0;

  TT_INLINE int64_t count() const { return kept_count + window_end - window_begin; }

  // Calls f(index, position) for all of them.
  template <typename F>
  TT_INLINE void each(const F& f) const {
    for (int64_t c = 0; c < kept_count; ++c) f(c, kept[c]);
    const int64_t base = kept_count - window_begin;
    for (int64_t position = window_begin; position < window_end; ++position)
      f(base + position, position);
  }

  // Of numbers in that order: where that of a position of the window would lie.
  template <typename S>
  TT_INLINE const S* by_position(const S* numbers) const {
    return numbers + kept_count - window_begin;
  }
};

// What a key competes with: the attention that it receives, if nothing else is said.
template <typename S>
struct Relevance {
  bool keep_first;           // nothing, so that the first keys are retained
  const S* given = nullptr;  // numbers of this call's keys, or null
  bool normalize = false;    // attention counts as often as its query has candidates
  bool returned = false;     // asked for by the caller, also where no key is retained

  TT_INLINE bool adds_up() const { return !keep_first && !given; }
};

template <typename S>
class Screening {
 public:
  // relevance, kept: scratch for shape.positions() numbers and most_retained() + 1 positions.
  Screening(const ScreeningShape& shape, Steps steps, const Relevance<S>& kind,
            Column<const S> before, Column<int64_t> last, S* relevance, int64_t* kept)
      : shape_(shape),
        borders_(shape, steps),
        length_(steps.length),
        kind_(kind),
        needed_(shape.top_k > 0 || kind.returned ? 0
                                                 : shape.P + steps.length - shape.window_after()),
        last_(last),
        relevance_(relevance) {
    candidates_.kept = kept;
    for (int64_t p = 0; p < shape.positions(); ++p) {
      const bool is_given = kind.given && p >= shape.P && p < shape.P + length_;
      relevance_[p] = p < shape.P ? before[p] : is_given ? kind.given[p - shape.P] : S(0);
      last_[p] = -1;
    }
    for (int64_t p = 0; p < shape.R; ++p)
      if (!empty(p)) kept[candidates_.kept_count++] = p;
    int64_t first = shape.R;
    while (first < shape.P && empty(first)) ++first;
    borders_.first = first;
    borders_.first = borders_.begin(0);
  }

  TT_INLINE const Candidates& candidates(int64_t step) {
    candidates_.window_end = shape_.P + step + 1;
    candidates_.window_begin = borders_.begin(step);
    return candidates_;
  }

  // After candidates(), for every query of the step: attention[p] is what it pays to position p of its
  // window.
  TT_INLINE void receive(const S* attention) {
    if (!kind_.adds_up()) return;
    const Candidates& now = candidates_;
    const S factor = kind_.normalize ? static_cast<S>(now.count()) : S(1);
    const int64_t begin = most(most(now.window_begin, leaving()), needed_);
    for (int64_t p = begin; p < now.window_end; ++p) relevance_[p] += attention[p] * factor;
  }

  // Then, once. Before the retained set changes it calls change(rank, position): the rank in it of the
  // key that leaves it, -1 if none does, and the position that joins at its end.
  template <typename F>
  void compete(int64_t step, const F& change) {
    if (borders_.until(step) > 0) return;
    const Candidates& now = candidates_;
    for (int64_t p = now.window_begin; p <= leaving(); ++p) {
      const int64_t dropped = take(p, change);
      if (dropped >= 0) last_[dropped] = step;
    }
  }

  // The same for one query.
  void advance(int64_t step, const S* attention) {
    receive(attention);
    compete(step, [](int64_t, int64_t) {});
  }

  TT_INLINE const Borders& borders() const { return borders_; }

  // After the last step: writes `last` of the keys still attended.
  void finish() {
    const Candidates& now = candidates_;
    if (length_ == 0) return;
    for (int64_t c = 0; c < now.kept_count; ++c) last_[now.kept[c]] = length_ - 1;
    for (int64_t p = now.window_begin; p < shape_.P + length_; ++p) last_[p] = length_ - 1;
  }

  // Writes the next call's memory.
  void leave(Column<int64_t> index, Column<S> relevance) const {
    const Candidates& now = candidates_;
    const int64_t window = shape_.window_after(), retained = shape_.retained_after();
    const int64_t end = shape_.P + length_;
    const int64_t first = borders_.begin(length_);  // of what the next query attends
    for (int64_t slot = 0; slot < retained; ++slot)
      put(slot, slot < now.kept_count ? now.kept[slot] : -1, index, relevance);
    for (int64_t slot = 0; slot < window; ++slot) {
      const int64_t p = end - window + slot;
      put(retained + slot, p < first ? -1 : p, index, relevance);
    }
  }

 private:
  // The latest key that no later query has in its window; may be none.
  TT_INLINE int64_t leaving() const { return candidates_.window_end - borders_.window_size; }

  TT_INLINE bool empty(int64_t p) const { return relevance_[p] < S(0); }

  void put(int64_t slot, int64_t position, Column<int64_t> index, Column<S> relevance) const {
    index[slot] = position;
    relevance[slot] = position < 0 ? S(-1) : relevance_[position];
  }

  // Returns the position that no later query attends, or -1. A key of relevance NaN is forgotten.
  template <typename F>
  int64_t take(int64_t newcomer, const F& change) {
    Candidates& now = candidates_;
    const S relevance = relevance_[newcomer];
    if (!(relevance >= S(0)) || shape_.top_k == 0) return newcomer;
    int64_t dropped = -1;
    if (now.kept_count < shape_.top_k) {
      change(-1, newcomer);
    } else {
      if (weakest_ < 0) weakest_ = weakest();
      if (!(relevance_[now.kept[weakest_]] < relevance)) return newcomer;
      change(weakest_, newcomer);
      dropped = now.kept[weakest_];
      --now.kept_count;
      std::memmove(now.kept + weakest_, now.kept + weakest_ + 1,
                   (now.kept_count - weakest_) * sizeof(int64_t));
    }
    now.kept[now.kept_count++] = newcomer;
    weakest_ = -1;
    return dropped;
  }

  // Rank in the retained set of the least relevant, the newest of equals.
  int64_t weakest() const {
    const Candidates& now = candidates_;
    int64_t found = 0;
    for (int64_t c = 1; c < now.kept_count; ++c)
      if (relevance_[now.kept[c]] <= relevance_[now.kept[found]]) found = c;
    return found;
  }

  ScreeningShape shape_;
  Borders borders_;
  int64_t length_;
  Relevance<S> kind_;
  int64_t needed_;  // from this position on: what the next call takes, if no key is retained
  Column<int64_t> last_;
  S* relevance_;
  Candidates candidates_;
  int64_t weakest_ = -1;  // -1 while it is not known
};

// How many keys the last query attends as retained ones. Their number never falls.
TT_INLINE int64_t retained_at_end(const ScreeningShape& shape, Steps steps,
                                  Column<const int64_t> last) {
  if (steps.length == 0) return 0;
  const int64_t window_begin = Borders(shape, steps).begin(steps.length - 1);
  int64_t count = 0;
  for (int64_t p = 0; p < shape.positions(); ++p)
    count += last[p] == steps.length - 1 && (p < shape.R || p < window_begin);
  return count;
}

// Lists the candidates of every step, from the last step to the first.
class Replay {
 public:
  // ended: scratch for shape.T positions; kept and next: for shape.positions().
  Replay(const ScreeningShape& shape, Steps steps, Column<const int64_t> last, int64_t* ended,
         int64_t* next, int64_t* kept)
      : borders_(shape, steps), ended_(ended), next_(next) {
    const int64_t length = steps.length;
    candidates_.kept = kept;
    for (int64_t step = 0; step < length; ++step) ended[step] = -1;
    borders_.first = shape.R;
    while (borders_.first < shape.P && last[borders_.first] < 0) ++borders_.first;
    if (length == 0) return;
    const int64_t window_begin = borders_.begin(length - 1);
    for (int64_t p = 0; p < shape.positions(); ++p) {
      if (last[p] < 0 || last[p] >= length) continue;
      if (last[p] < length - 1) {
        next[p] = ended[last[p]];
        ended[last[p]] = p;
      } else if (p < shape.R || p < window_begin) {
        kept[candidates_.kept_count++] = p;
      }
    }
  }

  // Call it for step = length - 1, ..., 0.
  const Candidates& candidates(int64_t step) {
    Candidates& now = candidates_;
    now.window_end = borders_.P + step + 1;
    now.window_begin = borders_.begin(step);
    // Keys that were retained after this step, the newest of them, are pending again.
    while (now.kept_count > 0 && now.kept[now.kept_count - 1] >= now.window_begin) --now.kept_count;
    for (int64_t back = ended_[step]; back >= 0; back = next_[back])
      if (back < now.window_begin) insert(back);
    return now;
  }

 private:
  void insert(int64_t position) {
    Candidates& now = candidates_;
    int64_t c = now.kept_count++;
    for (; c > 0 && now.kept[c - 1] > position; --c) now.kept[c] = now.kept[c - 1];
    now.kept[c] = position;
  }

  Borders borders_;
  int64_t *ended_, *next_;  // a list of positions for every step
  Candidates candidates_;
};

}  // namespace
}  // namespace throughtime
