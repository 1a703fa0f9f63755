// Convolution as an implicit matrix product on tensor cores (mma.sync, sm_80 and up): the output and both gradients
// over one to three axes, for any stride, padding, dilation and groups, fp16, bf16, and fp32 as TF32. Operands are
// read in place whatever their strides; nothing is materialised, and nothing that is not there is multiplied but for
// the last tile's rest.
//
// Maths, operands, addresses, padding and phases: implicit_gemm.cuh. What fprop and dgrad write is
// act(scale · sum + bias + residual), see epilogue.cuh; fprop may gather its channels' moments (statistics.cuh).
//
// Tile. A block of WARPS_M x WARPS_N warps owns BLOCK_M rows x BLOCK_N columns of one group (and phase, and part of
// the sum) and walks the steps BLOCK_K at a time. A warp owns its share of both and multiplies it in registers, as
// m16n8k16 (half types) or m16n8k8 (TF32), 32 bytes along the sum at a time, accumulating in fp32.
//
//     global ──cp.async──▶ ring of STAGES tiles ──ldmatrix──▶ fragments ──mma──▶ sums ──▶ slab ──▶ global
//
// With GROUPS > 1 each column of warps has a group of its own, neighbours in memory: groups of a few channels would
// leave a tile's columns empty, and a row of one group's channels would be less than a sector. Columns of a group
// are then BLOCK_N / GROUPS, and the gathered tile has a slice for each group.
//
// Ring. While stage s is multiplied, s + STAGES - 1 is on its way, into the slot that s - 1 has left, and the steps of
// s + STAGES are decoded. One barrier a stage: behind it all threads have their copies of s, and have left s - 1.
//
// Copies. An operand is copied in packs of VECTOR elements along steps or along rows, whichever lies contiguous and
// aligned: 16 bytes where C is a multiple of 8 and channels-last, at least 4; with zeros where a window leaves the
// image. Elements that stand alone (NCHW) are too small for cp.async, or, floats, not worth it: each takes four
// instructions there. They pass through registers: loaded before a stage is multiplied, stored behind it. A thread
// then owns 16 bytes of a row's steps, lanes along rows, and stores them at once; or, where memory runs along steps,
// one element, lanes along steps.
//
// L1. The gathered operand's copies go through it, since taps overlap: 3x3 windows of 128 places have 1152 taps, on some
// 200 different places. With CHANNEL_RUN a block reads BLOCK_K channels at all taps before it goes on to the next, so
// that what it reads again it has read a few stages ago. The plain operand's pass it by.
//
// Shared memory. Packs along steps lie by rows, packs along rows by steps; 16-byte chunks of a line are exchanged
// (turn) so that the eight lines of a matrix that ldmatrix reads, or the four of a tf32 fragment, meet no bank twice.
// What lies by steps is transposed by ldmatrix.trans; tf32, which that would tear apart, is read word by word.
//
// TF32. A float is rounded to nearest (ties away) where it becomes a fragment, or on its way through registers:
// truncation, which mma would do by itself, is biased. Only where torch lets convolutions use TF32 (config.py).
//
// Way out. A warp's sums meet their channel's factor and bias in registers, then pass through a slab of its own
// (tensor_tile.cuh), so that lanes follow the result's contiguous axis and STORE_VECTOR elements, up to 16 bytes, are
// read of the residual and written at once. The slab lies in the ring, which is no longer needed.
//
// Sums. The order is that of steps, by mma.sync's unspecified order within 16 (8) of them: the same on every run.
// Where rows x columns are too few to fill a GPU, `splits` blocks take parts of the steps, and conv_reduce_direct adds
// their partial results in a fixed order, as for conv_direct.cu. No atomics.
//
// Grid. One axis: column tiles fastest, then groups, phases, splits, and row tiles slowest, so that blocks reading the
// same gathered rows run together and meet in L2.
//
// Constants. PASS ELEMENT ACCUMULATOR RESULT DIMS WIDE PADDING CHANNELS_FAST (implicit_gemm.cuh); ACTIVATION, none
//   where partial results are written, for fprop and dgrad; CHANNEL_RUN: channels that come before taps, or 0
//   BLOCK_M BLOCK_N BLOCK_K WARPS_M WARPS_N STAGES GROUPS; RESIDENT: blocks a multiprocessor, to budget registers for
//   GATHER_ALONG_STEPS GATHER_VECTOR, PLAIN_ALONG_STEPS PLAIN_VECTOR: how the operands are copied
//   STORE_ALONG_ROWS STORE_VECTOR: how the result is written; MOMENTS: 1 where fprop gathers them
//
// Cost, of a stage of 128 x 128 x 32 in a half type: 64 mma and 16 ldmatrix a warp (of four), 512 cycles of an
// A100's tensor cores, some 400 of an H100's by mma.sync; 16 KB from L2, 32 bytes a cycle, where an H100 gives a
// multiprocessor some 24 to 32: 256 x 128 asks for 24. A warp issues some 270 instructions, and 570 where halves stand
// alone: such tiles are bound by that. tests/igemm_tiles.csv has them all.
//
// Why mma.sync, not wgmma: it is there from sm_80 on, and takes operands of any shape from registers; conv_direct.cu
// serves fp32 with all its bits, fp64, and groups of up to three channels.
#include "implicit_gemm.cuh"
#include "ptx_async.cuh"
#include "statistics.cuh"
#include "tensor_tile.cuh"

constexpr int BM = BLOCK_M, BN = BLOCK_N, BK = BLOCK_K;
constexpr int GV = GATHER_VECTOR, PV = PLAIN_VECTOR, SV = STORE_VECTOR;
constexpr int THREADS = 32 * WARPS_M * WARPS_N, TEAM = THREADS / GROUPS;
constexpr int WM = BM / WARPS_M, WN = BN / WARPS_N;  // rows and columns of a warp
constexpr int SLICE_N = BN / GROUPS;                 // columns of a group
constexpr int CHUNK = 16 / sizeof(T);                // elements of 16 bytes
constexpr int MMA_K = 2 * CHUNK;
constexpr bool TF32 = sizeof(T) == 4;
static_assert(GROUPS == 1 || GROUPS == WARPS_N, "a group is a column of warps, or the block's");
static_assert(WM % 16 == 0 && (WN == 8 || WN % 16 == 0) && BK % MMA_K == 0, "mma fills the tile");
static_assert(STAGES >= 2, "one stage arrives while another is multiplied");
static_assert(THREADS >= BK, "one thread decodes a step");

// An operand's tile of EXTENT rows (columns) x BK steps of one group: which of it a thread copies, and where in shared
// memory it lies.
template <int EXTENT, bool ALONG_STEPS, int V> struct Operand {
  static constexpr bool STAGED = V == 1;                      // through registers
  static constexpr bool BY_ROWS = ALONG_STEPS || STAGED;      // lines of shared memory: rows, or else steps
  static constexpr int GRAIN = ALONG_STEPS ? V : 1;           // steps whose first one's address is enough
  static constexpr int ROW_PACK = BY_ROWS ? 1 : V;
  static constexpr int STEP_PACK = !BY_ROWS ? 1 : ALONG_STEPS ? V : CHUNK;
  static constexpr int ROW_UNITS = EXTENT / ROW_PACK, STEP_UNITS = BK / STEP_PACK;
  static constexpr int STEP_LANES =
      BY_ROWS ? min_of(TEAM, STEP_UNITS) : TEAM / min_of(TEAM, ROW_UNITS);
  static constexpr int ROW_LANES = TEAM / STEP_LANES;
  static constexpr int ROWS = ceil_div(ROW_UNITS, ROW_LANES), STEPS = ceil_div(STEP_UNITS, STEP_LANES);
  static constexpr bool EXACT = ROWS * ROW_LANES == ROW_UNITS && STEPS * STEP_LANES == STEP_UNITS;
  static constexpr int CHUNKS = (BY_ROWS ? BK : EXTENT) / CHUNK;  // of a line
  // Neighbouring lanes copy for neighbouring groups, whose tiles must not begin on one bank, or turn further.
  static constexpr int BYTES = EXTENT * BK * (int)sizeof(T) + (GROUPS > 1 && CHUNKS <= 2 ? 32 : 0);
  static constexpr int PAIR = GROUPS > 1 && ALONG_STEPS && ROW_LANES > 1 ? 2 : 1;  // rows, before steps
  static_assert(ROW_LANES * STEP_LANES == TEAM, "every thread has its place");
  static_assert(EXTENT % ROW_PACK == 0 && BK % STEP_PACK == 0, "packs fill the tile");
  static_assert(CHUNKS >= 1 && (CHUNKS & (CHUNKS - 1)) == 0, "a line is a power of two of 16 bytes");

  // Neighbouring lanes follow memory: along steps, or rows.
  DEVICE int row(int i, int thread) {
    const int lane = ALONG_STEPS ? thread / (PAIR * STEP_LANES) * PAIR + thread % PAIR : thread % ROW_LANES;
    return (lane + i * ROW_LANES) * ROW_PACK;
  }
  DEVICE int step(int j, int thread) {
    const int lane = ALONG_STEPS ? thread / PAIR % STEP_LANES : thread / ROW_LANES;
    return (lane + j * STEP_LANES) * STEP_PACK;
  }
  DEVICE bool has(int i, int j, int thread) {
    return EXACT || (row(i, thread) < EXTENT && step(j, thread) < BK);
  }
  DEVICE int known_row(int i, int thread) { return EXACT ? row(i, thread) : min_of(row(i, thread), EXTENT - 1); }

  DEVICE int turn(int line) {
    if (TF32 && !BY_ROWS) return CHUNKS >= 8 ? (line & 3) * 2 : CHUNKS == 4 ? line & 2 : 0;
    return CHUNKS >= 8 ? line & 7 : line / (8 / CHUNKS) & (CHUNKS - 1);
  }
  // Bytes from the tile's begin to an element.
  DEVICE int place(int row, int step, int group) {
    const int line = BY_ROWS ? row : step, along = BY_ROWS ? step : row;
    const int further = GROUPS == 1 || CHUNKS <= 2 ? 0 : CHUNKS >= 8 ? group * 2 & 7 : group & (CHUNKS - 1);
    return line * (CHUNKS * 16) + (along / CHUNK ^ turn(line) ^ further) * 16 + along % CHUNK * (int)sizeof(T);
  }
};
using Gather = Operand<BM, GATHER_ALONG_STEPS, GV>;
using Plain = Operand<SLICE_N, PLAIN_ALONG_STEPS, PV>;
constexpr int GRAIN = min_of(Gather::GRAIN, Plain::GRAIN);
// Where a step's address lies in the table of a stage: lanes ask for neighbours, or for every eighth.
DEVICE constexpr int unit(int step) { return GRAIN == CHUNK ? step / GRAIN : step / GRAIN + step / CHUNK; }
constexpr int UNITS = unit(BK - 1) + 1;
constexpr int STAGE_BYTES = GROUPS * (Gather::BYTES + Plain::BYTES);

// What an operand that passes through registers has there.
template <class O> struct Staged { T v[O::STAGED ? O::ROWS : 1][O::STAGED ? O::STEPS * O::STEP_PACK : 1]; };

DEVICE float multiplicand(float v) { return __uint_as_float(float_to_tf32(v)); }
template <class H> DEVICE H multiplicand(H v) { return v; }

template <class O> DEVICE void put(const Staged<O>& staged, unsigned char* tile, int thread, int group) {
#pragma unroll
  for (int i = 0; i < O::ROWS; i++)
#pragma unroll
    for (int j = 0; j < O::STEPS; j++)
      if (O::has(i, j, thread)) {
        Pack<T, O::STEP_PACK> pack;
#pragma unroll
        for (int v = 0; v < O::STEP_PACK; v++) pack.v[v] = multiplicand(staged.v[i][j * O::STEP_PACK + v]);
        store_pack(reinterpret_cast<T*>(tile + O::place(O::row(i, thread), O::step(j, thread), group)), pack);
      }
}

// Fragments of mma (ptx.cuh): `rows` x 32 bytes of steps, beginning at (row, step) of a tile. Two rows of 8 x 8
// matrices and two along the steps make A; of B, whose rows are the product's columns, two along the steps do.
template <class O> DEVICE unsigned word(const unsigned char* tile, int row, int step, int group) {
  return float_to_tf32(*reinterpret_cast<const float*>(tile + O::place(row, step, group)));
}
template <class O, int N> DEVICE void round_tf32(unsigned (&r)[N]) {
  if (!TF32 || O::STAGED) return;  // rounded on their way through registers
#pragma unroll
  for (int i = 0; i < N; i++) r[i] = float_to_tf32(__uint_as_float(r[i]));
}

template <class O>
DEVICE void load_a(unsigned (&a)[4], const unsigned char* tile, unsigned base, int row, int step, int group) {
  const int lane = (int)threadIdx.x % 32, i = lane % 8, j = lane / 8;
  if constexpr (TF32 && !O::BY_ROWS) {
#pragma unroll
    for (int n = 0; n < 4; n++) a[n] = word<O>(tile, row + lane / 4 + n % 2 * 8, step + lane % 4 + n / 2 * 4, group);
  } else {
    const unsigned from = base + O::place(row + j % 2 * 8 + (O::BY_ROWS ? i : 0),
                                          step + j / 2 * CHUNK + (O::BY_ROWS ? 0 : i), group);
    if constexpr (O::BY_ROWS) ldmatrix(a, from);
    else ldmatrix_trans(a, from);
    round_tf32<O>(a);
  }
}

// Of TILES n8 tiles: b[t][0..1].
template <class O, int TILES>
DEVICE void load_b(unsigned (&b)[TILES][2], const unsigned char* tile, unsigned base, int row, int step, int group) {
  const int lane = (int)threadIdx.x % 32, i = lane % 8, j = lane / 8;
  if constexpr (TF32 && !O::BY_ROWS) {
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int n = 0; n < 2; n++) b[t][n] = word<O>(tile, row + t * 8 + lane / 4, step + lane % 4 + n * 4, group);
  } else if constexpr (TILES == 1) {
    const unsigned from =
        base + O::place(row + (O::BY_ROWS ? i : 0), step + j % 2 * CHUNK + (O::BY_ROWS ? 0 : i), group);
    if constexpr (O::BY_ROWS) ldmatrix(b[0], from);
    else ldmatrix_trans(b[0], from);
    round_tf32<O>(b[0]);
  } else {
#pragma unroll
    for (int t = 0; t < TILES; t += 2) {
      unsigned r[4];
      const unsigned from = base + O::place(row + t * 8 + j / 2 * 8 + (O::BY_ROWS ? i : 0),
                                            step + j % 2 * CHUNK + (O::BY_ROWS ? 0 : i), group);
      if constexpr (O::BY_ROWS) ldmatrix(r, from);
      else ldmatrix_trans(r, from);
      round_tf32<O>(r);
      b[t][0] = r[0], b[t][1] = r[1], b[t + 1][0] = r[2], b[t + 1][1] = r[3];
    }
  }
}

using Out = Slab<WM, WN, SV, STORE_ALONG_ROWS>;
static_assert(THREADS / 32 * Out::FLOATS * 4 <= STAGES * STAGE_BYTES, "slabs fit into the ring");

DEVICE void product(const T* __restrict__ gathered, const T* __restrict__ plain, Result* __restrict__ out,
                    const Finish& finish, const Params& p) {
  extern __shared__ __align__(128) unsigned char ring[];
  __shared__ Half rows[BM], steps[STAGES][UNITS];
  __shared__ Offset targets[BM];  // of the rows: where they are written
  __shared__ Work work;
  __shared__ int m0, n0, first_group, split;
  const int tid = (int)threadIdx.x, warp = tid / 32, lane = tid % 32;
  if (tid == 0) {
    int phase, block = p.tiles.divmod((int)blockIdx.x, n0);
    block = p.groups.divmod(block, first_group);
    block = p.phases.divmod(block, phase);
    m0 = p.splits.divmod(block, split) * BM, n0 *= BN, first_group *= GROUPS;
    work = work_on(p, first_group, phase);
  }
  __syncthreads();

  const int sum = PASS == WGRAD ? p.places : work.entries;
  const int stages = ceil_div(sum, BK), share = ceil_div(stages, (int)p.splits.divisor);
  const int begin = split * share, end = min_of(stages, begin + share);

  for (int m = tid; m < BM; m += THREADS) {
    const Half row = row_at(p, work, m0 + m);
    rows[m] = row, targets[m] = row.other;
  }
  const auto describe = [&](int stage, int slot) {
    if (tid * GRAIN < BK) steps[slot][unit(tid * GRAIN)] = step_at(p, work, stage * BK + tid * GRAIN);
  };
#pragma unroll
  for (int s = 0; s < STAGES; s++) describe(begin + s, s);
  __syncthreads();

  // Which group's tile a thread copies, and which rows of it; these few it knows by heart.
  const int slice = GROUPS == 1 ? 0 : CHANNELS_FAST ? tid % GROUPS : tid / TEAM;
  const int thread = GROUPS == 1 ? tid : CHANNELS_FAST ? tid / GROUPS : tid % TEAM;
  constexpr bool BY_HEART = Gather::ROWS <= 4;
  Half own[BY_HEART ? Gather::ROWS : 1];
  if (BY_HEART)
#pragma unroll
    for (int i = 0; i < Gather::ROWS; i++) own[i] = rows[Gather::known_row(i, thread)];
  gathered += slice * (Offset)p.source.group;
  plain += slice * (Offset)(PASS == WGRAD ? p.result.group : p.filter.group);
  const Offset read_channel = (Offset)(PASS == WGRAD ? p.result.channel : p.filter.row);

  const unsigned shared = shared_address(ring);
  const auto gathered_tile = [&](int slot, int group) { return slot * STAGE_BYTES + group * Gather::BYTES; };
  const auto plain_tile = [&](int slot, int group) {
    return slot * STAGE_BYTES + GROUPS * Gather::BYTES + group * Plain::BYTES;
  };
  Staged<Gather> gather;
  Staged<Plain> straight;

  const auto fetch = [&](int slot) {
#pragma unroll
    for (int j = 0; j < Gather::STEPS; j++)
#pragma unroll
      for (int v = 0; v < (Gather::STAGED ? Gather::STEP_PACK : 1); v++) {
        const int k = Gather::step(j, thread) + v;
        const Half step = steps[slot][unit(Gather::EXACT ? k : min_of(k, BK - 1))];
#pragma unroll
        for (int i = 0; i < Gather::ROWS; i++) {
          const bool mine = Gather::has(i, j, thread);
          const Half row = BY_HEART ? own[BY_HEART ? i : 0] : rows[Gather::known_row(i, thread)];
          const bool in = mine && inside(p, row, step);
          if constexpr (Gather::STAGED) {
            gather.v[i][j * Gather::STEP_PACK + v] = in ? gathered[address(p, row, step)] : T{};
          } else if (mine) {
            const T* from = gathered + (in ? address(p, row, step) : 0);
            const int to = gathered_tile(slot, slice) + Gather::place(Gather::row(i, thread), k, slice);
            cp_async<GV * (int)sizeof(T), true>(shared + to, from, in ? GV * (int)sizeof(T) : 0);
          }
        }
      }
#pragma unroll
    for (int j = 0; j < Plain::STEPS; j++)
#pragma unroll
      for (int v = 0; v < (Plain::STAGED ? Plain::STEP_PACK : 1); v++) {
        const int k = Plain::step(j, thread) + v;
        const Offset step = steps[slot][unit(Plain::EXACT ? k : min_of(k, BK - 1))].other;
#pragma unroll
        for (int i = 0; i < Plain::ROWS; i++) {
          const int n = n0 + Plain::row(i, thread);
          const bool mine = Plain::has(i, j, thread), in = mine && n < p.outputs && step >= 0;
          if constexpr (Plain::STAGED) {
            straight.v[i][j * Plain::STEP_PACK + v] = in ? plain[n * read_channel + step] : T{};
          } else if (mine) {
            const T* from = plain + (in ? n * read_channel + step : 0);
            const int to = plain_tile(slot, slice) + Plain::place(Plain::row(i, thread), k, slice);
            cp_async<PV * (int)sizeof(T)>(shared + to, from, in ? PV * (int)sizeof(T) : 0);
          }
        }
      }
  };
  const auto settle = [&](int slot) {
    if constexpr (Gather::STAGED) put<Gather>(gather, ring + gathered_tile(slot, slice), thread, slice);
    if constexpr (Plain::STAGED) put<Plain>(straight, ring + plain_tile(slot, slice), thread, slice);
  };

  const int warp_m = warp % WARPS_M, warp_n = warp / WARPS_M, group = GROUPS > 1 ? warp_n : 0;
  const int wm = warp_m * WM, wn = GROUPS > 1 ? 0 : warp_n * WN;
  float acc[WM / 16][WN / 8][4] = {};
  const auto multiply = [&](int slot) {
    const int a_at = gathered_tile(slot, group), b_at = plain_tile(slot, group);
#pragma unroll
    for (int k = 0; k < BK; k += MMA_K) {
      unsigned a[WM / 16][4], b[WN / 8][2];
      load_b<Plain>(b, ring + b_at, shared + b_at, wn, k, group);
#pragma unroll
      for (int i = 0; i < WM / 16; i++) load_a<Gather>(a[i], ring + a_at, shared + a_at, wm + i * 16, k, group);
#pragma unroll
      for (int i = 0; i < WM / 16; i++)
#pragma unroll
        for (int j = 0; j < WN / 8; j++) multiply_add(acc[i][j], a[i], b[j], T{});
    }
  };

#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
    if (begin + s < end) {
      fetch(s);
      settle(s);
    }
    cp_async_commit();
  }
  int slot = 0, free = STAGES - 1;
  for (int s = begin; s < end; s++) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    const bool more = s + STAGES - 1 < end;
    if (more) fetch(free);
    cp_async_commit();
    describe(s + STAGES, slot);
    multiply(slot);
    if (more) settle(free);
    free = slot;
    slot = slot + 1 == STAGES ? 0 : slot + 1;
  }
  cp_async_wait_all();
  __syncthreads();

  out += split * p.numel;
  const Offset write_channel = (Offset)(PASS == WGRAD ? p.filter.row : p.result.channel);
  const Offset write_group = group * (Offset)(PASS == WGRAD ? p.filter.group : p.result.group);
#ifdef ACTIVATION
#pragma unroll
  for (int j = 0; j < WN / 8; j++)
#pragma unroll
    for (int c = 0; c < 2; c++) {
      const int n = n0 + wn + j * 8 + lane % 4 * 2 + c;
      if (n >= p.outputs) continue;
      const ScaleShift<A> scale_shift =
          ScaleShift<A>::of(finish.scale, finish.bias, (first_group + group) * p.outputs + n);
#pragma unroll
      for (int i = 0; i < WM / 16; i++) {
        acc[i][j][c] = scale_shift(acc[i][j][c]);
        acc[i][j][c + 2] = scale_shift(acc[i][j][c + 2]);
      }
    }
#endif

#if PASS == FPROP && MOMENTS
  // Of the results as they are stored, and of the rows that exist: each thread's own, then a warp's, then the block's.
  static_assert(GROUPS == 1, "a column of warps has a group of its own");
  struct Scratch { A counts[WARPS_M], means[WARPS_M][BN + 1], m2s[WARPS_M][BN + 1]; };
  static_assert(sizeof(Scratch) <= STAGES * STAGE_BYTES, "moments fit into the ring");
  Scratch& scratch = *reinterpret_cast<Scratch*>(ring);
  const auto exists = [&](int r) { return targets[wm + r * 8 + lane / 4] >= 0; };
#pragma unroll
  for (int j = 0; j < WN / 8; j++)
#pragma unroll
    for (int c = 0; c < 2; c++) {
      const Moments<A> all =
          column_moments<T, WM / 8>([&](int r) { return acc[r / 2][j][r % 2 * 2 + c]; }, exists);
      if (lane < 4) {
        const int column = wn + j * 8 + lane * 2 + c;
        scratch.means[warp_m][column] = all.mean, scratch.m2s[warp_m][column] = all.m2;
        if (column == 0) scratch.counts[warp_m] = all.count;
      }
    }
  __syncthreads();
  const int channels = (int)p.groups.divisor * p.outputs, first = first_group * p.outputs + n0;
  A* part = finish.moments + (long long)(m0 / BM) * 3 * channels + first;
  store_moments<THREADS>(part, scratch.counts, scratch.means, scratch.m2s, min_of(BN, p.outputs - n0), channels);
  __syncthreads();
#endif

  float* slab = reinterpret_cast<float*>(ring) + warp * Out::FLOATS;
  Out::write(slab, acc, [&](int row, int column, A(&z)[SV]) {
    const Offset to = targets[wm + row];
    const int n = n0 + wn + column;
    if (to < 0 || n >= p.outputs) return;
    const Offset at = to + write_group + n * write_channel;
#ifdef ACTIVATION
    store_finished<ACT>(out + at, finish.residual ? finish.residual + at : nullptr, z);
#else
    store_as(out + at, z);
#endif
  });
}

#if PASS == FPROP
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
conv_fprop_igemm(const T* __restrict__ x, const T* __restrict__ w, const T* __restrict__ scale,
                 const T* __restrict__ bias, const T* __restrict__ residual, Result* __restrict__ y,
                 A* __restrict__ moments, const Params p) {
  product(x, w, y, {scale, bias, residual, moments}, p);
}
#elif PASS == DGRAD
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
conv_dgrad_igemm(const T* __restrict__ grad_y, const T* __restrict__ w, const T* __restrict__ scale,
                 const T* __restrict__ bias, const T* __restrict__ residual, Result* __restrict__ grad_x,
                 const Params p) {
  product(grad_y, w, grad_x, {scale, bias, residual, nullptr}, p);
}
#else
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
conv_wgrad_igemm(const T* __restrict__ grad_y, const T* __restrict__ x, Result* __restrict__ partial,
                 const Params p) {
  product(x, grad_y, partial, {}, p);
}
#endif
