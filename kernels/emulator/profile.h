// What the memory traffic of a launch would cost a GPU, as far as addresses tell: 32-byte sectors of global
// memory, and wavefronts of shared memory, whose 32 banks are 4 bytes wide.
//
// Threads run one after the other here, so the accesses of a warp-wide instruction have to be brought
// together: a lane's k-th access from an instruction since the last block barrier is taken to be part of the
// same request as the k-th ones of the other lanes. That is what the hardware does as long as a warp stays
// together.
//
// Of global memory three numbers are counted, each a bound of what one level of the memory sees:
//   sectors of requests         what L1 is asked for; of writes, what L2 is
//   (block, sector) pairs       what a block must have from L2, were its L1 large enough for all it touches
//   sectors of the launch       what must come from memory, or go there, were L2 large enough
#pragma once
#include <cstdint>

#include "shadow.h"

namespace emulator {

// All requests of one instruction. `least` is what `units` would be at best: for global memory the sectors
// that hold as many bytes as are asked for, for shared memory the wavefronts without bank conflicts.
struct Traffic {
  uint64_t code;  // offset of the instruction in the module
  uint32_t shared, writes;
  uint64_t requests, lanes, units, least;
  uint64_t block_sectors;  // different (block, sector) pairs; 0 for shared memory
  uint64_t packs;          // of `lanes`, those whose access is of 16 bytes
};

// All requests that read, or write, one tensor of the launch.
struct TensorTraffic {
  uint32_t tensor, writes;                    // its number in the launch
  uint64_t requested, block_sectors, sectors;  // of requests; (block, sector) pairs; of the launch
};

// The running thread makes an access; called in a launch that is profiled. Local memory does not count.
void note_access(Kind kind, uintptr_t address, unsigned bytes, const void* pc);
// The running thread has started a copy that reads or writes these bytes of global memory on its own: one
// request. `code` is the offset of the instruction.
void note_copy(Kind kind, uintptr_t address, unsigned bytes, uint64_t code);
// The running block has come to a barrier or, where no thread runs, the cluster to its end: requests that
// some lanes did not make are over.
void end_requests();
// Forgets the launch before this one.
void reset_profile();

}  // namespace emulator
