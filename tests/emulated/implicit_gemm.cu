// A convolution as Hopper likes it, in the small: y = conv(x, w) as a product of 64 output pixels x 64 filters a
// block, over R S C in steps of one filter tap and 64 channels. Warp 0 loads by TMA (im2col for x), STAGES tiles
// ahead; warps 4 to 7 multiply. x is N H W C, w is K R S C, both half_t; y is N P Q K, float.
// With BUG = 1 the consumers give a stage back before the multiplication has read it.
#include "common.cuh"
#include "ptx_sm90.cuh"

struct Params {
  int N, P, Q, C, K, R, S, stride, padding, dilation;
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from test_emulator_async.py");

constexpr int M_TILE = 64, N_TILE = 64, K_TILE = 64;
constexpr unsigned TILE_BYTES = 64 * K_TILE * sizeof(half_t);  // of x and of w

#define METHOD __device__ __forceinline__
struct Ring {
  unsigned tiles, full, empty;  // shared addresses
  int stage = 0;
  unsigned parity = 0;  // of the round that the stage is in

  METHOD unsigned x_tile() const { return tiles + stage * 2 * TILE_BYTES; }
  METHOD unsigned w_tile() const { return x_tile() + TILE_BYTES; }
  METHOD unsigned full_barrier() const { return full + stage * (unsigned)sizeof(Mbarrier); }
  METHOD unsigned empty_barrier() const { return empty + stage * (unsigned)sizeof(Mbarrier); }
  METHOD void advance() {
    if (++stage < STAGES) return;
    stage = 0;
    parity ^= 1;
  }
};

DEVICE void produce(Ring ring, const TensorMap& x_map, const TensorMap& w_map, const Params& p) {
  const int first = blockIdx.x * M_TILE, n = first / (p.P * p.Q), z = first % (p.P * p.Q);
  const int h = z / p.Q * p.stride - p.padding, w = z % p.Q * p.stride - p.padding;
  for (int rs = 0; rs < p.R * p.S; rs++)
    for (int c = 0; c < p.C; c += K_TILE) {
      const int s = rs % p.S * p.dilation, r = rs / p.S * p.dilation;
      const unsigned full = ring.full_barrier();
      mbarrier_wait(ring.empty_barrier(), ring.parity ^ 1);
      mbarrier_arrive_expect_tx(full, 2 * TILE_BYTES);
      tma_load_im2col(ring.x_tile(), x_map, full, c, w, h, n, s, r);
      tma_load(ring.w_tile(), w_map, full, c, rs, blockIdx.y * N_TILE);
      ring.advance();
    }
}

DEVICE void consume(Ring ring, float* __restrict__ y, const Params& p) {
  float d[N_TILE / 2];
  const int steps = p.R * p.S * ceil_div(p.C, K_TILE), thread = threadIdx.x % 128;
  for (int step = 0; step < steps; step++) {
    mbarrier_wait(ring.full_barrier(), ring.parity);
    wgmma_pin(d);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < K_TILE; k += 16)
      wgmma<half_t>(d, wgmma_descriptor(ring.x_tile() + k * 2, 0, 1024, SWIZZLE_128B),
                    wgmma_descriptor(ring.w_tile() + k * 2, 0, 1024, SWIZZLE_128B), step + k > 0);
    wgmma_commit();
    if (BUG && thread == 0) mbarrier_arrive(ring.empty_barrier());
    wgmma_wait<0>();
    wgmma_pin(d);
    if (!BUG && thread == 0) mbarrier_arrive(ring.empty_barrier());
    ring.advance();
  }
  const int row = blockIdx.x * M_TILE + thread / 32 * 16 + thread % 32 / 4;
  const int column = blockIdx.y * N_TILE + 2 * (thread % 4);
#pragma unroll
  for (int i = 0; i < N_TILE / 2; i++) {
    const int m = row + 8 * (i / 2 % 2), k = column + 8 * (i / 4) + i % 2;
    if (m < p.N * p.P * p.Q && k < p.K) y[(long long)m * p.K + k] = d[i];
  }
}

extern "C" __global__ void __launch_bounds__(256, 1)
convolution(const half_t* __restrict__ x, const half_t* __restrict__ w, float* __restrict__ y,
            const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, Params p) {
  extern __shared__ __align__(1024) unsigned char tiles[];
  __shared__ Mbarrier full[STAGES], empty[STAGES];
  const Ring ring{shared_address(tiles), shared_address(full), shared_address(empty)};
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      mbarrier_init(shared_address(&full[i]), 1);
      mbarrier_init(shared_address(&empty[i]), 1);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    setmaxnreg_dec<24>();
    if (threadIdx.x < 32 && elect_one()) produce(ring, x_map, w_map, p);
  } else {
    setmaxnreg_inc<240>();
    consume(ring, y, p);
  }
}
