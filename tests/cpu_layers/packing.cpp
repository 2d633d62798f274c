// lstm/cpu/pack.h and the packing of common/cpu/matrix.h.
#include "common/cpu/matrix.h"
#include "export.h"
#include "lstm/cpu/pack.h"

using namespace throughtime;

namespace {

template <typename S>
int64_t elements(const S*) {
  return kLanes<S>;
}

template <typename S>
int64_t leading(const S*, int64_t columns) {
  return leading_dimension<S>(columns);
}

// The parts [first, last) of `parts`, as a worker takes them.
template <typename S>
void gate_panels(const S* weight, int64_t H, int64_t columns, int64_t begin, int64_t end, S* to) {
  pack_gate_panels(weight, H, columns, to, Share(end, begin, end, end));
}

template <typename S>
void gate_bias(const S* bias, int64_t H, int64_t begin, int64_t end, S* to) {
  pack_gate_bias(bias, H, to, Share(end, begin, end, end));
}

template <typename S>
void no_gate_bias(int64_t H, int64_t begin, int64_t end, S* to) {
  pack_gate_bias<S>(nullptr, H, to, Share(end, begin, end, end));
}

template <typename S>
void column_panels(const S* weight, int64_t H, int64_t columns, int64_t width, int64_t begin,
                   int64_t end, S* to) {
  pack_column_panels(weight, H, columns, width, to, Share(end, begin, end, end));
}

template <typename S>
void plain_panels(const S* weight, int64_t rows, int64_t columns, int64_t width, int64_t begin,
                  int64_t end, S* to) {
  pack_plain_panels(weight, rows, columns, width, to, Share(end, begin, end, end));
}

template <typename S>
void transposed_panels(const S* weight, int64_t rows, int64_t columns, int64_t width, int64_t begin,
                       int64_t end, S* to) {
  pack_transposed_panels(weight, rows, columns, width, to, Share(end, begin, end, end));
}

// at: the row of the weight for every k or column, negative without.
template <typename S>
void rows(const S* weight, int64_t columns, const int64_t* at, int64_t k_count, int64_t begin,
          int64_t end, S* to) {
  const Panels<S> panels{to, k_count, divide_up(columns, kLanes<S>)};
  pack_rows(panels, columns, begin, end,
            [&](int64_t k) { return at[k] < 0 ? nullptr : weight + at[k] * columns; });
}

template <typename S>
void rows_as_columns(const S* weight, int64_t columns, const int64_t* at, int64_t vectors,
                     int64_t begin, int64_t end, S* to) {
  const Panels<S> panels{to, columns, vectors};
  pack_rows_as_columns(panels, begin, end,
                       [&](int64_t n) { return at[n] < 0 ? nullptr : weight + at[n] * columns; });
}

}  // namespace

EXPORT(elements)
EXPORT(leading)
EXPORT(gate_panels)
EXPORT(gate_bias)
EXPORT(no_gate_bias)
EXPORT(column_panels)
EXPORT(plain_panels)
EXPORT(transposed_panels)
EXPORT(rows)
EXPORT(rows_as_columns)
