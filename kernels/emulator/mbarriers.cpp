#include "mbarriers.h"

#include <map>

#include "clusters.h"
#include "diagnostics.h"
#include "memory.h"
#include "schedule.h"

namespace emulator {

namespace {

constexpr unsigned BYTES = 8;       // of an mbarrier in shared memory
constexpr uint32_t LIMIT = 1 << 20;  // of arrivals, and of bytes expected at a time

std::map<uint32_t, Mbarrier> of_block[MAX_BLOCKS];  // by address

std::map<uint32_t, Mbarrier>& mbarriers() { return of_block[block->rank]; }

Mbarrier& arrivals_expected(uint32_t address, EmulatorPlace place) {
  Mbarrier& barrier = find_mbarrier(address, "mbarrier.arrive", place);
  if (!barrier.pending)
    fail_at(place, "mbarrier.arrive: one arrival too many at %s", describe_mbarrier(address).c_str());
  return barrier;
}

void check_phase(Mbarrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  barrier.phase++;
  barrier.pending = barrier.count;
  barrier.expected = 0;
  barrier.completed = barrier.arriving;
  for (Thread* thread : barrier.waiting) wake(*thread);
  barrier.waiting.clear();
}

}  // namespace

Mbarrier& mbarrier_at(uint32_t address) { return mbarriers().at(address); }

Mbarrier& find_mbarrier(uint32_t address, const char* instruction, EmulatorPlace place) {
  const auto found = mbarriers().find(address);
  if (found == mbarriers().end())
    fail_at(place, "%s: expected an mbarrier, got %s, which nobody has initialised as one", instruction,
            describe_shared(address).c_str());
  Mbarrier& barrier = found->second;
  if (!ordered(barrier.initialised, *current)) {
    set_other(barrier.initialised);
    fail_at(place, "race: %s of %s is not ordered after its mbarrier_init by %s", instruction,
            describe_shared(address).c_str(), describe_thread(barrier.initialised).c_str());
  }
  return barrier;
}

void complete_bytes(Mbarrier& barrier, uint32_t bytes) {
  barrier.bytes -= bytes;
  check_phase(barrier);
}

std::string describe_mbarrier(uint32_t address) {
  const Mbarrier& barrier = mbarriers().at(address);
  std::string text = "the mbarrier " + describe_shared(address) + " (phase " + std::to_string(barrier.phase) + ": " +
                     std::to_string(barrier.count - barrier.pending) + " of " + std::to_string(barrier.count) +
                     " arrivals";
  if (barrier.expected || barrier.bytes)
    text += ", " + std::to_string((int64_t)barrier.expected - barrier.bytes) + " of " +
            std::to_string(barrier.expected) + " bytes";
  return text + ")";
}

void reset_mbarriers() {
  for (unsigned rank = 0; rank < cluster.blocks; rank++) of_block[rank].clear();
}

}  // namespace emulator

using namespace emulator;

extern "C" {

void emulator_mbarrier_init(unsigned address, unsigned count, EmulatorPlace place) {
  if (address % 8)
    fail_at(place, "mbarrier.init: expected an address that is a multiple of 8, got %s",
            describe_shared(address).c_str());
  if (!count || count >= LIMIT) fail_at(place, "mbarrier.init: expected a count of 1 to 1048575, got %u", count);
  if (mbarriers().count(address))
    fail_at(place, "mbarrier.init: %s is an mbarrier already: mbarrier_inval must come first",
            describe_shared(address).c_str());
  const Access now = access_now(Kind::write, __builtin_return_address(0));
  access_shared(Kind::write, address, BYTES, now, *current);
  settle_shared(address, BYTES, {epoch, UNDER_WAY, now.code, MBARRIER, 0, 1, 0});
  const uint16_t agent = new_agent("a bulk copy on mbarrier " + describe_shared(address) + describe_rank(block->rank));
  mbarriers()[address] = {address, count, count, 0, 0, 0, {}, {}, agent, now, false, {}};
}

void emulator_mbarrier_inval(unsigned address, EmulatorPlace place) {
  const Mbarrier& barrier = find_mbarrier(address, "mbarrier.inval", place);
  if (!barrier.waiting.empty())
    fail_at(place, "mbarrier.inval: %zu threads wait at %s", barrier.waiting.size(),
            describe_mbarrier(address).c_str());
  settle_shared(address, BYTES, access_now(Kind::write, __builtin_return_address(0)));
  mbarriers().erase(address);
}

void emulator_mbarrier_arrive(unsigned address, unsigned expected_bytes, EmulatorPlace place) {
  Mbarrier& barrier = arrivals_expected(address, place);
  barrier.bytes += expected_bytes;
  barrier.expected += expected_bytes;
  if (barrier.bytes >= LIMIT)
    fail_at(place, "mbarrier.arrive: expected less than 1048576 bytes at a time, got %lu", (uint64_t)barrier.bytes);
  release(*current, barrier.arriving);
  barrier.pending--;
  check_phase(barrier);
  maybe_let_others_run();
}

void emulator_mbarrier_arrive_at(unsigned address, unsigned rank, EmulatorPlace place) {
  if (rank == block->rank) return emulator_mbarrier_arrive(address, 0, place);
  visit_block(rank, "mbarrier.arrive", access_now(Kind::write, __builtin_return_address(0)), place);
  Block& own = *block;
  enter(blocks[rank]);
  Mbarrier& barrier = arrivals_expected(address, place);
  release_agents(*current, barrier.arriving);
  barrier.pending--;
  check_phase(barrier);
  enter(own);
  maybe_let_others_run();
}

// Returns false once where it had to wait: hardware may do so, and only a call that returns true orders memory.
bool emulator_mbarrier_try_wait(unsigned address, unsigned parity, EmulatorPlace place) {
  Mbarrier& barrier = find_mbarrier(address, "mbarrier.try_wait", place);
  if (parity > 1) fail_at(place, "mbarrier.try_wait: expected a parity of 0 or 1, got %u", parity);
  if ((barrier.phase & 1) == parity) {
    barrier.waiting.push_back(current);
    current->waits_for = address;
    wait(State::at_mbarrier, place);
    return false;
  }
  acquire(*current, barrier.completed);
  return true;
}

void emulator_fence_mbarrier_init() {
  for (auto& [address, barrier] : mbarriers())
    if (barrier.initialised.thread == current->number) barrier.visible_to_async_proxy = true;
}

void emulator_fence_proxy_async() {
  fence_proxies(*current);
  emulator_fence_mbarrier_init();
}
}
