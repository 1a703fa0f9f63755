// Planted races: accesses to one place, one of them a write, with nothing that orders them.
#include "planted.cuh"

// Reads what another thread writes, with no barrier between.
extern "C" __global__ void no_barrier_after_write(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ float s[128];
  s[threadIdx.x] = 0.f;
  __syncthreads();
  s[threadIdx.x] = x[threadIdx.x];  // <- no_barrier_after_write
  if (!BUG) __syncthreads();
  y[threadIdx.x] = s[127 - threadIdx.x];  // <- no_barrier_after_write
}

// Fills the tile again while others still read it.
extern "C" __global__ void no_barrier_after_read(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ float tile[128];
  float sum = 0.f;
  for (int i = 0; i < 2; i++) {
    tile[threadIdx.x] = x[threadIdx.x];  // <- no_barrier_after_read
    __syncthreads();
    sum += tile[(threadIdx.x + 64) % 128];  // <- no_barrier_after_read
    if (!BUG) __syncthreads();
  }
  y[threadIdx.x] = sum;
}

// Many readers: the one that the writer collides with is neither the first nor the last.
extern "C" __global__ void third_reader(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ float s[1];
  if (threadIdx.x == 0) s[0] = x[0];
  __syncthreads();
  float v = 0.f;
  if (threadIdx.x == 40 || threadIdx.x == 41 || threadIdx.x == 42) v = s[0];
  if (!BUG) __syncthreads();
  if (threadIdx.x == 42) s[0] = 1.f;  // <- third_reader
  y[threadIdx.x] = v;
}

// Lanes of one warp do not run in step.
extern "C" __global__ void no_syncwarp(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ float s[128];
  s[threadIdx.x] = 0.f;
  __syncthreads();
  s[threadIdx.x] = x[threadIdx.x];  // <- no_syncwarp
  if (!BUG) __syncwarp();
  y[threadIdx.x] = s[threadIdx.x ^ 31];  // <- no_syncwarp
}

// A shuffle waits for the lanes but orders no memory.
extern "C" __global__ void shuffle_is_no_fence(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ float s[128];
  s[threadIdx.x] = 0.f;
  __syncthreads();
  s[threadIdx.x] = x[threadIdx.x];  // <- shuffle_is_no_fence
  const float other = __shfl_xor_sync(0xffffffffu, 1.f, 1);
  if (!BUG) __syncwarp();
  y[threadIdx.x] = s[threadIdx.x ^ 31] * other;  // <- shuffle_is_no_fence
}

// __syncwarp of half the warp orders that half alone.
extern "C" __global__ void half_syncwarp(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ float s[128];
  s[threadIdx.x] = 0.f;
  __syncthreads();
  s[threadIdx.x] = x[threadIdx.x];  // <- half_syncwarp
  __syncwarp((threadIdx.x & 16) ? 0xffff0000u : 0x0000ffffu);
  y[threadIdx.x] = s[threadIdx.x ^ (BUG ? 31 : 15)];  // <- half_syncwarp
}

// A warp barrier does not order two warps.
extern "C" __global__ void syncwarp_for_block(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ float s[128];
  s[threadIdx.x] = 0.f;
  __syncthreads();
  s[threadIdx.x] = x[threadIdx.x];  // <- syncwarp_for_block
  if (BUG) __syncwarp();
  else __syncthreads();
  y[threadIdx.x] = s[(threadIdx.x + 32) % 128];  // <- syncwarp_for_block
}

// Neighbouring bytes are different places; the same byte is not.
extern "C" __global__ void bytes(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ unsigned char s[130];
  s[threadIdx.x] = (unsigned char)threadIdx.x;  // <- bytes
  if (BUG && threadIdx.x == 70) s[71] = 0;  // <- bytes
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}

// Six bytes a thread: they begin and end in the middle of words, but no two of them overlap.
struct Three {
  unsigned short v[3];
};
extern "C" __global__ void odd_sizes(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ Three s[129];
  const unsigned short v = (unsigned short)threadIdx.x;
  s[threadIdx.x] = Three{v, v, v};  // <- odd_sizes
  if (BUG && threadIdx.x == 70) s[71].v[0] = 0;  // <- odd_sizes
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x].v[2];
}

// All threads of a block add to one element.
extern "C" __global__ void add_in_block(const float* __restrict__ x, float* __restrict__ sum, Params p) {
  if (BUG) sum[0] += x[threadIdx.x];  // <- add_in_block
  else atomicAdd(&sum[0], x[threadIdx.x]);
}

// One thread of each block adds to one element.
extern "C" __global__ void add_across_blocks(const float* __restrict__ x, float* __restrict__ sum, Params p) {
  if (threadIdx.x != 0) return;
  if (BUG) sum[0] += x[blockIdx.x];  // <- add_across_blocks
  else atomicAdd(&sum[0], x[blockIdx.x]);
}

// Two blocks write the same element, the same value even.
extern "C" __global__ void write_twice(const float* __restrict__ x, float* __restrict__ y, Params p) {
  const int i = blockIdx.x * (blockDim.x - BUG) + threadIdx.x;
  y[i] = x[0];  // <- write_twice
}

// Reads what another block has written, or will write.
extern "C" __global__ void read_other_block(const float* __restrict__ x, float* __restrict__ sum, Params p) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x, size = gridDim.x * blockDim.x;
  if (BUG) x = sum;
  const float v = x[size - 1 - i];  // <- read_other_block
  sum[i] = v;  // <- read_other_block
}

// Global memory within a block: ordered by the block's barrier, and only by that.
extern "C" __global__ void global_in_block(const float* __restrict__ x, float* __restrict__ y, Params p) {
  y[threadIdx.x] = x[threadIdx.x];  // <- global_in_block
  if (!BUG) __syncthreads();
  const float v = y[127 - threadIdx.x];  // <- global_in_block
  __syncthreads();
  y[threadIdx.x] = v;
}

// Reads a counter while others still count.
extern "C" __global__ void read_during_atomics(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ int count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  atomicAdd(&count, 1);  // <- read_during_atomics
  if (!BUG) __syncthreads();
  y[threadIdx.x] = (float)count * x[0];  // <- read_during_atomics
}

// No race, and yet the result hangs on the order of the threads.
extern "C" __global__ void last_one_wins(const int* __restrict__ x, int* __restrict__ sum, Params p) {
  if (BUG) atomicExch(&sum[0], x[threadIdx.x]);
  else atomicMax(&sum[0], x[threadIdx.x]);
}
