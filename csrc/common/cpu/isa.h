// The instruction sets that kernels were compiled for, and which one runs.
#pragma once

namespace throughtime {

struct Isa {
  const char* name;
  // What its kernels write into saved activations, which no other set can read: a number that any
  // floating point type holds, and that no activation has.
  int mark;
  bool runs_here;
};

// All that were compiled, largest first, as TT_EACH_ISA lists them; ends with a null name.
const Isa* isas();

// The largest that this machine can run, or the one chosen since.
const Isa& isa();

// False if none that runs here has that name. For tests.
bool choose_isa(const char* name);

}  // namespace throughtime
