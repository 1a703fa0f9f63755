// Planted bugs in the use of what Hopper adds: mbarriers, TMA, wgmma, registers of a warpgroup.
//
// x and y are 8 lines of 16 floats, and so are the boxes of their maps: 512 bytes.
#include "planted.cuh"
#include "ptx_sm90.cuh"

DEVICE int warp_id() { return threadIdx.x / 32; }

#define ENTRY(name)                                                                                  \
  extern "C" __global__ void __launch_bounds__(128)                                                  \
      name(const float* __restrict__ x, float* __restrict__ y, const __grid_constant__ TensorMap x_map, \
           const __grid_constant__ TensorMap y_map, Params p)

constexpr unsigned BYTES = 512;
struct Tile {
  __align__(128) float v[128];
};

// Thread 0 makes the barrier known to everybody.
DEVICE void init(unsigned barrier, unsigned count) {
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, count);
    fence_mbarrier_init();
  }
  __syncthreads();
}

// Loads all of x.
DEVICE void load(Tile& tile, const TensorMap& map, unsigned barrier, unsigned bytes = BYTES) {
  mbarrier_arrive_expect_tx(barrier, bytes);
  tma_load(shared_address(&tile), map, barrier, 0, 0);
}

// ---- mbarriers ------------------------------------------------------------------------------------------

ENTRY(barrier_not_initialised) {
  __shared__ Mbarrier m[2];
  const unsigned barrier = shared_address(&m[0]);
  init(barrier, 128);
  mbarrier_arrive(barrier + 8 * BUG);  // <- barrier_not_initialised
  mbarrier_wait(barrier, 0);
  y[threadIdx.x] = x[threadIdx.x];
}

// The other threads use the barrier before they can know that it has been initialised.
ENTRY(init_without_barrier) {
  __shared__ Mbarrier m;
  const unsigned barrier = shared_address(&m);
  if (threadIdx.x == 0) mbarrier_init(barrier, 128);
  if (!BUG) __syncthreads();
  mbarrier_arrive(barrier);  // <- init_without_barrier
  mbarrier_wait(barrier, 0);
  y[threadIdx.x] = x[threadIdx.x];
}

// TMA does not see an initialisation that no fence has shown it.
ENTRY(init_without_fence) {
  __shared__ Tile tile;
  __shared__ Mbarrier m;
  const unsigned barrier = shared_address(&m);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    if (!BUG) fence_mbarrier_init();
    load(tile, x_map, barrier);  // <- init_without_fence
  }
  __syncthreads();
  mbarrier_wait(barrier, 0);
  y[threadIdx.x] = tile.v[threadIdx.x];
}

ENTRY(barrier_overwritten) {
  __shared__ Mbarrier m;
  const unsigned barrier = shared_address(&m);
  init(barrier, 128);
  if (BUG && threadIdx.x == 5) m.state = 0;  // <- barrier_overwritten
  mbarrier_arrive(barrier);
  mbarrier_wait(barrier, 0);
  y[threadIdx.x] = x[threadIdx.x];
}

ENTRY(initialised_twice) {
  __shared__ Mbarrier m;
  const unsigned barrier = shared_address(&m);
  for (int i = 0; i < 2; i++) {
    if (threadIdx.x == 0) mbarrier_init(barrier, 128);  // <- initialised_twice
    __syncthreads();
    mbarrier_arrive(barrier);
    mbarrier_wait(barrier, 0);
    __syncthreads();
    if (!BUG && threadIdx.x == 0) mbarrier_inval(barrier);
  }
  y[threadIdx.x] = x[threadIdx.x];
}

ENTRY(barrier_at_odd_address) {
  __shared__ __align__(8) unsigned m[4];
  const unsigned barrier = shared_address(&m[BUG]);
  init(barrier, 128);  // <- barrier_at_odd_address
  mbarrier_arrive(barrier);
  mbarrier_wait(barrier, 0);
  y[threadIdx.x] = x[threadIdx.x];
}

// One arrival more than the barrier counts, while bytes are missing.
ENTRY(one_arrival_too_many) {
  __shared__ Tile tile;
  __shared__ Mbarrier m;
  const unsigned barrier = shared_address(&m);
  init(barrier, 1);
  if (threadIdx.x == 0) {
    load(tile, x_map, barrier);
    if (BUG) mbarrier_arrive(barrier);  // <- one_arrival_too_many
  }
  mbarrier_wait(barrier, 0);
  y[threadIdx.x] = tile.v[threadIdx.x];
}

// One warp does not arrive: the report tells how many are missing.
ENTRY(too_few_arrivals) {
  __shared__ Mbarrier m;
  const unsigned barrier = shared_address(&m);
  init(barrier, 128);
  if (!BUG || warp_id() != 3) mbarrier_arrive(barrier);
  mbarrier_wait(barrier, 0);  // <- too_few_arrivals
  y[threadIdx.x] = x[threadIdx.x];
}

// try_wait may return false.
ENTRY(try_wait_taken_for_wait) {
  __shared__ Tile tile;
  __shared__ Mbarrier m;
  const unsigned barrier = shared_address(&m);
  init(barrier, 1);
  if (threadIdx.x == 0) load(tile, x_map, barrier);  // <- try_wait_taken_for_wait
  if (BUG) mbarrier_try_wait(barrier, 0);
  else while (!mbarrier_try_wait(barrier, 0)) {}
  y[threadIdx.x] = tile.v[threadIdx.x];  // <- try_wait_taken_for_wait
  if (BUG) mbarrier_wait(barrier, 0);
}

// The phase before the first counts as complete.
ENTRY(wrong_parity) {
  __shared__ Tile tile;
  __shared__ Mbarrier m;
  const unsigned barrier = shared_address(&m);
  init(barrier, 1);
  if (threadIdx.x == 0) load(tile, x_map, barrier);  // <- wrong_parity
  mbarrier_wait(barrier, BUG);
  y[threadIdx.x] = tile.v[threadIdx.x];  // <- wrong_parity
  mbarrier_wait(barrier, 0);
}

// What is handed over by mbarriers must be handed over before the arrival.
ENTRY(written_after_arrival) {
  __shared__ float s[128];
  __shared__ Mbarrier m;
  const unsigned barrier = shared_address(&m);
  s[threadIdx.x] = 0.f;
  init(barrier, 128);
  if (BUG) mbarrier_arrive(barrier);
  s[threadIdx.x] = x[threadIdx.x];  // <- written_after_arrival
  if (!BUG) mbarrier_arrive(barrier);
  mbarrier_wait(barrier, 0);
  y[threadIdx.x] = s[127 - threadIdx.x];  // <- written_after_arrival
}

// ---- TMA loads ------------------------------------------------------------------------------------------

ENTRY(tile_not_waited_for) {
  __shared__ Tile tile;
  __shared__ Mbarrier m;
  const unsigned barrier = shared_address(&m);
  init(barrier, 1);
  if (threadIdx.x == 0) load(tile, x_map, barrier);  // <- tile_not_waited_for
  if (BUG) __syncthreads();
  else mbarrier_wait(barrier, 0);
  y[threadIdx.x] = tile.v[threadIdx.x];  // <- tile_not_waited_for
  mbarrier_wait(barrier, 0);
}

// One thread waits and does not tell the others.
ENTRY(one_thread_waits) {
  __shared__ Tile tile;
  __shared__ Mbarrier m;
  const unsigned barrier = shared_address(&m);
  init(barrier, 1);
  if (threadIdx.x == 0) load(tile, x_map, barrier);  // <- one_thread_waits
  if (!BUG || threadIdx.x % 32 == 0) mbarrier_wait(barrier, 0);
  y[threadIdx.x] = tile.v[threadIdx.x];  // <- one_thread_waits
}

ENTRY(too_many_bytes_expected) {
  __shared__ Tile tile;
  __shared__ Mbarrier m;
  const unsigned barrier = shared_address(&m);
  init(barrier, 1);
  if (threadIdx.x == 0) load(tile, x_map, barrier, BYTES + 64 * BUG);
  mbarrier_wait(barrier, 0);  // <- too_many_bytes_expected
  y[threadIdx.x] = tile.v[threadIdx.x];
}

ENTRY(too_few_bytes_expected) {
  __shared__ Tile tile;
  __shared__ Mbarrier m;
  const unsigned barrier = shared_address(&m);
  init(barrier, 1);
  if (threadIdx.x == 0) load(tile, x_map, barrier, BYTES - 64 * BUG);
  mbarrier_wait(barrier, 0);  // <- too_few_bytes_expected
  y[threadIdx.x] = tile.v[threadIdx.x];
}

// The phase completes by the arrival alone.
ENTRY(no_bytes_expected) {
  __shared__ Tile tile;
  __shared__ Mbarrier m;
  const unsigned barrier = shared_address(&m);
  init(barrier, 1);
  if (threadIdx.x == 0) {
    if (BUG) mbarrier_arrive(barrier);
    else mbarrier_arrive_expect_tx(barrier, BYTES);
    tma_load(shared_address(&tile), x_map, barrier, 0, 0);  // <- no_bytes_expected
  }
  mbarrier_wait(barrier, 0);
  y[threadIdx.x] = tile.v[threadIdx.x];  // <- no_bytes_expected
}

ENTRY(tile_at_odd_address) {
  __shared__ Tile tiles[2];
  __shared__ Mbarrier m;
  const unsigned barrier = shared_address(&m);
  init(barrier, 1);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(barrier, BYTES);
    tma_load(shared_address(tiles) + 64 * BUG, x_map, barrier, 0, 0);  // <- tile_at_odd_address
  }
  mbarrier_wait(barrier, 0);
  y[threadIdx.x] = tiles[0].v[threadIdx.x];
}

ENTRY(tile_too_small) {
  __shared__ __align__(128) float tile[128 - 32 * BUG];
  __shared__ Mbarrier m;
  const unsigned barrier = shared_address(&m);
  init(barrier, 1);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(barrier, BYTES);
    tma_load(shared_address(tile), x_map, barrier, 0, 0);  // <- tile_too_small
  }
  mbarrier_wait(barrier, 0);
  y[threadIdx.x] = tile[threadIdx.x % (128 - 32 * BUG)];
}

ENTRY(wrong_rank) {
  __shared__ Tile tile;
  __shared__ Mbarrier m;
  const unsigned barrier = shared_address(&m);
  init(barrier, 1);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(barrier, BYTES);
    if (BUG) tma_load(shared_address(&tile), x_map, barrier, 0, 0, 0);  // <- wrong_rank
    else tma_load(shared_address(&tile), x_map, barrier, 0, 0);
  }
  mbarrier_wait(barrier, 0);
  y[threadIdx.x] = tile.v[threadIdx.x];
}

ENTRY(map_is_not_for_im2col) {
  __shared__ Tile tile;
  __shared__ Mbarrier m;
  const unsigned barrier = shared_address(&m);
  init(barrier, 1);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(barrier, BYTES);
    if (BUG) tma_load_im2col(shared_address(&tile), x_map, barrier, 0, 0, 0, 0);  // <- map_is_not_for_im2col
    else tma_load(shared_address(&tile), x_map, barrier, 0, 0);
  }
  mbarrier_wait(barrier, 0);
  y[threadIdx.x] = tile.v[threadIdx.x];
}

ENTRY(not_a_map) {
  __shared__ Tile tile;
  __shared__ Mbarrier m;
  const unsigned barrier = shared_address(&m);
  const TensorMap& map = BUG ? *reinterpret_cast<const TensorMap*>(x) : x_map;
  init(barrier, 1);
  if (threadIdx.x == 0) load(tile, map, barrier);  // <- not_a_map
  mbarrier_wait(barrier, 0);
  y[threadIdx.x] = tile.v[threadIdx.x];
}

// A ring of one stage: the consumer gives it back before it has read it.
ENTRY(released_early) {
  __shared__ Tile tile;
  __shared__ Mbarrier m[2];
  const unsigned full = shared_address(&m[0]), empty = shared_address(&m[1]);
  init(full, 1);
  init(empty, 96);
  if (warp_id() == 3) {
    for (int i = 0; i < 3; i++) {
      if (threadIdx.x % 32 != 0) continue;
      mbarrier_wait(empty, i & 1 ^ 1);
      load(tile, x_map, full);  // <- released_early
    }
    y[threadIdx.x] = 0.f;
  } else {
    float sum = 0.f;
    for (int i = 0; i < 3; i++) {
      mbarrier_wait(full, i & 1);
      if (BUG) mbarrier_arrive(empty);
      sum += tile.v[threadIdx.x + 32];  // <- released_early
      if (!BUG) mbarrier_arrive(empty);
    }
    y[threadIdx.x] = sum;
  }
}

// The producer does not wait for the stage to be given back.
ENTRY(not_released) {
  __shared__ Tile tile;
  __shared__ Mbarrier m[2];
  const unsigned full = shared_address(&m[0]), empty = shared_address(&m[1]);
  init(full, 1);
  init(empty, 96);
  if (warp_id() == 3) {
    for (int i = 0; i < 3; i++) {
      if (threadIdx.x % 32 != 0) continue;
      if (BUG) mbarrier_wait(full, i & 1 ^ 1);
      else mbarrier_wait(empty, i & 1 ^ 1);
      load(tile, x_map, full);  // <- not_released
    }
    y[threadIdx.x] = 0.f;
  } else {
    float sum = 0.f;
    for (int i = 0; i < 3; i++) {
      mbarrier_wait(full, i & 1);
      sum += tile.v[threadIdx.x + 32];  // <- not_released
      mbarrier_arrive(empty);
    }
    y[threadIdx.x] = sum;
  }
}

// One lane gives the stage back for its warp, the others of which may still read.
ENTRY(given_back_by_one_lane) {
  __shared__ Tile tile;
  __shared__ Mbarrier m[2];
  const unsigned full = shared_address(&m[0]), empty = shared_address(&m[1]);
  init(full, 1);
  init(empty, 3);
  if (warp_id() == 3) {
    for (int i = 0; i < 3; i++) {
      if (threadIdx.x % 32 != 0) continue;
      mbarrier_wait(empty, i & 1 ^ 1);
      load(tile, x_map, full);  // <- given_back_by_one_lane
    }
    y[threadIdx.x] = 0.f;
  } else {
    float sum = 0.f;
    for (int i = 0; i < 3; i++) {
      mbarrier_wait(full, i & 1);
      sum += tile.v[threadIdx.x + 32];  // <- given_back_by_one_lane
      if (!BUG) __syncwarp();
      if (threadIdx.x % 32 == 0) mbarrier_arrive(empty);
    }
    y[threadIdx.x] = sum;
  }
}

// Clears the tile by plain stores, of which TMA knows nothing without a fence.
ENTRY(cleared_without_fence) {
  __shared__ Tile tile;
  __shared__ Mbarrier m;
  const unsigned barrier = shared_address(&m);
  tile.v[threadIdx.x] = 0.f;  // <- cleared_without_fence
  if (!BUG) fence_proxy_async();
  init(barrier, 1);
  if (threadIdx.x == 0) load(tile, x_map, barrier);  // <- cleared_without_fence
  mbarrier_wait(barrier, 0);
  y[threadIdx.x] = tile.v[threadIdx.x];
}

ENTRY(load_forgotten) {
  __shared__ Tile tile;
  __shared__ Mbarrier m;
  const unsigned barrier = shared_address(&m);
  init(barrier, 1);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(barrier, BYTES);
    tma_load(shared_address(&tile), x_map, barrier, 0, 0);  // <- load_forgotten
  }
  if (!BUG) mbarrier_wait(barrier, 0);
  y[threadIdx.x] = x[threadIdx.x];
}

ENTRY(odd_bulk_size) {
  __shared__ Tile tile;
  __shared__ Mbarrier m;
  const unsigned barrier = shared_address(&m);
  init(barrier, 1);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(barrier, BYTES);
    bulk_load(shared_address(&tile), x, BYTES - 8 * BUG, barrier);  // <- odd_bulk_size
  }
  mbarrier_wait(barrier, 0);
  y[threadIdx.x] = tile.v[threadIdx.x];
}

ENTRY(bulk_from_behind) {
  __shared__ Tile tile;
  __shared__ Mbarrier m;
  const unsigned barrier = shared_address(&m);
  init(barrier, 1);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(barrier, BYTES);
    bulk_load(shared_address(&tile), x + 4 * BUG, BYTES, barrier);  // <- bulk_from_behind
  }
  mbarrier_wait(barrier, 0);
  y[threadIdx.x] = tile.v[threadIdx.x];
}

// ---- TMA stores -----------------------------------------------------------------------------------------

// All threads write the tile, thread 0 stores it.
ENTRY(store_without_fence) {
  __shared__ Tile tile;
  tile.v[threadIdx.x] = x[threadIdx.x];  // <- store_without_fence
  if (!BUG) fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    tma_store(y_map, shared_address(&tile), 0, 0);  // <- store_without_fence
    bulk_commit();
    bulk_wait_read<0>();
  }
}

// The threads that wrote must fence, before the barrier: the one that stores cannot do it for them.
ENTRY(fence_behind_the_barrier) {
  __shared__ Tile tile;
  tile.v[threadIdx.x] = x[threadIdx.x];  // <- fence_behind_the_barrier
  if (!BUG) fence_proxy_async();
  __syncthreads();
  if (BUG) fence_proxy_async();
  if (threadIdx.x == 0) {
    tma_store(y_map, shared_address(&tile), 0, 0);  // <- fence_behind_the_barrier
    bulk_commit();
    bulk_wait_read<0>();
  }
}

ENTRY(store_without_barrier) {
  __shared__ Tile tile;
  tile.v[threadIdx.x] = x[threadIdx.x];  // <- store_without_barrier
  fence_proxy_async();
  if (!BUG) __syncthreads();
  if (threadIdx.x == 0) {
    tma_store(y_map, shared_address(&tile), 0, 0);  // <- store_without_barrier
    bulk_commit();
    bulk_wait_read<0>();
  }
}

ENTRY(tile_rewritten) {
  __shared__ Tile tile;
  tile.v[threadIdx.x] = x[threadIdx.x];
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    tma_store(y_map, shared_address(&tile), 0, 0);  // <- tile_rewritten
    bulk_commit();
    if (!BUG) bulk_wait_read<0>();
  }
  __syncthreads();
  tile.v[threadIdx.x] = 0.f;  // <- tile_rewritten
  if (threadIdx.x == 0) bulk_wait<0>();
}

ENTRY(store_not_committed) {
  __shared__ Tile tile;
  tile.v[threadIdx.x] = x[threadIdx.x];
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    tma_store(y_map, shared_address(&tile), 0, 0);  // <- store_not_committed
    if (!BUG) bulk_commit();
    bulk_wait_read<0>();
  }
}

// wait_read is for the tile; the global memory may be read behind wait alone.
ENTRY(result_read_early) {
  __shared__ Tile tile;
  tile.v[threadIdx.x] = x[threadIdx.x];
  fence_proxy_async();
  __syncthreads();
  float v = 0.f;
  if (threadIdx.x == 0) {
    tma_store(y_map, shared_address(&tile), 0, 0);  // <- result_read_early
    bulk_commit();
    if (BUG) bulk_wait_read<0>();
    else bulk_wait<0>();
    v = y[5];  // <- result_read_early
    if (v != x[5]) y[5] = v;
  }
}

ENTRY(store_to_input) {
  __shared__ Tile tile;
  tile.v[threadIdx.x] = x[threadIdx.x];
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    tma_store(BUG ? x_map : y_map, shared_address(&tile), 0, 0);  // <- store_to_input
    bulk_commit();
    bulk_wait_read<0>();
  }
}

// ---- wgmma ----------------------------------------------------------------------------------------------
// A is 64 x 16, B is 16 x 8, both K-major without a swizzle, of x's numbers.

struct Operands {
  __align__(128) half_t a[64 * 16];
  __align__(128) half_t b[8 * 16];
};
DEVICE void fill(Operands& operands, const float* __restrict__ x) {
  for (int i = threadIdx.x; i < 64 * 16; i += 128) operands.a[i] = float_to_half(x[i % 128]);
  operands.b[threadIdx.x] = float_to_half(x[threadIdx.x]);
}
DEVICE unsigned long long a_of(Operands& operands) {
  return wgmma_descriptor(shared_address(operands.a), 1024, 128, SWIZZLE_NONE);
}
DEVICE unsigned long long b_of(Operands& operands) {
  return wgmma_descriptor(shared_address(operands.b), 128, 128, SWIZZLE_NONE);
}
DEVICE void store_sum(float* __restrict__ y, const float (&d)[4]) {
  y[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}

ENTRY(first_fence_missing) {
  __shared__ Operands s;
  float d[4];
  fill(s, x);
  fence_proxy_async();
  __syncthreads();
  if (!BUG) wgmma_fence();
  wgmma<half_t>(d, a_of(s), b_of(s), false);  // <- first_fence_missing
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_pin(d);
  store_sum(y, d);
}

// Registers that have been read or written since need another fence.
ENTRY(second_fence_missing) {
  __shared__ Operands s;
  float d[4];
  fill(s, x);
  fence_proxy_async();
  __syncthreads();
  wgmma_fence();
  for (int i = 0; i < 2; i++) {
    wgmma<half_t>(d, a_of(s), b_of(s), i > 0);  // <- second_fence_missing
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_pin(d);
    for (int j = 0; j < 4; j++) d[j] *= 0.5f;
    wgmma_pin(d);
    if (!BUG) wgmma_fence();
  }
  store_sum(y, d);
}

ENTRY(product_not_waited_for) {
  __shared__ Operands s;
  float d[4];
  fill(s, x);
  fence_proxy_async();
  __syncthreads();
  wgmma_fence();
  wgmma<half_t>(d, a_of(s), b_of(s), false);
  wgmma_commit();
  if (!BUG) wgmma_wait<0>();
  wgmma_pin(d);
  store_sum(y, d);  // <- product_not_waited_for
}

ENTRY(product_not_committed) {
  __shared__ Operands s;
  float d[4];
  fill(s, x);
  fence_proxy_async();
  __syncthreads();
  wgmma_fence();
  wgmma<half_t>(d, a_of(s), b_of(s), false);
  if (!BUG) wgmma_commit();
  wgmma_wait<0>();
  wgmma_pin(d);
  store_sum(y, d);  // <- product_not_committed
}

ENTRY(operands_without_fence) {
  __shared__ Operands s;
  float d[4];
  fill(s, x);  // <- operands_without_fence
  if (!BUG) fence_proxy_async();
  __syncthreads();
  wgmma_fence();
  wgmma<half_t>(d, a_of(s), b_of(s), false);  // <- operands_without_fence
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_pin(d);
  store_sum(y, d);
}

ENTRY(operands_without_barrier) {
  __shared__ Operands s;
  float d[4];
  fill(s, x);  // <- operands_without_barrier
  fence_proxy_async();
  if (!BUG) __syncthreads();
  wgmma_fence();
  wgmma<half_t>(d, a_of(s), b_of(s), false);  // <- operands_without_barrier
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_pin(d);
  store_sum(y, d);
}

// A barrier does not wait for the multiplication.
ENTRY(operands_rewritten) {
  __shared__ Operands s;
  float d[4];
  fill(s, x);
  fence_proxy_async();
  __syncthreads();
  wgmma_fence();
  wgmma<half_t>(d, a_of(s), b_of(s), false);  // <- operands_rewritten
  wgmma_commit();
  if (!BUG) wgmma_wait<0>();
  __syncthreads();
  s.b[threadIdx.x] = float_to_half(1.f);  // <- operands_rewritten
  wgmma_wait<0>();
  wgmma_pin(d);
  store_sum(y, d);
}

ENTRY(warps_part) {
  __shared__ Operands s;
  float d[4];
  fill(s, x);
  fence_proxy_async();
  __syncthreads();
  wgmma_fence();
  if (BUG && warp_id() == 2)
    wgmma<half_t>(d, a_of(s), b_of(s), false);  // <- warps_part
  else
    wgmma<half_t>(d, a_of(s), b_of(s), false);  // <- warps_part
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_pin(d);
  store_sum(y, d);
}

ENTRY(warp_leaves) {
  __shared__ Operands s;
  float d[4];
  fill(s, x);
  fence_proxy_async();
  __syncthreads();
  y[threadIdx.x] = 0.f;
  if (BUG && warp_id() == 2) return;
  wgmma_fence();  // <- warp_leaves
  wgmma<half_t>(d, a_of(s), b_of(s), false);
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_pin(d);
  store_sum(y, d);
}

ENTRY(warp_stays_away) {
  __shared__ Operands s;
  float d[4] = {};
  fill(s, x);
  fence_proxy_async();
  __syncthreads();
  if (!BUG || warp_id() != 2) {
    wgmma_fence();  // <- warp_stays_away
    wgmma<half_t>(d, a_of(s), b_of(s), false);
    wgmma_commit();
    wgmma_wait<0>();
  }
  wgmma_pin(d);
  __syncthreads();  // <- warp_stays_away
  store_sum(y, d);
}

ENTRY(descriptors_differ) {
  __shared__ Operands s;
  float d[4];
  fill(s, x);
  fence_proxy_async();
  __syncthreads();
  wgmma_fence();
  wgmma<half_t>(d, a_of(s) + (BUG ? 2 * warp_id() : 0), b_of(s), false);  // <- descriptors_differ
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_pin(d);
  store_sum(y, d);
}

ENTRY(operand_behind) {
  __shared__ Operands s;
  float d[4];
  fill(s, x);
  fence_proxy_async();
  __syncthreads();
  wgmma_fence();
  const unsigned b = shared_address(s.b) + 64 * BUG;
  wgmma<half_t>(d, a_of(s), wgmma_descriptor(b, 128, 128, SWIZZLE_NONE), false);  // <- operand_behind
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_pin(d);
  store_sum(y, d);
}

// A swizzled tile that does not begin where the pattern does.
ENTRY(tile_off_the_pattern) {
  __shared__ __align__(1024) half_t a[65 * 64];
  __shared__ __align__(1024) half_t b[9 * 64];
  float d[4];
  for (int i = threadIdx.x; i < 65 * 64; i += 128) a[i] = float_to_half(x[i % 128]);
  for (int i = threadIdx.x; i < 9 * 64; i += 128) b[i] = float_to_half(x[i % 128]);
  fence_proxy_async();
  __syncthreads();
  wgmma_fence();
  const unsigned long long of_a = wgmma_descriptor(shared_address(a), 0, 1024, SWIZZLE_128B);
  const unsigned long long of_b = wgmma_descriptor(shared_address(b) + 128 * BUG, 0, 1024, SWIZZLE_128B);
  wgmma<half_t>(d, of_a, of_b, false);  // <- tile_off_the_pattern
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_pin(d);
  store_sum(y, d);
}

ENTRY(descriptor_at_odd_address) {
  __shared__ Operands s;
  float d[4];
  fill(s, x);
  fence_proxy_async();
  __syncthreads();
  wgmma_fence();
  const unsigned at = shared_address(s.a) + 8 * BUG;
  const unsigned long long of_a = wgmma_descriptor(at, 1024, 128, SWIZZLE_NONE);  // <- descriptor_at_odd_address
  wgmma<half_t>(d, of_a, b_of(s), false);
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_pin(d);
  store_sum(y, d);
}

// cp.async belongs to the generic proxy, too.
ENTRY(copied_without_fence) {
  __shared__ Operands s;
  float d[4];
  fill(s, x);
  fence_proxy_async();
  __syncthreads();
  const unsigned to = shared_address(&s.b[8 * (threadIdx.x % 16)]);
  if (threadIdx.x < 16) cp_async<16>(to, x + 4 * threadIdx.x);  // <- copied_without_fence
  cp_async_wait_all();
  if (!BUG) fence_proxy_async();
  __syncthreads();
  wgmma_fence();
  wgmma<half_t>(d, a_of(s), b_of(s), false);  // <- copied_without_fence
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_pin(d);
  store_sum(y, d);
}

// The registers of A belong to the multiplication until the wait.
ENTRY(a_rewritten) {
  __shared__ Operands s;
  float d[4];
  unsigned a[4];
  fill(s, x);
  fence_proxy_async();
  __syncthreads();
  for (int i = 0; i < 4; i++) a[i] = floats_to_half2(x[threadIdx.x], x[127 - threadIdx.x]);
  wgmma_fence();
  wgmma<half_t>(d, a, b_of(s), false);
  wgmma_commit();
  if (!BUG) wgmma_wait<0>();
  a[1] = __float_as_uint(x[5]);  // <- a_rewritten
  wgmma_wait<0>();
  wgmma_pin(d);
  store_sum(y, d);
  if (a[1] == 12345u) y[threadIdx.x] = 0.f;
}

// Fills the stage that a multiplication reads, by TMA.
ENTRY(stage_given_back_early) {
  __shared__ __align__(1024) half_t tile[64 * 16];
  __shared__ Operands s;
  __shared__ Mbarrier m[2];
  const unsigned full = shared_address(&m[0]), empty = shared_address(&m[1]);
  float d[4];
  fill(s, x);
  for (int i = threadIdx.x; i < 64 * 16; i += 128) tile[i] = float_to_half(x[0]);
  fence_proxy_async();
  init(full, 1);
  init(empty, 128);
  wgmma_fence();
  const unsigned long long of_tile = wgmma_descriptor(shared_address(tile), 1024, 128, SWIZZLE_NONE);
  wgmma<half_t>(d, of_tile, b_of(s), false);  // <- stage_given_back_early
  wgmma_commit();
  if (!BUG) wgmma_wait<0>();
  mbarrier_arrive(empty);
  if (threadIdx.x == 0) {
    mbarrier_wait(empty, 0);
    mbarrier_arrive_expect_tx(full, BYTES);
    tma_load(shared_address(tile), x_map, full, 0, 0);  // <- stage_given_back_early
  }
  wgmma_wait<0>();
  wgmma_pin(d);
  mbarrier_wait(full, 0);
  store_sum(y, d);
}

// ---- registers ------------------------------------------------------------------------------------------

#ifdef EMULATOR  // ptxas would refuse it
ENTRY(odd_number_of_registers) {
  setmaxnreg_dec<BUG ? 44 : 40>();  // <- odd_number_of_registers
  y[threadIdx.x] = x[threadIdx.x];
}
#endif

ENTRY(registers_of_one_warp) {
  y[threadIdx.x] = x[threadIdx.x];
  if (!BUG || warp_id() == 1) setmaxnreg_dec<40>();  // <- registers_of_one_warp
  __syncthreads();  // <- registers_of_one_warp
}
