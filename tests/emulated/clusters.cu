// Planted bugs in clusters of two blocks: their barrier, and the shared memory of the other block. Blocks have 64
// threads and 64 elements of x and y each.
#include "planted.cuh"
#include "ptx_cluster.cuh"
#include "ptx_sm90.cuh"

#define ENTRY(name) ENTRY_OF(name, CLUSTER)
#define ENTRY_OF(name, blocks)                                                                      \
  extern "C" __global__ void __cluster_dims__(blocks, 1, 1) __launch_bounds__(64)                   \
      name(const float* __restrict__ x, float* __restrict__ y, Params p)

DEVICE int element() { return blockIdx.x * 64 + threadIdx.x; }
DEVICE unsigned other() { return cluster_rank() ^ 1; }

// ---- order between blocks -------------------------------------------------------------------------------

// The other block may not have begun.
ENTRY(no_first_barrier) {
  __shared__ float s[64];
  s[threadIdx.x] = x[element()];
  if (!BUG) cluster_sync();
  y[element()] = cluster_load(&s[threadIdx.x], other());  // <- no_first_barrier
  cluster_sync();
}

ENTRY(no_second_barrier) {
  __shared__ float s[64];
  s[threadIdx.x] = 0.f;
  cluster_sync();
  s[threadIdx.x] = x[element()];  // <- no_second_barrier
  if (!BUG) cluster_sync();
  y[element()] = cluster_load(&s[threadIdx.x], other());  // <- no_second_barrier
  cluster_sync();
}

// A block barrier orders this block alone.
ENTRY(block_barrier) {
  __shared__ float s[64];
  s[threadIdx.x] = 0.f;
  cluster_sync();
  s[threadIdx.x] = x[element()];  // <- block_barrier
  if (BUG) __syncthreads(); else cluster_sync();
  y[element()] = cluster_load(&s[63 - threadIdx.x], other());  // <- block_barrier
  cluster_sync();
}

ENTRY(read_before_wait) {
  __shared__ float s[64];
  s[threadIdx.x] = 0.f;
  cluster_sync();
  s[threadIdx.x] = x[element()];  // <- read_before_wait
  float v = 0.f;
  cluster_arrive();
  if (BUG) v = cluster_load(&s[threadIdx.x], other());  // <- read_before_wait
  cluster_wait();
  if (!BUG) v = cluster_load(&s[threadIdx.x], other());
  y[element()] = v;
  cluster_sync();
}

ENTRY(written_after_cluster_arrive) {
  __shared__ float s[64];
  s[threadIdx.x] = 0.f;
  cluster_sync();
  if (!BUG) s[threadIdx.x] = x[element()];
  cluster_arrive();
  if (BUG) s[threadIdx.x] = x[element()];  // <- written_after_cluster_arrive
  cluster_wait();
  y[element()] = cluster_load(&s[threadIdx.x], other());  // <- written_after_cluster_arrive
  cluster_sync();
}

// Between barriers each block passes its values on: the buffer that is read is the buffer that is written.
ENTRY(one_buffer) {
  __shared__ float s[2][64];
  s[0][threadIdx.x] = x[element()];
  cluster_sync();
  for (int i = 0; i < 3; i++) {
    const int from = BUG ? 0 : i & 1, to = BUG ? 0 : ~i & 1;
    cluster_store(&s[to][threadIdx.x], other(), s[from][63 - threadIdx.x]);  // <- one_buffer
    cluster_sync();
  }
  y[element()] = s[1 - BUG][threadIdx.x];
}

// Both blocks write to the first one.
ENTRY(two_writers) {
  __shared__ float s[128];
  cluster_sync();
  cluster_store(&s[BUG ? threadIdx.x : element()], 0u, x[element()]);  // <- two_writers
  cluster_sync();
  y[element()] = cluster_load(&s[BUG ? threadIdx.x : element()], 0u);
  cluster_sync();
}

// The owner goes on with its tile, which the other block still reads.
ENTRY(overwritten) {
  __shared__ float s[64];
  s[threadIdx.x] = x[element()];
  cluster_sync();
  const float v = cluster_load(&s[threadIdx.x], other());  // <- overwritten
  if (!BUG) cluster_sync();
  s[threadIdx.x] = v;  // <- overwritten
  __syncthreads();
  y[element()] = s[63 - threadIdx.x];
  cluster_sync();
}

// All threads read what the first block then changes, after its own threads have done so.
ENTRY(many_readers) {
  __shared__ float s;
  if (threadIdx.x == 0) s = x[element()];
  cluster_sync();
  const float v = cluster_load(&s, 0u);  // <- many_readers
  if (BUG) __syncthreads(); else cluster_sync();
  if (element() == 0) s = 0.f;  // <- many_readers
  y[element()] = v;
  cluster_sync();
}

// Global memory, too, is ordered between the blocks of a cluster, by its barrier alone.
ENTRY(through_global_memory) {
  y[element()] = x[element()];  // <- through_global_memory
  if (BUG) __syncthreads(); else cluster_sync();
  const float v = y[element() ^ 64];  // <- through_global_memory
  cluster_sync();
  y[element()] = v;
}

// ---- the end of a block ---------------------------------------------------------------------------------

ENTRY(ends_early) {
  __shared__ float s[64];
  s[threadIdx.x] = x[element()];
  cluster_sync();
  y[element()] = cluster_load(&s[threadIdx.x], other());  // <- ends_early
  if (!BUG) cluster_sync();
}

// Only one block reads, and the other one does not wait for it.
ENTRY(ends_before_its_reader) {
  __shared__ float s[64];
  s[threadIdx.x] = x[element()];
  cluster_sync();
  float v = 0.f;
  if (cluster_rank() == 0) v = cluster_load(&s[threadIdx.x], 1u);  // <- ends_before_its_reader
  if (!BUG) cluster_sync();
  y[element()] = v;
}

// ---- places ---------------------------------------------------------------------------------------------

ENTRY(distributed_behind) {
  __shared__ float s[64];
  s[threadIdx.x] = x[element()];
  cluster_sync();
  const float* at = s + threadIdx.x;
  y[element()] = cluster_load(at + BUG, other());  // <- distributed_behind
  cluster_sync();
}

ENTRY(distributed_misaligned) {
  __shared__ __align__(8) float s[66];
  for (int i = threadIdx.x; i < 66; i += 64) s[i] = x[element() % 64];
  cluster_sync();
  const float* at = s + (threadIdx.x & ~1) + BUG;
  const Pack<float, 2> v = cluster_load(reinterpret_cast<const Pack<float, 2>*>(at), other());  // <- distributed_misaligned
  y[element()] = v.v[0];
  cluster_sync();
}

ENTRY(distributed_uninitialised) {
  __shared__ float s[64];
  if (!BUG || cluster_rank() == 0) s[threadIdx.x] = x[element()];
  cluster_sync();
  y[element()] = cluster_load(&s[threadIdx.x], other());  // <- distributed_uninitialised
  cluster_sync();
}

ENTRY(no_such_rank) {
  __shared__ float s[64];
  s[threadIdx.x] = x[element()];
  cluster_sync();
  y[element()] = cluster_load(&s[threadIdx.x], cluster_rank() + BUG);  // <- no_such_rank
  cluster_sync();
}

ENTRY(not_in_shared_memory) {
  __shared__ float s[64];
  s[threadIdx.x] = x[element()];
  cluster_sync();
  y[element()] = cluster_load(BUG ? x : &s[threadIdx.x], other());  // <- not_in_shared_memory
  cluster_sync();
}

// A pointer names a place in the shared memory of whoever uses it.
ENTRY(pointer_of_another) {
  __shared__ float s[64];
  __shared__ const float* at;
  s[threadIdx.x] = x[element()];
  if (threadIdx.x == 0) at = s;
  cluster_sync();
  const float* const theirs = cluster_load(&at, other());
  y[element()] = BUG ? theirs[threadIdx.x] : cluster_load(&s[threadIdx.x], other());  // <- pointer_of_another
  cluster_sync();
}

// ---- who comes to the barrier ---------------------------------------------------------------------------

ENTRY(block_leaves) {
  y[element()] = x[element()];
  if (BUG && cluster_rank() == 1) return;
  cluster_sync();  // <- block_leaves
}

ENTRY(warp_leaves_cluster) {
  y[element()] = x[element()];
  if (BUG && element() >= 96) return;
  cluster_sync();  // <- warp_leaves_cluster
}

ENTRY(one_barrier_more) {
  y[element()] = x[element()];
  cluster_sync();
  if (BUG && cluster_rank() == 0) cluster_sync();  // <- one_barrier_more
}

// One block waits for its own threads, the other one for the cluster.
ENTRY(crossed_barriers) {
  y[element()] = x[element()];
  if (!BUG || cluster_rank() == 0) cluster_sync();  // <- crossed_barriers
  else if (threadIdx.x < 32) __syncthreads();
}

ENTRY(half_a_warp_arrives) {
  y[element()] = x[element()];
  if (!BUG || threadIdx.x % 32 < 16)
    cluster_sync();  // <- half_a_warp_arrives
  else
    cluster_sync();  // <- half_a_warp_arrives
}

ENTRY(wait_missing) {
  y[element()] = x[element()];
  cluster_arrive();  // <- wait_missing
  if (!BUG) cluster_wait();
}

ENTRY(arrives_twice) {
  y[element()] = x[element()];
  cluster_arrive();
  if (!BUG) cluster_wait();
  cluster_arrive();  // <- arrives_twice
  cluster_wait();
}

ENTRY(arrival_missing) {
  y[element()] = x[element()];
  if (!BUG) cluster_arrive();
  cluster_wait();  // <- arrival_missing
}

// ---- and the rest of Hopper -----------------------------------------------------------------------------

// The cluster barrier does not wait for copies.
ENTRY(foreign_tile_not_waited_for) {
  __shared__ __align__(16) float tile[64];
  __shared__ Mbarrier m;
  const unsigned barrier = shared_address(&m);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(barrier, sizeof tile);
    bulk_load(shared_address(tile), x + blockIdx.x * 64, sizeof tile, barrier);
    if (!BUG) mbarrier_wait(barrier, 0);
  }
  cluster_sync();
  y[element()] = cluster_load(&tile[threadIdx.x], other());  // <- foreign_tile_not_waited_for
  cluster_sync();
  if (BUG && threadIdx.x == 0) mbarrier_wait(barrier, 0);
}

// The next tile is asked for while the other block still reads this one.
ENTRY(tile_refilled) {
  __shared__ __align__(16) float tile[64];
  __shared__ Mbarrier m;
  const unsigned barrier = shared_address(&m);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
  }
  float v = 0.f;
  for (int i = 0; i < 2; i++) {
    if (i == 0 || !BUG) cluster_sync();
    if (threadIdx.x == 0) {
      mbarrier_arrive_expect_tx(barrier, sizeof tile);
      bulk_load(shared_address(tile), x + blockIdx.x * 64, sizeof tile, barrier);  // <- tile_refilled
      mbarrier_wait(barrier, i);
    }
    cluster_sync();
    v += cluster_load(&tile[threadIdx.x], other());  // <- tile_refilled
    __syncthreads();
  }
  y[element()] = v;
  cluster_sync();
}

ENTRY(mbarrier_of_another) {
  __shared__ Mbarrier m;
  __shared__ unsigned long long word;
  if (threadIdx.x == 0) mbarrier_init(shared_address(&m), 1);
  cluster_sync();
  if (threadIdx.x == 0) cluster_store(BUG ? &m.state : &word, other(), 0ull);  // <- mbarrier_of_another
  y[element()] = x[element()];
  cluster_sync();
}

// Without __cluster_dims__ a GPU makes clusters of one block.
ENTRY_OF(not_declared, BUG ? 1 : CLUSTER) {
  y[element()] = x[element()];
  cluster_sync();
}
