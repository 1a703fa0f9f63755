// Every kernel here is compiled twice: with BUG = 1 it does what its comment says, with BUG = 0 it is correct.
// The line that the report must name ends in "// <-" and the entry's name (several, where either may come first).
#pragma once
#include "common.cuh"

struct Params {
  int n;        // elements of x, as the kernels use it
  int huge;     // 2^31 - 1, out of the compiler's sight
  int zero;     // 0, likewise
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from test_emulator.py");
