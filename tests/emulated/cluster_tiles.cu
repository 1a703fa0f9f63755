// All that a block does by itself, done by the blocks of a cluster at the same time: bulk copies and mbarriers,
// named barriers, cp.async, shuffles, mma and wgmma. Blocks have 128 threads, 64 x 16 halves of a, 16 x 8 of b.
#include "common.cuh"
#include "ptx_cluster.cuh"
#include "ptx_sm90.cuh"

struct Params {
  int rounds;
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from test_emulator_cluster.py");

constexpr int M = 64, N = 8, K = 16;

// y = rounds (a b of this block + a b of the next one in the cluster), totals = rounds times the sums, by warp, of the
// next one's product. a and b lie as wgmma takes them without a swizzle: [lines / 8][K / 8][8][8].
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(128)
    tiles(const half_t* __restrict__ a, const half_t* __restrict__ b, float* __restrict__ y,
          float* __restrict__ totals, Params p) {
  __shared__ __align__(128) half_t at[M * K], bt[N * K];
  __shared__ float product[M * N], sums[4];
  __shared__ Mbarrier full;
  const unsigned barrier = shared_address(&full), next = (cluster_rank() + 1) % cluster_blocks();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  float mine[4] = {}, theirs[4] = {}, all = 0.f;
  for (int round = 0; round < p.rounds; round++) {
    if (threadIdx.x == 0) {  // a by a bulk copy, b by cp.async
      mbarrier_arrive_expect_tx(barrier, sizeof at);
      bulk_load(shared_address(at), a + blockIdx.x * M * K, sizeof at, barrier);
    }
    if (threadIdx.x < N * K / 8)
      cp_async<16>(shared_address(&bt[8 * threadIdx.x]), b + blockIdx.x * N * K + 8 * threadIdx.x);
    cp_async_wait_all();
    fence_proxy_async();
    bar_sync(1 + (cluster_rank() + round) % 15, 128);  // blocks use one number at different times
    mbarrier_wait(barrier, round & 1);
    float d[4] = {};
    wgmma_fence();
    wgmma<half_t>(d, wgmma_descriptor(shared_address(at), 128, 256, SWIZZLE_NONE),
                  wgmma_descriptor(shared_address(bt), 128, 256, SWIZZLE_NONE), false);
    wgmma_commit();
    wgmma_wait<0>();
    float v = 0.f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      mine[i] += d[i];
      v += d[i];
      product[(warp * 16 + lane / 4 + 8 * (i / 2)) * N + 2 * (lane % 4) + i % 2] = d[i];
    }
    v = warp_sum(v);
    if (lane == 0) sums[warp] = v;
    cluster_sync();
#pragma unroll
    for (int i = 0; i < 4; i++)
      theirs[i] += cluster_load(&product[(warp * 16 + lane / 4 + 8 * (i / 2)) * N + 2 * (lane % 4) + i % 2], next);
    all += cluster_load(&sums[warp], next);
    cluster_sync();
  }
#pragma unroll
  for (int i = 0; i < 4; i++)
    y[blockIdx.x * M * N + (warp * 16 + lane / 4 + 8 * (i / 2)) * N + 2 * (lane % 4) + i % 2] =
        mine[i] + theirs[i];
  if (lane == 0) totals[blockIdx.x * 4 + warp] = all;
}
