#include "fibers.h"

#include <sys/mman.h>

#include <new>

#include "state.h"

#if defined(__x86_64__)
// Saves the callee-saved registers of the System V ABI on the old stack and restores those of the new one.
// Floating-point control words stay as they are: no kernel changes them.
asm(R"(
.text
.p2align 4
.globl emulator_switch_stack
.hidden emulator_switch_stack
.type emulator_switch_stack, @function
emulator_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch_stack, .-emulator_switch_stack
)");
#endif

namespace emulator {

namespace {

constexpr size_t STRIDE = STACK_BYTES + GUARD_BYTES;

// Of as many threads as a block may have at a time: clusters of many blocks are rare.
char* mapped[MAX_BLOCKS];

char* map_stacks() {
  void* all = mmap(nullptr, MAX_THREADS * STRIDE, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (all == MAP_FAILED) throw std::bad_alloc();
  for (unsigned i = 0; i < MAX_THREADS; i++) mprotect((char*)all + i * STRIDE, GUARD_BYTES, PROT_NONE);
  return (char*)all;
}

int owner(uintptr_t address, bool of_guard) {
  for (unsigned i = 0; i < MAX_BLOCKS && mapped[i]; i++) {
    const uintptr_t offset = address - (uintptr_t)mapped[i];
    if (offset >= MAX_THREADS * STRIDE) continue;
    return (offset % STRIDE < GUARD_BYTES) == of_guard ? (int)(i * MAX_THREADS + offset / STRIDE) : -1;
  }
  return -1;
}

}  // namespace

char* stack(unsigned thread) {
  for (unsigned i = 0; i <= thread / MAX_THREADS; i++)
    if (!mapped[i]) mapped[i] = map_stacks();
  return mapped[thread / MAX_THREADS] + thread % MAX_THREADS * STRIDE + GUARD_BYTES;
}

int stack_owner(uintptr_t address) { return owner(address, false); }

int guard_owner(uintptr_t address) { return owner(address, true); }

#if defined(__x86_64__)

void prepare(Fiber& fiber, unsigned thread, void (*run)()) {
  void** top = (void**)(stack(thread) + STACK_BYTES);
  // From the top: a null return address, which ends backtraces; `run`, which the switch returns to; and six
  // registers. At the entry of `run` the stack pointer is 8 above a multiple of 16, as after a call.
  top[-1] = nullptr;
  top[-2] = (void*)run;
  for (int i = 3; i <= 8; i++) top[-i] = nullptr;
  fiber.stack_pointer = &top[-8];
}

#else

// Through ucontext: portable, but each switch costs a system call. Written for aarch64 and not yet run there.
void prepare(Fiber& fiber, unsigned thread, void (*run)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack(thread);
  fiber.context.uc_stack.ss_size = STACK_BYTES;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run, 0);
}

#endif

}  // namespace emulator
