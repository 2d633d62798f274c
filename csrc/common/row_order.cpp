#include "row_order.h"

#include <algorithm>
#include <numeric>

namespace throughtime {

RowOrder::RowOrder(const char* op, const OptionalTensor& lengths, int64_t batch, int64_t steps)
    : order_(batch) {
  std::iota(order_.begin(), order_.end(), 0);
  if (!lengths) return;
  check_cpu(op, "lengths", *lengths);
  check_shape(op, "lengths", *lengths, {batch});
  check_dtype(op, "lengths", *lengths, ScalarType::Long);
  const Tensor contiguous = dense(*lengths);
  const int64_t* values = data<int64_t>(contiguous);
  for (int64_t b = 0; b < batch; ++b)
    STD_TORCH_CHECK(values[b] >= 0 && values[b] <= steps, op, ": lengths should be in [0, ", steps,
                    "], the number of steps; got ", values[b], " for sample ", b);
  if (std::all_of(values, values + batch, [&](int64_t length) { return length == steps; })) return;
  std::stable_sort(order_.begin(), order_.end(),
                   [&](int64_t a, int64_t b) { return values[a] > values[b]; });
  for (int64_t sample : order_) lengths_.push_back(values[sample]);
}

}  // namespace throughtime
