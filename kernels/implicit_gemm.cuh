// A convolution as a matrix product whose operands are read in place: what conv_direct.cu, conv_igemm.cu and
// conv_igemm_sm90.cu share.
// Per group, with the letters of conv_direct.cu's header:
//
//              rows                       columns   summed over (steps)            gathered  plain    result
//     fprop    places n,p,q               k         filter entries c,r,s           x         w        y
//     dgrad    places n,h,w of a phase    c         filter entries k,r,s of it     grad_y    w        grad_x
//     wgrad    filter entries c,r,s       k         places n,p,q                   x         grad_y   grad_w
//
// Halves. Element (place, entry) of the gathered operand lies at address source(place) + source(entry), at the
// coordinates at(place) + at(entry); the same place and entry give, as `other`, their addresses in the tensor of
// places and in the filter. So only M + K numbers are ever decoded into axes, not M·K: a block decodes its rows
// once and each step once, into shared memory, and an element then costs additions, one comparison an axis and its
// load. A place or entry beyond the end has a coordinate FAR outside, and needs no check of its own.
//
// Padding. A coordinate outside reads zero, or under another PADDING the element that continued() names (padding.cuh),
// a `detour` away from the address that the halves add up to; only FAR coordinates then have nothing to read. Packs of
// channels take their detours together, and packs of places exist only where no axis is padded. dgrad knows zeros
// alone: under the other modes it is asked for the gradient of the padded input, which conv_fold.cu adds up. A negative
// pad crops: no place and entry meet there, in either direction.
//
// Phases (dgrad). Elements h with one remainder by the stride are fed by the same taps: first, first + tap_step, …
// with tap_step = stride / gcd(stride, dilation). Within such a phase dgrad is a correlation of stride 1 with these
// taps alone. The phases, stride of them an axis, are blocks of one launch: no product with a zero that the stride
// put in, no atomics. Where the stride does not divide the size, the smaller phases leave some rows unused.
//
// Constants of the file that includes this: PASS ELEMENT ACCUMULATOR RESULT DIMS WIDE PADDING, and ACTIVATION where
// results are finished; CHANNELS_FAST (entries are numbered with the channel fastest, else with the taps) for
// numbered_entry. Sizes, strides, taps, stride, padding, dilation and groups are run-time numbers: decoding once a
// step hides them, and a whole network needs a handful of binaries.
#pragma once
#include "epilogue.cuh"
#include "padding.cuh"

#define FPROP 0  // values of PASS
#define DGRAD 1
#define WGRAD 2
#define BGRAD 3
#define REDUCE 4
#define MERGE 5

using T = ELEMENT;      // of the operands
using A = ACCUMULATOR;  // float for the half types, else T
using Result = RESULT;  // T, or A where conv_reduce_direct follows
#ifdef ACTIVATION
constexpr Activation ACT = Activation::ACTIVATION;
#endif
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
  FilterStrides filter;  // w (wgrad: grad_w, which is written)
  long long numel;       // elements of one partial result
  FastDiv count[3];      // places along each axis (dgrad: of the largest phase)
  FastDiv channels;      // source channels of a group
  FastDiv most_taps[3];  // along each axis (dgrad: of the phase that has the most of them)
  FastDiv fewer_taps[3]; // dgrad: of the phases that have one less
  FastDiv tiles, groups, phases, splits;  // what a block's number is made of
  int size[3];           // of the source
  int limit[3];          // of the result
  int taps[3], stride[3], dilation[3], pad[3];
  int reach[3];          // source coordinates from one tap to the next
  int tap_step[3];       // dgrad: filter taps from one tap of a phase to its next
  int places;            // of all images (dgrad: of the largest phase)
  int outputs;           // result channels of a group
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from the structure in implicit_gemm.py");

DEVICE constexpr int min_of(int a, int b) { return a < b ? a : b; }

// ---- addresses in two halves ----------------------------------------------------------------------------
struct Half {
  Offset source, other;  // other: of a place, in the result; of a filter entry, in the filter
  int at[DIMS];          // source coordinates
};
constexpr int FAR = -(1 << 30);  // a coordinate that no other half brings back inside; FAR + FAR still fits
constexpr Offset NOWHERE = -1;   // an `other` that does not exist

// The group and the phase in hand. A pass other than dgrad has one phase: all places, all taps.
struct Work {
  Offset source, result, filter;  // where the group begins
  int origin[DIMS];               // source coordinate of the first place's first tap
  int corner[DIMS];               // result coordinate of the first place
  int first[DIMS];                // first tap
  int taps[DIMS];
  int entries;                    // of the filter for one result channel: channels x taps
};

DEVICE Work work_on(const Params& p, int group, int phase) {
  Work work;
  work.source = group * (Offset)p.source.group;
  work.result = group * (Offset)p.result.group;
  work.filter = group * (Offset)p.filter.group;
  work.entries = (int)p.channels.divisor;
#pragma unroll
  for (int a = DIMS - 1; a >= 0; a--) {
    int origin = -p.pad[a], corner = 0, first = 0, taps = p.taps[a];
    if (PASS == DGRAD) {
      corner = phase % p.stride[a], phase /= p.stride[a];
      const int base = corner + p.pad[a];
      while (first < taps && (base - first * p.dilation[a]) % p.stride[a] != 0) first++;
      origin = (base - first * p.dilation[a]) / p.stride[a];
      taps = first < taps ? (taps - 1 - first) / p.tap_step[a] + 1 : 0;
    }
    work.origin[a] = origin, work.corner[a] = corner, work.first[a] = first, work.taps[a] = taps;
    work.entries *= taps;
  }
  return work;
}

// Place i of the phase, numbered image by image, last axis fastest.
DEVICE Half place_at(const Params& p, const Work& work, int i) {
  bool exists = i < p.places;
  int rest = exists ? i : 0, index[DIMS];
#pragma unroll
  for (int a = DIMS - 1; a >= 0; a--) rest = p.count[a].divmod(rest, index[a]);
  Half h;
  h.source = work.source + (Offset)rest * (Offset)p.source.batch;
  h.other = work.result + (Offset)rest * (Offset)p.result.batch;
#pragma unroll
  for (int a = 0; a < DIMS; a++) {
    const int to = PASS == DGRAD ? work.corner[a] + index[a] * p.stride[a] : index[a];
    if (PASS == DGRAD) exists &= to < p.limit[a];  // smaller phases leave the end of their count empty
    h.at[a] = work.origin[a] + index[a] * (PASS == DGRAD ? 1 : p.stride[a]);
    h.source += (Offset)h.at[a] * (Offset)p.source.axis[a];
    h.other += (Offset)to * (Offset)p.result.axis[a];
  }
  if (!exists) h.at[DIMS - 1] = FAR, h.other = NOWHERE;
  return h;
}

// The filter's entry for source channel c at one tap of the phase.
DEVICE Half entry_at(const Params& p, const Work& work, int c, const int (&tap)[DIMS]) {
  Half h;
  h.source = (Offset)c * (Offset)p.source.channel;
  h.other = work.filter + (Offset)c * (Offset)p.filter.channel;
#pragma unroll
  for (int a = 0; a < DIMS; a++) {
    const int r = PASS == DGRAD ? work.first[a] + tap[a] * p.tap_step[a] : tap[a];
    h.at[a] = tap[a] * p.reach[a];
    h.source += (Offset)h.at[a] * (Offset)p.source.axis[a];
    h.other += (Offset)r * (Offset)p.filter.tap[a];
  }
  return h;
}

// Whether coordinate `at` of source axis a can be read: it is inside, or PADDING continues the axis and the place and
// the entry that make it up exist.
DEVICE bool inside(const Params& p, int a, int at) {
  return PADDING == ZEROS ? (unsigned)at < (unsigned)p.size[a] : a < DIMS - 1 || at > FAR / 2;
}
DEVICE bool inside(const Params& p, const Half& one, const Half& two, int axes = DIMS) {
  bool in = true;
#pragma unroll
  for (int a = 0; a < axes; a++) in &= inside(p, a, one.at[a] + two.at[a]);
  return in;
}

// From the address that coordinate `at` of axis a would have to that of the element that is read for it.
DEVICE Offset detour(const Params& p, int a, int at) {
  return PADDING == ZEROS ? 0 : (Offset)(continued(at, p.size[a]) - at) * (Offset)p.source.axis[a];
}
// The address of a place's and an entry's element, as far as the first `axes` axes decide it.
DEVICE Offset address(const Params& p, const Half& one, const Half& two, int axes = DIMS) {
  Offset offset = one.source + two.source;
#pragma unroll
  for (int a = 0; a < axes; a++) offset += detour(p, a, one.at[a] + two.at[a]);
  return offset;
}

// What results meet on their way out (null: nothing), and where their moments go. Partial results and wgrad's are
// written as they are.
struct Finish {
  const T *scale, *bias, *residual;
  A* moments;
};

#ifdef CHANNELS_FAST
// Entry j of the filter, numbered with channels or with taps fastest: whichever the source's lanes follow. Of channels
// CHANNEL_RUN may come before the taps, and the others behind them: a block then reads a run of channels at all taps
// before it goes on to the next run, and finds in L1 what the taps have in common.
#ifndef CHANNEL_RUN
#define CHANNEL_RUN 0
#endif
DEVICE Half numbered_entry(const Params& p, const Work& work, int j) {
  const bool exists = j < work.entries;
  int rest = exists ? j : 0, c = 0, tap[DIMS];
  constexpr bool ALL_CHANNELS_FIRST = CHANNELS_FAST && CHANNEL_RUN == 0;
  if (ALL_CHANNELS_FIRST) rest = p.channels.divmod(rest, c);
  if (CHANNEL_RUN > 0) c = rest % CHANNEL_RUN, rest /= CHANNEL_RUN;
#pragma unroll
  for (int a = DIMS - 1; a >= 0; a--) {
    if (ALL_CHANNELS_FIRST && a == 0) {
      tap[0] = rest;
      break;
    }
    const bool fewer = PASS == DGRAD && work.taps[a] != (int)p.most_taps[a].divisor;
    rest = (fewer ? p.fewer_taps[a] : p.most_taps[a]).divmod(rest, tap[a]);
  }
  if (!ALL_CHANNELS_FIRST) c += rest * (CHANNEL_RUN > 0 ? CHANNEL_RUN : 1);
  Half h = entry_at(p, work, c, tap);
  if (!exists) h.at[DIMS - 1] = FAR, h.other = NOWHERE;
  return h;
}

// The product's rows, and the steps of its sums.
DEVICE Half row_at(const Params& p, const Work& work, int m) {
  return PASS == WGRAD ? numbered_entry(p, work, m) : place_at(p, work, m);
}
DEVICE Half step_at(const Params& p, const Work& work, int k) {
  return PASS == WGRAD ? place_at(p, work, k) : numbered_entry(p, work, k);
}
#endif
