// The two copies around a matrix product that make it a convolution: im2col before it, col2im behind it.
//
// Maths, for x of N x C x D x H x W (1-D and 2-D problems have axes of size 1), filters of T x R x S taps:
//
//     im2col   columns[place of y, (c, t, r, s)] = x[c, z·stride + t·dilation - pad, …], 0 outside of x
//     fprop    y = columns · filters      wgrad   grad_w = grad_yᵀ · columns      (torch.matmul)
//     dgrad    columns = grad_y · filtersᵀ, then
//     col2im   grad_x[c, d, h, w] = Σ over the taps and places that read it of columns[place, (c, t, r, s)]
//
// Layout. The columns lie as the product needs them, so that nothing is ever transposed. M = Z·P·Q places an image:
//
//     CHANNELS_INNER 0   y is N K M:    columns[image][channel][tap][place], multiplied as filters · columns
//     CHANNELS_INNER 1   y is N M K:    columns[image][place][group][tap][channel of the group]
//
// x and grad_x are addressed by their strides: any view is read in place. Packs of VECTOR elements, 16 bytes at
// most, run along places (layout 0, columns only: x is read element by element, since taps shift it off any
// alignment) or along channels (layout 1, both sides). Where sizes or alignment do not allow them VECTOR is 1.
//
// Grid. One axis of blocks of THREADS threads. im2col, layout 0: a thread owns VECTOR places of one channel and
// writes them for every tap; lanes run along places, so each tap's store is one run. im2col, layout 1: a thread
// owns one pack of the columns, in the order of memory. col2im: a thread owns one element (layout 0) or pack
// (layout 1) of grad_x and gathers: no atomics, a fixed order, each element written once.
//
// Bytes. An image's columns are T·R·S·M / (D·H·W) times its input: nine times for a 3x3 filter of stride 1. im2col
// reads x once from memory (that each element is wanted by up to T·R·S threads is L1's business) and writes the
// columns, the product reads them again; dgrad likewise in the other direction. This is what a convolution that
// gathers on the fly saves, and why this one is not the first choice. What it has is the vendor's matrix product,
// tensor cores included. A 1x1 convolution of a dense tensor is its own columns: nothing is copied.
//
// Constants: ELEMENT, ACCUMULATOR, CHANNELS_INNER, VECTOR, THREADS, PARAMS_BYTES. All sizes are run-time
// numbers: both kernels wait for memory, not for index arithmetic, and two modules serve every network.
#include "common.cuh"

using T = ELEMENT;
using A = ACCUMULATOR;
constexpr int V = VECTOR;
constexpr int RESIDENT = !CHANNELS_INNER && V == 8 ? 2 : 4;  // blocks: eight places' coordinates want registers
static_assert(V * sizeof(T) <= 16, "a pack is one access");
static_assert(CHANNELS_INNER == 0 || CHANNELS_INNER == 1, "a switch");

// Arrays over axes: D H W, Z P Q or T R S.
struct ColumnParams {
  long long batch, channel, axis[3];  // strides of x or grad_x
  FastDiv out[3], taps[3], size[3];
  FastDiv packs;            // of an image's places (layout 0), of a group's channels (layout 1)
  FastDiv channels, groups;  // channels: of all groups (layout 0), packs of them (layout 1, col2im)
  FastDiv all_taps;
  FastDiv strides[3];
  int stride[3], dilation[3], pad[3];
  int places, group_channels;
  int items;  // threads that have work
};
static_assert(sizeof(ColumnParams) == PARAMS_BYTES, "the Python structure must mirror this one");

DEVICE int extent(const FastDiv& d) { return (int)d.divisor; }

// Splits a row-major index over three axes; returns what is left in front of them.
DEVICE int unravel(int i, const FastDiv (&extents)[3], int (&index)[3]) {
#pragma unroll
  for (int a = 2; a >= 0; a--) i = extents[a].divmod(i, index[a]);
  return i;
}

// Where place `at` reads x through `tap`; false outside of x.
DEVICE bool read_at(const ColumnParams& p, const int (&at)[3], const int (&tap)[3], long long& offset) {
  bool inside = true;
#pragma unroll
  for (int a = 0; a < 3; a++) {
    const int i = at[a] * p.stride[a] + tap[a] * p.dilation[a] - p.pad[a];
    inside &= (unsigned)i < (unsigned)extent(p.size[a]);
    offset += i * p.axis[a];
  }
  return inside;
}

// Along one axis: the output place that reads element `i` through tap `t`, or -1.
DEVICE int place_of(const ColumnParams& p, int a, int i, int t) {
  const int reach = i + p.pad[a] - t * p.dilation[a];
  if (reach < 0) return -1;
  int rest;
  const int place = p.strides[a].divmod(reach, rest);
  return rest == 0 && place < extent(p.out[a]) ? place : -1;
}

#if CHANNELS_INNER

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
im2col(const T* __restrict__ x, T* __restrict__ columns, const ColumnParams p) {
  const int item = blockIdx.x * THREADS + threadIdx.x;
  if (item >= p.items) return;
  int pack, tap_index, group, tap[3], at[3];
  int rest = p.packs.divmod(item, pack);
  rest = p.all_taps.divmod(rest, tap_index);
  rest = p.groups.divmod(rest, group);
  unravel(tap_index, p.taps, tap);
  const int image = unravel(rest, p.out, at);
  long long offset = image * p.batch + (group * p.group_channels + pack * V) * p.channel;
  const bool inside = read_at(p, at, tap, offset);
  store_pack(columns + (long long)item * V, inside ? load_pack<V>(x + offset) : Pack<T, V>{});
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
col2im(const T* __restrict__ columns, T* __restrict__ grad_x, const ColumnParams p) {
  const int item = blockIdx.x * THREADS + threadIdx.x;
  if (item >= p.items) return;
  int pack, own, at[3];
  const int rest = p.channels.divmod(item, pack);
  const int image = unravel(rest, p.size, at), group = p.packs.divmod(pack, own);
  A sum[V] = {};
  for (int t = 0; t < extent(p.taps[0]); t++) {
    const int z = place_of(p, 0, at[0], t);
    for (int r = 0; r < extent(p.taps[1]); r++) {
      const int h = place_of(p, 1, at[1], r);
#pragma unroll 4
      for (int s = 0; s < extent(p.taps[2]); s++) {
        const int w = place_of(p, 2, at[2], s);
        if ((z | h | w) < 0) continue;
        const int place = (z * extent(p.out[1]) + h) * extent(p.out[2]) + w;
        const int tap = (t * extent(p.taps[1]) + r) * extent(p.taps[2]) + s;
        const long long row = ((long long)image * p.places + place) * extent(p.groups) + group;
        const T* from = columns + (row * extent(p.all_taps) + tap) * p.group_channels + own * V;
        const Pack<T, V> column = load_pack<V>(from);
#pragma unroll
        for (int v = 0; v < V; v++) sum[v] += convert<A>(column.v[v]);
      }
    }
  }
  long long offset = image * p.batch + (long long)pack * V * p.channel;
#pragma unroll
  for (int a = 0; a < 3; a++) offset += at[a] * p.axis[a];
  Pack<T, V> result;
#pragma unroll
  for (int v = 0; v < V; v++) result.v[v] = convert<T>(sum[v]);
  store_pack(grad_x + offset, result);
}

#else

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
im2col(const T* __restrict__ x, T* __restrict__ columns, const ColumnParams p) {
  const int item = blockIdx.x * THREADS + threadIdx.x;
  if (item >= p.items) return;
  int pack, channel, at[V][3];
  const int plane = p.packs.divmod(item, pack);
  const int image = p.channels.divmod(plane, channel);
#pragma unroll
  for (int v = 0; v < V; v++) unravel(pack * V + v, p.out, at[v]);
  const T* from = x + (image * p.batch + channel * p.channel);
  T* to = columns + ((long long)plane * extent(p.all_taps) * p.places + pack * V);
  int tap[3];
  for (tap[0] = 0; tap[0] < extent(p.taps[0]); tap[0]++) {
    for (tap[1] = 0; tap[1] < extent(p.taps[1]); tap[1]++) {
#pragma unroll 4
      for (tap[2] = 0; tap[2] < extent(p.taps[2]); tap[2]++) {
        Pack<T, V> values;
#pragma unroll
        for (int v = 0; v < V; v++) {
          long long offset = 0;
          const bool inside = read_at(p, at[v], tap, offset);
          values.v[v] = inside ? from[offset] : T{};
        }
        store_pack(to, values);
        to += p.places;
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
col2im(const T* __restrict__ columns, T* __restrict__ grad_x, const ColumnParams p) {
  const int item = blockIdx.x * THREADS + threadIdx.x;
  if (item >= p.items) return;
  int channel, at[3];
  const int plane = unravel(item, p.size, at);
  const int image = p.channels.divmod(plane, channel);
  const T* from = columns + (long long)plane * extent(p.all_taps) * p.places;
  A sum = A(0);
  for (int t = 0; t < extent(p.taps[0]); t++) {
    const int z = place_of(p, 0, at[0], t);
    for (int r = 0; r < extent(p.taps[1]); r++) {
      const int h = place_of(p, 1, at[1], r);
#pragma unroll 4
      for (int s = 0; s < extent(p.taps[2]); s++) {
        const int w = place_of(p, 2, at[2], s);
        if ((z | h | w) < 0) continue;
        const int tap = (t * extent(p.taps[1]) + r) * extent(p.taps[2]) + s;
        const int place = (z * extent(p.out[1]) + h) * extent(p.out[2]) + w;
        sum += convert<A>(from[(long long)tap * p.places + place]);
      }
    }
  }
  long long offset = image * p.batch + channel * p.channel;
#pragma unroll
  for (int a = 0; a < 3; a++) offset += at[a] * p.axis[a];
  grad_x[offset] = convert<T>(sum);
}

#endif
