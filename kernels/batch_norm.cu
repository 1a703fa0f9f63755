// Batch normalisation of N x C x L, with an optional residual and activation in the same pass.
//
// Maths, per channel c over the M = N·L values of its plane stack:
//
//     mean = Σx / M      var = Σ(x - mean)² / M      rstd = 1 / sqrt(var + eps)      x̂ = (x - mean)·rstd
//     forward   z = γ·x̂ + β + residual      y = act(z)
//     backward  g = grad_y · act'(z)         grad_residual = g
//               grad_bias = Σg               grad_weight = Σ g·x̂
//               grad_x = γ·rstd·(g - Σg / M - x̂·Σ(g·x̂) / M)       in training
//               grad_x = γ·rstd·g                                  with running statistics, which are constants
//
// No activation's input is stored for the backward pass. Without a residual z is computed again: x is read there
// anyway. With one, the residual would have to be kept for that; where y tells the derivative (FROM_RESULT: relu,
// relu6, leaky_relu, sigmoid, tanh) y is read in its place, which whatever comes next keeps in any case.
//
// Layout. Both of PyTorch's layouts are one picture here, a matrix of sites by slots whose cells are packs of V
// elements, V·sizeof(T) <= 16 bytes:
//
//                          a pack holds                      site             slot
//     NCHW                 V places of one channel           (n, V places)    channel
//     channels-last        V channels of one place           (n, place)       V channels
//
// so that one text serves both. A tensor is (image, site, slot) strides in elements; the site index is split
// into image and place by a precomputed division. Tensors may lie differently from one another (a channel slice,
// an expanded batch), as long as packs are contiguous and aligned in all of them; else V is smaller, down to 1.
//
// Grid. x: ceil(slots / LANES) groups of slots, y: splits of the sites. A block of THREADS threads is LANES
// slots side by side times ROWS sites: NCHW has LANES = 1, and a warp reads 32 packs of one channel in a row;
// channels-last has LANES up to 32, and a warp reads packs of neighbouring channels. A thread owns its slot and
// every ROWS-th site of the block's range, UNROLL packs at a time, so that up to 64 bytes a thread are in flight.
//
// Passes.
//     training      stats: one (count, mean, M2) a channel and split → merge: one warp a channel → apply
//     statistics    stats → stats_merge, for batches that are spread over several processes
//     inference     infer alone
//     backward      bwd_sums: three sums a channel and split → bwd_merge: one warp a channel → bwd_apply
//     small         train and bwd hold a channel in one block (a few thousand values) and need one launch
// Nothing is added atomically: threads, lanes, warps and splits are merged in a fixed order, and the same input
// gives the same bits. The apply passes walk the splits backwards, since what the pass before read last is what
// the L2 cache still holds.
//
// Bytes, for a tensor of X bytes: training reads x twice and writes y, 3X; the floor is 2X, reached when x fits
// in L2 (50 MB on an H100) or in one block. Backward reads grad_y and x twice and writes grad_x, 5X; floor 3X.
// A residual, or y in its place, adds one read to each pass that needs z, and its gradient one write. Inference is
// at its floor, 2X, statistics at theirs, X.
//
// Why this way: the variance. Σx² - (Σx)²/M is lost when |mean| >> std. Here every value is first taken relative
// to the channel's first element (exact when they are near each other). That element lies within sqrt(M)·std of
// the mean, whatever the data, so all further means are small numbers in units of std and round harmlessly.
// Relative values are gathered in chunks of UNROLL packs, two passes in registers for each, and chunks,
// threads, warps and splits are merged by Chan's formula, which has no cancellation. The forward pass keeps the
// mean as first element + remainder, so it loses nothing even where `mean` itself must round (1e4 with std 1e-2
// in float). Backward has only the rounded `mean`; it finds the rounding error as Σ(x - mean)/M on its way and
// takes it out of the sums.
//
// Constants: ELEMENT, ACCUMULATOR, PARAMETER (weight, bias, running statistics), INDEX (int, or long long where
// a tensor spans 2^31 elements), VECTOR = V, UNROLL, CHANNELS_INNER (1: channels-last packs), LANES, THREADS,
// ACTIVATION, FROM_RESULT (1: what lies beside x in the backward pass is y, not the residual), PARAMS_BYTES; and
// TRAIN, INFER or BACKWARD, whichever entries are wanted. Everything else is known at run time.
#include "epilogue.cuh"

using T = ELEMENT;
using A = ACCUMULATOR;
using P = PARAMETER;
using Index = INDEX;
constexpr int V = VECTOR;
constexpr int K = CHANNELS_INNER ? V : 1;  // channels of a slot
constexpr int ROWS = THREADS / LANES;
constexpr int WARPS = THREADS / 32;
constexpr Activation ACT = Activation::ACTIVATION;
constexpr bool TRANSCENDENTAL = !FROM_RESULT && (ACT == Activation::silu || ACT == Activation::gelu ||
                                                 ACT == Activation::sigmoid || ACT == Activation::tanh);
// Packs that a thread has in flight in the passes that may read several tensors: fewer than UNROLL, and few enough
// values for exp and erf to find registers.
constexpr int VALUES = !TRANSCENDENTAL ? 16 : sizeof(A) == 4 ? 8 : 2;
constexpr int UNROLL_Z = VALUES / V < 1 ? 1 : VALUES / V < UNROLL / 2 ? VALUES / V : UNROLL / 2;
static_assert(THREADS % 32 == 0 && 32 % LANES == 0, "a warp holds whole rows of lanes");
static_assert((V & (V - 1)) == 0 && V * sizeof(T) <= 16, "a pack is one access");
static_assert(CHANNELS_INNER || LANES == 1, "in NCHW a block works on one channel");
static_assert(!FROM_RESULT || TOLD_BY_RESULT<ACT>, "y must tell the derivative");

struct Strides { long long image, site, slot; };

struct BatchNormParams {
  // In the backward pass `residual` may be where y lies, and `y` is where grad_y lies.
  Strides x, residual, y, grad_x, grad_residual;
  FastDiv sites_per_image;
  int sites, split_sites, splits;  // sites in all, sites of one split, splits
  int channels, training;
  double count, unbiased;  // M, and M / (M - 1)
  double momentum, eps;
};
static_assert(sizeof(BatchNormParams) == PARAMS_BYTES, "the Python structure must mirror this one");

// ---- who owns what --------------------------------------------------------------------------------------
struct Owner {
  int row, channel;  // first row of the thread's sites; first channel of its slot
  Index slot;
  bool active;       // false in the lanes behind the last slot
};
DEVICE Owner owner(const BatchNormParams& p) {
  const int slot = blockIdx.x * LANES + threadIdx.x % LANES;
  return {(int)threadIdx.x / LANES, slot * K, (Index)slot, slot * K < p.channels};
}

// A pack's place in a tensor.
template <class E> DEVICE E* at(E* tensor, const Strides& s, Index slot, int site, const BatchNormParams& p) {
  int place;
  const int image = p.sites_per_image.divmod(site, place);
  return tensor + (image * (Index)s.image + place * (Index)s.site + slot * (Index)s.slot);
}

// body.run<U>(site) does U packs, ROWS sites apart, from `site` on; all sites of [first, last) are done once.
template <int U, class Body> DEVICE void for_sites(int row, int first, int last, Body& body) {
  int site = first + row;
#pragma unroll 1
  for (; site + (U - 1) * ROWS < last; site += U * ROWS) body.template run<U>(site);
#pragma unroll 1
  for (; site < last; site += ROWS) body.template run<1>(site);
}

// The slot's part of a per-channel vector, which may be missing.
template <class E> DEVICE void load_vector(A (&v)[K], const E* vector, const Owner& own, A otherwise) {
#pragma unroll
  for (int k = 0; k < K; k++) v[k] = vector && own.active ? convert<A>(vector[own.channel + k]) : otherwise;
}

// ---- what is gathered over sites ------------------------------------------------------------------------
// Count, mean and sum of squared deviations of N channels that have seen equally many values.
template <int N> struct Moments {
  A count, mean[N], m2[N];
  __device__ __forceinline__ void clear() {
    count = A(0);
#pragma unroll
    for (int k = 0; k < N; k++) mean[k] = m2[k] = A(0);
  }
  // Chan, Golub and LeVeque (1979): the moments of two sets taken together.
  __device__ __forceinline__ void merge(const Moments& b) {
    const A total = count + b.count, weight = total > A(0) ? b.count / total : A(0);
#pragma unroll
    for (int k = 0; k < N; k++) {
      const A delta = b.mean[k] - mean[k];
      mean[k] += delta * weight;
      m2[k] += b.m2[k] + delta * delta * (count * weight);
    }
    count = total;
  }
  __device__ __forceinline__ Moments from_lane_xor(int lanes) const {
    Moments other;
    other.count = __shfl_xor_sync(0xffffffffu, count, lanes);
#pragma unroll
    for (int k = 0; k < N; k++) {
      other.mean[k] = __shfl_xor_sync(0xffffffffu, mean[k], lanes);
      other.m2[k] = __shfl_xor_sync(0xffffffffu, m2[k], lanes);
    }
    return other;
  }
};

// Σg, Σ g·(x - mean) and Σ(x - mean) of N channels.
template <int N> struct Sums {
  A g[N], gx[N], x[N];
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int k = 0; k < N; k++) g[k] = gx[k] = x[k] = A(0);
  }
  __device__ __forceinline__ void merge(const Sums& b) {
#pragma unroll
    for (int k = 0; k < N; k++) {
      g[k] += b.g[k];
      gx[k] += b.gx[k];
      x[k] += b.x[k];
    }
  }
  __device__ __forceinline__ Sums from_lane_xor(int lanes) const {
    Sums other;
#pragma unroll
    for (int k = 0; k < N; k++) {
      other.g[k] = __shfl_xor_sync(0xffffffffu, g[k], lanes);
      other.gx[k] = __shfl_xor_sync(0xffffffffu, gx[k], lanes);
      other.x[k] = __shfl_xor_sync(0xffffffffu, x[k], lanes);
    }
    return other;
  }
};

// Merges lanes `nearest`, 2·nearest, … 16 apart. Only the result of the first `nearest` lanes counts: elsewhere
// operands come in another order. All 32 lanes must take part.
template <class Gathered> DEVICE void merge_warp(Gathered& v, int nearest) {
#pragma unroll
  for (int lanes = nearest; lanes < 32; lanes *= 2) v.merge(v.from_lane_xor(lanes));
}

// Merges the rows of a block; the result is in the first LANES threads. All threads must take part.
template <class Gathered> DEVICE void merge_rows(Gathered& v, Gathered (&scratch)[WARPS][LANES]) {
  merge_warp(v, LANES);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (lane < LANES) scratch[warp][lane] = v;
  __syncthreads();
  if (threadIdx.x < LANES) {
#pragma unroll 1
    for (int w = 1; w < WARPS; w++) v.merge(scratch[w][lane]);
  }
}

// ---- the four passes over a slot's sites ----------------------------------------------------------------
struct Statistics {
  const BatchNormParams& p;
  const T* x;
  Index slot;
  A first[K];
  Moments<K> moments;

  template <int U> __device__ __forceinline__ void run(int site) {
    A v[U][V];
#pragma unroll
    for (int u = 0; u < U; u++) load_as(v[u], at(x, p.x, slot, site + u * ROWS, p));
    constexpr int N = U * V / K;  // values of each channel
    Moments<K> chunk;
    chunk.clear();
    chunk.count = A(N);
#pragma unroll
    for (int i = 0; i < U * V; i++) chunk.mean[i % K] += v[i / V][i % V] -= first[i % K];
#pragma unroll
    for (int k = 0; k < K; k++) chunk.mean[k] *= A(1) / A(N);
#pragma unroll
    for (int i = 0; i < U * V; i++) {
      const A d = v[i / V][i % V] - chunk.mean[i % K];
      chunk.m2[i % K] += d * d;
    }
    moments.merge(chunk);
  }
};

// y = act((x - shift - centre) * scale + bias + residual)
struct Normalise {
  const BatchNormParams& p;
  const T *x, *residual;
  T* y;
  Index slot;
  A shift[K], centre[K], scale[K], bias[K];

  template <int U> __device__ __forceinline__ void run(int site) {
    A v[U][V], r[U][V];
#pragma unroll
    for (int u = 0; u < U; u++) {
      load_as(v[u], at(x, p.x, slot, site + u * ROWS, p));
      if (residual) load_as(r[u], at(residual, p.residual, slot, site + u * ROWS, p));
    }
#pragma unroll
    for (int u = 0; u < U; u++) {
#pragma unroll
      for (int i = 0; i < V; i++) {
        const A z = (v[u][i] - shift[i % K] - centre[i % K]) * scale[i % K] + bias[i % K];
        v[u][i] = activate<ACT>(residual ? z + r[u][i] : z);
      }
      store_as(at(y, p.y, slot, site + u * ROWS, p), v[u]);
    }
  }
};

// What the backward passes share: g = grad_y · act'(z) and d = x - mean of U packs. `beside` is the residual or
// null, with FROM_RESULT it is y.
struct Gradient {
  const BatchNormParams& p;
  const T *grad_y, *x, *beside;
  Index slot;
  A mean[K], scale[K], bias[K];

  template <int U> __device__ __forceinline__ void load(int site, bool with_x, A (&g)[U][V], A (&d)[U][V]) const {
    constexpr bool WITH_Z = ACT != Activation::none && !FROM_RESULT;
    A r[U][V];
#pragma unroll
    for (int u = 0; u < U; u++) {
      load_as(g[u], at(grad_y, p.y, slot, site + u * ROWS, p));
      if (WITH_Z || with_x) load_as(d[u], at(x, p.x, slot, site + u * ROWS, p));
      if (FROM_RESULT || (WITH_Z && beside)) load_as(r[u], at(beside, p.residual, slot, site + u * ROWS, p));
    }
    if (FROM_RESULT) {
#pragma unroll
      for (int i = 0; i < U * V; i++)
        g[i / V][i % V] = activation_grad_of_result<ACT>(r[i / V][i % V], g[i / V][i % V]);
    }
    if (!WITH_Z && !with_x) return;
#pragma unroll
    for (int u = 0; u < U; u++) {
#pragma unroll
      for (int i = 0; i < V; i++) {
        d[u][i] -= mean[i % K];
        const A z = d[u][i] * scale[i % K] + bias[i % K];
        if (WITH_Z) g[u][i] = activation_grad<ACT>(beside ? z + r[u][i] : z, g[u][i]);
      }
    }
  }
};

struct GradientSums {
  const Gradient& gradient;
  Sums<K> sums;

  template <int U> __device__ __forceinline__ void run(int site) {
    A g[U][V], d[U][V];
    gradient.load<U>(site, true, g, d);
#pragma unroll
    for (int i = 0; i < U * V; i++) {
      sums.g[i % K] += g[i / V][i % V];
      sums.gx[i % K] += g[i / V][i % V] * d[i / V][i % V];
      sums.x[i % K] += d[i / V][i % V];
    }
  }
};

// grad_x = scale·g + slope·(x - mean) + offset; slope and offset are 0 with running statistics.
struct InputGradient {
  const Gradient& gradient;
  T *grad_x, *grad_residual;
  bool with_x;
  A slope[K], offset[K];

  template <int U> __device__ __forceinline__ void run(int site) {
    const BatchNormParams& p = gradient.p;
    A g[U][V], d[U][V];
    gradient.load<U>(site, with_x, g, d);
#pragma unroll
    for (int u = 0; u < U; u++) {
      if (grad_residual) store_as(at(grad_residual, p.grad_residual, gradient.slot, site + u * ROWS, p), g[u]);
      if (!grad_x) continue;
#pragma unroll
      for (int i = 0; i < V; i++) {
        g[u][i] *= gradient.scale[i % K];
        if (with_x) g[u][i] += d[u][i] * slope[i % K] + offset[i % K];
      }
      store_as(at(grad_x, p.grad_x, gradient.slot, site + u * ROWS, p), g[u]);
    }
  }
};

#ifdef TRAIN  // ---- training, forward ---------------------------------------------------------------------
// The channels' first elements, to which the statistics are relative.
DEVICE void load_first(A (&v)[K], const T* x, const Owner& own, const BatchNormParams& p) {
#pragma unroll
  for (int k = 0; k < K; k++) v[k] = own.active ? convert<A>(x[own.slot * (Index)p.x.slot + k]) : A(0);
}

struct Normaliser { A mean, rstd; };  // of the values as they are

// From a channel's moments relative to `first`; also moves the running statistics.
DEVICE Normaliser finish_channel(int c, A first, A mean, A m2, P* running_mean, P* running_var,
                                 const BatchNormParams& p) {
  const A var = m2 / A(p.count), keep = A(1.0 - p.momentum), take = A(p.momentum);
  const Normaliser result{first + mean, A(1) / sqrt(var + A(p.eps))};
  if (running_mean) running_mean[c] = convert<P>(keep * convert<A>(running_mean[c]) + take * result.mean);
  if (running_var) running_var[c] = convert<P>(keep * convert<A>(running_var[c]) + take * (var * A(p.unbiased)));
  return result;
}

// partials[c][split] = (count, mean, M2), mean relative to the channel's first element.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
batch_norm_train_stats(const T* __restrict__ x, A* __restrict__ partials, BatchNormParams p) {
  __shared__ Moments<K> scratch[WARPS][LANES];
  const Owner own = owner(p);
  Statistics pass{p, x, own.slot};
  load_first(pass.first, x, own, p);
  pass.moments.clear();
  const int first = blockIdx.y * p.split_sites, last = own.active ? min(first + p.split_sites, p.sites) : first;
  for_sites<UNROLL>(own.row, first, last, pass);
  merge_rows(pass.moments, scratch);
  if (threadIdx.x >= LANES || !own.active) return;
#pragma unroll
  for (int k = 0; k < K; k++) {
    A* partial = partials + ((Index)(own.channel + k) * p.splits + blockIdx.y) * 3;
    partial[0] = pass.moments.count;
    partial[1] = pass.moments.mean[k];
    partial[2] = pass.moments.m2[k];
  }
}

// A channel's moments over all splits, in the first lane of its warp. All 32 lanes must take part.
DEVICE Moments<1> merge_splits(const A* partials, int c, const BatchNormParams& p) {
  Moments<1> moments, next;
  moments.clear();
  if (c < p.channels) {
    for (int split = threadIdx.x % 32; split < p.splits; split += 32) {
      const A* partial = partials + ((Index)c * p.splits + split) * 3;
      next.count = partial[0];
      next.mean[0] = partial[1];
      next.m2[0] = partial[2];
      moments.merge(next);
    }
  }
  merge_warp(moments, 1);
  return moments;
}

// The channel's first element.
DEVICE A first_of(const T* x, int c, const BatchNormParams& p) {
  return convert<A>(x[c / K * (Index)p.x.slot + c % K]);
}

// One warp a channel.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
batch_norm_stats_merge(const T* __restrict__ x, const A* __restrict__ partials, A* __restrict__ mean,
                       A* __restrict__ var, BatchNormParams p) {
  const int c = blockIdx.x * WARPS + threadIdx.x / 32;
  const Moments<1> moments = merge_splits(partials, c, p);
  if (c >= p.channels || threadIdx.x % 32 != 0) return;
  mean[c] = first_of(x, c, p) + moments.mean[0];
  var[c] = moments.m2[0] / A(p.count);
}

// One warp a channel. centre[c] is the mean relative to the channel's first element.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
batch_norm_train_merge(const T* __restrict__ x, const A* __restrict__ partials, A* __restrict__ mean,
                       A* __restrict__ rstd, A* __restrict__ centre, P* __restrict__ running_mean,
                       P* __restrict__ running_var, BatchNormParams p) {
  const int c = blockIdx.x * WARPS + threadIdx.x / 32;
  const Moments<1> moments = merge_splits(partials, c, p);
  if (c >= p.channels || threadIdx.x % 32 != 0) return;
  const A first = first_of(x, c, p);
  const Normaliser result = finish_channel(c, first, moments.mean[0], moments.m2[0], running_mean, running_var, p);
  mean[c] = result.mean;
  rstd[c] = result.rstd;
  centre[c] = moments.mean[0];
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
batch_norm_train_apply(const T* __restrict__ x, const P* __restrict__ weight, const P* __restrict__ bias,
                       const T* __restrict__ residual, const A* __restrict__ rstd, const A* __restrict__ centre,
                       T* __restrict__ y, BatchNormParams p) {
  const Owner own = owner(p);
  Normalise pass{p, x, residual, y, own.slot};
  A inverse[K];
  load_first(pass.shift, x, own, p);
  load_vector(pass.centre, centre, own, A(0));
  load_vector(inverse, rstd, own, A(0));
  load_vector(pass.scale, weight, own, A(1));
  load_vector(pass.bias, bias, own, A(0));
#pragma unroll
  for (int k = 0; k < K; k++) pass.scale[k] *= inverse[k];
  const int first = (gridDim.y - 1 - blockIdx.y) * p.split_sites;
  for_sites<UNROLL_Z>(own.row, first, own.active ? min(first + p.split_sites, p.sites) : first, pass);
}

// All of the above for channels that one block can hold: the second reading comes from the cache.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
batch_norm_train(const T* __restrict__ x, const P* __restrict__ weight, const P* __restrict__ bias,
                 const T* __restrict__ residual, T* __restrict__ y, A* __restrict__ mean, A* __restrict__ rstd,
                 P* __restrict__ running_mean, P* __restrict__ running_var, BatchNormParams p) {
  __shared__ Moments<K> scratch[WARPS][LANES];
  __shared__ A centres[LANES][K], inverses[LANES][K];
  const Owner own = owner(p);
  const int last = own.active ? p.sites : 0, lane = threadIdx.x % LANES;
  Statistics gather{p, x, own.slot};
  load_first(gather.first, x, own, p);
  gather.moments.clear();
  for_sites<UNROLL>(own.row, 0, last, gather);
  merge_rows(gather.moments, scratch);
  if (threadIdx.x < LANES) {
#pragma unroll
    for (int k = 0; k < K; k++) {
      Normaliser result{A(0), A(0)};
      if (own.active) {
        const int c = own.channel + k;
        const A m2 = gather.moments.m2[k];
        result = finish_channel(c, gather.first[k], gather.moments.mean[k], m2, running_mean, running_var, p);
        mean[c] = result.mean;
        rstd[c] = result.rstd;
      }
      centres[lane][k] = gather.moments.mean[k];
      inverses[lane][k] = result.rstd;
    }
  }
  __syncthreads();
  Normalise pass{p, x, residual, y, own.slot};
  load_vector(pass.scale, weight, own, A(1));
  load_vector(pass.bias, bias, own, A(0));
#pragma unroll
  for (int k = 0; k < K; k++) {
    pass.shift[k] = gather.first[k];
    pass.centre[k] = centres[lane][k];
    pass.scale[k] *= inverses[lane][k];
  }
  for_sites<UNROLL_Z>(own.row, 0, last, pass);
}

#endif

#ifdef INFER  // ---- inference -----------------------------------------------------------------------------
extern "C" __global__ void __launch_bounds__(THREADS, 2)
batch_norm_infer(const T* __restrict__ x, const P* __restrict__ weight, const P* __restrict__ bias,
                 const T* __restrict__ residual, const P* __restrict__ running_mean,
                 const P* __restrict__ running_var, T* __restrict__ y, BatchNormParams p) {
  const Owner own = owner(p);
  Normalise pass{p, x, residual, y, own.slot};
  A var[K];
  load_vector(pass.shift, running_mean, own, A(0));
  load_vector(var, running_var, own, A(1));
  load_vector(pass.scale, weight, own, A(1));
  load_vector(pass.bias, bias, own, A(0));
#pragma unroll
  for (int k = 0; k < K; k++) {
    pass.centre[k] = A(0);
    pass.scale[k] *= A(1) / sqrt(var[k] + A(p.eps));
  }
  const int first = blockIdx.y * p.split_sites;
  for_sites<UNROLL_Z>(own.row, first, own.active ? min(first + p.split_sites, p.sites) : first, pass);
}

#endif

#ifdef BACKWARD  // ---- backward ---------------------------------------------------------------------------
struct Coefficients { A slope, offset; };

// Writes the channel's parameter gradients; returns what `InputGradient` needs. The mean of x - mean is the
// rounding error of `mean`: x̂ = (x - mean - error)·rstd.
DEVICE Coefficients finish_gradient(int c, A sum_g, A sum_gx, A sum_x, A scale, A rstd, P* grad_weight, P* grad_bias,
                                    const BatchNormParams& p) {
  const A error = p.training ? sum_x / A(p.count) : A(0);
  const A sum_gxhat = (sum_gx - error * sum_g) * rstd;
  if (grad_weight) grad_weight[c] = convert<P>(sum_gxhat);
  if (grad_bias) grad_bias[c] = convert<P>(sum_g);
  if (!p.training) return {A(0), A(0)};
  const A slope = -scale * rstd * (sum_gxhat / A(p.count));
  return {slope, -scale * (sum_g / A(p.count)) - slope * error};
}

DEVICE void load_gradient(Gradient& gradient, A (&inverse)[K], const P* weight, const P* bias, const A* mean,
                          const A* rstd, const Owner& own) {
  load_vector(gradient.mean, mean, own, A(0));
  load_vector(inverse, rstd, own, A(0));
  load_vector(gradient.scale, weight, own, A(1));
  load_vector(gradient.bias, bias, own, A(0));
#pragma unroll
  for (int k = 0; k < K; k++) gradient.scale[k] *= inverse[k];
}

// partials[c][split] = (Σg, Σ g·(x - mean), Σ(x - mean))
extern "C" __global__ void __launch_bounds__(THREADS, 2)
batch_norm_bwd_sums(const T* __restrict__ grad_y, const T* __restrict__ x, const P* __restrict__ weight,
                    const P* __restrict__ bias, const T* __restrict__ beside, const A* __restrict__ mean,
                    const A* __restrict__ rstd, A* __restrict__ partials, BatchNormParams p) {
  __shared__ Sums<K> scratch[WARPS][LANES];
  const Owner own = owner(p);
  Gradient gradient{p, grad_y, x, beside, own.slot};
  A inverse[K];
  load_gradient(gradient, inverse, weight, bias, mean, rstd, own);
  GradientSums pass{gradient};
  pass.sums.clear();
  const int first = blockIdx.y * p.split_sites, last = own.active ? min(first + p.split_sites, p.sites) : first;
  for_sites<UNROLL_Z>(own.row, first, last, pass);
  merge_rows(pass.sums, scratch);
  if (threadIdx.x >= LANES || !own.active) return;
#pragma unroll
  for (int k = 0; k < K; k++) {
    A* partial = partials + ((Index)(own.channel + k) * p.splits + blockIdx.y) * 3;
    partial[0] = pass.sums.g[k];
    partial[1] = pass.sums.gx[k];
    partial[2] = pass.sums.x[k];
  }
}

// One warp a channel. coefficients[c] = (slope, offset)
extern "C" __global__ void __launch_bounds__(THREADS, 2)
batch_norm_bwd_merge(const A* __restrict__ partials, const P* __restrict__ weight, const A* __restrict__ rstd,
                     P* __restrict__ grad_weight, P* __restrict__ grad_bias, A* __restrict__ coefficients,
                     BatchNormParams p) {
  const int c = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
  Sums<1> sums, next;
  sums.clear();
  if (c < p.channels) {
    for (int split = lane; split < p.splits; split += 32) {
      const A* partial = partials + ((Index)c * p.splits + split) * 3;
      next.g[0] = partial[0];
      next.gx[0] = partial[1];
      next.x[0] = partial[2];
      sums.merge(next);
    }
  }
  merge_warp(sums, 1);
  if (c >= p.channels || lane != 0) return;
  const A scale = weight ? convert<A>(weight[c]) * rstd[c] : rstd[c];
  const Coefficients result =
      finish_gradient(c, sums.g[0], sums.gx[0], sums.x[0], scale, rstd[c], grad_weight, grad_bias, p);
  coefficients[2 * c] = result.slope;
  coefficients[2 * c + 1] = result.offset;
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
batch_norm_bwd_apply(const T* __restrict__ grad_y, const T* __restrict__ x, const P* __restrict__ weight,
                     const P* __restrict__ bias, const T* __restrict__ beside, const A* __restrict__ mean,
                     const A* __restrict__ rstd, const A* __restrict__ coefficients, T* __restrict__ grad_x,
                     T* __restrict__ grad_residual, BatchNormParams p) {
  const Owner own = owner(p);
  Gradient gradient{p, grad_y, x, beside, own.slot};
  A inverse[K];
  load_gradient(gradient, inverse, weight, bias, mean, rstd, own);
  InputGradient pass{gradient, grad_x, grad_residual, p.training && grad_x};
#pragma unroll
  for (int k = 0; k < K; k++) {
    const bool given = pass.with_x && own.active;
    pass.slope[k] = given ? coefficients[2 * (own.channel + k)] : A(0);
    pass.offset[k] = given ? coefficients[2 * (own.channel + k) + 1] : A(0);
  }
  const int first = (gridDim.y - 1 - blockIdx.y) * p.split_sites;
  for_sites<UNROLL_Z>(own.row, first, own.active ? min(first + p.split_sites, p.sites) : first, pass);
}

// All of the above for channels that one block can hold.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
batch_norm_bwd(const T* __restrict__ grad_y, const T* __restrict__ x, const P* __restrict__ weight,
               const P* __restrict__ bias, const T* __restrict__ beside, const A* __restrict__ mean,
               const A* __restrict__ rstd, T* __restrict__ grad_x, P* __restrict__ grad_weight,
               P* __restrict__ grad_bias, T* __restrict__ grad_residual, BatchNormParams p) {
  __shared__ Sums<K> scratch[WARPS][LANES];
  __shared__ A slopes[LANES][K], offsets[LANES][K];
  const Owner own = owner(p);
  const int last = own.active ? p.sites : 0, lane = threadIdx.x % LANES;
  Gradient gradient{p, grad_y, x, beside, own.slot};
  A inverse[K];
  load_gradient(gradient, inverse, weight, bias, mean, rstd, own);
  GradientSums gather{gradient};
  gather.sums.clear();
  for_sites<UNROLL_Z>(own.row, 0, last, gather);
  merge_rows(gather.sums, scratch);
  if (threadIdx.x < LANES) {
#pragma unroll
    for (int k = 0; k < K; k++) {
      Coefficients result{A(0), A(0)};
      if (own.active) {
        result = finish_gradient(own.channel + k, gather.sums.g[k], gather.sums.gx[k], gather.sums.x[k],
                                 gradient.scale[k], inverse[k], grad_weight, grad_bias, p);
      }
      slopes[lane][k] = result.slope;
      offsets[lane][k] = result.offset;
    }
  }
  __syncthreads();
  if (!grad_x && !grad_residual) return;
  InputGradient pass{gradient, grad_x, grad_residual, p.training && grad_x};
#pragma unroll
  for (int k = 0; k < K; k++) {
    pass.slope[k] = slopes[lane][k];
    pass.offset[k] = offsets[lane][k];
  }
  for_sites<UNROLL_Z>(own.row, 0, last, pass);
}
#endif
