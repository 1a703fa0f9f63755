// What the runtime knows while a kernel runs. One launch at a time: emulate.py holds a lock.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "fibers.h"
#include "interface.h"
#include "shadow.h"

namespace emulator {

constexpr unsigned WARP = 32;
constexpr unsigned MAX_THREADS = 1024;
constexpr unsigned MAX_WARPS = MAX_THREADS / WARP;
constexpr unsigned MAX_STATIC_SHARED = 48 << 10;
constexpr unsigned MAX_SHARED = 227 << 10;

// ---- a thread -------------------------------------------------------------------------------------------
enum class State : uint8_t {
  ready,
  at_block_barrier,
  at_named_barrier,
  at_mbarrier,
  at_warp_operation,
  at_warpgroup_operation,
  exited
};

struct Thread {
  uint16_t number;  // within the block, x fastest
  uint8_t lane, warp;
  State state;
  uint32_t clock;  // grows at every __syncwarp the thread takes part in
  unsigned long index;
  EmulatorPlace waits_at;  // where, in the states at_…
  uint32_t waits_for;      // number of a named barrier, address of an mbarrier
  uint16_t fences;         // between the proxies that it has executed; see Access
  bool has_fragments;      // some of its variables are, or were, registers of a wgmma
  Fiber fiber;
};

// ---- memory ---------------------------------------------------------------------------------------------
enum class Role : uint32_t { input, output, update };

// A tensor, as the kernel sees it: a copy in the arena (see arena.h), far from all others.
struct Tensor {
  std::string name;
  uintptr_t begin, end;  // both 0: a null pointer
  Role role;
  Shadow* shadow;  // of outputs and updates; inputs cannot change, so nothing about them can race
};

// A __shared__ variable of the module, as offsets into the module's thread-local block.
struct SharedVariable {
  std::string name;
  uint32_t begin, end;
  bool dynamic;
};

// A loaded kernel file.
struct Module {
  uintptr_t code_begin, code_end;  // of all its segments, code and constants
  void* (*anchor)();               // address of a thread-local whose offset is anchor_offset
  uint32_t anchor_offset;
  std::vector<SharedVariable> variables;
  std::vector<uint16_t> owner;  // offset -> 1 + index of the variable that holds it; 0: none
  std::vector<char> touched;    // by owner: used in this launch
  Shadow shadow;

  bool contains(uintptr_t address) const { return address >= code_begin && address < code_end; }
};

// ---- the launch -----------------------------------------------------------------------------------------
enum class Schedule : uint32_t { forward, reverse, random };

struct PackedTensorMap;

struct Counters {
  uint64_t global_bytes_read, global_bytes_written, shared_accesses, block_barriers, warp_operations, switches;
  uint64_t mma_instructions;  // a warp's counted once
};

struct Block {
  unsigned long index;
  unsigned number;
  unsigned live;         // threads that have not exited
  uint32_t first_epoch;  // epoch at its start
};

struct Launch {
  Module* module;
  uintptr_t shared_base;  // of the module's thread-local block
  uintptr_t shared_bytes;
  void (*entry)(void**);
  void** arguments;
  unsigned long block_size, grid_size;
  unsigned threads;
  Schedule schedule;
  bool profiled;
  std::vector<Tensor> tensors;
  std::vector<const PackedTensorMap*> tensor_maps;
  uint32_t first_epoch;
  std::vector<std::pair<uint32_t, unsigned>> blocks_by_epoch;  // (first epoch, number), in the order they ran
  Counters counters;
};

// Index of threads, sizes and blocks travel as x | y << 31 | z << 47.
struct Index {
  unsigned x, y, z;
};
inline unsigned long pack(Index i) { return i.x | (unsigned long)i.y << 31 | (unsigned long)i.z << 47; }
inline Index unpack(unsigned long i) {
  return {(unsigned)(i & 0x7fffffff), (unsigned)(i >> 31 & 0xffff), (unsigned)(i >> 47)};
}

extern Thread threads[MAX_THREADS];
extern Thread* current;  // null while no kernel code runs
extern Block block;
extern Launch launch;

}  // namespace emulator
