// What clusters are for: blocks that add up, pass on, and gather what lies in each other's shared memory. Correct
// for every CLUSTER, and every number of threads a block.
#include "common.cuh"
#include "ptx_cluster.cuh"

struct Params {
  int n;       // elements of x and y a block
  int rounds;  // of pass_on
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from test_emulator_cluster.py");

using T = ELEMENT;

#define ENTRY(name) extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) name

DEVICE int thread_id() { return threadIdx.y * blockDim.x + threadIdx.x; }
DEVICE int threads() { return blockDim.x * blockDim.y; }
DEVICE unsigned block_id() { return (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x; }

// Per block: its rank, the size of its cluster.
ENTRY(who)(int* __restrict__ rank, int* __restrict__ blocks, const Params) {
  if (thread_id() == 0) {
    rank[block_id()] = cluster_rank();
    blocks[block_id()] = cluster_blocks();
  }
}

// y[block] = the sum of x over all blocks of its cluster, in the order of their ranks.
ENTRY(sum)(const T* __restrict__ x, T* __restrict__ y, const Params p) {
  __shared__ T partial[1024];
  __shared__ T total;
  T v = T(0);
  for (int i = thread_id(); i < p.n; i += threads()) v += x[block_id() * p.n + i];
  partial[thread_id()] = v;
  __syncthreads();
  if (thread_id() == 0) {
    total = T(0);
    for (int i = 0; i < threads(); i++) total += partial[i];
  }
  cluster_sync();
  if (thread_id() == 0) {
    T all = T(0);
    for (unsigned rank = 0; rank < cluster_blocks(); rank++) all += cluster_load(&total, rank);
    y[block_id()] = all;
  }
  cluster_sync();
}

// Each block's n elements go round the cluster: y of a block are those that began `rounds` ranks before it.
ENTRY(pass_on)(const T* __restrict__ x, T* __restrict__ y, const Params p) {
  extern __shared__ __align__(16) unsigned char dynamic[];
  T* buffers = reinterpret_cast<T*>(dynamic);
  for (int i = thread_id(); i < p.n; i += threads()) buffers[i] = x[block_id() * p.n + i];
  cluster_sync();
  const unsigned next = (cluster_rank() + 1) % cluster_blocks();
  for (int round = 0; round < p.rounds; round++) {
    const T* from = buffers + round % 2 * p.n;
    T* to = buffers + (round + 1) % 2 * p.n;
    for (int i = thread_id(); i < p.n; i += threads()) cluster_store(&to[i], next, from[i]);
    cluster_sync();
  }
  for (int i = thread_id(); i < p.n; i += threads()) y[block_id() * p.n + i] = buffers[p.rounds % 2 * p.n + i];
}

// The histogram of the cluster's x, whose values are 0 to 63: each block counts its own elements, then gathers its
// share of the bins from all: its own counts before it waits for the others.
ENTRY(histogram)(const int* __restrict__ x, int* __restrict__ y, const Params p) {
  __shared__ int bins[64], own[64];
  for (int i = thread_id(); i < 64; i += threads()) bins[i] = 0;
  __syncthreads();
  for (int i = thread_id(); i < p.n; i += threads()) atomicAdd(&bins[x[block_id() * p.n + i]], 1);
  cluster_arrive();
  __syncthreads();
  const int share = 64 / cluster_blocks(), first = cluster_rank() * share, cluster = block_id() / cluster_blocks();
  for (int i = thread_id(); i < share; i += threads()) own[i] = bins[first + i];
  cluster_wait();
  for (int i = thread_id(); i < share; i += threads()) {
    int count = own[i];
    for (unsigned rank = 0; rank < cluster_blocks(); rank++)
      if (rank != cluster_rank()) count += cluster_load(&bins[first + i], rank);
    y[cluster * 64 + first + i] = count;
  }
  cluster_sync();
}

// The cluster barrier orders the threads of a block among themselves, too.
ENTRY(reverse)(const T* __restrict__ x, T* __restrict__ y, const Params p) {
  __shared__ T tile[1024];
  const int i = thread_id();
  tile[i] = x[block_id() * threads() + i];
  cluster_sync();
  const T v = tile[threads() - 1 - i];
  cluster_sync();
  tile[i] = v;
  cluster_arrive();
  cluster_wait();
  y[block_id() * threads() + i] = tile[(i + 33) % threads()];
}

// Every second block writes the result of its neighbour, through global memory.
ENTRY(hand_over)(const T* __restrict__ x, T* __restrict__ y, const Params) {
  const int i = block_id() * threads() + thread_id();
  y[i] = x[i];
  cluster_sync();
  if (cluster_rank() % 2 == 0)
    for (unsigned k = 0; k < (cluster_blocks() > 1 ? 2 : 1); k++) y[i + k * threads()] += T(1);
}

// Which block came when.
ENTRY(queue)(int* __restrict__ turn, int* __restrict__ count, const Params) {
  if (thread_id() == 0) turn[block_id()] = atomicAdd(count, 1);
}
