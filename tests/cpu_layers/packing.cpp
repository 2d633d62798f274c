// recurrence/cpu/pack.h: the order of gates. The panels of a product are tested with matrix.h.
#include "export.h"
#include "recurrence/cpu/pack.h"

using namespace throughtime;

namespace {

constexpr int kGates = 4;

template <typename S>
int64_t leading(const S*, int64_t columns) {
  return leading_dimension<S>(columns);
}

// The blocks [begin, end), as a worker takes them; bias may be null.
template <typename S>
void gate_bias(const S* bias, int64_t H, int64_t begin, int64_t end, S* to) {
  pack_gate_bias<kGates>(bias, H, to, Share(end, begin, end, end));
}

}  // namespace

EXPORT(leading)
EXPORT(gate_bias)
