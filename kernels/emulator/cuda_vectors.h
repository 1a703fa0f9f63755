// CUDA's built-in vector types, with CUDA's alignment, and their make_ functions.
#pragma once

#define EMULATOR_VECTOR2(T, name, alignment)                     \
  struct __align__(alignment) name##2 { T x, y; };               \
  EMULATOR_INLINE name##2 make_##name##2(T x, T y) { return {x, y}; }
#define EMULATOR_VECTOR3(T, name)                                \
  struct name##3 { T x, y, z; };                                 \
  EMULATOR_INLINE name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }
#define EMULATOR_VECTOR4(T, name, alignment)                     \
  struct __align__(alignment) name##4 { T x, y, z, w; };         \
  EMULATOR_INLINE name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
#define EMULATOR_VECTORS(T, name)                                \
  EMULATOR_VECTOR2(T, name, 2 * sizeof(T))                       \
  EMULATOR_VECTOR3(T, name)                                      \
  EMULATOR_VECTOR4(T, name, 4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16)

EMULATOR_VECTORS(signed char, char)
EMULATOR_VECTORS(unsigned char, uchar)
EMULATOR_VECTORS(short, short)
EMULATOR_VECTORS(unsigned short, ushort)
EMULATOR_VECTORS(int, int)
EMULATOR_VECTORS(unsigned, uint)
EMULATOR_VECTORS(long long, longlong)
EMULATOR_VECTORS(unsigned long long, ulonglong)
EMULATOR_VECTORS(float, float)
EMULATOR_VECTORS(double, double)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#undef EMULATOR_VECTOR2
#undef EMULATOR_VECTOR3
#undef EMULATOR_VECTOR4
#undef EMULATOR_VECTORS
