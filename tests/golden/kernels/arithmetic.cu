// The arithmetic that kernels take from CUDA itself, in float and double (REAL), and FastDiv; one element a
// thread.
#include "golden.cuh"

#ifdef REAL
extern "C" __global__ void functions(const REAL* __restrict__ x, const REAL* __restrict__ y,
                                     REAL* __restrict__ exponential, REAL* __restrict__ hyperbolic,
                                     REAL* __restrict__ error, REAL* __restrict__ root, REAL* __restrict__ quotient,
                                     REAL* __restrict__ down, Params p) {
  const int i = element();
  if (i >= p.n) return;
  exponential[i] = exp(x[i]);
  hyperbolic[i] = tanh(x[i]);
  error[i] = erf(x[i]);
  root[i] = sqrt(y[i]);
  quotient[i] = x[i] / y[i];
  down[i] = floor(x[i]);
}

extern "C" __global__ void fused(const REAL* __restrict__ x, const REAL* __restrict__ y, REAL* __restrict__ fused,
                                 Params p) {
  const int i = element();
  if (i < p.n) fused[i] = fma(x[i], y[i], REAL(1));
}
#else
extern "C" __global__ void divisions(const int* __restrict__ n, const unsigned* __restrict__ divisors,
                                     int* __restrict__ quotient, int* __restrict__ remainder,
                                     unsigned* __restrict__ high, Params p) {
  const int i = element();
  if (i >= p.n) return;
  const FastDiv by{divisors[3 * i], divisors[3 * i + 1], divisors[3 * i + 2]};
  quotient[i] = by.divmod(n[i], remainder[i]);
  high[i] = __umulhi((unsigned)n[i] * 2654435761u, by.multiplier);
}

// Shuffles of one warp, as the reductions use them.
extern "C" __global__ void shuffles(const float* __restrict__ x, float* __restrict__ y, float* __restrict__ sum,
                                    Params p) {
  const float v = x[threadIdx.x];
#pragma unroll
  for (int offset = 1, j = 0; offset < 32; offset *= 2, j++)
    y[5 * threadIdx.x + j] = __shfl_xor_sync(0xffffffffu, v, offset);
  sum[threadIdx.x] = warp_sum(v);
}
#endif
