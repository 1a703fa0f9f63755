// Planted bugs in the use of cp.async and of named barriers, and a pipeline that has none.
#include "planted.cuh"
#include "ptx_async.cuh"

DEVICE int lane_id() { return threadIdx.x % 32; }
DEVICE int warp_id() { return threadIdx.x / 32; }

// ---- cp.async -------------------------------------------------------------------------------------------

// Reads what is still under way.
extern "C" __global__ void copy_not_waited_for(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ float s[128];
  cp_async<4>(shared_address(&s[threadIdx.x]), x + threadIdx.x);  // <- copy_not_waited_for
  cp_async_commit();
  if (!BUG) cp_async_wait<0>();
  y[threadIdx.x] = s[threadIdx.x];  // <- copy_not_waited_for
  cp_async_wait_all();
}

// A wait for groups does not cover what no commit has put into one.
extern "C" __global__ void copy_not_committed(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ float s[128];
  cp_async<4>(shared_address(&s[threadIdx.x]), x + threadIdx.x);
  if (!BUG) cp_async_commit();
  cp_async_wait<0>();
  y[threadIdx.x] = s[threadIdx.x];  // <- copy_not_committed
  cp_async_wait_all();
}

// Leaves one group under way: the one that is read.
extern "C" __global__ void wait_for_too_few(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ float s[2][128];
  cp_async<4>(shared_address(&s[0][threadIdx.x]), x + threadIdx.x);
  cp_async_commit();
  cp_async<4>(shared_address(&s[1][threadIdx.x]), x + threadIdx.x);
  cp_async_commit();
  cp_async_wait<BUG>();
  y[threadIdx.x] = s[1][threadIdx.x];  // <- wait_for_too_few
  cp_async_wait_all();
}

// A wait covers the thread's own copies; others need a barrier, too.
extern "C" __global__ void copy_without_barrier(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ float s[128];
  cp_async<4>(shared_address(&s[threadIdx.x]), x + threadIdx.x);  // <- copy_without_barrier
  cp_async_wait_all();
  if (!BUG) __syncthreads();
  y[threadIdx.x] = s[127 - threadIdx.x];  // <- copy_without_barrier
  __syncthreads();
}

// Stores to the target of a copy.
extern "C" __global__ void target_written(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ float s[128];
  cp_async<4>(shared_address(&s[threadIdx.x]), x + threadIdx.x);
  if (BUG) s[threadIdx.x] = 0.f;  // <- target_written
  cp_async_wait_all();
  y[threadIdx.x] = s[threadIdx.x];
}

// Fills a stage while other threads still read it.
extern "C" __global__ void stage_filled_early(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ float s[128];
  float sum = 0.f;
  for (int i = 0; i < 2; i++) {
    cp_async<4>(shared_address(&s[threadIdx.x]), x + threadIdx.x);  // <- stage_filled_early
    cp_async_wait_all();
    __syncthreads();
    sum += s[127 - threadIdx.x];  // <- stage_filled_early
    if (!BUG) __syncthreads();
  }
  y[threadIdx.x] = sum;
}

// Stores to the source of a copy.
extern "C" __global__ void source_written(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ float s[128];
  y[threadIdx.x] = x[threadIdx.x];
  cp_async<4>(shared_address(&s[threadIdx.x]), y + threadIdx.x);  // <- source_written
  if (BUG) y[threadIdx.x] = 0.f;
  cp_async_wait_all();
  y[threadIdx.x] = s[threadIdx.x] + 1.f;
}

extern "C" __global__ void copy_to_odd_address(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ __align__(16) float s[132];
  const int i = 4 * lane_id();
  if (threadIdx.x < 32) cp_async<16>(shared_address(&s[i + BUG]), x + i);  // <- copy_to_odd_address
  cp_async_wait_all();
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}

extern "C" __global__ void copy_from_odd_address(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ __align__(16) float s[128];
  const int i = 4 * lane_id();
  if (threadIdx.x < 31) cp_async<16>(shared_address(&s[i]), x + i + BUG);  // <- copy_from_odd_address
  if (threadIdx.x == 31) cp_async<16>(shared_address(&s[i]), x, 0);
  cp_async_wait_all();
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}

// The last pack lies half outside of the tensor: the size of the source must say so.
extern "C" __global__ void copy_from_behind(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ __align__(16) float s[132];
  const int i = 4 * threadIdx.x, inside = max(0, min(4, p.n - i)) * 4;
  if (i < 132) cp_async<16>(shared_address(&s[i]), x + i, BUG ? 16 : inside);  // <- copy_from_behind
  cp_async_wait_all();
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x + 4];
}

extern "C" __global__ void copy_to_behind(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ float s[128];
  cp_async<4>(shared_address(s) + 4 * (threadIdx.x + BUG), x + threadIdx.x);  // <- copy_to_behind
  cp_async_wait_all();
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}

extern "C" __global__ void copy_too_much(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ float s[128];
  cp_async<4>(shared_address(&s[threadIdx.x]), x + threadIdx.x, 4 + p.zero + 4 * BUG);  // <- copy_too_much
  cp_async_wait_all();
  y[threadIdx.x] = s[threadIdx.x];
}

// Nobody waits: the memory may belong to the next block by the time of the copy.
extern "C" __global__ void copy_forgotten(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ float s[128];
  cp_async<4>(shared_address(&s[threadIdx.x]), x + threadIdx.x);  // <- copy_forgotten
  cp_async_commit();
  if (!BUG) cp_async_wait<0>();
  y[threadIdx.x] = x[threadIdx.x];
}

// ---- named barriers: warps 0 and 1 produce, 2 and 3 consume ---------------------------------------------

extern "C" __global__ void barrier_missing(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ float s[64];
  if (warp_id() < 2) {
    s[threadIdx.x] = x[threadIdx.x];  // <- barrier_missing
    y[threadIdx.x] = 0.f;
    if (!BUG) bar_arrive(1, 128);
  } else {
    if (!BUG) bar_sync(1, 128);
    y[threadIdx.x] = s[127 - threadIdx.x];  // <- barrier_missing
  }
}

// A barrier orders those who take part, and nobody else.
extern "C" __global__ void barrier_of_two(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ float s[64];
  if (warp_id() < 2) s[threadIdx.x] = x[threadIdx.x];  // <- barrier_of_two
  y[threadIdx.x] = 0.f;
  if (BUG && warp_id() != 1) bar_sync(2, 96);
  if (!BUG) bar_sync(2, 128);
  if (warp_id() >= 2) y[threadIdx.x] = s[127 - threadIdx.x];  // <- barrier_of_two
}

extern "C" __global__ void counts_differ(const float* __restrict__ x, float* __restrict__ y, Params p) {
  y[threadIdx.x] = x[threadIdx.x];
  bar_sync(3, BUG && warp_id() == 1 ? 96 : 128);  // <- counts_differ
}

extern "C" __global__ void barrier_of_the_block(const float* __restrict__ x, float* __restrict__ y, Params p) {
  y[threadIdx.x] = x[threadIdx.x];
  bar_sync(1 - BUG, 128);  // <- barrier_of_the_block
}

extern "C" __global__ void odd_count(const float* __restrict__ x, float* __restrict__ y, Params p) {
  y[threadIdx.x] = x[threadIdx.x];
  bar_sync(1, 128 - 28 * BUG);  // <- odd_count
}

extern "C" __global__ void half_a_warp(const float* __restrict__ x, float* __restrict__ y, Params p) {
  y[threadIdx.x] = x[threadIdx.x];
  if (!BUG || lane_id() < 16) bar_sync(1, BUG ? 64 : 128);  // <- half_a_warp
}

extern "C" __global__ void warp_never_comes(const float* __restrict__ x, float* __restrict__ y, Params p) {
  y[threadIdx.x] = x[threadIdx.x];
  if (!BUG || warp_id() != 2) bar_sync(5, 128);  // <- warp_never_comes
}

extern "C" __global__ void arrives_again(const float* __restrict__ x, float* __restrict__ y, Params p) {
  y[threadIdx.x] = x[threadIdx.x];
  if (warp_id() == 0) {
    bar_arrive(1, 128);
    if (BUG) bar_arrive(1, 128);  // <- arrives_again
  } else if (warp_id() < 4 - BUG) {
    bar_sync(1, 128);
  }
}

// Two buffers between the two pairs of warps, full and empty, for 8 rounds.
extern "C" __global__ void ping_pong(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ float s[2][64];
  if (warp_id() < 2) {
    for (int i = 0; i < 8; i++) {
      if (i >= 2 && !BUG) bar_sync(1 + i % 2, 128);  // empty
      s[i % 2][threadIdx.x] = x[threadIdx.x] * (float)i;  // <- ping_pong
      bar_arrive(3 + i % 2, 128);  // full  // <- ping_pong
    }
    y[threadIdx.x] = 0.f;
  } else {
    float sum = 0.f;
    for (int i = 0; i < 8; i++) {
      bar_sync(3 + i % 2, 128);
      sum += s[i % 2][127 - threadIdx.x];  // <- ping_pong
      if (i < 6 && !BUG) bar_arrive(1 + i % 2, 128);
    }
    y[threadIdx.x] = sum;
  }
}

// ---- a pipeline: y = x, by tiles of 128 elements, STAGES of them under way ------------------------------

template <int STAGES> DEVICE void pipeline(const float* __restrict__ x, float* __restrict__ y, int n) {
  __shared__ __align__(16) float stage[STAGES][512];
  const int tiles = (n + 511) / 512, i = 4 * (int)threadIdx.x;
  auto load = [&](int tile) {
    const int first = tile * 512 + i, inside = max(0, min(4, n - first)) * 4;
    if (tile < tiles)
      cp_async<16>(shared_address(&stage[tile % STAGES][i]), inside ? x + first : x, inside);
    cp_async_commit();  // of nothing, at the end: so that the count of groups stays
  };
  for (int tile = 0; tile < STAGES - 1; tile++) load(tile);
  for (int tile = 0; tile < tiles; tile++) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    load(tile + STAGES - 1);
    for (int j = threadIdx.x; j < 512; j += 128)
      if (tile * 512 + j < n) y[tile * 512 + j] = stage[tile % STAGES][j];
  }
  cp_async_wait_all();
}
extern "C" __global__ void copy_by_2_stages(const float* __restrict__ x, float* __restrict__ y, Params p) {
  pipeline<2>(x, y, p.n);
}
extern "C" __global__ void copy_by_4_stages(const float* __restrict__ x, float* __restrict__ y, Params p) {
  pipeline<4>(x, y, p.n);
}
