// Two failures that no call-back can see: a stack that grows out of its bounds, and a loop that never ends.
#pragma once

namespace emulator {

// Watches the launch from construction to destruction: catches touches of a stack's guard zone, and ends a
// launch of which one block (or cluster) takes more than `seconds` of this OS thread's CPU time.
class Guards {
 public:
  explicit Guards(double seconds);
  ~Guards();
  Guards(const Guards&) = delete;
};

// The running block has used up its time; the scheduler then ends the launch at the next switch of threads.
extern volatile bool overdue;
[[noreturn]] void fail_overdue();

}  // namespace emulator
