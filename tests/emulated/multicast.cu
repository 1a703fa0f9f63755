// Planted bugs in what blocks of a cluster do to each other without the cluster barrier: TMA loads that arrive in both
// blocks, and arrivals at the other block's mbarriers.
//
// x is ROUNDS tiles of two shares, 256 floats each, and a share is the box of its map. Of every tile each of the two
// blocks loads the share of its rank, and both get both; y gets, from each block, all tiles. Blocks have 160 threads:
// a warpgroup that uses tiles, and a warp of which one thread loads them.
#include "planted.cuh"
#include "ptx_cluster.cuh"
#include "ptx_sm90.cuh"

#define ENTRY(name)                                                                 \
  extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(160) \
      name(const float* __restrict__ x, float* __restrict__ y, const __grid_constant__ TensorMap x_map, Params p)

constexpr int ROUNDS = 4, STAGES = 2, SHARE = 256, TILE = 2 * SHARE;
constexpr unsigned SHARE_BYTES = SHARE * sizeof(float), TILE_BYTES = 2 * SHARE_BYTES;
constexpr unsigned short BOTH = 3;

DEVICE unsigned other() { return cluster_rank() ^ 1; }
DEVICE bool loads() { return threadIdx.x == 128; }
DEVICE bool stores() { return threadIdx.x == 0; }

DEVICE void store_tile(unsigned tile, float* y, int round) {
  bulk_store(y + (blockIdx.x * ROUNDS + round) * TILE, tile, TILE_BYTES);
  bulk_commit();
}

// ---- one tile -------------------------------------------------------------------------------------------
#define ONE_TILE                              \
  __shared__ __align__(128) float tile[TILE]; \
  __shared__ Mbarrier m;                      \
  const unsigned to = shared_address(tile), full = shared_address(&m);

DEVICE void init(unsigned full) {
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    fence_mbarrier_init();
  }
}

// One share of a round's tile, for the blocks of a mask.
DEVICE void load_share(unsigned tile, const TensorMap& map, unsigned full, int share, int round = 0,
                       unsigned short ranks = BOTH) {
  tma_load_multicast(tile + share * SHARE_BYTES, map, full, 0, share, round, ranks);  // <- block_ends_under_a_multicast
}

// The tile becomes y's first; the others are zero.
DEVICE void finish(unsigned tile, unsigned full, float* y) {
  mbarrier_wait(full, 0);
  if (stores()) {
    store_tile(tile, y, 0);
    bulk_wait_read<0>();
  }
  for (int i = TILE + threadIdx.x; i < ROUNDS * TILE; i += blockDim.x) y[blockIdx.x * ROUNDS * TILE + i] = 0.f;
}

// The other block may not have begun.
ENTRY(multicast_without_first_barrier) {
  ONE_TILE
  init(full);
  if (BUG) __syncthreads(); else cluster_sync();
  if (loads()) {
    mbarrier_arrive_expect_tx(full, TILE_BYTES);
    load_share(to, x_map, full, cluster_rank());  // <- multicast_without_first_barrier
  }
  finish(to, full, y);
  cluster_sync();
}

// The first block loads both tiles. The other one runs, and has even waited for the writes of all, but the block that
// loads has not: nothing tells it that they are done.
ENTRY(multicast_before_wait) {
  ONE_TILE
  const bool first = cluster_rank() == 0;
  init(full);
  cluster_sync();
  for (int i = threadIdx.x; i < TILE; i += blockDim.x) tile[i] = 0.f;  // <- multicast_before_wait
  fence_proxy_async();
  cluster_arrive();
  if (!first || !BUG) cluster_wait();
  if (!first) __syncthreads();
  for (int i = 0; i < 9; i++) __syncwarp();  // the other block's turn
  if (loads()) mbarrier_arrive_expect_tx(full, TILE_BYTES);
  if (loads() && first)
    for (int i = 0; i < 2; i++) load_share(to, x_map, full, i, 0, 1 << 1);  // <- multicast_before_wait
  if (first && BUG) cluster_wait();
  if (loads() && first)
    for (int i = 0; i < 2; i++) load_share(to, x_map, full, i, 0, 1 << 0);
  finish(to, full, y);
  cluster_sync();
}

// The threads of a block that read from the other one's tile are not done when one of them loads it anew.
ENTRY(multicast_over_distributed_reads) {
  ONE_TILE
  __shared__ float first[TILE];
  init(full);
  for (int i = threadIdx.x; i < TILE; i += blockDim.x) tile[i] = x[i];
  fence_proxy_async();
  cluster_sync();
  for (int i = threadIdx.x; i < TILE; i += blockDim.x)
    first[i] = cluster_load(&tile[i], other());  // <- multicast_over_distributed_reads
  if (!BUG) __syncthreads();
  if (loads()) {
    mbarrier_arrive_expect_tx(full, TILE_BYTES);
    for (int share = 0; share < 2; share++)
      load_share(to, x_map, full, share, 1, 1 << other());  // <- multicast_over_distributed_reads
  }
  finish(to, full, y);
  __syncthreads();
  for (int i = threadIdx.x; i < TILE; i += blockDim.x) y[(blockIdx.x * ROUNDS + 1) * TILE + i] = first[i];
  cluster_sync();
}

// A block that does not wait for its tile, nor for the other one to be done with it.
ENTRY(block_ends_under_a_multicast) {
  ONE_TILE
  init(full);
  cluster_sync();
  if (loads() && cluster_rank() == 0)
    for (int share = 0; share < 2; share++) load_share(to, x_map, full, share);
  if (loads()) mbarrier_arrive_expect_tx(full, TILE_BYTES);
  if (cluster_rank() == 0 || !BUG) finish(to, full, y);
  if (!BUG) cluster_sync();
}

ENTRY(rank_beyond_the_cluster) {
  ONE_TILE
  init(full);
  cluster_sync();
  if (loads()) {
    mbarrier_arrive_expect_tx(full, TILE_BYTES);
    load_share(to, x_map, full, cluster_rank(), 0, BOTH + 4 * BUG);  // <- rank_beyond_the_cluster
  }
  finish(to, full, y);
  cluster_sync();
}

ENTRY(multicast_to_nobody) {
  ONE_TILE
  init(full);
  cluster_sync();
  if (loads()) {
    mbarrier_arrive_expect_tx(full, TILE_BYTES);
    load_share(to, x_map, full, cluster_rank(), 0, BUG ? 0 : BOTH);  // <- multicast_to_nobody
  }
  finish(to, full, y);
  cluster_sync();
}

// One block's mbarrier is not known to TMA, which the other one's load finds out.
ENTRY(foreign_init_without_fence) {
  ONE_TILE
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    if (!BUG || cluster_rank() == 0) fence_mbarrier_init();
  }
  cluster_sync();
  if (loads()) mbarrier_arrive_expect_tx(full, TILE_BYTES);
  if (loads() && cluster_rank() == 0)
    for (int share = 0; share < 2; share++)
      load_share(to, x_map, full, share);  // <- foreign_init_without_fence
  finish(to, full, y);
  cluster_sync();
}

// ---- arrivals -------------------------------------------------------------------------------------------

DEVICE void copy_x(const float* x, float* y) {
  for (int i = threadIdx.x; i < ROUNDS * TILE; i += blockDim.x) y[blockIdx.x * ROUNDS * TILE + i] = x[i];
}

ENTRY(arrival_without_first_barrier) {
  __shared__ Mbarrier m;
  const unsigned barrier = shared_address(&m);
  init(barrier);
  if (BUG) __syncthreads(); else cluster_sync();
  if (threadIdx.x == 0) mbarrier_arrive_at(barrier, other());  // <- arrival_without_first_barrier
  mbarrier_wait_cluster(barrier, 0);
  copy_x(x, y);
  cluster_sync();
}

// The block may end while the other one has not arrived yet: its threads have not waited for that.
ENTRY(block_ends_before_an_arrival) {
  __shared__ Mbarrier m;
  const unsigned barrier = shared_address(&m);
  init(barrier);
  cluster_sync();
  if (threadIdx.x == 0) mbarrier_arrive_at(barrier, other());  // <- block_ends_before_an_arrival
  copy_x(x, y);
  if (!BUG) cluster_sync();
}

// The phase is not complete, bytes being on their way, when the other block arrives once more.
ENTRY(foreign_arrival_too_many) {
  ONE_TILE
  init(full);
  __syncthreads();
  if (loads()) mbarrier_arrive_expect_tx(full, TILE_BYTES);
  cluster_sync();
  if (loads()) {
    load_share(to, x_map, full, cluster_rank());
    if (BUG) mbarrier_arrive_at(full, other());  // <- foreign_arrival_too_many
  }
  finish(to, full, y);
  cluster_sync();
}

ENTRY(arrival_beyond_the_cluster) {
  __shared__ Mbarrier m;
  const unsigned barrier = shared_address(&m);
  init(barrier);
  cluster_sync();
  if (threadIdx.x == 0) mbarrier_arrive_at(barrier, other() + 2 * BUG);  // <- arrival_beyond_the_cluster
  mbarrier_wait_cluster(barrier, 0);
  copy_x(x, y);
  cluster_sync();
}

// Only the first block has initialised its mbarrier.
ENTRY(foreign_barrier_not_initialised) {
  __shared__ Mbarrier m;
  const unsigned barrier = shared_address(&m);
  if (!BUG || cluster_rank() == 0) init(barrier);
  cluster_sync();
  if (threadIdx.x == 0 && cluster_rank() == 0) mbarrier_arrive_at(barrier, 1);  // <- foreign_barrier_not_initialised
  if (cluster_rank() == 1 && !BUG) mbarrier_wait_cluster(barrier, 0);
  copy_x(x, y);
  cluster_sync();
}

// The cluster has met, but the mbarriers come into being behind that.
ENTRY(foreign_init_after_the_barrier) {
  __shared__ Mbarrier m;
  const unsigned barrier = shared_address(&m);
  if (!BUG) init(barrier);
  cluster_sync();
  if (BUG) init(barrier);
  __syncthreads();
  if (threadIdx.x == 0) mbarrier_arrive_at(barrier, other());  // <- foreign_init_after_the_barrier
  mbarrier_wait_cluster(barrier, 0);
  copy_x(x, y);
  cluster_sync();
}

// ---- a ring of tiles ------------------------------------------------------------------------------------
// A slot is free when the threads that use it in both blocks have arrived at its `empty`.
struct Ring {
  unsigned tiles, full, empty;

  __device__ __forceinline__ unsigned tile_of(int round) const { return tiles + round % STAGES * TILE_BYTES; }
  __device__ __forceinline__ unsigned full_of(int round) const {
    return full + round % STAGES * (unsigned)sizeof(Mbarrier);
  }
  __device__ __forceinline__ unsigned empty_of(int round) const {
    return empty + round % STAGES * (unsigned)sizeof(Mbarrier);
  }
};
#define RING                                          \
  __shared__ __align__(128) float tile[STAGES][TILE]; \
  __shared__ Mbarrier full[STAGES], empty[STAGES];    \
  const Ring ring{shared_address(tile), shared_address(full), shared_address(empty)};

DEVICE unsigned parity_of(int round) { return round / STAGES & 1; }

DEVICE void init(const Ring& ring, unsigned arrivals = 2) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      mbarrier_init(ring.full_of(i), 1);
      mbarrier_init(ring.empty_of(i), arrivals);
    }
    fence_mbarrier_init();
  }
  cluster_sync();
}

DEVICE void fill(const Ring& ring, const TensorMap& map, int round, unsigned expected = TILE_BYTES) {
  mbarrier_arrive_expect_tx(ring.full_of(round), expected);
  load_share(ring.tile_of(round), map, ring.full_of(round), cluster_rank(), round);  // <- block_ends_before_its_ring
}

DEVICE void produce(const Ring& ring, const TensorMap& map, unsigned expected = TILE_BYTES) {
  for (int round = 0; round < ROUNDS; round++) {
    mbarrier_wait_cluster(ring.empty_of(round), parity_of(round) ^ 1);  // <- arrival_missing_in_the_ring
    fill(ring, map, round, expected);
  }
}

DEVICE void give_back(const Ring& ring, int round) {
  for (unsigned rank = 0; rank < 2; rank++)
    mbarrier_arrive_at(ring.empty_of(round), rank);  // <- block_ends_before_its_ring
}

DEVICE void consume(const Ring& ring, float* y) {
  for (int round = 0; round < ROUNDS; round++) {
    mbarrier_wait(ring.full_of(round), parity_of(round));  // <- arrival_missing_in_the_ring
    store_tile(ring.tile_of(round), y, round);
    bulk_wait_read<0>();
    give_back(ring, round);
  }
}

// The slot is loaded anew when its last load has come, while both blocks may still use that.
ENTRY(slot_not_waited_for) {
  RING
  init(ring);
  if (loads())
    for (int round = 0; round < ROUNDS; round++) {
      if (BUG) mbarrier_wait(ring.full_of(round), parity_of(round) ^ 1);
      else mbarrier_wait_cluster(ring.empty_of(round), parity_of(round) ^ 1);
      fill(ring, x_map, round);  // <- slot_not_waited_for
    }
  if (stores()) consume(ring, y);  // <- slot_not_waited_for
  cluster_sync();
}

// A producer waits for the threads of its own block alone.
ENTRY(own_block_waited_for) {
  RING
  init(ring, BUG ? 1 : 2);
  if (loads()) produce(ring, x_map);  // <- own_block_waited_for
  if (stores()) {
    if (!BUG) consume(ring, y);
    if (BUG)
      for (int round = 0; round < ROUNDS; round++) {
        mbarrier_wait(ring.full_of(round), parity_of(round));
        store_tile(ring.tile_of(round), y, round);  // <- own_block_waited_for
        bulk_wait_read<0>();
        mbarrier_arrive(ring.empty_of(round));
      }
  }
  cluster_sync();
}

// A store reads its tile later.
ENTRY(given_back_before_the_store) {
  RING
  init(ring);
  if (loads()) produce(ring, x_map);  // <- given_back_before_the_store
  if (stores())
    for (int round = 0; round < ROUNDS; round++) {
      mbarrier_wait(ring.full_of(round), parity_of(round));
      store_tile(ring.tile_of(round), y, round);  // <- given_back_before_the_store
      if (!BUG) bulk_wait_read<0>();
      give_back(ring, round);
      bulk_wait_read<0>();
    }
  cluster_sync();
}

// So does wgmma: here d += a b, a being all of the tile as 64 x 16 halves, and b its first 8 lines.
ENTRY(given_back_before_the_product) {
  RING
  init(ring);
  float d[4] = {};
  if (loads()) produce(ring, x_map);  // <- given_back_before_the_product
  if (threadIdx.x < 128) {
    for (int round = 0; round < ROUNDS; round++) {
      const unsigned long long at = wgmma_descriptor(ring.tile_of(round), 128, 256, SWIZZLE_NONE);
      mbarrier_wait(ring.full_of(round), parity_of(round));
      wgmma_pin(d);
      wgmma_fence();
      wgmma<half_t>(d, at, at, round > 0);  // <- given_back_before_the_product
      wgmma_commit();
      if (BUG && stores()) give_back(ring, round);
      wgmma_wait<0>();
      wgmma_pin(d);
      if (!BUG && stores()) give_back(ring, round);
    }
  }
  copy_x(x, y);
  __syncthreads();
  if (threadIdx.x < 128)
    for (int i = 0; i < 4; i++) y[blockIdx.x * ROUNDS * TILE + i * 128 + threadIdx.x] = d[i];
  cluster_sync();
}

// The thread that gives the slot back is not the one that has waited for the store, and knows nothing of it.
ENTRY(given_back_by_another) {
  RING
  init(ring);
  if (loads()) produce(ring, x_map);  // <- given_back_by_another
  if (threadIdx.x < 64)
    for (int round = 0; round < ROUNDS; round++) {
      mbarrier_wait(ring.full_of(round), parity_of(round));
      if (stores()) {
        store_tile(ring.tile_of(round), y, round);  // <- given_back_by_another
        bulk_wait_read<0>();
      }
      if (!BUG) bar_sync(1, 64);
      if (threadIdx.x == 32) give_back(ring, round);
    }
  cluster_sync();
}

// Plain loads are ordered by the arrivals, too, says PTX. Not here, where between blocks only the cluster barrier
// orders them: the emulator is stricter.
ENTRY(given_back_after_ordinary_reads) {
  RING
  init(ring);
  for (int round = 0; round < ROUNDS; round++) {
    if (!BUG) cluster_sync();
    if (loads()) {
      if (BUG) mbarrier_wait_cluster(ring.empty_of(round), parity_of(round) ^ 1);
      fill(ring, x_map, round);  // <- given_back_after_ordinary_reads
    }
    if (threadIdx.x < 128) {
      mbarrier_wait(ring.full_of(round), parity_of(round));
      for (int i = threadIdx.x; i < TILE; i += 128)
        y[(blockIdx.x * ROUNDS + round) * TILE + i] = tile[round % STAGES][i];  // <- given_back_after_ordinary_reads
      bar_sync(1, 128);
      if (stores()) give_back(ring, round);
    }
  }
  cluster_sync();
}

// Slots wait for an arrival that nobody makes.
ENTRY(arrival_missing_in_the_ring) {
  RING
  init(ring, 2 + BUG);
  if (loads()) produce(ring, x_map);
  if (stores()) consume(ring, y);
  cluster_sync();
}

// Bytes arrive from both blocks: what is expected is the sum.
ENTRY(own_share_expected) {
  RING
  init(ring);
  if (loads()) produce(ring, x_map, BUG ? SHARE_BYTES : TILE_BYTES);  // <- own_share_expected
  if (stores()) consume(ring, y);  // <- own_share_expected
  cluster_sync();
}

// The last arrivals and loads come from the other block, and nothing waits for them.
ENTRY(block_ends_before_its_ring) {
  RING
  init(ring);
  if (loads()) produce(ring, x_map);
  if (stores()) consume(ring, y);
  if (!BUG) cluster_sync();
}
