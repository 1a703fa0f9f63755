// Matrices of a warp: ldmatrix, stmatrix and mma. kernels/ptx.cuh states the rules that these follow.
//
// Rows are read and written by the lanes that name them, in their own name: ldmatrix reads before the lanes
// meet, stmatrix writes after they have met. So a fault is that of the lane whose address is wrong, and a
// racing row is found as a racing access of 16 bytes is.
#include <cmath>
#include <cstring>

#include "collectives.h"
#include "elements.h"
#include "memory.h"
#include "state.h"

namespace emulator {

namespace {

constexpr int SIDE = 8;  // of the matrices that ldmatrix moves, in elements
constexpr int ROW_BYTES = SIDE * 2;
using Row = uint16_t[SIDE];

// ---- ldmatrix and stmatrix ------------------------------------------------------------------------------
struct MatrixLane {
  int count;
  bool transposed;
  Row row;  // the one that this lane names
  uint32_t registers[4];
};

// Visits every register half of every matrix: half h of register j of a lane, and the element it stands for.
template <class Visit>
void each_element(void* const (&lanes)[WARP], Visit visit) {
  const MatrixLane& first = *(const MatrixLane*)lanes[0];
  for (int j = 0; j < first.count; j++)
    for (int l = 0; l < (int)WARP; l++)
      for (int h = 0; h < 2; h++) {
        const int along = 2 * (l % 4) + h, across = l / 4;
        const int row = first.transposed ? along : across, column = first.transposed ? across : along;
        MatrixLane &holder = *(MatrixLane*)lanes[l], &owner = *(MatrixLane*)lanes[SIDE * j + row];
        visit(holder.registers[j], 16 * h, owner.row[column]);
      }
}

const WarpOperation LOAD_MATRICES{"ldmatrix", [](void* const (&lanes)[WARP], uint32_t) {
  each_element(lanes, [](uint32_t& pair, int shift, const uint16_t& element) {
    pair = (pair & ~(0xffffu << shift)) | (uint32_t)element << shift;
  });
}};

const WarpOperation STORE_MATRICES{"stmatrix", [](void* const (&lanes)[WARP], uint32_t) {
  each_element(lanes, [](const uint32_t& pair, int shift, uint16_t& element) {
    element = (uint16_t)(pair >> shift);
  });
}};

// ---- mma ------------------------------------------------------------------------------------------------
struct MmaLane {
  float* d;
  const uint32_t *a, *b;
};

// Element h of the one or two in a register.
float half_of(uint32_t pair, int h) { return float_of_half((uint16_t)(pair >> 16 * h)); }
float bfloat_of(uint32_t pair, int h) { return float_of_bfloat((uint16_t)(pair >> 16 * h)); }
float tf32_of(uint32_t bits, int) { return float_of_tf32(bits); }

// D += A B with M = 16, N = 8. PACKED elements share a register of A or B, which `element` takes apart.
template <int K, int PACKED, float (*element)(uint32_t, int)>
void multiply(void* const (&lanes)[WARP], uint32_t) {
  float a[16][K], b[K][8], d[16][8];
  auto row_of_d = [](int l, int i) { return l / 4 + 8 * (i / 2); };
  auto column_of_d = [](int l, int i) { return 2 * (l % 4) + i % 2; };
  for (int l = 0; l < (int)WARP; l++) {
    const MmaLane& lane = *(const MmaLane*)lanes[l];
    const int g = l / 4, t = l % 4;
    for (int h = 0; h < PACKED; h++) {
      for (int i = 0; i < 4; i++) a[g + 8 * (i % 2)][PACKED * (t + 4 * (i / 2)) + h] = element(lane.a[i], h);
      for (int i = 0; i < 2; i++) b[PACKED * (t + 4 * i) + h][g] = element(lane.b[i], h);
    }
    for (int i = 0; i < 4; i++) d[row_of_d(l, i)][column_of_d(l, i)] = lane.d[i];
  }
  for (int m = 0; m < 16; m++)
    for (int k = 0; k < K; k++)
      for (int n = 0; n < 8; n++) d[m][n] = std::fma(a[m][k], b[k][n], d[m][n]);
  for (int l = 0; l < (int)WARP; l++)
    for (int i = 0; i < 4; i++) ((MmaLane*)lanes[l])->d[i] = d[row_of_d(l, i)][column_of_d(l, i)];
  launch.counters.mma_instructions++;
}

const WarpOperation MMA[] = {  // by EmulatorMma
    {"mma.m16n8k16.f16", multiply<16, 2, half_of>},
    {"mma.m16n8k16.bf16", multiply<16, 2, bfloat_of>},
    {"mma.m16n8k8.tf32", multiply<8, 1, tf32_of>},
};

struct DoubleLane {
  double *d, a, b;
};

// M = N = 8, K = 4: lane 4 g + t holds A[g][t], B[t][g], D[g][2 t] and D[g][2 t + 1].
const WarpOperation MMA_F64{"mma.m8n8k4.f64", [](void* const (&lanes)[WARP], uint32_t) {
  auto lane = [&](int g, int t) -> DoubleLane& { return *(DoubleLane*)lanes[4 * g + t]; };
  for (int m = 0; m < 8; m++)
    for (int n = 0; n < 8; n++) {
      double& d = lane(m, n / 2).d[n % 2];
      for (int k = 0; k < 4; k++) d = std::fma(lane(m, k).a, lane(n, k).b, d);
    }
  launch.counters.mma_instructions++;
}};

}  // namespace

}  // namespace emulator

using namespace emulator;

#pragma GCC visibility push(default)
extern "C" {

void emulator_ldmatrix(unsigned* registers, int count, bool transposed, unsigned row, EmulatorPlace place) {
  MatrixLane mine{count, transposed, {}, {}};
  if (current->lane < SIDE * count)
    memcpy(mine.row, read_shared(row, ROW_BYTES, ROW_BYTES, __builtin_return_address(0)), ROW_BYTES);
  join_warp(LOAD_MATRICES, &mine, place);
  memcpy(registers, mine.registers, 4 * (size_t)count);
}

void emulator_stmatrix(const unsigned* registers, int count, bool transposed, unsigned row,
                       EmulatorPlace place) {
  MatrixLane mine{count, transposed, {}, {}};
  memcpy(mine.registers, registers, 4 * (size_t)count);
  join_warp(STORE_MATRICES, &mine, place);
  if (current->lane < SIDE * count)
    memcpy(write_shared(row, ROW_BYTES, ROW_BYTES, __builtin_return_address(0)), mine.row, ROW_BYTES);
}

void emulator_mma(EmulatorMma kind, float* d, const unsigned* a, const unsigned* b, EmulatorPlace place) {
  MmaLane mine{d, a, b};
  join_warp(MMA[kind], &mine, place);
}

void emulator_mma_f64(double* d, double a, double b, EmulatorPlace place) {
  DoubleLane mine{d, a, b};
  join_warp(MMA_F64, &mine, place);
}
}
#pragma GCC visibility pop
