// Max unpooling of N x C x D x H x W, forward and backward; 1-D and 2-D problems have axes of size 1.
//
// Maths. Each value x[n, c, m] has a place indices[n, c, m] (int64, row by row) in the plane of its image and channel:
//
//     forward    y[n, c, i] = x[n, c, m] for indices[n, c, m] = i, of several the one with the largest m; 0 elsewhere
//     backward   grad_x[n, c, m] = grad_y[n, c, indices[n, c, m]]
//
// An index outside of the plane names no place: its value goes nowhere, and its gradient is 0.
//
// Layout. Tensors are read in place by their strides. CHANNELS_INNER tells along what neighbouring lanes go:
// channels (channels-last) or places (NCHW). y is written in packs of Y_VEC elements, at most 16 bytes, where
// alignment, sizes and strides allow them. X_RUN and Y_RUN: along its places a plane has one stride, so that a
// place's number need not be taken apart into d, h and w.
//
// Forward. A block owns `places` consecutive places of `planes` planes (in channels-last: of neighbouring channels)
// and has a slot in shared memory for each. It reads indices, keeps in each slot the largest m + 1 that asks for it
// (an integer maximum, in which order cannot matter), and after a barrier writes its part of y, zeros included,
// with the values that the slots name. No two blocks write one place and no float is added: the same input gives
// the same bits.
//
//     whole      Planes of which one, or in channels-last a sector's worth of channels, fit into SLOTS: a block
//                reads the indices of its planes, all of them and no others.
//     CHUNKED    Larger planes, in parts. Which indices fall into a part cannot be known, but they come from pooling
//                and so rise roughly with m. max_unpool_ranges writes the least and the largest place that each
//                segment of SEGMENT indices names; a block reads the segments whose range meets its own places. Any
//                indices are right; scattered ones make blocks read more.
//
// Grid. max_unpool_fwd: a block for each part of each group of planes, parts fastest, so that what two of them read
// stays in L2. max_unpool_ranges: a warp a segment. max_unpool_bwd: x, blocks over the values of `images` images,
// PER_THREAD a thread; y, chunks of the batch.
//
// Bytes. Floor: x, indices and y once; 28 a value for fp32 and 2 x 2 windows. Whole: the floor. CHUNKED: the indices
// once more, 8 a value, and from L2 those of segments that meet two parts, a quarter to a half in images; ranges are
// 1/32 a value, and every part reads those of its planes. Backward: the floor, but of y only the sectors that hold
// a wanted place.
//
// Why this way. A scatter is deterministic only where no place is asked for twice, and overlapping windows do that.
// The plain remedy, an integer maximum into a zeroed workspace as large as y and then a gather by it, moves 16 bytes
// more for each place of y: 92 a value instead of 28, or 36 in parts. Slots in shared memory move nothing.
//
// Constants: ELEMENT, INDEX (int, or long long where a tensor spans 2^31 elements), CHANNELS_INNER, X_RUN, Y_RUN,
// Y_VEC, CHUNKED, SLOTS, SEGMENT, THREADS, PER_THREAD, PARAMS_BYTES; and the name of the wanted entry in capitals.
#include "common.cuh"

using T = ELEMENT;
using Index = INDEX;
constexpr int WARPS = THREADS / 32;
static_assert(THREADS % 32 == 0 && SEGMENT % 32 == 0 && SLOTS % 4 == 0, "whole warps, whole packs");
static_assert(Y_VEC * sizeof(T) <= 16, "a pack is one access");

struct Strides { long long n, c, d, h, w; };  // in elements; a plane that is one run has its stride in w

struct UnpoolParams {
  Strides x, indices, y;  // or of grad_x and grad_y
  FastDiv x_columns, x_rows, y_columns, y_rows;
  FastDiv channels, sources;     // C, and the values of a plane of x
  FastDiv slot_run, source_run;  // what slots and values of a group count first: its planes, or the places of one
  FastDiv groups, parts;         // groups of planes of an image (channels-last), parts of a plane
  int N, C, planes, places;      // planes of a group, places of a part
  int plane_places, segments;    // places of a plane of y, segments of a group
  int images, count;             // backward: images and values of a chunk; max_unpool_ranges: groups
};
static_assert(sizeof(UnpoolParams) == PARAMS_BYTES, "the Python structure must mirror this one");

// ---- addresses ------------------------------------------------------------------------------------------
template <bool RUN>
DEVICE Index place_offset(const Strides& s, const FastDiv& columns, const FastDiv& rows, int place) {
  if (RUN) return place * (Index)s.w;
  int w, h;
  const int d = rows.divmod(columns.divmod(place, w), h);
  return d * (Index)s.d + h * (Index)s.h + w * (Index)s.w;
}

DEVICE Index source_offset(const Strides& s, int n, int c, int source, const UnpoolParams& p) {
  return n * (Index)s.n + c * (Index)s.c + place_offset<X_RUN>(s, p.x_columns, p.x_rows, source);
}
DEVICE Index y_offset(int n, int c, int place, const UnpoolParams& p) {
  return n * (Index)p.y.n + c * (Index)p.y.c + place_offset<Y_RUN>(p.y, p.y_columns, p.y_rows, place);
}

#if defined(MAX_UNPOOL_FWD) || defined(MAX_UNPOOL_RANGES)  // ---- groups of planes ---------------------------
struct Plane { int n, c; };

DEVICE Plane plane_of(int group, int j, const UnpoolParams& p) {  // may lie behind the last
  Plane plane;
  if (CHANNELS_INNER) {
    plane.n = p.groups.divmod(group, plane.c);
    plane.c = plane.c * p.planes + j;
  } else {
    plane.n = p.channels.divmod(group * p.planes + j, plane.c);
  }
  return plane;
}
DEVICE bool exists(const Plane& plane, const UnpoolParams& p) { return plane.n < p.N && plane.c < p.C; }

// The i-th value, or slot, of a group: which of its planes, and where there. `run` is what i counts first.
struct Member { int j, at; };
DEVICE Member member_of(int i, const FastDiv& run) {
  if (!CHANNELS_INNER && CHUNKED) return {0, i};  // one plane a group
  int rest;
  const int quotient = run.divmod(i, rest);
  return CHANNELS_INNER ? Member{rest, quotient} : Member{quotient, rest};
}

// visit(j, source, index) for the SEGMENT values of a segment, by one warp. All their loads go out together.
template <class Visit>
DEVICE void scan_segment(const long long* indices, int group, int segment, const UnpoolParams& p, Visit visit) {
  const int first = segment * SEGMENT + threadIdx.x % 32, end = p.planes * p.sources.divisor;
  Member member[SEGMENT / 32];
  long long index[SEGMENT / 32];
#pragma unroll
  for (int k = 0; k < SEGMENT / 32; k++) {
    member[k] = member_of(first + k * 32, p.source_run);
    const Plane plane = plane_of(group, member[k].j, p);
    index[k] = -1;
    if (first + k * 32 < end && exists(plane, p)) {
      index[k] = indices[source_offset(p.indices, plane.n, plane.c, member[k].at, p)];
    }
  }
#pragma unroll
  for (int k = 0; k < SEGMENT / 32; k++) visit(member[k].j, member[k].at, index[k]);
}
#endif

#ifdef MAX_UNPOOL_RANGES
// ranges[group][segment] = the least and the largest place that the segment's indices name; the largest int and -1
// where they name none.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
max_unpool_ranges(const long long* __restrict__ indices, int* __restrict__ ranges, UnpoolParams p) {
  const int number = blockIdx.x * WARPS + threadIdx.x / 32;
  const int group = number / p.segments, segment = number % p.segments;
  if (group >= p.count) return;
  int least = 0x7fffffff, largest = -1;
  scan_segment(indices, group, segment, p, [&](int, int, long long index) {
    if ((unsigned long long)index >= (unsigned)p.plane_places) return;
    least = min(least, (int)index);
    largest = max(largest, (int)index);
  });
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    least = min(least, __shfl_xor_sync(0xffffffffu, least, lanes));
    largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
  }
  if (threadIdx.x % 32 == 0) store_pack(ranges + 2 * (Index)number, Pack<int, 2>{{least, largest}});
}
#endif

#ifdef MAX_UNPOOL_FWD
extern "C" __global__ void __launch_bounds__(THREADS, 4)
max_unpool_fwd(const T* __restrict__ x, const long long* __restrict__ indices, const int* __restrict__ ranges,
               T* __restrict__ y, UnpoolParams p) {
  __shared__ __align__(16) int winner[SLOTS];  // of each slot: the last value that asked for it, from 1; or 0
  int part;
  const int group = p.parts.divmod(blockIdx.x, part);
  const int first = part * p.places, places = min(p.places, p.plane_places - first);
  const int slots = p.planes * p.places;
  for (int i = threadIdx.x * 4; i < slots; i += THREADS * 4) store_pack(winner + i, Pack<int, 4>{});
  __syncthreads();

  const auto ask = [&](int j, int source, long long index) {
    const unsigned long long place = (unsigned long long)index - (unsigned)first;
    if (place >= (unsigned)places) return;
    const int slot = CHANNELS_INNER ? (int)place * p.planes + j : j * p.places + (int)place;
    atomicMax(winner + slot, source + 1);
  };
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (CHUNKED) {
    // Each lane looks at one range. Neighbouring segments are those of different warps: a part needs a few in a row.
    for (int base = warp; base < p.segments; base += THREADS) {
      const int own = base + lane * WARPS;
      bool wanted = false;
      if (own < p.segments) {
        const auto range = load_pack<2>(ranges + 2 * (group * (Index)p.segments + own));
        wanted = range.v[0] < first + places && range.v[1] >= first;
      }
      for (unsigned rest = __ballot_sync(0xffffffffu, wanted); rest; rest &= rest - 1) {
        scan_segment(indices, group, base + (__ffs(rest) - 1) * WARPS, p, ask);
      }
    }
  } else {
    for (int segment = warp; segment < p.segments; segment += WARPS) scan_segment(indices, group, segment, p, ask);
  }
  __syncthreads();

#pragma unroll 2
  for (int i = threadIdx.x * Y_VEC; i < slots; i += THREADS * Y_VEC) {
    const Member member = member_of(i, p.slot_run);
    const Plane plane = plane_of(group, member.j, p);
    const bool inside = exists(plane, p) && member.at < places;  // a pack is, or is not, as a whole
    int last[Y_VEC];
    load_as(last, winner + i);
    Pack<T, Y_VEC> pack{};
#pragma unroll
    for (int v = 0; v < Y_VEC; v++) {
      const int c = plane.c + (CHANNELS_INNER ? v : 0);
      if (last[v] != 0) pack.v[v] = x[source_offset(p.x, plane.n, c, last[v] - 1, p)];
    }
    if (inside) store_pack(y + y_offset(plane.n, plane.c, first + member.at, p), pack);
  }
}
#endif

#ifdef MAX_UNPOOL_BWD
extern "C" __global__ void __launch_bounds__(THREADS, 4)
max_unpool_bwd(const T* __restrict__ grad_y, const long long* __restrict__ indices, T* __restrict__ grad_x,
               UnpoolParams p) {
  const int first = blockIdx.x * (THREADS * PER_THREAD) + threadIdx.x;
  int n[PER_THREAD], c[PER_THREAD], source[PER_THREAD];
  long long index[PER_THREAD];
#pragma unroll
  for (int k = 0; k < PER_THREAD; k++) {
    const int i = first + k * THREADS;
    if (CHANNELS_INNER) {
      n[k] = p.sources.divmod(p.channels.divmod(i, c[k]), source[k]);
    } else {
      n[k] = p.channels.divmod(p.sources.divmod(i, source[k]), c[k]);
    }
    n[k] += blockIdx.y * p.images;
    index[k] = -1;
    if (i < p.count && n[k] < p.N) index[k] = indices[source_offset(p.indices, n[k], c[k], source[k], p)];
  }
  T value[PER_THREAD] = {};
#pragma unroll
  for (int k = 0; k < PER_THREAD; k++) {
    if ((unsigned long long)index[k] < (unsigned)p.plane_places) {
      value[k] = grad_y[y_offset(n[k], c[k], (int)index[k], p)];
    }
  }
#pragma unroll
  for (int k = 0; k < PER_THREAD; k++) {
    if (first + k * THREADS >= p.count || n[k] >= p.N) continue;
    grad_x[source_offset(p.x, n[k], c[k], source[k], p)] = value[k];
  }
}
#endif
