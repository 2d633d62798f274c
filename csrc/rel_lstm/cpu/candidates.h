// What the queries of rows attend, from the last step to the first, and where the gradients of keys and hidden
// states lie meanwhile: in a slot from the last query that attends a key until the key's own step.
#pragma once

#include "rel_lstm/cpu/weights.h"
#include "relevancy/cpu/attend.h"
#include "relevancy/cpu/screening.h"

namespace throughtime {
namespace {

// The candidates of one row's query: rows of numbers, and of gradients.
template <typename S>
struct RowCandidates {
  const S **hidden, **keys;
  S **dhidden, **dkeys;
  int64_t count;
};

// Memory for those of all rows of a group, of each worker. Every member of a team replays all rows for
// itself: to share lists takes longer than to make them.
template <typename X>
class RelLstmCandidates {
  using S = SumOf<X>;

  struct Row {
    Replay replay;
    int64_t* slot_of;  // by position, -1 without
    int64_t* free;     // a stack
    int64_t free_count;
    S* slots;
    RowCandidates<S> now;
  };

 public:
  RelLstmCandidates(const RelLstmBackward<X>& args, const RelLstmLayout<S>& layout)
      : p_(args),
        in_(args.in),
        screen_(args.in.shape.screening),
        at_(layout),
        slots_(count_slots()),
        most_(padded<S>(slots_)) {}

  // What a worker writes lies apart: prefetching would take lines from another one.
  void reserve(int64_t workers, int64_t rows, Scratch* scratch) {
    const auto own = [&](auto number, int64_t count) {
      return scratch->template reserve<decltype(number)>(workers, rows, count);
    };
    numbers_ = own(S(), times(slots_, at_.key));
    ended_ = own(int64_t(), screen_.T);
    next_ = own(int64_t(), screen_.positions());
    kept_ = own(int64_t(), screen_.positions());
    slot_of_ = own(int64_t(), screen_.positions());
    free_ = own(int64_t(), slots_);
    rows_ = scratch->template reserve<Row>(workers, rows);
    hidden_ = own(static_cast<const S*>(nullptr), most_);
    keys_ = own(static_cast<const S*>(nullptr), most_);
    dhidden_ = own(static_cast<S*>(nullptr), most_);
    dkeys_ = own(static_cast<S*>(nullptr), most_);
  }

  // Slots of a row, and numbers of a list in whole vectors.
  int64_t slots() const { return slots_; }
  int64_t most_numbers() const { return most_; }

  // Row `row` of a worker walks row `at` of the batch.
  void begin(int64_t worker, int64_t row, int64_t at) const {
    const int64_t positions = row * screen_.positions(), list = row * most_;
    Row& r = rows_(worker)[row];
    r = {.replay = Replay(screen_, {in_.length(at)}, {p_.last + in_.order[at], in_.shape.B},
                          ended_(worker) + row * screen_.T, next_(worker) + positions,
                          kept_(worker) + positions),
         .slot_of = slot_of_(worker) + positions,
         .free = free_(worker) + row * slots_,
         .free_count = slots_,
         .slots = numbers_(worker) + row * slots_ * at_.key,
         .now = {hidden_(worker) + list, keys_(worker) + list, dhidden_(worker) + list,
                 dkeys_(worker) + list, 0}};
    for (int64_t j = 0; j < screen_.positions(); ++j) r.slot_of[j] = -1;
    for (int64_t k = 0; k < slots_; ++k) r.free[k] = k;
  }

  // Lists those of step t; a worker has `units` and `attention` blocks of columns.
  void list(int64_t worker, int64_t row, int64_t at, int64_t t, Share units,
            Share attention) const {
    Row& r = rows_(worker)[row];
    const Candidates& candidates = r.replay.candidates(t);
    candidates.each([&](int64_t c, int64_t position) {
      r.now.hidden[c] = key_row(position, at);
      r.now.keys[c] = r.now.hidden[c] + at_.units;
      r.now.dhidden[c] = slot(r, position, units, attention);
      r.now.dkeys[c] = r.now.dhidden[c] + at_.units;
    });
    r.now.count = candidates.count();
  }
  const RowCandidates<S>& of(int64_t worker, int64_t row) const { return rows_(worker)[row].now; }

  // No earlier query attends the key.
  void give_back(int64_t worker, int64_t row, int64_t position) const {
    Row& r = rows_(worker)[row];
    r.free[r.free_count++] = r.slot_of[position];
  }
  // The slot that a key has, or null.
  const S* slot_of(int64_t worker, int64_t row, int64_t position) const {
    const Row& r = rows_(worker)[row];
    return r.slot_of[position] < 0 ? nullptr : r.slots + r.slot_of[position] * at_.key;
  }

  // Saved by the forward pass: h_j, and the score's key.
  TT_INLINE const S* key_row(int64_t position, int64_t at) const {
    return p_.saved + (position * in_.shape.B + at) * at_.key;
  }

 private:
  int64_t count_slots() const {
    int64_t retained = 0;
    for (int64_t row = 0; row < in_.shape.B; ++row)
      retained = most(retained, retained_at_end(screen_, {in_.length(row)},
                                                {p_.last + in_.order[row], in_.shape.B}));
    return screen_.most_in_window() + retained + 1;
  }

  // The slot of a key, own columns of which are cleared when the key first needs one.
  S* slot(Row& r, int64_t position, Share units, Share attention) const {
    int64_t index = r.slot_of[position];
    if (index < 0) {
      index = r.slot_of[position] = r.free[--r.free_count];
      const auto clear = [&](int64_t first, Share own) {
        constexpr int64_t L = kLanes<S>;
        std::memset(r.slots + index * at_.key + first + own.begin * L, 0,
                    (own.end - own.begin) * L * sizeof(S));
      };
      clear(0, units);
      clear(at_.units, attention);
    }
    return r.slots + index * at_.key;
  }

  const RelLstmBackward<X>& p_;
  const RelLstmInput<X>& in_;
  const ScreeningShape screen_;
  const RelLstmLayout<S>& at_;
  const int64_t slots_, most_;
  Span<S> numbers_;
  Span<int64_t> ended_, next_, kept_, slot_of_, free_;
  Span<Row> rows_;
  Span<const S*> hidden_, keys_;
  Span<S*> dhidden_, dkeys_;
};

}  // namespace
}  // namespace throughtime
