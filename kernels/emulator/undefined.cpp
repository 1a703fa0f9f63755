// Undefined behaviour that the compiler checks for: our own handlers for -fsanitize=undefined. The report's
// place comes from the stack, which also tells who called an inlined function.
#include <cstdint>

#include "diagnostics.h"
#include "memory.h"
#include "state.h"

namespace {

struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

struct TypeMismatch {
  SourceLocation location;
  const void* type;
  unsigned char log2_alignment, kind;
};

}  // namespace

using emulator::current;
using emulator::fail;

#pragma GCC visibility push(default)
extern "C" {

void __ubsan_handle_type_mismatch_v1(TypeMismatch* data, uintptr_t pointer) {
  static const char* const doing[] = {"read", "write", "reference", "member access"};
  if (!current || !(pointer & ((1ul << data->log2_alignment) - 1))) return;
  const char* kind = data->kind < 4 ? doing[data->kind] : "use";
  fail("misaligned: %s at %s through a type that needs an alignment of %u bytes", kind,
       emulator::describe_address(pointer).c_str(), 1u << data->log2_alignment);
}

void __ubsan_handle_out_of_bounds(SourceLocation*, uintptr_t index) {
  if (current) fail("out of bounds: index %ld is outside the array's type", (long)index);
}
void __ubsan_handle_shift_out_of_bounds(SourceLocation*, uintptr_t, uintptr_t) {
  if (current) fail("undefined: shift by a negative number or by the type's width or more");
}
void __ubsan_handle_add_overflow(SourceLocation*, uintptr_t, uintptr_t) {
  if (current) fail("undefined: signed overflow in an addition");
}
void __ubsan_handle_sub_overflow(SourceLocation*, uintptr_t, uintptr_t) {
  if (current) fail("undefined: signed overflow in a subtraction");
}
void __ubsan_handle_mul_overflow(SourceLocation*, uintptr_t, uintptr_t) {
  if (current) fail("undefined: signed overflow in a multiplication");
}
void __ubsan_handle_negate_overflow(SourceLocation*, uintptr_t) {
  if (current) fail("undefined: signed overflow in a negation");
}
void __ubsan_handle_divrem_overflow(SourceLocation*, uintptr_t, uintptr_t) {
  if (current) fail("undefined: division by zero, or of the smallest integer by -1");
}
void __ubsan_handle_missing_return(SourceLocation*) {
  if (current) fail("undefined: a function that returns a value ends without one");
}
void __ubsan_handle_builtin_unreachable(SourceLocation*) {
  if (current) fail("undefined: unreachable code was reached");
}
}
#pragma GCC visibility pop
