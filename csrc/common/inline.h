// Functions that must be inlined: the kernel sources are compiled once per instruction set, and a
// function with a symbol of its own could be taken by the linker from the wrong one.
#pragma once

#define TT_INLINE inline __attribute__((always_inline))
