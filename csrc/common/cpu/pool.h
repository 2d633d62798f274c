// A caching allocator for the CPU kernels' large buffers.
//
// A training step allocates hundreds of megabytes of saved activations. Every page that is fresh
// from the operating system costs a fault, and the faults cost more than the arithmetic. The pool
// keeps freed blocks for the next step, on huge pages where the system has them. Idle and used
// blocks together never exceed the most in use at once since pool_empty(), so the pool does
// not raise the peak.
#pragma once

#include <cstddef>

namespace throughtime {

struct PoolStatistics {
  size_t used_bytes;       // in blocks handed out
  size_t idle_bytes;       // in blocks kept for reuse
  size_t peak_used_bytes;  // most in use at once since pool_empty()
};

void* pool_acquire(size_t bytes);  // 64-byte aligned, contents undefined; throws std::bad_alloc
void pool_release(void* memory);   // null is allowed
void pool_empty();  // gives idle blocks back to the operating system; the peak starts anew
PoolStatistics pool_statistics();

}  // namespace throughtime
