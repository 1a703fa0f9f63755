// Tensor maps: how a tensor lies in global memory, and which lines of it one box is made of.
#pragma once
#include <algorithm>

#include "state.h"

namespace emulator {

// What cnnops/cuda/tensor_map.py packs into the 128 bytes of a TensorMap for the emulator.
struct PackedTensorMap {
  uint32_t magic;
  uint8_t rank, element_bytes, swizzle, im2col;
  uint64_t address;  // in the arena; before the launch, the offset in the tensor
  uint64_t sizes[5];
  uint64_t strides[4];  // in bytes, of dimensions 1 to 4; elements of dimension 0 follow each other
  uint16_t box[5];      // im2col: channels, pixels
  uint8_t steps[5];     // through the tensor, from one line of the box to the next
  uint8_t unused;
  int16_t lower[3], upper[3];  // im2col: corners of the bounding box, w h d
  uint32_t tensor;             // which one of the launch
  uint32_t number;             // of this map among those of the launch
};
constexpr size_t TENSOR_MAP_BYTES = 128;
constexpr uint32_t TENSOR_MAP_MAGIC = 0x4d544e43;
static_assert(sizeof(PackedTensorMap) <= TENSOR_MAP_BYTES, "a tensor map has 128 bytes");

// The map behind a kernel's argument; fails if it is none.
const PackedTensorMap& tensor_map(const void* map, const char* instruction, EmulatorPlace place);
// Fails unless the box is one of this map, and its tile in shared memory is where it may be.
void check_box(const PackedTensorMap& map, const EmulatorBox& box, uint32_t tile, const char* instruction,
               EmulatorPlace place);
// Bytes of a box in shared memory.
uint32_t box_bytes(const PackedTensorMap& map);
// Where the 16-byte piece that belongs at `address` lies under a swizzle.
uint32_t swizzled(uint32_t address, unsigned swizzle);

// Visits the lines of a box in the order in which they follow each other in shared memory: visit(offset in the
// tile before swizzling, address in the arena of the first element inside of the tensor, bytes of the line
// before it, bytes inside). A line without elements inside has 0 bytes.
template <class Visit> void for_each_line(const PackedTensorMap& map, const EmulatorBox& box, Visit visit) {
  const uint32_t line_bytes = map.box[0] * map.element_bytes;
  uint32_t offset = 0;
  auto line = [&](const int64_t (&at)[5]) {
    uint64_t address = map.address;
    bool inside = true;
    for (unsigned d = 1; d < map.rank; d++) {
      inside &= at[d] >= 0 && at[d] < (int64_t)map.sizes[d];
      address += (uint64_t)at[d] * map.strides[d - 1];
    }
    const int64_t first = std::max<int64_t>(at[0], 0);
    const int64_t end = std::min<int64_t>(at[0] + map.box[0], (int64_t)map.sizes[0]);
    if (inside && first < end)
      visit(offset, address + (uint64_t)first * map.element_bytes, (uint32_t)(first - at[0]) * map.element_bytes,
            (uint32_t)(end - first) * map.element_bytes);
    else
      visit(offset, address, 0u, 0u);
    offset += line_bytes;
  };
  int64_t at[5] = {};
  for (unsigned d = 0; d < map.rank; d++) at[d] = box.at[d];
  if (map.im2col) {
    // The corner moves through the bounding box; what is loaded lies the offsets further.
    for (unsigned pixel = 0; pixel < map.box[1]; pixel++) {
      int64_t shifted[5] = {at[0], at[1], at[2], at[3], at[4]};
      for (unsigned d = 1; d + 1 < map.rank; d++) shifted[d] += box.offsets[d - 1];
      line(shifted);
      for (unsigned d = 1; d < map.rank; d++) {
        at[d] += d + 1 < map.rank ? map.steps[d] : 1;
        if (d + 1 == map.rank || at[d] <= (int64_t)map.sizes[d] - 1 + map.upper[d - 1]) break;
        at[d] = map.lower[d - 1];
      }
    }
    return;
  }
  for (;;) {
    line(at);
    unsigned d = 1;
    for (; d < map.rank; d++) {
      at[d] += map.steps[d];
      if (at[d] < box.at[d] + map.box[d]) break;
      at[d] = box.at[d];
    }
    if (d >= map.rank) return;
  }
}

}  // namespace emulator
