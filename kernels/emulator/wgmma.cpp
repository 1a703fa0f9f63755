// A multiplication is issued when all threads of the warpgroup have come to it: its shared memory is checked and
// recorded as read by the warpgroup's agent, whose clock nobody knows before the wait; the values of D are put
// aside and D becomes NaN. It is computed in the wait that covers it.
#include "wgmma.h"

#include <cmath>
#include <cstring>
#include <deque>
#include <list>

#include "diagnostics.h"
#include "elements.h"
#include "memory.h"
#include "schedule.h"
#include "tensor_maps.h"

namespace emulator {

namespace {

constexpr unsigned M = 64, MAX_N = 256, MAX_K = 16;
constexpr unsigned PIECE = 16;            // bytes that lie together in every layout
constexpr unsigned REGISTERS = 64 << 10;  // of a multiprocessor
enum Type { F16, BF16, TF32 };            // WgmmaType of ptx_sm90.cuh

// ---- registers ------------------------------------------------------------------------------------------
// Variables of one thread that hold D, or A.
struct Fragment {
  uintptr_t begin, end;
  unsigned under_way;   // multiplications that use it
  bool touched;         // accessed since the last wgmma_fence
  EmulatorPlace place;  // of the last multiplication
};
std::vector<Fragment> fragments[MAX_BLOCKS * MAX_THREADS];

void use_registers(Thread& thread, const void* registers, unsigned bytes, EmulatorPlace place) {
  const uintptr_t begin = (uintptr_t)registers, end = begin + bytes;
  std::vector<Fragment>& mine = fragments[thread.number];
  for (size_t i = 0; i < mine.size(); i++) {
    Fragment& fragment = mine[i];
    if (fragment.begin >= end || begin >= fragment.end) continue;
    if (fragment.touched) {
      current = &thread;
      fail_at(place, "missing wgmma_fence: registers of this wgmma have been accessed since the last one");
    }
    if (fragment.begin == begin && fragment.end == end) {
      fragment.under_way++;
      fragment.place = place;
      return;
    }
    if (fragment.under_way)
      fail_at(place, "wgmma: some registers of this one belong to a wgmma of another shape that is under way");
    mine.erase(mine.begin() + (long)i--);
  }
  mine.push_back({begin, end, 1, false, place});
  thread.has_fragments = true;
}

void leave_registers(const Thread& thread, const void* registers) {
  for (Fragment& fragment : fragments[thread.number])
    if (fragment.begin == (uintptr_t)registers) fragment.under_way--;
}

// ---- shared memory --------------------------------------------------------------------------------------
// A or B, of K x `extent` elements, as its descriptor says.
struct Operand {
  uint32_t start, leading, stride;
  unsigned swizzle;
  bool k_major;
  unsigned extent;
  Type type;

  Operand(uint64_t descriptor, int major, unsigned extent, int type, const char* which, EmulatorPlace place)
      : start((uint32_t)(descriptor & 0x3fff) << 4),
        leading((uint32_t)(descriptor >> 16 & 0x3fff) << 4),
        stride((uint32_t)(descriptor >> 32 & 0x3fff) << 4),
        swizzle(descriptor >> 62 ? 4 - (unsigned)(descriptor >> 62) : 0),
        k_major(major == 0),
        extent(extent),
        type((Type)type) {
    const uint32_t pattern = 128u << swizzle;
    if ((descriptor >> 49 & 7) || (swizzle && start % pattern >= 128))
      fail_at(place, "misaligned: wgmma: expected a tile of %s at a multiple of %u bytes (base offset 0), got %s",
              which, pattern, describe_shared(start).c_str());
  }

  unsigned per_piece() const { return type == TF32 ? 4 : 8; }
  unsigned k() const { return 2 * per_piece(); }
  // Lines are of one m or n (K-major), or of one k.
  unsigned lines() const { return k_major ? extent : k(); }
  unsigned pieces() const { return (k_major ? k() : extent) / per_piece(); }

  uint32_t address(unsigned line, unsigned piece) const {
    const uint32_t width = PIECE << swizzle, together = 1u << swizzle;
    uint32_t at = start + line % 8 * width;
    if (k_major)
      at += line / 8 * stride + (swizzle ? piece * PIECE : piece * leading);
    else if (swizzle)
      at += line / 8 * stride + piece % together * PIECE + piece / together * leading;
    else
      at += line / 8 * leading + piece * stride;
    return swizzled(at & 0x3ffff, swizzle);
  }

  // Checks that the async proxy may read it all, as `thread(line, piece)` knows, and records the reads.
  template <class ThreadOf> void check(const Access& now, ThreadOf thread) const {
    for (unsigned line = 0; line < lines(); line++)
      for (unsigned piece = 0; piece < pieces(); piece++)
        access_shared(Kind::read, address(line, piece), PIECE, now, thread(line, piece));
  }

  // to[k][m or n]
  void read(float (&to)[MAX_K][MAX_N]) const {
    for (unsigned line = 0; line < lines(); line++)
      for (unsigned piece = 0; piece < pieces(); piece++) {
        const char* from = (const char*)launch.shared_base + address(line, piece);
        for (unsigned e = 0; e < per_piece(); e++) {
          const unsigned across = piece * per_piece() + e;
          to[k_major ? across : line][k_major ? line : across] = element(from, e);
        }
      }
  }

  float element(const char* from, unsigned e) const {
    uint32_t bits = 0;
    if (type == TF32) {
      memcpy(&bits, from + 4 * e, 4);
      return float_of_tf32(bits);
    }
    memcpy(&bits, from + 2 * e, 2);
    return type == F16 ? float_of_half((uint16_t)bits) : float_of_bfloat((uint16_t)bits);
  }
};

// ---- the warpgroup --------------------------------------------------------------------------------------
struct Accumulator {
  float* registers[WARPGROUP];
  unsigned n;
  std::vector<float> values;  // [64][n], while multiplications are under way
  unsigned under_way;
};

struct Multiplication {
  EmulatorWgmma operands;
  EmulatorPlace place;
  unsigned group;
  uint32_t clock;
  Accumulator* d;
  const unsigned* a_registers[WARPGROUP];
  std::vector<float> a;  // [k][64], where A comes from registers
};

// What a thread brings to a multiplication.
struct Issue {
  EmulatorWgmma operands;
  const void* pc;
};

struct Warpgroup;
struct WarpgroupOperation {
  const char* name;
  void (*complete)(Warpgroup& group, EmulatorPlace place);
};

struct Warpgroup {
  unsigned number;
  // Threads that have come to a common operation.
  const WarpgroupOperation* operation;
  EmulatorPlace place;
  unsigned arrived, exited;
  const void* lanes[WARPGROUP];

  bool fenced;
  unsigned groups;  // committed so far
  uint16_t agent;
  std::deque<Multiplication> under_way;
  std::list<Accumulator> accumulators;
  unsigned registers;  // set by setmaxnreg

  Thread& thread(unsigned i) const { return threads[number * WARPGROUP + i]; }
  const EmulatorWgmma& operands(unsigned i) const { return ((const Issue*)lanes[i])->operands; }
} warpgroups[MAX_BLOCKS * MAX_THREADS / WARPGROUP];

void join_warpgroup(const WarpgroupOperation& operation, const void* mine, EmulatorPlace place) {
  const unsigned number = current->number / WARPGROUP;
  Warpgroup& group = warpgroups[number];
  if (in_block(number * WARPGROUP) + WARPGROUP > launch.threads)
    fail_at(place, "%s: expected a warpgroup of 128 threads, got the last %u of a block", operation.name,
            launch.threads % WARPGROUP);
  if (group.exited)
    fail_at(place, "%s: %u threads of the warpgroup have returned from the kernel", operation.name, group.exited);
  if (group.arrived && (group.operation != &operation || !same_place(group.place, place)))
    fail_at(place, "divergent warpgroup: this thread is at this %s while %u others wait at the %s of %s",
            operation.name, group.arrived, group.operation->name, describe_place(group.place).c_str());
  group.operation = &operation;
  group.place = place;
  group.lanes[current->number % WARPGROUP] = mine;
  if (++group.arrived < WARPGROUP) return wait(State::at_warpgroup_operation, place);
  group.arrived = 0;
  Thread& self = *current;
  operation.complete(group, place);
  for (unsigned i = 0; i < WARPGROUP; i++)
    if (&group.thread(i) != &self) wake(group.thread(i));
  maybe_let_others_run();
}

// Row and column of D that thread t of the warpgroup holds in register i.
unsigned row_of(unsigned t, unsigned i) { return t / WARP * 16 + t % WARP / 4 + 8 * (i / 2 % 2); }
unsigned column_of(unsigned t, unsigned i) { return 8 * (i / 4) + 2 * (t % 4) + i % 2; }

template <class Visit> void each_register(Accumulator& d, Visit visit) {
  for (unsigned t = 0; t < WARPGROUP; t++)
    for (unsigned i = 0; i < d.n / 2; i++)
      visit(d.registers[t][i], d.values[row_of(t, i) * d.n + column_of(t, i)]);
}

// D, with its values put aside.
Accumulator* take_accumulator(Warpgroup& group, unsigned n) {
  float* first = group.operands(0).d;
  for (Accumulator& d : group.accumulators)
    if (d.registers[0] == first) return &d;
  group.accumulators.push_back({{}, n, std::vector<float>(M * n), 0});
  Accumulator& d = group.accumulators.back();
  for (unsigned t = 0; t < WARPGROUP; t++) d.registers[t] = group.operands(t).d;
  each_register(d, [](float& of_thread, float& value) {
    value = of_thread;
    of_thread = NAN;
  });
  return &d;
}

std::vector<float> gather_a(const Multiplication& op) {
  std::vector<float> a(MAX_K * M);
  for (unsigned t = 0; t < WARPGROUP; t++)
    for (unsigned i = 0; i < 4; i++) {
      const unsigned bits = op.a_registers[t][i], row = t / WARP * 16 + t % WARP / 4 + 8 * (i % 2);
      if (op.operands.type == TF32) {
        a[(t % 4 + 4 * (i / 2)) * M + row] = float_of_tf32(bits);
        continue;
      }
      for (unsigned h = 0; h < 2; h++) {
        const uint16_t element = (uint16_t)(bits >> 16 * h);
        a[(2 * (t % 4) + 8 * (i / 2) + h) * M + row] =
            op.operands.type == F16 ? float_of_half(element) : float_of_bfloat(element);
      }
    }
  return a;
}

void issue(Warpgroup& group, EmulatorPlace place) {
  const EmulatorWgmma& first = group.operands(0);
  if (!group.fenced) fail_at(place, "missing wgmma_fence: none stands before the warpgroup's first wgmma");
  Multiplication op{first, place, group.groups, 0, nullptr, {}, {}};
  for (unsigned t = 0; t < WARPGROUP; t++) {
    const EmulatorWgmma& mine = group.operands(t);
    if (mine.a != first.a || mine.b != first.b || mine.accumulate != first.accumulate) {
      current = &group.thread(t);
      fail_at(place, "wgmma: descriptors or `accumulate` of this thread differ from those of the warpgroup's first");
    }
    use_registers(group.thread(t), mine.d, 2 * (unsigned)first.n, place);
    if (first.a_registers) use_registers(group.thread(t), mine.a_registers, 16, place);
    op.a_registers[t] = mine.a_registers;
  }
  const Operand b(first.b, first.b_major, (unsigned)first.n, first.type, "B", place);
  const unsigned warp = in_block(group.number * WARPGROUP) / WARP;
  if (!group.agent)
    group.agent = new_agent("wgmma of warps " + std::to_string(warp) + " to " + std::to_string(warp + 3) +
                            describe_rank(block->rank));
  op.clock = tick(group.agent);
  const Access read{epoch, op.clock, code_offset(((const Issue*)group.lanes[0])->pc), group.agent, 0, 1, 0};
  // All warps read B, each its own rows of A: a row of B is judged by what one warp knows, the next by another.
  b.check(read, [&](unsigned line, unsigned piece) -> Thread& { return group.thread((line + piece) % 4 * WARP); });
  if (first.a_registers) {
    op.a = gather_a(op);
  } else {
    const Operand a(first.a, first.a_major, M, first.type, "A", place);
    a.check(read, [&](unsigned line, unsigned piece) -> Thread& {
      return group.thread((a.k_major ? line : piece * a.per_piece()) / 16 * WARP);
    });
  }
  op.d = take_accumulator(group, (unsigned)first.n);
  op.d->under_way++;
  launch.counters.wgmma_instructions++;
  group.under_way.push_back(std::move(op));
}

void compute(const Multiplication& op) {
  static float a[MAX_K][MAX_N], b[MAX_K][MAX_N];
  const Operand of_b(op.operands.b, op.operands.b_major, op.d->n, op.operands.type, "B", op.place);
  of_b.read(b);
  if (op.a.empty())
    Operand(op.operands.a, op.operands.a_major, M, op.operands.type, "A", op.place).read(a);
  else
    for (unsigned k = 0; k < MAX_K; k++) memcpy(a[k], &op.a[k * M], M * sizeof(float));
  const unsigned n = op.d->n;
  if (!op.operands.accumulate) std::fill(op.d->values.begin(), op.d->values.end(), 0.f);
  typedef float Vector __attribute__((vector_size(32), aligned(4)));
  for (unsigned m = 0; m < M; m++)
    for (unsigned j = 0; j < n; j += 8) {
      Vector& sum = *(Vector*)&op.d->values[m * n + j];
      for (unsigned k = 0; k < of_b.k(); k++) sum += a[k][m] * *(const Vector*)&b[k][j];
    }
}

void finish(Warpgroup& group, const Multiplication& op) {
  compute(op);
  Accumulator& d = *op.d;
  if (--d.under_way == 0)
    each_register(d, [](float& of_thread, float& value) { of_thread = value; });
  for (unsigned t = 0; t < WARPGROUP; t++) {
    acquire(group.thread(t), group.agent, op.clock);
    leave_registers(group.thread(t), d.registers[t]);
    if (op.operands.a_registers) leave_registers(group.thread(t), op.a_registers[t]);
  }
  if (!d.under_way) group.accumulators.remove_if([&](const Accumulator& other) { return &other == &d; });
}

const WarpgroupOperation MULTIPLY{"wgmma", issue};

const WarpgroupOperation FENCE{"wgmma.fence", [](Warpgroup& group, EmulatorPlace) {
  group.fenced = true;
  for (unsigned t = 0; t < WARPGROUP; t++)
    for (Fragment& fragment : fragments[group.thread(t).number]) fragment.touched = false;
}};

const WarpgroupOperation COMMIT{"wgmma.commit_group", [](Warpgroup& group, EmulatorPlace) { group.groups++; }};

const WarpgroupOperation WAIT{"wgmma.wait_group", [](Warpgroup& group, EmulatorPlace) {
  const unsigned newest = *(const unsigned*)group.lanes[0];
  while (!group.under_way.empty() && group.under_way.front().group + newest < group.groups) {
    const Multiplication op = std::move(group.under_way.front());
    group.under_way.pop_front();
    finish(group, op);
  }
}};

const WarpgroupOperation SET_REGISTERS{"setmaxnreg", [](Warpgroup& group, EmulatorPlace place) {
  group.registers = *(const unsigned*)group.lanes[0];
  unsigned sum = 0;
  for (unsigned i = 0; i < launch.threads; i += WARPGROUP)
    sum += warpgroups[(block->first + i) / WARPGROUP].registers * WARPGROUP;
  if (sum > REGISTERS)
    fail_at(place, "setmaxnreg: the warpgroups ask for %u registers together: there are %u", sum, REGISTERS);
}};

}  // namespace

void touch_registers(uintptr_t address, unsigned bytes, Kind kind) {
  for (Fragment& fragment : fragments[current->number]) {
    if (fragment.begin >= address + bytes || address >= fragment.end) continue;
    if (fragment.under_way)
      fail("race: %s of a register of the wgmma at %s: no wgmma_wait has covered it yet",
           kind == Kind::read ? "read" : "write", describe_place(fragment.place).c_str());
    fragment.touched = true;
  }
}

void leave_warpgroup(const Thread& thread) {
  Warpgroup& group = warpgroups[thread.number / WARPGROUP];
  if (!group.under_way.empty())
    fail_at(group.under_way.front().place,
            "wgmma: the thread has returned from the kernel while this one is under way: no wgmma_wait covers it");
  if (group.arrived)
    fail_at(group.place, "%s: %u threads of the warpgroup wait, but %s has returned from the kernel",
            group.operation->name, group.arrived, describe_thread(thread.number).c_str());
  group.exited++;
}

void reset_warpgroups() {
  for (unsigned i = 0; i < cluster.blocks * cluster.stride / WARPGROUP; i++) {
    warpgroups[i] = {};
    warpgroups[i].number = i;
  }
  for (unsigned i = 0; i < cluster.blocks * cluster.stride; i++) {
    if (threads[i].has_fragments) fragments[i].clear();
    threads[i].has_fragments = false;
  }
}

}  // namespace emulator

using namespace emulator;

extern "C" {

void emulator_wgmma(const EmulatorWgmma* operands, EmulatorPlace place) {
  if (operands->n < 8 || operands->n > (int)MAX_N || operands->n % 8)
    fail_at(place, "wgmma: expected N to be a multiple of 8 up to 256, got %d", operands->n);
  const Issue mine{*operands, __builtin_return_address(0)};
  join_warpgroup(MULTIPLY, &mine, place);
}

void emulator_wgmma_fence(EmulatorPlace place) { join_warpgroup(FENCE, nullptr, place); }

void emulator_wgmma_commit(EmulatorPlace place) { join_warpgroup(COMMIT, nullptr, place); }

void emulator_wgmma_wait(int groups, EmulatorPlace place) { join_warpgroup(WAIT, &groups, place); }

void emulator_setmaxnreg(unsigned count, EmulatorPlace place) {
  if (count < 24 || count > 256 || count % 8)
    fail_at(place, "setmaxnreg: expected a multiple of 8 from 24 to 256, got %u", count);
  join_warpgroup(SET_REGISTERS, &count, place);
}
}
