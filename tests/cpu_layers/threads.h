// A runtime of plain threads, for kernels without torch.
#pragma once

#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "common/cpu/runtime.h"
#include "common/cpu/subnormals.h"

namespace throughtime {

inline size_t last_acquired = 0;  // bytes

inline Runtime on_threads(int64_t threads) {
  Runtime made{};
  made.threads = static_cast<int>(threads);
  made.parallel = [](int workers, void (*body)(void*, int, int), void* context) {
    std::vector<std::thread> others;
    const auto work = [=](int index) {
      const FlushSubnormals flush;
      body(context, index, index + 1);
    };
    for (int index = 1; index < workers; ++index) others.emplace_back(work, index);
    work(0);
    for (std::thread& other : others) other.join();
  };
  // NaN, wherever a kernel reads what it has not written.
  made.acquire = [](size_t bytes) {
    last_acquired = bytes;
    void* const memory = std::aligned_alloc(64, bytes);
    return std::memset(memory, 0xff, bytes);
  };
  made.release = std::free;
  return made;
}

}  // namespace throughtime
