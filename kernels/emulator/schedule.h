// Whose turn it is: threads run one at a time, each until it waits, in the order of the launch's schedule.
#pragma once
#include <cstdint>

#include "state.h"

namespace emulator {

// Runs the threads of the cluster to their end. False if the launch failed (see `report`).
bool run_cluster();

// From now on `block` is the running one: its epoch and its shared memory are those that count.
void enter(Block& block);

// Makes a waiting thread runnable again.
void wake(Thread& thread);
// The running thread waits in `state` until it is woken; the others run.
void wait(State state, EmulatorPlace place);
// The running thread goes to the end of the queue.
void let_others_run();
// As the last one to arrive somewhere: under the random schedule it need not be the first to go on.
void maybe_let_others_run();

// Leaves kernel code for good; run_cluster() returns false.
[[noreturn]] void abandon_cluster();

void seed_random(uint64_t seed);
uint64_t random_number();

}  // namespace emulator
