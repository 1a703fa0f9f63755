#include "profile.h"

#include <algorithm>
#include <deque>
#include <iterator>
#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

#include "diagnostics.h"
#include "state.h"

namespace emulator {

namespace {

constexpr unsigned SECTOR = 32, BANKS = 32, WORD = 4, PACK = 16;
constexpr size_t MOST_OPEN = 1024;  // requests of one instruction and warp that wait for lanes

struct Request {
  uint32_t lanes, bytes;  // of each lane
  uintptr_t address[WARP];
};

// What one warp has asked for by one instruction since the last barrier.
struct Open {
  uint32_t visits[WARP];  // how often each lane has been here
  uint32_t first;         // the visit that requests[0] is
  std::deque<Request> requests;
};

// Different numbers, none of them 0.
class Distinct {
 public:
  // Whether `value` is new.
  bool insert(uint64_t value) {
    if (2 * ++count_ > slots_.size()) grow();
    uint64_t& slot = find(value);
    if (slot == value) return count_--, false;
    slot = value;
    return true;
  }
  void clear() {
    if (count_) std::fill(slots_.begin(), slots_.end(), 0);
    count_ = 0;
  }

 private:
  uint64_t& find(uint64_t value) {
    uint64_t at = value * 0x9e3779b97f4a7c15u >> 20;
    for (;; at++) {
      uint64_t& slot = slots_[at & (slots_.size() - 1)];
      if (!slot || slot == value) return slot;
    }
  }
  void grow() {
    std::vector<uint64_t> old(std::max<size_t>(64, 4 * slots_.size()), 0);
    old.swap(slots_);
    for (const uint64_t value : old)
      if (value) find(value) = value;
  }

  std::vector<uint64_t> slots_;  // a power of two of them, 0 where free
  size_t count_ = 0;
};

struct Line {
  Traffic sum;
  Distinct block_sectors;  // of the cluster that runs
  std::unique_ptr<Open> open[MAX_WARPS];
};

struct TensorSide {
  TensorTraffic sum;
  Distinct block_sectors;
  std::vector<bool> sectors;  // of the tensor: touched in this launch
};

std::unordered_map<uint64_t, Line> lines;               // by instruction
std::pair<uint64_t, Line*> recent[64];                  // those looked up last
std::map<std::pair<uint32_t, bool>, TensorSide> sides;  // by tensor and whether it is written
std::vector<std::pair<Line*, unsigned>> visited[MAX_BLOCKS];  // since its last barrier: lines and warps
uint32_t kept;                                                // first epoch of the cluster that runs

uint64_t count_distinct(std::vector<uint64_t>& values) {
  std::sort(values.begin(), values.end());
  values.erase(std::unique(values.begin(), values.end()), values.end());
  return values.size();
}

// The different blocks of `size` bytes that the request touches, in the order of their addresses.
const std::vector<uint64_t>& distinct_blocks(const Request& request, unsigned size) {
  static std::vector<uint64_t> blocks;
  blocks.clear();
  for (uint32_t rest = request.lanes; rest; rest &= rest - 1) {
    const uintptr_t begin = request.address[__builtin_ctz(rest)], end = begin + request.bytes;
    for (uintptr_t at = begin / size; at <= (end - 1) / size; at++) blocks.push_back(at);
  }
  count_distinct(blocks);
  return blocks;
}

// Shared memory serves 128 bytes at a time: all lanes of accesses up to 4 bytes, half of a warp of 8, a
// quarter of a warp of 16 (so does ldmatrix: a matrix of 8 rows). In each of these phases a bank gives one
// word a wavefront, to any number of lanes.
void count_wavefronts(const Request& request, Traffic& sum) {
  const unsigned together = std::min(WARP, WARP * WORD / std::max(request.bytes, WORD));
  for (unsigned first = 0; first < WARP; first += together) {
    std::vector<uint64_t> words[BANKS];
    bool any = false;
    for (unsigned lane = first; lane < first + together; lane++) {
      if (!(request.lanes >> lane & 1)) continue;
      any = true;
      const uintptr_t begin = request.address[lane], end = begin + request.bytes;
      for (uintptr_t word = begin / WORD; word <= (end - 1) / WORD; word++) words[word % BANKS].push_back(word);
    }
    uint64_t most = 0;
    for (auto& bank : words) most = std::max(most, count_distinct(bank));
    sum.units += most;
    sum.least += any;
  }
}

TensorSide* side_at(uint64_t sector, bool writes) {
  const std::vector<Tensor>& tensors = launch.tensors;
  const auto holds = [&](const Tensor& t) { return t.begin / SECTOR <= sector && sector * SECTOR < t.end; };
  const auto found = std::find_if(tensors.begin(), tensors.end(), holds);
  if (found == tensors.end()) return nullptr;  // out of bounds: the launch is about to fail
  const auto tensor = (uint32_t)(found - tensors.begin());
  TensorSide& side = sides[{tensor, writes}];
  if (side.sectors.empty()) {
    side.sum.tensor = tensor;
    side.sum.writes = writes;
    side.sectors.resize((found->end - 1) / SECTOR - found->begin / SECTOR + 1);
  }
  return &side;
}

// A request for these sectors, by the block of this rank. What its block has is known while its cluster runs.
void count_sectors(const std::vector<uint64_t>& sectors, Line& line, unsigned rank) {
  if (kept != cluster.first_epoch) {
    kept = cluster.first_epoch;
    for (auto& [key, each] : lines) each.block_sectors.clear();
    for (auto& [key, each] : sides) each.block_sectors.clear();
  }
  line.sum.units += sectors.size();
  for (const uint64_t sector : sectors) {
    const uint64_t pair = sector * MAX_BLOCKS + rank;
    line.sum.block_sectors += line.block_sectors.insert(pair);
    TensorSide* side = side_at(sector, line.sum.writes);
    if (!side) continue;
    side->sum.requested++;
    side->sum.block_sectors += side->block_sectors.insert(pair);
    auto&& touched = side->sectors[sector - launch.tensors[side->sum.tensor].begin / SECTOR];
    side->sum.sectors += !touched;
    touched = true;
  }
}

void account(const Request& request, Line& line, unsigned rank) {
  if (!request.lanes) return;
  Traffic& sum = line.sum;
  const auto lanes = (uint64_t)__builtin_popcount(request.lanes);
  sum.requests++;
  sum.lanes += lanes;
  sum.packs += request.bytes == PACK ? lanes : 0;
  if (sum.shared) return count_wavefronts(request, sum);
  const unsigned grain = request.bytes & -request.bytes;
  sum.least += (distinct_blocks(request, grain).size() * grain + SECTOR - 1) / SECTOR;
  count_sectors(distinct_blocks(request, SECTOR), line, rank);
}

void account_first(Open& open, Line& line, unsigned rank) {
  account(open.requests.front(), line, rank);
  open.requests.pop_front();
  open.first++;
}

Line& line_at(uint64_t code, bool shared, bool writes) {
  const uint64_t key = code << 1 | shared;
  auto& [known, line] = recent[(code ^ code >> 6) % std::size(recent)];
  if (line && known == key) return *line;
  known = key;
  line = &lines[key];
  line->sum.code = code;
  line->sum.shared = shared;
  line->sum.writes = writes;
  return *line;
}

}  // namespace

void note_access(Kind kind, uintptr_t address, unsigned bytes, const void* pc) {
  if (stack_owner(address) >= 0 || launch.module->contains(address)) return;
  const bool shared = address - launch.shared_base < launch.shared_bytes;
  const unsigned lane = current->lane, rank = current->rank;
  Line& line = line_at(code_offset(pc), shared, kind != Kind::read);
  std::unique_ptr<Open>& slot = line.open[current->warp];
  if (!slot) {
    slot = std::make_unique<Open>();
    visited[rank].emplace_back(&line, current->warp);
  }
  Open& open = *slot;
  // A lane that comes for a visit that has been accounted for already is too late for it, and alone.
  const uint32_t visit = std::max(open.visits[lane], open.first);
  open.visits[lane] = visit + 1;
  while (open.first + open.requests.size() <= visit) open.requests.push_back({});
  Request& request = open.requests[visit - open.first];
  request.lanes |= 1u << lane;
  request.bytes = bytes;
  request.address[lane] = shared ? address - launch.shared_base : address;
  while (!open.requests.empty() && open.requests.front().lanes == ~0u) account_first(open, line, rank);
  if (open.requests.size() > MOST_OPEN) account_first(open, line, rank);
}

void note_copy(Kind kind, uintptr_t address, unsigned bytes, uint64_t code) {
  static std::vector<uint64_t> sectors;
  sectors.clear();
  for (uint64_t at = address / SECTOR; at <= (address + bytes - 1) / SECTOR; at++) sectors.push_back(at);
  Line& line = line_at(code, false, kind != Kind::read);
  line.sum.requests++;
  line.sum.lanes++;
  line.sum.packs++;  // copies are of whole packs
  line.sum.least += (bytes + SECTOR - 1) / SECTOR;
  count_sectors(sectors, line, current->rank);
}

void end_requests() {
  for (unsigned rank = 0; rank < cluster.blocks; rank++) {
    if (current && rank != current->rank) continue;
    for (const auto& [line, warp] : visited[rank]) {
      std::unique_ptr<Open>& open = line->open[warp];
      while (!open->requests.empty()) account_first(*open, *line, rank);
      open.reset();
    }
    visited[rank].clear();
  }
}

void reset_profile() {
  lines.clear();
  sides.clear();
  for (auto& each : visited) each.clear();
  std::fill(std::begin(recent), std::end(recent), std::pair<uint64_t, Line*>());
  kept = 0;
}

}  // namespace emulator

#pragma GCC visibility push(default)
extern "C" {

// The traffic of the launch that was profiled last. Both return the number of rows, of which up to `room` are
// written to `rows`: of instructions in the order of the code, of tensors in that of the parameters.
unsigned emulator_line_traffic(emulator::Traffic* rows, unsigned room) {
  std::vector<emulator::Traffic> all;
  for (const auto& [key, line] : emulator::lines) all.push_back(line.sum);
  std::sort(all.begin(), all.end(), [](const auto& a, const auto& b) {
    return a.code != b.code ? a.code < b.code : a.shared < b.shared;
  });
  std::copy_n(all.begin(), std::min<size_t>(room, all.size()), rows);
  return (unsigned)all.size();
}

unsigned emulator_tensor_traffic(emulator::TensorTraffic* rows, unsigned room) {
  unsigned count = 0;
  for (const auto& [key, side] : emulator::sides)
    if (count++ < room) *rows++ = side.sum;
  return count;
}
}
#pragma GCC visibility pop
