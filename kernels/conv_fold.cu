// The input gradient of a convolution whose padding continues its input (reflect, replicate, circular): gradients of
// the padded input, folded back onto the elements that its padding was made of.
//
// Maths. Let continued(u - before) be the coordinate that place u of a padded axis reads (padding.cuh). Then
//
//     grad_x[n,c,h,w] = Σ padded[n,c,u,v]  over all u, v with continued(u - before) = h, along w likewise
//
// Along one axis of size H these are a place of its own, u = h + before, for every h, and in the padding
//
//                 leading                            trailing
//     reflect     before - h     if 1 <= h <= before     before + 2·(H - 1) - h   if H - 1 - after <= h <= H - 2
//     replicate   0 … before-1   if h = 0                before + H …             if h = H - 1
//     circular    h - H + before if h >= H - before      before + H + h           if h < after
//
// and over several axes every combination of them. An element is their sum in this order, the last axis fastest, in
// ACCUMULATOR, rounded once: the same input gives the same bits. Nothing is atomic.
//
// Layout. padded and grad_x may have any strides. Elements that the padding does not read, which nearly all are, are
// copied, VECTOR neighbours in one access of up to 16 bytes: channels where these are the fastest axis (CHANNELS_FAST),
// else neighbours along the last axis, where the pad must be a multiple of VECTOR for both sides to be aligned. The
// others are summed point by point, channels-last still VECTOR channels at a time.
//
// Grid. x: blocks of THREADS over the packs of `images` images, the fast index first; a thread takes EACH of them,
// THREADS apart, and loads all that it copies before it stores any, so that enough bytes are on their way where packs
// are narrow. y: chunks of the batch, for tensors of more than 2^31 packs.
//
// Constants. PADDING ELEMENT ACCUMULATOR DIMS CHANNELS_FAST VECTOR EACH; WIDE: offsets take 64 bits (a tensor spans
// 2^31 elements). Sizes, strides and pads are run-time numbers.
//
// Bytes. Every place of padded is read by one thread, once, and every element of grad_x written once: the floor.
// fp32, 64 channels @ 56x56, N = 32, pad 1: 27.6 + 25.7 MB, 0.016 ms at 3.35 TB/s. In NCHW a pad of 1 leaves accesses
// of one element: a warp's are still one run, of 64 bytes in the half types.
//
// Why this way. Gathering takes two comparisons an axis and side and writes grad_x once; scattering the border would
// need zeros first and atomics, whose order changes. A corner under replicate padding is one thread's sum of
// (before + 1)·(before + 1) places: long only for pads far wider than networks have. dgrad could fold as it goes, but
// only by computing the border's sums, which several phases share, again for each of the elements they go to.
#include "padding.cuh"

using T = ELEMENT;
using A = ACCUMULATOR;
#if WIDE
typedef long long Offset;
#else
typedef int Offset;
#endif
constexpr int V = VECTOR, THREADS = 256;
static_assert(DIMS >= 1 && DIMS <= 3, "one to three spatial axes");
static_assert(PADDING != ZEROS, "zeros have no gradient");

// Arrays over axes hold DIMS values, slowest axis first. Strides in elements.
struct Strides {
  long long batch, channel, axis[3];
};
struct Params {
  Strides padded, grad_x;
  FastDiv channels, count[3];         // packs along the fast one of these, elements along the others
  int size[3], before[3], after[3];   // of grad_x; of the padding
  int images, batch;                  // of a chunk; of all
  int packs;                          // of a chunk
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from the structure in conv_fold.py");

// An element of grad_x, or the first of a pack's.
struct Element {
  int n, c, at[DIMS];
};
// Pack i of the block's chunk; false where there is none.
DEVICE bool pack_at(const Params& p, int i, Element& own) {
  const bool counted = i < p.packs;
  int rest = counted ? i : 0;
  if (CHANNELS_FAST) rest = p.channels.divmod(rest, own.c);
#pragma unroll
  for (int a = DIMS - 1; a >= 0; a--) rest = p.count[a].divmod(rest, own.at[a]);
  if (!CHANNELS_FAST) rest = p.channels.divmod(rest, own.c);
  own.n = (int)blockIdx.y * p.images + rest;
  (CHANNELS_FAST ? own.c : own.at[DIMS - 1]) *= V;
  return counted && own.n < p.batch;
}

DEVICE Offset address(const Strides& s, const Element& e) {
  Offset offset = (Offset)e.n * (Offset)s.batch + (Offset)e.c * (Offset)s.channel;
#pragma unroll
  for (int a = 0; a < DIMS; a++) offset += (Offset)e.at[a] * (Offset)s.axis[a];
  return offset;
}

// Whether the padding of axis a reads any of its coordinates h … end.
DEVICE bool meet(int h, int end, int first, int last) { return max(h, first) <= min(end, last); }
DEVICE bool is_read(const Params& p, int a, int h, int end) {
  const int last = p.size[a] - 1, before = p.before[a], after = p.after[a];
  if (PADDING == REFLECT) return meet(h, end, 1, before) || meet(h, end, last - after, last - 1);
  if (PADDING == REPLICATE) return (h == 0 && before > 0) || (end == last && after > 0);
  return meet(h, end, last + 1 - before, last) || meet(h, end, 0, after - 1);
}

// The places of a padded axis that read coordinate h: its own, and runs of them in the leading and trailing padding.
struct Places {
  int own, leading, leading_count, trailing, trailing_count;

  __device__ __forceinline__ int count() const { return 1 + leading_count + trailing_count; }
  __device__ __forceinline__ int place(int i) const {
    return i == 0 ? own : i <= leading_count ? leading + i - 1 : trailing + i - 1 - leading_count;
  }
};
DEVICE Places places_of(const Params& p, int a, int h) {
  const int last = p.size[a] - 1, before = p.before[a], after = p.after[a], end = before + p.size[a];
  if (PADDING == REFLECT)
    return {h + before, before - h, h >= 1 && h <= before, end - 1 + last - h, h < last && h >= last - after};
  if (PADDING == REPLICATE) return {h + before, 0, h == 0 ? before : 0, end, h == last ? after : 0};
  return {h + before, h + before - p.size[a], h + before > last, end + h, h < after};
}

// The sum for one point of grad_x, of WIDTH channels from e.c on.
template <int WIDTH>
DEVICE void fold(const T* __restrict__ padded, T* __restrict__ grad_x, const Params& p, const Element& e) {
  Places places[3];
#pragma unroll
  for (int a = 0; a < DIMS; a++) places[a] = places_of(p, a, e.at[a]);
  const int planes = DIMS > 2 ? places[0].count() : 1, rows = DIMS > 1 ? places[DIMS - 2].count() : 1;
  A sum[WIDTH] = {};
#pragma unroll 1
  for (int plane = 0; plane < planes; plane++)
#pragma unroll 1
    for (int row = 0; row < rows; row++) {
      Element from = e;
      if (DIMS > 2) from.at[0] = places[0].place(plane);
      if (DIMS > 1) from.at[DIMS - 2] = places[DIMS - 2].place(row);
#pragma unroll 1
      for (int i = 0; i < places[DIMS - 1].count(); i++) {
        from.at[DIMS - 1] = places[DIMS - 1].place(i);
        const Pack<T, WIDTH> pack = load_pack<WIDTH>(padded + address(p.padded, from));
#pragma unroll
        for (int v = 0; v < WIDTH; v++) sum[v] += convert<A>(pack.v[v]);
      }
    }
  store_as<WIDTH>(grad_x + address(p.grad_x, e), sum);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
conv_fold(const T* __restrict__ padded, T* __restrict__ grad_x, const Params p) {
  constexpr int POINTS = CHANNELS_FAST ? 1 : V;  // of a pack; the rest of it are channels
  const int first = (int)blockIdx.x * EACH * THREADS + (int)threadIdx.x;
  Pack<T, V> own[EACH];
  Offset to[EACH];
  unsigned summed = 0;  // a bit for each pack that is more than a copy
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    Element e;
    const bool exists = pack_at(p, first + i * THREADS, e);
    bool copied = exists;
#pragma unroll
    for (int a = 0; a < DIMS; a++) copied &= !is_read(p, a, e.at[a], e.at[a] + (a == DIMS - 1 ? POINTS - 1 : 0));
    if (exists && !copied) summed |= 1u << i;
    to[i] = copied ? address(p.grad_x, e) : -1;
#pragma unroll
    for (int a = 0; a < DIMS; a++) e.at[a] += p.before[a];
    if (copied) own[i] = load_pack<V>(padded + address(p.padded, e));
  }
#pragma unroll
  for (int i = 0; i < EACH; i++)
    if (to[i] >= 0) store_pack<V>(grad_x + to[i], own[i]);

#pragma unroll 1
  for (int i = 0; summed != 0; i++, summed >>= 1) {
    if (!(summed & 1)) continue;
    Element e;
    pack_at(p, first + i * THREADS, e);
#pragma unroll 1
    for (int point = 0; point < POINTS; point++, e.at[DIMS - 1]++) fold<V / POINTS>(padded, grad_x, p, e);
  }
}
