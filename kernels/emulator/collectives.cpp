#include "collectives.h"

#include <cstring>

#include "diagnostics.h"
#include "schedule.h"

namespace emulator {

namespace {

bool same(EmulatorPlace a, EmulatorPlace b) { return a.line == b.line && !strcmp(a.file, b.file); }

const char* base_name(const char* path) {
  const char* slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

// ---- the block barrier ----------------------------------------------------------------------------------
struct BlockBarrier {
  std::vector<Thread*> waiting;
  unsigned arrived;
  int passed;  // threads with a non-zero predicate, so far
  int result;  // of the last complete round; nobody can complete the next before all have read it
  EmulatorPlace place;
} barrier;

// ---- warp operations ------------------------------------------------------------------------------------
enum class Operation : uint8_t { shuffle, ballot, warp_barrier };
const char* const OPERATION[] = {"shuffle", "vote", "__syncwarp"};

struct Lane {
  unsigned long value, result;
  int argument, width;
  EmulatorShuffle shuffle;
};

// Lanes that have arrived at one operation and wait for the rest of its mask. Groups of disjoint masks may be
// under way at the same time.
struct Group {
  uint32_t mask, arrived;
  Operation operation;
  EmulatorPlace place;
  Lane* lanes[WARP];
};

struct Warp {
  uint32_t exited;
  std::vector<Group> groups;
} warps[MAX_WARPS];

uint32_t lanes_of(unsigned warp) {
  const unsigned count = launch.threads - warp * WARP;
  return count >= WARP ? ~0u : (1u << count) - 1;
}

void shuffle(const Group& group) {
  for (unsigned lane = 0; lane < WARP; lane++) {
    if (!(group.mask >> lane & 1)) continue;
    Lane& to = *group.lanes[lane];
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
    to.result = group.mask >> from & 1 ? group.lanes[from]->value : ~0ul;
  }
}

void ballot(const Group& group) {
  unsigned long votes = 0;
  for (unsigned lane = 0; lane < WARP; lane++)
    if (group.mask >> lane & 1 && group.lanes[lane]->value) votes |= 1ul << lane;
  for (unsigned lane = 0; lane < WARP; lane++)
    if (group.mask >> lane & 1) group.lanes[lane]->result = votes;
}

// Takes part in `operation` with the other lanes of `mask`; returns when its result is in `mine`.
void join(Operation operation, uint32_t mask, Lane& mine, EmulatorPlace place) {
  Thread& self = *current;
  Warp& warp = warps[self.warp];
  const char* name = OPERATION[(int)operation];
  launch.counters.warp_operations++;
  mask &= lanes_of(self.warp);
  if (!(mask >> self.lane & 1))
    fail_at(place, "%s: the calling lane %u is not in mask %08x", name, self.lane, mask);
  if (mask & warp.exited)
    fail_at(place, "%s: mask %08x names lanes that have returned from the kernel: %08x", name, mask,
            mask & warp.exited);
  size_t i = 0;
  while (i < warp.groups.size() && !(warp.groups[i].mask & mask)) i++;
  if (i == warp.groups.size()) warp.groups.push_back({mask, 0, operation, place, {}});
  Group& group = warp.groups[i];
  if (group.mask != mask || group.operation != operation || !same(group.place, place))
    fail_at(place,
            "divergent warp: lane %u is at this %s with mask %08x while lanes %08x wait at the %s of %s:%d with "
            "mask %08x",
            self.lane, name, mask, group.arrived, OPERATION[(int)group.operation], base_name(group.place.file),
            group.place.line, group.mask);
  group.lanes[self.lane] = &mine;
  group.arrived |= 1u << self.lane;
  if (group.arrived != mask) return wait(State::at_warp_operation, place);
  if (operation == Operation::shuffle) shuffle(group);
  if (operation == Operation::ballot) ballot(group);
  if (operation == Operation::warp_barrier) synchronise_lanes(self.warp, mask);
  warp.groups.erase(warp.groups.begin() + (long)i);
  for (unsigned lane = 0; lane < WARP; lane++)
    if (mask >> lane & 1 && lane != self.lane) wake(threads[self.warp * WARP + lane]);
  maybe_let_others_run();
}

}  // namespace

void reset_collectives() {
  barrier.waiting.clear();
  barrier.arrived = 0;
  barrier.passed = 0;
  for (Warp& warp : warps) {
    warp.exited = 0;
    warp.groups.clear();
  }
}

void leave_warp(const Thread& thread) {
  Warp& warp = warps[thread.warp];
  warp.exited |= 1u << thread.lane;
  for (const Group& group : warp.groups)
    if (group.mask & warp.exited)
      fail_at(group.place, "%s: lanes %08x wait with mask %08x, but lane %u has returned from the kernel",
              OPERATION[(int)group.operation], group.arrived, group.mask, thread.lane);
}

}  // namespace emulator

using namespace emulator;

extern "C" {

int emulator_block_barrier(int predicate, EmulatorPlace place) {
  if (barrier.arrived && !same(barrier.place, place))
    fail_at(place,
            "divergent barrier: this thread is at the block barrier of %s:%d while %u others wait at that of %s:%d",
            base_name(place.file), place.line, barrier.arrived, base_name(barrier.place.file), barrier.place.line);
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
  join(Operation::shuffle, mask, mine, place);
  return mine.result;
}

unsigned emulator_ballot(unsigned mask, int predicate, EmulatorPlace place) {
  Lane mine{predicate != 0, 0, 0, 0, EMULATOR_SHUFFLE_INDEX};
  join(Operation::ballot, mask, mine, place);
  return (unsigned)mine.result;
}

void emulator_warp_barrier(unsigned mask, EmulatorPlace place) {
  Lane mine{};
  join(Operation::warp_barrier, mask, mine, place);
}

unsigned emulator_active_mask() {
  return lanes_of(current->warp) & ~warps[current->warp].exited;
}
}
