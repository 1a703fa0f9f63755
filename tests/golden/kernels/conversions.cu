// The conversions of kernels/ptx.cuh, one element a thread.
#include "golden.cuh"

extern "C" __global__ void widen(const unsigned short* __restrict__ x, float* __restrict__ half,
                                 float* __restrict__ bfloat, Params p) {
  const int i = element();
  if (i >= p.n) return;
  half[i] = to_float(half_t{x[i]});
  bfloat[i] = to_float(bfloat_t{x[i]});
}

// CONVERT is a function of kernels/ptx.cuh, BITS an unsigned type of its result's size.
#ifdef CONVERT
DEVICE unsigned short bits_of(half_t v) { return v.bits; }
DEVICE unsigned short bits_of(bfloat_t v) { return v.bits; }
DEVICE unsigned bits_of(unsigned v) { return v; }

extern "C" __global__ void narrow(const float* __restrict__ x, BITS* __restrict__ y, Params p) {
  const int i = element();
  if (i < p.n) y[i] = bits_of(CONVERT(x[i]));
}
#endif

// Neighbours in one register: `low` is x[i], `high` is x[i + 1], so that halves in the wrong order show.
extern "C" __global__ void narrow_pairs(const float* __restrict__ x, unsigned short* __restrict__ half2,
                                        unsigned short* __restrict__ bfloat2, Params p) {
  const int i = element();
  if (i >= p.n) return;
  const float low = x[i], high = x[(i + 1) % p.n];
  reinterpret_cast<unsigned*>(half2)[i] = floats_to_half2(low, high);
  reinterpret_cast<unsigned*>(bfloat2)[i] = floats_to_bfloat2(low, high);
}
