// Loads with a hint, and addresses of shared memory.
#include "golden.cuh"

extern "C" __global__ void loads(const unsigned* __restrict__ x, unsigned* __restrict__ one,
                                 unsigned* __restrict__ two, unsigned* __restrict__ four, Params p) {
  const int i = element();
  if (4 * i >= p.n) return;
  one[i] = load_once(x + i);
  const uint2 pair = load_once(reinterpret_cast<const uint2*>(x) + i);
  const uint4 quad = load_once(reinterpret_cast<const uint4*>(x) + i);
  two[2 * i] = pair.x;
  two[2 * i + 1] = pair.y;
  four[4 * i] = quad.x;
  four[4 * i + 1] = quad.y;
  four[4 * i + 2] = quad.z;
  four[4 * i + 3] = quad.w;
}

extern "C" __global__ void prefetched(const unsigned* __restrict__ x, unsigned* __restrict__ y, Params p) {
  const int i = element();
  if (i >= p.n) return;
  prefetch_l2(x + p.n - 1 - i);
  y[i] = x[p.n - 1 - i];
}

// 64 threads. Distances in the window are distances in bytes, and alignment is kept.
extern "C" __global__ void shared_addresses(const unsigned* __restrict__ x, unsigned* __restrict__ y, Params p) {
  __shared__ __align__(128) unsigned tile[64][3];
  const int i = threadIdx.x;
  tile[i][2] = x[i];
  y[2 * i] = shared_address(&tile[i][2]) - shared_address(tile);
  y[2 * i + 1] = shared_address(&tile[i][0]) % 128;
}
