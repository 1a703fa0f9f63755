// Convolution as a matrix product over stored columns: this file lays the columns out (im2col) and adds their
// gradients up again (col2im); torch.matmul is the product in between (cnnops/cuda/conv_im2col.py).
//
// MATHS      col[(c, tap), place] = x[n, c, place * stride - pad + tap * dilation]; outside of x zero, or under another
//            PADDING x at the coordinate that continued() names (padding.cuh). A negative pad crops.
//            fprop  y = w . col          wgrad  grad_w = grad_y . col^T                     (conv_im2col)
//            dgrad  grad_x = col2im(w^T . grad_y): the sum of the columns that hold an input element. The
//            element gathers them itself: tap r holds input h at place (h + pad - r * dilation) / stride, where
//            that divides and exists. No atomics, and the order of the sum is that of the taps. dgrad knows no
//            other padding than zeros (see conv_fold.cu).
//            finish y = act(scale * y + bias + residual) in place, by channel (epilogue.cuh): what follows a
//            product, after it was rounded to y's type                                      (conv_finish_im2col)
//            dgrad's sums meet the same in conv_col2im, before they are rounded: transposed convolution.
//
// LAYOUT     Columns lie so that the product reads and writes the other tensors as they are:
//              CHANNELS_FAST 0   col[n][c][tap][place]                     beside NCHW
//              CHANNELS_FAST 1   col[n][place][group][tap][c of group]     beside channels-last
//            Taps are numbered with the last axis fastest. x and grad_x may have any strides.
//
// GRID       One axis of 256 threads a block, one thread for VECTOR neighbours along the fast index:
//            conv_im2col: places of a channel (or channels at a place), every tap of them in turn. A place is
//            decoded once, then a tap costs a check, a load and a part of a store; neighbouring threads store
//            neighbouring 16 bytes in every turn.
//            conv_col2im: an element of grad_x (or VECTOR channels of it) and the taps that hold it.
//            conv_finish_im2col: VECTOR neighbours of y in memory, which the product has just left in L2.
//
// CONSTANTS  PASS IM2COL | COL2IM | FINISH, the latter two with ACTIVATION   ELEMENT ACCUMULATOR types   DIMS spatial axes   WIDE 64-bit offsets in x
//            PADDING ZEROS, for conv_im2col also REFLECT REPLICATE CIRCULAR: a few instructions more a tap and axis
//            CHANNELS_FAST   VECTOR elements of an access to columns   X_VECTOR of an access to x: VECTOR or 1
//            Sizes, strides, taps, stride, padding and dilation are run-time: a network needs few binaries.
//
// COST       fp32, 3x3, 64 channels @ 56x56, N = 32: 26 MB of x become 231 MB of columns, written here and read
//            by the product, against 51 MB that a convolution in place has to move; at 3.35 TB/s 0.15 ms on top
//            of the product's 7.4 GFLOP (0.11 ms at 67 TFLOP/s). conv_im2col.py therefore works on a few images
//            at a time, whose columns stay in L2 until the product reads them. A 1x1 convolution of a dense
//            tensor needs no columns: it is its own.
//
// WHY SO     Taps inside the thread, not across threads: T*R*S reads of one input element come from
//            neighbouring threads in consecutive turns and meet in L1, and there is one decode for all of them.
#include "epilogue.cuh"
#include "padding.cuh"

#define IM2COL 0  // values of PASS
#define COL2IM 1
#define FINISH 2

using T = ELEMENT;
using A = ACCUMULATOR;
#if WIDE
typedef long long Offset;
#else
typedef int Offset;
#endif
constexpr int V = VECTOR, XV = X_VECTOR, THREADS = 256;
static_assert(DIMS >= 1 && DIMS <= 3, "one to three spatial axes");
static_assert(XV == V || XV == 1, "x moves in the columns' packs or element by element");
static_assert(CHANNELS_FAST || XV == 1, "neighbouring places are no neighbours in x");

// Arrays over axes hold DIMS values, slowest axis first.
struct Params {
  long long batch, channel, axis[3];  // strides of x
  FastDiv fast, slow;                 // a thread's number: packs of the fast index, then of the slow one
  FastDiv extent[3];                  // along each axis: places (conv_im2col), input elements (conv_col2im)
  FastDiv group;                      // channels of a group
  FastDiv stride[3];
  int size[3], out[3], taps[3], pad[3], dilation[3];
  int threads, channels, places, tap_count;  // places: of one image
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from the structure in conv_im2col.py");

// What a thread owns: channels c … at a point (an output place or an input element) of image n.
struct Own {
  int n, c, point;
};
DEVICE Own own_of(const Params& p, int i) {
  int fast, slow;
  const int n = p.slow.divmod(p.fast.divmod(i, fast), slow);
  return CHANNELS_FAST ? Own{n, fast * V, slow} : Own{n, slow, fast * V};
}

// Where the column entry of tap 0 lies, and how far apart entries of neighbouring taps are.
DEVICE int column_of(const Params& p, int n, int c, int place, int& tap_step) {
  if (CHANNELS_FAST) {
    int in_group;
    const int group = p.group.divmod(c, in_group);
    tap_step = (int)p.group.divisor;
    return (n * p.places + place) * p.channels * p.tap_count + group * p.tap_count * tap_step + in_group;
  }
  tap_step = p.places;
  return (n * p.channels + c) * p.tap_count * p.places + place;
}

DEVICE int taps_along(const Params& p, int a) { return a < DIMS ? p.taps[a] : 1; }

DEVICE void coordinates(const Params& p, int point, int (&at)[DIMS]) {
#pragma unroll
  for (int a = DIMS - 1; a >= 0; a--) point = p.extent[a].divmod(point, at[a]);
}

#if PASS == IM2COL
extern "C" __global__ void __launch_bounds__(THREADS, 2)
conv_im2col(const T* __restrict__ x, T* __restrict__ col, const Params p) {
  constexpr int POINTS = CHANNELS_FAST ? 1 : V, LOADS = CHANNELS_FAST ? V / XV : 1;
  const int i = (int)blockIdx.x * THREADS + (int)threadIdx.x;
  if (i >= p.threads) return;
  const Own own = own_of(p, i);
  int tap_step;
  T* to = col + column_of(p, own.n, own.c, own.point, tap_step);
  const T* from = x + (own.n * p.batch + own.c * p.channel);

  Offset origin[POINTS];
  int at[POINTS][DIMS];
#pragma unroll
  for (int v = 0; v < POINTS; v++) {
    coordinates(p, own.point + v, at[v]);
    origin[v] = 0;
#pragma unroll
    for (int a = 0; a < DIMS; a++) {
      at[v][a] = at[v][a] * (int)p.stride[a].divisor - p.pad[a];
      origin[v] += (Offset)at[v][a] * (Offset)p.axis[a];
    }
  }

  for (int r0 = 0; r0 < taps_along(p, 0); r0++)
    for (int r1 = 0; r1 < taps_along(p, 1); r1++)
      for (int r2 = 0; r2 < taps_along(p, 2); r2++) {
        const int tap[3] = {r0, r1, r2};
        Pack<T, V> pack;
#pragma unroll
        for (int v = 0; v < POINTS; v++) {
          bool inside = true;
          Offset offset = origin[v];
#pragma unroll
          for (int a = 0; a < DIMS; a++) {
            int moved = tap[a] * p.dilation[a];
            if (PADDING == ZEROS)
              inside &= (unsigned)(at[v][a] + moved) < (unsigned)p.size[a];
            else
              moved = continued(at[v][a] + moved, p.size[a]) - at[v][a];
            offset += (Offset)moved * (Offset)p.axis[a];
          }
#pragma unroll
          for (int j = 0; j < LOADS; j++) {
            const Pack<T, XV> loaded =
                inside ? load_pack<XV>(from + (offset + j * XV * (Offset)p.channel)) : Pack<T, XV>{};
#pragma unroll
            for (int u = 0; u < XV; u++) pack.v[v + j * XV + u] = loaded.v[u];
          }
        }
        store_pack<V>(to, pack);
        to += tap_step;
      }
}

#elif PASS == FINISH
extern "C" __global__ void __launch_bounds__(THREADS, 3)
conv_finish_im2col(const T* __restrict__ scale, const T* __restrict__ bias, const T* __restrict__ residual,
                   T* __restrict__ y, const Params p) {
  const int i = (int)blockIdx.x * THREADS + (int)threadIdx.x;
  if (i >= p.threads) return;
  const Own own = own_of(p, i);
  A z[V];
  load_as(z, y + (long long)i * V);
#pragma unroll
  for (int v = 0; v < V; v++) z[v] = ScaleShift<A>::of(scale, bias, own.c + (CHANNELS_FAST ? v : 0))(z[v]);
  store_finished<Activation::ACTIVATION>(y + (long long)i * V, residual ? residual + (long long)i * V : nullptr, z);
}

#else
extern "C" __global__ void __launch_bounds__(THREADS, 3)
conv_col2im(const T* __restrict__ col, const T* __restrict__ scale, const T* __restrict__ bias,
            const T* __restrict__ residual, T* __restrict__ grad_x, const Params p) {
  static_assert(CHANNELS_FAST || V == 1, "neighbouring elements lie in different places");
  const int i = (int)blockIdx.x * THREADS + (int)threadIdx.x;
  if (i >= p.threads) return;
  const Own own = own_of(p, i);
  int at[DIMS], tap_step;
  coordinates(p, own.point, at);
  Offset offset = 0;
#pragma unroll
  for (int a = 0; a < DIMS; a++) offset += (Offset)at[a] * (Offset)p.axis[a], at[a] += p.pad[a];

  A sum[V] = {};
  int t = 0;
  for (int r0 = 0; r0 < taps_along(p, 0); r0++)
    for (int r1 = 0; r1 < taps_along(p, 1); r1++)
      for (int r2 = 0; r2 < taps_along(p, 2); r2++, t++) {
        const int tap[3] = {r0, r1, r2};
        bool holds = true;
        int place = 0;
#pragma unroll
        for (int a = 0; a < DIMS; a++) {
          const int reach = at[a] - tap[a] * p.dilation[a];
          int rest;
          const int out = p.stride[a].divmod(reach >= 0 ? reach : 0, rest);
          holds &= reach >= 0 && rest == 0 && out < p.out[a];
          place = place * p.out[a] + out;
        }
        if (holds) {
          const int first = column_of(p, own.n, own.c, place, tap_step);
          const Pack<T, V> pack = load_pack<V>(col + (first + t * tap_step));
#pragma unroll
          for (int v = 0; v < V; v++) sum[v] += convert<A>(pack.v[v]);
        }
      }

#pragma unroll
  for (int v = 0; v < V; v++) sum[v] = ScaleShift<A>::of(scale, bias, own.c + v)(sum[v]);
  const long long image = own.n * p.batch + own.c * p.channel;
#pragma unroll
  for (int v = 0; v < V; v += XV) {
    const long long to = image + offset + v * (Offset)p.channel;
    A z[XV];
#pragma unroll
    for (int u = 0; u < XV; u++) z[u] = sum[v + u];
    store_finished<Activation::ACTIVATION>(grad_x + to, residual ? residual + to : nullptr, z);
  }
}
#endif
