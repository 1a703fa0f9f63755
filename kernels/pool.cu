// Max and average pooling of N x C x D x H x W, forward and backward; 1-D and 2-D problems have axes of size 1.
//
// Maths. Window (z, p, q) of one channel's plane covers the places d = z·stride - pad + t·dilation for t of 0 to
// T-1, likewise h and r, w and s; adaptive windows cover floor(p·H/P) to ceil((p+1)·H/P) - 1, and T R S are the
// largest of them. Padding is never read:
//
//     max      y = the window's maximum; offset = (t·R + r)·S + s of the place it came from
//     gather   y = x at the places that offsets name: what the backward pass's own gradient needs
//              PyTorch's choice: the first maximum in that order, but any NaN beats any number and a later NaN
//              an earlier one; a window that is -inf throughout has the offset of its first place
//     average  y = Σx / divisor; the divisor counts the places inside the input, or inside the padded input
//              (count_include_pad), or is given
//     backward grad_x[place] = Σ over the windows covering it of grad_y (max: where the offset names the place)
//              or of grad_y / divisor (average)
//
// An offset takes one byte where the window has at most 255 places, four beyond. PyTorch's index takes eight.
//
// Layout. Tensors are read in place by their strides. CHANNELS_INNER tells along what a thread's accesses are
// wide: packs of C_VEC channels (channels-last), or packs of X_VEC columns of x and Y_VEC of y (NCHW), at most 16
// bytes of elements. Where alignment, sizes or strides do not allow packs, the widths are 1 and any strides work.
//
// Forms, each right for every problem it is given:
//
//     tile    One thread owns TILE neighbours along w, of y forward or of grad_x backward (there in TILE_H rows),
//             times C_VEC channels. Windows, strides and dilations are constants: loops unroll, a column is loaded
//             once for all the windows it lies in, and backward a tile starts at a multiple of the stride, so that
//             which of its places meet which windows is known at compile time.
//     loop    One thread owns one place times C_VEC channels, or backward in NCHW the TILE places of a pack; windows
//             are run-time numbers. For adaptive windows, for those too large to unroll, and for gather.
//     reduce  Forward only. PER_OUTPUT threads share an output: LANES channel packs side by side times rows of
//             places, merged by shuffles and then over warps in a fixed order. For large windows with few
//             outputs, as in global pooling, where a thread an output would leave the GPU idle.
//
// What serves what, in 1-D, 2-D and 3-D alike (an axis that is missing has windows of one place and costs nothing;
// depth adds rows to a window, forward and backward):
//
//     ordinary windows of up to some thirty columns                        tile; in packs where rows are whole packs
//     the same where rows are odd or off alignment                         tile, its neighbouring lanes scalar
//     adaptive windows that divide the input evenly                        as ordinary ones of that size
//     global ones, and large windows that are few or far apart, forward    reduce; axes that are one run joined
//     the same backward; adaptive ones; larger windows                     loop
//
// Grid. x: blocks of THREADS over the tiles of `images` images, w fastest in NCHW and channels fastest in
// channels-last, so that a warp's accesses are one run; y: chunks of the batch, for tensors of more than 2^31
// tiles. Every element of a result belongs to one thread and is written once; nothing is atomic, and sums run
// in a fixed order: the same input gives the same bits.
//
// Bytes. Forward reads x and writes y and offsets, backward reads grad_y and offsets and writes grad_x, each once:
// the floor. A byte that is wanted again (a column by the next tile, a row by the next row of windows, grad_y by
// up to ceil(R/stride)·ceil(S/stride) elements) is wanted by a thread nearby and comes from L1 or L2.
//
// Why this way. Backward could scatter, one window a thread: fewer reads, but overlapping windows would need
// atomics, whose order changes from run to run, and grad_x would have to be zeroed first. Gathering writes
// grad_x once, in whole packs. Shared memory would only repeat what L1 does: reuse is a few neighbouring bytes.
//
// Constants: ELEMENT, ACCUMULATOR, OFFSET, INDEX (int, or long long where a tensor spans 2^31 elements),
// CHANNELS_INNER, C_VEC, X_VEC, Y_VEC, TILE, FIXED (1: the tile form) and for that form alone TILE_H, WINDOW_ STRIDE_
// DILATION_ D H W, PAD_H, PAD_W (else 1 and 0), PER_OUTPUT and LANES (reduce form, else 1), UNIFORM (1: all windows
// have one divisor), THREADS, PARAMS_BYTES; and the name of the wanted entry in capitals. Batch, channels and
// sizes are run-time numbers.
#include "common.cuh"

using T = ELEMENT;
using A = ACCUMULATOR;
using Offset = OFFSET;
using Index = INDEX;
static_assert(FIXED || (TILE == (PER_OUTPUT > 1 ? 1 : X_VEC) && TILE_H == 1), "run-time windows: a pack a thread");
static_assert(C_VEC == 1 || (X_VEC == 1 && Y_VEC == 1), "packs go along channels or along columns");
static_assert(C_VEC * X_VEC * sizeof(T) <= 16 && C_VEC * Y_VEC * sizeof(T) <= 16, "a pack is one access");
static_assert(!CHANNELS_INNER || (X_VEC == 1 && Y_VEC == 1), "channels-last packs hold channels");

struct Strides { long long n, c, d, h, w; };  // in elements; d h w stand for z p q in y and offsets

struct Axis {
  int in, out, window, stride, dilation, pad;
  FastDiv by_stride, by_in, by_out;  // the last two for adaptive windows
};

struct PoolParams {
  Strides x, y, offsets;  // or of grad_x and grad_y
  double reciprocal;      // of the divisor, where all windows have the same
  Axis d, h, w;
  FastDiv c_tiles, w_tiles, rows, planes;  // extents of the tensor that is written, in tiles
  FastDiv row_packs, window_rows;          // a window's packs along w and its rows along h (reduce form)
  int N, C, images, tiles;                 // images and tiles of one chunk of the batch
  int adaptive, count_include_pad, divisor;
};
static_assert(sizeof(PoolParams) == PARAMS_BYTES, "the Python structure must mirror this one");

// ---- who owns what --------------------------------------------------------------------------------------
struct Tile { int n, c, d, h, w; };  // the first of its places, in the tensor that is written

// The i-th tile of the block's chunk; `lane` is the channel pack within a tile that spans several.
DEVICE Tile tile_of(int i, int lane, const PoolParams& p) {
  Tile tile;
  int c, w;
  if (CHANNELS_INNER) {
    i = p.c_tiles.divmod(i, c);
    i = p.w_tiles.divmod(i, w);
    i = p.rows.divmod(i, tile.h);
    tile.n = p.planes.divmod(i, tile.d);
  } else {
    i = p.w_tiles.divmod(i, w);
    i = p.rows.divmod(i, tile.h);
    i = p.planes.divmod(i, tile.d);
    tile.n = p.c_tiles.divmod(i, c);
  }
  tile.n += blockIdx.y * p.images;
  tile.c = (c * LANES + lane) * C_VEC;
  tile.h *= TILE_H;
  tile.w = w * TILE;
  return tile;
}

template <class E> DEVICE E* line_of(E* tensor, const Strides& s, int n, int c, int d, int h) {
  return tensor + (n * (Index)s.n + c * (Index)s.c + d * (Index)s.d + h * (Index)s.h);
}

// Writes one row of a tile, VEC places at a time; `width` is the length of the tensor's rows.
template <int VEC, class E, class B>
DEVICE void store_tile(E* tensor, const Strides& s, const Tile& tile, int width, const B (&values)[TILE][C_VEC]) {
  E* line = line_of(tensor, s, tile.n, tile.c, tile.d, tile.h);
#pragma unroll
  for (int k = 0; k < TILE; k += VEC) {
    B pack[VEC * C_VEC];
#pragma unroll
    for (int i = 0; i < VEC * C_VEC; i++) pack[i] = values[k + i / C_VEC][i % C_VEC];
    if (tile.w + k < width) store_as(line + (tile.w + k) * (Index)s.w, pack);
  }
}

// ---- windows along one axis -----------------------------------------------------------------------------
// The constants of an axis where they are fixed, else its run-time numbers.
template <int WINDOW, int STRIDE, int DILATION> struct Along {
  DEVICE int window(const Axis& a) { return FIXED ? WINDOW : a.window; }
  DEVICE int stride(const Axis& a) { return FIXED ? STRIDE : a.stride; }
  DEVICE int dilation(const Axis& a) { return FIXED ? DILATION : a.dilation; }
  static constexpr int SPAN = (WINDOW - 1) * DILATION + 1;
  static constexpr int COVERS = (SPAN - 1) / STRIDE + 1;  // the most windows that reach over a place
};
using AlongD = Along<WINDOW_D, STRIDE_D, DILATION_D>;
using AlongH = Along<WINDOW_H, STRIDE_H, DILATION_H>;
using AlongW = Along<WINDOW_W, STRIDE_W, DILATION_W>;

// floor(a·b / divisor). Products that may pass 2^31 come with 64-bit indices.
DEVICE int scaled(int a, int b, const FastDiv& divisor, int add = 0) {
  if constexpr (sizeof(Index) == 4) return divisor.div(a * b + add);
  return (int)(((Index)a * b + add) / divisor.divisor);
}
DEVICE int adaptive_start(const Axis& a, int out) { return scaled(out, a.in, a.by_out); }
DEVICE int adaptive_end(const Axis& a, int out) { return scaled(out + 1, a.in, a.by_out, a.out - 1); }

// Places start + i·step of a window; those of lo <= i < hi lie in the input.
struct Span { int start, step, lo, hi; };

template <class G> DEVICE Span window_of(const Axis& a, int out, const PoolParams& p) {
  if (!FIXED && p.adaptive) {
    const int start = adaptive_start(a, out);
    return {start, 1, 0, adaptive_end(a, out) - start};
  }
  const int start = out * G::stride(a) - a.pad, step = G::dilation(a), window = G::window(a);
  // A window of padding alone (dilation can make one) has its last place as first: all of them are outside.
  const int lo = start >= 0 ? 0 : min(step == 1 ? -start : (step - 1 - start) / step, window - 1);
  const int rest = a.in - start;  // places from the window's start to the input's end
  return {start, step, lo, min(step == 1 ? rest : (rest + step - 1) / step, window)};
}

// How many places of a window along this axis an average counts.
template <class G> DEVICE int counted(const Axis& a, int out, const PoolParams& p) {
  const Span s = window_of<G>(a, out, p);
  return p.count_include_pad ? min(s.start + G::window(a), a.in + a.pad) - s.start : s.hi - s.lo;
}

// How many rows to unroll: their loads go out together, as far as they find registers.
template <int ROWS, int ROW_BYTES, int MOST_BYTES>
constexpr int rows_in_flight = ROWS * ROW_BYTES <= MOST_BYTES ? ROWS
                               : 2 * ROW_BYTES <= MOST_BYTES  ? MOST_BYTES / ROW_BYTES : 1;

#if defined(MAX_POOL_FWD) || defined(AVG_POOL_FWD)  // ---- forward: every value of a tile's windows ---------
// A tile's columns of one row of x, from a multiple of X_VEC on; X_HEAD of them come before the first window.
constexpr int X_HEAD = modulo(-PAD_W, X_VEC);
constexpr int X_COLUMNS = ceil_div(X_HEAD + (TILE - 1) * STRIDE_W + AlongW::SPAN, X_VEC) * X_VEC;
constexpr int ROWS = WINDOW_D * WINDOW_H;
// Packs of channels make one row wide enough; more rows would only cost registers.
constexpr int UNROLLED_ROWS = C_VEC == 1 ? rows_in_flight<ROWS, X_COLUMNS * sizeof(T), 192> : 1;

// Whether any window of the tile has a place in columns [first, first + X_VEC): dilation leaves gaps.
DEVICE constexpr bool column_used(int first) {
  for (int k = 0; k < TILE; k++) {
    for (int s = 0; s < WINDOW_W; s++) {
      const int column = X_HEAD + k * STRIDE_W + s * DILATION_W - first;
      if (column >= 0 && column < X_VEC) return true;
    }
  }
  return false;
}

// visitor.take(k, v, value, place) for the k-th window and v-th channel of the tile, for each value of the
// window in the order of its places. Values outside of the input are left out or are Visitor::padding().
template <class Visitor>
DEVICE void scan_windows(const T* x, const Tile& tile, const PoolParams& p, Visitor& visitor) {
  const Span d = window_of<AlongD>(p.d, tile.d, p), h = window_of<AlongH>(p.h, tile.h, p);
  const T* plane = line_of(x, p.x, tile.n, tile.c, 0, 0);
  if constexpr (FIXED) {
    const int first = tile.w * STRIDE_W - PAD_W - X_HEAD;
#pragma unroll UNROLLED_ROWS
    for (int row = 0; row < ROWS; row++) {
      const int t = row / WINDOW_H, r = row % WINDOW_H;
      // A condition of the loads rather than a branch around them, which would keep rows apart.
      const bool inside = t >= d.lo && t < d.hi && r >= h.lo && r < h.hi;
      const T* line = plane + ((d.start + t * DILATION_D) * (Index)p.x.d + (h.start + r * DILATION_H) * (Index)p.x.h);
      A columns[X_COLUMNS][C_VEC];
#pragma unroll
      for (int c = 0; c < X_COLUMNS; c += X_VEC) {
        if (!column_used(c)) continue;
        A pack[X_VEC * C_VEC];
#pragma unroll
        for (int i = 0; i < X_VEC * C_VEC; i++) pack[i] = Visitor::padding();
        // Packs start at multiples of X_VEC, and so does the row's end: a pack is inside or outside as a whole.
        if (inside && (unsigned)(first + c) < (unsigned)p.w.in) load_as(pack, line + (first + c) * (Index)p.x.w);
#pragma unroll
        for (int i = 0; i < X_VEC * C_VEC; i++) columns[c + i / C_VEC][i % C_VEC] = pack[i];
      }
#pragma unroll
      for (int k = 0; k < TILE; k++) {
#pragma unroll
        for (int s = 0; s < WINDOW_W; s++) {
#pragma unroll
          for (int v = 0; v < C_VEC; v++) {
            visitor.take(k, v, columns[X_HEAD + k * STRIDE_W + s * DILATION_W][v], row * WINDOW_W + s);
          }
        }
      }
    }
  } else {
    const Span w = window_of<AlongW>(p.w, tile.w, p);
    for (int t = d.lo; t < d.hi; t++) {
      for (int r = h.lo; r < h.hi; r++) {
        const T* line = plane + ((d.start + t * d.step) * (Index)p.x.d + (h.start + r * h.step) * (Index)p.x.h);
#pragma unroll 4
        for (int s = w.lo; s < w.hi; s++) {
          A pack[C_VEC];
          load_as(pack, line + (w.start + s * w.step) * (Index)p.x.w);
#pragma unroll
          for (int v = 0; v < C_VEC; v++) visitor.take(0, v, pack[v], (t * p.h.window + r) * p.w.window + s);
        }
      }
    }
  }
}
#endif

// ---- maximum --------------------------------------------------------------------------------------------
struct Best {
  A value[TILE][C_VEC];
  int place[TILE][C_VEC];

  DEVICE A padding() { return A(__int_as_float((int)0xff800000)); }  // -inf beats nothing

  __device__ __forceinline__ void start(const Tile& tile, const PoolParams& p) {
    const int t = window_of<AlongD>(p.d, tile.d, p).lo, r = window_of<AlongH>(p.h, tile.h, p).lo;
    const int row = t * AlongH::window(p.h) + r;
#pragma unroll
    for (int k = 0; k < TILE; k++) {
      const int first = row * AlongW::window(p.w) + window_of<AlongW>(p.w, tile.w + k, p).lo;
#pragma unroll
      for (int v = 0; v < C_VEC; v++) {
        value[k][v] = padding();
        place[k][v] = first;
      }
    }
  }
  __device__ __forceinline__ void take(int k, int v, A candidate, int at) {
    // One comparison that is true for NaN: a candidate must beat the maximum so far, or, where that is NaN and
    // fmin takes the other operand, infinity, which only another NaN does.
    if (!(candidate <= fmin(value[k][v], -padding()))) {
      value[k][v] = candidate;
      place[k][v] = at;
    }
  }
  // The same choice between the results of two parts of a window, whichever of their places come first.
  __device__ __forceinline__ void merge(int v, A other, int at) {
    const bool other_nan = other != other, own_nan = value[0][v] != value[0][v];
    const bool later = at > place[0][v];
    const bool better = other_nan || own_nan ? other_nan && (!own_nan || later)
                                             : other > value[0][v] || (other == value[0][v] && !later);
    if (better) {
      value[0][v] = other;
      place[0][v] = at;
    }
  }
  __device__ __forceinline__ void merge_lane_xor(int lanes) {
#pragma unroll
    for (int v = 0; v < C_VEC; v++) {
      const A other = __shfl_xor_sync(0xffffffffu, value[0][v], lanes);
      merge(v, other, __shfl_xor_sync(0xffffffffu, place[0][v], lanes));
    }
  }
  __device__ __forceinline__ void merge(const Best& other) {
#pragma unroll
    for (int v = 0; v < C_VEC; v++) merge(v, other.value[0][v], other.place[0][v]);
  }
  __device__ __forceinline__ void store(T* y, Offset* offsets, const Tile& tile, const PoolParams& p) const {
    store_tile<Y_VEC>(y, p.y, tile, p.w.out, value);
    if (offsets) store_tile<Y_VEC>(offsets, p.offsets, tile, p.w.out, place);
  }
};

#ifdef MAX_POOL_FWD
extern "C" __global__ void __launch_bounds__(THREADS, 2)
max_pool_fwd(const T* __restrict__ x, T* __restrict__ y, Offset* __restrict__ offsets, PoolParams p) {
  const int i = blockIdx.x * THREADS + threadIdx.x;
  const Tile tile = tile_of(i, 0, p);
  if (i >= p.tiles || tile.n >= p.N) return;
  Best best;
  best.start(tile, p);
  scan_windows(x, tile, p, best);
  best.store(y, offsets, tile, p);
}
#endif

#ifdef MAX_POOL_GATHER
extern "C" __global__ void __launch_bounds__(THREADS, 2)
max_pool_gather(const T* __restrict__ x, const Offset* __restrict__ offsets, T* __restrict__ y, PoolParams p) {
  const int i = blockIdx.x * THREADS + threadIdx.x;
  const Tile tile = tile_of(i, 0, p);
  if (i >= p.tiles || tile.n >= p.N) return;
  const Span d = window_of<AlongD>(p.d, tile.d, p), h = window_of<AlongH>(p.h, tile.h, p);
  const Span w = window_of<AlongW>(p.w, tile.w, p);
  int kept[C_VEC];
  load_as(kept, line_of(offsets, p.offsets, tile.n, tile.c, tile.d, tile.h) + tile.w * (Index)p.offsets.w);
  A values[TILE][C_VEC];
#pragma unroll
  for (int v = 0; v < C_VEC; v++) {
    int r, s;
    const int t = p.window_rows.divmod(p.row_packs.divmod(kept[v], s), r);
    const bool inside = t >= d.lo && t < d.hi && r >= h.lo && r < h.hi && s >= w.lo && s < w.hi;
    const T* line = line_of(x, p.x, tile.n, tile.c + v, d.start + t * d.step, h.start + r * h.step);
    values[0][v] = inside ? convert<A>(line[(w.start + s * w.step) * (Index)p.x.w]) : A(0);
  }
  store_tile<Y_VEC>(y, p.y, tile, p.w.out, values);
}
#endif

// ---- average --------------------------------------------------------------------------------------------
DEVICE A divisor(int z, int y, int q, const PoolParams& p) {
  if (UNIFORM) return A(p.divisor);
  return A(counted<AlongD>(p.d, z, p) * counted<AlongH>(p.h, y, p) * counted<AlongW>(p.w, q, p));
}

// sum / divisor, correctly rounded: as PyTorch divides.
DEVICE A divided(A sum, A divisor, const PoolParams& p) {
  if (!UNIFORM) return sum / divisor;
  // A product with the reciprocal, corrected by its own remainder: four instructions and no branch, where a
  // division takes ten and a slow path. The remainder of an infinite quotient is NaN and corrects nothing.
  const A reciprocal = A(p.reciprocal), quotient = sum * reciprocal;
  const A corrected = fma(fma(-quotient, divisor, sum), reciprocal, quotient);
  return corrected == corrected ? corrected : quotient;
}

struct Sum {
  A value[TILE][C_VEC];

  DEVICE A padding() { return A(0); }

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int i = 0; i < TILE * C_VEC; i++) value[i / C_VEC][i % C_VEC] = A(0);
  }
  __device__ __forceinline__ void take(int k, int v, A addend, int) { value[k][v] += addend; }
  __device__ __forceinline__ void merge_lane_xor(int lanes) {
#pragma unroll
    for (int v = 0; v < C_VEC; v++) value[0][v] += __shfl_xor_sync(0xffffffffu, value[0][v], lanes);
  }
  __device__ __forceinline__ void merge(const Sum& other) {
#pragma unroll
    for (int v = 0; v < C_VEC; v++) value[0][v] += other.value[0][v];
  }
  __device__ __forceinline__ void store(T* y, const Tile& tile, const PoolParams& p) {
#pragma unroll
    for (int k = 0; k < TILE; k++) {
      const A count = divisor(tile.d, tile.h, tile.w + k, p);
#pragma unroll
      for (int v = 0; v < C_VEC; v++) value[k][v] = divided(value[k][v], count, p);
    }
    store_tile<Y_VEC>(y, p.y, tile, p.w.out, value);
  }
};

#ifdef AVG_POOL_FWD
extern "C" __global__ void __launch_bounds__(THREADS, 2)
avg_pool_fwd(const T* __restrict__ x, T* __restrict__ y, PoolParams p) {
  const int i = blockIdx.x * THREADS + threadIdx.x;
  const Tile tile = tile_of(i, 0, p);
  if (i >= p.tiles || tile.n >= p.N) return;
  Sum sum;
  sum.start();
  scan_windows(x, tile, p, sum);
  sum.store(y, tile, p);
}
#endif

#if defined(MAX_POOL_REDUCE) || defined(AVG_POOL_REDUCE)  // ---- forward, several threads an output ---------
static_assert(!FIXED && 32 % LANES == 0 && LANES <= PER_OUTPUT, "a warp holds whole rows of lanes");
static_assert(THREADS % PER_OUTPUT == 0 && THREADS % 32 == 0, "a block holds whole groups");
constexpr int GROUP_ROWS = PER_OUTPUT / LANES;
constexpr int GROUP_WARPS = ceil_div(PER_OUTPUT, 32);

struct Member { int tile, lane, row; };  // which output, which channel pack of it, which of its rows of places
DEVICE Member member() {
  const int thread = threadIdx.x % PER_OUTPUT;
  return {(int)(blockIdx.x * (THREADS / PER_OUTPUT) + threadIdx.x / PER_OUTPUT), thread % LANES, thread / LANES};
}

// The places of one window that fall to one row of the group, in packs of X_VEC along w.
template <class Visitor>
DEVICE void scan_share(const T* x, const Tile& tile, int row, const PoolParams& p, Visitor& visitor) {
  const Span d = window_of<AlongD>(p.d, tile.d, p), h = window_of<AlongH>(p.h, tile.h, p);
  const Span w = window_of<AlongW>(p.w, tile.w, p);
  const T* plane = line_of(x, p.x, tile.n, tile.c, 0, 0);
  const int packs = p.row_packs.divisor * p.window_rows.divisor * p.d.window;
#pragma unroll 4
  for (int i = row; i < packs; i += GROUP_ROWS) {
    int r, pack_in_row;
    const int t = p.window_rows.divmod(p.row_packs.divmod(i, pack_in_row), r);
    const int s = pack_in_row * X_VEC;
    if (t < d.lo || t >= d.hi || r < h.lo || r >= h.hi || s < w.lo || s >= w.hi) continue;
    A pack[X_VEC * C_VEC];
    load_as(pack, plane + ((d.start + t * d.step) * (Index)p.x.d + (h.start + r * h.step) * (Index)p.x.h +
                           (w.start + s * w.step) * (Index)p.x.w));
#pragma unroll
    for (int j = 0; j < X_VEC * C_VEC; j++) visitor.take(0, j % C_VEC, pack[j], i * X_VEC + j / C_VEC);
  }
}

// Merges the rows of each group; the result is in the LANES threads of its first row. All threads take part.
template <class Visitor> DEVICE void merge_group(Visitor& visitor, Visitor (&scratch)[THREADS / 32][LANES]) {
#pragma unroll
  for (int lanes = LANES; lanes < 32 && lanes < PER_OUTPUT; lanes *= 2) visitor.merge_lane_xor(lanes);
  if (GROUP_WARPS == 1) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (lane < LANES) scratch[warp][lane] = visitor;
  __syncthreads();
  if (warp % GROUP_WARPS == 0 && lane < LANES) {
#pragma unroll
    for (int w = 1; w < GROUP_WARPS; w++) visitor.merge(scratch[warp + w][lane]);
  }
}
#endif

#ifdef MAX_POOL_REDUCE
extern "C" __global__ void __launch_bounds__(THREADS, 2)
max_pool_reduce(const T* __restrict__ x, T* __restrict__ y, Offset* __restrict__ offsets, PoolParams p) {
  __shared__ Best scratch[THREADS / 32][LANES];
  const Member own = member();
  const Tile tile = tile_of(own.tile, own.lane, p);
  const bool active = own.tile < p.tiles && tile.n < p.N && tile.c < p.C;
  Best best;
  best.start(tile, p);
  if (active) scan_share(x, tile, own.row, p, best);
  merge_group(best, scratch);
  if (active && own.row == 0) best.store(y, offsets, tile, p);
}
#endif

#ifdef AVG_POOL_REDUCE
extern "C" __global__ void __launch_bounds__(THREADS, 2)
avg_pool_reduce(const T* __restrict__ x, T* __restrict__ y, PoolParams p) {
  __shared__ Sum scratch[THREADS / 32][LANES];
  const Member own = member();
  const Tile tile = tile_of(own.tile, own.lane, p);
  const bool active = own.tile < p.tiles && tile.n < p.N && tile.c < p.C;
  Sum sum;
  sum.start();
  if (active) scan_share(x, tile, own.row, p, sum);
  merge_group(sum, scratch);
  if (active && own.row == 0) sum.store(y, tile, p);
}
#endif

#if defined(MAX_POOL_BWD) || defined(AVG_POOL_BWD)  // ---- backward: every window that covers a tile's places
// The windows lo <= out <= hi of one axis that reach over a place (dilation may step over it all the same).
struct Cover { int lo, hi; };

template <class G> DEVICE Cover cover_of(const Axis& a, int in, const PoolParams& p) {
  if (p.adaptive) {
    return {scaled(in, a.out, a.by_in), scaled(in + 1, a.out, a.by_in, -1)};
  }
  const int reach = in + a.pad - (G::window(a) - 1) * G::dilation(a);  // start of the earliest window, from -pad
  const int last = a.by_stride.div(in + a.pad);
  return {reach <= 0 ? 0 : a.by_stride.div(reach - 1) + 1, min(last, a.out - 1)};
}

// Which place of window `out` the place `in` is, or -1 where dilation steps over it.
template <class G> DEVICE int place_in_window(const Axis& a, int out, int in, const PoolParams& p) {
  if (!FIXED && p.adaptive) return in - adaptive_start(a, out);
  const int rest = in + a.pad - out * G::stride(a), step = G::dilation(a);
  return step == 1 ? rest : rest % step ? -1 : rest / step;
}

// How many places window `out` has along an axis, in the padding too.
template <class G> DEVICE int places_of(const Axis& a, int out, const PoolParams& p) {
  return !FIXED && p.adaptive ? adaptive_end(a, out) - adaptive_start(a, out) : G::window(a);
}

// Windows are counted from the tile's first place divided by the stride: FIRST to LAST cover some place of it.
constexpr int P_FIRST = -floor_div(AlongH::SPAN - 1 - PAD_H, STRIDE_H);
constexpr int P_LAST = floor_div(TILE_H - 1 + PAD_H, STRIDE_H);
constexpr int Q_FIRST = -floor_div(AlongW::SPAN - 1 - PAD_W, STRIDE_W);
constexpr int Q_LAST = floor_div(TILE - 1 + PAD_W, STRIDE_W);
// The columns of one row of y that a tile loads, from a multiple of Y_VEC on: Y_HEAD of them come before Q_FIRST.
constexpr int Y_HEAD = modulo(Q_FIRST, Y_VEC);
constexpr int Y_COLUMNS = ceil_div(Y_HEAD + Q_LAST - Q_FIRST + 1, Y_VEC) * Y_VEC;
constexpr int Y_ROWS = P_LAST - P_FIRST + 1;
// Beside the columns stand their offsets as integers and the tile's sums: fewer rows than forward.
constexpr int Y_ROW_BYTES = Y_COLUMNS * C_VEC * (sizeof(T) + sizeof(Offset));
constexpr int UNROLLED_Y_ROWS = rows_in_flight<Y_ROWS, Y_ROW_BYTES, 128>;
static_assert(!FIXED || (TILE_H % STRIDE_H == 0 && TILE % STRIDE_W == 0), "tiles start where a stride does");
// Of the loop form: two windows' loads go out together, but where each has its own divisor to work out.
#ifdef MAX_POOL_BWD
constexpr int UNROLLED_WINDOWS = 2;
#else
constexpr int UNROLLED_WINDOWS = UNIFORM ? 2 : 1;
#endif

// Which place of a window, as far from the tile's start as `out` strides, the tile's `in`-th place is, or -1.
template <int WINDOW, int STRIDE, int DILATION, int PAD> DEVICE constexpr int place_in_fixed(int in, int out) {
  const int rest = in + PAD - out * STRIDE;
  return rest < 0 || rest % DILATION || rest / DILATION >= WINDOW ? -1 : rest / DILATION;
}

// Adds to sum[i][k][v] what each window that covers the place in row i and column k of the tile passes back to
// it, in the order of the windows. visitor.fetch<VEC>(tile, z, p, q, g, place) loads VEC neighbouring windows,
// and visitor.share(g, place, wanted) is what one of them passes to its place `wanted`.
template <class Visitor>
DEVICE void gather_windows(const Tile& tile, const PoolParams& p, const Visitor& visitor,
                           A (&sum)[TILE_H][TILE][C_VEC]) {
#pragma unroll
  for (int i = 0; i < TILE_H * TILE * C_VEC; i++) sum[i / C_VEC / TILE][i / C_VEC % TILE][i % C_VEC] = A(0);
  if constexpr (FIXED) {
    const int z_last = (tile.d + p.d.pad) / STRIDE_D, y_first = tile.h / STRIDE_H + P_FIRST;
    const int q_first = tile.w / STRIDE_W + Q_FIRST - Y_HEAD;
    for (int z = z_last - (AlongD::COVERS - 1); z <= z_last; z++) {
      const int t = place_in_window<AlongD>(p.d, z, tile.d, p);
      const bool plane_inside = (unsigned)z < (unsigned)p.d.out && (unsigned)t < WINDOW_D;
#pragma unroll UNROLLED_Y_ROWS
      for (int row = 0; row < Y_ROWS; row++) {
        const int y = y_first + row;
        const bool inside = plane_inside && (unsigned)y < (unsigned)p.h.out;
        A g[Y_COLUMNS][C_VEC];
        int place[Y_COLUMNS][C_VEC];
#pragma unroll
        for (int c = 0; c < Y_COLUMNS; c += Y_VEC) {
          A g_pack[Y_VEC * C_VEC];
          int place_pack[Y_VEC * C_VEC];
#pragma unroll
          for (int i = 0; i < Y_VEC * C_VEC; i++) {
            g_pack[i] = A(0);
            place_pack[i] = -1;
          }
          if (inside && (unsigned)(q_first + c) < (unsigned)p.w.out) {
            visitor.template fetch<Y_VEC>(tile, z, y, q_first + c, g_pack, place_pack);
          }
#pragma unroll
          for (int i = 0; i < Y_VEC * C_VEC; i++) {
            g[c + i / C_VEC][i % C_VEC] = g_pack[i];
            place[c + i / C_VEC][i % C_VEC] = place_pack[i];
          }
        }
#pragma unroll
        for (int i = 0; i < TILE_H; i++) {
          const int r = place_in_fixed<WINDOW_H, STRIDE_H, DILATION_H, PAD_H>(i, P_FIRST + row);
          if (r < 0) continue;
#pragma unroll
          for (int k = 0; k < TILE; k++) {
#pragma unroll
            for (int c = 0; c < Y_COLUMNS; c++) {
              const int s = place_in_fixed<WINDOW_W, STRIDE_W, DILATION_W, PAD_W>(k, Q_FIRST - Y_HEAD + c);
              if (s < 0) continue;
              const int wanted = (t * WINDOW_H + r) * WINDOW_W + s;
#pragma unroll
              for (int v = 0; v < C_VEC; v++) sum[i][k][v] += visitor.share(g[c][v], place[c][v], wanted);
            }
          }
        }
      }
    }
  } else {
    const Cover d = cover_of<AlongD>(p.d, tile.d, p), h = cover_of<AlongH>(p.h, tile.h, p);
    // Of a pack of places, the windows that reach over any of them.
    Cover w = cover_of<AlongW>(p.w, tile.w, p);
    if constexpr (TILE > 1) w.hi = cover_of<AlongW>(p.w, tile.w + TILE - 1, p).hi;
    for (int z = d.lo; z <= d.hi; z++) {
      const int t = place_in_window<AlongD>(p.d, z, tile.d, p);
      for (int y = h.lo; y <= h.hi; y++) {
        const int r = place_in_window<AlongH>(p.h, y, tile.h, p);
        if (t < 0 || r < 0) continue;
#pragma unroll UNROLLED_WINDOWS
        for (int q = w.lo; q <= w.hi; q++) {
          int s = place_in_window<AlongW>(p.w, q, tile.w, p);
          if (TILE == 1 && s < 0) continue;
          A g[C_VEC];
          int place[C_VEC];
          visitor.template fetch<1>(tile, z, y, q, g, place);
#pragma unroll
          for (int k = 0; k < TILE; k++) {
            if constexpr (TILE > 1) {
              s = place_in_window<AlongW>(p.w, q, tile.w + k, p);
              if ((unsigned)s >= (unsigned)places_of<AlongW>(p.w, q, p)) continue;
            }
#pragma unroll
            for (int v = 0; v < C_VEC; v++) {
              sum[0][k][v] += visitor.share(g[v], place[v], (t * p.h.window + r) * p.w.window + s);
            }
          }
        }
      }
    }
  }
}

DEVICE void store_gradient(T* grad_x, Tile tile, const PoolParams& p, const A (&sum)[TILE_H][TILE][C_VEC]) {
#pragma unroll
  for (int i = 0; i < TILE_H; i++, tile.h++) {
    if (tile.h < p.h.in) store_tile<X_VEC>(grad_x, p.x, tile, p.w.in, sum[i]);
  }
}
#endif

#ifdef MAX_POOL_BWD
struct MaxGradient {
  const T* grad_y;
  const Offset* offsets;
  const PoolParams& p;

  template <int VEC>
  __device__ __forceinline__ void fetch(const Tile& tile, int z, int y, int q, A (&g)[VEC * C_VEC],
                                        int (&place)[VEC * C_VEC]) const {
    load_as(g, line_of(grad_y, p.y, tile.n, tile.c, z, y) + q * (Index)p.y.w);
    load_as(place, line_of(offsets, p.offsets, tile.n, tile.c, z, y) + q * (Index)p.offsets.w);
  }
  __device__ __forceinline__ A share(A g, int place, int wanted) const { return place == wanted ? g : A(0); }
};

extern "C" __global__ void __launch_bounds__(THREADS, 2)
max_pool_bwd(const T* __restrict__ grad_y, const Offset* __restrict__ offsets, T* __restrict__ grad_x, PoolParams p) {
  const int i = blockIdx.x * THREADS + threadIdx.x;
  const Tile tile = tile_of(i, 0, p);
  if (i >= p.tiles || tile.n >= p.N) return;
  A sum[TILE_H][TILE][C_VEC];
  gather_windows(tile, p, MaxGradient{grad_y, offsets, p}, sum);
  store_gradient(grad_x, tile, p, sum);
}
#endif

#ifdef AVG_POOL_BWD
struct AvgGradient {
  const T* grad_y;
  const PoolParams& p;

  // Divided here, once a window, rather than once for each place the window covers.
  template <int VEC>
  __device__ __forceinline__ void fetch(const Tile& tile, int z, int y, int q, A (&g)[VEC * C_VEC],
                                        int (&)[VEC * C_VEC]) const {
    load_as(g, line_of(grad_y, p.y, tile.n, tile.c, z, y) + q * (Index)p.y.w);
#pragma unroll
    for (int k = 0; k < VEC; k++) {
      const A count = divisor(z, y, q + k, p);
#pragma unroll
      for (int v = 0; v < C_VEC; v++) g[k * C_VEC + v] = divided(g[k * C_VEC + v], count, p);
    }
  }
  __device__ __forceinline__ A share(A g, int, int) const { return g; }
};

extern "C" __global__ void __launch_bounds__(THREADS, 2)
avg_pool_bwd(const T* __restrict__ grad_y, T* __restrict__ grad_x, PoolParams p) {
  const int i = blockIdx.x * THREADS + threadIdx.x;
  const Tile tile = tile_of(i, 0, p);
  if (i >= p.tiles || tile.n >= p.N) return;
  A sum[TILE_H][TILE][C_VEC];
  gather_windows(tile, p, AvgGradient{grad_y, p}, sum);
  store_gradient(grad_x, tile, p, sum);
}
#endif
