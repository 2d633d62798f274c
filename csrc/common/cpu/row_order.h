// The order in which kernels take the samples of a batch whose sequences differ in length.
#pragma once

#include <memory>

#include "common/cpu/pool.h"
#include "common/tensors.h"

namespace throughtime {

// Lengths int64 [batch], dense, or none; raises unless each is in [0, steps].
OptionalTensor checked_lengths(const OptionalTensor& lengths, int64_t batch, int64_t steps);

// Samples by falling length, so that those still running at a step are the first ones.
class RowOrder {
 public:
  // lengths: as checked_lengths() takes them; none: all are whole.
  RowOrder(const OptionalTensor& lengths, int64_t batch, int64_t steps);

  const int64_t* order() const { return order_.get(); }  // sample of each row
  // Length of each row; null if all are whole.
  const int64_t* lengths() const { return lengths_.get(); }

 private:
  struct Release {
    void operator()(int64_t* memory) const { pool_release(memory); }
  };
  using Numbers = std::unique_ptr<int64_t[], Release>;
  static Numbers numbers(int64_t count);

  Numbers order_, lengths_;
};

}  // namespace throughtime
