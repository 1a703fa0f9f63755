// Narrow floating-point elements as floats: exact.
#pragma once
#include <cstdint>
#include <cstring>

namespace emulator {

inline float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline float float_of_bfloat(uint16_t bits) { return float_of_bits((uint32_t)bits << 16); }
// Tensor cores look at the upper 19 bits alone.
inline float float_of_tf32(uint32_t bits) { return float_of_bits(bits & 0xffffe000u); }
inline float float_of_half(uint16_t bits) {
  // Exponent and mantissa move into place; 2^112 makes up for the difference in bias.
  const float magnitude = float_of_bits((uint32_t)(bits & 0x7fff) << 13) * 0x1p112f;
  uint32_t wide;
  memcpy(&wide, &magnitude, sizeof wide);
  if ((bits & 0x7c00) == 0x7c00) wide |= 0x7f800000u;  // infinity and NaN keep their exponent
  return float_of_bits(wide | (uint32_t)(bits & 0x8000) << 16);
}

}  // namespace emulator
