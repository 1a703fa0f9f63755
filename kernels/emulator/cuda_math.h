// CUDA's mathematical functions and bit intrinsics for float, double and the integers.
//
// Names that C has are C's own functions from libm; the rest is written here. The fast intrinsics (__expf, …)
// are the accurate functions: a kernel must not depend on their error.
#pragma once

// ---- C's functions, in both precisions; the plain name is overloaded for float --------------------------
#define EMULATOR_MATH1(name)                                                                                \
  extern "C" float name##f(float) noexcept;                                                                 \
  extern "C" double name(double) noexcept;                                                                  \
  EMULATOR_INLINE float name(float x) { return name##f(x); }
#define EMULATOR_MATH2(name)                                                                                \
  extern "C" float name##f(float, float) noexcept;                                                          \
  extern "C" double name(double, double) noexcept;                                                          \
  EMULATOR_INLINE float name(float x, float y) { return name##f(x, y); }
EMULATOR_MATH1(exp) EMULATOR_MATH1(exp2) EMULATOR_MATH1(expm1) EMULATOR_MATH1(log) EMULATOR_MATH1(log2)
EMULATOR_MATH1(log10) EMULATOR_MATH1(log1p) EMULATOR_MATH1(sqrt) EMULATOR_MATH1(cbrt) EMULATOR_MATH1(sin)
EMULATOR_MATH1(cos) EMULATOR_MATH1(tan) EMULATOR_MATH1(asin) EMULATOR_MATH1(acos) EMULATOR_MATH1(atan)
EMULATOR_MATH1(sinh) EMULATOR_MATH1(cosh) EMULATOR_MATH1(tanh) EMULATOR_MATH1(erf) EMULATOR_MATH1(erfc)
EMULATOR_MATH1(fabs) EMULATOR_MATH1(floor) EMULATOR_MATH1(ceil) EMULATOR_MATH1(trunc) EMULATOR_MATH1(round)
EMULATOR_MATH1(rint) EMULATOR_MATH1(nearbyint)
EMULATOR_MATH2(pow) EMULATOR_MATH2(fmod) EMULATOR_MATH2(fmin) EMULATOR_MATH2(fmax) EMULATOR_MATH2(atan2)
EMULATOR_MATH2(hypot) EMULATOR_MATH2(copysign) EMULATOR_MATH2(fdim)
#undef EMULATOR_MATH1
#undef EMULATOR_MATH2
extern "C" float fmaf(float, float, float) noexcept;
extern "C" double fma(double, double, double) noexcept;
extern "C" float ldexpf(float, int) noexcept;
extern "C" double ldexp(double, int) noexcept;
extern "C" int abs(int) noexcept;
EMULATOR_INLINE float fma(float x, float y, float z) { return fmaf(x, y, z); }
EMULATOR_INLINE float abs(float x) { return fabsf(x); }
EMULATOR_INLINE double abs(double x) { return fabs(x); }
EMULATOR_INLINE long long abs(long long x) { return x < 0 ? -x : x; }

EMULATOR_INLINE bool isnan(float x) { return __builtin_isnan(x); }
EMULATOR_INLINE bool isnan(double x) { return __builtin_isnan(x); }
EMULATOR_INLINE bool isinf(float x) { return __builtin_isinf(x); }
EMULATOR_INLINE bool isinf(double x) { return __builtin_isinf(x); }
EMULATOR_INLINE bool isfinite(float x) { return __builtin_isfinite(x); }
EMULATOR_INLINE bool isfinite(double x) { return __builtin_isfinite(x); }
EMULATOR_INLINE bool signbit(float x) { return __builtin_signbit(x); }
EMULATOR_INLINE bool signbit(double x) { return __builtin_signbit(x); }

// ---- CUDA's own -----------------------------------------------------------------------------------------
EMULATOR_INLINE float rsqrtf(float x) { return 1.f / sqrtf(x); }
EMULATOR_INLINE double rsqrt(double x) { return 1. / sqrt(x); }
EMULATOR_INLINE float rsqrt(float x) { return rsqrtf(x); }
EMULATOR_INLINE float __expf(float x) { return expf(x); }
EMULATOR_INLINE float __exp10f(float x) { return powf(10.f, x); }
EMULATOR_INLINE float __logf(float x) { return logf(x); }
EMULATOR_INLINE float __log2f(float x) { return log2f(x); }
EMULATOR_INLINE float __powf(float x, float y) { return powf(x, y); }
EMULATOR_INLINE float __sinf(float x) { return sinf(x); }
EMULATOR_INLINE float __cosf(float x) { return cosf(x); }
EMULATOR_INLINE float __fdividef(float x, float y) { return x / y; }
EMULATOR_INLINE float __frcp_rn(float x) { return 1.f / x; }
EMULATOR_INLINE float __fsqrt_rn(float x) { return sqrtf(x); }
EMULATOR_INLINE float __frsqrt_rn(float x) { return 1.f / sqrtf(x); }
EMULATOR_INLINE float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
EMULATOR_INLINE double __fma_rn(double x, double y, double z) { return fma(x, y, z); }
// Rounded on their own, never fused with a neighbour: the empty asm hides the product from the compiler.
#define EMULATOR_ROUNDED(T, name, operation) \
  EMULATOR_INLINE T name(T x, T y) { T r = x operation y; asm("" : "+m"(r)); return r; }
EMULATOR_ROUNDED(float, __fadd_rn, +) EMULATOR_ROUNDED(float, __fsub_rn, -)
EMULATOR_ROUNDED(float, __fmul_rn, *) EMULATOR_ROUNDED(float, __fdiv_rn, /)
EMULATOR_ROUNDED(double, __dadd_rn, +) EMULATOR_ROUNDED(double, __dsub_rn, -)
EMULATOR_ROUNDED(double, __dmul_rn, *) EMULATOR_ROUNDED(double, __ddiv_rn, /)
#undef EMULATOR_ROUNDED
EMULATOR_INLINE float __saturatef(float x) { return x > 0.f ? (x < 1.f ? x : 1.f) : 0.f; }  // NaN gives 0

// min and max: of a number and a NaN, the number (for floats); of an int and an unsigned, unsigned.
#define EMULATOR_MIN_MAX(T, A, B)                                                    \
  EMULATOR_INLINE T min(A a, B b) { return (T)a < (T)b ? (T)a : (T)b; }              \
  EMULATOR_INLINE T max(A a, B b) { return (T)a > (T)b ? (T)a : (T)b; }
EMULATOR_MIN_MAX(int, int, int) EMULATOR_MIN_MAX(unsigned, unsigned, unsigned)
EMULATOR_MIN_MAX(unsigned, int, unsigned) EMULATOR_MIN_MAX(unsigned, unsigned, int)
EMULATOR_MIN_MAX(long, long, long) EMULATOR_MIN_MAX(unsigned long, unsigned long, unsigned long)
EMULATOR_MIN_MAX(long long, long long, long long)
EMULATOR_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
#undef EMULATOR_MIN_MAX
EMULATOR_INLINE float min(float a, float b) { return fminf(a, b); }
EMULATOR_INLINE float max(float a, float b) { return fmaxf(a, b); }
EMULATOR_INLINE double min(double a, double b) { return fmin(a, b); }
EMULATOR_INLINE double max(double a, double b) { return fmax(a, b); }
EMULATOR_INLINE double min(float a, double b) { return fmin((double)a, b); }
EMULATOR_INLINE double max(float a, double b) { return fmax((double)a, b); }
EMULATOR_INLINE double min(double a, float b) { return fmin(a, (double)b); }
EMULATOR_INLINE double max(double a, float b) { return fmax(a, (double)b); }

// ---- bits -----------------------------------------------------------------------------------------------
EMULATOR_INLINE unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
EMULATOR_INLINE int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
EMULATOR_INLINE float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
EMULATOR_INLINE float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
EMULATOR_INLINE long long __double_as_longlong(double x) { return __builtin_bit_cast(long long, x); }
EMULATOR_INLINE double __longlong_as_double(long long x) { return __builtin_bit_cast(double, x); }
EMULATOR_INLINE unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long)a * b >> 32); }
EMULATOR_INLINE int __mulhi(int a, int b) { return (int)((long)a * b >> 32); }
EMULATOR_INLINE unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)a * b >> 64);
}
EMULATOR_INLINE int __popc(unsigned x) { return __builtin_popcount(x); }
EMULATOR_INLINE int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
EMULATOR_INLINE int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
EMULATOR_INLINE int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
EMULATOR_INLINE int __ffs(int x) { return __builtin_ffs(x); }
EMULATOR_INLINE int __ffsll(long long x) { return __builtin_ffsll(x); }
EMULATOR_INLINE unsigned __brev(unsigned x) {
  x = (x >> 1 & 0x55555555u) | (x & 0x55555555u) << 1;
  x = (x >> 2 & 0x33333333u) | (x & 0x33333333u) << 2;
  x = (x >> 4 & 0x0f0f0f0fu) | (x & 0x0f0f0f0fu) << 4;
  return __builtin_bswap32(x);
}

// ---- half precision, as cvt.f32.f16, cvt.rn.f16.f32 and cvt.rn.bf16.f32 ----------------------------------
EMULATOR_INLINE float emulator_half_to_float(unsigned short half) {
  // Exponent and mantissa moved into place, then 2^112 makes up for the different exponent bias; the product
  // is exact, for subnormal halves too.
  const float magnitude = __uint_as_float((unsigned)(half & 0x7fff) << 13) * 0x1p112f;
  const unsigned special = (half & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;  // infinity and NaN
  return __uint_as_float(__float_as_uint(magnitude) | special | (unsigned)(half & 0x8000) << 16);
}
EMULATOR_INLINE unsigned short emulator_float_to_half(float x) {
  const unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000u) return (unsigned short)(sign | 0x7e00);   // NaN
  if (magnitude >= 0x47800000u) return (unsigned short)(sign | 0x7c00);  // 2^16 and more: infinity
  if (magnitude < 0x38800000u) {  // below 2^-14: subnormal; adding 1/2 rounds at 2^-24, to nearest even
    const float sum = __uint_as_float(magnitude) + 0.5f;
    return (unsigned short)(sign | (__float_as_uint(sum) - 0x3f000000u));
  }
  const unsigned odd = magnitude >> 13 & 1;  // ties go to the even mantissa; a carry runs into the exponent
  return (unsigned short)(sign | ((magnitude - 0x38000000u + 0xfff + odd) >> 13));
}
EMULATOR_INLINE unsigned short emulator_float_to_bfloat(float x) {
  const unsigned bits = __float_as_uint(x);
  if ((bits & 0x7fffffff) > 0x7f800000u) return (unsigned short)(bits >> 16 | 0x40);  // NaN, made quiet
  return (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
