// mbarriers: barriers in shared memory that count threads and the bytes of bulk copies.
#pragma once
#include <string>
#include <vector>

#include "state.h"

namespace emulator {

// As Access::thread: the memory is an mbarrier's and nobody else's.
constexpr uint16_t MBARRIER = 0xffff;

struct Mbarrier {
  uint32_t address;
  uint32_t count, pending;  // arrivals that complete a phase, and how many of them are missing
  uint32_t phase;
  int64_t bytes;      // expected in this phase and not yet copied; negative while copies are ahead of that
  uint64_t expected;  // in this phase, copied or not
  Clocks arriving;    // what happened before the arrivals so far
  Clocks completed;   // and before the end of the last complete phase
  uint16_t agent;     // of the copies that complete on it
  Access initialised;
  bool visible_to_async_proxy;
  std::vector<Thread*> waiting;
};

// The initialised mbarrier at a shared address of the running block; fails if there is none, or not for the running
// thread.
Mbarrier& find_mbarrier(uint32_t address, const char* instruction, EmulatorPlace place);
// The same without checks.
Mbarrier& mbarrier_at(uint32_t address);
// A copy of so many bytes has been done.
void complete_bytes(Mbarrier& barrier, uint32_t bytes);
// "the mbarrier shared 'full' byte 8 (phase 3: 1 of 1 arrivals, 0 of 8192 bytes)"
std::string describe_mbarrier(uint32_t address);

void reset_mbarriers();

}  // namespace emulator
