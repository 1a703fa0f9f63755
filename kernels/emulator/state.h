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
constexpr unsigned WARPGROUP = 4 * WARP;
constexpr unsigned MAX_THREADS = 1024;  // of a block
constexpr unsigned MAX_BLOCKS = 16;     // of a cluster
constexpr unsigned MAX_WARPS = MAX_BLOCKS * MAX_THREADS / WARP;  // of a cluster
constexpr unsigned MAX_STATIC_SHARED = 48 << 10;
constexpr unsigned MAX_SHARED = 227 << 10;

// ---- a thread -------------------------------------------------------------------------------------------
enum class State : uint8_t {
  ready,
  at_block_barrier,
  at_named_barrier,
  at_cluster_barrier,
  at_mbarrier,
  at_warp_operation,
  at_warpgroup_operation,
  exited
};

struct alignas(64) Thread {
  uint16_t number;  // within the cluster: of its block's first thread, and x fastest from there
  uint16_t warp;    // within the cluster
  uint8_t lane, rank;
  State state;
  bool has_fragments;  // some of its variables are, or were, registers of a wgmma
  uint32_t clock;      // grows at every __syncwarp the thread takes part in
  uint32_t waits_for;  // number of a named barrier, address of an mbarrier
  char* stack;
  Fiber fiber;
  unsigned long index;
  uint16_t fences;           // between the proxies that it has executed; see Access
  uint32_t phase;            // cluster barriers that it knows to be complete
  uint32_t waits;            // for the cluster barrier, so far
  EmulatorPlace waits_at;    // where, in the states at_…
  EmulatorPlace arrived_at;  // the cluster barrier, without having waited yet; file null: nowhere
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

// A __shared__ variable of the module, as offsets into its shared memory.
struct SharedVariable {
  std::string name;
  uint32_t begin, end;
  bool dynamic;
};

// What a block has of the module's shared variables.
struct SharedMemory {
  uintptr_t base;
  Shadow shadow;
};

// A loaded kernel file.
struct Module {
  uintptr_t code_begin, code_end;  // of all its segments, code and constants
  void* (*anchor)();               // address of a thread-local whose offset is anchor_offset
  uint32_t anchor_offset;
  std::vector<SharedVariable> variables;
  std::vector<uint16_t> owner;  // offset -> 1 + index of the variable that holds it; 0: none
  std::vector<char> touched;    // by owner: used in this launch
  std::vector<SharedMemory> shared;  // of the blocks of a cluster, by rank

  bool contains(uintptr_t address) const { return address >= code_begin && address < code_end; }
};

// ---- the launch -----------------------------------------------------------------------------------------
enum class Schedule : uint32_t { forward, reverse, random };

struct PackedTensorMap;

struct Counters {
  uint64_t global_bytes_read, global_bytes_written, shared_accesses, block_barriers, warp_operations, switches;
  uint64_t mma_instructions, wgmma_instructions;  // a warp's, a warpgroup's counted once
};

// The blocks of a cluster run together, and one cluster after the other; most consist of one block.
struct Block {
  unsigned long index;
  unsigned rank;  // within the cluster
  unsigned first;  // number of its first thread
  unsigned live;  // threads that have not exited
  uint32_t epoch;  // while none of its threads runs
  uint32_t phase;  // cluster barriers that all of its threads know of
  SharedMemory* shared;
};

struct Cluster {
  unsigned blocks;
  bool declared;         // by the entry, even if it is of one block: then cluster barriers order accesses
  unsigned stride;       // from the first thread of a block to that of the next one
  unsigned live;         // blocks of which threads have not exited
  uint32_t first_epoch;  // epoch at its start
};

struct Launch {
  Module* module;
  uintptr_t shared_base;  // of the running block
  Shadow* shared_shadow;
  uintptr_t shared_bytes;
  void (*entry)(void**);
  void** arguments;
  unsigned long block_size, grid_size;
  unsigned threads;  // of a block
  Schedule schedule;
  bool profiled;
  std::vector<Tensor> tensors;
  std::vector<const PackedTensorMap*> tensor_maps;
  uint32_t first_epoch;
  // (first epoch, number of its first block) of each cluster, in the order they ran
  std::vector<std::pair<uint32_t, unsigned>> blocks_by_epoch;
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

extern Thread threads[MAX_BLOCKS * MAX_THREADS];  // of the cluster
extern Thread* current;                           // null while no kernel code runs
extern Block blocks[MAX_BLOCKS];                  // of the cluster
extern Block* block;                              // the one that runs
extern Cluster cluster;
extern Launch launch;

// Number of a thread of the running block within that block.
inline unsigned in_block(unsigned number) { return number - block->first; }

}  // namespace emulator
