// How a launch fails: one message, the thread that failed, and where in the module it was.
#pragma once
#include <cstdint>
#include <string>

#include "interface.h"

namespace emulator {

struct Access;

// Ends the launch from inside a kernel. Never returns: the fibers are abandoned where they stand.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Ends the launch on behalf of an operation that states its own place in the source.
[[noreturn]] void fail_at(EmulatorPlace place, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Names the other party of a race; the report then tells its place in the source, too.
void set_other(const Access& access);
// For a failure that is told from another stack than the thread's: the instruction that was interrupted.
void set_interrupted(uintptr_t pc);

// Offset in the module of the code at `pc`; 0 for code elsewhere.
uint32_t code_offset(const void* pc);

bool same_place(EmulatorPlace a, EmulatorPlace b);
std::string describe_place(EmulatorPlace place);    // "conv.cu:12"
std::string describe_rank(unsigned rank);           // " of rank 1" where a cluster has several blocks, else ""
std::string describe_thread(unsigned number);       // "thread (3,0,0)", and its rank
std::string describe_thread(const Access& access);  // and its block, where that is of another cluster
[[noreturn]] void fail_deadlock();

// What emulate.py gets when a launch fails. Offsets are into the module, 0 where there is none.
struct Report {
  char message[2048];
  int32_t in_thread;  // 0: the launch was refused before any thread ran
  uint32_t block[3], thread[3];
  EmulatorPlace place;  // file: null if only `frames` tell the place
  uint32_t frame_count;
  uint64_t frames[32];  // innermost first
  uint64_t other;       // instruction of the other access of a race
};
extern Report* report;

}  // namespace emulator
