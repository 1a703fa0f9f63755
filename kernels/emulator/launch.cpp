// The functions that emulate.py calls: registering a compiled kernel file, and running a launch.
#include <execinfo.h>
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>

#include "async_copies.h"
#include "clusters.h"
#include "collectives.h"
#include "diagnostics.h"
#include "guards.h"
#include "mbarriers.h"
#include "memory.h"
#include "profile.h"
#include "schedule.h"
#include "state.h"
#include "tensor_maps.h"
#include "wgmma.h"

using namespace emulator;

namespace {

// Memory of a launch larger than this is not kept for the next one.
constexpr uint64_t KEEP_BYTES = 64 << 20;
constexpr uint32_t LAST_EPOCH = 0xf0000000u;

std::vector<std::unique_ptr<Shadow>> tensor_shadows;  // reused from launch to launch
std::vector<std::unique_ptr<Module>> modules;

struct SharedVariableInfo {
  const char* name;
  uint32_t offset, bytes, dynamic;
};

struct TensorInfo {
  const char* name;
  const void* source;  // null: a null pointer
  void* result;        // where an output or update goes when the launch has succeeded; null: nowhere
  uint64_t bytes;
  uint32_t log2_element;
  uint32_t phase;  // address modulo 256, so that alignment is the caller's
  Role role;
  uint8_t* written;  // for each element 1 if the kernel wrote it; null: not asked for
};

struct LaunchInfo {
  Module* module;
  void (*entry)(void**);
  uint32_t grid[3], block[3];
  uint32_t dynamic_shared;
  uint32_t max_threads;  // of the entry's __launch_bounds__; 0: none
  Schedule schedule;
  uint32_t tensor_count;
  uint64_t seed;
  double seconds;
  const TensorInfo* tensors;
  PackedTensorMap* const* tensor_maps;  // addresses are offsets in their tensors
  uint64_t tensor_map_count;
  void* params;  // null: the entry takes none
  uint32_t profile;
  uint32_t cluster;           // blocks along x
  uint32_t declared_cluster;  // by the entry's __cluster_dims__; 0: it has none
};

int find_segments(dl_phdr_info* info, size_t, void* data) {
  Module& module = *(Module*)data;
  const uintptr_t inside = (uintptr_t)module.anchor;
  uintptr_t begin = UINTPTR_MAX, end = 0;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const auto& segment = info->dlpi_phdr[i];
    if (segment.p_type != PT_LOAD) continue;
    begin = std::min<uintptr_t>(begin, info->dlpi_addr + segment.p_vaddr);
    end = std::max<uintptr_t>(end, info->dlpi_addr + segment.p_vaddr + segment.p_memsz);
  }
  if (inside < begin || inside >= end) return 0;
  module.code_begin = begin;
  module.code_end = end;
  return 1;
}

void refuse(const char* format, ...) __attribute__((format(printf, 1, 2)));
void refuse(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(report->message, sizeof report->message, format, arguments);
  va_end(arguments);
}

// CUDA's limits, which a real launch would run into.
bool within_limits(const LaunchInfo& info) {
  const uint64_t count = (uint64_t)info.block[0] * info.block[1] * info.block[2];
  const uint32_t(&grid)[3] = info.grid;
  if (count == 0 || count > MAX_THREADS || info.block[2] > 64)
    refuse("block of %u x %u x %u threads: expected 1 to 1024 threads, at most 64 of them along z",
           info.block[0], info.block[1], info.block[2]);
  else if (info.max_threads && count > info.max_threads)
    refuse("block of %lu threads: the entry's __launch_bounds__ allows %u", count, info.max_threads);
  else if (!grid[0] || grid[0] > 0x7fffffff || !grid[1] || grid[1] > 65535 || !grid[2] || grid[2] > 65535)
    refuse("grid of %u x %u x %u blocks: expected 1 to 2147483647, 65535 and 65535", grid[0], grid[1], grid[2]);
  else if (!info.cluster || info.cluster > MAX_BLOCKS || info.cluster & (info.cluster - 1) || grid[0] % info.cluster)
    refuse("clusters of %u blocks in a grid of %u along x: expected a power of two up to 16 that divides it",
           info.cluster, grid[0]);
  else if (info.declared_cluster ? info.cluster != info.declared_cluster : info.cluster > 1)
    refuse("clusters of %u blocks: the entry is declared for clusters of %u, by __cluster_dims__", info.cluster,
           std::max(1u, info.declared_cluster));
  else if (info.dynamic_shared > MAX_SHARED)
    refuse("%u bytes of dynamic shared memory: at most %u bytes (227 KiB) of shared memory can be had",
           info.dynamic_shared, MAX_SHARED);
  else
    return true;
  return false;
}

bool shared_within_limits(const LaunchInfo& info) {
  const uint32_t used = static_shared_used();
  if (used > MAX_STATIC_SHARED)
    refuse("%u bytes of static shared memory: the limit is %u bytes (48 KiB)", used, MAX_STATIC_SHARED);
  else if (used + info.dynamic_shared > MAX_SHARED)
    refuse("%u + %u bytes of static and dynamic shared memory: the limit is %u bytes (227 KiB)", used,
           info.dynamic_shared, MAX_SHARED);
  else
    return true;
  return false;
}

uint64_t total_bytes(const LaunchInfo& info) {
  uint64_t bytes = 0;
  for (uint32_t i = 0; i < info.tensor_count; i++) bytes += info.tensors[i].bytes;
  return bytes;
}

// Lays the tensors out in the arena and copies in what the kernel may read.
void place_tensors(const LaunchInfo& info, std::vector<void*>& pointers) {
  char* at = reserve_arena(total_bytes(info) + ARENA_GAP + info.tensor_count * (ARENA_GAP + 512)) + ARENA_GAP;
  launch.tensors.clear();
  for (uint32_t i = 0; i < info.tensor_count; i++) {
    const TensorInfo& from = info.tensors[i];
    if (tensor_shadows.size() <= i) tensor_shadows.push_back(std::make_unique<Shadow>());
    Tensor to{from.name, 0, 0, from.role, tensor_shadows[i].get()};
    if (from.source) {
      at = (char*)(((uintptr_t)at + 255) & ~255ul) + from.phase;
      to.begin = (uintptr_t)at;
      to.end = to.begin + from.bytes;
      if (from.role == Role::output)
        memset(at, 0xff, from.bytes);
      else
        memcpy(at, from.source, from.bytes);
      if (from.role != Role::input) to.shadow->resize(from.log2_element, from.bytes);
      at += from.bytes + ARENA_GAP;
    }
    pointers.push_back((void*)to.begin);
    launch.tensors.push_back(to);
  }
}

void copy_results(const LaunchInfo& info) {
  for (uint32_t i = 0; i < info.tensor_count; i++) {
    const TensorInfo& to = info.tensors[i];
    const Tensor& from = launch.tensors[i];
    if (from.role == Role::input || !from.begin) continue;
    if (to.result) memcpy(to.result, (const void*)from.begin, to.bytes);
    if (to.written)
      for (uint64_t element = 0; element < to.bytes >> to.log2_element; element++)
        to.written[element] = from.shadow->written(element << to.log2_element, launch.first_epoch);
  }
}

void number_threads(const uint32_t (&size)[3], unsigned blocks) {
  launch.threads = size[0] * size[1] * size[2];
  cluster.blocks = blocks;
  cluster.stride = (launch.threads + WARPGROUP - 1) / WARPGROUP * WARPGROUP;
  for (unsigned rank = 0; rank < blocks; rank++)
    for (unsigned i = 0; i < launch.threads; i++) {
      const unsigned number = rank * cluster.stride + i;
      Thread& thread = threads[number];
      thread.number = (uint16_t)number;
      thread.lane = (uint8_t)(number % WARP);
      thread.warp = (uint16_t)(number / WARP);
      thread.rank = (uint8_t)rank;
      thread.stack = stack(number);
      thread.index = pack({i % size[0], i / size[0] % size[1], i / size[0] / size[1]});
    }
}

// Shared memory for as many blocks as a cluster has. False if the compiled kernel does not ask for its address, but
// lets the system decide: then there is one, and clusters cannot be run.
bool place_shared(Module& module, unsigned blocks) {
  const size_t bytes = (module.owner.size() + (64 << 10)) & ~(size_t)4095;
  while (module.shared.size() < blocks) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    module.shared.push_back({(uintptr_t)memory, {}});
    module.shared.back().shadow.resize(2, module.owner.size());
  }
  shared_window = module.shared[0].base;
  launch.shared_base = (uintptr_t)module.anchor() - module.anchor_offset;
  if (launch.shared_base == shared_window) return true;
  module.shared[0].base = launch.shared_base;
  if (blocks > 1) refuse("clusters cannot be emulated on this machine: thread-local storage has a fixed address");
  return blocks == 1;
}

void begin_cluster(unsigned first_number, Index grid) {
  cluster.first_epoch = last_epoch + 1;
  launch.blocks_by_epoch.push_back({cluster.first_epoch, first_number});
  for (unsigned rank = 0; rank < cluster.blocks; rank++) {
    const unsigned number = first_number + rank;
    const unsigned long index = pack({number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y});
    blocks[rank] = {index, rank, rank * cluster.stride, launch.threads, ++last_epoch, 0, &launch.module->shared[rank]};
  }
  block = &blocks[0];
  epoch = block->epoch;
  enter(*block);
  poison_shared();
  reset_collectives();
  reset_agents();
  reset_mbarriers();
  reset_copies();
  reset_warpgroups();
  reset_cluster();
}

bool run_all_blocks(const LaunchInfo& info) {
  const Index grid{info.grid[0], info.grid[1], info.grid[2]};
  const uint64_t count = (uint64_t)grid.x * grid.y * grid.z / cluster.blocks;
  std::vector<uint32_t> shuffled;
  if (launch.schedule == Schedule::random) {
    for (uint64_t i = 0; i < count; i++) shuffled.push_back((uint32_t)i);
    for (uint64_t i = count; i > 1; i--) std::swap(shuffled[i - 1], shuffled[random_number() % i]);
  }
  for (uint64_t turn = 0; turn < count; turn++) {
    const uint64_t number = launch.schedule == Schedule::forward   ? turn
                            : launch.schedule == Schedule::reverse ? count - 1 - turn
                                                                   : shuffled[turn];
    begin_cluster((unsigned)number * cluster.blocks, grid);
    if (!run_cluster()) return false;
    if (turn == 0 && !shared_within_limits(info)) return false;
  }
  return true;
}

void forget_old_epochs() {
  last_epoch = 0;
  tensor_shadows.clear();
  for (auto& module : modules)
    for (SharedMemory& shared : module->shared) {
      shared.shadow.clear();
      shared.shadow.resize(2, module->owner.size());
    }
}

bool run(const LaunchInfo& info) {
  if (last_epoch > LAST_EPOCH) forget_old_epochs();
  launch.module = info.module;
  if (!place_shared(*info.module, info.cluster)) return false;
  launch.shared_bytes = info.module->owner.size();
  launch.entry = info.entry;
  launch.block_size = pack({info.block[0], info.block[1], info.block[2]});
  launch.grid_size = pack({info.grid[0], info.grid[1], info.grid[2]});
  launch.schedule = info.schedule;
  launch.counters = {};
  launch.profiled = info.profile;
  reset_profile();
  launch.blocks_by_epoch.clear();
  seed_random(info.seed);
  number_threads(info.block, info.cluster);
  cluster.declared = info.declared_cluster;
  reset_clocks();
  prepare_shared(*info.module, info.dynamic_shared);
  std::vector<void*> pointers, arguments;
  place_tensors(info, pointers);
  for (void*& pointer : pointers) arguments.push_back(&pointer);
  launch.tensor_maps.clear();
  for (uint64_t i = 0; i < info.tensor_map_count; i++) {
    PackedTensorMap& map = *info.tensor_maps[i];
    map.address += launch.tensors[map.tensor].begin;
    map.number = (uint32_t)i;
    launch.tensor_maps.push_back(&map);
    arguments.push_back(&map);
  }
  if (info.params) arguments.push_back(info.params);
  launch.arguments = arguments.data();
  launch.first_epoch = last_epoch + 1;
  bool succeeded;
  {
    Guards guards(info.seconds * cluster.blocks);
    succeeded = run_all_blocks(info);
  }
  if (succeeded) copy_results(info);
  for (auto& shadow : tensor_shadows)
    if (shadow->record_bytes() > KEEP_BYTES) shadow->clear();
  if (total_bytes(info) > KEEP_BYTES) release_arena();
  return succeeded;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Makes a loaded kernel file known. `anchor` returns the address of a thread-local at `anchor_offset`.
Module* emulator_register(void* (*anchor)(), uint32_t anchor_offset, const SharedVariableInfo* variables,
                          uint32_t count) {
  void* frame;
  backtrace(&frame, 1);  // loads what it needs now, not on the small stack of a thread that fails
  auto module = std::make_unique<Module>();
  module->anchor = anchor;
  module->anchor_offset = anchor_offset;
  dl_iterate_phdr(find_segments, module.get());
  uint32_t bytes = 0;
  for (uint32_t i = 0; i < count; i++) bytes = std::max(bytes, variables[i].offset + variables[i].bytes);
  module->owner.assign(bytes, 0);
  for (uint32_t i = 0; i < count; i++) {
    const SharedVariableInfo& from = variables[i];
    const uint32_t end = from.dynamic ? from.offset : from.offset + from.bytes;
    module->variables.push_back({from.name, from.offset, end, from.dynamic != 0});
    for (uint32_t at = from.offset; at < end; at++) module->owner[at] = (uint16_t)(i + 1);
  }
  modules.push_back(std::move(module));
  return modules.back().get();
}

// Runs a launch. Returns 0, or 1 with *failure filled in and no result written.
int emulator_launch(const LaunchInfo* info, Report* failure, Counters* counters) {
  report = failure;
  *report = {};
  bool succeeded = false;
  try {
    succeeded = within_limits(*info) && run(*info);
  } catch (const std::bad_alloc&) {
    refuse("not enough memory to run the launch on copies of its tensors");
  }
  *counters = launch.counters;
  return succeeded ? 0 : 1;
}
}
#pragma GCC visibility pop
