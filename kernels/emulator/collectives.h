// Operations that several threads take part in: block barriers, and the warp's shuffles, votes and barriers.
#pragma once
#include "state.h"

namespace emulator {

// Forgets what is under way; for a new cluster.
void reset_collectives();
// A thread has returned from the kernel: fails if lanes of its warp wait for it.
void leave_warp(const Thread& thread);

// "named barrier 2 (64 of 96 threads have arrived)"
std::string describe_named_barrier(unsigned id);

// Something that lanes of a warp do together. When the last of them has arrived, it calls `complete` with
// what each lane of `mask` brought along.
struct WarpOperation {
  const char* name;
  void (*complete)(void* const (&lanes)[WARP], uint32_t mask);
};
// Takes part with the other lanes of `mask`, bringing `mine`; returns when `complete` has run. Fails where
// the lanes do not all come to the same operation in the same line.
void join_lanes(const WarpOperation& operation, uint32_t mask, void* mine, EmulatorPlace place);
// The same with all 32 lanes, which instructions on matrices need.
void join_warp(const WarpOperation& operation, void* mine, EmulatorPlace place);

}  // namespace emulator
