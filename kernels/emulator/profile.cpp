#include "profile.h"

#include <algorithm>
#include <deque>
#include <unordered_map>
#include <vector>

#include "diagnostics.h"
#include "state.h"

namespace emulator {

namespace {

constexpr unsigned SECTOR = 32, BANKS = 32, WORD = 4;
constexpr size_t MOST_OPEN = 1024;  // requests of one instruction and warp that wait for lanes

struct Request {
  uint32_t lanes, bytes;  // of each lane
  uintptr_t address[WARP];
};

struct Instruction {
  uint32_t visits[WARP];  // how often each lane has been here since the last barrier
  uint32_t first;         // the visit that open[0] is
  std::deque<Request> open;
};

std::unordered_map<uint64_t, Traffic> traffic;  // by instruction
std::unordered_map<uint64_t, Instruction> instructions[MAX_WARPS];

uint64_t count_distinct(std::vector<uint64_t>& values) {
  std::sort(values.begin(), values.end());
  return (uint64_t)(std::unique(values.begin(), values.end()) - values.begin());
}

// How many different blocks of `size` bytes the request touches.
uint64_t distinct_blocks(const Request& request, unsigned size) {
  static std::vector<uint64_t> blocks;
  blocks.clear();
  for (uint32_t rest = request.lanes; rest; rest &= rest - 1) {
    const uintptr_t begin = request.address[__builtin_ctz(rest)], end = begin + request.bytes;
    for (uintptr_t at = begin / size; at <= (end - 1) / size; at++) blocks.push_back(at);
  }
  return count_distinct(blocks);
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

void account(const Request& request, Traffic& sum) {
  if (!request.lanes) return;
  sum.requests++;
  sum.lanes += (uint64_t)__builtin_popcount(request.lanes);
  if (sum.shared) return count_wavefronts(request, sum);
  const unsigned grain = request.bytes & -request.bytes;
  sum.units += distinct_blocks(request, SECTOR);
  sum.least += (distinct_blocks(request, grain) * grain + SECTOR - 1) / SECTOR;
}

void account_first(Instruction& instruction, Traffic& sum) {
  account(instruction.open.front(), sum);
  instruction.open.pop_front();
  instruction.first++;
}

}  // namespace

void note_access(Kind kind, uintptr_t address, unsigned bytes, const void* pc) {
  if (stack_owner(address) >= 0 || launch.module->contains(address)) return;
  const bool shared = address - launch.shared_base < launch.shared_bytes;
  const uint64_t code = code_offset(pc), key = code << 1 | shared;
  const unsigned lane = current->lane;
  Traffic& sum = traffic[key];
  sum.code = code;
  sum.shared = shared;
  sum.writes = kind != Kind::read;
  Instruction& instruction = instructions[current->warp][key];
  // A lane that comes for a visit that has been accounted for already is too late for it, and alone.
  const uint32_t visit = std::max(instruction.visits[lane], instruction.first);
  instruction.visits[lane] = visit + 1;
  while (instruction.first + instruction.open.size() <= visit) instruction.open.push_back({});
  Request& request = instruction.open[visit - instruction.first];
  request.lanes |= 1u << lane;
  request.bytes = bytes;
  request.address[lane] = shared ? address - launch.shared_base : address;
  while (!instruction.open.empty() && instruction.open.front().lanes == ~0u) account_first(instruction, sum);
  if (instruction.open.size() > MOST_OPEN) account_first(instruction, sum);
}

void end_requests() {
  for (auto& warp : instructions)
    for (auto& [key, instruction] : warp) {
      while (!instruction.open.empty()) account_first(instruction, traffic[key]);
      instruction = {};
    }
}

void reset_profile() {
  traffic.clear();
  for (auto& warp : instructions) warp.clear();
}

}  // namespace emulator

#pragma GCC visibility push(default)
// The traffic of the launch that was profiled last. Returns the number of instructions, of which up to `room`
// are written to `rows`, in the order of the code.
extern "C" unsigned emulator_traffic(emulator::Traffic* rows, unsigned room) {
  std::vector<emulator::Traffic> all;
  for (const auto& [key, sum] : emulator::traffic) all.push_back(sum);
  std::sort(all.begin(), all.end(), [](const auto& a, const auto& b) {
    return a.code != b.code ? a.code < b.code : a.shared < b.shared;
  });
  std::copy_n(all.begin(), std::min<size_t>(room, all.size()), rows);
  return (unsigned)all.size();
}
#pragma GCC visibility pop
