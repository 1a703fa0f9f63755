#include "memory.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstring>
#include <new>

#include "diagnostics.h"
#include "mbarriers.h"
#include "profile.h"
#include "schedule.h"
#include "state.h"
#include "wgmma.h"

namespace emulator {

uintptr_t shared_window;

namespace {

// An address this near to the module's shared memory is taken for an index that has left it.
constexpr uintptr_t SHARED_MARGIN = 4096;

struct Arena {
  char* begin = nullptr;
  uint64_t bytes = 0;
} arena;

const char* verb(Kind kind) { return kind == Kind::read ? "read" : kind == Kind::write ? "write" : "atomic update"; }

// What is at an offset of shared memory; where it is not that of the running thread's block, with its rank.
std::string shared_place(uint64_t offset, unsigned rank = block->rank) {
  const Module& module = *launch.module;
  const unsigned owner = offset < module.owner.size() ? module.owner[offset] : 0;
  const std::string of = current && rank != current->rank ? describe_rank(rank) : "";
  if (!owner) return "shared memory offset " + std::to_string(offset) + of;
  const SharedVariable& variable = module.variables[owner - 1];
  return "shared '" + variable.name + "' byte " + std::to_string(offset - variable.begin) + of;
}

[[noreturn]] void fail_race(Conflict conflict, Kind kind, const std::string& place, const Access& other) {
  if (conflict == Conflict::never_written)
    fail("%s of %s before anything has written it", verb(kind), place.c_str());
  const char* earlier = conflict == Conflict::write_after_read ? "read" : other.atomic ? "atomic update" : "write";
  const char* advice = "";
  if (other.epoch < cluster.first_epoch)
    advice = " (blocks of one launch cannot wait for each other)";
  else if (other.thread < FIRST_AGENT && other.thread / cluster.stride != current->rank)
    advice = " (between blocks of a cluster only cluster_arrive and cluster_wait make an order)";
  if (other.thread == MBARRIER) fail("%s of %s, which is an mbarrier", verb(kind), place.c_str());
  set_other(other);
  if (other.clock == UNDER_WAY) {
    const char* copy = other.thread >= FIRST_AGENT ? "" : place[0] == '\'' ? "a bulk store of " : "a cp.async of ";
    fail("race: %s of %s while %s%s writes it: no wait has covered that yet", verb(kind), place.c_str(), copy,
         describe_thread(other).c_str());
  }
  if (conflict == Conflict::unfenced)
    fail("missing fence_proxy_async: %s of %s by TMA or wgmma after the write by %s, which has not fenced since",
         verb(kind), place.c_str(), describe_thread(other).c_str());
  fail("race: %s of %s is not ordered after the %s by %s%s", verb(kind), place.c_str(), earlier,
       describe_thread(other).c_str(), advice);
}

// Blames the variable that is nearest to `offset`, which lies in none of them.
[[noreturn]] void fail_shared_bounds(int64_t offset, unsigned bytes, Kind kind) {
  const SharedVariable* nearest = nullptr;
  int64_t best = INT64_MAX;
  for (const SharedVariable& variable : launch.module->variables) {
    const int64_t distance = offset < variable.begin ? variable.begin - offset : offset + bytes - variable.end;
    if (distance < best) best = distance, nearest = &variable;
  }
  if (!nearest) fail("%s of %u bytes of shared memory, of which the kernel has none", verb(kind), bytes);
  fail("out of bounds: %s of %u bytes at byte %ld of shared '%s', which has %u bytes", verb(kind), bytes,
       (long)(offset - nearest->begin), nearest->name.c_str(), nearest->end - nearest->begin);
}

template <Kind kind>
__attribute__((always_inline)) inline void check_shared(uintptr_t offset, unsigned bytes, unsigned alignment,
                                                        const Access& now, const Thread& thread, Shadow& shadow,
                                                        unsigned rank) {
  Module& module = *launch.module;
  launch.counters.shared_accesses++;
  const unsigned owner = module.owner[offset];
  if (!owner || offset + bytes > launch.shared_bytes || module.owner[offset + bytes - 1] != owner)
    fail_shared_bounds((int64_t)offset, bytes, kind);
  if ((launch.shared_base + offset) % alignment)
    fail("misaligned: %s of %u bytes at %s", verb(kind), bytes, shared_place(offset, rank).c_str());
  module.touched[owner] = 1;
  Access other;
  uint64_t at;
  const Conflict conflict =
      shadow.access<kind>(offset, bytes, now, thread, cluster.first_epoch, true, &other, &at);
  if (conflict != Conflict::none) fail_race(conflict, kind, shared_place(at, rank), other);
}

// In the running block's own shared memory.
template <Kind kind>
__attribute__((always_inline)) inline void check_shared(uintptr_t offset, unsigned bytes, unsigned alignment,
                                                        const Access& now, const Thread& thread) {
  check_shared<kind>(offset, bytes, alignment, now, thread, *launch.shared_shadow, block->rank);
}

// The block of the cluster, other than the running one, in whose shared memory an address lies; -1: none.
int foreign_rank(uintptr_t address) {
  for (unsigned rank = 0; rank < cluster.blocks; rank++)
    if (rank != block->rank && address - blocks[rank].shared->base < launch.shared_bytes) return (int)rank;
  return -1;
}

[[noreturn]] void fail_global_bounds(uintptr_t address, unsigned bytes, Kind kind) {
  if (foreign_rank(address) >= 0)
    fail("out of bounds: %s of %u bytes at %s, through a pointer of that block's: cluster_load and cluster_store are "
         "for that", verb(kind), bytes, describe_address(address).c_str());
  if (address + SHARED_MARGIN - launch.shared_base < launch.shared_bytes + 2 * SHARED_MARGIN)
    fail_shared_bounds((int64_t)(address - launch.shared_base), bytes, kind);
  if (address < 1ul << 32) {
    std::string names;
    for (const Tensor& tensor : launch.tensors)
      if (!tensor.begin) names += (names.empty() ? "" : ", ") + ("'" + tensor.name + "'");
    fail("null pointer: %s of %u bytes at null + %lu%s%s", verb(kind), bytes, address,
         names.empty() ? "" : "; null in this launch: ", names.c_str());
  }
  const Tensor* nearest = nullptr;
  uint64_t best = UINT64_MAX;
  for (const Tensor& tensor : launch.tensors) {
    if (!tensor.begin) continue;
    const uint64_t distance = address < tensor.begin ? tensor.begin - address : address + bytes - tensor.end;
    if (distance < best) best = distance, nearest = &tensor;
  }
  if (const int owner = stack_owner(address); owner >= 0)
    fail("out of bounds: %s of %u bytes in the local memory of %s", verb(kind), bytes,
         describe_thread((unsigned)owner).c_str());
  if (!nearest || best > ARENA_GAP)
    fail("out of bounds: %s of %u bytes at address 0x%lx, which belongs to no tensor and no shared variable",
         verb(kind), bytes, address);
  fail("out of bounds: %s of %u bytes at byte %ld of '%s', which has %lu bytes", verb(kind), bytes,
       (long)(address - nearest->begin), nearest->name.c_str(), nearest->end - nearest->begin);
}

inline Tensor* tensor_at(uintptr_t address) {
  static size_t recent = 0;
  std::vector<Tensor>& tensors = launch.tensors;
  if (recent < tensors.size() && address - tensors[recent].begin < tensors[recent].end - tensors[recent].begin)
    return &tensors[recent];
  for (size_t i = 0; i < tensors.size(); i++)
    if (address - tensors[i].begin < tensors[i].end - tensors[i].begin) return &tensors[recent = i];
  return nullptr;
}

template <Kind kind>
inline void check_global(uintptr_t address, unsigned bytes, unsigned alignment, const Access& now,
                         const Thread& thread) {
  Tensor* tensor = tensor_at(address);
  if (!tensor || address + bytes > tensor->end) fail_global_bounds(address, bytes, kind);
  const uint64_t offset = address - tensor->begin;
  if (address % alignment)
    fail("misaligned: %s of %u bytes at %s", verb(kind), bytes, describe_address(address).c_str());
  if (kind != Kind::write) launch.counters.global_bytes_read += bytes;
  if (kind != Kind::read) launch.counters.global_bytes_written += bytes;
  if (tensor->role == Role::input) {
    if (kind != Kind::read) fail("%s of input '%s' at byte %lu", verb(kind), tensor->name.c_str(), offset);
    return;
  }
  Access other;
  uint64_t at;
  const Conflict conflict = tensor->shadow->access<kind>(offset, bytes, now, thread, launch.first_epoch,
                                                         tensor->role == Role::output, &other, &at);
  if (conflict != Conflict::none)
    fail_race(conflict, kind, "'" + tensor->name + "' byte " + std::to_string(at), other);
}

inline Access access_by(const Thread& thread, Kind kind, uint32_t code) {
  return {epoch, thread.clock, code, thread.number, kind == Kind::atomic, 0, thread.fences};
}

// `alignment` is what the access needs; accesses that the compiler will split need none.
template <Kind kind>
inline void check(const void* pointer, unsigned bytes, unsigned alignment, const void* pc) {
  if (!current) return;
  const uintptr_t address = (uintptr_t)pointer;
  if (__builtin_expect(launch.profiled, false)) note_access(kind, address, bytes, pc);
  const uintptr_t offset = address - launch.shared_base;
  const Access now = access_by(*current, kind, code_offset(pc));
  if (offset < launch.shared_bytes) return check_shared<kind>(offset, bytes, alignment, now, *current);
  if (address - (uintptr_t)arena.begin < arena.bytes)
    return check_global<kind>(address, bytes, alignment, now, *current);
  if (address - (uintptr_t)current->stack < STACK_BYTES) {
    if (current->has_fragments) touch_registers(address, bytes, kind);
    return;
  }
  // Constants and tables of the module itself.
  if (kind == Kind::read && launch.module->contains(address)) return;
  check_global<kind>(address, bytes, alignment, now, *current);
}

// The same for an address in the shared window, which wraps around like any unsigned number.
template <Kind kind>
inline void check_at(uint32_t address, unsigned bytes, unsigned alignment, const void* pc) {
  if (address >= launch.shared_bytes) fail_shared_bounds((int32_t)address, bytes, kind);
  if (launch.profiled) note_access(kind, launch.shared_base + address, bytes, pc);
  check_shared<kind>(address, bytes, alignment, access_by(*current, kind, code_offset(pc)), *current);
}

}  // namespace

char* reserve_arena(uint64_t bytes) {
  if (bytes <= arena.bytes) return arena.begin;
  if (arena.begin) munmap(arena.begin, arena.bytes);
  arena = {};
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  arena = {(char*)memory, bytes};
  return arena.begin;
}

void release_arena() { madvise(arena.begin, arena.bytes, MADV_DONTNEED); }

std::string describe_address(uintptr_t address) {
  if (address - launch.shared_base < launch.shared_bytes) return shared_place(address - launch.shared_base);
  if (const int rank = foreign_rank(address); rank >= 0)
    return shared_place(address - blocks[rank].shared->base, (unsigned)rank);
  if (const Tensor* tensor = tensor_at(address))
    return "'" + tensor->name + "' byte " + std::to_string(address - tensor->begin);
  char text[40];
  snprintf(text, sizeof text, "address 0x%lx", address);
  return text;
}

std::string describe_shared(uint32_t address) { return shared_place(address); }

const char* read_shared(uint32_t address, unsigned bytes, unsigned alignment, const void* pc) {
  check_at<Kind::read>(address, bytes, alignment, pc);
  return (const char*)launch.shared_base + address;
}

char* write_shared(uint32_t address, unsigned bytes, unsigned alignment, const void* pc) {
  check_at<Kind::write>(address, bytes, alignment, pc);
  return (char*)launch.shared_base + address;
}

void access_shared(Kind kind, uint32_t address, unsigned bytes, const Access& now, const Thread& thread) {
  if (address >= launch.shared_bytes) fail_shared_bounds((int32_t)address, bytes, kind);
  if (kind == Kind::read) return check_shared<Kind::read>(address, bytes, 1, now, thread);
  check_shared<Kind::write>(address, bytes, 1, now, thread);
}

void access_global(Kind kind, uintptr_t address, unsigned bytes, const Access& now, const Thread& thread) {
  if (kind == Kind::read) return check_global<Kind::read>(address, bytes, 1, now, thread);
  check_global<Kind::write>(address, bytes, 1, now, thread);
}

Access access_now(Kind kind, const void* pc) { return access_by(*current, kind, code_offset(pc)); }

void settle_shared(uint32_t address, unsigned bytes, const Access& write) {
  launch.shared_shadow->settle(address, bytes, write);
}

void settle_global(uintptr_t address, unsigned bytes, const Access& write) {
  const Tensor& tensor = *tensor_at(address);
  tensor.shadow->settle(address - tensor.begin, bytes, write);
}

char* access_distributed(Kind kind, const void* pointer, unsigned rank, unsigned bytes, const void* pc) {
  const uintptr_t offset = (uintptr_t)pointer - launch.shared_base;
  if (offset >= launch.shared_bytes) fail_global_bounds((uintptr_t)pointer, bytes, kind);
  if (launch.profiled) note_access(kind, (uintptr_t)pointer, bytes, pc);
  SharedMemory& there = *blocks[rank].shared;
  const Access now = access_by(*current, kind, code_offset(pc));
  if (kind == Kind::read)
    check_shared<Kind::read>(offset, bytes, bytes, now, *current, there.shadow, rank);
  else
    check_shared<Kind::write>(offset, bytes, bytes, now, *current, there.shadow, rank);
  return (char*)there.base + offset;
}

void prepare_shared(Module& module, uint32_t dynamic_bytes) {
  module.touched.assign(module.variables.size() + 1, 0);
  for (size_t i = 0; i < module.variables.size(); i++) {
    SharedVariable& variable = module.variables[i];
    if (!variable.dynamic || variable.end == variable.begin + dynamic_bytes) continue;
    for (uint32_t at = variable.begin; at < variable.begin + MAX_SHARED; at++)
      module.owner[at] = at < variable.begin + dynamic_bytes ? (uint16_t)(i + 1) : 0;
    variable.end = variable.begin + dynamic_bytes;
  }
}

void poison_shared() {
  for (unsigned rank = 0; rank < cluster.blocks; rank++)
    for (const SharedVariable& variable : launch.module->variables)
      memset((char*)blocks[rank].shared->base + variable.begin, 0xff, variable.end - variable.begin);
}

uint32_t static_shared_used() {
  uint32_t bytes = 0;
  for (size_t i = 0; i < launch.module->variables.size(); i++) {
    const SharedVariable& variable = launch.module->variables[i];
    if (!variable.dynamic && launch.module->touched[i + 1]) bytes += variable.end - variable.begin;
  }
  return bytes;
}

}  // namespace emulator

// ---- what the compiler calls: -fsanitize=thread, with our own runtime in place of libtsan ----------------
using emulator::Kind;

#pragma GCC visibility push(default)
// The usual accesses have the checks inlined, for speed; the others share one copy of them.
template <Kind kind>
__attribute__((noinline)) static void check_unusual(const void* address, unsigned bytes, unsigned alignment,
                                                    const void* pc) {
  emulator::check<kind>(address, bytes, alignment, pc);
}
#define ON_ACCESS(name, check, bytes, kind, alignment)                      \
  extern "C" void __tsan_##name(const void* address) {                      \
    check<kind>(address, bytes, alignment, __builtin_return_address(0));    \
  }
#define ON_ACCESS_OF(bytes)                                                 \
  ON_ACCESS(read##bytes, emulator::check, bytes, Kind::read, bytes)         \
  ON_ACCESS(write##bytes, emulator::check, bytes, Kind::write, bytes)       \
  ON_ACCESS(unaligned_read##bytes, check_unusual, bytes, Kind::read, 1)     \
  ON_ACCESS(unaligned_write##bytes, check_unusual, bytes, Kind::write, 1)
ON_ACCESS_OF(1)
ON_ACCESS_OF(2)
ON_ACCESS_OF(4)
ON_ACCESS_OF(8)
ON_ACCESS_OF(16)

extern "C" {
void __tsan_read_range(const void* address, size_t bytes) {
  check_unusual<Kind::read>(address, (unsigned)bytes, 1, __builtin_return_address(0));
}
void __tsan_write_range(const void* address, size_t bytes) {
  check_unusual<Kind::write>(address, (unsigned)bytes, 1, __builtin_return_address(0));
}
void __tsan_init() {}

unsigned emulator_shared_address(const void* pointer, EmulatorPlace place) {
  const uintptr_t offset = (uintptr_t)pointer - emulator::launch.shared_base;
  // Just outside is no error yet: an address may be computed with before it is used.
  if (offset + emulator::SHARED_MARGIN >= emulator::launch.shared_bytes + 2 * emulator::SHARED_MARGIN)
    emulator::fail_at(place, "shared_address: expected a pointer to shared memory, got %s",
                      emulator::describe_address((uintptr_t)pointer).c_str());
  return (unsigned)offset;
}

void* emulator_shared_variable(const EmulatorSharedVariable* variable) {
  return (void*)(emulator::shared_window + variable->offset);
}

void emulator_prefetch(const void* address) {
  if (!emulator::tensor_at((uintptr_t)address)) emulator::fail_global_bounds((uintptr_t)address, 1, Kind::read);
}

// clang copies and fills large structures by calls that nothing announces: the linker sends them here.
void* __wrap_memcpy(void* to, const void* from, size_t bytes) {
  check_unusual<Kind::read>(from, (unsigned)bytes, 1, __builtin_return_address(0));
  check_unusual<Kind::write>(to, (unsigned)bytes, 1, __builtin_return_address(0));
  return memcpy(to, from, bytes);
}
void* __wrap_memset(void* to, int byte, size_t bytes) {
  check_unusual<Kind::write>(to, (unsigned)bytes, 1, __builtin_return_address(0));
  return memset(to, byte, bytes);
}

void emulator_atomic(const void* address, unsigned bytes, const void* pc) {
  emulator::let_others_run();  // a thread that waits for an atomic to change must not keep the others from it
  check_unusual<Kind::atomic>(address, bytes, bytes, pc);
}
}
#pragma GCC visibility pop
