#include "common/cpu/row_order.h"

#include <algorithm>
#include <numeric>

#include "common/cpu/call.h"
#include "common/sizes.h"

namespace throughtime {

OptionalTensor checked_lengths(const OptionalTensor& lengths, int64_t batch, int64_t steps) {
  check_argument("lengths", lengths, {batch}, ScalarType::Long);
  const OptionalTensor contiguous = dense(lengths);
  const int64_t* values = data<int64_t>(contiguous);
  for (int64_t b = 0; values && b < batch; ++b)
    TT_CHECK_CALL(values[b] >= 0 && values[b] <= steps, "lengths should be in [0, ", steps,
                  "], the number of steps; got ", values[b], " for sample ", b);
  return contiguous;
}

RowOrder::Numbers RowOrder::numbers(int64_t count) {
  return Numbers(static_cast<int64_t*>(acquire(times(count, sizeof(int64_t)))));
}

RowOrder::RowOrder(const OptionalTensor& lengths, int64_t batch, int64_t steps)
    : order_(numbers(batch)) {
  int64_t* const order = order_.get();
  std::iota(order, order + batch, 0);
  const OptionalTensor contiguous = checked_lengths(lengths, batch, steps);
  if (!contiguous) return;
  const int64_t* values = data<int64_t>(contiguous);
  if (std::all_of(values, values + batch, [&](int64_t length) { return length == steps; })) return;
  std::stable_sort(order, order + batch,
                   [&](int64_t a, int64_t b) { return values[a] > values[b]; });
  lengths_ = numbers(batch);
  std::transform(order, order + batch, lengths_.get(), [&](int64_t b) { return values[b]; });
}

}  // namespace throughtime
