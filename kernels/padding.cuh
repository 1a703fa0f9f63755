// What a convolution reads where a window reaches over the input's border.
#pragma once
#include "common.cuh"

#define ZEROS 0  // values of PADDING
#define REFLECT 1
#define REPLICATE 2
#define CIRCULAR 3

// The coordinate inside an axis of `size` that stands for coordinate `at`, in any mode but ZEROS. Reflection pads
// by at most size - 1 on either side and circular padding by size, so that one turn leads inside.
DEVICE int continued(int at, int size) {
  if (PADDING == REFLECT) return size - 1 - abs(size - 1 - abs(at));
  if (PADDING == REPLICATE) return min(max(at, 0), size - 1);
  return at < 0 ? at + size : at < size ? at : at - size;
}
