// The order in which kernels take the samples of a batch whose sequences differ in length.
#pragma once

#include <vector>

#include "tensors.h"

namespace throughtime {

// Samples by falling length, so that those still running at a step are the first ones.
class RowOrder {
 public:
  // lengths: int64 [batch] or none: all whole. Checks type, shape and range.
  RowOrder(const char* op, const OptionalTensor& lengths, int64_t batch, int64_t steps);

  const int64_t* order() const { return order_.data(); }  // sample of each row
  // Length of each row; null if all are whole.
  const int64_t* lengths() const { return lengths_.empty() ? nullptr : lengths_.data(); }

 private:
  std::vector<int64_t> order_, lengths_;
};

}  // namespace throughtime
