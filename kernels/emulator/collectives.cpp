#include "collectives.h"

#include <cstring>

#include "diagnostics.h"
#include "profile.h"
#include "schedule.h"

namespace emulator {

namespace {

// ---- the block barrier ----------------------------------------------------------------------------------
struct BlockBarrier {
  std::vector<Thread*> waiting;
  unsigned arrived;
  int passed;  // threads with a non-zero predicate, so far
  int result;  // of the last complete round; nobody can complete the next before all have read it
  EmulatorPlace place;
} block_barriers[MAX_BLOCKS];

// ---- named barriers -------------------------------------------------------------------------------------
struct NamedBarrier {
  unsigned threads, arrived;    // expected, and so far
  uint32_t lanes[MAX_THREADS / WARP];  // that have arrived
  std::vector<Thread*> waiting;
  Clocks clocks;  // what happened before the arrivals
  EmulatorPlace place;
} named_barriers[MAX_BLOCKS][16];

// ---- warp operations ------------------------------------------------------------------------------------
struct Lane {
  unsigned long value, result;
  int argument, width;
  EmulatorShuffle shuffle;
};

// Lanes that have arrived at one operation and wait for the rest of its mask. Groups of disjoint masks may be
// under way at the same time.
struct Group {
  uint32_t mask, arrived;
  const WarpOperation* operation;
  EmulatorPlace place;
  void* lanes[WARP];
};

struct Warp {
  uint32_t exited;
  std::vector<Group> groups;
} warps[MAX_WARPS];

uint32_t lanes_of(unsigned warp) {
  const unsigned count = launch.threads - in_block(warp * WARP);
  return count >= WARP ? ~0u : (1u << count) - 1;
}

void shuffle(void* const (&lanes)[WARP], uint32_t mask) {
  for (unsigned lane = 0; lane < WARP; lane++) {
    if (!(mask >> lane & 1)) continue;
    Lane& to = *(Lane*)lanes[lane];
    const int first = (int)lane & ~(to.width - 1), last = first + to.width - 1;
    int from = (int)lane;
    switch (to.shuffle) {
      case EMULATOR_SHUFFLE_INDEX: from = first + (to.argument & (to.width - 1)); break;
      case EMULATOR_SHUFFLE_UP: from -= to.argument; break;
      case EMULATOR_SHUFFLE_DOWN: from += to.argument; break;
      case EMULATOR_SHUFFLE_XOR: from ^= to.argument; break;
    }
    // As the hardware clamps: up stops at the segment's first lane, down and xor at its last.
    if (to.shuffle == EMULATOR_SHUFFLE_UP ? from < first : from > last) from = (int)lane;
    // A lane that does not take part has no defined value: all ones, which is NaN in a float.
    to.result = mask >> from & 1 ? ((Lane*)lanes[from])->value : ~0ul;
  }
}

void ballot(void* const (&lanes)[WARP], uint32_t mask) {
  unsigned long votes = 0;
  for (unsigned lane = 0; lane < WARP; lane++)
    if (mask >> lane & 1 && ((Lane*)lanes[lane])->value) votes |= 1ul << lane;
  for (unsigned lane = 0; lane < WARP; lane++)
    if (mask >> lane & 1) ((Lane*)lanes[lane])->result = votes;
}

const WarpOperation SHUFFLE{"shuffle", shuffle};
const WarpOperation VOTE{"vote", ballot};
const WarpOperation ELECT{"elect", [](void* const (&)[WARP], uint32_t) {}};
const WarpOperation WARP_BARRIER{
    "__syncwarp", [](void* const (&)[WARP], uint32_t mask) { synchronise_lanes(current->warp, mask); }};

}  // namespace

void join_lanes(const WarpOperation& operation, uint32_t mask, void* mine, EmulatorPlace place) {
  Thread& self = *current;
  Warp& warp = warps[self.warp];
  launch.counters.warp_operations++;
  mask &= lanes_of(self.warp);
  if (!(mask >> self.lane & 1))
    fail_at(place, "%s: the calling lane %u is not in mask %08x", operation.name, self.lane, mask);
  if (mask & warp.exited)
    fail_at(place, "%s: mask %08x names lanes that have returned from the kernel: %08x", operation.name, mask,
            mask & warp.exited);
  size_t i = 0;
  while (i < warp.groups.size() && !(warp.groups[i].mask & mask)) i++;
  if (i == warp.groups.size()) warp.groups.push_back({mask, 0, &operation, place, {}});
  Group& group = warp.groups[i];
  if (group.mask != mask || group.operation != &operation || !same_place(group.place, place))
    fail_at(place,
            "divergent warp: lane %u is at this %s with mask %08x while lanes %08x wait at the %s of %s with mask %08x",
            self.lane, operation.name, mask, group.arrived, group.operation->name,
            describe_place(group.place).c_str(), group.mask);
  group.lanes[self.lane] = mine;
  group.arrived |= 1u << self.lane;
  if (group.arrived != mask) return wait(State::at_warp_operation, place);
  operation.complete(group.lanes, mask);
  warp.groups.erase(warp.groups.begin() + (long)i);
  for (unsigned lane = 0; lane < WARP; lane++)
    if (mask >> lane & 1 && lane != self.lane) wake(threads[self.warp * WARP + lane]);
  maybe_let_others_run();
}

void join_warp(const WarpOperation& operation, void* mine, EmulatorPlace place) {
  if (lanes_of(current->warp) != ~0u)
    fail_at(place, "%s: expected a warp of 32 threads, got the last one of a block of %u", operation.name,
            launch.threads);
  join_lanes(operation, ~0u, mine, place);
}

void reset_collectives() {
  for (unsigned rank = 0; rank < cluster.blocks; rank++) {
    BlockBarrier& barrier = block_barriers[rank];
    barrier.waiting.clear();
    barrier.arrived = 0;
    barrier.passed = 0;
    for (NamedBarrier& each : named_barriers[rank]) each = {};
  }
  for (unsigned warp = 0; warp < cluster.blocks * cluster.stride / WARP; warp++) {
    warps[warp].exited = 0;
    warps[warp].groups.clear();
  }
}

std::string describe_named_barrier(unsigned id) {
  const NamedBarrier& named = named_barriers[block->rank][id];
  return "named barrier " + std::to_string(id) + " (" + std::to_string(named.arrived) + " of " +
         std::to_string(named.threads) + " threads have arrived)";
}

void leave_warp(const Thread& thread) {
  Warp& warp = warps[thread.warp];
  warp.exited |= 1u << thread.lane;
  for (const Group& group : warp.groups)
    if (group.mask & warp.exited)
      fail_at(group.place, "%s: lanes %08x wait with mask %08x, but lane %u has returned from the kernel",
              group.operation->name, group.arrived, group.mask, thread.lane);
}

}  // namespace emulator

using namespace emulator;

extern "C" {

int emulator_block_barrier(int predicate, EmulatorPlace place) {
  BlockBarrier& barrier = block_barriers[block->rank];
  if (barrier.arrived && !same_place(barrier.place, place))
    fail_at(place,
            "divergent barrier: this thread is at the block barrier of %s while %u others wait at that of %s",
            describe_place(place).c_str(), barrier.arrived, describe_place(barrier.place).c_str());
  barrier.place = place;
  barrier.arrived++;
  barrier.passed += predicate != 0;
  if (barrier.arrived < launch.threads) {
    barrier.waiting.push_back(current);
    wait(State::at_block_barrier, place);
    return barrier.result;
  }
  launch.counters.block_barriers++;
  barrier.result = barrier.passed;
  barrier.arrived = 0;
  barrier.passed = 0;
  advance_epoch();
  if (launch.profiled) end_requests();
  for (Thread* thread : barrier.waiting) wake(*thread);
  barrier.waiting.clear();
  const int result = barrier.result;
  maybe_let_others_run();
  return result;
}

unsigned long emulator_shuffle(EmulatorShuffle kind, unsigned mask, unsigned long value, int lane, int width,
                               EmulatorPlace place) {
  if (width <= 0 || width > 32 || width & (width - 1))
    fail_at(place, "shuffle: expected a width that is a power of two up to 32, got %d", width);
  Lane mine{value, 0, lane, width, kind};
  join_lanes(SHUFFLE, mask, &mine, place);
  return mine.result;
}

unsigned emulator_ballot(unsigned mask, int predicate, EmulatorPlace place) {
  Lane mine{predicate != 0, 0, 0, 0, EMULATOR_SHUFFLE_INDEX};
  join_lanes(VOTE, mask, &mine, place);
  return (unsigned)mine.result;
}

void emulator_warp_barrier(unsigned mask, EmulatorPlace place) {
  Lane mine{};
  join_lanes(WARP_BARRIER, mask, &mine, place);
}

unsigned emulator_active_mask() {
  return lanes_of(current->warp) & ~warps[current->warp].exited;
}

// Which lane is elected is nobody's business, so each schedule has its own.
bool emulator_elect(unsigned mask, EmulatorPlace place) {
  join_lanes(ELECT, mask, nullptr, place);
  mask &= lanes_of(current->warp);
  unsigned lane = (unsigned)__builtin_ctz(mask);
  if (launch.schedule == Schedule::reverse) lane = 31 - (unsigned)__builtin_clz(mask);
  if (launch.schedule == Schedule::random)
    for (unsigned skip = mask * 0x9e3779b9u % (unsigned)__builtin_popcount(mask); skip--;)
      lane += 1 + (unsigned)__builtin_ctz(mask >> (lane + 1));
  return current->lane == lane;
}

void emulator_named_barrier(unsigned id, unsigned threads, bool waits, EmulatorPlace place) {
  if (id < 1 || id > 15) fail_at(place, "named barrier: expected a number from 1 to 15, got %u", id);
  if (!threads || threads % WARP || threads > (launch.threads + WARP - 1) / WARP * WARP)
    fail_at(place, "named barrier %u: expected a multiple of 32 threads of this block of %u, got %u", id,
            launch.threads, threads);
  NamedBarrier& barrier = named_barriers[block->rank][id];
  Thread& self = *current;
  const unsigned own_warp = in_block(self.number) / WARP;
  if (barrier.arrived && barrier.threads != threads)
    fail_at(place, "named barrier %u: this thread counts on %u threads, %u others that have arrived at %s on %u", id,
            threads, barrier.arrived, describe_place(barrier.place).c_str(), barrier.threads);
  if (barrier.lanes[own_warp] >> self.lane & 1)
    fail_at(place, "named barrier %u: the thread arrives again before the others have: %u of %u", id,
            barrier.arrived, threads);
  barrier.threads = threads;
  barrier.place = place;
  barrier.lanes[own_warp] |= 1u << self.lane;
  release(self, barrier.clocks);
  if (waits) barrier.waiting.push_back(&self);
  if (++barrier.arrived < threads) {
    self.waits_for = id;
    if (waits) wait(State::at_named_barrier, place);
    return;
  }
  for (unsigned warp = 0; warp < MAX_THREADS / WARP; warp++)
    if (barrier.lanes[warp] && barrier.lanes[warp] != lanes_of(block->first / WARP + warp))
      fail_at(place, "named barrier %u: of warp %u only the lanes %08x have arrived", id, warp, barrier.lanes[warp]);
  for (Thread* thread : barrier.waiting) {
    acquire(*thread, barrier.clocks);
    if (thread != &self) wake(*thread);
  }
  barrier = {};
  maybe_let_others_run();
}
}
