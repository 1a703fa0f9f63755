// What the memory traffic of a launch would cost a GPU, as far as addresses tell: 32-byte sectors of global
// memory, and wavefronts of shared memory, whose 32 banks are 4 bytes wide.
//
// Threads run one after the other here, so the accesses of a warp-wide instruction have to be brought
// together: a lane's k-th access from an instruction since the last block barrier is taken to be part of the
// same request as the k-th ones of the other lanes. That is what the hardware does as long as a warp stays
// together.
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
};

// The running thread makes an access; called in a launch that is profiled. Local memory does not count.
void note_access(Kind kind, uintptr_t address, unsigned bytes, const void* pc);
// The block has come to a barrier or to its end: requests that some lanes did not make are over.
void end_requests();
// Forgets the launch before this one.
void reset_profile();

}  // namespace emulator
