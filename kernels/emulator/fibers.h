// Fibers: one stack a CUDA thread, switched by hand. A switch is a call that returns on another stack.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__aarch64__)
#include <ucontext.h>
#endif

namespace emulator {

#if defined(__x86_64__)
struct Fiber {
  void* stack_pointer;  // everything else that a call must preserve is saved on the stack
};
#elif defined(__aarch64__)
struct Fiber {
  ucontext_t context;
};
#else
#error "the emulator knows how to switch stacks on x86-64 and aarch64"
#endif

constexpr size_t STACK_BYTES = 64 << 10;
constexpr size_t GUARD_BYTES = 16 << 10;  // below each stack; touching it is a stack overflow

// The stacks of all threads, mapped at first use; stack i spans [stack(i), stack(i) + STACK_BYTES). They stay where
// they are.
char* stack(unsigned thread);
// The thread whose stack, or whose guard zone, holds `address`; -1: none.
int stack_owner(uintptr_t address);
int guard_owner(uintptr_t address);

// Makes `fiber` start `run` on the stack of `thread` when it is switched to. `run` never returns.
void prepare(Fiber& fiber, unsigned thread, void (*run)());

#if defined(__x86_64__)
extern "C" void emulator_switch_stack(void** save, void* stack_pointer);
inline void switch_fiber(Fiber& from, Fiber& to) {
  emulator_switch_stack(&from.stack_pointer, to.stack_pointer);
}
#else
inline void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }
#endif

}  // namespace emulator
