// Sums and moments (count, mean, M2 = sum of squared deviations) over the threads of a block, in a fixed order:
// the same input gives the same bits.
//
// Σx² - (Σx)²/M is lost when |mean| >> std. Values are therefore taken relative to one of them before they get
// here, means before deviations, and sets that were gathered apart are merged by Chan's formula, which has no
// cancellation.
#pragma once
#include "common.cuh"

// Values of scratch that `sum_threads<FROM, TO>` of n values needs in a block of BLOCK threads.
template <int FROM, int TO, int BLOCK> DEVICE constexpr int scratch_size(int n) {
  return TO <= 32 ? 1 : BLOCK / 32 * (FROM < 32 ? FROM : 32) * n;
}

// Adds N values over the threads whose indices differ in the bits from FROM to TO only, so over threads FROM
// apart: FROM is a power of two, TO too or the block's size. Each of them gets the same sums: an addition's
// bits do not depend on the order of its two operands. All threads must take part; scratch may be used again
// right after.
template <int FROM, int TO, class A, int N> DEVICE void sum_threads(A (&v)[N], A* scratch) {
#pragma unroll
  for (int apart = FROM; apart < (TO < 32 ? TO : 32); apart *= 2) {
#pragma unroll
    for (int n = 0; n < N; n++) v[n] += __shfl_xor_sync(0xffffffffu, v[n], apart);
  }
  if (TO <= 32 || FROM == TO) return;
  constexpr int KEPT = FROM < 32 ? FROM : 32;                // sums of a warp
  constexpr int APART = FROM < 32 ? 1 : FROM / 32;           // from warp to warp of one sum
  constexpr int WARPS = TO < 32 * APART ? 1 : TO / 32 / APART;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (lane < KEPT) {
#pragma unroll
    for (int n = 0; n < N; n++) scratch[(warp * KEPT + lane) * N + n] = v[n];
  }
  __syncthreads();
  const int first = warp - warp % (WARPS * APART) + warp % APART;
#pragma unroll
  for (int n = 0; n < N; n++) {
    v[n] = A(0);
#pragma unroll 1
    for (int w = 0; w < WARPS; w++) v[n] += scratch[((first + w * APART) * KEPT + lane % KEPT) * N + n];
  }
  __syncthreads();
}

template <class A> struct Moments {
  A count, mean, m2;
  // Chan, Golub and LeVeque (1979): the moments of two sets taken together.
  __device__ __forceinline__ void merge(A other_count, A other_mean, A other_m2) {
    const A total = count + other_count, weight = total > A(0) ? other_count / total : A(0);
    const A delta = other_mean - mean;
    mean += delta * weight;
    m2 += other_m2 + delta * delta * (count * weight);
    count = total;
  }
  // Over a warp; the result is the first lane's, elsewhere operands come in another order.
  __device__ __forceinline__ void merge_warp() {
#pragma unroll
    for (int apart = 1; apart < 32; apart *= 2) {
      const A other_count = __shfl_xor_sync(0xffffffffu, count, apart);
      const A other_mean = __shfl_xor_sync(0xffffffffu, mean, apart);
      const A other_m2 = __shfl_xor_sync(0xffffffffu, m2, apart);
      merge(other_count, other_mean, other_m2);
    }
  }
};
