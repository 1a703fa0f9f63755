// Checks of every load and store, and the arena in which the tensors of a launch live.
#pragma once
#include <cstdint>
#include <string>

#include "shadow.h"

namespace emulator {

// Tensors are copied into an arena, this far apart, so that an index that leaves one tensor cannot land in
// another unseen, and so that a failed launch leaves the caller's tensors as they were.
constexpr uint64_t ARENA_GAP = 1 << 20;

// Reserves at least `bytes` of address space; memory is taken when it is first touched.
char* reserve_arena(uint64_t bytes);
// Gives the memory back, but not the addresses.
void release_arena();

// "'x' byte 12", "shared 'tile' byte 4", or the bare address.
std::string describe_address(uintptr_t address);
std::string describe_shared(uint32_t address);

// Checks what the running thread does, through a pointer to shared memory, with the same place in the block of the
// given rank. Returns where that is.
char* access_distributed(Kind kind, const void* pointer, unsigned rank, unsigned bytes, const void* pc);

// Checks what an instruction does with `bytes` at a shared address, on behalf of the running thread and as for
// an access through a pointer; `pc` is in the kernel. Returns where the bytes are.
const char* read_shared(uint32_t address, unsigned bytes, unsigned alignment, const void* pc);
char* write_shared(uint32_t address, unsigned bytes, unsigned alignment, const void* pc);

// The same for what an asynchronous operation does: the record says `now`, and order is judged by what `thread`
// knows. Writes that were under way are settled when they have been done.
void access_shared(Kind kind, uint32_t address, unsigned bytes, const Access& now, const Thread& thread);
void access_global(Kind kind, uintptr_t address, unsigned bytes, const Access& now, const Thread& thread);
void settle_shared(uint32_t address, unsigned bytes, const Access& write);
void settle_global(uintptr_t address, unsigned bytes, const Access& write);
// The record of an access that the running thread makes now, from the code at `pc`.
Access access_now(Kind kind, const void* pc);

// Sets the size of the module's dynamic shared array and prepares its shared memory for a launch.
struct Module;
void prepare_shared(Module& module, uint32_t dynamic_bytes);
// The blocks of a new cluster find 0xFF in all of their shared memory: NaN in every float type.
void poison_shared();
// Where the shared variables of all modules are for the running thread; the kernels ask for it, see emulator_build.py.
extern uintptr_t shared_window;
// Bytes of the static shared variables that this launch has used so far.
uint32_t static_shared_used();

}  // namespace emulator
