// Undefined behaviour that the compiler checks for: our own handlers for -fsanitize=undefined. The report's
// place comes from the stack, which also tells who called an inlined function.
#include <cstdint>
#include <cstdlib>

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

const char* doing(const TypeMismatch& mismatch) {
  static const char* const words[] = {"read", "write", "reference", "member access"};
  return mismatch.kind < 4 ? words[mismatch.kind] : "use";
}

}  // namespace

using emulator::current;
using emulator::fail;

// g++ calls the handlers of -fno-sanitize-recover, clang those of the same name that might return; none does.
#define ON_UNDEFINED(name, parameters, ...)                                           \
  [[noreturn]] void __ubsan_handle_##name parameters {                                \
    if (!current) abort(); /* no kernel runs: a constructor of the library's */       \
    fail(__VA_ARGS__);                                                                \
  }                                                                                   \
  [[noreturn]] void __ubsan_handle_##name##_abort parameters __attribute__((alias("__ubsan_handle_" #name)));

#pragma GCC visibility push(default)
extern "C" {
ON_UNDEFINED(type_mismatch_v1, (TypeMismatch* data, uintptr_t pointer),
             "misaligned: %s at %s through a type that needs an alignment of %u bytes", doing(*data),
             emulator::describe_address(pointer).c_str(), 1u << data->log2_alignment)
ON_UNDEFINED(out_of_bounds, (SourceLocation*, uintptr_t index), "out of bounds: index %ld is outside the array's type",
             (long)index)
ON_UNDEFINED(shift_out_of_bounds, (SourceLocation*, uintptr_t, uintptr_t),
             "undefined: shift by a negative number or by the type's width or more")
ON_UNDEFINED(add_overflow, (SourceLocation*, uintptr_t, uintptr_t), "undefined: signed overflow in an addition")
ON_UNDEFINED(sub_overflow, (SourceLocation*, uintptr_t, uintptr_t), "undefined: signed overflow in a subtraction")
ON_UNDEFINED(mul_overflow, (SourceLocation*, uintptr_t, uintptr_t), "undefined: signed overflow in a multiplication")
ON_UNDEFINED(negate_overflow, (SourceLocation*, uintptr_t), "undefined: signed overflow in a negation")
ON_UNDEFINED(divrem_overflow, (SourceLocation*, uintptr_t, uintptr_t),
             "undefined: division by zero, or of the smallest integer by -1")
ON_UNDEFINED(missing_return, (SourceLocation*), "undefined: a function that returns a value ends without one")
ON_UNDEFINED(builtin_unreachable, (SourceLocation*), "undefined: unreachable code was reached")
}
#pragma GCC visibility pop
