// Who last wrote and read each place of a memory region: the record from which races are found.
//
// Time is counted in epochs: a block starts a new one when it begins and at each of its block barriers, and
// blocks run one after the other, so that "an earlier epoch of this block" is "before a barrier". Within an
// epoch only __syncwarp orders the threads of a warp; for that every thread keeps a clock for each lane of
// its warp (a vector clock). Shuffles and votes order no memory, as CUDA states.
//
// Named barriers and mbarriers order threads of different warps without a new epoch: they hand clocks of all
// threads from one to the other. Asynchronous work is done by agents, which have clocks as threads do; it is
// ordered by these alone, since no block barrier waits for it.
//
// The blocks of a cluster run together, each in epochs of its own. Between their threads only the cluster barrier
// makes an order: each of its phases keeps the epochs of the blocks and the clocks of the threads as they arrived,
// and a thread knows what was before those of the last phase that it, or its block, has waited for. An arrival at
// another block's mbarrier hands over the clocks of agents alone.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace emulator {

struct Thread;

// One access. `epoch` 0 stands for none.
struct Access {
  uint32_t epoch;
  uint32_t clock;   // the thread's own clock
  uint32_t code;    // offset of the instruction in the module
  uint16_t thread;  // within its cluster; from FIRST_AGENT on, an agent
  uint16_t atomic : 1;
  uint16_t asynchronous : 1;  // block barriers do not order it, clocks do
  uint16_t fences : 14;       // between the proxies, executed by the thread before
};
constexpr uint32_t UNDER_WAY = UINT32_MAX;  // the clock of a write that nobody can know yet

enum class Kind : uint8_t { read, write, atomic };

// How an access collides with the one before it. `unfenced`: the async proxy may not see the write.
enum class Conflict : uint8_t {
  none,
  read_after_write,
  write_after_write,
  write_after_read,
  never_written,
  unfenced
};

class Shadow {
 public:
  // Prepares for a region of `bytes`, one record per 2^log2_place bytes. Records of earlier launches may
  // remain: their epochs tell them apart.
  void resize(uint32_t log2_place, uint64_t bytes);
  // Gives the memory back.
  void clear() { *this = Shadow(); }
  uint64_t record_bytes() const { return writes_.size() * sizeof(Access) + reads_.size() * sizeof(Reads); }

  // Records the access `now` of `bytes` at `offset`, made by or on behalf of `thread`. Epochs below `oldest` do
  // not count: they are older than the content of the region. On a conflict, *other is the earlier access and
  // *at its place.
  template <Kind KIND>
  Conflict access(uint64_t offset, unsigned bytes, const Access& now, const Thread& thread, uint32_t oldest,
                  bool must_be_written, Access* other, uint64_t* at);

  // A write that was under way has been done: from now on the record says `write`.
  void settle(uint64_t offset, unsigned bytes, const Access& write);

  // Whether a record says that `offset` has been written since `oldest`.
  bool written(uint64_t offset, uint32_t oldest) const { return writes_[offset >> log2_place_].epoch >= oldest; }

 private:
  // Two reads are kept a place. They are chosen so that any later write that races with some read since the
  // last write also races with one of these two: from different blocks if there were such (of one cluster or not),
  // else from different warps, else from different lanes. (A __syncwarp of part of a warp may hide a third reader.)
  struct Reads {
    Access last, apart;
  };
  template <Kind KIND>
  Conflict access_place(uint64_t place, const Access& now, const Thread& thread, uint32_t oldest,
                        bool must_be_written, Access* other);
  void refine(uint32_t log2_place);
  void note_read(Reads& reads, const Access& now, const Thread& thread, uint32_t oldest);

  uint32_t log2_place_ = 0;
  std::vector<Access> writes_;
  std::vector<Reads> reads_;  // empty until the first read
};

extern uint32_t epoch;       // of the running block
extern uint32_t last_epoch;  // that any block had; no two have the same

// Moves the running block to a new epoch: everything its threads did before is ordered before what follows.
void advance_epoch();
// Orders the accesses of the lanes in `mask` of one warp: before this call against after it.
void synchronise_lanes(unsigned warp, uint32_t mask);
// The number of the block that made an access.
unsigned block_of(const Access& access);

// ---- order without a block barrier ----------------------------------------------------------------------
// For each thread of the block and each agent, the clock up to which its accesses are known; last the phase of the
// cluster barrier.
using Clocks = std::vector<uint32_t>;
// All that `thread` has done and knows is ordered before what a thread does that acquires `to` later.
void release(Thread& thread, Clocks& to);
void acquire(Thread& thread, const Clocks& from);
// To a thread of another block: what `thread` knows of agents alone.
void release_agents(const Thread& thread, Clocks& to);

// The cluster barrier: `thread` arrives; all have; `thread` has waited for all phases that are complete.
void release_to_cluster(Thread& thread);
void complete_cluster_phase();
void acquire_from_cluster(Thread& thread);
// Whether `earlier`, by a thread of another block of the cluster, is ordered before the end of the running block.
bool ordered_before_end(const Access& earlier);

// Agents: the copies that complete on one mbarrier, the wgmma of one warpgroup, the stores of one thread. A block has
// few; from the 64th on they share a clock, and a race between two of those may be missed.
constexpr uint16_t FIRST_AGENT = 16 * 1024;
uint16_t new_agent(std::string name);  // numbered as in Access::thread
const std::string& agent_name(uint16_t agent);
// The clock of what the agent does next; it then moves on.
uint32_t tick(uint16_t agent);
// What the agent did at `clock` and before is known: to whoever acquires `to`, or to `thread`.
void include(Clocks& to, uint16_t agent, uint32_t clock);
void acquire(const Thread& thread, uint16_t agent, uint32_t clock);

// `thread` makes what it has written visible to the async proxy.
void fence_proxies(Thread& thread);
// Whether `earlier`, an event in the life of a thread of this cluster, is ordered before what `thread` does now.
bool ordered(const Access& earlier, const Thread& thread);

// For a new launch: no thread knows anything of another.
void reset_clocks();
// For a new cluster: no agents, no fences, no cluster barriers.
void reset_agents();

}  // namespace emulator
