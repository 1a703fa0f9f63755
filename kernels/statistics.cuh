// The moments of a convolution's channels, gathered while its results are in registers: batch norm in training can
// then begin with its second pass, and y is not read to find its mean and variance.
//
// A block that holds ROWS x COLUMNS results, its columns being channels, leaves (count, mean, M2) of each of its
// columns in  parts[part][3][channels],  where `part` numbers the blocks that share the columns. merge_moments then
// merges the parts of a channel by Chan's formula (moments.cuh). Everything has a fixed order: the same input gives
// the same bits. A part costs 12 bytes a column beside the ROWS results that the block writes there.
#pragma once
#include "moments.cuh"

// The first `columns` columns' moments from those of ROW_THREADS threads that each hold some of their rows. `part`
// points to the first column's count. The pitch of the scratch should be odd.
template <int THREADS, class A, int ROW_THREADS, int PITCH>
DEVICE void store_moments(A* part, const A (&counts)[ROW_THREADS], const A (&means)[ROW_THREADS][PITCH],
                          const A (&m2s)[ROW_THREADS][PITCH], int columns, int channels) {
  for (int c = threadIdx.x; c < columns; c += THREADS) {
    Moments<A> all{A(0), A(0), A(0)};
    for (int row = 0; row < ROW_THREADS; row++) all.merge(counts[row], means[row][c], m2s[row][c]);
    part[c] = all.count;
    part[channels + c] = all.mean;
    part[2 * channels + c] = all.m2;
  }
}

// A block merges 32 channels, its warps sharing their parts.
constexpr int MERGE_THREADS = 256;

template <class A>
DEVICE void merge_moments(const A* __restrict__ parts, int count, int channels, A* __restrict__ mean,
                          A* __restrict__ var) {
  constexpr int ROWS = MERGE_THREADS / 32;
  __shared__ A scratch[3][ROWS][32];
  const int lane = (int)threadIdx.x % 32, row = (int)threadIdx.x / 32, c = (int)blockIdx.x * 32 + lane;
  Moments<A> all{A(0), A(0), A(0)};
  if (c < channels) {
#pragma unroll 4
    for (int i = row; i < count; i += ROWS) {
      const A* part = parts + (long long)i * 3 * channels + c;
      all.merge(part[0], part[channels], part[2 * channels]);
    }
  }
  scratch[0][row][lane] = all.count;
  scratch[1][row][lane] = all.mean;
  scratch[2][row][lane] = all.m2;
  __syncthreads();
  if (row != 0 || c >= channels) return;
  for (int r = 1; r < ROWS; r++) all.merge(scratch[0][r][lane], scratch[1][r][lane], scratch[2][r][lane]);
  mean[c] = all.mean;
  var[c] = all.m2 / all.count;
}
