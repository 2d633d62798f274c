// The arguments of a kernel: a list of addresses, of which each initializes the next member that is
// a pointer.
#pragma once

namespace throughtime {

struct Pointers {
  void* const* next;

  template <typename T>
  operator T*() {
    return static_cast<T*>(*next++);
  }
};

}  // namespace throughtime
