// common/cpu/vec.h: every operation over arrays of n numbers, a multiple of the vector's length.
#include "common/cpu/vec.h"

#include <sys/mman.h>
#include <unistd.h>

#include "common/sizes.h"
#include "export.h"

using namespace throughtime;

namespace {

// A function of every vector v of x, with a second argument y that some have.
#define MAP(name, ...)                                   \
  template <typename S>                                  \
  void name(const S* x, const S* y, S* out, int64_t n) { \
    for (int64_t k = 0; k < n; k += kLanes<S>) {         \
      const Vec<S> v = load(x + k), other = load(y + k); \
      (void)other;                                       \
      store(out + k, Vec<S>(__VA_ARGS__));               \
    }                                                    \
  }
MAP(copy, v)
MAP(broadcast, (void(v), splat(*y)))
MAP(magnitude, absolute<S>(v))
MAP(copy_sign, with_sign<S>(v, other))
MAP(bounded, at_most<S>(v, *y))
MAP(map_sigmoid, sigmoid<S>(v))
MAP(map_tanh, throughtime::tanh<S>(v))
MAP(map_exp, exp_nonpositive<S>(v))

template <typename S>
void copy_streamed(const S* x, const S*, S* out, int64_t n) {
  for (int64_t k = 0; k < n; k += kLanes<S>) stream(out + k, load(x + k));
  stream_fence();
}

// Writes a whole vector `seen` as load_part reads it, and `out` by store_part.
template <typename S>
void copy_part(const S* x, int64_t count, S* seen, S* out) {
  store(seen, load_part(x, count));
  store_part(out, load(x), count);
}

// Room for `count` numbers, and a page behind it that may not be touched.
template <typename S>
struct Guarded {
  const int64_t page = sysconf(_SC_PAGESIZE);
  const int64_t bytes;
  void* const pages;
  S* const at;

  explicit Guarded(int64_t count)
      : bytes(round_up(count * sizeof(S), page)),
        pages(mmap(nullptr, bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
                   0)),
        at(reinterpret_cast<S*>(static_cast<char*>(pages) + bytes) - count) {
    mprotect(static_cast<char*>(pages) + bytes, page, PROT_NONE);
  }
  ~Guarded() { munmap(pages, bytes + page); }
};

template <typename S>
void copy_part_at_the_end(const S* x, int64_t count, S* out) {
  const Guarded<S> room(count);
  store_part(room.at, load(x), count);
  store(out, load_part(room.at, count));
}

template <typename S>
void transposed(const S* square, S* out) {
  Vec<S> rows[kLanes<S>];
  for (int64_t row = 0; row < kLanes<S>; ++row) rows[row] = load(square + row * kLanes<S>);
  transpose<S>(rows);
  for (int64_t row = 0; row < kLanes<S>; ++row) store(out + row * kLanes<S>, rows[row]);
}

// x [rows, columns]; without row r where missing[r].
template <typename S>
void transposed_rows(const S* x, const int64_t* missing, int64_t columns, S* out,
                     int64_t out_stride) {
  const int64_t count = kLanes<S> * columns;
  const Guarded<S> room(count);
  std::memcpy(room.at, x, count * sizeof(S));
  transpose_rows<S>([&](int64_t row) { return missing[row] ? nullptr : room.at + row * columns; },
                    columns, columns, 1,
                    [&](int64_t k, const Vec<S>* v) { store(out + k * out_stride, *v); });
}

template <typename S>
void row_sums(const S* square, S* out) {
  Vec<S> rows[kLanes<S>];
  for (int64_t row = 0; row < kLanes<S>; ++row) rows[row] = load(square + row * kLanes<S>);
  store(out, sums_of_rows<S>(rows));
}

}  // namespace

EXPORT(copy)
EXPORT(copy_streamed)
EXPORT(copy_part)
EXPORT(copy_part_at_the_end)
EXPORT(broadcast)
EXPORT(magnitude)
EXPORT(copy_sign)
EXPORT(bounded)
EXPORT(map_sigmoid)
EXPORT(map_tanh)
EXPORT(map_exp)
EXPORT(transposed)
EXPORT(transposed_rows)
EXPORT(row_sums)
