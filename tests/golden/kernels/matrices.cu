// ldmatrix and stmatrix: one warp a block. COUNT matrices, TRANSPOSED or not. A block's tile has 64 rows of 8
// elements, 24 elements apart so that rows are no neighbours; `rows` tells which row each lane names.
#include "golden.cuh"

constexpr int TILE_ROWS = 64, TILE_STRIDE = 24;

extern "C" __global__ void load_matrices(const unsigned short* __restrict__ x, const int* __restrict__ rows,
                                         unsigned* __restrict__ registers, Params p) {
  __shared__ __align__(16) unsigned short tile[TILE_ROWS][TILE_STRIDE];
  const int lane = threadIdx.x;
  for (int i = lane; i < TILE_ROWS * 8; i += 32) tile[i / 8][i % 8] = x[blockIdx.x * TILE_ROWS * 8 + i];
  __syncthreads();
  unsigned r[COUNT];
  const unsigned row = shared_address(tile[rows[blockIdx.x * 32 + lane]]);
  if (TRANSPOSED) ldmatrix_trans(r, row);
  else ldmatrix(r, row);
#pragma unroll
  for (int j = 0; j < COUNT; j++) registers[(blockIdx.x * 32 + lane) * COUNT + j] = r[j];
}

#if defined(EMULATOR) || __CUDA_ARCH__ >= 900
extern "C" __global__ void store_matrices(const unsigned* __restrict__ registers, const int* __restrict__ rows,
                                          unsigned short* __restrict__ y, Params p) {
  __shared__ __align__(16) unsigned short tile[TILE_ROWS][TILE_STRIDE];
  const int lane = threadIdx.x;
  for (int i = lane; i < TILE_ROWS * 8; i += 32) tile[i / 8][i % 8] = 0;
  __syncthreads();
  unsigned r[COUNT];
#pragma unroll
  for (int j = 0; j < COUNT; j++) r[j] = registers[(blockIdx.x * 32 + lane) * COUNT + j];
  const unsigned row = shared_address(tile[rows[blockIdx.x * 32 + lane]]);
  if (TRANSPOSED) stmatrix_trans(row, r);
  else stmatrix(row, r);
  __syncthreads();
  for (int i = lane; i < TILE_ROWS * 8; i += 32) y[blockIdx.x * TILE_ROWS * 8 + i] = tile[i / 8][i % 8];
}
#endif
