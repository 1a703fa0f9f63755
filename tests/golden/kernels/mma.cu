// mma: one warp a block, registers as each lane holds them. MMA is a function of kernels/ptx.cuh.
#include "golden.cuh"

#ifdef MMA
extern "C" __global__ void multiply(const unsigned* __restrict__ a, const unsigned* __restrict__ b,
                                    const float* __restrict__ c, float* __restrict__ d, Params p) {
  const int i = element();
  const unsigned a_registers[4] = {a[4 * i], a[4 * i + 1], a[4 * i + 2], a[4 * i + 3]};
  const unsigned b_registers[2] = {b[2 * i], b[2 * i + 1]};
  float sums[4] = {c[4 * i], c[4 * i + 1], c[4 * i + 2], c[4 * i + 3]};
  MMA(sums, a_registers, b_registers);
#pragma unroll
  for (int j = 0; j < 4; j++) d[4 * i + j] = sums[j];
}
#else
extern "C" __global__ void multiply_f64(const double* __restrict__ a, const double* __restrict__ b,
                                        const double* __restrict__ c, double* __restrict__ d, Params p) {
  const int i = element();
  double sums[2] = {c[2 * i], c[2 * i + 1]};
  mma_m8n8k4_f64(sums, a[i], b[i]);
  d[2 * i] = sums[0];
  d[2 * i + 1] = sums[1];
}
#endif
