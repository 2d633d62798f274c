// The kernels of bench/gpu on the CPU: their numbers are right, and a missing wait is noticed.
// Exits 0 if all checks hold.
#include <cstdio>

#include "kernels.cuh"

using namespace throughtime;
using namespace throughtime::latency;

namespace {

// Whether any of `ranks` blocks saw a wrong number.
bool any_wrong(void (*kernel)(Probe), Probe p, int ranks, int warps, int shared_bytes) {
  std::vector<long long> cycles(ranks, -1);
  std::vector<unsigned> wrong(ranks, 0);
  unsigned arrivals = 0;
  p.half = 0.5f;
  p.cycles = cycles.data();
  p.wrong = wrong.data();
  p.partition.ranks = ranks;
  p.partition.arrivals = &arrivals;
  const int cluster = p.partition.grid ? 1 : ranks;
  device::launch(kernel, p, ranks, 32 * warps, cluster, shared_bytes, true);
  bool any = p.partition.grid && arrivals != static_cast<unsigned>(ranks * p.rounds);
  for (int i = 0; i < ranks; ++i) any |= wrong[i] != 0 || cycles[i] < 0;
  return any;
}

int failures = 0;
void expect(bool good, const char* what) {
  if (good) return;
  std::printf("%s\n", what);
  ++failures;
}

template <typename V = Words>
bool exchange_is_wrong(int ranks, int warps, int tiles, bool grid) {
  Probe p{};
  p.rounds = 7;
  p.size = tiles;
  p.partition.grid = grid;
  return any_wrong(exchange<V>, p, ranks, warps, exchange_shared_bytes(ranks, warps, tiles));
}

}  // namespace

int main() {
  expect(!exchange_is_wrong(1, 3, 0, false), "a block's barrier");
  expect(!exchange_is_wrong(3, 2, 0, true), "a grid's barrier");
  expect(!exchange_is_wrong(2, 1, 1, false), "messages of one warp");
  expect(!exchange_is_wrong(3, 2, 3, false), "messages of two warps, three tiles");
  expect(!exchange_is_wrong<Pair>(5, 2, 3, false), "messages of 8 bytes");
  expect(!exchange_is_wrong<uint32_t>(3, 2, 3, false), "messages of 4 bytes");
  device::dropped = device::Site::kForwardStep;
  expect(exchange_is_wrong(3, 2, 3, false), "messages that nothing waits for are right");
  device::dropped = device::Site::kCount;

  Probe p{};
  p.rounds = 2;
  p.size = 2 * kReadsAtOnce * 64;
  std::vector<Words> words(p.size);
  p.from = words.data();
  expect(!any_wrong(read<true>, p, 1, 2, 16 * p.size), "shared memory");
  expect(!any_wrong(read<false>, p, 2, 2, 0), "global memory");
  words.back().v[3] = 1;
  expect(any_wrong(read<false>, p, 1, 2, 0), "the last number of global memory is not read");

  words[0].v[0] = 5;
  words[5].v[0] = 1;
  expect(!any_wrong(chase, p, 1, 1, 0), "a chain of loads");
  p.rounds = 1;
  expect(any_wrong(chase, p, 1, 1, 0), "a chain that is not followed to its end");

  p.rounds = 50;
  expect(!any_wrong(mma<1>, p, 1, 1, 0) && !any_wrong(mma<4>, p, 1, 2, 0), "the matrix unit");
  expect(!any_wrong(fma, p, 1, 1, 0), "multiply-adds");
  expect(!any_wrong(pointwise, p, 1, 1, 0), "the cell");
  return failures;
}
