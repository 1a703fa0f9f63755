// Tiles that the blocks of a cluster load for each other, through a ring: each block loads one share of a tile for
// all; a slot is loaded anew when all blocks have given it back, to every producer. One thread of a block loads,
// another one stores the tile to y. Correct for every CLUSTER, and every map of three to five dimensions.
#include "ptx_cluster.cuh"
#include "ptx_sm90.cuh"

struct Params {
  int rounds;       // tiles of a cluster
  int dims;         // of x_map, if that is one for im2col; 0: it is one for tiles, of three dimensions
  int rows, bytes;  // of a share
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from cluster_items.py");

constexpr int STAGES = 2;
constexpr unsigned short ALL_RANKS = (1 << CLUSTER) - 1;
extern __shared__ __align__(1024) unsigned char tiles[];  // STAGES tiles of CLUSTER shares

// `at`: five coordinates and three offsets, innermost first.
DEVICE void load_share(unsigned share, const TensorMap& map, unsigned full, const int* at, int dims) {
  int c[5];
  unsigned short o[3];
  for (int i = 0; i < 5; i++) c[i] = at[i];
  for (int i = 0; i < 3; i++) o[i] = (unsigned short)at[5 + i];
  if (dims == 0) tma_load_multicast(share, map, full, c[0], c[1], c[2], ALL_RANKS);
  if (dims == 3) tma_load_im2col_multicast(share, map, full, c[0], c[1], c[2], o[0], ALL_RANKS);
  if (dims == 4) tma_load_im2col_multicast(share, map, full, c[0], c[1], c[2], c[3], o[0], o[1], ALL_RANKS);
  if (dims == 5)
    tma_load_im2col_multicast(share, map, full, c[0], c[1], c[2], c[3], c[4], o[0], o[1], o[2], ALL_RANKS);
}

// y: blocks x rounds x shares x rows; at: clusters x rounds x shares x 8.
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(64)
    share_tiles(const ELEMENT* __restrict__ x, const int* __restrict__ at, ELEMENT* __restrict__ y,
                const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap y_map, Params p) {
  __shared__ Mbarrier full[STAGES], empty[STAGES];
  const int rank = cluster_rank();
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      mbarrier_init(shared_address(&full[i]), 1);
      mbarrier_init(shared_address(&empty[i]), CLUSTER);
    }
    fence_mbarrier_init();
  }
  cluster_sync();
  for (int round = 0; round < p.rounds; round++) {
    const int slot = round % STAGES, parity = round / STAGES & 1;
    const unsigned tile = shared_address(tiles) + slot * CLUSTER * p.bytes;
    const unsigned filled = shared_address(&full[slot]), free = shared_address(&empty[slot]);
    if (threadIdx.x == 0) {
      mbarrier_wait_cluster(free, parity ^ 1);
      mbarrier_arrive_expect_tx(filled, CLUSTER * p.bytes);
      load_share(tile + rank * p.bytes, x_map, filled,
                 at + 8 * ((blockIdx.x / CLUSTER * p.rounds + round) * CLUSTER + rank), p.dims);
    }
    if (threadIdx.x == 32) {
      mbarrier_wait(filled, parity);
      for (int share = 0; share < CLUSTER; share++)
        tma_store(y_map, tile + share * p.bytes, 0,
                  ((blockIdx.x * p.rounds + round) * CLUSTER + share) * p.rows);
      bulk_commit();
      bulk_wait_read<0>();
      for (int to = 0; to < CLUSTER; to++) mbarrier_arrive_at(free, to);
    }
  }
  __syncwarp();
  cluster_sync();  // the loads and arrivals of the other blocks have come
}
