// Clusters of blocks: their barrier, and the shared memory of other blocks.
#pragma once
#include "state.h"

namespace emulator {

// A thread has returned from the kernel: fails if it has arrived at a cluster barrier and not waited.
void leave_cluster(const Thread& thread);
// All threads of the running block have returned: fails if others may still access its shared memory.
void end_block();
// "the cluster barrier (128 of 256 threads have arrived) sum.cu:12"
std::string describe_cluster_barrier(const Thread& thread);

// The running thread accesses shared memory of the block of this rank, or an mbarrier there: fails where that block
// need not run yet, or runs no longer. It must not end before the access is ordered by a cluster barrier.
void visit_block(unsigned rank, const char* what, const Access& access, EmulatorPlace place);

void reset_cluster();

}  // namespace emulator
