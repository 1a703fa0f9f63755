// What the four warps of a warpgroup do together: wgmma, and changing their number of registers.
#pragma once
#include "state.h"

namespace emulator {

// The running thread accesses one of its own variables, which may be registers of a wgmma.
void touch_registers(uintptr_t address, unsigned bytes, Kind kind);
// A thread has returned from the kernel: fails if its warpgroup waits for it or multiplies still.
void leave_warpgroup(const Thread& thread);
void reset_warpgroups();

}  // namespace emulator
