// D = A B by one warpgroup: A is 64 x K, B is K x N, D is float. Constants: ELEMENT, N_SIZE, K_SIZE, SWIZZLE, and,
// in memory as in shared memory, A_MAJOR and B_MAJOR; with A_IN_REGISTERS, A is read from memory, K-major.
#include "common.cuh"
#include "ptx_sm90.cuh"

using T = ELEMENT;
constexpr int N = N_SIZE, K = K_SIZE;
constexpr Swizzle swizzle = (Swizzle)SWIZZLE;
constexpr int WIDTH = 16 << SWIZZLE;  // bytes of a line of a box
constexpr int K_STEP = 32 / sizeof(T);

// A matrix of `extent` times K elements in shared memory: boxes of WIDTH bytes along its contiguous dimension,
// one behind the other, each with all lines of the other dimension.
template <int EXTENT, Major MAJOR> struct Matrix {
  static constexpr int LINES = MAJOR == K_MAJOR ? EXTENT : K;
  static constexpr int BOX = LINES * WIDTH;
  static constexpr int BOXES = ceil_div((MAJOR == K_MAJOR ? K : EXTENT) * sizeof(T), WIDTH);
  static constexpr int BYTES = BOX * BOXES;

  DEVICE void load(unsigned to, const TensorMap& map, unsigned barrier) {
    for (int i = 0; i < BOXES; i++) tma_load(to + i * BOX, map, barrier, i * WIDTH / (int)sizeof(T), 0);
  }

  // The part of it that multiplication `step` takes.
  DEVICE unsigned long long descriptor(unsigned at, int step) {
    if constexpr (MAJOR == MN_MAJOR) {
      const unsigned start = at + step * K_STEP * WIDTH;
      if constexpr (swizzle == SWIZZLE_NONE) return wgmma_descriptor(start, 8 * WIDTH, BOX, swizzle);
      else return wgmma_descriptor(start, BOX, 8 * WIDTH, swizzle);
    }
    const int from = step * 32;  // in bytes along K
    return wgmma_descriptor(at + from / WIDTH * BOX + from % WIDTH, BOX, 8 * WIDTH, swizzle);
  }
};
using A = Matrix<64, (Major)A_MAJOR>;
using B = Matrix<N, (Major)B_MAJOR>;

// Fragments of A for one multiplication, as ptx_sm90.cuh says where they go.
DEVICE void load_fragments(unsigned (&f)[4], const T* __restrict__ a, int step) {
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int r = row + 8 * (i % 2);
    const int k = step * K_STEP + (sizeof(T) == 2 ? 2 * q + 8 * (i / 2) : q + 4 * (i / 2));
    f[i] = *reinterpret_cast<const unsigned*>(a + r * K + k);
  }
}

extern "C" __global__ void __launch_bounds__(128) product(const T* __restrict__ a, const T* __restrict__ b,
                                                          float* __restrict__ y,
                                                          const __grid_constant__ TensorMap a_map,
                                                          const __grid_constant__ TensorMap b_map) {
  extern __shared__ __align__(1024) unsigned char tiles[];
  __shared__ Mbarrier m;
  const unsigned barrier = shared_address(&m), at_b = shared_address(tiles);
  const unsigned at_a = at_b + ceil_div(B::BYTES, 1024) * 1024;
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(barrier, B::BYTES + (A_IN_REGISTERS ? 0 : A::BYTES));
    B::load(at_b, b_map, barrier);
    if (!A_IN_REGISTERS) A::load(at_a, a_map, barrier);
  }
  __syncthreads();
  mbarrier_wait(barrier, 0);

  float d[N / 2];
#if A_IN_REGISTERS
  unsigned f[K / K_STEP][4];
#pragma unroll
  for (int step = 0; step < K / K_STEP; step++) load_fragments(f[step], a, step);
#endif
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < K / K_STEP; step++) {
#if A_IN_REGISTERS
    wgmma<T, (Major)B_MAJOR>(d, f[step], B::descriptor(at_b, step), step > 0);
#else
    wgmma<T, (Major)A_MAJOR, (Major)B_MAJOR>(d, A::descriptor(at_a, step), B::descriptor(at_b, step), step > 0);
#endif
  }
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_pin(d);
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < N / 2; i++) y[(row + 8 * (i / 2 % 2)) * N + 8 * (i / 4) + 2 * q + i % 2] = d[i];
}
