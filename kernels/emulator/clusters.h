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

void reset_cluster();

}  // namespace emulator
