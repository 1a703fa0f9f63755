// Everything that has no plain C++ spelling. The ONLY file with inline assembly: each wrapper holds its
// device body (PTX) and its emulator body side by side, so that a kernel is the same text in both worlds.
//
// EMULATOR is defined by kernels/emulator/cuda_on_cpu.h, which the emulator includes before any kernel;
// there a kernel is compiled by g++ and threads are fibers on the CPU.
#pragma once

#define DEVICE static __device__ __forceinline__

// fp16 and bf16 are storage types here: kernels load them, compute in float, and round once when storing.
// Own types rather than cuda_fp16.h's: no toolkit headers are needed to compile, on any machine, and a
// file compiles in milliseconds.
struct __align__(2) half_t { unsigned short bits; };    // IEEE 754 binary16
struct __align__(2) bfloat_t { unsigned short bits; };  // the upper half of an IEEE 754 binary32

DEVICE float to_float(half_t v) {
#ifdef EMULATOR
  return emulator_half_to_float(v.bits);
#else
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
  return f;
#endif
}

DEVICE float to_float(bfloat_t v) { return __uint_as_float((unsigned)v.bits << 16); }

// Round to nearest even, as cvt.rn does; NaN stays NaN.
DEVICE half_t float_to_half(float f) {
  half_t v;
#ifdef EMULATOR
  v.bits = emulator_float_to_half(f);
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v.bits) : "f"(f));
#endif
  return v;
}

DEVICE bfloat_t float_to_bfloat(float f) {  // cvt.rn.bf16.f32: sm_80 and up
  bfloat_t v;
#ifdef EMULATOR
  v.bits = emulator_float_to_bfloat(f);
#else
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v.bits) : "f"(f));
#endif
  return v;
}
