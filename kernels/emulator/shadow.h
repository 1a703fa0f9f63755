// Who last wrote and read each place of a memory region: the record from which races are found.
//
// Time is counted in epochs: a block starts a new one when it begins and at each of its block barriers, and
// blocks run one after the other, so that "an earlier epoch of this block" is "before a barrier". Within an
// epoch only __syncwarp orders the threads of a warp; for that every thread keeps a clock for each lane of
// its warp (a vector clock). Shuffles and votes order no memory, as CUDA states.
#pragma once
#include <cstdint>
#include <vector>

namespace emulator {

struct Thread;

// One access. `epoch` 0 stands for none.
struct Access {
  uint32_t epoch;
  uint32_t clock;   // the thread's own clock
  uint32_t code;    // offset of the instruction in the module
  uint16_t thread;  // within its block
  uint16_t atomic;
};

enum class Kind : uint8_t { read, write, atomic };

// How an access collides with the one before it.
enum class Conflict : uint8_t { none, read_after_write, write_after_write, write_after_read, never_written };

class Shadow {
 public:
  // Prepares for a region of `bytes`, one record per 2^log2_place bytes. Records of earlier launches may
  // remain: their epochs tell them apart.
  void resize(uint32_t log2_place, uint64_t bytes);
  // Gives the memory back.
  void clear() { *this = Shadow(); }
  uint64_t record_bytes() const { return writes_.size() * sizeof(Access) + reads_.size() * sizeof(Reads); }

  // Records an access of `bytes` at `offset` by `thread` from `code`. Epochs below `oldest` do not count: they
  // are older than the content of the region. On a conflict, *other is the earlier access and *at its place.
  template <Kind KIND>
  Conflict access(uint64_t offset, unsigned bytes, uint32_t code, const Thread& thread, uint32_t oldest,
                  bool must_be_written, Access* other, uint64_t* at);

  // Whether a record says that `offset` has been written since `oldest`.
  bool written(uint64_t offset, uint32_t oldest) const { return writes_[offset >> log2_place_].epoch >= oldest; }

 private:
  // Two reads are kept a place. They are chosen so that any later write that races with some read since the
  // last write also races with one of these two: from different blocks if there were such, else from
  // different warps, else from different lanes. (A __syncwarp of part of a warp may hide a third reader.)
  struct Reads {
    Access last, apart;
  };
  template <Kind KIND>
  Conflict access_place(uint64_t place, uint32_t code, const Thread& thread, uint32_t oldest, bool must_be_written,
                        Access* other);
  void refine(uint32_t log2_place);
  void note_read(Reads& reads, const Access& now, uint32_t oldest);

  uint32_t log2_place_ = 0;
  std::vector<Access> writes_;
  std::vector<Reads> reads_;  // empty until the first read
};

extern uint32_t epoch;

// Moves the running block to a new epoch: everything its threads did before is ordered before what follows.
void advance_epoch();
// Orders the accesses of the lanes in `mask` of one warp: before this call against after it.
void synchronise_lanes(unsigned warp, uint32_t mask);
// The number of the block that was running in `epoch`.
unsigned block_of(uint32_t epoch);

// For a new launch: no thread knows anything of another.
void reset_clocks();

}  // namespace emulator
