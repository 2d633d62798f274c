// What a kernel needs of the process around it: threads, and memory for scratch.
//
// Plain function pointers, so that the kernel sources (one object file per instruction set) see
// neither torch nor the standard library's templates.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/cpu/profile.h"

namespace throughtime {

struct Runtime {
  int threads;  // torch.get_num_threads(), or fewer where there are fewer free CPUs
  // Calls body(context, begin, end) on ranges that together make [0, workers), all at once, with
  // subnormal numbers flushed to zero.
  void (*parallel)(int workers, void (*body)(void* context, int begin, int end), void* context);
  void* (*acquire)(size_t bytes);  // 64-byte aligned, contents undefined; throws std::bad_alloc
  void (*release)(void* memory);
  Profile* profile;  // null: nothing is timed
};

}  // namespace throughtime
