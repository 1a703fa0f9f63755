#include "async_copies.h"

#include <algorithm>
#include <cstring>

#include "clusters.h"
#include "diagnostics.h"
#include "mbarriers.h"
#include "memory.h"
#include "profile.h"
#include "schedule.h"
#include "tensor_maps.h"

namespace emulator {

namespace {

char* shared_at(uint32_t address) { return (char*)launch.shared_base + address; }

void poison(uint32_t address, uint32_t bytes) { memset(shared_at(address), 0xff, bytes); }

// ---- cp.async -------------------------------------------------------------------------------------------
struct SmallCopy {
  uint32_t target;
  const char* source;
  unsigned bytes, source_bytes;
  unsigned group;
  uint32_t code;
  EmulatorPlace place;
  char content[16];  // of the source at the issue
};

struct SmallCopies {
  std::vector<SmallCopy> under_way;
  unsigned groups;  // committed so far
} small[MAX_BLOCKS * MAX_THREADS];

void complete(const SmallCopy& copy) {
  if (memcmp(copy.source, copy.content, copy.source_bytes) != 0)
    fail_at(copy.place, "race: the source of this cp.async, %s, has been written before a wait has covered it",
            describe_address((uintptr_t)copy.source).c_str());
  memcpy(shared_at(copy.target), copy.content, copy.source_bytes);
  memset(shared_at(copy.target) + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
  settle_shared(copy.target, copy.bytes, {epoch, current->clock, copy.code, current->number, 0, 0, current->fences});
}

// ---- bulk copies ----------------------------------------------------------------------------------------
// One box of a tensor map, or plain bytes.
struct Bulk {
  uint16_t thread;
  uint32_t shared, bytes;
  const PackedTensorMap* map;  // null: plain
  EmulatorBox box;
  uintptr_t global;  // plain
  uint32_t code;
  EmulatorPlace place;
};

// Visits the pieces of global memory: visit(offset in the tile, address, bytes before it in its line, bytes).
template <class Visit> void for_each_piece(const Bulk& copy, Visit visit) {
  if (copy.map) return for_each_line(*copy.map, copy.box, visit);
  visit(0u, copy.global, 0u, copy.bytes);
}

uint32_t piece_at(const Bulk& copy, uint32_t offset) {
  return swizzled(copy.shared + offset, copy.map ? copy.map->swizzle : 0);
}

struct Load : Bulk {
  uint32_t barrier;
  unsigned rank;  // of the block whose shared memory is written, and whose mbarrier counts the bytes
};
std::vector<Load> loads;

void complete(const Load& load) {
  for_each_piece(load, [&](uint32_t offset, uintptr_t from, uint32_t before, uint32_t bytes) {
    const uint32_t line = load.map ? load.map->box[0] * load.map->element_bytes : bytes;
    std::vector<char> content(line, 0);
    memcpy(content.data() + before, (const char*)from, bytes);
    for (uint32_t at = 0; at < line; at += 16) memcpy(shared_at(piece_at(load, offset + at)), &content[at], 16);
  });
  Mbarrier& barrier = mbarrier_at(load.barrier);
  const uint32_t clock = tick(barrier.agent);
  settle_shared(load.shared, load.bytes, {epoch, clock, load.code, barrier.agent, 0, 1, 0});
  include(barrier.arriving, barrier.agent, clock);
  complete_bytes(barrier, load.bytes);
}

void read_source(const Load& load) {
  for_each_piece(load, [&](uint32_t, uintptr_t from, uint32_t, uint32_t bytes) {
    const Access read{epoch, current->clock, load.code, current->number, 0, 0, current->fences};
    if (!bytes) return;
    access_global(Kind::read, from, bytes, read, *current);
    if (launch.profiled) note_copy(Kind::read, from, bytes, load.code);
  });
}

// The target is shared memory of the running block, of which the running thread may not be one.
void issue(const Load& load, const char* instruction) {
  Mbarrier& barrier = find_mbarrier(load.barrier, instruction, load.place);
  if (!barrier.visible_to_async_proxy)
    fail_at(load.place, "missing fence_mbarrier_init: %s completes on %s, of which the async proxy cannot know",
            instruction, describe_mbarrier(load.barrier).c_str());
  const Access write{epoch, UNDER_WAY, load.code, barrier.agent, 0, 1, 0};
  access_shared(Kind::write, load.shared, load.bytes, write, *current);
  poison(load.shared, load.bytes);
  loads.push_back(load);
}

struct Store : Bulk {
  uint16_t agent;
  uint32_t clock;  // of its agent
  unsigned group;
  bool read;
  std::vector<char> content;  // once read
};
std::vector<Store> stores;

struct StoringThread {
  uint16_t agent;
  unsigned groups;  // committed so far
} storing[MAX_BLOCKS * MAX_THREADS];

void issue(Store store) {
  StoringThread& self = storing[current->number];
  if (!self.agent) self.agent = new_agent("a bulk store of " + describe_thread(current->number));
  store.agent = self.agent;
  store.clock = tick(self.agent);
  store.group = self.groups;
  const Access read{epoch, store.clock, store.code, self.agent, 0, 1, 0};
  access_shared(Kind::read, store.shared, store.bytes, read, *current);
  for_each_piece(store, [&](uint32_t, uintptr_t to, uint32_t, uint32_t bytes) {
    const Access write{epoch, UNDER_WAY, store.code, current->number, 0, 1, 0};
    if (!bytes) return;
    access_global(Kind::write, to, bytes, write, *current);
    if (launch.profiled) note_copy(Kind::write, to, bytes, store.code);
  });
  stores.push_back(std::move(store));
}

void read_source(Store& store) {
  if (store.read) return;
  store.read = true;
  store.content.assign(shared_at(store.shared), shared_at(store.shared) + store.bytes);
  acquire(threads[store.thread], store.agent, store.clock);
}

void write_target(const Store& store) {
  for_each_piece(store, [&](uint32_t offset, uintptr_t to, uint32_t before, uint32_t bytes) {
    for (uint32_t at = before; at < before + bytes;) {
      const uint32_t within = (offset + at) % 16, count = std::min(16 - within, before + bytes - at);
      const uint32_t from = piece_at(store, offset + at - within) - store.shared + within;
      memcpy((char*)to + at - before, &store.content[from], count);
      at += count;
    }
    const Thread& thread = threads[store.thread];
    if (bytes)
      settle_global(to, bytes, {epoch, thread.clock, store.code, thread.number, 0, 0, thread.fences});
  });
}

Bulk plain(uint32_t shared, uintptr_t global, uint32_t bytes, const char* instruction, const void* pc,
           EmulatorPlace place) {
  if (shared % 16 || global % 16 || bytes % 16)
    fail_at(place, "misaligned: %s: expected addresses and a size that are multiples of 16, got %s, %s and %u",
            instruction, describe_shared(shared).c_str(), describe_address(global).c_str(), bytes);
  return {current->number, shared, bytes, nullptr, {}, global, code_offset(pc), place};
}

Bulk boxed(uint32_t shared, const void* map, const EmulatorBox& box, const char* instruction, const void* pc,
           EmulatorPlace place) {
  // The argument itself lies on the thread's stack; the launch's own copy outlives the thread.
  const PackedTensorMap& packed = *launch.tensor_maps[tensor_map(map, instruction, place).number];
  check_box(packed, box, shared, instruction, place);
  return {current->number, shared, box_bytes(packed), &packed, box, 0, code_offset(pc), place};
}

}  // namespace

bool complete_a_load() {
  std::vector<size_t> needed;
  for (size_t i = 0; i < loads.size(); i++) {
    enter(blocks[loads[i].rank]);
    if (!mbarrier_at(loads[i].barrier).waiting.empty()) needed.push_back(i);
  }
  if (needed.empty()) return false;
  const size_t i = launch.schedule == Schedule::forward   ? needed.front()
                   : launch.schedule == Schedule::reverse ? needed.back()
                                                          : needed[random_number() % needed.size()];
  const Load load = loads[i];
  loads.erase(loads.begin() + (long)i);
  enter(blocks[load.rank]);
  complete(load);
  return true;
}

void check_copies_of(const Thread& thread) {
  if (!small[thread.number].under_way.empty())
    fail_at(small[thread.number].under_way[0].place,
            "cp.async: the thread has returned from the kernel while this copy is under way: no wait covers it");
  for (const Store& store : stores)
    if (store.thread == thread.number && !store.read)
      fail_at(store.place, "bulk store: the thread has returned from the kernel while this store may still read "
                           "shared memory: no bulk_wait_read covers it");
}

void finish_copies() {
  auto is_mine = [](const Bulk& copy) { return threads[copy.thread].rank == block->rank; };
  for (const Load& load : loads)
    if (load.rank == block->rank) {
      current = &threads[load.thread];
      fail_at(load.place, "bulk load: the block ends while this load is under way on %s",
              describe_mbarrier(load.barrier).c_str());
    }
  for (const Store& store : stores)
    if (is_mine(store)) write_target(store);
  stores.erase(std::remove_if(stores.begin(), stores.end(), is_mine), stores.end());
}

void reset_copies() {
  loads.clear();
  stores.clear();
  for (unsigned i = 0; i < cluster.blocks * cluster.stride; i++) {
    small[i].under_way.clear();
    small[i].groups = 0;
    storing[i] = {};
  }
}

}  // namespace emulator

using namespace emulator;

extern "C" {

void emulator_cp_async(unsigned shared, const void* global, unsigned bytes, unsigned source_bytes,
                       EmulatorPlace place) {
  if (shared % bytes)
    fail_at(place, "misaligned: cp.async: expected a target at a multiple of %u bytes, got %s", bytes,
            describe_shared(shared).c_str());
  if ((uintptr_t)global % bytes)
    fail_at(place, "misaligned: cp.async: expected a source at a multiple of %u bytes, got %s", bytes,
            describe_address((uintptr_t)global).c_str());
  if (source_bytes > bytes)
    fail_at(place, "cp.async: expected at most %u bytes of source, got %u", bytes, source_bytes);
  const void* pc = __builtin_return_address(0);
  if (launch.profiled) {
    if (source_bytes) note_access(Kind::read, (uintptr_t)global, source_bytes, pc);
    note_access(Kind::write, launch.shared_base + shared, bytes, pc);
  }
  if (source_bytes)
    access_global(Kind::read, (uintptr_t)global, source_bytes, access_now(Kind::read, pc), *current);
  Access write = access_now(Kind::write, pc);
  write.clock = UNDER_WAY;
  write.asynchronous = 1;
  access_shared(Kind::write, shared, bytes, write, *current);
  SmallCopies& mine = small[current->number];
  SmallCopy copy{shared, (const char*)global, bytes, source_bytes, mine.groups, write.code, place, {}};
  memcpy(copy.content, global, source_bytes);
  poison(shared, bytes);
  mine.under_way.push_back(copy);
}

void emulator_cp_async_commit() { small[current->number].groups++; }

void emulator_cp_async_wait(int groups, EmulatorPlace) {
  SmallCopies& mine = small[current->number];
  if (groups < 0) {
    mine.groups++;
    groups = 0;
  }
  size_t kept = 0;
  for (const SmallCopy& copy : mine.under_way)
    if (copy.group + (unsigned)groups < mine.groups)
      complete(copy);
    else
      mine.under_way[kept++] = copy;
  mine.under_way.resize(kept);
}

void emulator_tma_load(unsigned tile, const void* map, unsigned barrier, const EmulatorBox* box,
                       EmulatorPlace place) {
  const char* instruction = "TMA load";
  const Bulk copy = boxed(tile, map, *box, instruction, __builtin_return_address(0), place);
  const Load load{copy, barrier, block->rank};
  read_source(load);
  issue(load, instruction);
}

void emulator_tma_load_multicast(unsigned tile, const void* map, unsigned barrier, const EmulatorBox* box,
                                 unsigned ranks, EmulatorPlace place) {
  const char* instruction = "TMA multicast";
  const void* pc = __builtin_return_address(0);
  const Bulk copy = boxed(tile, map, *box, instruction, pc, place);
  if (!ranks || ranks >> cluster.blocks)
    fail_at(place, "%s: expected ranks below %u as bits of a mask, got %x", instruction, cluster.blocks, ranks);
  Block& own = *block;
  read_source(Load{copy, barrier, own.rank});
  for (unsigned rank = 0; rank < cluster.blocks; rank++) {
    if (!(ranks >> rank & 1)) continue;
    if (rank != own.rank) visit_block(rank, instruction, access_now(Kind::write, pc), place);
    enter(blocks[rank]);
    issue(Load{copy, barrier, rank}, instruction);
    enter(own);
  }
}

void emulator_bulk_load(unsigned shared, const void* global, unsigned bytes, unsigned barrier,
                        EmulatorPlace place) {
  const char* instruction = "bulk load";
  const void* pc = __builtin_return_address(0);
  const Load load{plain(shared, (uintptr_t)global, bytes, instruction, pc, place), barrier, block->rank};
  read_source(load);
  issue(load, instruction);
}

void emulator_tma_store(const void* map, unsigned tile, const EmulatorBox* box, EmulatorPlace place) {
  issue(Store{boxed(tile, map, *box, "TMA store", __builtin_return_address(0), place), 0, 0, 0, false, {}});
}

void emulator_bulk_store(void* global, unsigned shared, unsigned bytes, EmulatorPlace place) {
  const void* pc = __builtin_return_address(0);
  issue(Store{plain(shared, (uintptr_t)global, bytes, "bulk store", pc, place), 0, 0, 0, false, {}});
}

void emulator_bulk_commit() { storing[current->number].groups++; }

void emulator_bulk_wait(int groups, bool for_reads_only, EmulatorPlace) {
  const unsigned committed = storing[current->number].groups;
  size_t kept = 0;
  for (size_t i = 0; i < stores.size(); i++) {
    Store& store = stores[i];
    const bool covered = store.thread == current->number && store.group + (unsigned)groups < committed;
    if (covered) read_source(store);
    if (covered && !for_reads_only) {
      write_target(store);
      continue;
    }
    if (kept != i) stores[kept] = std::move(store);
    kept++;
  }
  stores.resize(kept);
}
}
