// Direct convolution over one to three axes: the output, both gradients and the bias's, for any stride, padding,
// dilation, groups and element type. Operands are read in place whatever their strides; nothing is materialised.
//
// Maths. In two dimensions, with c over the channels of k's group, and x outside of the image zero or as PADDING says:
//
//     fprop  y[n,k,p,q]      = Σ c,r,s  w[k,c,r,s] · x[n, c, p·stride - pad + r·dilation, …]
//     dgrad  grad_x[n,c,h,w] = Σ k,r,s  w[k,c,r,s] · grad_y[n, k, (h + pad - r·dilation) / stride, …]
//                              over the r and s for which the division leaves no rest
//     wgrad  grad_w[k,c,r,s] = Σ n,p,q  grad_y[n,k,p,q] · x[n, c, p·stride - pad + r·dilation, …]
//     bgrad  grad_b[k]       = Σ n,p,q  grad_y[n,k,p,q]
//
// What fprop and dgrad write is act(scale · sum + bias + residual), see epilogue.cuh, scale and bias by channel of
// the result. Gradients have none of it: with it dgrad is transposed convolution. On its way out fprop may gather
// every channel's moments, for the batch norm that follows, which then need not read y to find them (statistics.cuh).
//
// The first three are matrix products of a gathered operand and a plain one, per group:
//
//              rows                       columns   summed over (steps)            gathered  plain    result
//     fprop    places n,p,q               k         filter entries c,r,s           x         w        y
//     dgrad    places n,h,w of a phase    c         filter entries k,r,s of it     grad_y    w        grad_x
//     wgrad    filter entries c,r,s       k         places n,p,q                   x         grad_y   grad_w
//
// How operands are addressed, what lies in the padding, and the phases of a strided dgrad: implicit_gemm.cuh.
//
// Forms. Each is right for every problem; conv_direct.py chooses by sizes.
//
//   tiled   A block owns BLOCK_M rows x BLOCK_N columns of one group (and phase, and part of the sum) and walks the
//           steps BLOCK_K at a time through two buffers in shared memory, as accumulators, step by step: while one
//           buffer is multiplied, the next step's elements are on their way into registers and the one after it is
//           decoded; one barrier a step. Thread (tm, tn) owns THREAD_M x THREAD_N results, in runs of 16 bytes of
//           accumulators that are THREADS_M (THREADS_N) runs apart: a warp's reads of shared memory are then
//           contiguous or broadcast, and its stores come in runs. Elements are fetched in packs of 16 bytes along
//           rows, columns or steps, whichever is contiguous, else one by one with lanes along the smallest stride.
//   thin    At most four channels a group (depthwise): a tile would be mostly empty. A thread owns PLACES places of
//           VECTOR groups (fprop, dgrad), lanes along memory, and reads the source through L1, which serves the
//           taps' overlap. In wgrad a thread owns a sum for each tap of a group and a share of the places; the
//           block's threads are then added by halving.
//   bgrad   A thread sums packs of grad_y, the block halves; no product at all.
//
// Sums. A result is summed by one thread in the order of steps. Where rows x columns are too few to fill a GPU
// (wgrad, small images), `splits` blocks take parts of the steps and write partial results, each laid out as the
// result itself, and conv_reduce_direct adds them up; what follows a sum is done there, to the whole. The order
// depends on the problem's sizes alone.
//
// Grid. One axis: column tiles fastest, then groups, phases, splits, and row tiles slowest, so that blocks reading
// the same gathered rows run together and meet in L2. (thin: group tiles, then phases, then places.)
//
// Constants. PASS FORM ELEMENT ACCUMULATOR RESULT DIMS; WIDE: offsets take 64 bits (a tensor spans 2^31 elements)
//   PADDING ZEROS, for fprop and wgrad also REFLECT REPLICATE CIRCULAR
//   ACTIVATION for fprop, dgrad and reduce: none where partial results are written
//   tiled   BLOCK_M BLOCK_N BLOCK_K THREAD_M THREAD_N; RESIDENT: blocks a multiprocessor, to budget registers for
//           CHANNELS_FAST: entries are numbered with the channel fastest, else with the taps
//           GATHER_ALONG_STEPS GATHER_VECTOR, PLAIN_ALONG_STEPS PLAIN_VECTOR: how the operands are fetched
//           STORE_ALONG_ROWS STORE_VECTOR: how the result is written; MOMENTS: 1 where fprop gathers them
//   thin    LANES_G LANES_P PLACES_FAST VECTOR RESULT_VECTOR OUTPUTS (channels a group), PLACES TAPS (unrolled, of
//           the last axis) or, for wgrad, TAPS_0 TAPS_1 TAPS_2; FULL_CHUNKS: these divide the filter
//   bgrad   LANES_G LANES_P PLACES_FAST VECTOR      reduce  REDUCE_LANES
// Sizes, strides, taps, stride, padding, dilation and groups are run-time numbers: decoding once a step hides them,
// and a whole network needs a handful of binaries.
//
// Cost. fp32 on an H100 (132 multiprocessors, 67 TFLOP/s, 3.35 TB/s), by counting the instructions of the compiled
// loops; N = 32:
//   3x3, 64 channels @ 56x56   7.4 GFLOP and 51 MB: the floor is 0.11 ms of arithmetic (0.015 ms of traffic). 784
//           blocks of 128 x 64 are 5.94 rounds of 132; a step issues 512 FFMA among some 670 instructions in NCHW,
//           600 in channels-last: 0.15 and 0.13 ms, if nothing else ever waits.
//   depthwise 3x3, 144 channels @ 56x56   116 MB: the floor is 0.035 ms. Some 130 instructions an output in NCHW,
//           65 in packs of channels: 0.06 and 0.04 ms. Where each group has one channel conv_depthwise.cu keeps rows
//           in registers from one place to the next and reaches the floor; it takes filter and stride as constants.
//   another PADDING than zeros   some 3 to 6 instructions more an axis for every gathered element or pack. By size of
//           the compiled entries: 2 % to 5 % in channels-last packs and 8 % to 15 % in NCHW in the first example, 18 %
//           to 43 % in the thin form. A padded copy would read and write x once more, before anything else begins.
//
// Why FFMA, not tensor cores: float32 and float64 keep all their bits, every shape and alignment is served, and
// other kernels may fall back on this one. Why elements pass through registers, not cp.async: half types are
// widened on the way, padding becomes zero without a branch, and in NCHW the copies would be of single elements.
#include "implicit_gemm.cuh"
#include "statistics.cuh"

#define TILED 0  // values of FORM
#define THIN 1

#if PASS == REDUCE
// ---- second pass: sums of partial results ---------------------------------------------------------------
constexpr int THREADS = 256, LANES = REDUCE_LANES, ROWS = THREADS / LANES;

extern "C" __global__ void __launch_bounds__(THREADS)
conv_reduce_direct(const A* __restrict__ partial, const T* __restrict__ scale, const T* __restrict__ bias,
                   const T* __restrict__ residual, T* __restrict__ out, const Params p) {
  __shared__ A sums[ROWS][LANES];
  const int lane = (int)threadIdx.x % LANES, row = (int)threadIdx.x / LANES;
  const int element = (int)blockIdx.x * LANES + lane;
  A sum = A(0);
  if (element < p.numel)
#pragma unroll 4
    for (int s = row; s < (int)p.splits.divisor; s += ROWS) sum += partial[s * p.numel + element];
  sums[row][lane] = sum;
  __syncthreads();
  if (row == 0 && element < p.numel) {
    for (int r = 1; r < ROWS; r++) sum += sums[r][lane];
    int channel;
    p.channels.divmod(p.count[0].div(element), channel);
    A z[1] = {ScaleShift<A>::of(scale, bias, channel)(sum)};
    store_finished<ACT>(out + element, residual ? residual + element : nullptr, z);
  }
}

#elif PASS == MERGE
// ---- second pass: moments of channels -------------------------------------------------------------------
extern "C" __global__ void __launch_bounds__(MERGE_THREADS)
conv_moments_direct(const A* __restrict__ parts, A* __restrict__ mean, A* __restrict__ var, const Params p) {
  merge_moments(parts, (int)p.tiles.divisor, p.outputs, mean, var);
}

#elif PASS == BGRAD || FORM == THIN
// ---- blocks of LANES_G groups x LANES_P places, without a product in shared memory ----------------------
constexpr int V = VECTOR, THREADS = LANES_G * LANES_P;

// Neighbouring lanes follow the index that is contiguous in memory.
DEVICE int lane_of_place() { return PLACES_FAST ? (int)threadIdx.x % LANES_P : (int)threadIdx.x / LANES_G; }
DEVICE int lane_of_group() { return PLACES_FAST ? (int)threadIdx.x / LANES_P : (int)threadIdx.x % LANES_G; }

// Adds each of COUNT values over the LANES_P threads of a group, in an order that the block's shape alone
// decides. The sums are left in `sums` in the columns of the threads whose place lane is 0.
template <int COUNT> DEVICE void sum_over_places(const A (&own)[COUNT], A (&sums)[COUNT][THREADS]) {
  static_assert((LANES_P & (LANES_P - 1)) == 0, "halving ends at one lane");
#pragma unroll
  for (int i = 0; i < COUNT; i++) sums[i][threadIdx.x] = own[i];
  __syncthreads();
  for (int half = LANES_P / 2; half > 0; half /= 2) {
    if (lane_of_place() < half) {
      const int other = (int)threadIdx.x + half * (PLACES_FAST ? 1 : LANES_G);
#pragma unroll
      for (int i = 0; i < COUNT; i++) sums[i][threadIdx.x] += sums[i][other];
    }
    __syncthreads();
  }
}

#if PASS == BGRAD
// Every channel is a group here. A pack is V places of a channel, or V channels at a place.
extern "C" __global__ void __launch_bounds__(THREADS)
conv_bgrad_direct(const T* __restrict__ grad_y, Result* __restrict__ partial, const Params p) {
  constexpr int SUMS = PLACES_FAST ? 1 : V, STEP = PLACES_FAST ? V : 1;
  __shared__ A sums[SUMS][THREADS];
  int tile;
  const int split = p.tiles.divmod((int)blockIdx.x, tile);
  const int channel = (tile * LANES_G + lane_of_group()) * SUMS;
  const int packs = p.places / STEP, share = ceil_div(packs, (int)p.splits.divisor);
  const int end = min_of(packs, (split + 1) * share);
  A own[SUMS] = {};
  if (channel < (int)p.groups.divisor) {
    const Work work = work_on(p, channel, 0);
#pragma unroll 4
    for (int i = split * share + lane_of_place(); i < end; i += LANES_P) {
      A d[V];
      load_as<V>(d, grad_y + place_at(p, work, i * STEP).other);
#pragma unroll
      for (int v = 0; v < V; v++) own[PLACES_FAST ? 0 : v] += d[v];
    }
  }
  sum_over_places(own, sums);
  if (lane_of_place() == 0 && channel < (int)p.groups.divisor)
#pragma unroll
    for (int v = 0; v < SUMS; v++)
      partial[split * p.numel + channel + v] = convert<Result>(sums[v][threadIdx.x]);
}

#else
// Few channels a group: nothing to share between threads but what L1 holds anyway.
constexpr int RV = RESULT_VECTOR, O = OUTPUTS;
static_assert(V == 1 || O == 1, "a pack holds the one channel of V neighbouring groups");
static_assert(RV == V || RV == 1, "the result moves in the source's packs or element by element");

#if PASS == WGRAD
// Taps stand unrolled in chunks of TAPS_0 x TAPS_1 x TAPS_2.
DEVICE constexpr int chunk(int a) { return a >= DIMS ? 1 : a == 0 ? TAPS_0 : a == 1 ? TAPS_1 : TAPS_2; }
constexpr int TAPS = chunk(0) * chunk(1) * chunk(2);

// Tap t of the chunk that begins at tap `base`; false where the filter ends before it.
DEVICE bool chunk_tap(const Work& work, const int (&base)[3], int t, int (&tap)[DIMS]) {
  bool exists = true;
#pragma unroll
  for (int a = DIMS - 1; a >= 0; a--) {
    tap[a] = base[a] + t % chunk(a), t /= chunk(a);
    if (!FULL_CHUNKS) exists &= tap[a] < work.taps[a];
  }
  return exists;
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
conv_wgrad_thin(const T* __restrict__ grad_y, const T* __restrict__ x, Result* __restrict__ partial,
                const Params p) {
  constexpr int SUMS = O * TAPS * V;
  __shared__ A sums[SUMS][THREADS];
  int tile, c, index;
  int block = p.tiles.divmod((int)blockIdx.x, tile);
  block = p.channels.divmod(block, c);
  const int split = p.phases.divmod(block, index);  // here: chunks of taps
  const int group = (tile * LANES_G + lane_of_group()) * V;
  const Work work = work_on(p, group, 0);
  int base[3] = {};
#pragma unroll
  for (int a = DIMS - 1; a >= 0; a--) {
    const int chunks = ceil_div(work.taps[a], chunk(a));
    base[a] = index % chunks * chunk(a), index /= chunks;
  }

  A own[SUMS] = {};
  if (group < (int)p.groups.divisor) {
    const int share = ceil_div(p.places, (int)p.splits.divisor), end = min_of(p.places, (split + 1) * share);
    for (int i = split * share + lane_of_place(); i < end; i += LANES_P) {
      const Half place = place_at(p, work, i);
      A d[O][V];
#pragma unroll
      for (int o = 0; o < O; o++) {
        const T* from = grad_y + (place.other + o * (Offset)p.result.channel);
        if (RV == V) {
          load_as<V>(d[o], from);
        } else {
#pragma unroll
          for (int v = 0; v < V; v++) d[o][v] = convert<A>(from[v * (Offset)p.result.group]);
        }
      }
#pragma unroll
      for (int t = 0; t < TAPS; t++) {
        int tap[DIMS];
        const bool exists = chunk_tap(work, base, t, tap);
        const Half entry = entry_at(p, work, c, tap);
        const bool in = exists && inside(p, place, entry);
        const Pack<T, V> pack = in ? load_pack<V>(x + address(p, place, entry)) : Pack<T, V>{};
#pragma unroll
        for (int v = 0; v < V; v++)
#pragma unroll
          for (int o = 0; o < O; o++) own[(o * TAPS + t) * V + v] += d[o][v] * convert<A>(pack.v[v]);
      }
    }
  }
  sum_over_places(own, sums);

  for (int i = threadIdx.x; i < SUMS * LANES_G; i += THREADS) {
    const int lane = i % LANES_G, sum = i / LANES_G, v = sum % V, t = sum / V % TAPS, o = sum / V / TAPS;
    const int to = (tile * LANES_G + lane) * V + v;
    int tap[DIMS];
    if (chunk_tap(work, base, t, tap) && to < (int)p.groups.divisor)
      partial[split * p.numel + o * p.filter.row + entry_at(p, work_on(p, to, 0), c, tap).other] =
          convert<Result>(sums[sum][PLACES_FAST ? lane * LANES_P : lane]);
  }
}

#else
constexpr int U = PLACES;

DEVICE void thin(const T* __restrict__ source, const T* __restrict__ filter, const T* __restrict__ scale,
                 const T* __restrict__ bias, const T* __restrict__ residual, T* __restrict__ result, const Params& p) {
  int tile, phase;
  int block = p.tiles.divmod((int)blockIdx.x, tile);
  block = p.phases.divmod(block, phase);
  const int group = (tile * LANES_G + lane_of_group()) * V;
  if (group >= (int)p.groups.divisor) return;
  const Work work = work_on(p, group, phase);
  Half place[U];
#pragma unroll
  for (int u = 0; u < U; u++) place[u] = place_at(p, work, (block * U + u) * LANES_P + lane_of_place());

  A acc[U][O][V] = {};
  constexpr int LAST = DIMS - 1;
  const int planes = DIMS > 2 ? work.taps[0] : 1, rows = DIMS > 1 ? work.taps[DIMS - 2] : 1;
#pragma unroll 1
  for (int c = 0; c < (int)p.channels.divisor; c++)
#pragma unroll 1
    for (int plane = 0; plane < planes; plane++)
#pragma unroll 1
      for (int row = 0; row < rows; row++) {
        int tap[DIMS] = {};
        if (DIMS > 2) tap[0] = plane;
        if (DIMS > 1) tap[DIMS - 2] = row;
        const Half entry = entry_at(p, work, c, tap);
        // The line of the source that this row of taps reads, for each place; far away where there is none.
        Offset line[U];
        int at[U];
#pragma unroll
        for (int u = 0; u < U; u++) {
          line[u] = address(p, place[u], entry, LAST);
          at[u] = inside(p, place[u], entry, LAST) ? place[u].at[LAST] : FAR;
        }
#pragma unroll 1
        for (int first = 0; first < work.taps[LAST]; first += TAPS)
#pragma unroll
          for (int t = first; t < first + TAPS; t++) {
            const bool exists = FULL_CHUNKS || t < work.taps[LAST];
            const int step = t * p.reach[LAST], r = PASS == DGRAD ? t * p.tap_step[LAST] : t;
            const T* from = filter + (entry.other + (Offset)r * (Offset)p.filter.tap[LAST]);
            A w[O][V];
#pragma unroll
            for (int o = 0; o < O; o++)
#pragma unroll
              for (int v = 0; v < V; v++)
                w[o][v] = exists ? convert<A>(from[o * (Offset)p.filter.row + v * (Offset)p.filter.group])
                                 : A(0);
#pragma unroll
            for (int u = 0; u < U; u++) {
              const bool in = exists && inside(p, LAST, at[u] + step);
              const Offset offset = line[u] + (Offset)step * (Offset)p.source.axis[LAST];
              const Pack<T, V> pack =
                  in ? load_pack<V>(source + (offset + detour(p, LAST, at[u] + step))) : Pack<T, V>{};
#pragma unroll
              for (int v = 0; v < V; v++)
#pragma unroll
                for (int o = 0; o < O; o++) acc[u][o][v] += w[o][v] * convert<A>(pack.v[v]);
            }
          }
      }

#pragma unroll
  for (int o = 0; o < O; o++) {
#pragma unroll
    for (int v = 0; v < V; v++) {
      const ScaleShift<A> scale_shift = ScaleShift<A>::of(scale, bias, (group + v) * O + o);
#pragma unroll
      for (int u = 0; u < U; u++) acc[u][o][v] = scale_shift(acc[u][o][v]);
    }
#pragma unroll
    for (int u = 0; u < U; u++) {
      if (place[u].other < 0) continue;
      const Offset at = place[u].other + o * (Offset)p.result.channel;
      if (RV == V) {
        store_finished<ACT>(result + at, residual ? residual + at : nullptr, acc[u][o]);
      } else {
#pragma unroll
        for (int v = 0; v < V; v++) {
          const Offset one = at + v * (Offset)p.result.group;
          A z[1] = {acc[u][o][v]};
          store_finished<ACT>(result + one, residual ? residual + one : nullptr, z);
        }
      }
    }
  }
}

#if PASS == FPROP
extern "C" __global__ void __launch_bounds__(THREADS, 3)
conv_fprop_thin(const T* __restrict__ x, const T* __restrict__ w, const T* __restrict__ scale,
                const T* __restrict__ bias, const T* __restrict__ residual, T* __restrict__ y, const Params p) {
  thin(x, w, scale, bias, residual, y, p);
}
#else
extern "C" __global__ void __launch_bounds__(THREADS, 3)
conv_dgrad_thin(const T* __restrict__ grad_y, const T* __restrict__ w, const T* __restrict__ scale,
                const T* __restrict__ bias, const T* __restrict__ residual, T* __restrict__ grad_x, const Params p) {
  thin(grad_y, w, scale, bias, residual, grad_x, p);
}
#endif
#endif
#endif

#else
// ---- tiled product --------------------------------------------------------------------------------------
constexpr int BM = BLOCK_M, BN = BLOCK_N, BK = BLOCK_K, TM = THREAD_M, TN = THREAD_N;
constexpr int GV = GATHER_VECTOR, PV = PLAIN_VECTOR, SV = STORE_VECTOR;
constexpr int THREADS_M = BM / TM, THREADS_N = BN / TN, THREADS = THREADS_M * THREADS_N;
constexpr int ACCESS = 16 / sizeof(A);  // accumulators in one access to shared memory
constexpr int FM = min_of(TM, ACCESS), FN = min_of(TN, ACCESS);  // rows, columns that a thread owns side by side
static_assert(BM % TM == 0 && BN % TN == 0 && TM % FM == 0 && TN % FN == 0, "threads fill the tile");
static_assert(THREADS >= BK && THREADS % 32 == 0, "one thread decodes a step");
static_assert((GATHER_ALONG_STEPS ? BK : BM) % GV == 0, "packs fill the gathered tile");
static_assert((PLAIN_ALONG_STEPS ? BK : BN) % PV == 0, "packs fill the plain tile");
static_assert((STORE_ALONG_ROWS ? FM : FN) % SV == 0, "a store moves what one thread owns side by side");

struct __align__(16) Tiles {
  A gathered[2][BK][BM + ACCESS];  // the pad keeps rows 16-byte aligned and moves transposed stores apart
  A plain[2][BK][BN + ACCESS];
  Half rows[BM], steps[2][BK];
  Offset columns[BN];
};

// How threads share the fetching of an operand's tile of BK steps x EXTENT rows, in packs of V along the
// operand's contiguous axis; each fetches ROWS x STEPS of them.
template <int EXTENT, bool ALONG_STEPS, int V> struct Share {
  static constexpr int ROW_PACK = ALONG_STEPS ? 1 : V, STEP_PACK = ALONG_STEPS ? V : 1;
  static constexpr int ROW_LANES = ALONG_STEPS ? THREADS / (BK / V) : min_of(32, EXTENT / V);
  static constexpr int STEP_LANES = THREADS / ROW_LANES;
  static constexpr int ROWS = ceil_div(EXTENT, ROW_LANES * ROW_PACK), STEPS = ceil_div(BK, STEP_LANES * STEP_PACK);
  static constexpr bool EXACT = ROWS * ROW_LANES * ROW_PACK == EXTENT && STEPS * STEP_LANES * STEP_PACK == BK;
  static_assert(ROW_LANES * STEP_LANES == THREADS, "every thread has its place");

  DEVICE int row(int i) {
    const int lane = ALONG_STEPS ? (int)threadIdx.x / STEP_LANES : (int)threadIdx.x % ROW_LANES;
    return (lane + i * ROW_LANES) * ROW_PACK;
  }
  DEVICE int step(int j) {
    const int lane = ALONG_STEPS ? (int)threadIdx.x % STEP_LANES : (int)threadIdx.x / ROW_LANES;
    return (lane + j * STEP_LANES) * STEP_PACK;
  }
  // Where the packs are not a multiple of the threads, some have none: has() tells, and reads are clamped.
  DEVICE bool has(int i, int j) { return EXACT || (row(i) < EXTENT && step(j) < BK); }
  DEVICE int known_row(int i) { return EXACT ? row(i) : min_of(row(i), EXTENT - 1); }
  DEVICE int known_step(int j) { return EXACT ? step(j) : min_of(step(j), BK - 1); }

  // Converts what was fetched and lays it out step by step, as the product reads it.
  template <int PITCH> DEVICE void commit(const Pack<T, V> (&fetched)[ROWS][STEPS], A (&tile)[BK][PITCH]) {
    constexpr int W = ALONG_STEPS ? 1 : min_of(V, ACCESS);
#pragma unroll
    for (int i = 0; i < ROWS; i++)
#pragma unroll
      for (int j = 0; j < STEPS; j++)
        if (has(i, j))
#pragma unroll
          for (int v = 0; v < V; v += W) {
            Pack<A, W> wide;
#pragma unroll
            for (int u = 0; u < W; u++) wide.v[u] = convert<A>(fetched[i][j].v[v + u]);
            store_pack<W>(&tile[step(j) + (ALONG_STEPS ? v : 0)][row(i) + (ALONG_STEPS ? 0 : v)], wide);
          }
  }
};
using Gather = Share<BM, GATHER_ALONG_STEPS, GV>;
using Plain = Share<BN, PLAIN_ALONG_STEPS, PV>;

DEVICE void tiled(const T* __restrict__ gathered, const T* __restrict__ plain, Result* __restrict__ out,
                  const Finish& finish, const Params& p) {
  __shared__ Tiles tiles;
  __shared__ Work work;
  __shared__ int m0, n0, group, split;
  const int tid = (int)threadIdx.x;
  if (tid == 0) {
    int phase, block = p.tiles.divmod((int)blockIdx.x, n0);
    block = p.groups.divmod(block, group);
    block = p.phases.divmod(block, phase);
    m0 = p.splits.divmod(block, split) * BM, n0 *= BN;
    work = work_on(p, group, phase);
  }
  __syncthreads();

  // A row's other half says where it is written, a step's where the plain operand is read; a column adds its
  // channel to either.
  for (int m = tid; m < BM; m += THREADS) tiles.rows[m] = row_at(p, work, m0 + m);
  const Offset read_channel = (Offset)(PASS == WGRAD ? p.result.channel : p.filter.row);
  for (int n = tid; n < BN; n += THREADS)
    tiles.columns[n] = n0 + n < p.outputs ? (n0 + n) * read_channel : NOWHERE;

  Pack<T, GV> gather[Gather::ROWS][Gather::STEPS];
  Pack<T, PV> straight[Plain::ROWS][Plain::STEPS];
  const auto describe = [&](int s) {
    if (tid < BK) tiles.steps[s & 1][tid] = step_at(p, work, s * BK + tid);
  };
  const auto fetch = [&](int s) {
#pragma unroll
    for (int i = 0; i < Gather::ROWS; i++) {
      const Half row = tiles.rows[Gather::known_row(i)];
#pragma unroll
      for (int j = 0; j < Gather::STEPS; j++) {
        const Half step = tiles.steps[s & 1][Gather::known_step(j)];
        gather[i][j] = Gather::has(i, j) && inside(p, row, step)
                           ? load_pack<GV>(gathered + address(p, row, step)) : Pack<T, GV>{};
      }
    }
#pragma unroll
    for (int i = 0; i < Plain::ROWS; i++) {
      const Offset column = tiles.columns[Plain::known_row(i)];
#pragma unroll
      for (int j = 0; j < Plain::STEPS; j++) {
        const Offset step = tiles.steps[s & 1][Plain::known_step(j)].other;
        straight[i][j] = Plain::has(i, j) && (column | step) >= 0  // neither is NOWHERE
                             ? load_pack<PV>(plain + (column + step)) : Pack<T, PV>{};
      }
    }
  };
  const auto commit = [&](int s) {
    Gather::commit(gather, tiles.gathered[s & 1]);
    Plain::commit(straight, tiles.plain[s & 1]);
  };

  // Lanes follow the result's contiguous axis, so that a warp's stores run together.
  const int tm = STORE_ALONG_ROWS ? tid % THREADS_M : tid / THREADS_N;
  const int tn = STORE_ALONG_ROWS ? tid / THREADS_M : tid % THREADS_N;
  A acc[TM][TN] = {};
  const auto multiply = [&](int s) {
#pragma unroll
    for (int k = 0; k < BK; k++) {
      Pack<A, FM> a[TM / FM];
      Pack<A, FN> b[TN / FN];
#pragma unroll
      for (int i = 0; i < TM / FM; i++)
        a[i] = load_pack<FM>(&tiles.gathered[s & 1][k][(i * THREADS_M + tm) * FM]);
#pragma unroll
      for (int j = 0; j < TN / FN; j++)
        b[j] = load_pack<FN>(&tiles.plain[s & 1][k][(j * THREADS_N + tn) * FN]);
#pragma unroll
      for (int i = 0; i < TM; i++)
#pragma unroll
        for (int j = 0; j < TN; j++) acc[i][j] += a[i / FM].v[i % FM] * b[j / FN].v[j % FN];
    }
  };

  const int steps = ceil_div(PASS == WGRAD ? p.places : work.entries, BK);
  const int share = ceil_div(steps, (int)p.splits.divisor);
  const int begin = split * share, end = min_of(steps, begin + share);
  if (begin < end) describe(begin);
  __syncthreads();
  if (begin < end) {
    fetch(begin);
    commit(begin);
    describe(begin + 1);
    __syncthreads();
    for (int s = begin; s < end; s++) {
      const bool more = s + 1 < end;
      if (more) fetch(s + 1);  // in flight while this step is multiplied
      multiply(s);
      if (more) {
        commit(s + 1);
        describe(s + 2);
      }
      __syncthreads();
    }
  }

  out += split * p.numel;
  const Offset write_channel = (Offset)(PASS == WGRAD ? p.filter.row : p.result.channel);
#ifdef ACTIVATION
#pragma unroll
  for (int j = 0; j < TN; j++) {
    const int n = n0 + (j / FN * THREADS_N + tn) * FN + j % FN;
    if (n >= p.outputs) continue;
    const ScaleShift<A> scale_shift = ScaleShift<A>::of(finish.scale, finish.bias, group * p.outputs + n);
#pragma unroll
    for (int i = 0; i < TM; i++) acc[i][j] = scale_shift(acc[i][j]);
  }
#endif
#pragma unroll
  for (int i = 0; i < TM; i += STORE_ALONG_ROWS ? SV : 1) {
    const Offset to = tiles.rows[(i / FM * THREADS_M + tm) * FM + i % FM].other;
#pragma unroll
    for (int j = 0; j < TN; j += STORE_ALONG_ROWS ? 1 : SV) {
      const int n = n0 + (j / FN * THREADS_N + tn) * FN + j % FN;
      if (to < 0 || n >= p.outputs) continue;
      const Offset at = to + n * write_channel;
      A z[SV];
#pragma unroll
      for (int v = 0; v < SV; v++) z[v] = STORE_ALONG_ROWS ? acc[i + v][j] : acc[i][j + v];
#ifdef ACTIVATION
      store_finished<ACT>(out + at, finish.residual ? finish.residual + at : nullptr, z);
#else
      store_as(out + at, z);
#endif
#pragma unroll
      for (int v = 0; v < SV; v++) (STORE_ALONG_ROWS ? acc[i + v][j] : acc[i][j + v]) = z[v];
    }
  }

#if PASS == FPROP && MOMENTS
  // Of the results as they are stored, and of the rows that exist. The product's tiles are no longer needed.
  struct Scratch { A counts[THREADS_M], means[THREADS_M][BN + 1], m2s[THREADS_M][BN + 1]; };
  static_assert(sizeof(Scratch) <= sizeof(tiles.gathered) + sizeof(tiles.plain), "moments fit into the product's tiles");
  Scratch& scratch = reinterpret_cast<Scratch&>(tiles.gathered);
  A count = A(0);
#pragma unroll
  for (int i = 0; i < TM; i++) count += A(tiles.rows[(i / FM * THREADS_M + tm) * FM + i % FM].other >= 0);
  const A reciprocal = count > A(0) ? A(1) / count : A(0);
  if (tn == 0) scratch.counts[tm] = count;
#pragma unroll
  for (int j = 0; j < TN; j++) {
    A mean = A(0), m2 = A(0);
#pragma unroll
    for (int pass = 0; pass < 2; pass++) {
#pragma unroll
      for (int i = 0; i < TM; i++) {
        const bool exists = tiles.rows[(i / FM * THREADS_M + tm) * FM + i % FM].other >= 0;
        const A v = convert<A>(convert<T>(acc[i][j])), d = v - mean;
        if (pass == 0) mean += exists ? v : A(0);
        else m2 += exists ? d * d : A(0);
      }
      if (pass == 0) mean *= reciprocal;
    }
    scratch.means[tm][(j / FN * THREADS_N + tn) * FN + j % FN] = mean;
    scratch.m2s[tm][(j / FN * THREADS_N + tn) * FN + j % FN] = m2;
  }
  __syncthreads();
  const int channels = (int)p.groups.divisor * p.outputs, first = group * p.outputs + n0;
  A* part = finish.moments + (long long)(m0 / BM) * 3 * channels + first;
  store_moments<THREADS>(part, scratch.counts, scratch.means, scratch.m2s, min_of(BN, p.outputs - n0), channels);
#endif
}

#if PASS == FPROP
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
conv_fprop_direct(const T* __restrict__ x, const T* __restrict__ w, const T* __restrict__ scale,
                  const T* __restrict__ bias, const T* __restrict__ residual, Result* __restrict__ y,
                  A* __restrict__ moments, const Params p) {
  tiled(x, w, y, {scale, bias, residual, moments}, p);
}
#elif PASS == DGRAD
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
conv_dgrad_direct(const T* __restrict__ grad_y, const T* __restrict__ w, const T* __restrict__ scale,
                  const T* __restrict__ bias, const T* __restrict__ residual, Result* __restrict__ grad_x,
                  const Params p) {
  tiled(grad_y, w, grad_x, {scale, bias, residual, nullptr}, p);
}
#else
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
conv_wgrad_direct(const T* __restrict__ grad_y, const T* __restrict__ x, Result* __restrict__ partial,
                  const Params p) {
  tiled(x, grad_y, partial, {}, p);
}
#endif
#endif
