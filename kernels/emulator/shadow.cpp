#include "shadow.h"

#include <algorithm>
#include <cstring>

#include "state.h"

namespace emulator {

uint32_t epoch = 1, last_epoch = 1;

namespace {

static_assert(FIRST_AGENT == MAX_BLOCKS * MAX_THREADS, "agents are numbered behind the threads");
constexpr unsigned MAX_AGENTS = 64;             // of a block
constexpr size_t MAX_FENCES = (1 << 14) - 1;  // of one thread; then it counts as having fenced

// known[w][me][other]: accesses of lane `other` with a lower clock are ordered before what lane `me` does now.
uint32_t known[MAX_WARPS][WARP][WARP];

// The same for threads of other warps and agents, a row a thread. Most kernels synchronise their warps by block
// barriers alone; the rows exist from the first time that one does otherwise.
std::vector<uint32_t> known_afar;
unsigned row_length;  // threads of the block and agents of the cluster

struct Agent {
  std::string name;
  uint32_t clock;
};
Agent agents[MAX_BLOCKS * MAX_AGENTS];
unsigned agent_count[MAX_BLOCKS];

// What was done before the arrivals at one phase of the cluster barrier. Two are kept: nobody can wait for an older
// one, since the next phase is not complete before all have arrived at it.
struct Phase {
  uint32_t epochs[MAX_BLOCKS];    // accesses of the block in earlier epochs are known
  std::vector<uint32_t> threads;  // accesses of the thread at earlier clocks are known
  std::vector<uint32_t> agents;
} arriving, completed[2];
uint32_t phases;  // that are complete

// When each thread executed its fences between the proxies.
struct Time {
  uint32_t epoch, clock;
};
std::vector<Time> fence_times[MAX_BLOCKS * MAX_THREADS];

unsigned agent_index(uint16_t agent) { return (agent - FIRST_AGENT) / WARP; }
unsigned column(uint16_t thread) {
  return thread < FIRST_AGENT ? thread % cluster.stride : launch.threads + agent_index(thread);
}
unsigned rank_of(uint16_t thread) {
  return thread < FIRST_AGENT ? thread / cluster.stride : agent_index(thread) / MAX_AGENTS;
}
uint32_t* row(const Thread& thread) { return &known_afar[thread.number * (size_t)row_length]; }

void know_afar() {
  if (!known_afar.empty()) return;
  row_length = launch.threads + cluster.blocks * MAX_AGENTS;
  known_afar.assign(cluster.blocks * cluster.stride * (size_t)row_length, 0);
}

inline bool known_from_afar(const Access& earlier, const Thread& thread) {
  return !known_afar.empty() && earlier.clock < row(thread)[column(earlier.thread)];
}

// Whether it was before the last cluster barrier that `thread` knows of.
bool known_in_phase(const Access& earlier, const Thread& thread) {
  const uint32_t phase = std::max(thread.phase, blocks[thread.rank].phase);
  if (!phase) return false;
  const Phase& known = completed[phase % 2];
  return earlier.epoch < known.epochs[earlier.thread / cluster.stride] || earlier.clock < known.threads[earlier.thread];
}

// Whether an access of this cluster, by another thread, is ordered by a block barrier among several blocks or by clocks.
// `thread` runs in its own block even where another one has been entered, into which it copies.
__attribute__((noinline)) bool ordered_by_clocks(const Access& earlier, const Thread& thread) {
  if (earlier.thread / cluster.stride == thread.rank) {
    if (earlier.epoch < (thread.rank == block->rank ? epoch : blocks[thread.rank].epoch)) return true;
    if (earlier.thread / WARP != thread.warp ? known_from_afar(earlier, thread)
                                             : earlier.clock < known[thread.warp][thread.lane][earlier.thread % WARP])
      return true;
  }
  return known_in_phase(earlier, thread);
}

// Accesses in epochs below `oldest` do not count; see Shadow::access.
inline bool ordered_before_now(const Access& earlier, const Thread& thread, uint32_t oldest) {
  if (earlier.asynchronous)
    return earlier.epoch < oldest || (earlier.clock != UNDER_WAY && known_from_afar(earlier, thread));
  // Before the last barrier of this block, or gone; but not in another cluster of this launch.
  if (earlier.epoch < cluster.first_epoch) return earlier.epoch < oldest;
  if (earlier.epoch < epoch && cluster.blocks == 1) return true;
  return earlier.thread == thread.number || ordered_by_clocks(earlier, thread);
}

// Whether a write is the async proxy's own, or its thread has fenced since, before what `thread` does now.
bool visible_to_async_proxy(const Access& write, const Thread& thread, uint32_t oldest) {
  if (write.epoch < oldest || write.thread >= FIRST_AGENT) return true;
  const std::vector<Time>& fences = fence_times[write.thread];
  if (write.fences >= fences.size()) return fences.size() == MAX_FENCES;
  const Time& time = fences[write.fences];
  return ordered_before_now({time.epoch, time.clock, 0, write.thread, 0, 0, 0}, thread, oldest);
}

}  // namespace

void Shadow::resize(uint32_t log2_place, uint64_t bytes) {
  if (log2_place != log2_place_) {
    writes_.clear();
    reads_.clear();
  }
  log2_place_ = log2_place;
  const uint64_t places = (bytes >> log2_place) + 1;
  if (writes_.size() < places) writes_.resize(places);
  if (!reads_.empty() && reads_.size() < places) reads_.resize(places);
}

// Makes places smaller, when an access does not begin and end between places: each part inherits the record.
void Shadow::refine(uint32_t log2_place) {
  const uint64_t parts = 1ul << (log2_place_ - log2_place);
  auto split = [&](auto& records) {
    auto whole = std::move(records);
    records.clear();
    records.reserve(whole.size() * parts);
    for (const auto& record : whole) records.insert(records.end(), parts, record);
  };
  split(writes_);
  split(reads_);
  log2_place_ = log2_place;
}

void Shadow::note_read(Reads& reads, const Access& now, const Thread& thread, uint32_t oldest) {
  if (!known_afar.empty() || cluster.declared) {
    // What is ordered after this read is ordered after every read before it, too.
    const bool last = ordered_before_now(reads.last, thread, oldest);
    const bool apart = ordered_before_now(reads.apart, thread, oldest);
    if (apart) reads.apart = last ? Access{} : reads.last;
    const bool of_other_block = cluster.blocks > 1 && rank_of(now.thread) != rank_of(reads.last.thread) &&
                                rank_of(reads.last.thread) == rank_of(reads.apart.thread);
    if (last || apart || of_other_block || reads.last.thread / WARP == reads.apart.thread / WARP) reads.last = now;
    return;
  }
  // How far an earlier read is from this one; 0: this one stands for it in every later comparison.
  auto distance = [&](const Access& read) {
    if (read.epoch < oldest) return 0;
    if (read.epoch < cluster.first_epoch) return 3;
    if (read.epoch < now.epoch || read.thread == now.thread) return 0;
    return read.thread / WARP != now.thread / WARP ? 2 : 1;
  };
  const int last = distance(reads.last), apart = distance(reads.apart);
  if (last >= apart) reads.apart = last ? reads.last : Access{};
  reads.last = now;
}

template <Kind KIND>
inline Conflict Shadow::access_place(uint64_t place, const Access& now, const Thread& thread, uint32_t oldest,
                                     bool must_be_written, Access* other) {
  Access& write = writes_[place];
  const bool async_proxy = now.thread >= FIRST_AGENT;
  if (KIND == Kind::read) {
    if (!ordered_before_now(write, thread, oldest)) {
      *other = write;
      return Conflict::read_after_write;
    }
    if (must_be_written && write.epoch < oldest) return Conflict::never_written;
    if (async_proxy && !visible_to_async_proxy(write, thread, oldest)) {
      *other = write;
      return Conflict::unfenced;
    }
    Reads& reads = reads_[place];
    if (reads.last.epoch == epoch && reads.apart.epoch == epoch && known_afar.empty() &&
        !cluster.declared) {
      // Two reads of this epoch are kept already. If they are by two warps, any write of this epoch races with
      // one of them. If they are by two lanes of the reader's own warp since its last __syncwarp, so too.
      const unsigned one = reads.last.thread / WARP, two = reads.apart.thread / WARP;
      if (one != two ||
          (one == thread.warp && reads.last.clock == thread.clock && reads.apart.clock == thread.clock))
        return Conflict::none;
    }
    note_read(reads, now, thread, oldest);
    return Conflict::none;
  }
  constexpr bool atomic = KIND == Kind::atomic;
  if (!(atomic && write.atomic) && !ordered_before_now(write, thread, oldest)) {
    *other = write;
    return Conflict::write_after_write;
  }
  if (atomic && must_be_written && write.epoch < oldest) return Conflict::never_written;
  if (async_proxy && !visible_to_async_proxy(write, thread, oldest)) {
    *other = write;
    return Conflict::unfenced;
  }
  if (!reads_.empty()) {
    Reads& reads = reads_[place];
    for (const Access* read : {&reads.last, &reads.apart})
      if (!ordered_before_now(*read, thread, oldest)) {
        *other = *read;
        return Conflict::write_after_read;
      }
    reads.last.epoch = reads.apart.epoch = 0;
  }
  write = now;
  return Conflict::none;
}

template <Kind KIND>
__attribute__((always_inline)) inline Conflict Shadow::access(uint64_t offset, unsigned bytes, const Access& now,
                                                              const Thread& thread, uint32_t oldest,
                                                              bool must_be_written, Access* other, uint64_t* at) {
  const uint64_t ends = offset | bytes;
  if (__builtin_expect((ends & ((1u << log2_place_) - 1)) != 0, false)) refine((uint32_t)__builtin_ctzl(ends));
  if (KIND == Kind::read && __builtin_expect(reads_.empty(), false)) reads_.resize(writes_.size());
  const uint64_t last = (offset + bytes - 1) >> log2_place_;
  for (uint64_t place = offset >> log2_place_; place <= last; place++) {
    const Conflict conflict = access_place<KIND>(place, now, thread, oldest, must_be_written, other);
    if (__builtin_expect(conflict != Conflict::none, false)) {
      *at = std::max(place << log2_place_, offset);
      return conflict;
    }
  }
  return Conflict::none;
}

void Shadow::settle(uint64_t offset, unsigned bytes, const Access& write) {
  for (uint64_t place = offset >> log2_place_; place <= (offset + bytes - 1) >> log2_place_; place++)
    writes_[place] = write;
}

void advance_epoch() {
  epoch = ++last_epoch;
  Thread* const mine = &threads[block->first];
  if (cluster.declared)
    for (unsigned i = 0; i < launch.threads; i++) block->phase = std::max(block->phase, mine[i].phase);
  if (known_afar.empty()) return;
  // All threads have met. Threads are ordered by the epoch; what some know of agents, now all do.
  for (unsigned rank = 0; rank < cluster.blocks; rank++)
    for (unsigned index = 0; index < agent_count[rank]; index++) {
      const unsigned agent = launch.threads + rank * MAX_AGENTS + index;
      uint32_t most = 0;
      for (unsigned i = 0; i < launch.threads; i++) most = std::max(most, row(mine[i])[agent]);
      for (unsigned i = 0; i < launch.threads; i++) row(mine[i])[agent] = most;
    }
}

void synchronise_lanes(unsigned warp, uint32_t mask) {
  uint32_t joined[WARP] = {};
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    const unsigned lane = (unsigned)__builtin_ctz(rest);
    const uint32_t(&mine)[WARP] = known[warp][lane];
    for (unsigned other = 0; other < WARP; other++) joined[other] = std::max(joined[other], mine[other]);
  }
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    const unsigned lane = (unsigned)__builtin_ctz(rest);
    joined[lane] = ++threads[warp * WARP + lane].clock;
  }
  for (uint32_t rest = mask; rest; rest &= rest - 1)
    memcpy(known[warp][__builtin_ctz(rest)], joined, sizeof joined);
  if (known_afar.empty()) return;
  Clocks afar(row_length);
  auto lane = [&](uint32_t rest) -> uint32_t* { return row(threads[warp * WARP + (unsigned)__builtin_ctz(rest)]); };
  for (uint32_t rest = mask; rest; rest &= rest - 1)
    for (unsigned i = 0; i < row_length; i++) afar[i] = std::max(afar[i], lane(rest)[i]);
  for (uint32_t rest = mask; rest; rest &= rest - 1) memcpy(lane(rest), afar.data(), row_length * sizeof(uint32_t));
}

// ---- order without a block barrier ----------------------------------------------------------------------

void release(Thread& thread, Clocks& to) {
  know_afar();
  to.resize(row_length + 1);
  for (unsigned i = 0; i < row_length; i++) to[i] = std::max(to[i], row(thread)[i]);
  const unsigned first = in_block(thread.warp * WARP), lanes = std::min(WARP, launch.threads - first);
  for (unsigned lane = 0; lane < lanes; lane++)
    to[first + lane] = std::max(to[first + lane], known[thread.warp][thread.lane][lane]);
  to[in_block(thread.number)] = ++thread.clock;
  to[row_length] = std::max({to[row_length], thread.phase, block->phase});
}

void release_agents(const Thread& thread, Clocks& to) {
  know_afar();
  to.resize(row_length + 1);
  for (unsigned i = launch.threads; i < row_length; i++) to[i] = std::max(to[i], row(thread)[i]);
  to[row_length] = std::max({to[row_length], thread.phase, blocks[thread.rank].phase});
}

void acquire(Thread& thread, const Clocks& from) {
  know_afar();
  if (from.empty()) return;
  for (unsigned i = 0; i < row_length; i++) row(thread)[i] = std::max(row(thread)[i], from[i]);
  const unsigned first = in_block(thread.warp * WARP), lanes = std::min(WARP, launch.threads - first);
  uint32_t(&mine)[WARP] = known[thread.warp][thread.lane];
  for (unsigned lane = 0; lane < lanes; lane++) mine[lane] = std::max(mine[lane], from[first + lane]);
  thread.phase = std::max(thread.phase, from[row_length]);
}

void release_to_cluster(Thread& thread) {
  if (arriving.threads.empty()) {  // the cluster's first arrival
    arriving = {};
    arriving.threads.resize(cluster.blocks * cluster.stride);
    arriving.agents.resize(cluster.blocks * MAX_AGENTS);
  }
  arriving.epochs[thread.rank] = std::max(arriving.epochs[thread.rank], epoch);
  arriving.threads[thread.number] = ++thread.clock;
  if (known_afar.empty()) return;
  for (unsigned i = 0; i < launch.threads; i++)
    arriving.threads[block->first + i] = std::max(arriving.threads[block->first + i], row(thread)[i]);
  for (size_t i = 0; i < arriving.agents.size(); i++)
    arriving.agents[i] = std::max(arriving.agents[i], row(thread)[launch.threads + i]);
}

void complete_cluster_phase() { completed[++phases % 2] = arriving; }

void acquire_from_cluster(Thread& thread) {
  thread.phase = phases;  // the next one cannot be complete: this thread is missing there
  if (known_afar.empty()) return;
  const std::vector<uint32_t>& known = completed[phases % 2].agents;
  for (size_t i = 0; i < known.size(); i++)
    row(thread)[launch.threads + i] = std::max(row(thread)[launch.threads + i], known[i]);
}

bool ordered_before_end(const Access& earlier) {
  for (unsigned i = 0; i < launch.threads; i++)
    if (known_in_phase(earlier, threads[block->first + i])) return true;
  return false;
}

uint16_t new_agent(std::string name) {
  know_afar();
  unsigned& count = agent_count[block->rank];
  count = std::min(count + 1, MAX_AGENTS);
  const unsigned index = block->rank * MAX_AGENTS + count - 1;
  agents[index].name = std::move(name);
  return (uint16_t)(FIRST_AGENT + WARP * index);  // so that each counts as a warp of its own
}

const std::string& agent_name(uint16_t agent) { return agents[agent_index(agent)].name; }

uint32_t tick(uint16_t agent) { return agents[agent_index(agent)].clock++; }

void include(Clocks& to, uint16_t agent, uint32_t clock) {
  to.resize(row_length + 1);
  to[column(agent)] = std::max(to[column(agent)], clock + 1);
}

void acquire(const Thread& thread, uint16_t agent, uint32_t clock) {
  uint32_t& mine = row(thread)[column(agent)];
  mine = std::max(mine, clock + 1);
}

void fence_proxies(Thread& thread) {
  std::vector<Time>& times = fence_times[thread.number];
  if (times.size() < MAX_FENCES) times.push_back({epoch, thread.clock});
  thread.fences = (uint16_t)times.size();
}

bool ordered(const Access& earlier, const Thread& thread) {
  return ordered_before_now(earlier, thread, cluster.first_epoch);
}

unsigned block_of(const Access& access) {
  unsigned number = 0;
  for (const auto& [first, candidate] : launch.blocks_by_epoch)
    if (first <= access.epoch) number = candidate;
  return number + access.thread / cluster.stride;
}

void reset_clocks() {
  const unsigned count = cluster.blocks * cluster.stride;
  memset(known, 0, (count + WARP - 1) / WARP * sizeof known[0]);
  for (unsigned i = 0; i < count; i++) threads[i].clock = 0;
  known_afar.clear();
  for (unsigned i = 0; i < cluster.blocks * MAX_AGENTS; i++) agents[i].clock = 0;
}

void reset_agents() {
  for (unsigned& count : agent_count) count = 0;
  for (unsigned i = 0; i < cluster.blocks * cluster.stride; i++) {
    if (threads[i].fences) fence_times[i].clear();
    threads[i].fences = 0;
    threads[i].phase = 0;
  }
  phases = 0;
  arriving.threads.clear();
}

}  // namespace emulator
