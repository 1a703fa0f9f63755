// Planted bugs in what threads do together: barriers, shuffles, votes.
#include "planted.cuh"

// Two threads' worth of the block stand at different barriers.
extern "C" __global__ void divergent_barrier(const float* __restrict__ x, float* __restrict__ y, Params p) {
  if (threadIdx.x < 64 && BUG) {
    y[threadIdx.x] = x[threadIdx.x];
    __syncthreads();  // <- divergent_barrier
  } else {
    y[threadIdx.x] = x[threadIdx.x] + 1.f;
    __syncthreads();  // <- divergent_barrier
  }
}

// Some threads return, the others wait for them for ever.
extern "C" __global__ void return_before_barrier(const float* __restrict__ x, float* __restrict__ y, Params p) {
  y[threadIdx.x] = x[threadIdx.x];
  if (BUG && threadIdx.x == 77) return;
  __syncthreads();  // <- return_before_barrier
}

// A loop with a different number of barriers in each warp.
extern "C" __global__ void uneven_loop(const float* __restrict__ x, float* __restrict__ y, Params p) {
  const int rounds = BUG ? threadIdx.x / 32 : 2;
  for (int i = 0; i < rounds; i++) __syncthreads();  // <- uneven_loop
  y[threadIdx.x] = x[threadIdx.x];
}

// Lane 0 waits at a barrier of the block, the rest of its warp for lane 0.
extern "C" __global__ void crossed_waits(const float* __restrict__ x, float* __restrict__ y, Params p) {
  y[threadIdx.x] = x[threadIdx.x];
  if (BUG && threadIdx.x == 0) __syncthreads();  // <- crossed_waits
  __syncwarp();  // <- crossed_waits
  __syncthreads();  // <- crossed_waits
}

// Half of the warp adds by one shuffle, the other half by another.
extern "C" __global__ void divergent_shuffle(const float* __restrict__ x, float* __restrict__ y, Params p) {
  float v = x[threadIdx.x];
  if (threadIdx.x % 32 < 16 && BUG) v += __shfl_xor_sync(0xffffffffu, v, 1);  // <- divergent_shuffle
  else v += __shfl_down_sync(0xffffffffu, v, 1);  // <- divergent_shuffle
  y[threadIdx.x] = v;
}

// Only the lanes with an element shuffle, under the full mask.
extern "C" __global__ void partial_shuffle(const float* __restrict__ x, float* __restrict__ y, Params p) {
  float v = x[threadIdx.x];
  const unsigned mask = BUG ? 0xffffffffu : 0x0000ffffu;
  if (threadIdx.x % 32 < 16) v += __shfl_xor_sync(mask, v, 1);  // <- partial_shuffle
  y[threadIdx.x] = v;
}

extern "C" __global__ void exited_lane(const float* __restrict__ x, float* __restrict__ y, Params p) {
  y[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x % 32 == 3) return;
  const float v = __shfl_sync(BUG ? 0xffffffffu : 0xfffffff7u, 1.f, 0);  // <- exited_lane
  y[threadIdx.x] = v;
}

extern "C" __global__ void not_in_mask(const float* __restrict__ x, float* __restrict__ y, Params p) {
  const unsigned mask = threadIdx.x % 32 < 16 || BUG ? 0x0000ffffu : 0xffff0000u;
  y[threadIdx.x] = __any_sync(mask, threadIdx.x % 32 == 2) ? x[threadIdx.x] : 0.f;  // <- not_in_mask
}

// Lanes of one group state different masks.
extern "C" __global__ void different_masks(const float* __restrict__ x, float* __restrict__ y, Params p) {
  const unsigned mask = BUG && threadIdx.x % 32 >= 16 ? 0xfffffffeu : 0xffffffffu;
  y[threadIdx.x] = (float)__popc(__ballot_sync(mask, x[threadIdx.x] > 0.f));  // <- different_masks
}

extern "C" __global__ void odd_width(const float* __restrict__ x, float* __restrict__ y, Params p) {
  y[threadIdx.x] = __shfl_sync(0xffffffffu, x[threadIdx.x], 0, 8 + 4 * BUG);  // <- odd_width
}

// Shuffles from a lane that does not take part: no error, but no value either.
extern "C" __global__ void absent_source(const float* __restrict__ x, float* __restrict__ y, Params p) {
  const bool low = threadIdx.x % 32 < 16;
  y[threadIdx.x] = __shfl_sync(low ? 0x0000ffffu : 0xffff0000u, x[threadIdx.x], BUG ? 0 : (low ? 0 : 16));
}

// The block reduction of common.cuh, with a warp that does not take part.
extern "C" __global__ void warp_left_out(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ float scratch[4];
  float v = x[threadIdx.x];
  if (threadIdx.x < 96 || !BUG) v = block_sum<4>(v, scratch);
  y[threadIdx.x] = v;
}
