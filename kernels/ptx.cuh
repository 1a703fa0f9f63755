// Everything that has no plain C++ spelling. With ptx_async.cuh, ptx_sm90.cuh and ptx_cluster.cuh the ONLY files
// with inline assembly: each wrapper holds its device body (PTX) and its emulator body side by side, so that a
// kernel is the same text in both worlds.
//
// EMULATOR is defined by kernels/emulator/cuda_on_cpu.h, which the emulator includes before any kernel;
// there a kernel is compiled by g++ and threads are fibers on the CPU.
#pragma once

#define DEVICE static __device__ __forceinline__

#ifdef EMULATOR
#define CALLER , EMULATOR_CALLER  // last parameters of what can be misused: the kernel's line, for the report
#else
#define CALLER
#endif

// ---- elements -------------------------------------------------------------------------------------------
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

// Two floats rounded as above, `low` in the lower half of the result: how mma takes pairs of neighbours.
// PTX: in cvt.rn.f16x2.f32 d, a, b (sm_80) a becomes the upper half of d and b the lower one.
DEVICE unsigned floats_to_half2(float low, float high) {
#ifdef EMULATOR
  return emulator_float_to_half(low) | (unsigned)emulator_float_to_half(high) << 16;
#else
  unsigned pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#endif
}

DEVICE unsigned floats_to_bfloat2(float low, float high) {
#ifdef EMULATOR
  return emulator_float_to_bfloat(low) | (unsigned)emulator_float_to_bfloat(high) << 16;
#else
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#endif
}

// The float with a significand of 11 bits that is nearest, as mma takes it; the 13 bits below are 0.
// PTX: cvt.rna.tf32.f32 (sm_80) rounds ties away from zero. Beyond the largest value: infinity.
DEVICE unsigned float_to_tf32(float f) {
#ifdef EMULATOR
  const unsigned bits = __float_as_uint(f), magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000u) return 0x7fffffff;  // NaN
  return (bits + (magnitude < 0x7f800000u ? 0x1000u : 0u)) & 0xffffe000u;
#else
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(f));
  return bits;
#endif
}

// ---- global memory --------------------------------------------------------------------------------------
// A load of 4, 8 or 16 aligned bytes that leaves no copy in L1: for data that this SM reads once.
// PTX: ld.global.nc may be served by a cache that sees no writes, so nothing may write the data during the
// kernel; L1::no_allocate (sm_70) is a hint.
template <class T> DEVICE T load_once(const T* p) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "one access moves 4, 8 or 16 bytes");
  static_assert(alignof(T) == sizeof(T), "the address is a multiple of the access");
#ifdef EMULATOR
  return *p;
#else
  const unsigned long long address = __cvta_generic_to_global(p);
  T value;
  if constexpr (sizeof(T) == 16) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
    memcpy(&value, &v, 16);
  } else if constexpr (sizeof(T) == 8) {
    uint2 v;
    asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(address));
    memcpy(&value, &v, 8);
  } else {
    unsigned v;
    asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(address));
    memcpy(&value, &v, 4);
  }
  return value;
#endif
}

// Asks for the cache line that holds `p` to be brought to L2. PTX: prefetch.global has no result and orders
// nothing. The emulator reports an address that lies in no tensor.
DEVICE void prefetch_l2(const void* p) {
#ifdef EMULATOR
  emulator_prefetch(p);
#else
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p)));
#endif
}

// ---- 8 x 8 matrices in shared memory --------------------------------------------------------------------
// The address of a __shared__ variable in the 32-bit window where instructions take it; one may compute with
// it as with a pointer to bytes. PTX: cvta.to.shared makes an address in the state space .shared of a generic
// one.
DEVICE unsigned shared_address(const void* p CALLER) {
#ifdef EMULATOR
  return emulator_shared_address(p, {file, line});
#else
  return (unsigned)__cvta_generic_to_shared(p);
#endif
}

// Matrices of 8 x 8 elements of 16 bits move between shared memory and registers, N = 1, 2 or 4 at a time. A
// row is 16 bytes of shared memory at a multiple of 16; rows may lie anywhere.
//
// PTX: lane 8 j + i gives the address of row i of matrix j; for N < 4 the `row` of the lanes from 8 N on is
// not used. In registers, r[j] of lane l holds two elements of matrix j, the first one in the lower half:
//     without .trans   row l / 4, columns 2 (l % 4) and 2 (l % 4) + 1
//     with .trans      rows 2 (l % 4) and 2 (l % 4) + 1, column l / 4
// All 32 lanes execute the same instruction. Memory is not ordered by it: between the write of a row and its
// use by other lanes stands a barrier.
//
// A tf32 element counts as two of 16 bits, so that a matrix is 8 x 4 of them; .trans would tear them apart.
template <int N> DEVICE void ldmatrix(unsigned (&r)[N], unsigned row CALLER) {
  static_assert(N == 1 || N == 2 || N == 4, "ldmatrix loads 1, 2 or 4 matrices");
#ifdef EMULATOR
  emulator_ldmatrix(r, N, false, row, {file, line});
#else
  if constexpr (N == 1)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(row) : "memory");
  else if constexpr (N == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(row) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
#endif
}

template <int N> DEVICE void ldmatrix_trans(unsigned (&r)[N], unsigned row CALLER) {
  static_assert(N == 1 || N == 2 || N == 4, "ldmatrix loads 1, 2 or 4 matrices");
#ifdef EMULATOR
  emulator_ldmatrix(r, N, true, row, {file, line});
#else
  if constexpr (N == 1)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(row) : "memory");
  else if constexpr (N == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(row) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
#endif
}

#if defined(EMULATOR) || __CUDA_ARCH__ >= 900  // stmatrix came with sm_90
template <int N> DEVICE void stmatrix(unsigned row, const unsigned (&r)[N] CALLER) {
  static_assert(N == 1 || N == 2 || N == 4, "stmatrix stores 1, 2 or 4 matrices");
#ifdef EMULATOR
  emulator_stmatrix(r, N, false, row, {file, line});
#else
  if constexpr (N == 1)
    asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" ::"r"(row), "r"(r[0]) : "memory");
  else if constexpr (N == 2)
    asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(row), "r"(r[0]), "r"(r[1])
                 : "memory");
  else
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
#endif
}

template <int N> DEVICE void stmatrix_trans(unsigned row, const unsigned (&r)[N] CALLER) {
  static_assert(N == 1 || N == 2 || N == 4, "stmatrix stores 1, 2 or 4 matrices");
#ifdef EMULATOR
  emulator_stmatrix(r, N, true, row, {file, line});
#else
  if constexpr (N == 1)
    asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(row), "r"(r[0]) : "memory");
  else if constexpr (N == 2)
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(row), "r"(r[0]), "r"(r[1])
                 : "memory");
  else
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
#endif
}
#endif

// ---- matrix multiplication ------------------------------------------------------------------------------
// D += A B by all 32 lanes together. A is M x K and lies by rows, B is K x N and lies by columns, which is to
// say that pairs of neighbours along K share a register. PTX (sm_80), with g = lane / 4 and t = lane % 4:
//
//     m16n8k16, 16 bits      a[i]   row g + 8 (i % 2), columns 2 t + 8 (i / 2) and one more
//                            b[i]   rows 2 t + 8 i and one more, column g
//     m16n8k8, tf32          a[i]   row g + 8 (i % 2), column t + 4 (i / 2)
//                            b[i]   row t + 4 i, column g
//     m16n8, both            d[i]   row g + 8 (i / 2), column 2 t + i % 2
//     m8n8k4, f64            a      row g, column t
//                            b      row t, column g
//                            d[i]   row g, column 2 t + i
//
// So ldmatrix(a, …) of four matrices in the order (rows 0-7, 8-15) x (columns 0-7, then 8-15) is A; and
// ldmatrix(b, …) of two matrices of B's columns, 8 elements along K each, is B.
//
// Arithmetic. PTX promises products and sums of at least single precision, in no stated order and with no
// stated rounding; of a tf32 element it ignores the lower 13 bits. Hardware is known to align the K products
// and the accumulator to the largest of them and to drop the bits below. The emulator takes exact products
// and rounds each addition to nearest, for k = 0, 1, …, starting from d. That rounding of the hardware is not
// modelled: results are held to agree within 2^-18 (Σ|a b| + |d|), K + 1 bits dropped below single precision.
// For f64 PTX promises the precision of fused multiply-adds; only their order is open, and 2^-50 of the same
// sum is allowed.
DEVICE void mma_m16n8k16_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2] CALLER) {
#ifdef EMULATOR
  emulator_mma(EMULATOR_MMA_F16, d, a, b, {file, line});
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

DEVICE void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2] CALLER) {
#ifdef EMULATOR
  emulator_mma(EMULATOR_MMA_BF16, d, a, b, {file, line});
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

DEVICE void mma_m16n8k8_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2] CALLER) {
#ifdef EMULATOR
  emulator_mma(EMULATOR_MMA_TF32, d, a, b, {file, line});
#else
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

DEVICE void mma_m8n8k4_f64(double (&d)[2], double a, double b CALLER) {
#ifdef EMULATOR
  emulator_mma_f64(d, a, b, {file, line});
#else
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+d"(d[0]), "+d"(d[1]) : "d"(a), "d"(b));
#endif
}
