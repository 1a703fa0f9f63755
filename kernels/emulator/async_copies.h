// Copies between global and shared memory that run beside the threads: cp.async, TMA and bulk copies. Each is
// done as late as its rules allow: cp.async when its thread waits for it; a load that completes on an mbarrier
// when no thread can run any more and one waits for that mbarrier; a store when its thread waits for it, or at
// the end of the block. Until then the record of a target says that a write is under way, so that every access
// to it is a race, and its content is NaN. What a store reads is recorded as read by an agent whose clock nobody
// knows before the wait.
#pragma once
#include "state.h"

namespace emulator {

// Does one load that a waiting thread needs. False if there is none.
bool complete_a_load();
// The thread returns from the kernel: fails if its copies still need its shared memory.
void check_copies_of(const Thread& thread);
// All threads of the running block have returned: does its stores that are left; fails if loads are.
void finish_copies();
void reset_copies();

}  // namespace emulator
