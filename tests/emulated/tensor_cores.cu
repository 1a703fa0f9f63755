// Planted bugs around ldmatrix, stmatrix and mma.
#include "planted.cuh"

// A row of 16 bytes for each of 128 threads.
using Tile = half_t[128][8];

DEVICE void fill_row(half_t (&row)[8], float v) {
#pragma unroll
  for (int i = 0; i < 8; i++) row[i] = float_to_half(v + (float)i);
}

DEVICE float sum_of(const unsigned (&r)[4]) {
  float sum = 0.f;
#pragma unroll
  for (int j = 0; j < 4; j++) sum += to_float(half_t{(unsigned short)r[j]});
  return sum;
}

DEVICE float product(float v) {
  const unsigned a[4] = {floats_to_half2(v, 1.f), 0u, 0u, 0u}, b[2] = {floats_to_half2(1.f, v), 0u};
  float d[4] = {};
  mma_m16n8k16_f16(d, a, b);  // <- mma_lane_missing
  return d[0] + d[1];
}

// ---- who takes part -------------------------------------------------------------------------------------
// The last lane has no output and leaves the multiplication to the others.
extern "C" __global__ void mma_lane_missing(const float* __restrict__ x, float* __restrict__ y, Params p) {
  const float v = x[threadIdx.x];
  y[threadIdx.x] = v;
  if (BUG && threadIdx.x % 32 == 31) return;
  y[threadIdx.x] += product(v);  // <- mma_lane_missing
}

// Each half of the warp multiplies in a branch of its own.
extern "C" __global__ void mma_in_branches(const float* __restrict__ x, float* __restrict__ y, Params p) {
  const float v = x[threadIdx.x];
  const unsigned a[4] = {floats_to_half2(v, 1.f)}, b[2] = {floats_to_half2(1.f, v)};
  float d[4] = {};
  if (BUG && threadIdx.x % 32 < 16) mma_m16n8k16_f16(d, a, b);  // <- mma_in_branches
  else mma_m16n8k16_f16(d, a, b);  // <- mma_in_branches
  y[threadIdx.x] = d[0];
}

// As many threads as there are elements, so that the last warp is not whole.
extern "C" __global__ void mma_part_of_warp(const float* __restrict__ x, float* __restrict__ y, Params p) {
  const int threads = blockDim.x, whole = BUG ? threads : threads / 32 * 32;
  for (int i = threadIdx.x; i < p.n; i += threads) y[i] = x[i];
  if (threadIdx.x < whole) y[threadIdx.x] += product(x[threadIdx.x]);  // <- mma_part_of_warp
}

// Loads two matrices, for which 16 lanes name the rows: the others must come, too.
extern "C" __global__ void ldmatrix_lanes_missing(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ __align__(16) Tile s;
  fill_row(s[threadIdx.x], x[threadIdx.x]);
  __syncthreads();
  unsigned r[2] = {};
  if (!BUG || threadIdx.x % 32 < 16) ldmatrix(r, shared_address(s[threadIdx.x]));  // <- ldmatrix_lanes_missing
  y[threadIdx.x] = (float)r[0];
}

// Half of the warp loads as it is, half of it transposed.
extern "C" __global__ void ldmatrix_two_ways(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ __align__(16) Tile s;
  fill_row(s[threadIdx.x], x[threadIdx.x]);
  __syncthreads();
  unsigned r[4];
  const unsigned row = shared_address(s[threadIdx.x]);
  if (BUG && threadIdx.x % 32 < 16) ldmatrix_trans(r, row);  // <- ldmatrix_two_ways
  else ldmatrix(r, row);  // <- ldmatrix_two_ways
  y[threadIdx.x] = sum_of(r);
}

// ---- rows -----------------------------------------------------------------------------------------------
extern "C" __global__ void ldmatrix_behind(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ __align__(16) Tile s;
  fill_row(s[threadIdx.x], x[threadIdx.x]);
  __syncthreads();
  unsigned r[4];
  ldmatrix(r, shared_address(s) + 16 * (threadIdx.x + BUG));  // <- ldmatrix_behind
  y[threadIdx.x] = sum_of(r);
}

// Rows padded by 4 bytes against bank conflicts: 16 are needed.
extern "C" __global__ void ldmatrix_misaligned(const float* __restrict__ x, float* __restrict__ y, Params p) {
  constexpr int STRIDE = BUG ? 10 : 16;
  __shared__ __align__(16) half_t s[128][STRIDE];
  for (int i = 0; i < STRIDE; i++) s[threadIdx.x][i] = float_to_half(x[threadIdx.x]);
  __syncthreads();
  unsigned r[4];
  ldmatrix(r, shared_address(s[threadIdx.x]));  // <- ldmatrix_misaligned
  y[threadIdx.x] = sum_of(r);
}

// The tile has fewer rows than the block has threads, and nobody clears the rest.
extern "C" __global__ void ldmatrix_uninitialised(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ __align__(16) Tile s;
  if (threadIdx.x < 100 || !BUG) fill_row(s[threadIdx.x], x[threadIdx.x]);
  __syncthreads();
  unsigned r[4];
  ldmatrix(r, shared_address(s[threadIdx.x]));  // <- ldmatrix_uninitialised
  y[threadIdx.x] = sum_of(r);
}

extern "C" __global__ void ldmatrix_before_barrier(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ __align__(16) Tile s;
  fill_row(s[threadIdx.x], 0.f);
  __syncthreads();
  fill_row(s[threadIdx.x], x[threadIdx.x]);  // <- ldmatrix_before_barrier
  if (!BUG) __syncthreads();
  unsigned r[4];
  ldmatrix(r, shared_address(s[127 - threadIdx.x]));  // <- ldmatrix_before_barrier
  y[threadIdx.x] = sum_of(r);
}

// ldmatrix waits for the lanes of its warp, but orders no memory even among them.
extern "C" __global__ void ldmatrix_is_no_fence(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ __align__(16) Tile s;
  fill_row(s[threadIdx.x], x[threadIdx.x]);
  __syncthreads();
  unsigned r[4];
  ldmatrix(r, shared_address(s[threadIdx.x ^ 31]));  // <- ldmatrix_is_no_fence
  if (!BUG) __syncwarp();
  s[threadIdx.x][0] = half_t{0};  // <- ldmatrix_is_no_fence
  y[threadIdx.x] = sum_of(r);
}

// The next tile overwrites this one while other warps still load from it.
extern "C" __global__ void tile_overwritten(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ __align__(16) Tile s;
  float sum = 0.f;
  for (int i = 0; i < 2; i++) {
    fill_row(s[threadIdx.x], x[threadIdx.x]);  // <- tile_overwritten
    __syncthreads();
    unsigned r[4];
    ldmatrix(r, shared_address(s[(threadIdx.x + 32) % 128]));  // <- tile_overwritten
    sum += sum_of(r);
    if (!BUG) __syncthreads();
  }
  y[threadIdx.x] = sum;
}

extern "C" __global__ void stmatrix_behind(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ __align__(16) Tile s;
  const unsigned r[4] = {1u, 2u, 3u, 4u};
  stmatrix(shared_address(s) + 16 * (threadIdx.x + BUG), r);  // <- stmatrix_behind
  __syncthreads();
  y[threadIdx.x] = x[threadIdx.x] + (float)s[threadIdx.x][0].bits;
}

// The epilogue reuses the operands' tile while other warps still read operands.
extern "C" __global__ void stmatrix_over_operands(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ __align__(16) Tile s;
  fill_row(s[threadIdx.x], x[threadIdx.x]);
  __syncthreads();
  unsigned r[4];
  ldmatrix(r, shared_address(s[127 - threadIdx.x]));  // <- stmatrix_over_operands
  if (!BUG) __syncthreads();
  stmatrix(shared_address(s[threadIdx.x]), r);  // <- stmatrix_over_operands
  y[threadIdx.x] = sum_of(r);
}

// Two warps store to the same rows.
extern "C" __global__ void stmatrix_twice(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ __align__(16) Tile s;
  const unsigned r[4] = {1u, 2u, 3u, 4u};
  stmatrix_trans(shared_address(s[threadIdx.x % (BUG ? 64 : 128)]), r);  // <- stmatrix_twice
  __syncthreads();
  y[threadIdx.x] = x[threadIdx.x] + (float)s[threadIdx.x % 64][1].bits;
}

// The stored tile is read by lanes that have not waited for it.
extern "C" __global__ void stmatrix_then_read(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ __align__(16) Tile s;
  fill_row(s[threadIdx.x], x[threadIdx.x]);
  __syncthreads();
  const unsigned r[4] = {1u, 2u, 3u, 4u};
  stmatrix(shared_address(s[threadIdx.x]), r);  // <- stmatrix_then_read
  if (!BUG) __syncwarp();
  y[threadIdx.x] = (float)s[threadIdx.x ^ 1][2].bits;  // <- stmatrix_then_read
}

// ---- addresses ------------------------------------------------------------------------------------------
extern "C" __global__ void global_as_shared(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ float s[128];
  s[threadIdx.x] = x[threadIdx.x];
  const unsigned own = shared_address(BUG ? x + threadIdx.x : s + threadIdx.x);  // <- global_as_shared
  y[threadIdx.x] = (float)(own - shared_address(s)) + s[threadIdx.x];
}

extern "C" __global__ void prefetch_behind(const float* __restrict__ x, float* __restrict__ y, Params p) {
  prefetch_l2(x + threadIdx.x + BUG);  // <- prefetch_behind
  y[threadIdx.x] = x[threadIdx.x];
}

extern "C" __global__ void load_once_misaligned(const float* __restrict__ x, float* __restrict__ y, Params p) {
  const int i = threadIdx.x % 31;
  const float4 v = load_once(reinterpret_cast<const float4*>(x + 4 * i + BUG));  // <- load_once_misaligned
  y[threadIdx.x] = v.x + v.w;
}
