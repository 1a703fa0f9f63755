#include "clusters.h"

#include <algorithm>
#include <cstring>

#include "collectives.h"
#include "diagnostics.h"
#include "memory.h"
#include "schedule.h"

namespace emulator {

namespace {

// ---- the barrier ----------------------------------------------------------------------------------------
struct ClusterBarrier {
  unsigned arrived;   // threads, in the present phase
  unsigned complete;  // phases
  std::vector<Thread*> waiting;
} cluster_barrier;

unsigned all_threads() { return cluster.blocks * launch.threads; }

// Warps come to each half of the barrier together.
const WarpOperation CLUSTER_ARRIVE{"cluster_arrive", [](void* const (&)[WARP], uint32_t) {}};
const WarpOperation CLUSTER_WAIT{"cluster_wait", [](void* const (&)[WARP], uint32_t) {}};

// ---- shared memory of other blocks ----------------------------------------------------------------------
// The last access of each thread to the shared memory of another block, by that block and the thread.
struct Visit {
  Access access;
  EmulatorPlace place;
};
std::vector<Visit> visits[MAX_BLOCKS];

void check_rank(unsigned rank, const char* what, EmulatorPlace place) {
  if (rank >= cluster.blocks)
    fail_at(place, "%s: expected a rank below %u, got %u", what, cluster.blocks, rank);
}

char* visit(Kind kind, const void* shared, unsigned rank, unsigned bytes, const void* pc, EmulatorPlace place) {
  const char* what = kind == Kind::read ? "cluster_load" : "cluster_store";
  check_rank(rank, what, place);
  if ((uintptr_t)shared - launch.shared_base >= launch.shared_bytes)
    fail_at(place, "%s: expected a pointer to this block's shared memory, got %s", what,
            describe_address((uintptr_t)shared).c_str());
  if (rank != block->rank) visit_block(rank, what, access_now(kind, pc), place);
  return access_distributed(kind, shared, rank, bytes, pc);
}

}  // namespace

void visit_block(unsigned rank, const char* what, const Access& access, EmulatorPlace place) {
  check_rank(rank, what, place);
  if (!std::max(current->phase, block->phase))
    fail_at(place, "%s: the block of rank %u need not run yet: no cluster barrier stands before this access", what,
            rank);
  if (!blocks[rank].live)
    fail_at(place, "%s: the block of rank %u has ended, and with it its shared memory", what, rank);
  std::vector<Visit>& of_block = visits[rank];
  if (of_block.empty()) of_block.resize(cluster.blocks * cluster.stride);
  of_block[current->number] = {access, place};
}

void leave_cluster(const Thread& thread) {
  if (thread.arrived_at.file)
    fail_at(thread.arrived_at, "cluster_arrive: the thread has returned from the kernel without a cluster_wait");
}

void end_block() {
  for (unsigned i = 0; i < visits[block->rank].size(); i++) {
    const Visit& last = visits[block->rank][i];
    if (last.access.epoch < cluster.first_epoch || ordered_before_end(last.access)) continue;
    current = &threads[i];
    fail_at(last.place,
            "distributed shared memory: the block of rank %u may have ended before this access: no cluster barrier "
            "stands between the two",
            block->rank);
  }
}

std::string describe_cluster_barrier(const Thread& thread) {
  return "the cluster barrier (" + std::to_string(cluster_barrier.arrived) + " of " + std::to_string(all_threads()) +
         " threads have arrived) " + describe_place(thread.waits_at);
}

void reset_cluster() {
  cluster_barrier.arrived = cluster_barrier.complete = 0;
  cluster_barrier.waiting.clear();
  for (unsigned i = 0; i < cluster.blocks * cluster.stride; i++) threads[i].waits = 0, threads[i].arrived_at = {};
  for (unsigned rank = 0; rank < cluster.blocks; rank++) visits[rank].clear();
}

}  // namespace emulator

using namespace emulator;

extern "C" {

unsigned emulator_cluster_rank() { return block->rank; }
unsigned emulator_cluster_blocks() { return cluster.blocks; }

void emulator_cluster_arrive(EmulatorPlace place) {
  join_lanes(CLUSTER_ARRIVE, ~0u, nullptr, place);
  Thread& self = *current;
  if (self.arrived_at.file)
    fail_at(place, "cluster_arrive: the thread arrives again: no cluster_wait has followed its arrival at %s",
            describe_place(self.arrived_at).c_str());
  self.arrived_at = place;
  release_to_cluster(self);
  ClusterBarrier& barrier = cluster_barrier;
  if (++barrier.arrived < all_threads()) return;
  barrier.arrived = 0;
  barrier.complete++;
  complete_cluster_phase();
  for (Thread* thread : barrier.waiting) wake(*thread);
  barrier.waiting.clear();
  maybe_let_others_run();
}

void emulator_cluster_wait(EmulatorPlace place) {
  join_lanes(CLUSTER_WAIT, ~0u, nullptr, place);
  Thread& self = *current;
  if (!self.arrived_at.file)
    fail_at(place, "cluster_wait: the thread has not arrived: cluster_arrive must come first");
  if (cluster_barrier.complete == self.waits) {
    cluster_barrier.waiting.push_back(&self);
    wait(State::at_cluster_barrier, place);
  }
  self.waits++;
  self.arrived_at = {};
  acquire_from_cluster(self);
}

void emulator_cluster_load(void* value, const void* shared, unsigned rank, unsigned bytes, EmulatorPlace place) {
  memcpy(value, visit(Kind::read, shared, rank, bytes, __builtin_return_address(0), place), bytes);
}

void emulator_cluster_store(const void* value, void* shared, unsigned rank, unsigned bytes, EmulatorPlace place) {
  memcpy(visit(Kind::write, shared, rank, bytes, __builtin_return_address(0), place), value, bytes);
}
}
