// One box of a tensor through shared memory by TMA. Constants: ELEMENT, RANK, SWIZZLE, IM2COL.
#include "ptx_sm90.cuh"

using T = ELEMENT;
struct Params {
  int from[5], to[5];  // coordinates, innermost first
  int offsets[3];      // im2col
  int bytes;           // of the box
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from test_emulator_async.py");

extern __shared__ __align__(1024) unsigned char tile[];

// Loads the box into `tile`; returns when all threads may read it.
DEVICE void load(const TensorMap& map, const Params& p) {
  __shared__ Mbarrier m;
  const unsigned barrier = shared_address(&m), to = shared_address(tile);
  const int* c = p.from;
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
    tma_prefetch(map);
    mbarrier_arrive_expect_tx(barrier, p.bytes);
#if IM2COL
    const int* o = p.offsets;
    if constexpr (RANK == 3) tma_load_im2col(to, map, barrier, c[0], c[1], c[2], o[0]);
    if constexpr (RANK == 4) tma_load_im2col(to, map, barrier, c[0], c[1], c[2], c[3], o[0], o[1]);
    if constexpr (RANK == 5) tma_load_im2col(to, map, barrier, c[0], c[1], c[2], c[3], c[4], o[0], o[1], o[2]);
#else
    if constexpr (RANK == 2) tma_load(to, map, barrier, c[0], c[1]);
    if constexpr (RANK == 3) tma_load(to, map, barrier, c[0], c[1], c[2]);
    if constexpr (RANK == 4) tma_load(to, map, barrier, c[0], c[1], c[2], c[3]);
    if constexpr (RANK == 5) tma_load(to, map, barrier, c[0], c[1], c[2], c[3], c[4]);
#endif
  }
  __syncthreads();
  mbarrier_wait(barrier, 0);
}

// y = the box, in the order of its elements.
extern "C" __global__ void load_box(const T* __restrict__ x, T* __restrict__ y,
                                    const __grid_constant__ TensorMap map, Params p) {
  load(map, p);
  const unsigned start = shared_address(tile);
  for (int i = threadIdx.x * 16; i < p.bytes; i += blockDim.x * 16) {
    const unsigned at = swizzled(start + i, (Swizzle)SWIZZLE) - start;
    *reinterpret_cast<uint4*>(reinterpret_cast<unsigned char*>(y) + i) = *reinterpret_cast<const uint4*>(tile + at);
  }
}

#if !IM2COL
// Copies the box from x to y.
extern "C" __global__ void copy_box(const T* __restrict__ x, T* __restrict__ y,
                                    const __grid_constant__ TensorMap x_map,
                                    const __grid_constant__ TensorMap y_map, Params p) {
  load(x_map, p);
  const unsigned from = shared_address(tile);
  const int* c = p.to;
  if (threadIdx.x == 0) {
    if constexpr (RANK == 2) tma_store(y_map, from, c[0], c[1]);
    if constexpr (RANK == 3) tma_store(y_map, from, c[0], c[1], c[2]);
    if constexpr (RANK == 4) tma_store(y_map, from, c[0], c[1], c[2], c[3]);
    if constexpr (RANK == 5) tma_store(y_map, from, c[0], c[1], c[2], c[3], c[4]);
    bulk_commit();
    bulk_wait_read<0>();
  }
}

// y = x, by plain bulk copies of 1 KiB, two of them under way.
extern "C" __global__ void copy_bytes(const T* __restrict__ x, T* __restrict__ y, Params p) {
  __shared__ Mbarrier m[2];
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; i++) mbarrier_init(shared_address(&m[i]), 1);
    fence_mbarrier_init();
    for (int i = 0; i * 1024 < p.bytes; i++) {
      const unsigned at = shared_address(tile) + i % 2 * 1024, barrier = shared_address(&m[i % 2]);
      const unsigned bytes = min(1024, p.bytes - i * 1024);
      bulk_wait_read<1>();
      mbarrier_arrive_expect_tx(barrier, bytes);
      bulk_load(at, x + i * (1024 / sizeof(T)), bytes, barrier);
      mbarrier_wait(barrier, i / 2 % 2);
      bulk_store(y + i * (1024 / sizeof(T)), at, bytes);
      bulk_commit();
    }
    bulk_wait<0>();
  }
}
#endif
