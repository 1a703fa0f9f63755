// Memory traffic whose cost is known. A line that ends in "// = name" has the costs that test_emulator.py
// gives under that name. One block of 64 threads, which is two warps.
#include "common.cuh"

struct Params {
  int n, x_stride, y_stride;
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from test_emulator.py");

extern "C" __global__ void traffic(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ __align__(128) float square[32][32], padded[32][33];
  __shared__ __align__(128) half_t rows32[32][32], rows40[32][40];
  const int i = threadIdx.x, lane = i % 32;
  float sum = x[i];  // = neighbours
  sum += x[i + 1];  // = shifted
  sum += x[2 * i];  // = every_second
  sum += x[8 * i];  // = a_sector_each
  sum += x[3];  // = the_same
  sum += load_pack<4>(x + 4 * i).v[0];  // = packs
  sum += load_once(reinterpret_cast<const float2*>(x) + i).y;  // = pairs
  sum += (float)reinterpret_cast<const unsigned char*>(x)[i];  // = bytes
  if (lane < 8) sum += x[i + 512];  // = eight_lanes
  for (int k = 0; k < (lane % 2 ? 3 : 2); k++) sum += x[32 * k + lane];  // = uneven_loop

  if (i < 32) {
    for (int k = 0; k < 32; k++) {
      square[k][lane] = x[k];  // = row
      padded[k][lane] = x[k];
      rows32[lane][k] = half_t{0};  // = half_column
      rows40[lane][k] = half_t{0};
    }
  }
  __syncthreads();
  sum += square[lane][5];  // = column
  sum += padded[lane][5];  // = padded_column
  sum += square[0][2 * lane % 32 + lane / 16];  // = two_in_turn
  sum += (&square[0][0])[2 * lane];  // = two_way
  sum += square[0][7];  // = broadcast
  sum += load_pack<4>(&square[lane / 8][lane % 8 * 4]).v[1];  // = shared_packs
  sum += load_pack<2>(&square[lane / 16][lane % 16 * 2]).v[1];  // = shared_pairs
  sum += load_pack<4>(&square[lane][0]).v[1];  // = shared_pack_column
  unsigned r[4], s[2];
  ldmatrix(r, shared_address(&rows40[lane % 16][lane / 16 * 8]));  // = ldmatrix_40
  ldmatrix(r, shared_address(&rows32[lane % 16][lane / 16 * 8]));  // = ldmatrix_32
  ldmatrix(s, shared_address(&rows40[lane % 16][0]));  // = ldmatrix_x2
  for (int k = 0; k < 3; k++) {
    __syncthreads();
    const bool column = k == p.n;  // 0, which the compiler does not know: it would split the loop
    const int at = column ? 32 * lane : 64 * k + lane;
    if (!column || lane % 2) sum += (&square[0][0])[at];  // = between_barriers
  }
  float d[4] = {};
  mma_m16n8k16_f16(d, r, s);
  y[i] = sum + d[0];  // = result
}
