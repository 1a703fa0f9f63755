// Group normalisation of N x C x L (with an activation in the same pass; instance norm has one channel a group),
// and layer normalisation of rows of D values.
//
// Maths, per slab of M values: the C/G·L of an image's group of channels, or the D of a row,
//
//     mean = Σx / M      var = Σ(x - mean)² / M      rstd = 1 / sqrt(var + eps)      x̂ = (x - mean)·rstd
//     forward   z = γ·x̂ + β      y = act(z)
//     backward  g = grad_y · act'(z)      grad_weight = Σ g·x̂      grad_bias = Σg
//               grad_x = rstd·(γ·g - Σ(γ·g) / M - x̂·Σ(γ·g·x̂) / M)
//
// where the sums without γ are over all values that share the parameter. z is computed again in the backward
// pass instead of being stored: x is read there anyway.
//
// Layout. A tensor is a matrix of lines by sites, whose cells are packs of V elements, V·sizeof(T) <= 16 bytes:
//
//                           a line                    a slab          a pack holds             γ, β
//     group, NCHW           a channel of an image     C/G lines       V places of one line     per line
//     group, channels-last  a channel of an image     C/G lines       V lines at one place     per line
//     layer                 a row                     one line        V values of one line     per value
//
// so that one text serves all three. Lines are numbered through all images, and lie where (image, line within
// it, site) strides say. A layer's lines may come from a tensor whose neighbouring *rows* are what is contiguous
// (CROSSED: an NCHW tensor that is normalised over C, as in ConvNeXt, while the result has contiguous rows):
// such a tile is turned over in shared memory as it is read, instead of by a transposing copy before. Rows of which
// a block holds too few to read whole sectors the launcher does copy.
//
// Grid. A block holds a tile in registers: up to LANES = THREADS / TEAM line packs by TEAM·PACKS sites. TEAM
// threads share a line, and each has every TEAM-th site of the tile, PACKS of them, all in flight at once. In
// memory's order come threads of a line's neighbouring sites, or in channels-last those of neighbouring lines.
// x: blocks of lines (fastest, so that parameters per value are read from memory once), by splits of the sites.
//
// Passes.
//     slab in one block    group_norm_fwd: everything, from one reading of x
//                          group_norm_bwd: the same, from one reading of x and grad_y → params
//     slab in several      stats: (count, mean, M2) a line and split → merge: one warp a slab → apply
//                          bwd_sums: three sums a line and split → bwd_merge: one warp a slab → bwd_apply → params
//     params               sums over images (and splits), or over blocks of rows: 32 parameters a block
// Parameter gradients: of a group those three sums are per line, so per parameter and image. Of a layer each value
// has its own parameter: the blocks of the last pass walk over many rows with the same sites, and keep their sums
// in registers. Nothing is added atomically: threads, lanes, warps, splits and blocks are merged in a fixed order,
// and the same input gives the same bits. The apply passes run backwards, since what the pass before read last is
// what the L2 cache still holds.
//
// Bytes, for a tensor of X bytes: in one block forward moves 2X and backward 3X, the floor. In several, forward
// reads x twice, 3X, and backward x and grad_y twice, 5X, unless they fit in L2 (50 MB on an H100). Beside that a
// group's partial sums are 3 values a line and tile: below 5 % of X in float, up to 10 % in the half types' smallest
// tiles, more where planes are a few values; a layer's are 2·D a walking block.
//
// Why this way: the variance, as in batch_norm.cu. Every value is first taken relative to its slab's first, which
// is within sqrt(M)·std of the mean; then come two passes over registers (Σ, then Σ of squared deviations), and
// tiles are merged by Chan's formula (moments.cuh). The forward pass keeps the mean as first value + remainder.
// Backward has only the rounded `mean`: it finds the rounding error as Σ(x - mean)/M on its way and takes it out.
//
// Constants: ELEMENT, ACCUMULATOR, PARAMETER (weight and bias), INDEX (int, or long long where a tensor spans 2^31
// elements), VECTOR = V, PACKS, TEAM, THREADS, LAYER, CHANNELS_INNER (1: channels-last packs), CROSSED (1: x, 2:
// grad_y), ACTIVATION, PARAMS_BYTES; and FORWARD or BACKWARD. Everything else is known at run time.
#include "epilogue.cuh"
#include "moments.cuh"

using T = ELEMENT;
using A = ACCUMULATOR;
using P = PARAMETER;
using Index = INDEX;
constexpr int V = VECTOR;
constexpr int K = CHANNELS_INNER ? V : 1;  // lines of a pack
constexpr int W = LAYER ? V : K;           // parameters of a pack
constexpr int LANES = THREADS / TEAM;
constexpr int WARPS = THREADS / 32;
constexpr int TILE = TEAM * PACKS;
constexpr int ROW_STEP = CHANNELS_INNER ? LANES : 1;  // from thread to thread of a team
constexpr bool X_CROSSED = CROSSED & 1, GRAD_CROSSED = CROSSED & 2;
constexpr Activation ACT = Activation::ACTIVATION;
static_assert(THREADS % 32 == 0 && (THREADS & (THREADS - 1)) == 0 && THREADS % TEAM == 0, "whole warps and teams");
static_assert((V & (V - 1)) == 0 && V * sizeof(T) <= 16, "a pack is one access");
static_assert(!CHANNELS_INNER || (!LAYER && LANES <= 32), "lanes side by side are of one warp");
static_assert(!CROSSED || LAYER, "only rows are turned over");

struct Strides { long long image, line, site; };  // site: of a pack, but of a value where the tensor is crossed

struct GroupNormParams {
  Strides x, y, grad_x;  // grad_y has y's place
  FastDiv image_lines, slab_lines, line_blocks, splits;
  FastDiv walkers;  // blocks that share the line blocks of the last backward pass
  int lines, block_lines, sites;
  double count, eps;  // count: M
};
static_assert(sizeof(GroupNormParams) == PARAMS_BYTES, "the Python structure must mirror this one");

// ---- who owns what --------------------------------------------------------------------------------------
struct Owner {
  int lane, row;
  int block_line;             // first line of the block
  int line, image, channel;   // first line of the thread, and which one of which image it is
  int tile, site;             // first site of the block, and of the thread
  int packs;                  // how many packs the thread has; 0 behind the last line
};
DEVICE Owner owner(int line_block, int split, const GroupNormParams& p) {
  Owner own;
  own.lane = CHANNELS_INNER ? threadIdx.x % LANES : threadIdx.x / TEAM;
  own.row = CHANNELS_INNER ? threadIdx.x / LANES : threadIdx.x % TEAM;
  own.block_line = line_block * p.block_lines;
  own.line = own.block_line + own.lane * K;
  own.tile = split * TILE;
  own.site = own.tile + own.row;
  const bool active = own.lane * K < p.block_lines && own.line < p.lines && own.site < p.sites;
  own.packs = active ? min(PACKS, ceil_div(p.sites - own.site, TEAM)) : 0;
  own.image = p.image_lines.divmod(own.line, own.channel);
  return own;
}
// Whether the thread is the first of a team that has a line.
DEVICE bool leads(const Owner& own) { return own.row == 0 && own.packs > 0; }

// Values of a line in the block's tile.
DEVICE int tile_values(const Owner& own, const GroupNormParams& p) { return min(TILE, p.sites - own.tile) * (V / K); }

DEVICE Index offset(const Strides& s, int image, int channel, int site) {
  return image * (Index)s.image + channel * (Index)s.line + site * (Index)s.site;
}

// Calls body(j) for the thread's packs, in order.
template <class Body> DEVICE void for_packs(const Owner& own, Body body) {
#pragma unroll
  for (int j = 0; j < PACKS; j++) {
    if (j < own.packs) body(j);
  }
}

DEVICE void load_tile(A (&v)[PACKS][V], const T* tensor, const Strides& s, const Owner& own) {
  const T* from = tensor + offset(s, own.image, own.channel, own.site);
  for_packs(own, [&](int j) {
    load_as(v[j], from);
    from += (Index)(TEAM * s.site);
  });
}

// Where a crossed tile is turned over, a turn at a time: a pack wider than needed, so that lines begin in different
// banks.
using Stage = T[CROSSED ? LANES : 1][CROSSED ? (TEAM + 1) * V : V];

// The same of a tensor that may be crossed: read along the lines, V values a thread and turn, PACKS turns.
template <bool CROSS> DEVICE void load_tile(A (&v)[PACKS][V], const T* tensor, const Strides& s, const Owner& own,
                                            Stage& stage, const GroupNormParams& p) {
  if constexpr (!CROSS) {
    load_tile(v, tensor, s, own);
  } else {
    const int lane = threadIdx.x % LANES, first = threadIdx.x / LANES;
    int channel;
    const int image = p.image_lines.divmod(own.block_line + lane, channel);
    // Values that are left for the thread from its first one on.
    const int left = lane < p.block_lines && own.block_line + lane < p.lines ? (p.sites - own.tile) * V - first : 0;
    const T* from = tensor + offset(s, image, channel, own.tile * V + first);
#pragma unroll
    for (int j = 0; j < PACKS; j++) {
      __syncthreads();
#pragma unroll
      for (int i = 0; i < V; i++) {
        if (left > (j * V + i) * TEAM) stage[lane][first + i * TEAM] = *from;
        from += (Index)(TEAM * s.site);
      }
      __syncthreads();
      if (j < own.packs) load_as(v[j], &stage[own.lane][own.row * V]);
    }
  }
}

// The parameters of the thread's lines, or of the values of its pack j: a vector may be missing.
DEVICE void load_parameters(A (&v)[W], const P* vector, const Owner& own, int j, A otherwise) {
  const int first = LAYER ? (own.site + j * TEAM) * V : own.channel;
  if (vector && own.packs > 0) {
    load_as(v, vector + first);
  } else {
#pragma unroll
    for (int i = 0; i < W; i++) v[i] = otherwise;
  }
}

// Of the slabs of the thread's lines.
DEVICE void load_statistic(A (&v)[K], const A* statistic, const Owner& own, const GroupNormParams& p) {
#pragma unroll
  for (int k = 0; k < K; k++) v[k] = own.packs > 0 ? statistic[p.slab_lines.div(own.line + k)] : A(0);
}

constexpr int TEAM_SCRATCH = scratch_size<ROW_STEP, ROW_STEP * TEAM, THREADS>(1);  // for one value
template <int N> DEVICE void sum_team(A (&v)[N], A* scratch) { sum_threads<ROW_STEP, ROW_STEP * TEAM>(v, scratch); }

#ifdef FORWARD  // ---- forward -----------------------------------------------------------------------------
// The first values of the slabs of the thread's lines, to which everything is relative.
DEVICE void load_first(A (&v)[K], const T* x, const Owner& own, const GroupNormParams& p) {
#pragma unroll
  for (int k = 0; k < K; k++) {
    int within;
    p.slab_lines.divmod(own.line + k, within);
    v[k] = own.packs > 0 ? convert<A>(x[offset(p.x, own.image, own.channel + k - within, 0)]) : A(0);
  }
}

// Makes v relative to `first`, and takes mean and M2 of what the team holds of its lines.
DEVICE void statistics(A (&v)[PACKS][V], const A (&first)[K], A (&mean)[K], A (&m2)[K], A* scratch, const Owner& own,
                       const GroupNormParams& p) {
  const A inverse = A(1) / A(tile_values(own, p));
#pragma unroll
  for (int k = 0; k < K; k++) mean[k] = m2[k] = A(0);
  for_packs(own, [&](int j) {
#pragma unroll
    for (int i = 0; i < V; i++) mean[i % K] += v[j][i] -= first[i % K];
  });
  sum_team(mean, scratch);
#pragma unroll
  for (int k = 0; k < K; k++) mean[k] *= inverse;
  for_packs(own, [&](int j) {
#pragma unroll
    for (int i = 0; i < V; i++) {
      const A d = v[j][i] - mean[i % K];
      m2[i % K] += d * d;
    }
  });
  sum_team(m2, scratch);
}

// A warp's merging of `count` (count, mean, M2); the result is the first lane's.
DEVICE Moments<A> merge_parts(const A* parts, int count) {
  Moments<A> moments{A(0), A(0), A(0)};
  for (int i = threadIdx.x % 32; i < count; i += 32) {
    const A* part = parts + (Index)i * 3;
    moments.merge(part[0], part[1], part[2]);
  }
  moments.merge_warp();
  return moments;
}

DEVICE A rstd_of(A m2, const GroupNormParams& p) { return A(1) / sqrt(m2 / A(p.count) + A(p.eps)); }

// y = act((v - centre)·rstd·γ + β), v relative to `first` like the centre.
DEVICE void normalise(A (&v)[PACKS][V], const A (&centre)[K], const A (&rstd)[K], const P* weight, const P* bias, T* y,
                      const Owner& own, const GroupNormParams& p) {
  T* to = y + offset(p.y, own.image, own.channel, own.site);
  A w[W], b[W];
  if (!LAYER) {
    load_parameters(w, weight, own, 0, A(1));
    load_parameters(b, bias, own, 0, A(0));
  }
  for_packs(own, [&](int j) {
    if (LAYER) {
      load_parameters(w, weight, own, j, A(1));
      load_parameters(b, bias, own, j, A(0));
    }
#pragma unroll
    for (int i = 0; i < V; i++) {
      v[j][i] = activate<ACT>((v[j][i] - centre[i % K]) * (rstd[i % K] * w[i % W]) + b[i % W]);
    }
    store_as(to, v[j]);
    to += (Index)(TEAM * p.y.site);
  });
}

extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS)
group_norm_fwd(const T* __restrict__ x, const P* __restrict__ weight, const P* __restrict__ bias, T* __restrict__ y,
               A* __restrict__ mean, A* __restrict__ rstd, GroupNormParams p) {
  __shared__ A scratch[TEAM_SCRATCH * K];
  __shared__ __align__(16) Stage stage;
  const Owner own = owner(blockIdx.x, 0, p);
  A v[PACKS][V], first[K], centre[K], inverse[K], m2[K];
  load_tile<X_CROSSED>(v, x, p.x, own, stage, p);
  load_first(first, x, own, p);
  statistics(v, first, centre, m2, scratch, own, p);
  if (LAYER || p.slab_lines.divisor == 1) {
#pragma unroll
    for (int k = 0; k < K; k++) {
      inverse[k] = rstd_of(m2[k], p);
      if (!leads(own)) continue;
      mean[own.line + k] = first[k] + centre[k];
      rstd[own.line + k] = inverse[k];
    }
  } else {
    __shared__ A parts[LANES * K * 3], slabs[LANES * K][2];
    if (leads(own)) {
#pragma unroll
      for (int k = 0; k < K; k++) {
        A* part = parts + (own.lane * K + k) * 3;
        part[0] = A(tile_values(own, p));
        part[1] = centre[k];
        part[2] = m2[k];
      }
    }
    __syncthreads();
    const int size = p.slab_lines.divisor, present = p.slab_lines.div(min(p.block_lines, p.lines - own.block_line));
    for (int slab = threadIdx.x / 32; slab < present; slab += WARPS) {
      const Moments<A> moments = merge_parts(parts + slab * size * 3, size);
      if (threadIdx.x % 32 == 0) {
        slabs[slab][0] = moments.mean;
        slabs[slab][1] = rstd_of(moments.m2, p);
      }
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; k++) {
      int within;
      const int slab = p.slab_lines.divmod(own.lane * K + k, within);
      centre[k] = own.packs > 0 ? slabs[slab][0] : A(0);
      inverse[k] = own.packs > 0 ? slabs[slab][1] : A(0);
      if (!leads(own) || within != 0) continue;
      mean[p.slab_lines.div(own.line + k)] = first[k] + centre[k];
      rstd[p.slab_lines.div(own.line + k)] = inverse[k];
    }
  }
  normalise(v, centre, inverse, weight, bias, y, own, p);
}

// partials[line][split] = (count, mean, M2), mean relative to the slab's first value.
extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS)
group_norm_stats(const T* __restrict__ x, A* __restrict__ partials, GroupNormParams p) {
  __shared__ A scratch[TEAM_SCRATCH * K];
  int line_block;
  const int split = p.line_blocks.divmod(blockIdx.x, line_block);
  const Owner own = owner(line_block, split, p);
  A v[PACKS][V], first[K], mean[K], m2[K];
  load_tile(v, x, p.x, own);
  load_first(first, x, own, p);
  statistics(v, first, mean, m2, scratch, own, p);
  if (!leads(own)) return;
#pragma unroll
  for (int k = 0; k < K; k++) {
    A* partial = partials + ((Index)(own.line + k) * (int)p.splits.divisor + split) * 3;
    partial[0] = A(tile_values(own, p));
    partial[1] = mean[k];
    partial[2] = m2[k];
  }
}

// One warp a slab. centre[slab] is the mean relative to the slab's first value.
extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS)
group_norm_merge(const T* __restrict__ x, const A* __restrict__ partials, A* __restrict__ mean, A* __restrict__ rstd,
                 A* __restrict__ centre, GroupNormParams p) {
  const int slab = blockIdx.x * WARPS + threadIdx.x / 32;
  if (slab >= p.slab_lines.div(p.lines)) return;
  const int size = p.slab_lines.divisor, splits = p.splits.divisor, line = slab * size;
  const Moments<A> moments = merge_parts(partials + (Index)line * splits * 3, size * splits);
  if (threadIdx.x % 32 != 0) return;
  int channel;
  const int image = p.image_lines.divmod(line, channel);
  mean[slab] = convert<A>(x[offset(p.x, image, channel, 0)]) + moments.mean;
  rstd[slab] = rstd_of(moments.m2, p);
  centre[slab] = moments.mean;
}

extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS)
group_norm_apply(const T* __restrict__ x, const P* __restrict__ weight, const P* __restrict__ bias,
                 const A* __restrict__ rstd, const A* __restrict__ centre, T* __restrict__ y, GroupNormParams p) {
  int line_block;
  const int split = p.line_blocks.divmod(gridDim.x - 1 - blockIdx.x, line_block);
  const Owner own = owner(line_block, split, p);
  A v[PACKS][V], first[K], centres[K], inverse[K];
  load_tile(v, x, p.x, own);
  load_first(first, x, own, p);
  load_statistic(centres, centre, own, p);
  load_statistic(inverse, rstd, own, p);
  for_packs(own, [&](int j) {
#pragma unroll
    for (int i = 0; i < V; i++) v[j][i] -= first[i % K];
  });
  normalise(v, centres, inverse, weight, bias, y, own, p);
}
#endif

#ifdef BACKWARD  // ---- backward ---------------------------------------------------------------------------
// grad_x = rstd·γ·g + slope·d + offset, and x̂ = (d - error)·rstd, of a slab; d = x - mean, and the mean of d is the
// rounding error of `mean`.
struct Coefficients { A slope, offset, error; };

// From Σγg, Σγgd and Σd of a slab.
DEVICE Coefficients coefficients_of(const A (&sums)[3], A rstd, const GroupNormParams& p) {
  const A inverse = A(1) / A(p.count), error = sums[2] * inverse;
  const A slope = -rstd * rstd * rstd * ((sums[1] - error * sums[0]) * inverse);
  return {slope, -rstd * (sums[0] * inverse) - slope * error, error};
}

// A warp's sums of `count` triples of lines that have `splits` each; those of a line are to be multiplied by its γ
// if there is a weight. Every lane gets them.
DEVICE void sum_parts(A (&sums)[3], const A* parts, int count, const FastDiv& splits, const P* weight) {
  sums[0] = sums[1] = sums[2] = A(0);
  for (int i = threadIdx.x % 32; i < count; i += 32) {
    const A w = weight ? convert<A>(weight[splits.div(i)]) : A(1);
    const A* part = parts + (Index)i * 3;
    sums[0] += w * part[0];
    sums[1] += w * part[1];
    sums[2] += part[2];
  }
  sum_threads<1, 32>(sums, (A*)nullptr);
}

// What a block holds of grad_y and x, and what it needs to know of the lines.
struct Gradient {
  A g[PACKS][V], d[PACKS][V];  // grad_y · act'(z), x - mean
  A rstd[K], w[W], b[W];       // of the lines, or of the values of one pack

  // The parameters, in a layer those of pack j.
  __device__ __forceinline__ void parameters(const P* weight, const P* bias, const Owner& own, int j) {
    load_parameters(w, weight, own, j, A(1));
    load_parameters(b, bias, own, j, A(0));
  }

  // Follows the loading of g with grad_y and of d with x.
  __device__ __forceinline__ void prepare(const P* weight, const P* bias, const A* mean, const A* inverse,
                                          const Owner& own, const GroupNormParams& p) {
    A centre[K];
    load_statistic(centre, mean, own, p);
    load_statistic(rstd, inverse, own, p);
    if (!LAYER) parameters(weight, bias, own, 0);
    for_packs(own, [&](int j) {
#pragma unroll
      for (int i = 0; i < V; i++) {
        d[j][i] -= centre[i % K];
        if (!LAYER) g[j][i] = activation_grad<ACT>(d[j][i] * (rstd[i % K] * w[i % W]) + b[i % W], g[j][i]);
      }
    });
  }

  // Σg, Σgd and Σd of each of the team's lines; in a layer, where γ is no constant of the line, Σγg and Σγgd.
  __device__ __forceinline__ void sums(A (&s)[3 * K], const P* weight, A* scratch, const Owner& own) {
#pragma unroll
    for (int i = 0; i < 3 * K; i++) s[i] = A(0);
    for_packs(own, [&](int j) {
      if (LAYER) parameters(weight, nullptr, own, j);
#pragma unroll
      for (int i = 0; i < V; i++) {
        const A gw = LAYER ? g[j][i] * w[i % W] : g[j][i];
        s[i % K * 3] += gw;
        s[i % K * 3 + 1] += gw * d[j][i];
        s[i % K * 3 + 2] += d[j][i];
      }
    });
    sum_team(s, scratch);
  }

  __device__ __forceinline__ void store(T* grad_x, const Coefficients (&c)[K], const P* weight, const Owner& own,
                                        const GroupNormParams& p) {
    T* to = grad_x + offset(p.grad_x, own.image, own.channel, own.site);
    for_packs(own, [&](int j) {
      if (LAYER) parameters(weight, nullptr, own, j);
      A result[V];
#pragma unroll
      for (int i = 0; i < V; i++) {
        const Coefficients& slab = c[i % K];
        result[i] = rstd[i % K] * w[i % W] * g[j][i] + (slab.slope * d[j][i] + slab.offset);
      }
      store_as(to, result);
      to += (Index)(TEAM * p.grad_x.site);
    });
  }
};

// A layer's Σg and Σ g·x̂ of each value of the tile, over the rows that a block walks.
constexpr int SUM_PACKS = LAYER ? PACKS : 1;
struct Columns {
  A g[SUM_PACKS][V], gx[SUM_PACKS][V];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < SUM_PACKS * V; i++) g[i / V][i % V] = gx[i / V][i % V] = A(0);
  }
  __device__ __forceinline__ void add(const Gradient& gradient, A error, const Owner& own) {
    for_packs(own, [&](int j) {
#pragma unroll
      for (int i = 0; i < V; i++) {
        g[j][i] += gradient.g[j][i];
        gx[j][i] += gradient.g[j][i] * ((gradient.d[j][i] - error) * gradient.rstd[0]);
      }
    });
  }
  // partials[block][g or gx][value]; `split` is the block's part of the sites. All threads must take part.
  __device__ __forceinline__ void store(A* partials, int walker, int split, A* scratch, const GroupNormParams& p) {
    const int lane = threadIdx.x / TEAM, site = split * TILE + threadIdx.x % TEAM;
    A* to = partials + (Index)walker * 2 * p.sites * V;
#pragma unroll
    for (int j = 0; j < SUM_PACKS; j++) {
      sum_threads<TEAM, THREADS>(g[j], scratch);
      sum_threads<TEAM, THREADS>(gx[j], scratch);
      if (lane != 0 || site + j * TEAM >= p.sites) continue;
      store_as(to + (site + j * TEAM) * V, g[j]);
      store_as(to + (p.sites + site + j * TEAM) * V, gx[j]);
    }
  }
};

constexpr int LINE_SCRATCH = TEAM_SCRATCH * 3 * K, COLUMN_SCRATCH = scratch_size<TEAM, THREADS, THREADS>(V);
constexpr int SCRATCH = LAYER && COLUMN_SCRATCH > LINE_SCRATCH ? COLUMN_SCRATCH : LINE_SCRATCH;

// A group writes partials[line] = (Σg, Σgd, Σd) and coefficients[slab], a layer partials as `Columns` does. Any of
// the results may be missing.
extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS)
group_norm_bwd(const T* __restrict__ grad_y, const T* __restrict__ x, const P* __restrict__ weight,
               const P* __restrict__ bias, const A* __restrict__ mean, const A* __restrict__ rstd,
               T* __restrict__ grad_x, A* __restrict__ partials, A* __restrict__ coefficients, GroupNormParams p) {
  __shared__ A scratch[SCRATCH];
  __shared__ __align__(16) Stage stage;
  Columns columns;
  columns.clear();
#pragma unroll 1
  for (int line_block = blockIdx.x; line_block < (int)p.line_blocks.divisor; line_block += gridDim.x) {
    const Owner own = owner(line_block, 0, p);
    Gradient gradient;
    A s[3 * K];
    Coefficients c[K];
    load_tile<GRAD_CROSSED>(gradient.g, grad_y, p.y, own, stage, p);
    load_tile<X_CROSSED>(gradient.d, x, p.x, own, stage, p);
    gradient.prepare(weight, bias, mean, rstd, own, p);
    gradient.sums(s, weight, scratch, own);
    if (!LAYER && partials && leads(own)) {
#pragma unroll
      for (int i = 0; i < 3 * K; i++) partials[(Index)own.line * 3 + i] = s[i];
    }
    if (LAYER || p.slab_lines.divisor == 1) {
#pragma unroll
      for (int k = 0; k < K; k++) {
        const A w = LAYER ? A(1) : gradient.w[k], slab[3] = {w * s[3 * k], w * s[3 * k + 1], s[3 * k + 2]};
        c[k] = coefficients_of(slab, gradient.rstd[k], p);
      }
    } else {
      __shared__ A parts[LANES * K * 3];
      __shared__ Coefficients slabs[LANES * K];
      if (leads(own)) {
#pragma unroll
        for (int k = 0; k < K; k++) {
          A* part = parts + (own.lane * K + k) * 3;
          part[0] = gradient.w[k] * s[3 * k];
          part[1] = gradient.w[k] * s[3 * k + 1];
          part[2] = s[3 * k + 2];
        }
      }
      __syncthreads();
      const int size = p.slab_lines.divisor, present = p.slab_lines.div(min(p.block_lines, p.lines - own.block_line));
      for (int slab = threadIdx.x / 32; slab < present; slab += WARPS) {
        A sums[3];
        sum_parts(sums, parts + slab * size * 3, size, p.splits, nullptr);
        if (threadIdx.x % 32 == 0) {
          slabs[slab] = coefficients_of(sums, rstd[p.slab_lines.div(own.block_line) + slab], p);
        }
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < K; k++) {
        if (own.packs > 0) c[k] = slabs[p.slab_lines.div(own.lane * K + k)];
      }
    }
    if (!LAYER && coefficients && leads(own)) {
#pragma unroll
      for (int k = 0; k < K; k++) {
        int within;
        const int slab = p.slab_lines.divmod(own.line + k, within);
        if (within != 0) continue;
        coefficients[3 * slab] = c[k].slope;
        coefficients[3 * slab + 1] = c[k].offset;
        coefficients[3 * slab + 2] = c[k].error;
      }
    }
    if (grad_x) gradient.store(grad_x, c, weight, own, p);
    if (LAYER && partials) columns.add(gradient, c[0].error, own);
  }
  if (LAYER && partials) columns.store(partials, blockIdx.x, 0, scratch, p);
}

// partials[line][split] = (Σg, Σgd, Σd); in a layer (Σγg, Σγgd, Σd)
extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS)
group_norm_bwd_sums(const T* __restrict__ grad_y, const T* __restrict__ x, const P* __restrict__ weight,
                    const P* __restrict__ bias, const A* __restrict__ mean, const A* __restrict__ rstd,
                    A* __restrict__ partials, GroupNormParams p) {
  __shared__ A scratch[SCRATCH];
  int line_block;
  const int split = p.line_blocks.divmod(blockIdx.x, line_block);
  const Owner own = owner(line_block, split, p);
  Gradient gradient;
  A s[3 * K];
  load_tile(gradient.g, grad_y, p.y, own);
  load_tile(gradient.d, x, p.x, own);
  gradient.prepare(weight, bias, mean, rstd, own, p);
  gradient.sums(s, weight, scratch, own);
  if (!leads(own)) return;
#pragma unroll
  for (int k = 0; k < K; k++) {
    A* partial = partials + ((Index)(own.line + k) * (int)p.splits.divisor + split) * 3;
#pragma unroll
    for (int i = 0; i < 3; i++) partial[i] = s[3 * k + i];
  }
}

// One warp a slab. coefficients[slab] = (slope, offset, error)
extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS)
group_norm_bwd_merge(const A* __restrict__ partials, const P* __restrict__ weight, const A* __restrict__ rstd,
                     A* __restrict__ coefficients, GroupNormParams p) {
  const int slab = blockIdx.x * WARPS + threadIdx.x / 32;
  if (slab >= p.slab_lines.div(p.lines)) return;
  const int size = p.slab_lines.divisor, splits = p.splits.divisor;
  int channel;
  p.image_lines.divmod(slab * size, channel);
  A sums[3];
  const A* parts = partials + (Index)slab * size * splits * 3;
  sum_parts(sums, parts, size * splits, p.splits, !LAYER && weight ? weight + channel : nullptr);
  if (threadIdx.x % 32 != 0) return;
  const Coefficients c = coefficients_of(sums, rstd[slab], p);
  coefficients[3 * slab] = c.slope;
  coefficients[3 * slab + 1] = c.offset;
  coefficients[3 * slab + 2] = c.error;
}

// A layer also writes partials, as `Columns` does.
extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS)
group_norm_bwd_apply(const T* __restrict__ grad_y, const T* __restrict__ x, const P* __restrict__ weight,
                     const P* __restrict__ bias, const A* __restrict__ mean, const A* __restrict__ rstd,
                     const A* __restrict__ coefficients, T* __restrict__ grad_x, A* __restrict__ partials,
                     GroupNormParams p) {
  __shared__ A scratch[SCRATCH];
  int walker;
  const int split = p.walkers.divmod(gridDim.x - 1 - blockIdx.x, walker);
  Columns columns;
  columns.clear();
#pragma unroll 1
  for (int line_block = walker; line_block < (int)p.line_blocks.divisor; line_block += (int)p.walkers.divisor) {
    const Owner own = owner(line_block, split, p);
    Gradient gradient;
    load_tile(gradient.g, grad_y, p.y, own);
    load_tile(gradient.d, x, p.x, own);
    gradient.prepare(weight, bias, mean, rstd, own, p);
    Coefficients c[K];
#pragma unroll
    for (int k = 0; k < K; k++) {
      if (own.packs == 0) continue;
      const A* slab = coefficients + 3 * p.slab_lines.div(own.line + k);
      c[k] = {slab[0], slab[1], slab[2]};
    }
    if (grad_x) gradient.store(grad_x, c, weight, own, p);
    if (LAYER && partials) columns.add(gradient, c[0].error, own);
  }
  if (LAYER && partials) columns.store(partials, walker, split, scratch, p);
}

// The gradients of 32 parameters, from the partials of a group's lines or of a layer's blocks.
extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS)
group_norm_bwd_params(const A* __restrict__ partials, const A* __restrict__ rstd, const A* __restrict__ coefficients,
                      P* __restrict__ grad_weight, P* __restrict__ grad_bias, GroupNormParams p) {
  __shared__ A scratch[scratch_size<32, THREADS, THREADS>(2)];
  const int columns = LAYER ? p.sites * V : p.image_lines.divisor, splits = p.splits.divisor;
  const int column = blockIdx.x * 32 + threadIdx.x % 32, parts = LAYER ? p.walkers.divisor : p.lines / columns * splits;
  A s[2] = {A(0), A(0)};
  if (column < columns) {
    for (int part = threadIdx.x / 32; part < parts; part += WARPS) {
      if (LAYER) {
        const A* from = partials + (Index)part * 2 * columns + column;
        s[0] += from[0];
        s[1] += from[columns];
      } else {
        int split;
        const int line = p.splits.divmod(part, split) * columns + column, slab = p.slab_lines.div(line);
        const A* from = partials + ((Index)line * splits + split) * 3;
        s[0] += from[0];
        s[1] += (from[1] - coefficients[3 * slab + 2] * from[0]) * rstd[slab];
      }
    }
  }
  sum_threads<32, THREADS>(s, scratch);
  if (threadIdx.x >= 32 || column >= columns) return;
  if (grad_bias) grad_bias[column] = convert<P>(s[0]);
  if (grad_weight) grad_weight[column] = convert<P>(s[1]);
}
#endif
