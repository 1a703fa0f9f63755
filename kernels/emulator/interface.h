// The calls between a compiled kernel file and the emulator's runtime library. Plain C, no other header,
// because every kernel file reads it.
#pragma once

#pragma GCC visibility push(default)
extern "C" {

// Where a call stands in the source.
struct EmulatorPlace {
  const char* file;
  int line;
};

// Indices of the running thread and sizes of the launch, packed as x | y << 31 | z << 47 (CUDA's own limits
// are 31, 16 and 16 bits). `const`: within one thread they never change, so the compiler may call once.
__attribute__((const)) unsigned long emulator_thread_index();
__attribute__((const)) unsigned long emulator_block_index();
__attribute__((const)) unsigned long emulator_block_size();
__attribute__((const)) unsigned long emulator_grid_size();

// Waits for every thread of the block; returns how many of them passed a non-zero `predicate`.
int emulator_block_barrier(int predicate, EmulatorPlace place);

// Warp-wide operations. All lanes of `mask` must arrive at the same operation in the same source line.
enum EmulatorShuffle { EMULATOR_SHUFFLE_INDEX, EMULATOR_SHUFFLE_UP, EMULATOR_SHUFFLE_DOWN, EMULATOR_SHUFFLE_XOR };
unsigned long emulator_shuffle(EmulatorShuffle kind, unsigned mask, unsigned long value, int lane, int width,
                               EmulatorPlace place);
unsigned emulator_ballot(unsigned mask, int predicate, EmulatorPlace place);
void emulator_warp_barrier(unsigned mask, EmulatorPlace place);
unsigned emulator_active_mask();

// Announces an atomic read-modify-write of `bytes` at `address`, made by the code at `pc`.
void emulator_atomic(const void* address, unsigned bytes, const void* pc);

// The kernel gives up: __trap() and a failed assert().
[[noreturn]] void emulator_trap(const char* what, EmulatorPlace place);

// What an entry expects, so that a launch with other arguments is refused instead of misread.
struct EmulatorParameter {
  unsigned bytes;          // of the parameter itself
  unsigned pointee_bytes;  // 0: not a pointer
  unsigned pointee_const;
};
struct EmulatorSignature {
  unsigned count;
  unsigned max_threads;  // from __launch_bounds__; 0: none stated
  EmulatorParameter parameter[32];
};
}
#pragma GCC visibility pop
