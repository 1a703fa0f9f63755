// Operations that several threads take part in: block barriers, and the warp's shuffles, votes and barriers.
#pragma once
#include "state.h"

namespace emulator {

// Forgets what is under way; for a new block.
void reset_collectives();
// A thread has returned from the kernel: fails if lanes of its warp wait for it.
void leave_warp(const Thread& thread);

}  // namespace emulator
