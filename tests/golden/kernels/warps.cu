// What a warp does together on Hopper, and what grids that follow each other say.
#include "../../../kernels/ptx_sm90.cuh"
#include "golden.cuh"

// For each mask the number of lanes that are elected, and of those that a second election treats as the first.
extern "C" __global__ void elections(const unsigned* __restrict__ masks, int* __restrict__ elected,
                                     int* __restrict__ alike, Params p) {
  __shared__ int counts[2][32];
  counts[0][threadIdx.x] = counts[1][threadIdx.x] = 0;
  __syncthreads();
  for (int i = 0; i < p.n; i++) {
    if (masks[i] >> threadIdx.x & 1) {
      const bool first = elect_one(masks[i]), second = elect_one(masks[i]);
      atomicAdd(&counts[0][i], first);
      atomicAdd(&counts[1][i], first == second);
    }
    __syncthreads();
  }
  if (threadIdx.x < p.n) {
    elected[threadIdx.x] = counts[0][threadIdx.x];
    alike[threadIdx.x] = counts[1][threadIdx.x];
  }
}

extern "C" __global__ void one_grid_after_another(const float* __restrict__ x, float* __restrict__ y, Params p) {
  griddepcontrol_wait();
  y[element()] = x[element()];
  griddepcontrol_launch_dependents();
}
