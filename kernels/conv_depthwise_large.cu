// Depthwise convolution with large kernels (more taps than conv_depthwise.cu keeps in registers), stride and
// dilation 1, one or two axes: fprop, dgrad, wgrad. What binds here is arithmetic, R·S multiply-adds an output.
//
// Maths. All passes are one sum over two planes of a channel, `image` and `filter`:
//
//     own[a, b] = Σ i,j  filter[i, j] · image[a + i, b + j]
//
//                own               image      filter
//     fprop      y[p, q]           x          w
//     dgrad      grad_x[h, w]      grad_y     w turned by half a turn; pad becomes R - 1 - pad
//     wgrad      grad_w[r, s]      x          grad_y; summed over images and bands of grad_y, too
//
// with the image's padding, zeros or what PADDING continues it with, laid out as if it were memory.
//
// Layout. Tensors are read and written in place by their strides. A block stages both planes of CHANNELS channels
// in shared memory as accumulators, padding included, so that the sums need no check of any coordinate. In NCHW
// lanes follow rows of `own`; in channels-last (CHANNELS_INNER) they follow channels, up to 32 bytes of them, so that
// staging and storing move whole sectors.
//
// Who owns what. A thread owns TILE neighbours along w of one row of `own` and slides along filter rows: 4 columns
// of the image and 4 of the filter are loaded for 4·TILE multiply-adds, the other image columns being in registers
// already. Rows of the image that are zeros throughout are left out. Per row of 32 lanes and 16-byte loads:
//
//     NCHW            4 wavefronts for the image, 1 for the filter, which a warp shares
//     channels-last   4 for the image, 4 for the filter
//
// against 4·TILE / 4 cycles of multiply-adds of a multiprocessor: 5 of 8 cycles and, with TILE 16, 8 of 16.
// Lines are an odd number of 16 bytes apart, and so are planes of channels: no bank is hit twice.
//
// Grid. fprop, dgrad: tiles of OWN_ROWS x OWN_COLUMNS, then groups of channels, then images. wgrad: groups of
// channels, then parts of the images and bands; partial sums go to conv_reduce_depthwise, in a fixed order.
//
// Cost. fp32 or bf16, 31x31 on 384@32x32, batch 64: 25.2 M outputs, 24.2 G multiply-adds or 0.82 ms at 29.6 T/s,
// beside 0.07 ms of traffic (fp32). Half of the taps lie in the padding there: rows of these are skipped, columns
// are not, so that some 75 % are done: 0.65 ms at 95 % of the multiply-adds among instructions.
//     Tensor cores: as a Toeplitz matrix of 16 x (16 + S - 1) columns, products are padded by (15 + S) / S, 1.5 at
// S = 31, at some 15 times the rate of multiply-adds (bf16): up to ten times faster, but for half types alone.
//
// Constants: PASS ELEMENT ACCUMULATOR RESULT INDEX PADDING CHANNELS_INNER CHANNELS OWN_ROWS OWN_COLUMNS SUM_ROWS
// SUM_COLUMNS (of `filter`; columns of wgrad's are padded with zeros) TILE Y_VEC THREADS ACTIVATION RESIDUAL.
#include "epilogue.cuh"
#include "padding.cuh"

#define FPROP 0  // values of PASS
#define DGRAD 1
#define WGRAD 2

using T = ELEMENT;
using A = ACCUMULATOR;  // float for the half types, else T
using Index = INDEX;

struct Strides { long long n, c, d, h, w; };  // in elements; d is not used

struct Params {
  Strides image;                    // x (dgrad: grad_y)
  Strides result;                   // y (dgrad: grad_x; wgrad: grad_y, which is read)
  long long w_k, w_r, w_s, numel;   // the filter's strides (wgrad: of what is written), elements of a partial result
  FastDiv row_tiles, column_tiles;  // of `own`, or wgrad's bands of grad_y
  FastDiv groups;                   // of channels
  FastDiv multiplier;               // filters a channel of x
  int N, K;                         // images, channels of the result
  int H, W;                         // of the image
  int result_h, result_w;
  int pad_h, pad_w;
  int splits;
};
static_assert(sizeof(Params) == PARAMS_BYTES, "the Python structure must mirror this one");

// ---- shared memory --------------------------------------------------------------------------------------------
DEVICE constexpr int odd_packs(int n) { return (ceil_div(n, 4) | 1) * 4; }  // at least n, an odd number of four

constexpr int IMAGE_ROWS = OWN_ROWS + SUM_ROWS - 1;
constexpr int IMAGE_COLUMNS = OWN_COLUMNS + ceil_div(SUM_COLUMNS, 4) * 4;  // what loads of four may touch
constexpr int IMAGE_PITCH = odd_packs(IMAGE_COLUMNS), FILTER_PITCH = odd_packs(SUM_COLUMNS);
constexpr int IMAGE_PLANE = odd_packs(IMAGE_ROWS * IMAGE_PITCH), FILTER_PLANE = odd_packs(SUM_ROWS * FILTER_PITCH);
constexpr int TILES = OWN_COLUMNS / TILE, ITEMS = CHANNELS * OWN_ROWS * TILES;
static_assert(OWN_COLUMNS % TILE == 0 && TILE % 4 == 0 && TILE % Y_VEC == 0, "tiles are whole packs");

extern __shared__ __align__(16) unsigned char dynamic[];
DEVICE A* shared_image() { return reinterpret_cast<A*>(dynamic); }
DEVICE A* shared_filter() { return shared_image() + CHANNELS * IMAGE_PLANE; }

// visit(channel, row, column) for all of CHANNELS x ROWS x COLUMNS, lanes along memory.
template <int ROWS, int COLUMNS, class Visit> DEVICE void each_element(const Visit& visit) {
  for (int i = threadIdx.x; i < CHANNELS * ROWS * COLUMNS; i += THREADS) {
    const int place = CHANNELS_INNER ? i / CHANNELS : i % (ROWS * COLUMNS);
    visit(CHANNELS_INNER ? i % CHANNELS : i / (ROWS * COLUMNS), place / COLUMNS, place % COLUMNS);
  }
}

// The coordinate that is read for `at` along an axis of `size`, and whether there is one.
DEVICE bool find(int& at, int size) {
  if (PADDING != ZEROS) at = continued(at, size);
  return (unsigned)at < (unsigned)size;
}

// The image from padded coordinates (top, left) on, for channels of the result from `first` on.
DEVICE void stage_image(const T* image, int n, int first, int top, int left, const Params& p) {
  each_element<IMAGE_ROWS, IMAGE_COLUMNS>([&](int channel, int row, int column) {
    int h = top + row - p.pad_h, w = left + column - p.pad_w;
    const int k = first + channel;
    const bool exists = find(h, p.H) & find(w, p.W) & (k < p.K);
    const Index at = n * (Index)p.image.n + p.multiplier.div(k) * (Index)p.image.c + h * (Index)p.image.h +
                     w * (Index)p.image.w;
    shared_image()[channel * IMAGE_PLANE + row * IMAGE_PITCH + column] = exists ? convert<A>(image[at]) : A(0);
  });
}

// ---- sums -----------------------------------------------------------------------------------------------------
struct Item { int channel, row, column; };  // of `own`, relative to the block's
DEVICE Item item_at(int i) {
  if (CHANNELS_INNER) return {i % CHANNELS, i / CHANNELS % OWN_ROWS, i / (CHANNELS * OWN_ROWS) * TILE};
  return {i / (OWN_ROWS * TILES), i % OWN_ROWS, i / OWN_ROWS % TILES * TILE};
}

// Adds rows begin to end - 1 of the filter times the image to the sums of an item.
DEVICE void correlate(A (&sum)[TILE], const Item& item, int begin, int end) {
  const A* image = shared_image() + item.channel * IMAGE_PLANE + (item.row + begin) * IMAGE_PITCH + item.column;
  const A* filter = shared_filter() + item.channel * FILTER_PLANE + begin * FILTER_PITCH;
#pragma unroll 1
  for (int row = begin; row < end; row++, image += IMAGE_PITCH, filter += FILTER_PITCH) {
    A window[TILE + 4], next[4], taps[4];
#pragma unroll
    for (int c = 0; c < TILE; c += 4) {
      load_as(next, image + c);
#pragma unroll
      for (int j = 0; j < 4; j++) window[c + j] = next[j];
    }
#pragma unroll
    for (int s = 0; s < SUM_COLUMNS; s += 4) {
      load_as(next, image + TILE + s);
      load_as(taps, filter + s);
#pragma unroll
      for (int j = 0; j < 4; j++) window[TILE + j] = next[j];
#pragma unroll
      for (int j = 0; j < 4; j++) {
#pragma unroll
        for (int k = 0; k < TILE; k++) {
          if (s + j < SUM_COLUMNS) sum[k] += taps[j] * window[j + k];
        }
      }
#pragma unroll
      for (int c = 0; c < TILE; c++) window[c] = window[c + 4];
    }
  }
}

// Which rows of the filter meet rows of the image, for the image's rows from padded coordinate `top` on.
DEVICE int first_row(int top, const Params& p) { return PADDING == ZEROS ? max(0, p.pad_h - top) : 0; }
DEVICE int last_row(int top, int rows, const Params& p) {
  return PADDING == ZEROS ? min(rows, p.H + p.pad_h - top) : rows;
}

#if PASS != WGRAD
// ---- fprop and dgrad --------------------------------------------------------------------------------------------
constexpr Activation ACT = Activation::ACTIVATION;
struct Finish { const T *scale, *bias, *residual; };  // what a sum meets on its way out; null: nothing

DEVICE void sweep(const T* __restrict__ source, const T* __restrict__ w, const Finish& finish,
                  T* __restrict__ result, const Params& p) {
  int left, top, group;
  int n = p.column_tiles.divmod(blockIdx.x, left);
  n = p.row_tiles.divmod(n, top);
  n = p.groups.divmod(n, group);
  left *= OWN_COLUMNS, top *= OWN_ROWS;
  const int first = group * CHANNELS;
  stage_image(source, n, first, top, left, p);
  for (int i = threadIdx.x; i < CHANNELS * SUM_ROWS * FILTER_PITCH; i += THREADS) {
    const int s = i % FILTER_PITCH, r = i / FILTER_PITCH % SUM_ROWS, channel = i / (FILTER_PITCH * SUM_ROWS);
    const bool exists = s < SUM_COLUMNS && first + channel < p.K;
    const int from_r = PASS == DGRAD ? SUM_ROWS - 1 - r : r, from_s = PASS == DGRAD ? SUM_COLUMNS - 1 - s : s;
    const Index at = (first + channel) * (Index)p.w_k + from_r * (Index)p.w_r + from_s * (Index)p.w_s;
    shared_filter()[channel * FILTER_PLANE + r * FILTER_PITCH + s] = exists ? convert<A>(w[at]) : A(0);
  }
  __syncthreads();

  for (int i = threadIdx.x; i < ITEMS; i += THREADS) {
    const Item item = item_at(i);
    const int k = first + item.channel, row = top + item.row, column = left + item.column;
    if (k >= p.K || row >= p.result_h || column >= p.result_w) continue;
    A sum[TILE] = {};
    correlate(sum, item, first_row(row, p), last_row(row, SUM_ROWS, p));
    const ScaleShift<A> scale_shift = ScaleShift<A>::of(finish.scale, finish.bias, k);
    const Index to = n * (Index)p.result.n + k * (Index)p.result.c + row * (Index)p.result.h;
#pragma unroll
    for (int c = 0; c < TILE; c += Y_VEC) {
      if (column + c >= p.result_w) continue;
      A z[Y_VEC];
#pragma unroll
      for (int j = 0; j < Y_VEC; j++) z[j] = scale_shift(sum[c + j]);
      const Index at = to + (column + c) * (Index)p.result.w;
      store_finished<ACT>(result + at, RESIDUAL ? finish.residual + at : nullptr, z);
    }
  }
}

#if PASS == FPROP
extern "C" __global__ void __launch_bounds__(THREADS)
conv_fprop_depthwise_large(const T* __restrict__ x, const T* __restrict__ w, const T* __restrict__ scale,
                           const T* __restrict__ bias, const T* __restrict__ residual, T* __restrict__ y,
                           const Params p) {
  sweep(x, w, {scale, bias, residual}, y, p);
}
#else
extern "C" __global__ void __launch_bounds__(THREADS)
conv_dgrad_depthwise_large(const T* __restrict__ grad_y, const T* __restrict__ w, const T* __restrict__ scale,
                           const T* __restrict__ bias, const T* __restrict__ residual, T* __restrict__ grad_x,
                           const Params p) {
  sweep(grad_y, w, {scale, bias, residual}, grad_x, p);
}
#endif

#else
// ---- wgrad ------------------------------------------------------------------------------------------------------
constexpr int EACH = ceil_div(ITEMS, THREADS);  // items a thread

extern "C" __global__ void __launch_bounds__(THREADS)
conv_wgrad_depthwise_large(const T* __restrict__ grad_y, const T* __restrict__ x, RESULT* __restrict__ grad_w,
                           const Params p) {
  int group;
  const int split = p.groups.divmod(blockIdx.x, group), first = group * CHANNELS;
  A sum[EACH][TILE] = {};
  const int bands = p.N * (int)p.row_tiles.divisor * (int)p.column_tiles.divisor;
  for (int band = split; band < bands; band += p.splits) {
    int left, top;
    int n = p.column_tiles.divmod(band, left);
    n = p.row_tiles.divmod(n, top);
    left *= SUM_COLUMNS, top *= SUM_ROWS;
    __syncthreads();
    stage_image(x, n, first, top, left, p);
    each_element<SUM_ROWS, SUM_COLUMNS>([&](int channel, int row, int column) {
      const int k = first + channel, h = top + row, w = left + column;
      const bool exists = k < p.K && h < p.result_h && w < p.result_w;
      const Index at = n * (Index)p.result.n + k * (Index)p.result.c + h * (Index)p.result.h + w * (Index)p.result.w;
      shared_filter()[channel * FILTER_PLANE + row * FILTER_PITCH + column] = exists ? convert<A>(grad_y[at]) : A(0);
    });
    __syncthreads();
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      const Item item = item_at(threadIdx.x + e * THREADS);
      if (item.channel >= CHANNELS || item.column >= OWN_COLUMNS) continue;
      const int row = top + item.row;
      correlate(sum[e], item, first_row(row, p), last_row(row, min(SUM_ROWS, p.result_h - top), p));
    }
  }
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    const Item item = item_at(threadIdx.x + e * THREADS);
    const int k = first + item.channel;
    if (item.channel >= CHANNELS || item.column >= OWN_COLUMNS || k >= p.K) continue;
#pragma unroll
    for (int c = 0; c < TILE; c++) {
      const int s = item.column + c;
      if (s < TAPS_W) grad_w[split * p.numel + k * p.w_k + item.row * p.w_r + s * p.w_s] = convert<RESULT>(sum[e][c]);
    }
  }
}
#endif
