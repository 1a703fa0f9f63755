#include "shadow.h"

#include <algorithm>
#include <cstring>

#include "state.h"

namespace emulator {

uint32_t epoch = 1;

namespace {

// known[w][me][other]: accesses of lane `other` with a lower clock are ordered before what lane `me` does now.
uint32_t known[MAX_WARPS][WARP][WARP];

// Accesses in epochs below `oldest` do not count; see Shadow::access.
inline bool ordered_before_now(const Access& earlier, const Thread& thread, uint32_t oldest) {
  // Before the last barrier of this block, or gone; but not in another block of this launch.
  if (earlier.epoch < epoch) return earlier.epoch >= block.first_epoch || earlier.epoch < oldest;
  if (earlier.thread == thread.number) return true;
  if (earlier.thread / WARP != thread.warp) return false;
  return earlier.clock < known[thread.warp][thread.lane][earlier.thread % WARP];
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

void Shadow::note_read(Reads& reads, const Access& now, uint32_t oldest) {
  // How far an earlier read is from this one; 0: this one stands for it in every later comparison.
  auto distance = [&](const Access& read) {
    if (read.epoch < oldest) return 0;
    if (read.epoch < block.first_epoch) return 3;
    if (read.epoch < now.epoch || read.thread == now.thread) return 0;
    return read.thread / WARP != now.thread / WARP ? 2 : 1;
  };
  const int last = distance(reads.last), apart = distance(reads.apart);
  if (last >= apart) reads.apart = last ? reads.last : Access{};
  reads.last = now;
}

template <Kind KIND>
inline Conflict Shadow::access_place(uint64_t place, uint32_t code, const Thread& thread, uint32_t oldest,
                                     bool must_be_written, Access* other) {
  Access& write = writes_[place];
  if (KIND == Kind::read) {
    if (!ordered_before_now(write, thread, oldest)) {
      *other = write;
      return Conflict::read_after_write;
    }
    if (must_be_written && write.epoch < oldest) return Conflict::never_written;
    Reads& reads = reads_[place];
    if (reads.last.epoch == epoch && reads.apart.epoch == epoch) {
      // Two reads of this epoch are kept already. If they are by two warps, any write of this epoch races with
      // one of them. If they are by two lanes of the reader's own warp since its last __syncwarp, so too.
      const unsigned one = reads.last.thread / WARP, two = reads.apart.thread / WARP;
      if (one != two ||
          (one == thread.warp && reads.last.clock == thread.clock && reads.apart.clock == thread.clock))
        return Conflict::none;
    }
    note_read(reads, {epoch, thread.clock, code, thread.number, 0}, oldest);
    return Conflict::none;
  }
  constexpr bool atomic = KIND == Kind::atomic;
  if (!(atomic && write.atomic) && !ordered_before_now(write, thread, oldest)) {
    *other = write;
    return Conflict::write_after_write;
  }
  if (atomic && must_be_written && write.epoch < oldest) return Conflict::never_written;
  if (!reads_.empty()) {
    Reads& reads = reads_[place];
    for (const Access* read : {&reads.last, &reads.apart})
      if (!ordered_before_now(*read, thread, oldest)) {
        *other = *read;
        return Conflict::write_after_read;
      }
    reads.last.epoch = reads.apart.epoch = 0;
  }
  write = {epoch, thread.clock, code, thread.number, atomic};
  return Conflict::none;
}

template <Kind KIND>
__attribute__((always_inline)) inline Conflict Shadow::access(uint64_t offset, unsigned bytes, uint32_t code,
                                                              const Thread& thread, uint32_t oldest,
                                                              bool must_be_written, Access* other, uint64_t* at) {
  const uint64_t ends = offset | bytes;
  if (__builtin_expect((ends & ((1u << log2_place_) - 1)) != 0, false)) refine((uint32_t)__builtin_ctzl(ends));
  if (KIND == Kind::read && __builtin_expect(reads_.empty(), false)) reads_.resize(writes_.size());
  const uint64_t last = (offset + bytes - 1) >> log2_place_;
  for (uint64_t place = offset >> log2_place_; place <= last; place++) {
    const Conflict conflict = access_place<KIND>(place, code, thread, oldest, must_be_written, other);
    if (__builtin_expect(conflict != Conflict::none, false)) {
      *at = std::max(place << log2_place_, offset);
      return conflict;
    }
  }
  return Conflict::none;
}

void advance_epoch() { epoch++; }

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
}

unsigned block_of(uint32_t of) {
  unsigned number = 0;
  for (const auto& [first, candidate] : launch.blocks_by_epoch)
    if (first <= of) number = candidate;
  return number;
}

void reset_clocks() {
  memset(known, 0, sizeof known);
  for (Thread& thread : threads) thread.clock = 0;
}

}  // namespace emulator
