// Checks of relevancy screening's arguments: sizes of the memory, and `last` of the forward pass.
#pragma once

#include <vector>

#include "relevancy/cpu/params.h"

namespace throughtime {

// Raises unless an earlier call with this window and retained set can have left P positions, R of
// them retained.
void check_memory(const ScreeningShape& shape);

// Checks that a forward pass can have written `last`. The backward pass sizes its scratch memory by
// it and does not check positions again.
class LastCheck {
 public:
  explicit LastCheck(const ScreeningShape& shape) : shape_(shape) {}

  // Raises unless last[0], last[stride], ... [P + T] fits a sequence.
  void operator()(const int64_t* last, int64_t stride, Steps steps);

 private:
  ScreeningShape shape_;
  std::vector<int64_t> ends_;  // by query: of how many keys it is the last
};

}  // namespace throughtime
