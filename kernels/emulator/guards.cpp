#include "guards.h"

#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include "diagnostics.h"
#include "state.h"

#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

namespace emulator {

volatile bool overdue;

namespace {

// A handler may not do much itself. It makes the interrupted code go on in one of the two functions below; that
// is safe because it only does so while kernel code runs, which holds no lock.
alignas(16) char escape_stack[64 << 10];
alignas(16) char handler_stack[64 << 10];

#if defined(__x86_64__)
#define REALIGN __attribute__((force_align_arg_pointer))
#else
#define REALIGN
#endif

[[noreturn]] void escape_overflow() {
  fail("stack overflow: the thread needs more than %zu KiB of local memory", STACK_BYTES >> 10);
}
[[noreturn]] REALIGN void escape_overdue() { fail_overdue(); }

struct Interrupted {
  uintptr_t pc, stack_pointer;
};

Interrupted where(const ucontext_t* context) {
#if defined(__x86_64__)
  return {(uintptr_t)context->uc_mcontext.gregs[REG_RIP], (uintptr_t)context->uc_mcontext.gregs[REG_RSP]};
#else
  return {(uintptr_t)context->uc_mcontext.pc, (uintptr_t)context->uc_mcontext.sp};
#endif
}

// Continues in `function` as if the interrupted instruction had called it, on the stack below `stack_pointer`.
void call(ucontext_t* context, void (*function)(), uintptr_t stack_pointer) {
  const uintptr_t pc = where(context).pc;
#if defined(__x86_64__)
  stack_pointer -= sizeof(uintptr_t);
  *(uintptr_t*)stack_pointer = pc + 1;  // a return address lies behind its call
  context->uc_mcontext.gregs[REG_RIP] = (greg_t)(void*)function;
  context->uc_mcontext.gregs[REG_RSP] = (greg_t)stack_pointer;
#else
  context->uc_mcontext.regs[30] = pc + 1;
  context->uc_mcontext.pc = (uintptr_t)(void*)function;
  context->uc_mcontext.sp = stack_pointer & ~15ul;
#endif
}

struct sigaction old_fault, old_timer;
stack_t old_stack;
timer_t timer;
int timer_signal;
pid_t watched;  // the OS thread that runs the launch
double limit;
unsigned blocks_at_last_alarm;

void set_timer(double seconds) {
  itimerspec spec{};
  spec.it_value.tv_sec = (time_t)seconds;
  spec.it_value.tv_nsec = (long)((seconds - (double)spec.it_value.tv_sec) * 1e9) + 1;
  timer_settime(timer, 0, &spec, nullptr);
}

void on_fault(int signal, siginfo_t* info, void* opaque) {
  ucontext_t* context = (ucontext_t*)opaque;
  const bool mine = current && (pid_t)syscall(SYS_gettid) == watched;
  if (!mine || guard_owner((uintptr_t)info->si_addr) != current->number) {
    sigaction(signal, &old_fault, nullptr);  // not ours: the instruction runs again, into the former handler
    return;
  }
  // No room is left to unwind from here, and the runtime itself may have run into the guard, called from the
  // kernel: the innermost address of kernel code on the stack is the place.
  Interrupted at = where(context);
  const uintptr_t bottom = (uintptr_t)stack(current->number), top = bottom + STACK_BYTES;
  uintptr_t word = at.stack_pointer > bottom && at.stack_pointer < top ? at.stack_pointer & ~7ul : bottom;
  for (; !launch.module->contains(at.pc) && word < top; word += sizeof(uintptr_t)) at.pc = *(uintptr_t*)word;
  set_interrupted(at.pc);
  call(context, escape_overflow, (uintptr_t)escape_stack + sizeof escape_stack);
}

void on_timer(int, siginfo_t*, void* opaque) {
  ucontext_t* context = (ucontext_t*)opaque;
  const unsigned blocks = (unsigned)launch.blocks_by_epoch.size();
  if (blocks != blocks_at_last_alarm) {
    blocks_at_last_alarm = blocks;
    return set_timer(limit);
  }
  overdue = true;
  const Interrupted at = where(context);
  const bool interruptible = current && launch.module->contains(at.pc) &&
                             stack_owner(at.stack_pointer - (8 << 10)) == current->number;
  if (interruptible) return call(context, escape_overdue, at.stack_pointer);
  set_timer(1e-3);  // inside the runtime: again, shortly
}

}  // namespace

void fail_overdue() {
  const char* who = cluster.blocks > 1 ? "the blocks of a cluster have" : "one block has";
  fail("endless loop: %s run for more than %g s of CPU time, this thread last", who, limit);
}

Guards::Guards(double seconds) {
  overdue = false;
  limit = seconds;
  blocks_at_last_alarm = 0;
  watched = (pid_t)syscall(SYS_gettid);
  stack_t alternate{};
  alternate.ss_sp = handler_stack;
  alternate.ss_size = sizeof handler_stack;
  sigaltstack(&alternate, &old_stack);
  struct sigaction action {};
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  action.sa_sigaction = on_fault;
  sigaction(SIGSEGV, &action, &old_fault);
  action.sa_sigaction = on_timer;
  timer_signal = SIGRTMIN + 6;
  sigaction(timer_signal, &action, &old_timer);
  struct sigevent event {};
  event.sigev_notify = SIGEV_THREAD_ID;
  event.sigev_signo = timer_signal;
  event.sigev_notify_thread_id = watched;
  timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer);
  set_timer(limit);
}

Guards::~Guards() {
  timer_delete(timer);
  sigaction(timer_signal, &old_timer, nullptr);
  sigaction(SIGSEGV, &old_fault, nullptr);
  sigaltstack(&old_stack, nullptr);
}

}  // namespace emulator
