// What the micro-kernels of the golden vectors share. Each entry does one thing, so that its outputs tell
// what the GPU makes of its inputs; tests/golden/items.py has the inputs and what is expected of them.
#pragma once
#include "../../../kernels/common.cuh"

struct Params {
  int n;  // elements of the inputs
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from tests/golden/item.py");

DEVICE int element() { return blockIdx.x * blockDim.x + threadIdx.x; }
