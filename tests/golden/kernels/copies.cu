// cp.async: each thread copies the first sizes[i] bytes of its PIECE; the rest of the target becomes zero.
#include "../../../kernels/ptx_async.cuh"
#include "golden.cuh"

extern "C" __global__ void copy(const unsigned* __restrict__ x, const int* __restrict__ sizes,
                                unsigned* __restrict__ y, Params p) {
  constexpr int WORDS = PIECE / 4;
  __shared__ __align__(16) unsigned target[32 * WORDS];
  const int i = element();
#pragma unroll
  for (int j = 0; j < WORDS; j++) target[threadIdx.x * WORDS + j] = 0xffffffffu;
  cp_async<PIECE>(shared_address(&target[threadIdx.x * WORDS]), x + i * WORDS, sizes[i]);
  cp_async_wait_all();
#pragma unroll
  for (int j = 0; j < WORDS; j++) y[i * WORDS + j] = target[threadIdx.x * WORDS + j];
}
