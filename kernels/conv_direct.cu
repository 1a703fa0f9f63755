#include "common.cuh"

#define FPROP 0  // values of PASS
#define DGRAD 1
#define WGRAD 2
#define BGRAD 3
#define REDUCE 4
#define TILED 0  // values of FORM
#define THIN 1

using T = ELEMENT;      // of the operands
using A = ACCUMULATOR;  // float for the half types, else T
using Result = RESULT;  // T, or A where conv_reduce_direct follows
static_assert(DIMS >= 1 && DIMS <= 3, "one to three spatial axes");

#if WIDE
typedef long long Offset;
#else
typedef int Offset;
#endif

// Strides in elements. A group is the channels that one group of filters reads or writes.
struct Strides {
  long long batch, group, channel, axis[3];
};
struct FilterStrides {
  long long group, row, channel, tap[3];  // row: along the channel that is not summed over
};

// Arrays over axes hold DIMS values, slowest axis first.
struct Params {
  Strides source;        // the gathered tensor: x (dgrad: grad_y)
  Strides result;        // the tensor of places: y (dgrad: grad_x; wgrad, bgrad: grad_y, which is read)
  FilterStrides filter;  // w (wgrad: grad_w, written)
  long long bias;        // stride
  long long numel;       // elements of one partial result
  FastDiv count[3];      // places along each axis (dgrad: of one phase)
  FastDiv channels;      // source channels of a group
  FastDiv tiles, groups, phases, splits;  // what a block's number is made of, fastest first
  int size[3];           // of the source
  int limit[3];          // of the result
  int taps[3], stride[3], dilation[3], pad[3];
  int reach[3];          // source coordinates from one tap to the next
  int tap_step[3];       // dgrad: filter taps from one tap of a phase to its next
  int places;            // of all images (dgrad: of one phase)
  int outputs;           // result channels of a group (dgrad: channels of grad_x)
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from the structure in conv_direct.py");

DEVICE constexpr int min_of(int a, int b) { return a < b ? a : b; }

// ---- addresses in two halves ----------------------------------------------------------------------------
struct Half {
  Offset source, other;  // other: of a place, in the result; of a filter entry, in the filter
  int at[DIMS];          // source coordinates; where both halves' sum is outside, the source is zero
};
constexpr int FAR = -(1 << 30);  // a coordinate that no other half brings back inside; FAR + FAR still fits
constexpr Offset NOWHERE = -1;   // of `other`: there is no such element

// dgrad: places of one remainder by the stride. Else there is one phase, all places and taps.
struct Phase {
  int origin[DIMS];  // source coordinate of the first place's first tap
  int corner[DIMS];  // first place
  int first[DIMS];   // first tap
  int taps[DIMS];
  int entries;       // of the filter, for one result channel: channels x taps
};

DEVICE Phase phase_at(const Params& p, int index) {
  Phase phase;
  phase.entries = (int)p.channels.divisor;
#pragma unroll
  for (int a = DIMS - 1; a >= 0; a--) {
    int origin = -p.pad[a], corner = 0, first = 0, taps = p.taps[a];
    if (PASS == DGRAD) {
      corner = index % p.stride[a], index /= p.stride[a];
      const int base = corner + p.pad[a];
      while (first < p.taps[a] && (base - first * p.dilation[a]) % p.stride[a] != 0) first++;
      origin = (base - first * p.dilation[a]) / p.stride[a];
      taps = first < p.taps[a] ? (p.taps[a] - 1 - first) / p.tap_step[a] + 1 : 0;
    }
    phase.origin[a] = origin, phase.corner[a] = corner, phase.first[a] = first, phase.taps[a] = taps;
    phase.entries *= taps;
  }
  return phase;
}

struct Geometry {
  const Params& p;
  const Phase& phase;

  // Place i of the phase, numbered image by image, last axis fastest.
  __device__ __forceinline__ Half place(int i) const {
    bool exists = i < p.places;
    int rest = exists ? i : 0, index[DIMS];
#pragma unroll
    for (int a = DIMS - 1; a >= 0; a--) rest = p.count[a].divmod(rest, index[a]);
    Half h;
    h.source = (Offset)rest * (Offset)p.source.batch;
    h.other = (Offset)rest * (Offset)p.result.batch;
#pragma unroll
    for (int a = 0; a < DIMS; a++) {
      const int to = PASS == DGRAD ? phase.corner[a] + index[a] * p.stride[a] : index[a];
      if (PASS == DGRAD) exists &= to < p.limit[a];
      h.at[a] = phase.origin[a] + index[a] * (PASS == DGRAD ? 1 : p.stride[a]);
      h.source += (Offset)h.at[a] * (Offset)p.source.axis[a];
      h.other += (Offset)to * (Offset)p.result.axis[a];
    }
    if (!exists) h.at[DIMS - 1] = FAR, h.other = NOWHERE;
    return h;
  }

  // The filter's entry for source channel c at one tap of the phase.
  __device__ __forceinline__ Half entry(int c, const int (&tap)[DIMS]) const {
    Half h;
    h.source = (Offset)c * (Offset)p.source.channel;
    h.other = (Offset)c * (Offset)p.filter.channel;
#pragma unroll
    for (int a = 0; a < DIMS; a++) {
      const int r = PASS == DGRAD ? phase.first[a] + tap[a] * p.tap_step[a] : tap[a];
      h.at[a] = tap[a] * p.reach[a];
      h.source += (Offset)h.at[a] * (Offset)p.source.axis[a];
      h.other += (Offset)r * (Offset)p.filter.tap[a];
    }
    return h;
  }

  __device__ __forceinline__ bool inside(const Half& one, const Half& two) const {
    bool in = true;
#pragma unroll
    for (int a = 0; a < DIMS; a++) in &= (unsigned)(one.at[a] + two.at[a]) < (unsigned)p.size[a];
    return in;
  }
};

#if PASS != REDUCE && !(PASS != BGRAD && FORM == TILED)
// ---- blocks of LANES_G groups x LANES_P places ----------------------------------------------------------
constexpr int V = VECTOR, THREADS = LANES_G * LANES_P;
// Neighbouring lanes follow the axis that is contiguous in memory.
DEVICE int lane_of_place() { return PLACES_FAST ? (int)threadIdx.x % LANES_P : (int)threadIdx.x / LANES_G; }
DEVICE int lane_of_group() { return PLACES_FAST ? (int)threadIdx.x / LANES_P : (int)threadIdx.x % LANES_G; }

// Adds COUNT values of every thread over the LANES_P threads of its group, in an order that the block's
// size alone decides. The sums come back in `sums`, in the columns of the threads whose place lane is 0.
template <int COUNT> DEVICE void sum_over_places(const A (&own)[COUNT], A (&sums)[COUNT][THREADS]) {
  static_assert((LANES_P & (LANES_P - 1)) == 0, "the tree halves the lanes until one is left");
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
#endif

#if PASS == REDUCE
// ---- second pass ----------------------------------------------------------------------------------------
constexpr int THREADS = 256, LANES = REDUCE_LANES, ROWS = THREADS / LANES;

extern "C" __global__ void __launch_bounds__(THREADS)
conv_reduce_direct(const A* __restrict__ partial, const T* __restrict__ bias, T* __restrict__ out, const Params p) {
  __shared__ A sums[ROWS][LANES];
  const int lane = threadIdx.x % LANES, row = threadIdx.x / LANES;
  const int element = (int)blockIdx.x * LANES + lane;
  A sum = A(0);
  if (element < p.numel)
#pragma unroll 4
    for (int s = row; s < (int)p.splits.divisor; s += ROWS) sum += partial[s * p.numel + element];
  sums[row][lane] = sum;
  __syncthreads();
  if (row == 0 && element < p.numel) {
    for (int r = 1; r < ROWS; r++) sum += sums[r][lane];
    if (bias) {
      int channel;
      p.channels.divmod(p.count[0].div(element), channel);
      sum += convert<A>(bias[channel * p.bias]);
    }
    out[element] = convert<T>(sum);
  }
}

#elif PASS == BGRAD
// ---- bias gradient --------------------------------------------------------------------------------------
extern "C" __global__ void __launch_bounds__(THREADS)
conv_bgrad_direct(const T* __restrict__ grad_y, Result* __restrict__ partial, const Params p) {
  constexpr int SUMS = PLACES_FAST ? 1 : V, STEP = PLACES_FAST ? V : 1;  // a pack: V places or V channels
  __shared__ A sums[SUMS][THREADS];
  const Phase phase = phase_at(p, 0);
  const Geometry g{p, phase};
  int tile;
  const int split = p.tiles.divmod((int)blockIdx.x, tile);
  const int channel = (tile * LANES_G + lane_of_group()) * SUMS;
  const int packs = p.places / STEP, share = ceil_div(packs, (int)p.splits.divisor);
  const int end = min_of(packs, (split + 1) * share);
  A own[SUMS] = {};
  if (channel < p.outputs) {
    const T* base = grad_y + channel * p.result.channel;
#pragma unroll 4
    for (int i = split * share + lane_of_place(); i < end; i += LANES_P) {
      const Pack<T, V> pack = load_pack<V>(base + g.place(i * STEP).other);
#pragma unroll
      for (int v = 0; v < V; v++) own[PLACES_FAST ? 0 : v] += convert<A>(pack.v[v]);
    }
  }
  sum_over_places(own, sums);
  if (lane_of_place() == 0 && channel < p.outputs)
#pragma unroll
    for (int v = 0; v < SUMS; v++) partial[split * p.numel + channel + v] = convert<Result>(sums[v][threadIdx.x]);
}

#elif FORM == THIN
// ---- thin groups ----------------------------------------------------------------------------------------
constexpr int RV = RESULT_VECTOR, O = OUTPUTS;
static_assert(V == 1 || O == 1, "a pack holds the same channel of neighbouring groups");
static_assert(RV == V || RV == 1, "the result moves in the source's packs or element by element");

// Taps stand unrolled in chunks of TAPS_0 x TAPS_1 x TAPS_2; a small filter is one chunk.
DEVICE constexpr int chunk(int a) { return a >= DIMS ? 1 : a == 0 ? TAPS_0 : a == 1 ? TAPS_1 : TAPS_2; }
constexpr int TAPS = chunk(0) * chunk(1) * chunk(2);

// Tap t of the chunk that begins at tap `base`; false where the filter ends before it.
DEVICE bool chunk_tap(const Geometry& g, const int (&base)[3], int t, int (&tap)[DIMS]) {
  bool exists = true;
#pragma unroll
  for (int a = DIMS - 1; a >= 0; a--) {
    tap[a] = base[a] + t % chunk(a), t /= chunk(a);
    if (!FULL_CHUNKS) exists &= tap[a] < g.phase.taps[a];
  }
  return exists;
}

#if PASS == WGRAD
extern "C" __global__ void __launch_bounds__(THREADS, 2)
conv_wgrad_thin(const T* __restrict__ grad_y, const T* __restrict__ x, Result* __restrict__ partial, const Params p) {
  constexpr int SUMS = O * TAPS * V;
  __shared__ A sums[SUMS][THREADS];
  const Phase phase = phase_at(p, 0);
  const Geometry g{p, phase};
  int tile, c, index;
  int block = p.tiles.divmod((int)blockIdx.x, tile);
  block = p.channels.divmod(block, c);
  const int split = p.phases.divmod(block, index);
  const int group = (tile * LANES_G + lane_of_group()) * V;
  int base[3] = {};
#pragma unroll
  for (int a = DIMS - 1; a >= 0; a--) {
    const int n = ceil_div(g.phase.taps[a], chunk(a));
    base[a] = index % n * chunk(a), index /= n;
  }

  A own[SUMS] = {};
  if (group < (int)p.groups.divisor) {
    const T* from = x + group * p.source.group;
    const T* grad = grad_y + group * p.result.group;
    const int share = ceil_div(p.places, (int)p.splits.divisor), end = min_of(p.places, (split + 1) * share);
    for (int i = split * share + lane_of_place(); i < end; i += LANES_P) {
      const Half place = g.place(i);
      A d[O][V];
#pragma unroll
      for (int o = 0; o < O; o++)
#pragma unroll
        for (int v = 0; v < V; v += RV) {
          const Pack<T, RV> pack = load_pack<RV>(grad + place.other + o * (Offset)p.result.channel + v * (Offset)p.result.group);
#pragma unroll
          for (int i = 0; i < RV; i++) d[o][v + i] = convert<A>(pack.v[i]);
        }
#pragma unroll
      for (int t = 0; t < TAPS; t++) {
        int tap[DIMS];
        const bool exists = chunk_tap(g, base, t, tap);
        const Half entry = g.entry(c, tap);
        const bool in = exists && g.inside(place, entry);
        const Pack<T, V> pack = in ? load_pack<V>(from + (place.source + entry.source)) : Pack<T, V>{};
#pragma unroll
        for (int v = 0; v < V; v++)
#pragma unroll
          for (int o = 0; o < O; o++) own[(o * TAPS + t) * V + v] += d[o][v] * convert<A>(pack.v[v]);
      }
    }
  }
  sum_over_places(own, sums);

  partial += split * p.numel;
  for (int i = threadIdx.x; i < SUMS * LANES_G; i += THREADS) {
    const int lane = i % LANES_G, sum = i / LANES_G, v = sum % V, t = sum / V % TAPS, o = sum / V / TAPS;
    const int to = (tile * LANES_G + lane) * V + v;
    int tap[DIMS];
    if (chunk_tap(g, base, t, tap) && to < (int)p.groups.divisor)
      partial[to * p.filter.group + o * p.filter.row + g.entry(c, tap).other] =
          convert<Result>(sums[sum][PLACES_FAST ? lane * LANES_P : lane]);
  }
}

#else
constexpr int U = PLACES;

DEVICE int taps_along(const Geometry& g, int a) { return a < DIMS ? g.phase.taps[a] : 1; }

DEVICE void thin(const T* __restrict__ source, const T* __restrict__ filter, const T* __restrict__ bias,
                 Result* __restrict__ result, const Params& p) {
  int tile, index;
  int block = p.tiles.divmod((int)blockIdx.x, tile);
  block = p.phases.divmod(block, index);
  const Phase phase = phase_at(p, index);
  const Geometry g{p, phase};
  const int group = (tile * LANES_G + lane_of_group()) * V;
  if (group >= (int)p.groups.divisor) return;
  source += group * p.source.group, filter += group * p.filter.group, result += group * p.result.group;

  Half place[U];
#pragma unroll
  for (int u = 0; u < U; u++) place[u] = g.place((block * U + u) * LANES_P + lane_of_place());

  A acc[U][O][V] = {};
#pragma unroll 1
  for (int c = 0; c < (int)p.channels.divisor; c++)
#pragma unroll 1
    for (int t0 = 0; t0 < taps_along(g, 0); t0 += chunk(0))
#pragma unroll 1
      for (int t1 = 0; t1 < taps_along(g, 1); t1 += chunk(1))
#pragma unroll 1
        for (int t2 = 0; t2 < taps_along(g, 2); t2 += chunk(2)) {
          const int base[3] = {t0, t1, t2};
#pragma unroll
          for (int t = 0; t < TAPS; t++) {
            int tap[DIMS];
            const bool exists = chunk_tap(g, base, t, tap);
            const Half entry = g.entry(c, tap);
            A w[O][V];
#pragma unroll
            for (int o = 0; o < O; o++)
#pragma unroll
              for (int v = 0; v < V; v++)
                w[o][v] = exists ? convert<A>(filter[entry.other + o * (Offset)p.filter.row + v * (Offset)p.filter.group]) : A(0);
#pragma unroll
            for (int u = 0; u < U; u++) {
              const bool in = exists && g.inside(place[u], entry);
              const Pack<T, V> pack = in ? load_pack<V>(source + (place[u].source + entry.source)) : Pack<T, V>{};
#pragma unroll
              for (int v = 0; v < V; v++)
#pragma unroll
                for (int o = 0; o < O; o++) acc[u][o][v] += w[o][v] * convert<A>(pack.v[v]);
            }
          }
        }

#pragma unroll
  for (int o = 0; o < O; o++) {
    A b[V] = {};
    if (bias)
#pragma unroll
      for (int v = 0; v < V; v++) b[v] = convert<A>(bias[((group + v) * O + o) * p.bias]);
#pragma unroll
    for (int u = 0; u < U; u++)
#pragma unroll
      for (int v = 0; v < V; v += RV) {
        Pack<Result, RV> pack;
#pragma unroll
        for (int i = 0; i < RV; i++) pack.v[i] = convert<Result>(acc[u][o][v + i] + b[v + i]);
        if (place[u].other >= 0)
          store_pack<RV>(result + place[u].other + o * (Offset)p.result.channel + v * (Offset)p.result.group, pack);
      }
  }
}

#if PASS == FPROP
extern "C" __global__ void __launch_bounds__(THREADS, 3)
conv_fprop_thin(const T* __restrict__ x, const T* __restrict__ w, const T* __restrict__ bias, Result* __restrict__ y, const Params p) {
  thin(x, w, bias, y, p);
}
#else
extern "C" __global__ void __launch_bounds__(THREADS, 3)
conv_dgrad_thin(const T* __restrict__ grad_y, const T* __restrict__ w, Result* __restrict__ grad_x, const Params p) {
  thin(grad_y, w, nullptr, grad_x, p);
}
#endif
#endif

#else
// ---- tiled product --------------------------------------------------------------------------------------
constexpr int BM = BLOCK_M, BN = BLOCK_N, BK = BLOCK_K, TM = THREAD_M, TN = THREAD_N;
constexpr int GV = GATHER_VECTOR, PV = PLAIN_VECTOR, SV = STORE_VECTOR;
constexpr int THREADS_M = BM / TM, THREADS_N = BN / TN, THREADS = THREADS_M * THREADS_N;
constexpr int ACCESS = 16 / sizeof(A);                          // accumulators in 16 bytes of shared memory
constexpr int FM = min_of(TM, ACCESS), FN = min_of(TN, ACCESS);  // rows, columns a thread owns side by side
static_assert(BM % TM == 0 && BN % TN == 0 && TM % FM == 0 && TN % FN == 0, "threads fill the tile");
static_assert(THREADS >= BK && THREADS % 32 == 0 && BM % GV == 0 && BK % GV == 0 && BK % PV == 0, "packs fill the tile");
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
  DEVICE bool has(int i, int j) { return EXACT || (row(i) < EXTENT && step(j) < BK); }

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

// Entry j of the filter: channels or taps fastest, whichever the source's lanes follow.
DEVICE Half filter_entry(const Geometry& g, int j) {
  const bool exists = j < g.phase.entries;
  int rest = exists ? j : 0, c = 0, tap[DIMS];
  if (CHANNELS_FAST) rest = g.p.channels.divmod(rest, c);
#pragma unroll
  for (int a = DIMS - 1; a >= 0; a--) {
    if (CHANNELS_FAST && a == 0) {
      tap[0] = rest;
    } else {
      const int next = rest / g.phase.taps[a];
      tap[a] = rest - next * g.phase.taps[a], rest = next;
    }
  }
  Half h = g.entry(CHANNELS_FAST ? c : rest, tap);
  if (!exists) h.at[DIMS - 1] = FAR, h.other = NOWHERE;
  return h;
}

// Rows of the product, and the steps of its sum.
DEVICE Half row_at(const Geometry& g, int m) { return PASS == WGRAD ? filter_entry(g, m) : g.place(m); }
DEVICE Half step_at(const Geometry& g, int k) { return PASS == WGRAD ? g.place(k) : filter_entry(g, k); }

DEVICE void tiled(const T* __restrict__ gathered, const T* __restrict__ plain, const T* __restrict__ bias,
                  Result* __restrict__ out, const Params& p) {
  __shared__ Tiles tiles;
  __shared__ Phase phase;
  __shared__ int m0, n0, group, split;
  if (threadIdx.x == 0) {
    int index, block = p.tiles.divmod((int)blockIdx.x, n0);
    block = p.groups.divmod(block, group);
    block = p.phases.divmod(block, index);
    m0 = p.splits.divmod(block, split) * BM, n0 *= BN;
    phase = phase_at(p, index);
  }
  __syncthreads();
  const Geometry g{p, phase};

  gathered += group * p.source.group;
  plain += group * (PASS == WGRAD ? p.result.group : p.filter.group);
  const Offset plain_channel = (Offset)(PASS == WGRAD ? p.result.channel : p.filter.row);

  for (int m = threadIdx.x; m < BM; m += THREADS) tiles.rows[m] = row_at(g, m0 + m);
  for (int n = threadIdx.x; n < BN; n += THREADS) tiles.columns[n] = n0 + n < p.outputs ? (n0 + n) * plain_channel : NOWHERE;

  Pack<T, GV> gather[Gather::ROWS][Gather::STEPS];
  Pack<T, PV> straight[Plain::ROWS][Plain::STEPS];
  const auto describe = [&](int s) {
    if (threadIdx.x < BK) tiles.steps[s & 1][threadIdx.x] = step_at(g, s * BK + (int)threadIdx.x);
  };
  const auto fetch = [&](int s) {
#pragma unroll
    for (int i = 0; i < Gather::ROWS; i++) {
      const Half row = tiles.rows[min_of(Gather::row(i), BM - 1)];
#pragma unroll
      for (int j = 0; j < Gather::STEPS; j++) {
        const Half step = tiles.steps[s & 1][min_of(Gather::step(j), BK - 1)];
        gather[i][j] = Gather::has(i, j) && g.inside(row, step)
                           ? load_pack<GV>(gathered + (row.source + step.source)) : Pack<T, GV>{};
      }
    }
#pragma unroll
    for (int i = 0; i < Plain::ROWS; i++) {
      const Offset column = tiles.columns[min_of(Plain::row(i), BN - 1)];
#pragma unroll
      for (int j = 0; j < Plain::STEPS; j++) {
        const Offset step = tiles.steps[s & 1][min_of(Plain::step(j), BK - 1)].other;
        straight[i][j] = Plain::has(i, j) && (column | step) >= 0 ? load_pack<PV>(plain + (column + step)) : Pack<T, PV>{};
      }
    }
  };
  const auto commit = [&](int s) {
    Gather::commit(gather, tiles.gathered[s & 1]);
    Plain::commit(straight, tiles.plain[s & 1]);
  };

  // Lanes follow the result's contiguous axis, so that a warp's stores run together.
  const int tm = STORE_ALONG_ROWS ? (int)threadIdx.x % THREADS_M : (int)threadIdx.x / THREADS_N;
  const int tn = STORE_ALONG_ROWS ? (int)threadIdx.x / THREADS_M : (int)threadIdx.x % THREADS_N;
  A acc[TM][TN] = {};
  const auto multiply = [&](int s) {
#pragma unroll
    for (int k = 0; k < BK; k++) {
      Pack<A, FM> a[TM / FM];
      Pack<A, FN> b[TN / FN];
#pragma unroll
      for (int i = 0; i < TM / FM; i++) a[i] = load_pack<FM>(&tiles.gathered[s & 1][k][(i * THREADS_M + tm) * FM]);
#pragma unroll
      for (int j = 0; j < TN / FN; j++) b[j] = load_pack<FN>(&tiles.plain[s & 1][k][(j * THREADS_N + tn) * FN]);
#pragma unroll
      for (int i = 0; i < TM; i++)
#pragma unroll
        for (int j = 0; j < TN; j++) acc[i][j] += a[i / FM].v[i % FM] * b[j / FN].v[j % FN];
    }
  };

  const int steps = ceil_div(PASS == WGRAD ? p.places : g.phase.entries, BK);
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

  out += group * (PASS == WGRAD ? p.filter.group : p.result.group) + split * p.numel;
  const Offset out_channel = (Offset)(PASS == WGRAD ? p.filter.row : p.result.channel);
#pragma unroll
  for (int j = 0; j < TN; j++) {
    const int n = n0 + (j / FN * THREADS_N + tn) * FN + j % FN;
    if (bias && n < p.outputs) {
      const A b = convert<A>(bias[(group * p.outputs + n) * p.bias]);
#pragma unroll
      for (int i = 0; i < TM; i++) acc[i][j] += b;
    }
  }
#pragma unroll
  for (int i = 0; i < TM; i += STORE_ALONG_ROWS ? SV : 1) {
    const Offset to = tiles.rows[(i / FM * THREADS_M + tm) * FM + i % FM].other;
#pragma unroll
    for (int j = 0; j < TN; j += STORE_ALONG_ROWS ? 1 : SV) {
      const int n = n0 + (j / FN * THREADS_N + tn) * FN + j % FN;
      Pack<Result, SV> pack;
#pragma unroll
      for (int v = 0; v < SV; v++) pack.v[v] = convert<Result>(STORE_ALONG_ROWS ? acc[i + v][j] : acc[i][j + v]);
      if (to >= 0 && n < p.outputs) store_pack<SV>(out + (to + n * out_channel), pack);
    }
  }
}

#if PASS == FPROP
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
conv_fprop_direct(const T* __restrict__ x, const T* __restrict__ w, const T* __restrict__ bias, Result* __restrict__ y, const Params p) {
  tiled(x, w, bias, y, p);
}
#elif PASS == DGRAD
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
conv_dgrad_direct(const T* __restrict__ grad_y, const T* __restrict__ w, Result* __restrict__ grad_x, const Params p) {
  tiled(grad_y, w, nullptr, grad_x, p);
}
#else
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
conv_wgrad_direct(const T* __restrict__ grad_y, const T* __restrict__ x, Result* __restrict__ partial, const Params p) {
  tiled(x, grad_y, nullptr, partial, p);
}
#endif
#endif
