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
// Blocks. A block of THREADS threads is LANES slots side by side times ROWS sites: NCHW has LANES = 1, and a warp
// reads 32 packs of one channel in a row; channels-last has LANES packs of neighbouring channels, up to 128 bytes, and
// a warp reads those of several places. A thread owns its slot and every ROWS-th site of the block's range, UNROLL
// packs at a time. WIDTH = LANES·K channels belong to a block, and after its sums a thread to each channel.
//
// Forms, by the launcher's arithmetic, and what they move of tensors of X bytes:
//
//                  launches                                          forward   backward   taken where
//     held         train; bwd                                        2X        3X         a slab fits in a block
//     held, n      train_cluster; bwd_cluster                        2X        3X         … in n blocks (sm_90)
//     split        train_stats → train_apply; bwd_sums → bwd_apply     3X        5X         elsewhere
//     one pass     infer; bwd_apply alone                            2X        2X         no sums are wanted
//     statistics   train_stats → stats_finish                        X                    several processes' batches
//
// 2X and 3X are the floors. A residual, or y in its place, adds one read to each pass that needs z, and its gradient
// one write.
//
// Held. The slab is all sites of a block's channels: of x, in the backward pass of x and grad_y (HOLDS_G). A cluster of
// CLUSTER blocks shares it, each a run of sites. What is held lies in shared memory in its element type, pack behind
// pack as the threads own them: no bank conflicts, and no barrier, as a thread uses only what it has copied. Copies
// (cp.async) run AHEAD batches of packs ahead of the sums, up to 320 bytes a thread, where a thread's registers would
// have 64 in flight: two blocks of 256 threads ask for 160 KB, and some 20 KB a multiprocessor cover the latency.
// Registers could hold no more than half of what shared memory does (128 of 256 KB), and that only if the size of the
// slab were a constant. The launcher takes slabs up to some 110 KB a block where it can, so that of two blocks of a
// multiprocessor one can load or store while the other exchanges sums; else up to 220 KB, with 512 threads.
// Sums are exchanged through distributed shared memory: between two cluster barriers each block reads the others'
// and merges them in the order of ranks, so that all have the same bits; rank 0 writes mean, rstd, running
// statistics and the gradients of parameters. Channels-last holds 64 contiguous bytes of each place, or 32.
//
// Split. Grid x: groups of slots, y: runs of sites. The first pass leaves partial results, those of a channel
// (mean, M2) or three sums: `parts` of them, each of `part_sites` sites. In the second, each block merges those of its
// channels itself, which costs it less than 1/8 of what it reads of x, all from L2, and saves a launch of 3 µs; where
// they are more than that (channels-last with few channels), *_merge makes them few before. The blocks of grid row 0
// write the per-channel results. The second pass walks the sites backwards, since what the first one read last is
// what the L2 cache still holds.
//
// Nothing is added atomically: threads, warps, blocks and parts are merged in a fixed order, and the same input
// gives the same bits.
//
// Predicted for 256@56, N 32, on an H100 (3 µs a launch, 3.0 TB/s; X is 103 MB, of bf16 51 MB), in µs:
//
//                             floor fp32   held   split         floor bf16   held   split
//     forward    NCHW         68           73     101 to 109    34           39     50 to 58
//     backward   NCHW         102          108    164 to 178    51           57     81 to 92
//     channels-last, whose slab of 32 bytes a place (3.2 MB) no portable cluster holds: as split, 2 to 5 more
//
// held: 2X or 3X, a launch, and 1.5 µs in which the first blocks have nothing to exchange and the last nothing to
// load. A range: what the second pass finds of its tensors in L2.
//
// Why this way: the variance. Σx² - (Σx)²/M is lost when |mean| >> std. Here every value is first taken relative
// to the channel's first element (exact when they are near each other). That element lies within sqrt(M)·std of
// the mean, whatever the data, so all further means are small numbers in units of std and round harmlessly.
// Relative values are gathered in chunks of UNROLL packs, two passes in registers for each, and merged within a thread
// by Chan's formula, which has no cancellation. Over a block come first the mean, then M2 about it; over blocks and
// parts Chan's formula again. The forward pass keeps the mean as first element + remainder, so it loses nothing even
// where `mean` itself must round (1e4 with std 1e-2 in float). Backward has only the rounded `mean`; it finds the
// rounding error as Σ(x - mean)/M on its way and takes it out of the sums.
//
// Constants: ELEMENT, ACCUMULATOR, PARAMETER (weight, bias, running statistics), INDEX (int, or long long where
// a tensor spans 2^31 elements), VECTOR = V, UNROLL, CHANNELS_INNER (1: channels-last packs), LANES, THREADS,
// ACTIVATION, FROM_RESULT (1: what lies beside x in the backward pass is y, not the residual), HELD (1: with CLUSTER,
// the number of blocks that hold a slab), PARAMS_BYTES; and TRAIN, INFER or BACKWARD, whichever entries are wanted.
// Everything else is known at run time.
#include "epilogue.cuh"
#include "ptx_cluster.cuh"

using T = ELEMENT;
using A = ACCUMULATOR;
using P = PARAMETER;
using Index = INDEX;
constexpr int V = VECTOR;
constexpr int K = CHANNELS_INNER ? V : 1;  // channels of a slot
constexpr int ROWS = THREADS / LANES;
constexpr int WIDTH = LANES * K;  // channels of a block
constexpr int AREA = THREADS / 32 * WIDTH;  // scratch for the sums of one value a channel
constexpr Activation ACT = Activation::ACTIVATION;
constexpr bool TRANSCENDENTAL = !FROM_RESULT && (ACT == Activation::silu || ACT == Activation::gelu ||
                                                 ACT == Activation::sigmoid || ACT == Activation::tanh);
// Packs that a thread has in flight in the passes that may read several tensors: fewer than UNROLL, and few enough
// values for exp and erf to find registers.
constexpr int VALUES = !TRANSCENDENTAL ? 16 : sizeof(A) == 4 ? 8 : 2;
constexpr int UNROLL_Z = VALUES / V < 1 ? 1 : VALUES / V < UNROLL / 2 ? VALUES / V : UNROLL / 2;
constexpr int AHEAD = 4;  // batches of packs that are being copied while one is used
static_assert(THREADS % 32 == 0 && 32 % LANES == 0, "a warp holds whole rows of lanes");
static_assert((V & (V - 1)) == 0 && V * sizeof(T) <= 16, "a pack is one access");
static_assert(CHANNELS_INNER || LANES == 1, "in NCHW a block works on one channel");
static_assert(THREADS % WIDTH == 0, "a thread for each channel of the block");
static_assert(!FROM_RESULT || TOLD_BY_RESULT<ACT>, "y must tell the derivative");

struct Strides { long long image, site, slot; };

struct BatchNormParams {
  // In the backward pass `residual` may be where y lies, and `y` is where grad_y lies.
  Strides x, residual, y, grad_x, grad_residual;
  FastDiv sites_per_image;
  int sites, split_sites;   // sites in all, and of a block
  int parts, part_sites;    // partial results of a channel, and the sites that each is of
  int merged;               // how many of them a block of the merge passes takes together
  int held;                 // elements of a tensor that a block holds
  int channels, training;
  double count, unbiased;   // M, and M / (M - 1)
  double momentum, eps;
};
static_assert(sizeof(BatchNormParams) == PARAMS_BYTES, "the Python structure must mirror this one");

// ---- who owns what --------------------------------------------------------------------------------------
struct Owner {
  int row, lane;
  int first, last;             // sites of the block; none in the lanes behind the last slot
  int block_channel, channel;  // first channel of the block, and of the thread's slot
  Index slot;
  bool active;
};
DEVICE Owner owner(int slot_block, int split, const BatchNormParams& p) {
  const int lane = threadIdx.x % LANES, slot = slot_block * LANES + lane, first = split * p.split_sites;
  const bool active = slot * K < p.channels;
  const int last = active ? first + min(p.split_sites, p.sites - first) : first;
  return {(int)threadIdx.x / LANES, lane, first, last, slot_block * WIDTH, slot * K, (Index)slot, active};
}

// A pack's place in a tensor.
template <class E> DEVICE E* at(E* tensor, const Strides& s, Index slot, int site, const BatchNormParams& p) {
  int place;
  const int image = p.sites_per_image.divmod(site, place);
  return tensor + (image * (Index)s.image + place * (Index)s.site + slot * (Index)s.slot);
}

// Its place in what the block holds of the tensor: a warp's packs lie side by side.
DEVICE T* held_at(T* held, const Owner& own, int site) { return held + ((site - own.first) * LANES + own.lane) * V; }

// Begins to copy a pack to where it is held; copies of 2 bytes go through a register.
DEVICE void fetch_pack(T* to, const T* from) {
  if constexpr (V * sizeof(T) >= 4) {
    cp_async<V * (int)sizeof(T)>(shared_address(to), from);
  } else {
    *to = *from;
  }
}

// The pack from where it is held, or else from the tensor.
DEVICE void load_held(A (&v)[V], const T* tensor, const Strides& s, T* held, const Owner& own, int site,
                      const BatchNormParams& p) {
  if (HELD) {
    load_as(v, held_at(held, own, site));
  } else {
    load_as(v, at(tensor, s, own.slot, site, p));
  }
}

// body.run<U>(site) does U packs, ROWS sites apart, from `site` on; all sites of the thread are done once.
template <int U, class Body> DEVICE void for_last_sites(int site, int last, Body& body) {
  if constexpr (U > 0) {
    if (site + (U - 1) * ROWS < last) {
      body.template run<U>(site);
      site += U * ROWS;
    }
    for_last_sites<U / 2>(site, last, body);
  }
}
template <int U, class Body> DEVICE void for_sites(const Owner& own, Body& body) {
  int site = own.first + own.row;
#pragma unroll 1
  for (; site + (U - 1) * ROWS < own.last; site += U * ROWS) body.template run<U>(site);
  for_last_sites<U / 2>(site, own.last, body);
}

// The same where the block holds what it reads: body.fetch(site) begins to copy a pack, AHEAD times U packs before
// run needs it. A thread uses the packs alone that it has copied itself: its own wait is all that they ask for.
template <int U, class Body> DEVICE void for_fetched_sites(const Owner& own, Body& body) {
  if constexpr (!HELD) {
    for_sites<U>(own, body);
  } else {
    int site = own.first + own.row, ahead = site;
    const auto fetch = [&] {
#pragma unroll
      for (int u = 0; u < U; u++) {
        if (ahead < own.last) body.fetch(ahead);
        ahead += ROWS;
      }
      cp_async_commit();
    };
#pragma unroll 1
    for (int i = 0; i < AHEAD; i++) fetch();
#pragma unroll 1
    for (; site + (U - 1) * ROWS < own.last; site += U * ROWS) {
      fetch();
      cp_async_wait<AHEAD>();
      body.template run<U>(site);
    }
    cp_async_wait_all();
    for_last_sites<U / 2>(site, own.last, body);
  }
}

// The slot's part of a per-channel vector, which may be missing.
template <class E> DEVICE void load_vector(A (&v)[K], const E* vector, const Owner& own, A otherwise) {
  if (vector && own.active) {
    load_as(v, vector + own.channel);
  } else {
#pragma unroll
    for (int k = 0; k < K; k++) v[k] = otherwise;
  }
}

// ---- sums over a block ----------------------------------------------------------------------------------
// Adds J·N values over the threads L apart. For all threads totals[(j·L + lane)·N + n] is the sum of v[j][n] over
// the threads with threadIdx.x % L == lane; it takes J areas of scratch, of which the totals are the beginning.
template <int L, int J, int N> DEVICE void sum_rows(A (&v)[J][N], A* totals) {
  constexpr int TEAM = L < 32 ? 32 : L, COLUMNS = L * N;
#pragma unroll
  for (int apart = L; apart < 32; apart *= 2) {
#pragma unroll
    for (int i = 0; i < J * N; i++) v[i / N][i % N] += __shfl_xor_sync(0xffffffffu, v[i / N][i % N], apart);
  }
  if (threadIdx.x % TEAM < L) {
#pragma unroll
    for (int j = 0; j < J; j++) store_as(totals + ((threadIdx.x / TEAM * J + j) * L + threadIdx.x % L) * N, v[j]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < J * COLUMNS; i += THREADS) {
    A sum = totals[i];
#pragma unroll
    for (int team = 1; team < THREADS / TEAM; team++) sum += totals[team * J * COLUMNS + i];
    totals[i] = sum;
  }
  __syncthreads();
}

// Count, mean and sum of squared deviations of N channels that have seen equally many values.
template <int N> struct Moments {
  A count, mean[N], m2[N];
  __device__ __forceinline__ void clear() {
    count = A(0);
#pragma unroll
    for (int n = 0; n < N; n++) mean[n] = m2[n] = A(0);
  }
  // Chan, Golub and LeVeque (1979): the moments of two sets taken together.
  __device__ __forceinline__ void merge(const Moments& b) {
    const A total = count + b.count, weight = total > A(0) ? b.count / total : A(0);
#pragma unroll
    for (int n = 0; n < N; n++) {
      const A delta = b.mean[n] - mean[n];
      mean[n] += delta * weight;
      m2[n] += b.m2[n] + delta * delta * (count * weight);
    }
    count = total;
  }
};

// Merges over the threads L apart, which have seen `values` values a channel in all: leaves means in the first area
// of scratch and M2 in the second, one a channel of the block.
template <int L, int N> DEVICE void merge_rows(const Moments<N>& own, A values, A* scratch) {
  const A inverse = values > A(0) ? A(1) / values : A(0);
  A v[1][N], mean[N];
#pragma unroll
  for (int n = 0; n < N; n++) v[0][n] = own.count * inverse * own.mean[n];
  sum_rows<L>(v, scratch);
  load_as(mean, scratch + threadIdx.x % L * N);
#pragma unroll
  for (int n = 0; n < N; n++) {
    const A d = own.mean[n] - mean[n];
    v[0][n] = own.m2[n] + d * d * own.count;
  }
  sum_rows<L>(v, scratch + AREA);
}

// Values of a channel in `sites` sites, which are all that the block or the partial result has; fewer than none: 0.
DEVICE A values_of(int sites) { return A(sites < 0 ? 0 : sites) * A(V / K); }

// ---- partial results ------------------------------------------------------------------------------------
// Value j of J of a channel's partial result: channels side by side as the slots lie, or else alone.
template <int J> DEVICE Index partial(int c, int part, int parts, int j, const BatchNormParams& p) {
  return CHANNELS_INNER ? ((Index)part * J + j) * p.channels + c : ((Index)c * parts + part) * J + j;
}

// Sites of the partial results from `first` on, before `last`.
DEVICE int part_sites(int first, int last, const BatchNormParams& p) {
  return last < p.parts ? (last - first) * p.part_sites : p.sites - first * p.part_sites;
}

// Moments of the block's channels over some of the partial results, left in scratch as by merge_rows.
DEVICE void gather_moments(const A* partials, int first, int last, const Owner& own, A* scratch,
                           const BatchNormParams& p) {
  const int c = own.block_channel + threadIdx.x % WIDTH;
  Moments<1> moments, next;
  moments.clear();
  if (c < p.channels) {
#pragma unroll 1
    for (int part = first + threadIdx.x / WIDTH; part < last; part += THREADS / WIDTH) {
      next.count = values_of(part_sites(part, part + 1, p));
      next.mean[0] = partials[partial<2>(c, part, p.parts, 0, p)];
      next.m2[0] = partials[partial<2>(c, part, p.parts, 1, p)];
      moments.merge(next);
    }
  }
  merge_rows<WIDTH>(moments, values_of(part_sites(first, last, p)), scratch);
}

// The same of the J sums of the backward pass.
DEVICE void gather_sums(const A* partials, int first, int last, const Owner& own, A* scratch,
                        const BatchNormParams& p) {
  const int c = own.block_channel + threadIdx.x % WIDTH;
  A v[3][1] = {{A(0)}, {A(0)}, {A(0)}};
  if (c < p.channels) {
#pragma unroll 1
    for (int part = first + threadIdx.x / WIDTH; part < last; part += THREADS / WIDTH) {
#pragma unroll
      for (int j = 0; j < 3; j++) v[j][0] += partials[partial<3>(c, part, p.parts, j, p)];
    }
  }
  sum_rows<WIDTH>(v, scratch);
}

// Writes what is in scratch, J areas `pitch` apart, as partial result number blockIdx.y of gridDim.y.
template <int J> DEVICE void store_partials(A* partials, const A* scratch, int pitch, const Owner& own,
                                            const BatchNormParams& p) {
  const int c = own.block_channel + threadIdx.x;
  if (threadIdx.x >= WIDTH || c >= p.channels) return;
#pragma unroll
  for (int j = 0; j < J; j++) {
    partials[partial<J>(c, blockIdx.y, gridDim.y, j, p)] = scratch[j * pitch + threadIdx.x];
  }
}

// ---- the four passes over a slot's sites ----------------------------------------------------------------
struct Statistics {
  const BatchNormParams& p;
  const Owner& own;
  const T* x;
  T* held;
  A first[K];
  Moments<K> moments;

  __device__ __forceinline__ void fetch(int site) const {
    fetch_pack(held_at(held, own, site), at(x, p.x, own.slot, site, p));
  }
  template <int U> __device__ __forceinline__ void run(int site) {
    A v[U][V];
#pragma unroll
    for (int u = 0; u < U; u++) load_held(v[u], x, p.x, held, own, site + u * ROWS, p);
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
  const Owner& own;
  const T *x, *residual;
  T *held, *y;
  A shift[K], centre[K], scale[K], bias[K];

  template <int U> __device__ __forceinline__ void run(int site) {
    A v[U][V], r[U][V];
#pragma unroll
    for (int u = 0; u < U; u++) {
      if (residual) load_as(r[u], at(residual, p.residual, own.slot, site + u * ROWS, p));
      load_held(v[u], x, p.x, held, own, site + u * ROWS, p);
    }
#pragma unroll
    for (int u = 0; u < U; u++) {
#pragma unroll
      for (int i = 0; i < V; i++) {
        const A z = (v[u][i] - shift[i % K] - centre[i % K]) * scale[i % K] + bias[i % K];
        v[u][i] = activate<ACT>(residual ? z + r[u][i] : z);
      }
      store_as(at(y, p.y, own.slot, site + u * ROWS, p), v[u]);
    }
  }
};

// What the backward passes share: g = grad_y · act'(z) and d = x - mean of U packs. `beside` is the residual or
// null, with FROM_RESULT it is y. What is held of it is x, then grad_y, then what lies beside; or x and g, where
// that loses nothing.
constexpr bool HOLDS_G = HELD && (sizeof(T) == sizeof(A) || ACT == Activation::none || ACT == Activation::relu ||
                                  ACT == Activation::relu6);
struct Gradient {
  const BatchNormParams& p;
  const Owner& own;
  const T *grad_y, *x, *beside;
  T* held;
  A mean[K], scale[K], bias[K];

  // Where is held: x, g or grad_y, what lies beside.
  __device__ __forceinline__ T* held_tensor(int which) const { return held + which * p.held; }

  __device__ __forceinline__ void fetch(int site) const {
    fetch_pack(held_at(held_tensor(0), own, site), at(x, p.x, own.slot, site, p));
    fetch_pack(held_at(held_tensor(1), own, site), at(grad_y, p.y, own.slot, site, p));
    if (!HOLDS_G && beside) fetch_pack(held_at(held_tensor(2), own, site), at(beside, p.residual, own.slot, site, p));
  }

  template <int U, bool SECOND>
  __device__ __forceinline__ void load(int site, bool with_x, A (&g)[U][V], A (&d)[U][V]) const {
    constexpr bool G_KNOWN = HOLDS_G && SECOND, WITH_Z = ACT != Activation::none && !FROM_RESULT && !G_KNOWN;
    const bool with_beside = !G_KNOWN && (FROM_RESULT || (WITH_Z && beside));
    A r[U][V];
#pragma unroll
    for (int u = 0; u < U; u++) {
      load_held(g[u], grad_y, p.y, held_tensor(1), own, site + u * ROWS, p);
      if (WITH_Z || with_x) load_held(d[u], x, p.x, held_tensor(0), own, site + u * ROWS, p);
      if (!with_beside) continue;
      if (HOLDS_G) {
        load_as(r[u], at(beside, p.residual, own.slot, site + u * ROWS, p));
      } else {
        load_held(r[u], beside, p.residual, held_tensor(2), own, site + u * ROWS, p);
      }
    }
    if (FROM_RESULT && !G_KNOWN) {
#pragma unroll
      for (int i = 0; i < U * V; i++)
        g[i / V][i % V] = activation_grad_of_result<ACT>(r[i / V][i % V], g[i / V][i % V]);
    }
    if (WITH_Z || with_x) {
#pragma unroll
      for (int i = 0; i < U * V; i++) {
        d[i / V][i % V] -= mean[i % K];
        const A z = d[i / V][i % V] * scale[i % K] + bias[i % K];
        if (WITH_Z) g[i / V][i % V] = activation_grad<ACT>(beside ? z + r[i / V][i % V] : z, g[i / V][i % V]);
      }
    }
    if (HOLDS_G && !SECOND) {
#pragma unroll
      for (int u = 0; u < U; u++) store_as(held_at(held_tensor(1), own, site + u * ROWS), g[u]);
    }
  }
};

// Σg, Σ g·(x - mean) and Σ(x - mean).
struct GradientSums {
  const Gradient& gradient;
  A sums[3][K];

  __device__ __forceinline__ void fetch(int site) const { gradient.fetch(site); }
  template <int U> __device__ __forceinline__ void run(int site) {
    A g[U][V], d[U][V];
    gradient.load<U, false>(site, true, g, d);
#pragma unroll
    for (int i = 0; i < U * V; i++) {
      sums[0][i % K] += g[i / V][i % V];
      sums[1][i % K] += g[i / V][i % V] * d[i / V][i % V];
      sums[2][i % K] += d[i / V][i % V];
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
    gradient.load<U, true>(site, with_x, g, d);
#pragma unroll
    for (int u = 0; u < U; u++) {
      const Index slot = gradient.own.slot;
      if (grad_residual) store_as(at(grad_residual, p.grad_residual, slot, site + u * ROWS, p), g[u]);
      if (!grad_x) continue;
#pragma unroll
      for (int i = 0; i < V; i++) {
        g[u][i] *= gradient.scale[i % K];
        if (with_x) g[u][i] += d[u][i] * slope[i % K] + offset[i % K];
      }
      store_as(at(grad_x, p.grad_x, slot, site + u * ROWS, p), g[u]);
    }
  }
};

// ---- what one block, or a cluster of them, holds whole --------------------------------------------------
#if HELD
extern __shared__ __align__(16) unsigned char slab[];
#if CLUSTER > 1
#define WHOLE(entry)                                                                                          \
  extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 512 / THREADS) \
  entry##_cluster
#else
#define WHOLE(entry) extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS) entry
#endif

// What another block of the cluster, or this one, has in its scratch; between the two cluster barriers only.
DEVICE A from_block(const A* scratch, int rank) { return CLUSTER > 1 ? cluster_load(scratch, rank) : *scratch; }
#endif

#ifdef TRAIN  // ---- training, forward ---------------------------------------------------------------------
// The first element of a channel, to which the statistics are relative.
DEVICE A first_of(const T* x, int c, const BatchNormParams& p) {
  return convert<A>(x[c / K * (Index)p.x.slot + c % K]);
}

// Those of the slot.
DEVICE void load_first(A (&v)[K], const T* x, const Owner& own, const BatchNormParams& p) {
  if (own.active) {
    load_as(v, x + own.slot * (Index)p.x.slot);
  } else {
#pragma unroll
    for (int k = 0; k < K; k++) v[k] = A(0);
  }
}

DEVICE void gather_statistics(Statistics& pass) {
  load_first(pass.first, pass.x, pass.own, pass.p);
  pass.moments.clear();
  for_fetched_sites<UNROLL>(pass.own, pass);
}

// What normalises the channels of the block; `centre` is the mean relative to the channel's first element.
struct __align__(16) Normaliser { A centre[WIDTH], rstd[WIDTH]; };

struct Results {  // of a channel
  A *mean, *rstd;
  P *running_mean, *running_var;
};

// From the moments of a channel of the block, by the thread of its number. One block of those that share the channel
// writes the results.
DEVICE void finish_channel(Normaliser& normaliser, const Moments<1>& moments, const T* x, const Results& results,
                           bool writes, const Owner& own, const BatchNormParams& p) {
  const int c = own.block_channel + threadIdx.x;
  const A var = moments.m2[0] / A(p.count), rstd = A(1) / sqrt(var + A(p.eps));
  normaliser.centre[threadIdx.x] = moments.mean[0];
  normaliser.rstd[threadIdx.x] = rstd;
  if (!writes || c >= p.channels) return;
  const A mean = first_of(x, c, p) + moments.mean[0], keep = A(1.0 - p.momentum), take = A(p.momentum);
  results.mean[c] = mean;
  results.rstd[c] = rstd;
  P *running_mean = results.running_mean, *running_var = results.running_var;
  if (running_mean) running_mean[c] = convert<P>(keep * convert<A>(running_mean[c]) + take * mean);
  if (running_var) running_var[c] = convert<P>(keep * convert<A>(running_var[c]) + take * (var * A(p.unbiased)));
}

DEVICE void normalise(Normalise& pass, const Normaliser& normaliser, const P* weight, const P* bias) {
  A inverse[K];
  load_first(pass.shift, pass.x, pass.own, pass.p);
  load_as(pass.centre, normaliser.centre + pass.own.lane * K);
  load_as(inverse, normaliser.rstd + pass.own.lane * K);
  load_vector(pass.scale, weight, pass.own, A(1));
  load_vector(pass.bias, bias, pass.own, A(0));
#pragma unroll
  for (int k = 0; k < K; k++) pass.scale[k] *= inverse[k];
  for_sites<UNROLL_Z>(pass.own, pass);
}

#if HELD
WHOLE(batch_norm_train)(const T* __restrict__ x, const P* __restrict__ weight, const P* __restrict__ bias,
                        const T* __restrict__ residual, T* __restrict__ y, A* __restrict__ mean, A* __restrict__ rstd,
                        P* __restrict__ running_mean, P* __restrict__ running_var, BatchNormParams p) {
  __shared__ __align__(16) A scratch[2 * AREA];
  __shared__ Normaliser normaliser;
  const int rank = blockIdx.x % CLUSTER;
  const Owner own = owner(blockIdx.x / CLUSTER, rank, p);
  T* const held = reinterpret_cast<T*>(slab);
  Statistics gather{p, own, x, held};
  gather_statistics(gather);
  merge_rows<LANES>(gather.moments, values_of(min(p.split_sites, p.sites - own.first)), scratch);
  if (CLUSTER > 1) cluster_sync();
  if (threadIdx.x < WIDTH) {
    Moments<1> moments, next;
    moments.clear();
#pragma unroll
    for (int r = 0; r < CLUSTER; r++) {
      next.count = values_of(min(p.split_sites, p.sites - r * p.split_sites));
      next.mean[0] = from_block(scratch + threadIdx.x, r);
      next.m2[0] = from_block(scratch + AREA + threadIdx.x, r);
      moments.merge(next);
    }
    finish_channel(normaliser, moments, x, {mean, rstd, running_mean, running_var}, rank == 0, own, p);
  }
  __syncthreads();
  if (CLUSTER > 1) cluster_arrive();  // this block has read what it wants of the others
  Normalise pass{p, own, x, residual, held, y};
  normalise(pass, normaliser, weight, bias);
  if (CLUSTER > 1) cluster_wait();
}

#else
// partials: mean, relative to the channel's first element, and M2.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
batch_norm_train_stats(const T* __restrict__ x, A* __restrict__ partials, BatchNormParams p) {
  __shared__ __align__(16) A scratch[2 * AREA];
  const Owner own = owner(blockIdx.x, blockIdx.y, p);
  Statistics pass{p, own, x};
  gather_statistics(pass);
  merge_rows<LANES>(pass.moments, values_of(min(p.split_sites, p.sites - own.first)), scratch);
  store_partials<2>(partials, scratch, AREA, own, p);
}

// Fewer partials of more sites each.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
batch_norm_train_merge(const A* __restrict__ partials, A* __restrict__ fewer, BatchNormParams p) {
  __shared__ __align__(16) A scratch[2 * AREA];
  const Owner own = owner(blockIdx.x, 0, p);
  const int first = blockIdx.y * p.merged;
  gather_moments(partials, first, min(first + p.merged, p.parts), own, scratch, p);
  store_partials<2>(fewer, scratch, AREA, own, p);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
batch_norm_stats_finish(const T* __restrict__ x, const A* __restrict__ partials, A* __restrict__ mean,
                        A* __restrict__ var, BatchNormParams p) {
  __shared__ __align__(16) A scratch[2 * AREA];
  const Owner own = owner(blockIdx.x, 0, p);
  gather_moments(partials, 0, p.parts, own, scratch, p);
  const int c = own.block_channel + threadIdx.x;
  if (threadIdx.x >= WIDTH || c >= p.channels) return;
  mean[c] = first_of(x, c, p) + scratch[threadIdx.x];
  var[c] = scratch[AREA + threadIdx.x] / A(p.count);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
batch_norm_train_apply(const T* __restrict__ x, const P* __restrict__ weight, const P* __restrict__ bias,
                       const T* __restrict__ residual, const A* __restrict__ partials, T* __restrict__ y,
                       A* __restrict__ mean, A* __restrict__ rstd, P* __restrict__ running_mean,
                       P* __restrict__ running_var, BatchNormParams p) {
  __shared__ __align__(16) A scratch[2 * AREA];
  __shared__ Normaliser normaliser;
  const Owner own = owner(blockIdx.x, gridDim.y - 1 - blockIdx.y, p);
  gather_moments(partials, 0, p.parts, own, scratch, p);
  if (threadIdx.x < WIDTH) {
    const Moments<1> moments{A(p.count), {scratch[threadIdx.x]}, {scratch[AREA + threadIdx.x]}};
    finish_channel(normaliser, moments, x, {mean, rstd, running_mean, running_var}, blockIdx.y == 0, own, p);
  }
  __syncthreads();
  Normalise pass{p, own, x, residual, nullptr, y};
  normalise(pass, normaliser, weight, bias);
}
#endif
#endif

#ifdef INFER  // ---- inference -----------------------------------------------------------------------------
extern "C" __global__ void __launch_bounds__(THREADS, 2)
batch_norm_infer(const T* __restrict__ x, const P* __restrict__ weight, const P* __restrict__ bias,
                 const T* __restrict__ residual, const P* __restrict__ running_mean,
                 const P* __restrict__ running_var, T* __restrict__ y, BatchNormParams p) {
  const Owner own = owner(blockIdx.x, blockIdx.y, p);
  Normalise pass{p, own, x, residual, nullptr, y};
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
  for_sites<UNROLL_Z>(own, pass);
}
#endif

#ifdef BACKWARD  // ---- backward ---------------------------------------------------------------------------
// What grad_x needs to know of the channels of the block.
struct __align__(16) Coefficients { A slope[WIDTH], offset[WIDTH]; };

struct Parameters { const P *weight, *bias; P *grad_weight, *grad_bias; };

// From Σg, Σ g·(x - mean) and Σ(x - mean) of a channel of the block, by the thread of its number; the gradients of
// parameters are written by one block of those that share the channel. The mean of x - mean is the rounding error of
// `mean`: x̂ = (x - mean - error)·rstd.
DEVICE void finish_gradient(Coefficients& coefficients, const A (&sums)[3], const Parameters& parameters,
                            const A* inverse, bool writes, const Owner& own, const BatchNormParams& p) {
  const int c = own.block_channel + threadIdx.x;
  coefficients.slope[threadIdx.x] = coefficients.offset[threadIdx.x] = A(0);
  if (c >= p.channels) return;
  const A rstd = inverse[c], scale = parameters.weight ? convert<A>(parameters.weight[c]) * rstd : rstd;
  const A error = p.training ? sums[2] / A(p.count) : A(0);
  const A sum_gxhat = (sums[1] - error * sums[0]) * rstd;
  if (writes && parameters.grad_weight) parameters.grad_weight[c] = convert<P>(sum_gxhat);
  if (writes && parameters.grad_bias) parameters.grad_bias[c] = convert<P>(sums[0]);
  if (!p.training) return;
  const A slope = -scale * rstd * (sum_gxhat / A(p.count));
  coefficients.slope[threadIdx.x] = slope;
  coefficients.offset[threadIdx.x] = -scale * (sums[0] / A(p.count)) - slope * error;
}

DEVICE void load_gradient(Gradient& gradient, const P* weight, const P* bias, const A* mean, const A* rstd) {
  A inverse[K];
  load_vector(gradient.mean, mean, gradient.own, A(0));
  load_vector(inverse, rstd, gradient.own, A(0));
  load_vector(gradient.scale, weight, gradient.own, A(1));
  load_vector(gradient.bias, bias, gradient.own, A(0));
#pragma unroll
  for (int k = 0; k < K; k++) gradient.scale[k] *= inverse[k];
}

// Leaves the sums in scratch.
DEVICE void sum_gradient(const Gradient& gradient, A* scratch) {
  GradientSums pass{gradient};
#pragma unroll
  for (int i = 0; i < 3 * K; i++) pass.sums[i / K][i % K] = A(0);
  for_fetched_sites<UNROLL_Z>(gradient.own, pass);
  sum_rows<LANES>(pass.sums, scratch);
}

DEVICE void apply_gradient(const Gradient& gradient, const Coefficients& coefficients, T* grad_x, T* grad_residual) {
  InputGradient pass{gradient, grad_x, grad_residual, gradient.p.training && grad_x};
  load_as(pass.slope, coefficients.slope + gradient.own.lane * K);
  load_as(pass.offset, coefficients.offset + gradient.own.lane * K);
  for_sites<UNROLL_Z>(gradient.own, pass);
}

#if HELD
WHOLE(batch_norm_bwd)(const T* __restrict__ grad_y, const T* __restrict__ x, const P* __restrict__ weight,
                      const P* __restrict__ bias, const T* __restrict__ beside, const A* __restrict__ mean,
                      const A* __restrict__ rstd, T* __restrict__ grad_x, P* __restrict__ grad_weight,
                      P* __restrict__ grad_bias, T* __restrict__ grad_residual, BatchNormParams p) {
  __shared__ __align__(16) A scratch[3 * AREA];
  __shared__ Coefficients coefficients;
  const int rank = blockIdx.x % CLUSTER;
  const Owner own = owner(blockIdx.x / CLUSTER, rank, p);
  Gradient gradient{p, own, grad_y, x, beside, reinterpret_cast<T*>(slab)};
  load_gradient(gradient, weight, bias, mean, rstd);
  sum_gradient(gradient, scratch);
  if (CLUSTER > 1) cluster_sync();
  if (threadIdx.x < WIDTH) {
    A sums[3] = {A(0), A(0), A(0)};
#pragma unroll
    for (int i = 0; i < 3 * CLUSTER; i++) sums[i % 3] += from_block(scratch + i % 3 * WIDTH + threadIdx.x, i / 3);
    finish_gradient(coefficients, sums, {weight, bias, grad_weight, grad_bias}, rstd, rank == 0, own, p);
  }
  __syncthreads();
  if (CLUSTER > 1) cluster_arrive();  // this block has read what it wants of the others
  if (grad_x || grad_residual) apply_gradient(gradient, coefficients, grad_x, grad_residual);
  if (CLUSTER > 1) cluster_wait();
}

#else
// partials: Σg, Σ g·(x - mean) and Σ(x - mean).
extern "C" __global__ void __launch_bounds__(THREADS, 2)
batch_norm_bwd_sums(const T* __restrict__ grad_y, const T* __restrict__ x, const P* __restrict__ weight,
                    const P* __restrict__ bias, const T* __restrict__ beside, const A* __restrict__ mean,
                    const A* __restrict__ rstd, A* __restrict__ partials, BatchNormParams p) {
  __shared__ __align__(16) A scratch[3 * AREA];
  const Owner own = owner(blockIdx.x, blockIdx.y, p);
  Gradient gradient{p, own, grad_y, x, beside};
  load_gradient(gradient, weight, bias, mean, rstd);
  sum_gradient(gradient, scratch);
  store_partials<3>(partials, scratch, WIDTH, own, p);
}

// Fewer partials of more sites each.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
batch_norm_bwd_merge(const A* __restrict__ partials, A* __restrict__ fewer, BatchNormParams p) {
  __shared__ __align__(16) A scratch[3 * AREA];
  const Owner own = owner(blockIdx.x, 0, p);
  const int first = blockIdx.y * p.merged;
  gather_sums(partials, first, min(first + p.merged, p.parts), own, scratch, p);
  store_partials<3>(fewer, scratch, WIDTH, own, p);
}

// Without partials nobody asks for sums: x is then read only where it tells the activation's derivative.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
batch_norm_bwd_apply(const T* __restrict__ grad_y, const T* __restrict__ x, const P* __restrict__ weight,
                     const P* __restrict__ bias, const T* __restrict__ beside, const A* __restrict__ mean,
                     const A* __restrict__ rstd, const A* __restrict__ partials, T* __restrict__ grad_x,
                     P* __restrict__ grad_weight, P* __restrict__ grad_bias, T* __restrict__ grad_residual,
                     BatchNormParams p) {
  __shared__ __align__(16) A scratch[3 * AREA];
  __shared__ Coefficients coefficients;
  const Owner own = owner(blockIdx.x, gridDim.y - 1 - blockIdx.y, p);
  Gradient gradient{p, own, grad_y, x, beside};
  load_gradient(gradient, weight, bias, mean, rstd);
  if (partials) gather_sums(partials, 0, p.parts, own, scratch, p);
  if (threadIdx.x < WIDTH) {
    A sums[3] = {A(0), A(0), A(0)};
    if (partials) {
#pragma unroll
      for (int j = 0; j < 3; j++) sums[j] = scratch[j * WIDTH + threadIdx.x];
    }
    finish_gradient(coefficients, sums, {weight, bias, grad_weight, grad_bias}, rstd, blockIdx.y == 0, own, p);
  }
  __syncthreads();
  if (grad_x || grad_residual) apply_gradient(gradient, coefficients, grad_x, grad_residual);
}
#endif
#endif
