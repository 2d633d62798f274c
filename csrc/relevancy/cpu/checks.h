// Checks of what relevancy screening takes: sizes of its memory, and what a forward pass wrote.
#pragma once

#include <vector>

#include "relevancy/cpu/params.h"

namespace throughtime {

// Raises unless an earlier call with this window and retained set can have left P positions, R of
// them retained.
void check_memory(const ScreeningShape& shape);

// Whether `last` of a sequence can be what the forward pass wrote. The backward pass has room for
// no more candidates than are attended in the end, and takes positions from here as they are.
class LastCheck {
 public:
  explicit LastCheck(const ScreeningShape& shape) : shape_(shape) {}

  // Raises unless last[0], last[stride], ... [S] fits a sequence of `length` queries.
  void operator()(const int64_t* last, int64_t stride, int64_t length);

 private:
  ScreeningShape shape_;
  std::vector<int64_t> ended_in_;  // by query: the sequence, counted from 1, that has an end there
  int64_t sequence_ = 0;
};

}  // namespace throughtime
