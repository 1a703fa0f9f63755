// What blocks that multiply on tensor cores share: mma.sync for an element type, a warp's way from its sums to runs of
// memory, and their columns' moments.
#pragma once
#include "epilogue.cuh"
#include "moments.cuh"

DEVICE void multiply_add(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], half_t) {
  mma_m16n8k16_f16(d, a, b);
}
DEVICE void multiply_add(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], bfloat_t) {
  mma_m16n8k16_bf16(d, a, b);
}
DEVICE void multiply_add(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], float) {
  mma_m16n8k8_tf32(d, a, b);
}

// The slab through which the sums of a warp, WM rows x WN columns, become packs of SV neighbours in memory: of 16 rows,
// or of 8 columns where memory runs ALONG_ROWS. Where a lane takes eight floats, in two accesses, the line's even
// quarters of 16 bytes lie in its first half and the odd ones in its second, so that the lanes of either access are
// neighbours.
template <int WM, int WN, int SV, bool ALONG_ROWS> struct Slab {
  static constexpr int LINE = ALONG_ROWS ? WM : WN, LINES = ALONG_ROWS ? 8 : 16;
  static constexpr bool HALVED = SV == 8 && LINE > 8;
  static constexpr int PITCH = ALONG_ROWS ? LINE + 4 : LINE == 8 ? 8 : ceil_div(LINE + 4 - 8, 32) * 32 + 8;
  static constexpr int FLOATS = LINES * PITCH;
  static constexpr int PACKS = LINE / SV, TOGETHER = PACKS < 8 ? 8 / PACKS : 1;
  static constexpr int APART = TOGETHER == 1 || PACKS == 1 ? 1 : ALONG_ROWS ? PACKS : PACKS / 2;
  static constexpr int ROUNDS = ALONG_ROWS ? WN / 8 : WM / 16;
  static_assert(LINE % SV == 0, "packs fill a line");

  // The line that a pack is of, where PACKS make one up: eight lanes read packs of lines that begin on different banks.
  DEVICE int line_of(int pack) {
    const int line = pack / PACKS;
    return !HALVED ? line
                   : line / (TOGETHER * APART) * (TOGETHER * APART) + line % TOGETHER * APART + line / TOGETHER % APART;
  }
  DEVICE int in_line(int line, int at) {
    if (SV == 8 && LINE == 8) return at ^ line / 4 % 2 * 4;  // of every eight lines, four change their quarters
    return !HALVED ? at : at / 8 * 4 + at % 4 + (at / 4 % 2 ? LINE / 2 + 4 : 0);
  }

  // Calls use(row, column, z) for each pack of the warp's sums, which run from (row, column) on in `z`. `floats` is the
  // warp's own shared memory. All lanes take part.
  template <class Use>
  DEVICE void write(float* floats, const float (&sums)[WM / 16][WN / 8][4], Use use) {
    const int lane = (int)threadIdx.x % 32;
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
      if constexpr (ALONG_ROWS) {
#pragma unroll
        for (int i = 0; i < WM / 16; i++)
#pragma unroll
          for (int v = 0; v < 4; v++) {
            const int line = lane % 4 * 2 + v % 2;
            floats[line * PITCH + in_line(line, i * 16 + lane / 4 + v / 2 * 8)] = sums[i][round][v];
          }
      } else {
#pragma unroll
        for (int j = 0; j < WN / 8; j++)
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const int line = lane / 4 + half * 8;
            const Pack<float, 2> two{sums[round][j][half * 2], sums[round][j][half * 2 + 1]};
            store_pack(floats + line * PITCH + in_line(line, j * 8 + lane % 4 * 2), two);
          }
      }
      __syncwarp();
#pragma unroll
      for (int pack = lane; pack < LINES * PACKS; pack += 32) {
        const int line = line_of(pack), along = pack % PACKS * SV;
        float z[SV];
        constexpr int W = SV < 4 ? SV : 4;
#pragma unroll
        for (int v = 0; v < SV; v += W) {
          const Pack<float, W> few = load_pack<W>(floats + line * PITCH + in_line(line, along + v));
#pragma unroll
          for (int u = 0; u < W; u++) z[v + u] = few.v[u];
        }
        use(ALONG_ROWS ? along : round * 16 + line, ALONG_ROWS ? round * 8 + line : along, z);
      }
      __syncwarp();
    }
  }
};

// The moments of one column of a warp's sums, which lie as mma's do: lanes that are 4, 8 or 16 apart hold other rows of
// it, ROWS each. value(r) is a sum, exists(r) whether it counts; of the values as they are stored, in T. All lanes take
// part, and have the result.
template <class T, int ROWS, class Value, class Exists>
DEVICE Moments<float> column_moments(Value value, Exists exists) {
  float count = 0, mean = 0, m2 = 0;
#pragma unroll
  for (int r = 0; r < ROWS; r++) count += exists(r) ? 1.f : 0.f;
#pragma unroll
  for (int pass = 0; pass < 2; pass++) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const float v = convert<float>(convert<T>(value(r))), d = v - mean;
      if (pass == 0) mean += exists(r) ? v : 0.f;
      else m2 += exists(r) ? d * d : 0.f;
    }
    if (pass == 0) mean *= count > 0 ? 1 / count : 0.f;
  }
  Moments<float> all{count, mean, m2};
#pragma unroll
  for (int apart = 4; apart < 32; apart *= 2) {
    const float n = __shfl_xor_sync(0xffffffffu, all.count, apart);
    const float other_mean = __shfl_xor_sync(0xffffffffu, all.mean, apart);
    const float other_m2 = __shfl_xor_sync(0xffffffffu, all.m2, apart);
    all.merge(n, other_mean, other_m2);
  }
  return all;
}
