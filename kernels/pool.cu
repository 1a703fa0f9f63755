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
// Parts. A window is put together from parts: places that follow each other, with what is known of them (the sum,
// or the maximum and its place). Joining two parts in order is associative for both choices, so that neighbouring
// windows share: along w the columns that 2 to 8 windows have in common are reduced once, along h whole rows are.
// A window of R x S costs some (R + S) joins and not R·S. Nothing is ever subtracted: a running sum would keep an
// infinity that has left the window. An average whose windows are one place apart and have one divisor needs no
// backward pass of its own: its gradient is the forward pass over grad_y, padded by S - 1 - pad.
//
// Layout. Tensors are read in place by their strides. CHANNELS_INNER tells along what a thread's accesses are
// wide: packs of C_VEC channels (channels-last), or packs of X_VEC columns of x and Y_VEC of y (NCHW), at most 16
// bytes of elements. Where rows of NCHW are no whole packs, or start off alignment, but the tensor is dense:
//
//     SHIFTED  A thread reads the aligned packs that hold its columns and shifts them into place in registers. The
//              first and last threads of a tensor, whose packs would reach out of it, read element by element.
//     STAGED   A block's results are one run of the tensor. They pass through shared memory, and leave it in
//              aligned packs that know nothing of rows; at most 15 elements at the run's ends go one by one.
//
// Other tensors (sliced, transposed, expanded) have widths of 1, tiles of one column, and any strides.
//
// Forms, each right for every problem it is given:
//
//     tile    One thread owns TILE neighbours along w, of y forward or of grad_x backward, in TILE_H rows, times
//             C_VEC channels. Windows, strides and dilations are constants: loops unroll, a column is loaded once
//             for all the windows it lies in, and backward a tile starts at a multiple of the stride, so that which
//             of its places meet which windows is known at compile time. TILE_H > 1 where windows one place apart
//             overlap and the tiles still fill a GPU.
//     loop    One thread owns one place times C_VEC channels, or backward in NCHW the TILE places of a pack;
//             windows are run-time numbers. For adaptive windows, for those too large to unroll, and for gather.
//     reduce  Forward only. PER_OUTPUT threads share an output: LANES channel packs side by side times rows of
//             places, merged by shuffles and then over warps in a fixed order. For large windows with few
//             outputs, as in global pooling, where a thread an output would leave the GPU idle.
//
// What serves what, in 1-D, 2-D and 3-D alike (an axis that is missing has windows of one place and costs nothing;
// depth adds rows to a window, forward and backward):
//
//     windows of up to some sixty columns forward, twenty backward         tile
//     adaptive windows that divide the input evenly                        as ordinary ones of that size
//     global ones, and large windows that are few or far apart, forward    reduce; axes that are one run joined
//     the same backward; adaptive ones; larger windows                     loop: R·S steps a place
//
// Grid. x: blocks of THREADS over the tiles of `images` images, w fastest in NCHW and channels fastest in
// channels-last, so that a warp's accesses are one run; y: chunks of the batch, for tensors of more than 2^31
// tiles. A block has block_tiles tiles: THREADS, but STAGED and several rows high whole rows of tiles. Every
// element of a result belongs to one thread and is written once; nothing is atomic, and sums run in a fixed order:
// the same input gives the same bits.
//
// Bytes. Forward reads x and writes y and offsets, backward reads grad_y and offsets and writes grad_x, each once:
// the floor. What is wanted again is wanted by a thread nearby and comes from L1, which gives some nine times the
// bytes of memory. Forward, a tile asks for (TILE_H - 1)·stride + R rows of (TILE - 1)·stride + S columns, rounded
// up to packs and SHIFTED to one more: 4 x 4 windows one place apart for 5.3 times x in fp32 and 7.5 in bf16, where
// tiles of one row would ask for 12. Counted by the emulator, NCHW with odd rows: sectors touched are 1.0 to 1.13
// times those that the bytes fill, both ways. More of them are touched, in L1 alone, where lanes' packs lie apart:
// strided windows, whose packs of 16 bytes lie 32 or more apart, touch twice the sectors (4 times where tiles
// of 4 columns of 2 bytes, 11 apart, allow but 8); 7 x 7 planes, 8 lanes to each, twice in fp32 and 3 times in bf16.
//
// Arithmetic. At the speed of memory an H100 has some 75 instructions of a thread for each output, in fp32 and at a
// stride of 1, or 47 in bf16. A join of maxima takes four, so that 16 an output (4 x 4) would be too many for bf16:
// shared, there are 8, and 23 rather than 169 for 13 x 13. Backward, a maximum's gradient costs two for each window
// over a place: R·S of them cannot be shared, and from 5 x 5 in fp32 and 4 x 4 in bf16 on these take longer.
//
// Why this way. Backward could scatter, one window a thread: fewer reads, but overlapping windows would need
// atomics, whose order changes from run to run, and grad_x would have to be zeroed first. Gathering writes
// grad_x once, in whole packs. Inputs are not staged: what shared memory would repeat L1 has, and registers shift
// for a few selects a row what shared memory would serve with bank conflicts.
//
// Constants: ELEMENT, ACCUMULATOR, OFFSET, INDEX (int, or long long where a tensor spans 2^31 elements),
// CHANNELS_INNER, C_VEC, X_VEC, Y_VEC, TILE, FIXED (1: the tile form) and for that form alone TILE_H, SHIFTED,
// STAGED, WINDOW_ STRIDE_ DILATION_ D H W, PAD_H, PAD_W (else 1 and 0), PER_OUTPUT and LANES (reduce form, else 1), UNIFORM
// (1: all windows have one divisor), THREADS, PARAMS_BYTES; and the name of the wanted entry in capitals. Batch,
// channels and sizes are run-time numbers.
#include "common.cuh"

using T = ELEMENT;
using A = ACCUMULATOR;
using Offset = OFFSET;
using Index = INDEX;
static_assert(FIXED || (TILE == (PER_OUTPUT > 1 ? 1 : X_VEC) && TILE_H == 1), "run-time windows: a pack a thread");
static_assert(C_VEC == 1 || (X_VEC == 1 && Y_VEC == 1), "packs go along channels or along columns");
static_assert(C_VEC * X_VEC * sizeof(T) <= 16 && C_VEC * Y_VEC * sizeof(T) <= 16, "a pack is one access");
static_assert(!CHANNELS_INNER || (X_VEC == 1 && Y_VEC == 1), "channels-last packs hold channels");
static_assert(!(SHIFTED || STAGED) || (FIXED && !CHANNELS_INNER && TILE <= 8), "runs of columns");

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
  int block_tiles;                         // at most THREADS of them are a block's
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

// The thread's tile, if it has one.
DEVICE bool own_tile(Tile& tile, const PoolParams& p) {
  const int i = blockIdx.x * p.block_tiles + threadIdx.x;
  tile = tile_of(i, 0, p);
  return threadIdx.x < p.block_tiles && i < p.tiles && tile.n < p.N;
}

DEVICE Index row_of(const Strides& s, int n, int c, int d, int h) {
  return n * (Index)s.n + c * (Index)s.c + d * (Index)s.d + h * (Index)s.h;
}

// ---- rows in ----------------------------------------------------------------------------------------------
// The widest access, of 4 to 16 bytes, that is no wider than what lies between two neighbouring lanes.
DEVICE constexpr int access_bytes(int between) { return between >= 16 ? 16 : between >= 8 ? 8 : 4; }

// The element whose bits are the lowest of these 64.
template <class E> struct Bits;
template <> struct Bits<float> { DEVICE float of(unsigned low, unsigned) { return __uint_as_float(low); } };
template <> struct Bits<double> {
  DEVICE double of(unsigned low, unsigned high) { return __longlong_as_double((long long)high << 32 | low); }
};
template <> struct Bits<half_t> { DEVICE half_t of(unsigned low, unsigned) { return {(unsigned short)low}; } };
template <> struct Bits<bfloat_t> { DEVICE bfloat_t of(unsigned low, unsigned) { return {(unsigned short)low}; } };
template <> struct Bits<unsigned char> { DEVICE unsigned char of(unsigned low, unsigned) { return low & 255; } };
template <> struct Bits<int> { DEVICE int of(unsigned low, unsigned) { return (int)low; } };

// N elements from any address, by aligned accesses of BYTES: up to BYTES - 1 before and behind them are read too.
template <int BYTES, int N, class B, class E> DEVICE void load_shifted(B (&to)[N], const E* from) {
  constexpr int WORDS = ceil_div(N * sizeof(E) + BYTES - sizeof(E), BYTES) * BYTES / 4;
  const unsigned shift = (unsigned long long)from % BYTES;
  const unsigned* aligned = reinterpret_cast<const unsigned*>(reinterpret_cast<const char*>(from) - shift);
  unsigned words[WORDS + 1] = {};
#pragma unroll
  for (int i = 0; i < WORDS; i += BYTES / 4) {
    const Pack<unsigned, BYTES / 4> pack = load_pack<BYTES / 4>(aligned + i);
#pragma unroll
    for (int j = 0; j < BYTES / 4; j++) words[i + j] = pack.v[j];
  }
  if constexpr (BYTES == 16) {
#pragma unroll
    for (int i = 0; i + 2 < WORDS; i++) words[i] = shift & 8 ? words[i + 2] : words[i];
  }
  if constexpr (BYTES >= 8 && sizeof(E) <= 4) {
#pragma unroll
    for (int i = 0; i + 1 < WORDS; i++) words[i] = shift & 4 ? words[i + 1] : words[i];
  }
  if constexpr (sizeof(E) < 4) {
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
      words[i] = (unsigned)((words[i] | (unsigned long long)words[i + 1] << 32) >> (shift % 4 * 8));
    }
  }
#pragma unroll
  for (int i = 0; i < N; i++) {
    const int at = i * (int)sizeof(E);
    to[i] = convert<B>(Bits<E>::of(words[at / 4] >> (at % 4 * 8), words[at / 4 + 1]));
  }
}

// Columns `first` to first + COLUMNS - 1 of a row of `width`, but those not in the set USED. Columns outside of
// it, and all of a row that is not `inside` of the tensor, are `outside`. SHIFT: by load_shifted.
template <int VEC, bool SHIFT, int BETWEEN, unsigned long long USED, int COLUMNS, class B, class E>
DEVICE void load_row(B (&to)[COLUMNS][C_VEC], const E* line, Index step, int first, int width, bool inside,
                     B outside) {
  static_assert(COLUMNS <= 64, "USED has a bit a column");
  if constexpr (SHIFT) {
    B row[COLUMNS];
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) row[c] = outside;
    if (inside) load_shifted<access_bytes(BETWEEN * sizeof(E))>(row, line + first);
    if (first < 0 || first + COLUMNS > width) {
#pragma unroll
      for (int c = 0; c < COLUMNS; c++) row[c] = (unsigned)(first + c) < (unsigned)width ? row[c] : outside;
    }
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) to[c][0] = row[c];
  } else {
#pragma unroll
    for (int c = 0; c < COLUMNS; c += VEC) {
      if (!(USED >> c & ((1ull << VEC) - 1))) continue;
      B pack[VEC * C_VEC];
#pragma unroll
      for (int i = 0; i < VEC * C_VEC; i++) pack[i] = outside;
      // Packs start at multiples of VEC, and so does the row's end: a pack is inside or outside as a whole.
      if (inside && (unsigned)(first + c) < (unsigned)width) load_as(pack, line + (first + c) * step);
#pragma unroll
      for (int i = 0; i < VEC * C_VEC; i++) to[c + i / C_VEC][i % C_VEC] = pack[i];
    }
  }
}

// Whether accesses of 16 bytes that hold any of the elements first <= i < last lie in the tensor.
DEVICE bool surrounded(Index first, Index last, const Strides& s, const PoolParams& p) {
  return first >= 16 && last + 16 <= p.N * (Index)s.n;
}

// ---- results out ------------------------------------------------------------------------------------------
// One row of a thread's tile into shared memory, where the lanes' rows follow each other: every eighth lane begins
// with another quarter of its values, else lanes whose rows are 16 bytes long would share 8 banks.
template <class E, class B> DEVICE void stage_row(E* to, int count, const B (&values)[TILE][C_VEC]) {
  constexpr int QUARTER = TILE >= 4 ? TILE / 4 : 1;
  const int turn = TILE * sizeof(E) > 4 ? threadIdx.x / 8 * QUARTER % TILE : 0;
  B turned[TILE];
#pragma unroll
  for (int k = 0; k < TILE; k++) turned[k] = values[k][0];
#pragma unroll
  for (int bit = QUARTER; bit < TILE; bit *= 2) {
    B from[TILE];
#pragma unroll
    for (int k = 0; k < TILE; k++) from[k] = turned[k];
#pragma unroll
    for (int k = 0; k < TILE; k++) turned[k] = turn & bit ? from[(k + bit) % TILE] : from[k];
  }
#pragma unroll
  for (int k = 0; k < TILE; k++) {
    const int at = (k + turn) % TILE;
    if (at < count) to[at] = convert<E>(turned[k]);
  }
}

// Writes the block's tiles of a tensor with rows of `width` places, `height` in a plane. All threads of the block
// take part; those that are `active` have a tile. STAGED: the tensor is dense, and the block's tiles are one run
// of it, which passes through shared memory and leaves it in whole packs, wherever rows begin and end; else it is
// written in packs of VEC columns.
template <int VEC, class E, class B>
DEVICE void store_tiles(E* tensor, const Strides& s, const Tile& tile, bool active, int height, int width,
                        const B (&values)[TILE_H][TILE][C_VEC], const PoolParams& p) {
  const Index own = row_of(s, tile.n, tile.c, tile.d, tile.h) + tile.w * (Index)s.w;
  if constexpr (STAGED) {
    constexpr int V = 16 / sizeof(E);
    __shared__ __align__(16) E staged[THREADS * TILE * TILE_H + V];
    const Tile first = tile_of(blockIdx.x * p.block_tiles, 0, p);
    const Tile behind = tile_of(min((int)(blockIdx.x + 1) * p.block_tiles, p.tiles), 0, p);
    const Index begin = row_of(s, first.n, first.c, first.d, first.h) + first.w;
    const Index end = row_of(s, behind.n, behind.c, behind.d, behind.h) + behind.w;
    E* run = tensor + begin;
    const int lead = (unsigned long long)run % 16 / sizeof(E);  // staged[lead], for run[0], is aligned as it is
    const int last = lead + (int)(min(end, p.N * (Index)s.n) - begin);
    if (active) {
#pragma unroll
      for (int i = 0; i < TILE_H; i++) {
        E* to = staged + lead + (own + i * (Index)s.h - begin);
        if (tile.h + i < height) stage_row(to, width - tile.w, values[i]);
      }
    }
    __syncthreads();
    const int first_pack = ceil_div(lead, V), last_pack = last / V;
    for (int i = first_pack + threadIdx.x; i < last_pack; i += THREADS) {
      store_pack(run - lead + i * V, load_pack<V>(staged + i * V));
    }
    if (threadIdx.x < V) {  // the ends of the run, an element a thread
      const int head = lead + threadIdx.x, tail = max(last_pack, first_pack) * V + threadIdx.x;
      if (head < min(first_pack * V, last)) run[head - lead] = staged[head];
      if (tail < last) run[tail - lead] = staged[tail];
    }
  } else {
    if (!active) return;
#pragma unroll
    for (int i = 0; i < TILE_H; i++) {
#pragma unroll
      for (int k = 0; k < TILE; k += VEC) {
        B pack[VEC * C_VEC];
#pragma unroll
        for (int j = 0; j < VEC * C_VEC; j++) pack[j] = values[i][k + j / C_VEC][j % C_VEC];
        if (tile.h + i < height && tile.w + k < width) {
          store_as(tensor + own + i * (Index)s.h + k * (Index)s.w, pack);
        }
      }
    }
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


#if defined(MAX_POOL_FWD) || defined(MAX_POOL_REDUCE) || defined(AVG_POOL_FWD) || defined(AVG_POOL_REDUCE)
// ---- forward: parts of windows ----------------------------------------------------------------------------
// What one window makes of some of its places. `a.take(b)`: of two parts' places together, where all of b's come
// after all of a's; `a.merge(b)` wherever they are.
#if defined(MAX_POOL_FWD) || defined(MAX_POOL_REDUCE)
struct __align__(2 * sizeof(A)) Part {
  A value;
  int place;

  DEVICE A padding() { return A(__int_as_float((int)0xff800000)); }  // -inf beats nothing
  DEVICE Part of(A value, int place) { return {value, place}; }
  DEVICE Part none(int first_place) { return {padding(), first_place}; }

  __device__ __forceinline__ void take(const Part& later) {
    // One comparison that is true for NaN: a candidate must beat the maximum so far, or, where that is NaN and
    // fmin takes the other operand, infinity, which only another NaN does.
    if (!(later.value <= fmin(value, -padding()))) *this = later;
  }
  __device__ __forceinline__ void merge(const Part& other) {
    const bool other_nan = other.value != other.value, own_nan = value != value;
    const bool later = other.place > place;
    const bool better = other_nan || own_nan ? other_nan && (!own_nan || later)
                                             : other.value > value || (other.value == value && !later);
    if (better) *this = other;
  }
  __device__ __forceinline__ Part moved(int places) const { return {value, place + places}; }
  __device__ __forceinline__ Part of_lane_xor(int lanes) const {
    return {__shfl_xor_sync(0xffffffffu, value, lanes), __shfl_xor_sync(0xffffffffu, place, lanes)};
  }
};
#else
struct Part {
  A value;

  DEVICE A padding() { return A(0); }
  DEVICE Part of(A value, int) { return {value}; }
  DEVICE Part none(int) { return {A(0)}; }

  __device__ __forceinline__ void take(const Part& later) { value += later.value; }
  __device__ __forceinline__ void merge(const Part& other) { value += other.value; }
  __device__ __forceinline__ Part moved(int) const { return *this; }
  __device__ __forceinline__ Part of_lane_xor(int lanes) const {
    return {__shfl_xor_sync(0xffffffffu, value, lanes)};
  }
};
#endif

// ---- forward: rows of windows -----------------------------------------------------------------------------
// A tile's columns of one row of x, from a multiple of X_VEC on; X_HEAD of them come before the first window.
constexpr int X_HEAD = modulo(-PAD_W, X_VEC);
constexpr int X_COLUMNS = ceil_div(X_HEAD + (TILE - 1) * STRIDE_W + AlongW::SPAN, X_VEC) * X_VEC;
// A tile's rows of one plane of x. The first LEAD rows are not in all of the tile's windows, nor are the last LEAD.
constexpr int X_LEAD = (TILE_H - 1) * STRIDE_H;
constexpr int X_ROWS = X_LEAD + WINDOW_H;
static_assert(TILE_H == 1 || DILATION_H == 1, "windows of one column share rows");

// The columns that the tile's windows have places in: dilation leaves gaps.
DEVICE constexpr unsigned long long used_columns() {
  unsigned long long used = 0;
  for (int k = 0; k < TILE; k++) {
    for (int s = 0; s < WINDOW_W; s++) used |= 1ull << (X_HEAD + k * STRIDE_W + s * DILATION_W);
  }
  return used;
}

// So many windows of a row have a column in common, and are put together from what they share.
DEVICE constexpr int windows_sharing() {
  int windows = 1;
  while (TILE % (2 * windows) == 0 && (2 * windows - 1) * STRIDE_W < WINDOW_W) windows *= 2;
  return DILATION_W == 1 ? windows : 1;
}
constexpr int SHARING = windows_sharing();

// line[k] = the k-th window's part of one row. Its places count from the first column of the first of the windows
// that share. The columns that they share are reduced once, those before them from right to left and those behind
// from left to right, once for all windows that they are in: WINDOW_W + 3 SHARING steps, not WINDOW_W · SHARING.
DEVICE void reduce_row(const A (&columns)[X_COLUMNS][C_VEC], Part (&line)[TILE][C_VEC]) {
  constexpr int LEAD = (SHARING - 1) * STRIDE_W;
#pragma unroll
  for (int k = 0; k < TILE; k += SHARING) {
    const int first = X_HEAD + k * STRIDE_W;
#pragma unroll
    for (int v = 0; v < C_VEC; v++) {
      Part part = Part::of(columns[first + LEAD * DILATION_W][v], LEAD);
#pragma unroll
      for (int s = LEAD + 1; s < WINDOW_W; s++) part.take(Part::of(columns[first + s * DILATION_W][v], s));
      line[k + SHARING - 1][v] = part;
#pragma unroll
      for (int s = LEAD - 1; s >= 0; s--) {
        const Part later = part;
        part = Part::of(columns[first + s][v], s);
        part.take(later);
        if (s % STRIDE_W == 0) line[k + s / STRIDE_W][v] = part;
      }
#pragma unroll
      for (int s = WINDOW_W; s < WINDOW_W + LEAD; s++) {
        const Part column = Part::of(columns[first + s][v], s);
        if (s == WINDOW_W) part = column;
        else part.take(column);
        const int behind = s - WINDOW_W + 1;
        if (behind % STRIDE_W == 0) line[k + behind / STRIDE_W][v].take(part);
      }
    }
  }
}

// What is added to a place of the tile's i-th window of its k-th column to count from the tile's first row and as
// reduce_row does.
DEVICE constexpr int place_in_tile(int i, int k) { return i * STRIDE_H * WINDOW_W + k % SHARING * STRIDE_W; }

DEVICE void take_line(Part (&to)[TILE][C_VEC], const Part (&line)[TILE][C_VEC]) {
#pragma unroll
  for (int k = 0; k < TILE; k++) {
#pragma unroll
    for (int v = 0; v < C_VEC; v++) to[k][v].take(line[k][v]);
  }
}

// How many of the rows that all windows share to unroll: their loads go out together, as far as they find
// registers. Packs of channels make one row wide enough; more rows would only cost registers.
constexpr int X_ROW_BYTES = X_COLUMNS * C_VEC * sizeof(A);
constexpr int UNROLLED_ROWS = C_VEC > 1 || 2 * X_ROW_BYTES > 128 ? 1 : 128 / X_ROW_BYTES;
constexpr int UNROLLED_PLANES = WINDOW_D * X_ROWS <= UNROLLED_ROWS ? WINDOW_D : 1;

// Puts what the tile's windows hold together, row after row. SHIFT: with load_shifted.
template <bool SHIFT>
DEVICE void scan_tile(const T* x, const Tile& tile, const PoolParams& p, Part (&windows)[TILE_H][TILE][C_VEC]) {
  const int d = tile.d * STRIDE_D - p.d.pad, h = tile.h * STRIDE_H - PAD_H, w = tile.w * STRIDE_W - PAD_W - X_HEAD;
  const T* plane = x + row_of(p.x, tile.n, tile.c, 0, 0);
#pragma unroll UNROLLED_PLANES
  for (int t = 0; t < WINDOW_D; t++) {
    const int at_d = d + t * DILATION_D;
    const auto read = [&](int row, Part (&line)[TILE][C_VEC]) {
      const int at_h = h + row * DILATION_H;
      // A condition of the loads rather than a branch around them, which would keep rows apart.
      const bool inside = (unsigned)at_d < (unsigned)p.d.in && (unsigned)at_h < (unsigned)p.h.in;
      A columns[X_COLUMNS][C_VEC];
      load_row<X_VEC, SHIFT, TILE * STRIDE_W, used_columns()>(
          columns, plane + (at_d * (Index)p.x.d + at_h * (Index)p.x.h), p.x.w, w, p.w.in, inside, Part::padding());
      reduce_row(columns, line);
#pragma unroll
      for (int i = 0; i < TILE * C_VEC; i++) {
        Part& part = line[i / C_VEC][i % C_VEC];
        part = part.moved((t * WINDOW_H + row) * WINDOW_W);
      }
    };
    Part line[TILE][C_VEC];
#pragma unroll
    for (int row = 0; row < X_LEAD; row++) {
      read(row, line);
#pragma unroll
      for (int i = 0; i < TILE_H; i++) {
        if (row >= i * STRIDE_H && row < i * STRIDE_H + WINDOW_H) take_line(windows[i], line);
      }
    }
    if constexpr (X_LEAD < WINDOW_H) {
      Part shared[TILE][C_VEC];
      read(X_LEAD, shared);
#pragma unroll UNROLLED_ROWS
      for (int row = X_LEAD + 1; row < WINDOW_H; row++) {
        read(row, line);
        take_line(shared, line);
      }
#pragma unroll
      for (int i = 0; i < TILE_H; i++) take_line(windows[i], shared);
    }
#pragma unroll
    for (int row = max(X_LEAD, WINDOW_H); row < X_ROWS; row++) {
      read(row, line);
#pragma unroll
      for (int i = 0; i < TILE_H; i++) {
        if (row >= i * STRIDE_H && row < i * STRIDE_H + WINDOW_H) take_line(windows[i], line);
      }
    }
  }
}

// The windows of the thread's tile: windows[i][k] in place k of row i.
DEVICE void scan_windows(const T* x, const Tile& tile, const PoolParams& p, Part (&windows)[TILE_H][TILE][C_VEC]) {
  const Span d = window_of<AlongD>(p.d, tile.d, p);
#pragma unroll
  for (int i = 0; i < TILE_H * TILE; i++) {
    const Span h = window_of<AlongH>(p.h, tile.h + i / TILE, p), w = window_of<AlongW>(p.w, tile.w + i % TILE, p);
    const int first = (d.lo * AlongH::window(p.h) + h.lo) * AlongW::window(p.w) + w.lo;
#pragma unroll
    for (int v = 0; v < C_VEC; v++) {
      windows[i / TILE][i % TILE][v] = Part::none(first + place_in_tile(i / TILE, i % TILE));
    }
  }
  if constexpr (FIXED) {
    if constexpr (SHIFTED) {
      const int at_d = tile.d * STRIDE_D - p.d.pad, at_h = tile.h * STRIDE_H - PAD_H;
      const int at_w = tile.w * STRIDE_W - PAD_W;
      const int last_d = at_d + (WINDOW_D - 1) * DILATION_D, last_h = at_h + X_LEAD + AlongH::SPAN - 1;
      const Index first = row_of(p.x, tile.n, tile.c, max(at_d, 0), max(at_h, 0)) + at_w;
      const Index last = row_of(p.x, tile.n, tile.c, min(last_d, p.d.in - 1), min(last_h, p.h.in - 1)) + at_w;
      if (surrounded(first, last + X_COLUMNS, p.x, p)) return scan_tile<true>(x, tile, p, windows);
    }
    scan_tile<false>(x, tile, p, windows);
  } else {
    const Span h = window_of<AlongH>(p.h, tile.h, p), w = window_of<AlongW>(p.w, tile.w, p);
    const T* plane = x + row_of(p.x, tile.n, tile.c, 0, 0);
    for (int t = d.lo; t < d.hi; t++) {
      for (int r = h.lo; r < h.hi; r++) {
        const T* line = plane + ((d.start + t * d.step) * (Index)p.x.d + (h.start + r * h.step) * (Index)p.x.h);
#pragma unroll 4
        for (int s = w.lo; s < w.hi; s++) {
          A pack[C_VEC];
          load_as(pack, line + (w.start + s * w.step) * (Index)p.x.w);
#pragma unroll
          for (int v = 0; v < C_VEC; v++) {
            windows[0][0][v].take(Part::of(pack[v], (t * p.h.window + r) * p.w.window + s));
          }
        }
      }
    }
  }
}
#endif

#if defined(MAX_POOL_FWD) || defined(MAX_POOL_REDUCE)  // ---- maximum ------------------------------------------
DEVICE void store_windows(T* y, Offset* offsets, const Tile& tile, bool active,
                          const Part (&windows)[TILE_H][TILE][C_VEC], const PoolParams& p) {
  A values[TILE_H][TILE][C_VEC];
  int places[TILE_H][TILE][C_VEC];
#pragma unroll
  for (int i = 0; i < TILE_H; i++) {
#pragma unroll
    for (int k = 0; k < TILE; k++) {
#pragma unroll
      for (int v = 0; v < C_VEC; v++) {
        values[i][k][v] = windows[i][k][v].value;
        places[i][k][v] = windows[i][k][v].place - place_in_tile(i, k);
      }
    }
  }
  store_tiles<Y_VEC>(y, p.y, tile, active, p.h.out, p.w.out, values, p);
  if (offsets) store_tiles<Y_VEC>(offsets, p.offsets, tile, active, p.h.out, p.w.out, places, p);
}
#endif

#ifdef MAX_POOL_FWD
extern "C" __global__ void __launch_bounds__(THREADS, 2)
max_pool_fwd(const T* __restrict__ x, T* __restrict__ y, Offset* __restrict__ offsets, PoolParams p) {
  Tile tile;
  const bool active = own_tile(tile, p);
  Part windows[TILE_H][TILE][C_VEC];
  if (active) scan_windows(x, tile, p, windows);
  store_windows(y, offsets, tile, active, windows, p);
}
#endif

#ifdef MAX_POOL_GATHER
extern "C" __global__ void __launch_bounds__(THREADS, 2)
max_pool_gather(const T* __restrict__ x, const Offset* __restrict__ offsets, T* __restrict__ y, PoolParams p) {
  Tile tile;
  if (!own_tile(tile, p)) return;
  const Span d = window_of<AlongD>(p.d, tile.d, p), h = window_of<AlongH>(p.h, tile.h, p);
  const Span w = window_of<AlongW>(p.w, tile.w, p);
  int kept[C_VEC];
  load_as(kept, offsets + row_of(p.offsets, tile.n, tile.c, tile.d, tile.h) + tile.w * (Index)p.offsets.w);
  A values[TILE_H][TILE][C_VEC];
#pragma unroll
  for (int v = 0; v < C_VEC; v++) {
    int r, s;
    const int t = p.window_rows.divmod(p.row_packs.divmod(kept[v], s), r);
    const bool inside = t >= d.lo && t < d.hi && r >= h.lo && r < h.hi && s >= w.lo && s < w.hi;
    const T* line = x + row_of(p.x, tile.n, tile.c + v, d.start + t * d.step, h.start + r * h.step);
    values[0][0][v] = inside ? convert<A>(line[(w.start + s * w.step) * (Index)p.x.w]) : A(0);
  }
  store_tiles<Y_VEC>(y, p.y, tile, true, p.h.out, p.w.out, values, p);
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

#if defined(AVG_POOL_FWD) || defined(AVG_POOL_REDUCE)
DEVICE void store_windows(T* y, const Tile& tile, bool active, const Part (&windows)[TILE_H][TILE][C_VEC],
                          const PoolParams& p) {
  A values[TILE_H][TILE][C_VEC];
#pragma unroll
  for (int i = 0; i < TILE_H; i++) {
#pragma unroll
    for (int k = 0; k < TILE; k++) {
      const A count = divisor(tile.d, tile.h + i, tile.w + k, p);
#pragma unroll
      for (int v = 0; v < C_VEC; v++) values[i][k][v] = divided(windows[i][k][v].value, count, p);
    }
  }
  store_tiles<Y_VEC>(y, p.y, tile, active, p.h.out, p.w.out, values, p);
}
#endif

#ifdef AVG_POOL_FWD
extern "C" __global__ void __launch_bounds__(THREADS, 2)
avg_pool_fwd(const T* __restrict__ x, T* __restrict__ y, PoolParams p) {
  Tile tile;
  const bool active = own_tile(tile, p);
  Part windows[TILE_H][TILE][C_VEC];
  if (active) scan_windows(x, tile, p, windows);
  store_windows(y, tile, active, windows, p);
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
DEVICE void scan_share(const T* x, const Tile& tile, int row, const PoolParams& p, Part (&window)[C_VEC]) {
  const Span d = window_of<AlongD>(p.d, tile.d, p), h = window_of<AlongH>(p.h, tile.h, p);
  const Span w = window_of<AlongW>(p.w, tile.w, p);
#pragma unroll
  for (int v = 0; v < C_VEC; v++) {
    window[v] = Part::none((d.lo * p.h.window + h.lo) * p.w.window + w.lo);
  }
  const T* plane = x + row_of(p.x, tile.n, tile.c, 0, 0);
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
    for (int j = 0; j < X_VEC * C_VEC; j++) window[j % C_VEC].take(Part::of(pack[j], i * X_VEC + j / C_VEC));
  }
}

// Merges the rows of each group; the result is in the LANES threads of its first row. All threads take part.
DEVICE void merge_group(Part (&window)[C_VEC]) {
#pragma unroll
  for (int lanes = LANES; lanes < 32 && lanes < PER_OUTPUT; lanes *= 2) {
#pragma unroll
    for (int v = 0; v < C_VEC; v++) window[v].merge(window[v].of_lane_xor(lanes));
  }
  if (GROUP_WARPS == 1) return;
  // Channel by channel: what neighbouring lanes write and read lies side by side.
  __shared__ Part scratch[C_VEC][THREADS / 32][LANES];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int v = 0; v < C_VEC && lane < LANES; v++) scratch[v][warp][lane] = window[v];
  __syncthreads();
  if (warp % GROUP_WARPS != 0 || lane >= LANES) return;
#pragma unroll
  for (int w = 1; w < GROUP_WARPS; w++) {
#pragma unroll
    for (int v = 0; v < C_VEC; v++) window[v].merge(scratch[v][warp + w][lane]);
  }
}
#endif

#ifdef MAX_POOL_REDUCE
extern "C" __global__ void __launch_bounds__(THREADS, 2)
max_pool_reduce(const T* __restrict__ x, T* __restrict__ y, Offset* __restrict__ offsets, PoolParams p) {
  const Member own = member();
  const Tile tile = tile_of(own.tile, own.lane, p);
  const bool active = own.tile < p.tiles && tile.n < p.N && tile.c < p.C;
  Part windows[1][1][C_VEC] = {};
  if (active) scan_share(x, tile, own.row, p, windows[0][0]);
  merge_group(windows[0][0]);
  store_windows(y, offsets, tile, active && own.row == 0, windows, p);
}
#endif

#ifdef AVG_POOL_REDUCE
extern "C" __global__ void __launch_bounds__(THREADS, 2)
avg_pool_reduce(const T* __restrict__ x, T* __restrict__ y, PoolParams p) {
  const Member own = member();
  const Tile tile = tile_of(own.tile, own.lane, p);
  const bool active = own.tile < p.tiles && tile.n < p.N && tile.c < p.C;
  Part windows[1][1][C_VEC] = {};
  if (active) scan_share(x, tile, own.row, p, windows[0][0]);
  merge_group(windows[0][0]);
  store_windows(y, tile, active && own.row == 0, windows, p);
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
// How many rows to unroll. Beside the columns stand their offsets and the tile's sums: fewer than forward.
constexpr int Y_ROW_BYTES = Y_COLUMNS * C_VEC * (sizeof(A) + sizeof(int));
constexpr int UNROLLED_Y_ROWS = Y_ROWS * Y_ROW_BYTES <= 128 ? Y_ROWS
                                : 2 * Y_ROW_BYTES <= 128    ? 128 / Y_ROW_BYTES : 1;
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

// Adds to sum[i][k][v] what each window that covers the place in row i and column k of the tile passes back to it,
// in the order of the windows. SHIFT: with load_shifted.
template <bool SHIFT, class Gradient>
DEVICE void gather_tile(const Tile& tile, const PoolParams& p, const Gradient& gradient,
                        A (&sum)[TILE_H][TILE][C_VEC]) {
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
      gradient.template read<SHIFT>(tile, z, y, q_first, inside, g, place);
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
            const int wanted = ((WINDOW_D > 1 ? t : 0) * WINDOW_H + r) * WINDOW_W + s;
#pragma unroll
            for (int v = 0; v < C_VEC; v++) sum[i][k][v] += gradient.share(g[c][v], place[c][v], wanted);
          }
        }
      }
    }
  }
}

// sum[i][k][v] = the gradient of the place in row i and column k of the thread's tile.
template <class Gradient>
DEVICE void gather_windows(const Tile& tile, const PoolParams& p, const Gradient& gradient,
                           A (&sum)[TILE_H][TILE][C_VEC]) {
#pragma unroll
  for (int i = 0; i < TILE_H * TILE * C_VEC; i++) sum[i / C_VEC / TILE][i / C_VEC % TILE][i % C_VEC] = A(0);
  if constexpr (FIXED) {
    if constexpr (SHIFTED) {
      const int z = (tile.d + p.d.pad) / STRIDE_D, y = tile.h / STRIDE_H + P_FIRST, q = tile.w / STRIDE_W + Q_FIRST;
      const int z_first = max(z - (AlongD::COVERS - 1), 0), y_last = min(y + Y_ROWS, p.h.out) - 1;
      const Index first = row_of(p.y, tile.n, tile.c, z_first, max(y, 0)) + q;
      const Index last = row_of(p.y, tile.n, tile.c, min(z, p.d.out - 1), y_last) + q;
      if (surrounded(first, last + Y_COLUMNS, p.y, p)) return gather_tile<true>(tile, p, gradient, sum);
    }
    gather_tile<false>(tile, p, gradient, sum);
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
          gradient.fetch(tile, z, y, q, g, place);
#pragma unroll
          for (int k = 0; k < TILE; k++) {
            if constexpr (TILE > 1) {
              s = place_in_window<AlongW>(p.w, q, tile.w + k, p);
              if ((unsigned)s >= (unsigned)places_of<AlongW>(p.w, q, p)) continue;
            }
#pragma unroll
            for (int v = 0; v < C_VEC; v++) {
              sum[0][k][v] += gradient.share(g[v], place[v], (t * p.h.window + r) * p.w.window + s);
            }
          }
        }
      }
    }
  }
}

#endif

#ifdef MAX_POOL_BWD
struct MaxGradient {
  const T* grad_y;
  const Offset* offsets;
  const PoolParams& p;

  // Y_COLUMNS windows from (z, y, q) on.
  template <bool SHIFT>
  __device__ __forceinline__ void read(const Tile& tile, int z, int y, int q, bool inside, A (&g)[Y_COLUMNS][C_VEC],
                                       int (&place)[Y_COLUMNS][C_VEC]) const {
    load_row<Y_VEC, SHIFT, TILE / STRIDE_W, ~0ull>(g, grad_y + row_of(p.y, tile.n, tile.c, z, y), p.y.w, q, p.w.out,
                                                   inside, A(0));
    load_row<Y_VEC, SHIFT, TILE / STRIDE_W, ~0ull>(place, offsets + row_of(p.offsets, tile.n, tile.c, z, y),
                                                   p.offsets.w, q, p.w.out, inside, -1);
  }
  // The window (z, y, q) alone.
  __device__ __forceinline__ void fetch(const Tile& tile, int z, int y, int q, A (&g)[C_VEC],
                                        int (&place)[C_VEC]) const {
    load_as(g, grad_y + row_of(p.y, tile.n, tile.c, z, y) + q * (Index)p.y.w);
    load_as(place, offsets + row_of(p.offsets, tile.n, tile.c, z, y) + q * (Index)p.offsets.w);
  }
  // What a window passes back to its place `wanted`.
  __device__ __forceinline__ A share(A g, int place, int wanted) const { return place == wanted ? g : A(0); }
};

extern "C" __global__ void __launch_bounds__(THREADS, 2)
max_pool_bwd(const T* __restrict__ grad_y, const Offset* __restrict__ offsets, T* __restrict__ grad_x, PoolParams p) {
  Tile tile;
  const bool active = own_tile(tile, p);
  A sum[TILE_H][TILE][C_VEC];
  if (active) gather_windows(tile, p, MaxGradient{grad_y, offsets, p}, sum);
  store_tiles<X_VEC>(grad_x, p.x, tile, active, p.h.in, p.w.in, sum, p);
}
#endif

#ifdef AVG_POOL_BWD
struct AvgGradient {
  const T* grad_y;
  const PoolParams& p;

  // Divided here, once a window, rather than once for each place the window covers.
  __device__ __forceinline__ void divide(int z, int y, int q, A (&g)[C_VEC]) const {
    const A count = divisor(z, y, q, p);
#pragma unroll
    for (int v = 0; v < C_VEC; v++) g[v] = divided(g[v], count, p);
  }
  template <bool SHIFT>
  __device__ __forceinline__ void read(const Tile& tile, int z, int y, int q, bool inside, A (&g)[Y_COLUMNS][C_VEC],
                                       int (&)[Y_COLUMNS][C_VEC]) const {
    load_row<Y_VEC, SHIFT, TILE / STRIDE_W, ~0ull>(g, grad_y + row_of(p.y, tile.n, tile.c, z, y), p.y.w, q, p.w.out,
                                                   inside, A(0));
#pragma unroll
    for (int c = 0; c < Y_COLUMNS; c++) {
      if (UNIFORM || (inside && (unsigned)(q + c) < (unsigned)p.w.out)) divide(z, y, q + c, g[c]);
    }
  }
  __device__ __forceinline__ void fetch(const Tile& tile, int z, int y, int q, A (&g)[C_VEC], int (&)[C_VEC]) const {
    load_as(g, grad_y + row_of(p.y, tile.n, tile.c, z, y) + q * (Index)p.y.w);
    divide(z, y, q, g);
  }
  __device__ __forceinline__ A share(A g, int, int) const { return g; }
};

extern "C" __global__ void __launch_bounds__(THREADS, 2)
avg_pool_bwd(const T* __restrict__ grad_y, T* __restrict__ grad_x, PoolParams p) {
  Tile tile;
  const bool active = own_tile(tile, p);
  A sum[TILE_H][TILE][C_VEC];
  if (active) gather_windows(tile, p, AvgGradient{grad_y, p}, sum);
  store_tiles<X_VEC>(grad_x, p.x, tile, active, p.h.in, p.w.in, sum, p);
}
#endif
