#include "diagnostics.h"

#include <execinfo.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "clusters.h"
#include "collectives.h"
#include "mbarriers.h"
#include "schedule.h"
#include "state.h"

namespace emulator {

Report* report;

namespace {

uintptr_t interrupted;  // set by a signal handler just before it fails the launch

std::string format_index(Index i) {
  return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
}

Index thread_index(unsigned number) {
  const Index size = unpack(launch.block_size);
  number %= cluster.stride;
  return {number % size.x, number / size.x % size.y, number / size.x / size.y};
}

Index block_index(unsigned number) {
  const Index size = unpack(launch.grid_size);
  return {number % size.x, number / size.x % size.y, number / size.x / size.y};
}

void collect_frames() {
  report->frame_count = 0;
  auto add = [](uintptr_t pc) {
    if (launch.module->contains(pc) && report->frame_count < 32)
      report->frames[report->frame_count++] = pc - launch.module->code_begin;
  };
  if (interrupted) {
    add(interrupted);
    interrupted = 0;
    return;
  }
  void* frames[48];
  const int count = backtrace(frames, 48);
  for (int i = 0; i < count; i++) add((uintptr_t)frames[i] - 1);  // of the call, not of the return address
}

[[noreturn]] void leave(EmulatorPlace place, const char* format, va_list arguments) {
  vsnprintf(report->message, sizeof report->message, format, arguments);
  report->place = place;
  if (current) {
    report->in_thread = 1;
    const Index at = unpack(current->index), in = unpack(blocks[current->rank].index);
    const uint32_t thread[3] = {at.x, at.y, at.z}, of[3] = {in.x, in.y, in.z};
    memcpy(report->thread, thread, sizeof thread);
    memcpy(report->block, of, sizeof of);
    collect_frames();
  }
  abandon_cluster();
}

}  // namespace

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  leave({nullptr, 0}, format, arguments);
}

void fail_at(EmulatorPlace place, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  leave(place, format, arguments);
}

uint32_t code_offset(const void* pc) { return (uint32_t)((uintptr_t)pc - launch.module->code_begin); }

void set_other(const Access& access) { report->other = access.code ? access.code - 1 : 0; }

void set_interrupted(uintptr_t pc) { interrupted = pc; }

std::string describe_rank(unsigned rank) { return cluster.blocks > 1 ? " of rank " + std::to_string(rank) : ""; }

std::string describe_thread(unsigned number) {
  return "thread " + format_index(thread_index(number)) + describe_rank(number / cluster.stride);
}

bool same_place(EmulatorPlace a, EmulatorPlace b) { return a.line == b.line && !strcmp(a.file, b.file); }

std::string describe_place(EmulatorPlace place) {
  const char* slash = strrchr(place.file, '/');
  return std::string(slash ? slash + 1 : place.file) + ":" + std::to_string(place.line);
}

std::string describe_thread(const Access& access) {
  if (access.thread >= FIRST_AGENT) return agent_name(access.thread);
  if (access.epoch >= cluster.first_epoch) return describe_thread(access.thread);
  std::string text = "thread " + format_index(thread_index(access.thread));
  text += " of block " + format_index(block_index(block_of(access)));
  return text;
}

namespace {

// What the threads of one group of waiting threads are doing.
std::string describe_wait(const Thread& thread) {
  switch (thread.state) {
    case State::exited: return "have returned";
    case State::at_block_barrier: return "wait at the block barrier " + describe_place(thread.waits_at);
    case State::at_named_barrier:
      return "wait at " + describe_named_barrier(thread.waits_for) + " " + describe_place(thread.waits_at);
    case State::at_cluster_barrier: return "wait at " + describe_cluster_barrier(thread);
    case State::at_mbarrier:
      return "wait at " + describe_mbarrier(thread.waits_for) + " " + describe_place(thread.waits_at);
    case State::at_warp_operation: return "wait for their warp at " + describe_place(thread.waits_at);
    case State::at_warpgroup_operation: return "wait for their warpgroup at " + describe_place(thread.waits_at);
    case State::ready: break;
  }
  return "could run";
}

}  // namespace

// Every thread that is left waits: say where, and for the block barrier also who will never come.
void fail_deadlock() {
  struct Group {
    std::string what;
    unsigned count, first;
  };
  std::vector<Group> groups;
  current = nullptr;
  unsigned waiting = MAX_BLOCKS * MAX_THREADS;
  for (unsigned rank = 0; rank < cluster.blocks; rank++) {
    enter(blocks[rank]);
    for (unsigned i = block->first; i < block->first + launch.threads; i++) {
      const std::string what = describe_rank(rank) + " " + describe_wait(threads[i]);
      size_t known = 0;
      while (known < groups.size() && groups[known].what != what) known++;
      if (known == groups.size()) groups.push_back({what, 0, i});
      groups[known].count++;
      if (threads[i].state != State::exited) waiting = std::min(waiting, i);
    }
  }
  std::string text = "deadlock:";
  for (const Group& group : groups)
    text += (&group == &groups[0] ? " " : "; ") + std::to_string(group.count) + " threads" + group.what +
            ", first thread " + format_index(thread_index(group.first));
  current = &threads[waiting];
  fail_at(current->waits_at, "%s", text.c_str());
}

}  // namespace emulator

extern "C" void emulator_trap(const char* what, EmulatorPlace place) { emulator::fail_at(place, "%s", what); }
