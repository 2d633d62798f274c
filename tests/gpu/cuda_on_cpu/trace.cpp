// Prints what the threads of a persistent kernel do, for tests/gpu/protocol.py, which asks whether any
// other order of their steps could go wrong.
//
//     trace BACKWARD GRID T H RANKS PARTS WARPS DETACH     0 or 1, or a size; WARPS of the backward
//
// A line per event, in the order in which the events took place: block, thread, what, numbers.
//
//     read, write SPACE AT BYTES   of shared memory (0) or of what a grid exchanges (1)
//     send RANK AT BYTES MBARRIER  and what else host_device.h tells by TT_OBSERVE
//
// The compiler instruments all loads and stores as for its thread sanitizer; the functions that it calls
// are here in place of the sanitizer's library.
#include <cstdint>
#include <cstdio>

#define UNSEEN __attribute__((no_sanitize("thread"), noinline))

namespace trace {

struct Event {
  int block, thread;
  const char* what;
  int64_t numbers[4];
};
constexpr int kMost = 1 << 20;
static Event events[kMost];
static int count = 0;
static const char *exchange = nullptr, *exchange_end = nullptr;
static bool running = false;

UNSEEN void record(const char* what, int64_t a, int64_t b, int64_t c, int64_t d);

template <typename... Numbers>
UNSEEN void observe(const char* what, Numbers... numbers) {
  const int64_t n[] = {static_cast<int64_t>(numbers)..., 0, 0, 0, 0};
  record(what, n[0], n[1], n[2], n[3]);
}

}  // namespace trace

#define TT_OBSERVE(...) trace::observe(__VA_ARGS__)

#include "cases.h"

namespace trace {

using throughtime::device::here;

UNSEEN void record(const char* what, int64_t a, int64_t b, int64_t c, int64_t d) {
  if (what[0] == 'e' && what[2] == 'c') {  // exchange: before the launch
    exchange = reinterpret_cast<const char*>(a);
    exchange_end = exchange + b;
    running = true;
    return;
  }
  const int at = __atomic_fetch_add(&count, 1, __ATOMIC_SEQ_CST);
  if (at >= kMost) std::abort();
  events[at] = {here.block_index, here.thread, what, {a, b, c, d}};
}

UNSEEN void access(const void* p, int64_t bytes, const char* what) {
  static thread_local volatile bool inside = false;  // what is called here is instrumented
  if (!running || inside || !here.block) return;
  inside = true;
  const auto* at = static_cast<const char*>(p);
  const char* shared = here.block->shared.data()->bytes;
  const auto size =
      static_cast<int64_t>(here.block->shared.size() * sizeof(*here.block->shared.data()));
  if (at >= shared && at < shared + size) {
    record(what, 0, at - shared, bytes, 0);
  } else if (at >= exchange && at < exchange_end) {
    record(what, 1, at - exchange, bytes, 0);
  }
  inside = false;
}

UNSEEN void print() {
  for (int i = 0; i < count; ++i) {
    const Event& e = events[i];
    std::printf("%d %d %s %lld %lld %lld %lld\n", e.block, e.thread, e.what,
                static_cast<long long>(e.numbers[0]), static_cast<long long>(e.numbers[1]),
                static_cast<long long>(e.numbers[2]), static_cast<long long>(e.numbers[3]));
  }
}

}  // namespace trace

#define ACCESS(bytes)                                                                    \
  UNSEEN void __tsan_read##bytes(void* p) { trace::access(p, bytes, "read"); }           \
  UNSEEN void __tsan_write##bytes(void* p) { trace::access(p, bytes, "write"); }         \
  UNSEEN void __tsan_unaligned_read##bytes(void* p) { trace::access(p, bytes, "read"); } \
  UNSEEN void __tsan_unaligned_write##bytes(void* p) { trace::access(p, bytes, "write"); }
#define ATOMIC(bits, type)                                                     \
  UNSEEN type __tsan_atomic##bits##_load(const volatile type* p, int) {        \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                               \
  }                                                                            \
  UNSEEN type __tsan_atomic##bits##_fetch_add(volatile type* p, type x, int) { \
    return __atomic_fetch_add(p, x, __ATOMIC_SEQ_CST);                         \
  }

extern "C" {
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
ATOMIC(8, uint8_t)
ATOMIC(32, uint32_t)
ATOMIC(64, uint64_t)
UNSEEN void __tsan_read_range(void* p, long bytes) { trace::access(p, bytes, "read"); }
UNSEEN void __tsan_write_range(void* p, long bytes) { trace::access(p, bytes, "write"); }
UNSEEN void __tsan_vptr_update(void**, void*) {}
UNSEEN void __tsan_vptr_read(void**) {}
UNSEEN void __tsan_func_entry(void*) {}
UNSEEN void __tsan_func_exit() {}
UNSEEN void __tsan_init() {}
}

using namespace throughtime;

int main(int count, char** words) {
  if (count != 9) return 2;
  int n[8];
  for (int i = 0; i < 8; ++i) n[i] = std::atoi(words[i + 1]);
  const bool backward = n[0] != 0;
  const Case c{n[1] ? Tier::kGrid : Tier::kResident,
               n[2],
               1,
               1,
               n[3],
               1,
               0,
               n[4],
               backward ? 1 : n[5],
               backward ? n[5] : 1,
               n[6],
               false,
               false,
               n[7] != 0,
               false};
  run_both<device::BFloat16>(c, [&](bool after_backward) {
    if (after_backward == backward) trace::print();
    trace::running = false;
    trace::count = 0;
  });
}
