// Depthwise convolution, a filter of one channel for every channel of y: fprop, dgrad and wgrad over one to three
// axes, any stride, padding and dilation, read in place from NCHW or channels-last. It is limited by memory, and
// at 5x5 and 7x7 in half types by its multiply-adds; conv_depthwise_large.cu has the larger kernels.
//
// Maths. With c = k / multiplier, x outside of the image zero or as PADDING says, in two dimensions:
//
//     fprop  y[n,k,p,q]      = Σ r,s  w[k,r,s] · x[n, c, p·stride - pad + r·dilation, …]
//     dgrad  grad_x[n,c,h,w] = Σ k of c, r,s  w[k,r,s] · grad_y[n, k, (h + pad - r·dilation) / stride, …]
//                              over the r and s for which the division leaves no rest
//     wgrad  grad_w[k,r,s]   = Σ n,p,q  grad_y[n,k,p,q] · x[n, c, p·stride - pad + r·dilation, …]
//
// What fprop and dgrad write is act(scale · sum + bias + residual), see epilogue.cuh. With any of it dgrad is
// transposed convolution.
//
// Walking. A thread owns TILE columns (times V channels) of a strip of result rows and walks down the source. A step
// loads ROWS_IN source rows, each once, and adds them to all the result rows that they reach: LIVE rows of sums are
// under way in registers, and after each step the first ROWS_OUT of them are done and the others move up, which
// the multiply-adds of the unrolled loop do on their way:
//
//                        ROWS_IN   ROWS_OUT   LIVE             tap of source row `in`, live row `live`
//     fprop              stride    1          ⌈R / stride⌉     r = (LIVE - 1 - live) · stride + in
//     dgrad              1         stride     max(R, stride)   r = live
//     wgrad              as fprop; the live rows are those of grad_y, the sums R x S for the whole strip
//
// Along w the same holds between columns, and both relations are constants (row_tap, column_tap): strides cost no
// multiplication by zero, phases of dgrad are just rows and columns of a tile with taps of their own, and what
// nobody reads is not loaded. With DILATION_H rows are walked a dilation apart, each class by its own thread. Further
// planes of the filter (depth, and filters that share a channel in dgrad) are summed plane by plane in each step.
//
// Layout. CHANNELS_INNER: packs of V channels, lanes along channels, LANES packs in a block, whose filters are staged
// in shared memory first: their taps lie R·S apart. Else packs of X_VEC source and Y_VEC result columns, lanes along
// w; a tile is one pack of the result, so that stores are whole sectors, and the packs to its left and right, which
// its neighbours own, come from L1. Filters, then, are read from memory, all lanes alike. A 1-D NCHW problem is
// FOLDED into rows of 32 tiles, so that there is something to walk. Where alignment, sizes or strides do not
// allow packs, the widths are 1 and any strides work.
//
// Grid. fprop, dgrad: tiles, w fastest, then strips, dilations, planes, channels (NCHW), images; channels-last has
// tiles of channels fastest. wgrad: tiles of channels, depth taps, then `splits` parts of the tiles: a block adds up
// its threads' sums and writes one partial gradient, and conv_reduce_depthwise adds these in a fixed order. Nothing
// is atomic; each result is summed in an order that sizes and strides alone decide.
//
// Paper. N = 32, strips and registers as conv_depthwise.py chooses; an H100 issues 29.6 T instructions of threads a
// second and moves 3.0 TB/s, so that an output of 4 + 4 bytes has time for 79 instructions, one of 2 + 2 for 39.
// Instructions are counted in the compiled loops, and multiply-adds are R·S + 1 of them (dgrad: R·S / stride² + 1):
//
//                               outputs  NCHW, fp32                      channels-last, bf16
//                                        MB   µs  instr.    µs  regs     MB   µs  instr.    µs  regs
//     3x3       32@112          12.8 M  103   34    17.2     8    79     51   17    16.9    10   143
//     3x3 s2    96@112           9.6 M  193   64    22.5     8    80     96   32    26.6     9   121
//     3x3      576@14            3.6 M   29   10    24.3     3    64     14  4.8    16.9   2.6   143
//     3x3      960@7             1.5 M   12    4    35.3     2    56      6  2.0    16.9   1.9   143
//     5x5      240@28            6.0 M   48   16    33.4     8   127     24  8.0    38.6    10   168
//     7x7       96@56            9.6 M   77   26    58.1    21   168     39   13    72.1    29   168
//     causal 4, 4096@64k, silu  268.4 M 2147  716   38.5   349    48   1074  358    34.6   314   106
//
// The first µs are memory's, the second arithmetic's with the rows that strips read to begin with. 7x7 in bf16 is
// bound by arithmetic: 49 of its 72 instructions are products, 56 % of the peak in channels-last, 68 % in NCHW.
// wgrad takes 20 to 23 instructions for 3x3, 41 to 43 for 5x5, 69 to 81 for 7x7.
//
// Bytes. Memory moves each tensor once. L1 is asked for more: in channels-last for (TILE + S - 1) / TILE columns,
// 1.1 to 1.6 times the least with the result counted in; in NCHW for three packs a tile, twice the least in all,
// in the same sectors: 16 wavefronts for 128 outputs in fp32, where memory takes 70 cycles. Shuffles in their place
// would be 6 wavefronts and as many instructions more. Rows of odd length (7x7 in NCHW) are read by elements, and
// there a warp's request touches a line for each of some 4 planes: some 30 wavefronts for 32 outputs of fp32, where
// memory takes 18 cycles: L1 binds.
//
// V. More channels a thread mean wider accesses, but R·S·V weights and LIVE·TILE·V sums in registers: 4 for 3x3, 2
// for 5x5, 1 for 7x7. A warp's accesses still are runs of 64 bytes or more.
//
// Constants: PASS ELEMENT ACCUMULATOR INDEX (int, or long long where a tensor spans 2^31 elements) PADDING FILTER_T
// FILTER_R FILTER_S, STRIDE_ and DILATION_ D H W, PAD_W, CHANNELS_INNER VECTOR X_VEC Y_VEC X_DENSE Y_DENSE (1: columns
// are neighbours in memory) TILE LANES THREADS RESIDENT (blocks a multiprocessor, to budget registers for) FOLDED;
// fprop and dgrad ACTIVATION RESIDUAL FILTERS (of a channel: dgrad), wgrad RESULT. Sizes are run-time numbers.
#include "epilogue.cuh"
#include "padding.cuh"

#define FPROP 0  // values of PASS
#define DGRAD 1
#define WGRAD 2
#define REDUCE 3

using T = ELEMENT;
using A = ACCUMULATOR;  // float for the half types, else T
using Index = INDEX;

struct Strides { long long n, c, d, h, w; };  // in elements

struct Params {
  Strides source;                        // of what windows are laid over: x (dgrad: grad_y)
  Strides result;                        // y (dgrad: grad_x; wgrad: grad_y, which is read)
  long long w_k, w_t, w_r, w_s;          // the filter's strides (wgrad: those of what is written)
  long long numel;                       // elements of one partial result
  FastDiv w_tiles, strips, planes;       // of an image's channel, in this order: tiles along w, strips, result planes
  FastDiv channels;                      // of the result (NCHW)
  FastDiv channel_tiles, splits;         // what a block's number is made of (channels-last, wgrad)
  FastDiv multiplier;                    // filters a channel of x
  int N, K;                              // images, channels of the result (wgrad: filters)
  int D, H, W;                           // of the source
  int result_h, result_w;
  int strip;                             // steps of a strip
  int items;                             // tiles of the grid; wgrad: those of one channel
  int pad_d, row_offset, row_shift;      // see find_plane, source_row and store
  int source_fold, result_fold;          // columns from a row to the next where an axis is folded into rows
};
static_assert(sizeof(Params) == PARAMS_BYTES, "the Python structure must mirror this one");

#if PASS != REDUCE
// ---- which tap joins which place ------------------------------------------------------------------------
DEVICE constexpr int max_of(int a, int b) { return a > b ? a : b; }

constexpr int TAPS_D = FILTER_T, R = FILTER_R, S = FILTER_S, V = VECTOR;
constexpr bool BACK = PASS == DGRAD;
constexpr int TAPS = R * S;  // of one plane of the filter
constexpr int SPAN = (S - 1) * DILATION_W + 1;

// Along h: a step takes ROWS_IN source rows and finishes ROWS_OUT result rows, LIVE of which are under way.
constexpr int ROWS_IN = BACK ? 1 : STRIDE_H;
constexpr int ROWS_OUT = BACK ? STRIDE_H : 1;
constexpr int LIVE = BACK ? max_of(R, STRIDE_H) : ceil_div(R, STRIDE_H);
constexpr int WARM = BACK ? ceil_div(R, STRIDE_H) - 1 : LIVE - 1;  // steps before the first that finishes a row
static_assert(DILATION_H == 1 || STRIDE_H == 1, "rows walked one by one are a dilation apart, or a stride");

// The tap that joins the step's source row `in` and the live row `live`, or -1.
DEVICE constexpr int row_tap(int in, int live) {
  const int r = BACK ? live : (LIVE - 1 - live) * STRIDE_H + in;
  return r < R ? r : -1;
}

// Along w: a tile's TILE result columns, and the source columns they need, from a multiple of X_VEC on.
constexpr int Q_FIRST = BACK ? -floor_div(SPAN - 1 - PAD_W, STRIDE_W) : -PAD_W;
constexpr int Q_LAST = BACK ? floor_div(TILE - 1 + PAD_W, STRIDE_W) : (TILE - 1) * STRIDE_W + SPAN - 1 - PAD_W;
constexpr int HEAD = modulo(Q_FIRST, X_VEC);
constexpr int PACKS = ceil_div(HEAD + Q_LAST - Q_FIRST + 1, X_VEC);
static_assert((BACK ? TILE % (STRIDE_W * X_VEC) : TILE * STRIDE_W % X_VEC) == 0, "tiles begin where a pack does");
static_assert(TILE % Y_VEC == 0, "tiles are whole packs of the result");
static_assert(V == 1 || (X_VEC == 1 && Y_VEC == 1), "packs go along channels or along columns");

// The tap that joins the tile's result column and source column, or -1.
DEVICE constexpr int column_tap(int result, int source) {
  const int rest = BACK ? result + PAD_W - (Q_FIRST - HEAD + source) * STRIDE_W : source - HEAD - result * STRIDE_W;
  return rest < 0 || rest % DILATION_W || rest / DILATION_W >= S ? -1 : rest / DILATION_W;
}

DEVICE constexpr bool row_used(int in) {
  for (int live = 0; live < LIVE; live++) {
    if (row_tap(in, live) >= 0) return true;
  }
  return false;
}
DEVICE constexpr bool pack_used(int pack) {  // dilation and stride leave gaps
  for (int k = 0; k < TILE; k++) {
    for (int c = 0; c < X_VEC; c++) {
      if (column_tap(k, pack * X_VEC + c) >= 0) return true;
    }
  }
  return false;
}

// ---- reading ------------------------------------------------------------------------------------------------
// A pack from its load to its use: pairs of halves as words. As elements each would be moved by an instruction of its
// own, from step to step and to take them apart: a sixth of all that 3x3 issues.
template <class E, int N, bool PAIRS = sizeof(E) == 2 && N % 2 == 0> struct Held {
  Pack<E, N> pack;
  __device__ __forceinline__ E get(int i) const { return pack.v[i]; }
  __device__ __forceinline__ void set(int i, E value) { pack.v[i] = value; }
};
template <class E, int N> struct __align__(sizeof(E) * N) Held<E, N, true> {
  unsigned words[N / 2];
  __device__ __forceinline__ E get(int i) const { return E{(unsigned short)(words[i / 2] >> i % 2 * 16)}; }
  __device__ __forceinline__ void set(int i, E value) {
    words[i / 2] = (words[i / 2] & 0xffff0000u >> i % 2 * 16) | (unsigned)value.bits << i % 2 * 16;
  }
};
template <int N> DEVICE Held<T, N> load_held(const T* p) { return *reinterpret_cast<const Held<T, N>*>(p); }

// The source columns of one row for a tile; what nobody uses stays zero, and costs nothing.
struct Line { Held<T, X_VEC * V> packs[PACKS]; };

// Strides along w, where they are known.
DEVICE Index source_step(const Params& p) { return X_DENSE ? 1 : (Index)p.source.w; }
DEVICE Index result_step(const Params& p) { return Y_DENSE ? 1 : (Index)p.result.w; }

// Column `first` is the line's first; at `line` would be the row's column 0.
DEVICE Line load_line(const T* source, Index line, bool row_exists, int first, const Params& p) {
  Line loaded;
  line += first * source_step(p);
#pragma unroll
  for (int i = 0; i < PACKS; i++) {
    loaded.packs[i] = Held<T, X_VEC * V>{};
    if (!pack_used(i)) continue;
    const int column = first + i * X_VEC;
    // A pack is inside or outside as a whole: it starts at a multiple of X_VEC, as the row's end does.
    if (row_exists && (unsigned)column < (unsigned)p.W) {
      loaded.packs[i] = load_held<X_VEC * V>(source + (line + i * X_VEC * source_step(p)));
    } else if (PADDING != ZEROS && row_exists) {
#pragma unroll
      for (int c = 0; c < X_VEC; c++) {
        const int inside = continued(column + c, p.W);
        if ((unsigned)inside >= (unsigned)p.W) continue;  // beyond the padding: of columns that do not exist
        const Pack<T, V> place = load_pack<V>(source + (line + (inside - first) * source_step(p)));
#pragma unroll
        for (int v = 0; v < V; v++) loaded.packs[i].set(c * V + v, place.v[v]);
      }
    }
  }
  return loaded;
}

// The place along an axis of `size` that is read for coordinate `at`, and whether there is one.
DEVICE bool find(int& at, int size) {
  if (PADDING != ZEROS) at = continued(at, size);
  return (unsigned)at < (unsigned)size;
}

// Row `h` of the plane that begins at `plane`, for a tile whose first source column is `first`.
DEVICE Line load_row(const T* source, Index plane, bool plane_exists, int h, int first, const Params& p) {
  const bool exists = find(h, p.H) && plane_exists;
  if (FOLDED) first += h * p.source_fold;
  return load_line(source, plane + h * (Index)p.source.h, exists, first, p);
}

// ---- who owns what ------------------------------------------------------------------------------------------
constexpr int ROWS = THREADS / LANES;  // tiles side by side in a block; LANES of them are one place's channels
static_assert(THREADS % LANES == 0 && (CHANNELS_INNER || LANES == 1), "a block holds whole rows of lanes");

// A thread's tile: V channels of result from k on, TILE columns from w on, of the rows that steps begin to end - 1
// finish; `rest` is the first row's place within a dilation.
struct Tile { int n, k, d, rest, begin, end, w; };

// The place of tile `i`, whose channel is known already where lanes are channels or a block has only one.
DEVICE Tile tile_of(int i, int k, const Params& p) {
  Tile tile;
  int strip;
  i = p.w_tiles.divmod(i, tile.w);
  i = p.strips.divmod(i, strip);
  tile.rest = i % DILATION_H, i /= DILATION_H;
  tile.n = p.planes.divmod(i, tile.d);
  tile.k = k;
  if (!CHANNELS_INNER && PASS != WGRAD) tile.n = p.channels.divmod(tile.n, tile.k);
  tile.w *= TILE;
  tile.begin = strip * p.strip, tile.end = tile.begin + p.strip;
  return tile;
}

// The source plane that depth tap t of result plane d reads.
DEVICE bool find_plane(int d, int t, int& plane, const Params& p) {
  if (!BACK) {
    plane = d * STRIDE_D + t * DILATION_D - p.pad_d;
    return find(plane, p.D);
  }
  const int rest = d + p.pad_d - t * DILATION_D;
  plane = rest / STRIDE_D;
  return rest >= 0 && rest % STRIDE_D == 0 && plane < p.D;
}

DEVICE int first_column(const Tile& tile) {
  return (BACK ? tile.w / STRIDE_W : tile.w * STRIDE_W) + Q_FIRST - HEAD;
}
DEVICE int source_row(const Tile& tile, int step, int in, const Params& p) {
  return tile.rest + DILATION_H * (step * ROWS_IN + in) + p.row_offset;
}

// visit(source column, v, value) for what a line holds and somebody uses.
template <class Visit> DEVICE void each_column(const Line& line, const Visit& visit) {
#pragma unroll
  for (int i = 0; i < PACKS; i++) {
    if (!pack_used(i)) continue;
#pragma unroll
    for (int c = 0; c < X_VEC; c++) {
#pragma unroll
      for (int v = 0; v < V; v++) visit(i * X_VEC + c, v, convert<A>(line.packs[i].get(c * V + v)));
    }
  }
}
#endif

#if PASS == FPROP || PASS == DGRAD
// ---- fprop and dgrad ----------------------------------------------------------------------------------------
// What one result channel sums over: planes of its filter, and backward the FILTERS that read it.
constexpr int PLANES = TAPS_D * FILTERS;
constexpr Activation ACT = Activation::ACTIVATION;

// Weights as accumulators, of the block's channels side by side so that lanes read neighbours.
constexpr int PITCH = LANES * V + V;  // the pad moves what is written to other banks
struct __align__(16) Filters { A w[CHANNELS_INNER ? PLANES * TAPS : 1][PITCH]; };

DEVICE A weight(const T* w, int k, int plane, int tap, const Params& p) {
  const int filter = BACK ? k * FILTERS + plane / TAPS_D : k;
  const Index at = filter * (Index)p.w_k + plane % TAPS_D * (Index)p.w_t;
  return convert<A>(w[at + tap / S * (Index)p.w_r + tap % S * (Index)p.w_s]);
}

DEVICE void stage_filters(Filters& filters, const T* w, int first, const Params& p) {
  for (int i = threadIdx.x; i < PLANES * TAPS * LANES * V; i += THREADS) {
    const int tap = i % TAPS, plane = i / TAPS % PLANES, k = i / (TAPS * PLANES);
    if (first + k < p.K) filters.w[plane * TAPS + tap][k] = weight(w, first + k, plane, tap, p);
  }
  __syncthreads();
}

struct Finish { const T *scale, *bias, *residual; };  // what a sum meets on its way out; null: nothing

DEVICE void slide(const T* __restrict__ source, const T* __restrict__ w, const Finish& finish,
                  T* __restrict__ result, const Params& p) {
  int block = blockIdx.x, channel_tile = 0;
  if (CHANNELS_INNER) block = p.channel_tiles.divmod(block, channel_tile);
  const int lane = threadIdx.x % LANES, first = channel_tile * LANES * V;
  __shared__ Filters filters;
  if (CHANNELS_INNER) stage_filters(filters, w, first, p);
  const int i = block * ROWS + threadIdx.x / LANES;
  const Tile tile = tile_of(i, first + lane * V, p);
  if (i >= p.items || tile.k >= p.K) return;

  A taps[TAPS][V];
  const auto fetch_taps = [&](int plane) {
#pragma unroll
    for (int tap = 0; tap < TAPS; tap++) {
      if (CHANNELS_INNER) load_as(taps[tap], &filters.w[plane * TAPS + tap][lane * V]);
      else taps[tap][0] = weight(w, tile.k, plane, tap, p);
    }
  };
  const int channel = BACK ? tile.k * FILTERS : p.multiplier.div(tile.k), from = first_column(tile);
  const Index image = tile.n * (Index)p.source.n + channel * (Index)p.source.c;
  const auto load = [&](int step, int in, int plane) {
    int z;
    const bool exists = find_plane(tile.d, plane % TAPS_D, z, p) && row_used(in) && step < tile.end;
    const Index at = image + plane / TAPS_D * (Index)p.source.c + z * (Index)p.source.d;
    return load_row(source, at, exists, source_row(tile, step, in, p), from, p);
  };

  A sum[LIVE][TILE][V] = {};
  const auto accumulate = [&](const Line& line, int in) {
    each_column(line, [&](int column, int v, A value) {
#pragma unroll
      for (int live = 0; live < LIVE; live++) {
#pragma unroll
        for (int k = 0; k < TILE; k++) {
          const int r = row_tap(in, live), s = column_tap(k, column);
          if (r >= 0 && s >= 0) sum[live][k][v] += taps[r * S + s][v] * value;
        }
      }
    });
  };

  ScaleShift<A> scale_shift[V];
#pragma unroll
  for (int v = 0; v < V; v++) scale_shift[v] = ScaleShift<A>::of(finish.scale, finish.bias, tile.k + v);
  const Index to = tile.n * (Index)p.result.n + tile.k * (Index)p.result.c + tile.d * (Index)p.result.d +
                   tile.w * result_step(p);
  const auto store = [&](int step, int out) {
    const int row = tile.rest + DILATION_H * (step * ROWS_OUT + out) - p.row_shift;
    if (step < tile.begin || (unsigned)row >= (unsigned)p.result_h) return;
    const int folded = FOLDED ? row * p.result_fold : 0;
#pragma unroll
    for (int k = 0; k < TILE; k += Y_VEC) {
      if (tile.w + folded + k >= p.result_w) continue;
      A z[Y_VEC * V];
#pragma unroll
      for (int j = 0; j < Y_VEC * V; j++) z[j] = scale_shift[j % V](sum[out][k + j / V][j % V]);
      const Index at = to + row * (Index)p.result.h + (folded + k) * result_step(p);
      store_finished<ACT>(result + at, RESIDUAL ? finish.residual + at : nullptr, z);
    }
  };

  // Filters of one plane stay in registers, and while a row is summed the next one is on its way. Those of several
  // planes take turns.
  int step = tile.begin - WARM;
  Line ahead;
  if (PLANES == 1) {
    fetch_taps(0);
    ahead = load(step, 0, 0);
  }
#pragma unroll LIVE
  for (; step < tile.end; step++) {
    if (PLANES == 1) {
#pragma unroll
      for (int in = 0; in < ROWS_IN; in++) {
        const Line now = ahead;
        ahead = in + 1 < ROWS_IN ? load(step, in + 1, 0) : load(step + 1, 0, 0);
        accumulate(now, in);
      }
    } else {
#pragma unroll 1
      for (int plane = 0; plane < PLANES; plane++) {
        fetch_taps(plane);
#pragma unroll
        for (int in = 0; in < ROWS_IN; in++) accumulate(load(step, in, plane), in);
      }
    }
#pragma unroll
    for (int out = 0; out < ROWS_OUT; out++) store(step, out);
#pragma unroll
    for (int live = 0; live < LIVE; live++) {
#pragma unroll
      for (int j = 0; j < TILE * V; j++) {
        const int next = live + ROWS_OUT;
        sum[live][j / V][j % V] = next < LIVE ? sum[next < LIVE ? next : 0][j / V][j % V] : A(0);
      }
    }
  }
}
#endif

#if PASS == FPROP
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
conv_fprop_depthwise(const T* __restrict__ x, const T* __restrict__ w, const T* __restrict__ scale,
                     const T* __restrict__ bias, const T* __restrict__ residual, T* __restrict__ y, const Params p) {
  slide(x, w, {scale, bias, residual}, y, p);
}
#elif PASS == DGRAD
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
conv_dgrad_depthwise(const T* __restrict__ grad_y, const T* __restrict__ w, const T* __restrict__ scale,
                     const T* __restrict__ bias, const T* __restrict__ residual, T* __restrict__ grad_x,
                     const Params p) {
  slide(grad_y, w, {scale, bias, residual}, grad_x, p);
}

#elif PASS == WGRAD
// ---- wgrad --------------------------------------------------------------------------------------------------
// The last LIVE rows of grad_y stay in registers: a row of x meets all of them, once.
struct Step {
  Line x[ROWS_IN];
  Held<T, Y_VEC * V> grad_y[TILE / Y_VEC];
};

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
conv_wgrad_depthwise(const T* __restrict__ grad_y, const T* __restrict__ x, RESULT* __restrict__ grad_w,
                     const Params p) {
  int channel_tile, block = p.channel_tiles.divmod(blockIdx.x, channel_tile);
  const int t = block % TAPS_D, split = block / TAPS_D;
  const int lane = threadIdx.x % LANES, row = threadIdx.x / LANES, k = (channel_tile * LANES + lane) * V;

  A sum[TAPS][V] = {};
  for (int i = split * ROWS + row; k < p.K && i < p.items; i += (int)p.splits.divisor * ROWS) {
    const Tile tile = tile_of(i, k, p);
    const int from = first_column(tile);
    int z;
    const bool exists = find_plane(tile.d, t, z, p);
    const Index plane = tile.n * (Index)p.source.n + p.multiplier.div(k) * (Index)p.source.c +
                        z * (Index)p.source.d;
    const Index other = tile.n * (Index)p.result.n + k * (Index)p.result.c + tile.d * (Index)p.result.d +
                        tile.w * result_step(p);
    const auto load = [&](int step) {
      Step loaded;
#pragma unroll
      for (int in = 0; in < ROWS_IN; in++) {
        const bool wanted = exists && row_used(in) && step < tile.end + LIVE - 1;
        loaded.x[in] = load_row(x, plane, wanted, source_row(tile, step, in, p), from, p);
      }
      const int h = tile.rest + DILATION_H * step, folded = FOLDED ? h * p.result_fold : 0;
#pragma unroll
      for (int j = 0; j < TILE; j += Y_VEC) {
        const bool in = step < tile.end && h < p.result_h && tile.w + folded + j < p.result_w;
        const Index at = other + h * (Index)p.result.h + (folded + j) * result_step(p);
        loaded.grad_y[j / Y_VEC] = in ? load_held<Y_VEC * V>(grad_y + at) : Held<T, Y_VEC * V>{};
      }
      return loaded;
    };

    A live_rows[LIVE][TILE][V] = {};
    Step ahead = load(tile.begin);
#pragma unroll 1  // live rows move up by MOVs, a fifth of a small loop: unrolled, it would cost twice the registers
    for (int step = tile.begin; step < tile.end + LIVE - 1; step++) {
      const Step now = ahead;
      ahead = load(step + 1);
#pragma unroll
      for (int j = 0; j < TILE * V; j++) {
#pragma unroll
        for (int live = 0; live + 1 < LIVE; live++) {
          live_rows[live][j / V][j % V] = live_rows[live + 1][j / V][j % V];
        }
        live_rows[LIVE - 1][j / V][j % V] = convert<A>(now.grad_y[j / (Y_VEC * V)].get(j % (Y_VEC * V)));
      }
#pragma unroll
      for (int in = 0; in < ROWS_IN; in++) {
        each_column(now.x[in], [&](int column, int v, A value) {
#pragma unroll
          for (int live = 0; live < LIVE; live++) {
#pragma unroll
            for (int j = 0; j < TILE; j++) {
              const int r = row_tap(in, live), s = column_tap(j, column);
              if (r >= 0 && s >= 0) sum[r * S + s][v] += live_rows[live][j][v] * value;
            }
          }
        });
      }
    }
  }

  // The block's threads are added up: those of a warp by shuffles where all have one channel, then row by row.
  constexpr int PARTS = CHANNELS_INNER ? ROWS : ceil_div(THREADS, 32), COLUMNS = LANES * V;
  __shared__ __align__(16) A sums[PARTS][TAPS][COLUMNS];
#pragma unroll
  for (int tap = 0; tap < TAPS; tap++) {
    if (CHANNELS_INNER) {
      store_as(&sums[row][tap][lane * V], sum[tap]);
    } else {
      const A of_warp = warp_sum(sum[tap][0]);
      if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32][tap][0] = of_warp;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < TAPS * COLUMNS; i += THREADS) {
    const int tap = i / COLUMNS, column = i % COLUMNS, filter = channel_tile * COLUMNS + column;
    if (filter >= p.K) continue;
    A total = A(0);
#pragma unroll
    for (int part = 0; part < PARTS; part++) total += sums[part][tap][column];
    const long long at = filter * p.w_k + t * p.w_t + tap / S * p.w_r + tap % S * p.w_s;
    grad_w[split * p.numel + at] = convert<RESULT>(total);
  }
}

#else
// ---- second pass of wgrad: sums of partial gradients, each dense; k t r s name its axes, in any order -------
constexpr int LANES_R = 32, ROWS_R = 8, THREADS_R = LANES_R * ROWS_R;

extern "C" __global__ void __launch_bounds__(THREADS_R)
conv_reduce_depthwise(const A* __restrict__ partial, T* __restrict__ grad_w, const Params p) {
  __shared__ A sums[ROWS_R][LANES_R];
  const int lane = threadIdx.x % LANES_R, row = threadIdx.x / LANES_R;
  const int i = blockIdx.x * LANES_R + lane;
  A sum = A(0);
  if (i < p.items) {
#pragma unroll 4
    for (int split = row; split < (int)p.splits.divisor; split += ROWS_R) sum += partial[split * p.numel + i];
  }
  sums[row][lane] = sum;
  __syncthreads();
  if (row > 0 || i >= p.items) return;
#pragma unroll
  for (int other = 1; other < ROWS_R; other++) sum += sums[other][lane];
  int t, r, s;
  const int k = p.planes.divmod(p.strips.divmod(p.w_tiles.divmod(i, s), r), t);
  grad_w[k * p.w_k + t * p.w_t + r * p.w_r + s * p.w_s] = convert<T>(sum);
}
#endif
