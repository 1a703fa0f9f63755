#include "schedule.h"

#include "async_copies.h"
#include "clusters.h"
#include "collectives.h"
#include "diagnostics.h"
#include "guards.h"
#include "memory.h"
#include "profile.h"
#include "wgmma.h"

namespace emulator {

Thread threads[MAX_BLOCKS * MAX_THREADS];
Thread* current;
Block blocks[MAX_BLOCKS];
Block* block = &blocks[0];
Cluster cluster;
Launch launch;

namespace {

Fiber scheduler;  // where run_cluster() stands while threads run
bool failed;
uint64_t random_state = 1;

// Runnable threads, oldest first; those before `head` have been taken.
std::vector<Thread*> queue;
size_t head;

Thread& next() {
  while (head == queue.size())
    if (!complete_a_load()) fail_deadlock();
  if (overdue) fail_overdue();
  Thread* chosen = nullptr;
  switch (launch.schedule) {
    case Schedule::forward:
      chosen = queue[head++];
      break;
    case Schedule::reverse:
      chosen = queue.back();
      queue.pop_back();
      break;
    case Schedule::random: {
      const size_t i = head + random_number() % (queue.size() - head);
      chosen = queue[i];
      queue[i] = queue.back();
      queue.pop_back();
      break;
    }
  }
  if (head == queue.size()) {
    queue.clear();
    head = 0;
  } else if (head > 4 * MAX_THREADS) {
    queue.erase(queue.begin(), queue.begin() + (long)head);
    head = 0;
  }
  return *chosen;
}

void switch_to(Thread& thread) {
  Thread& from = *current;
  if (thread.rank != block->rank) enter(blocks[thread.rank]);
  if (&thread == &from) return;
  launch.counters.switches++;
  current = &thread;
  switch_fiber(from.fiber, thread.fiber);
}

// What every fiber runs.
void run_thread() {
  launch.entry(launch.arguments);
  Thread& self = *current;
  check_copies_of(self);
  leave_warpgroup(self);
  leave_cluster(self);
  self.state = State::exited;
  block->live--;
  leave_warp(self);
  if (block->live == 0) {
    finish_copies();
    end_block();
    if (launch.profiled) end_requests();
    if (--cluster.live == 0) {
      current = nullptr;
      switch_fiber(self.fiber, scheduler);
    }
  }
  switch_to(next());
  __builtin_unreachable();
}

}  // namespace

bool run_cluster() {
  failed = false;
  queue.clear();
  head = 0;
  cluster.live = cluster.blocks;
  for (unsigned rank = 0; rank < cluster.blocks; rank++)
    for (unsigned i = 0; i < launch.threads; i++) {
      Thread& thread = threads[blocks[rank].first + i];
      prepare(thread.fiber, thread.number, run_thread);
      thread.state = State::ready;
      queue.push_back(&thread);
    }
  current = &next();
  enter(blocks[current->rank]);
  switch_fiber(scheduler, current->fiber);
  current = nullptr;
  return !failed;
}

void enter(Block& next) {
  block->epoch = epoch;
  block = &next;
  epoch = next.epoch;
  launch.shared_base = shared_window = next.shared->base;
  launch.shared_shadow = &next.shared->shadow;
}

void wake(Thread& thread) {
  thread.state = State::ready;
  queue.push_back(&thread);
}

void wait(State state, EmulatorPlace place) {
  current->state = state;
  current->waits_at = place;
  switch_to(next());
}

void let_others_run() {
  wake(*current);
  if (launch.schedule == Schedule::reverse) {  // its end of the queue is the front
    for (size_t i = queue.size() - 1; i > head; i--) queue[i] = queue[i - 1];
    queue[head] = current;
  }
  switch_to(next());
}

void maybe_let_others_run() {
  if (launch.schedule == Schedule::random) let_others_run();
}

void abandon_cluster() {
  failed = true;
  Fiber nobody;
  current = nullptr;
  switch_fiber(nobody, scheduler);
  __builtin_unreachable();
}

void seed_random(uint64_t seed) { random_state = seed * 0x9e3779b97f4a7c15ul + 0x2545f4914f6cdd1dul; }

uint64_t random_number() {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return random_state * 0x2545f4914f6cdd1dul >> 32;
}

}  // namespace emulator

extern "C" {
unsigned long emulator_thread_index() { return emulator::current->index; }
unsigned long emulator_block_index() { return emulator::block->index; }
unsigned long emulator_block_size() { return emulator::launch.block_size; }
unsigned long emulator_grid_size() { return emulator::launch.grid_size; }
}
