#include "tensor_maps.h"

#include "diagnostics.h"
#include "memory.h"

namespace emulator {

namespace {

// A swizzle's pattern repeats after so many bytes, and a tile starts where it does.
const uint32_t TILE_ALIGNMENT[] = {128, 256, 512, 1024};

}  // namespace

const PackedTensorMap& tensor_map(const void* map, const char* instruction, EmulatorPlace place) {
  const PackedTensorMap& packed = *(const PackedTensorMap*)map;
  if (packed.magic != TENSOR_MAP_MAGIC)
    fail_at(place, "%s: expected a tensor map that the launch has passed, got something else", instruction);
  return packed;
}

uint32_t box_bytes(const PackedTensorMap& map) {
  uint32_t bytes = map.box[0] * map.element_bytes;
  if (map.im2col) return bytes * map.box[1];
  for (unsigned d = 1; d < map.rank; d++) bytes *= (map.box[d] + map.steps[d] - 1u) / map.steps[d];
  return bytes;
}

uint32_t swizzled(uint32_t address, unsigned swizzle) { return address ^ (address >> 3 & ((16u << swizzle) - 16)); }

void check_box(const PackedTensorMap& map, const EmulatorBox& box, uint32_t tile, const char* instruction,
               EmulatorPlace place) {
  if (map.im2col != box.im2col)
    fail_at(place, "%s: expected a tensor map for %s, got one for %s", instruction, box.im2col ? "im2col" : "tiles",
            map.im2col ? "im2col" : "tiles");
  if (map.rank != box.rank)
    fail_at(place, "%s: expected a tensor map of %d dimensions, got one of %d", instruction, box.rank, map.rank);
  if (tile % TILE_ALIGNMENT[map.swizzle])
    fail_at(place, "misaligned: %s: expected a tile at a multiple of %u bytes, got %s", instruction,
            TILE_ALIGNMENT[map.swizzle], describe_shared(tile).c_str());
  if (!map.im2col) return;
  const int limit = map.rank == 3 ? 65535 : map.rank == 4 ? 255 : 31;
  for (int d = 0; d < map.rank - 2; d++) {
    const int64_t lowest = map.lower[d], highest = (int64_t)map.sizes[d + 1] - 1 + map.upper[d];
    if (box.offsets[d] > limit)
      fail_at(place, "%s: expected im2col offsets of at most %d, got %d", instruction, limit, box.offsets[d]);
    if (box.at[d + 1] < lowest || box.at[d + 1] > highest)
      fail_at(place, "%s: expected coordinate %d within the bounding box, %ld to %ld, got %d", instruction, d + 1,
              (long)lowest, (long)highest, box.at[d + 1]);
  }
}

}  // namespace emulator

extern "C" void emulator_tma_prefetch(const void* map, EmulatorPlace place) {
  emulator::tensor_map(map, "prefetch.tensormap", place);
}
