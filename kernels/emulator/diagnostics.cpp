#include "diagnostics.h"

#include <execinfo.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>

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
    const Index at = unpack(current->index), in = unpack(block.index);
    const uint32_t thread[3] = {at.x, at.y, at.z}, of[3] = {in.x, in.y, in.z};
    memcpy(report->thread, thread, sizeof thread);
    memcpy(report->block, of, sizeof of);
    collect_frames();
  }
  abandon_block();
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

void set_other(const Access& access) { report->other = access.code - 1; }

void set_interrupted(uintptr_t pc) { interrupted = pc; }

std::string describe_thread(unsigned number) { return "thread " + format_index(thread_index(number)); }

std::string describe_thread(const Access& access) {
  std::string text = describe_thread(access.thread);
  if (access.epoch < block.first_epoch) text += " of block " + format_index(block_index(block_of(access.epoch)));
  return text;
}

// Every thread that is left waits: say where, and for the block barrier also who will never come.
void fail_deadlock() {
  struct Group {
    State state;
    EmulatorPlace place;
    unsigned count, first;
  };
  std::vector<Group> groups;
  for (unsigned i = 0; i < launch.threads; i++) {
    const Thread& thread = threads[i];
    bool known = false;
    for (Group& group : groups)
      if (group.state == thread.state &&
          (thread.state == State::exited ||
           (group.place.line == thread.waits_at.line && !strcmp(group.place.file, thread.waits_at.file)))) {
        group.count++;
        known = true;
        break;
      }
    if (!known) groups.push_back({thread.state, thread.waits_at, 1, i});
  }
  std::string text = "deadlock:";
  const Group* waiting = nullptr;
  for (const Group& group : groups) {
    const char* slash = group.state == State::exited ? nullptr : strrchr(group.place.file, '/');
    text += (&group == &groups[0] ? " " : "; ") + std::to_string(group.count) + " threads ";
    if (group.state == State::exited) {
      text += "have returned";
    } else {
      text += group.state == State::at_block_barrier ? "wait at the block barrier " : "wait for their warp at ";
      text += std::string(slash ? slash + 1 : group.place.file) + ":" + std::to_string(group.place.line);
      if (!waiting) waiting = &group;
    }
    text += ", first " + describe_thread(group.first);
  }
  current = &threads[waiting->first];
  fail_at(waiting->place, "%s", text.c_str());
}

}  // namespace emulator

extern "C" void emulator_trap(const char* what, EmulatorPlace place) { emulator::fail_at(place, "%s", what); }
