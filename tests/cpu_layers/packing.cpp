// recurrence/cpu/pack.h: the order of gates. The panels of a product are tested with matrix.h.
#include "export.h"
#include "recurrence/cpu/pack.h"

using namespace throughtime;

namespace {

constexpr int kGates = 4;

template <typename S>
int64_t elements(const S*) {
  return kLanes<S>;
}

template <typename S>
int64_t leading(const S*, int64_t columns) {
  return leading_dimension<S>(columns);
}

// The parts [begin, end), as a worker takes them.
template <typename S>
void gate_bias(const S* bias, int64_t H, int64_t begin, int64_t end, S* to) {
  pack_gate_bias<kGates>(bias, H, to, Share(end, begin, end, end));
}

template <typename S>
void no_gate_bias(int64_t H, int64_t begin, int64_t end, S* to) {
  pack_gate_bias<kGates, S>(nullptr, H, to, Share(end, begin, end, end));
}

}  // namespace

EXPORT(elements)
EXPORT(leading)
EXPORT(gate_bias)
EXPORT(no_gate_bias)
