// common/cpu/tile.h and matrix.h: packing, products and outer products, also of 16-bit operands.
#include "common/cpu/matrix.h"

#include <cstdlib>

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "common/cpu/subnormals.h"
#include "export.h"

namespace throughtime {
namespace {

// Rows of one product, and what the rows of a left operand are padded to.
template <typename Operand>
int64_t product_rows(const Operand*) {
  return Tiling<Operand>::kRows;
}
template <typename Operand>
int64_t row_padding(const Operand*) {
  return Tiling<Operand>::kPadding;
}
template <typename Operand>
int64_t depth(const Operand*) {
  return Numbers<Operand>::kDepth;
}

// weight [vectors * L, k_count], or its transpose with `columns` columns; into panels.
template <typename S, typename Operand>
void pack_as(const S* weight, int64_t rows, int64_t columns, int64_t transposed, int64_t width,
             Operand* out) {
  const auto row = [&](int64_t n) { return n < rows ? weight + n * columns : nullptr; };
  const auto vectors = [](int64_t count) { return divide_up(count, kLanes<S>); };
  if (transposed) {
    const Panels<Operand> to{out, columns, vectors(rows), width};
    pack_rows_as_columns(to, Share(to.count(), 0, 1), row);
  } else {
    const Panels<Operand> to{out, rows, vectors(columns), width};
    pack_rows(to, columns, Share(to.count(), 0, 1), row);
  }
}

// out [rows, vectors * L] = (out, or bias, or addend, or 0) + a times panels; a has `blocks` pieces a row, and
// rows of the addend lie as those of out.
template <typename Operand>
void product_as(const Operand* a, int64_t rows, int64_t k_count, int64_t blocks,
                const Operand* panels, int64_t vectors, int64_t width, int64_t begun,
                const SumOf<Operand>* bias, const SumOf<Operand>* addend, SumOf<Operand>* out) {
  const FlushSubnormals flush;
  const MatrixUnit unit;
  const int64_t row_stride = round_up(k_count, Numbers<Operand>::kDepth) + 3;
  const int64_t ld = vectors * kLanes<SumOf<Operand>> + 1;
  const Panels<Operand> weight{const_cast<Operand*>(panels), k_count * blocks, vectors, width};
  multiply<Operand>(
      {a, row_stride, k_count, blocks, round_up(rows, Tiling<Operand>::kPadding) * row_stride},
      rows, weight, {out, ld, begun != 0, bias, addend, ld});
}

// Whether a product reads no more of a left operand than its rows, padded: the page behind cannot be read.
// 0 where a child that multiplies survives.
template <typename Operand>
int64_t reads_past_the_rows(const Operand*, int64_t rows, int64_t k_count) {
  using S = SumOf<Operand>;
  const int64_t ld = round_up(k_count, Numbers<Operand>::kDepth);
  const int64_t bytes = round_up(rows, Tiling<Operand>::kPadding) * ld * sizeof(Operand);
  const int64_t page = sysconf(_SC_PAGESIZE), whole = round_up(bytes, page);
  char* const memory = static_cast<char*>(
      mmap(nullptr, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (memory == MAP_FAILED || mprotect(memory + whole, page, PROT_NONE) != 0) return -1;
  const auto numbers = [](int64_t vectors) {
    const size_t size = vectors * kPanelVectors * kVectorBytes;
    return static_cast<char*>(std::memset(std::aligned_alloc(64, round_up(size, 64)), 0, size));
  };
  char* const weight = numbers(ld);
  char* const out = numbers(rows);
  const pid_t child = fork();
  if (child == 0) {
    const MatrixUnit unit;
    const Panels<Operand> panels{reinterpret_cast<Operand*>(weight), k_count, kPanelVectors};
    multiply<Operand>({reinterpret_cast<Operand*>(memory + whole - bytes), ld, k_count}, rows,
                      panels, {reinterpret_cast<S*>(out), kPanelVectors * kLanes<S>});
    _exit(0);
  }
  int status = -1;
  waitpid(child, &status, 0);
  std::free(weight);
  std::free(out);
  munmap(memory, whole + page);
  return status;
}

// Whether this thread holds tiles of AMX: the processor's own word (XINUSE).
int64_t tiles_in_use() {
#if defined(TT_AMX) && !defined(TT_AMX_STAND_IN)
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(1));
  return low >> 17 & 3;  // their configuration, their numbers
#else
  return 0;
#endif
}

template <typename Operand>
void outer_products_as(const Operand* a, int64_t n, const Operand* b, int64_t vectors, int64_t rows,
                       SumOf<Operand>* out) {
  const int64_t columns = vectors * kLanes<SumOf<Operand>>;
  add_outer_products<Operand>(a, n, n, b, columns, vectors, rows, out, columns);
}

}  // namespace
}  // namespace throughtime

using namespace throughtime;

EXPORT(product_rows)
EXPORT_AS(product_rows_bf16, product_rows<BFloat16>)
EXPORT(row_padding)
EXPORT_AS(row_padding_bf16, row_padding<BFloat16>)
EXPORT(depth)
EXPORT_AS(depth_bf16, depth<BFloat16>)
EXPORT_AS(pack_f32, pack_as<float, float>)
EXPORT_AS(pack_f64, pack_as<double, double>)
EXPORT_AS(pack_narrow_f32, pack_as<float, BFloat16>)
EXPORT_AS(product_f32, product_as<float>)
EXPORT_AS(product_f64, product_as<double>)
EXPORT_AS(product_narrow_f32, product_as<BFloat16>)
EXPORT_AS(outer_products_f32, outer_products_as<float>)
EXPORT_AS(outer_products_f64, outer_products_as<double>)
EXPORT(reads_past_the_rows)
EXPORT_AS(reads_past_the_rows_bf16, reads_past_the_rows<BFloat16>)
EXPORT_PLAIN(tiles_in_use)
