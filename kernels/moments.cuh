// Sums and moments (count, mean, M2 = sum of squared deviations) over the threads of a block, in a fixed order:
// the same input gives the same bits.
//
// Σx² - (Σx)²/M is lost when |mean| >> std. Values are therefore taken relative to one of them before they get
// here, means before deviations, and sets that were gathered apart are merged by Chan's formula, which has no
// cancellation.
#pragma once
#include "common.cuh"

// Values of scratch that `sum_neighbours<TO>` of n values needs in a block of BLOCK threads.
template <int TO, int BLOCK> DEVICE constexpr int neighbours_scratch(int n) { return TO <= 32 ? 1 : BLOCK / 32 * n; }

// Adds N values over teams of TO neighbouring threads, a power of two. Each of a team gets the same sums: an
// addition's bits do not depend on the order of its two operands. All threads must take part; scratch may be used
// again right after.
template <int TO, int BLOCK, class A, int N> DEVICE void sum_neighbours(A (&v)[N], A* scratch) {
#pragma unroll
  for (int apart = 1; apart < (TO < 32 ? TO : 32); apart *= 2) {
#pragma unroll
    for (int n = 0; n < N; n++) v[n] += __shfl_xor_sync(0xffffffffu, v[n], apart);
  }
  if constexpr (TO > 32) {
    constexpr int WARPS = TO / 32;  // of a team
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (lane == 0) {
#pragma unroll
      for (int n = 0; n < N; n++) scratch[n * (BLOCK / 32) + warp] = v[n];
    }
    __syncthreads();
    // A lane for each warp of the team, and a shuffle of them.
#pragma unroll
    for (int n = 0; n < N; n++) v[n] = scratch[n * (BLOCK / 32) + warp - warp % WARPS + lane % WARPS];
#pragma unroll
    for (int apart = 1; apart < WARPS; apart *= 2) {
#pragma unroll
      for (int n = 0; n < N; n++) v[n] += __shfl_xor_sync(0xffffffffu, v[n], apart);
    }
    __syncthreads();
  }
}

// Of N sums, how many a thread is left with when lanes C apart have divided them among themselves.
template <int C, bool HALVE = true> DEVICE constexpr int rows_kept(int n) {
  for (int rows = C < 32 ? 32 / C : 1; HALVE && rows > 1 && n % 2 == 0; rows /= 2) n /= 2;
  return n;
}
// Values of scratch that `sum_rows<C, BLOCK, HALVE>` of n values needs.
template <int C, int BLOCK, bool HALVE = true> DEVICE constexpr int rows_scratch(int n) {
  return C == BLOCK ? 1 : BLOCK * rows_kept<C, HALVE>(n);
}

// Adds N values over the threads whose indices are the same modulo C, a power of two: the rows of a block that is C
// threads wide. Calls use(n, column, sum) once for each sum, in some thread; neighbouring columns are neighbouring
// threads'. All threads must take part; they meet before it returns, and scratch may be used again right after.
//
// Rows of one warp halve the sums between them at each step while there is an even number: the lane of either half
// gives away what the other is to add. Not so without HALVE, which is for sums that a loop has gathered: the
// compiler would carry both outcomes of each lane's choice through that loop, in twice the registers. What is left
// of each warp is laid side by side in shared memory, word by lane, and so neither writing nor adding it has bank
// conflicts.
template <int C, int BLOCK, bool HALVE = true, class A, int N, class Use>
DEVICE void sum_rows(A (&v)[N], A* scratch, Use use) {
  if constexpr (C == BLOCK) {
#pragma unroll
    for (int n = 0; n < N; n++) use(n, (int)threadIdx.x, v[n]);
    __syncthreads();
  } else {
    constexpr int KEPT = rows_kept<C, HALVE>(N);
    constexpr int ABREAST = C < 32 ? C : 32;       // columns of a warp
    constexpr int SAME = 32 / ABREAST * KEPT / N;  // rows of a warp that are left with the same sums
    constexpr int ACROSS = C < 32 ? 1 : C / 32;    // warps side by side
    constexpr int WARPS = BLOCK / 32 / ACROSS;     // one above the other
    const int lane = threadIdx.x % 32;
    int kept = N;
#pragma unroll
    for (int apart = 16; apart >= C; apart /= 2) {
      if (HALVE && kept % 2 == 0) {
        kept /= 2;
        const bool upper = lane & apart;
#pragma unroll
        for (int n = 0; n < N / 2; n++) {
          if (n >= kept) break;
          const A own = upper ? v[n + kept] : v[n], other = upper ? v[n] : v[n + kept];
          v[n] = own + __shfl_xor_sync(0xffffffffu, other, apart);
        }
      } else {
#pragma unroll
        for (int n = 0; n < N; n++) {
          if (n < kept) v[n] += __shfl_xor_sync(0xffffffffu, v[n], apart);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < KEPT; n++) scratch[(threadIdx.x / 32 * KEPT + n) * 32 + lane] = v[n];
    __syncthreads();
    for (int word = threadIdx.x; word < ACROSS * KEPT * 32; word += BLOCK) {
      const int row = lane / ABREAST, n = row / SAME * KEPT + word / 32 % KEPT;
      if (row % SAME != 0) continue;
      A sum = A(0);
#pragma unroll 4
      for (int warp = 0; warp < WARPS; warp++) sum += scratch[warp * ACROSS * KEPT * 32 + word];
      use(n, word / 32 / KEPT * 32 + lane % ABREAST, sum);
    }
    __syncthreads();
  }
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
