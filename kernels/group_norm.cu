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
// Grid. A block has up to LANES = THREADS / TEAM line packs by TEAM·PACKS sites, or by several turns of these. TEAM
// threads share a line, and each has every TEAM-th site of the tile, PACKS of them in flight at once. In memory's
// order come threads of a line's neighbouring sites, or in channels-last those of neighbouring lines.
// x: blocks of lines (fastest, so that parameters per value are read from memory once), by splits of the sites. A
// layer's blocks walk over many rows, with the parameters of their sites in shared memory.
//
// Passes.
//     slab in one block    group_norm_fwd: everything, from one reading of x
//                          group_norm_bwd: the same, from one reading of x and grad_y → params
//     slab in several      stats: (mean, M2) a line and split → merge: one warp a slab → apply
//                          bwd_sums: three sums a line and split → bwd_merge: one warp a slab → bwd_apply → params
//     params               sums over images (and splits), or over blocks of rows: 8 parameters a block
// A block has its slabs in registers (16 or 32 values a thread) or, HELD, in shared memory: there every thread
// writes the packs that it has read, and reads no others again, so that nothing is waited for and no banks
// collide. Up to 94 KB are held, 24064 floats forward and 12032 of each tensor backward; in channels-last 64 KB.
// Parameter gradients: of a group those three sums are per line, so per parameter and image. Of a layer each value
// has its own parameter: the blocks of the last pass keep the sums of the rows that they walk over in registers.
// Nothing is added atomically: threads, lanes, warps, splits and blocks are merged in a fixed order, and the same
// input gives the same bits. The apply passes run backwards, since what the pass before read last is what the L2
// cache still holds.
//
// Bytes, for a tensor of X bytes: in one block forward moves 2X and backward 3X, the floor. In several, forward
// reads x twice, 3X, and backward x and grad_y twice, 5X, unless they fit in L2 (50 MB on an H100). Beside that a
// group's partial sums are 2 or 3 values a line and block, which takes up to 8 turns where there are blocks
// enough: below 1 % of X where lines are contiguous, up to 4 % in channels-last. A layer's are 2·D a walking block.
//
// Predicted for an H100 (3.0 TB/s, 3 µs a launch; not measured), in µs, fp32 and bf16, NCHW and channels-last
// alike. `asked` is what warps ask of global memory over the least traffic; shared memory's wavefronts take less
// than a third of memory's time throughout, and banks do not collide.
//
//                                               launches     asked          fp32    bf16    memory alone
//     group, 32 groups of 256@28, N 8    fwd       1      1.02 to 1.03       7.3     5.1     4.3     2.1
//                                        bwd       2      1.03 to 1.06      12.4     9.2     6.4     3.2
//     group, 8 groups of 64@112, N 8     fwd       3      1.52 to 1.57        35      22      26      13
//                                        bwd       4      1.69 to 1.79        55      34      43      22
//     instance, 64@56, N 8               fwd       1      1.02 to 1.04       7.3     5.1     4.3     2.1
//                                        bwd       2      1.03 to 1.07      12.4     9.2     6.4     3.2
//     layer, C 96 @ 56x56, N 8           fwd       1      1.04 to 1.08       9.4     6.2     6.4     3.2
//                                        bwd       2      1.03 to 1.07      15.6    10.8     9.6     4.8
//
// Why this way: the variance, as in batch_norm.cu. Every value is first taken relative to its slab's first, which
// is within sqrt(M)·std of the mean; then a thread takes mean and Σ of squared deviations of each turn in two
// passes over registers, and turns, threads and tiles are merged by Chan's formula (moments.cuh). The forward pass
// keeps the mean as first value + remainder. Backward has only the rounded `mean`: it finds the rounding error as
// Σ(x - mean)/M on its way and takes it out.
// Sums over a team whose threads are rows of the block (channels-last, and a layer's columns) are laid in shared
// memory word by lane, each warp's under the other's, and each is added by one thread: reading all rows in every
// thread took longer than memory.
//
// Constants: ELEMENT, ACCUMULATOR, PARAMETER (weight and bias), INDEX (int, or long long where a tensor spans 2^31
// elements), VECTOR = V, PACKS, TEAM, THREADS, WHOLE (1: slabs in one block), HELD (1: in shared memory), LAYER,
// CHANNELS_INNER (1: channels-last packs), SLABS (slabs of such a pack: 1, or V), CROSSED (1: x, 2: grad_y),
// ACTIVATION, PARAMS_BYTES; and FORWARD or BACKWARD. Everything else is known at run time.
#include "epilogue.cuh"
#include "moments.cuh"

#ifdef FORWARD
#define TENSORS 1  // that are read
#else
#define TENSORS 2
#endif

using T = ELEMENT;
using A = ACCUMULATOR;
using P = PARAMETER;
using Index = INDEX;
constexpr int V = VECTOR;
constexpr int K = CHANNELS_INNER ? V : 1;      // lines of a pack
constexpr int S = CHANNELS_INNER ? SLABS : 1;  // slabs of a pack: one, or one for each line
constexpr int W = LAYER ? V : K;               // parameters of a pack
constexpr int LANES = THREADS / TEAM;
constexpr int WARPS = THREADS / 32;
// Whether a thread goes over its packs in turns, instead of having all of them in registers.
constexpr bool TURNS = HELD || !(WHOLE || (LAYER && TENSORS == 2));
constexpr bool X_CROSSED = CROSSED & 1, GRAD_CROSSED = CROSSED & 2;
constexpr Activation ACT = Activation::ACTIVATION;
static_assert(THREADS % 32 == 0 && (THREADS & (THREADS - 1)) == 0 && THREADS % TEAM == 0, "whole warps and teams");
static_assert((V & (V - 1)) == 0 && V * sizeof(T) <= 16, "a pack is one access");
static_assert(!CHANNELS_INNER || (!LAYER && LANES <= 32), "lanes side by side are of one warp");
static_assert(!CROSSED || (LAYER && WHOLE && !HELD), "only rows are turned over");
static_assert(!HELD || (WHOLE && !(LAYER && TENSORS == 2)), "sums of columns are kept in registers");

struct Strides { long long image, line, site; };  // site: of a pack, but of a value where the tensor is crossed

struct GroupNormParams {
  Strides x, y, grad_x;  // grad_y has y's place
  FastDiv image_lines, slab_lines, line_blocks, splits;
  FastDiv walkers;  // blocks that share the line blocks of a layer
  int lines, block_lines, sites;
  int turns;  // of PACKS packs that a thread has in its block's part of the sites
  int held;   // threads of a block that have lines, each with its place in shared memory
  double count, eps;  // count: M
};
static_assert(sizeof(GroupNormParams) == PARAMS_BYTES, "the Python structure must mirror this one");

// ---- who owns what --------------------------------------------------------------------------------------
// Sites of a block.
DEVICE int tile_sites(const GroupNormParams& p) { return TEAM * PACKS * (TURNS ? p.turns : 1); }
// Values of a line in a block's part of it.
DEVICE int tile_values(int split, const GroupNormParams& p) {
  return min(tile_sites(p), p.sites - split * tile_sites(p)) * (V / K);
}

struct Owner {
  int lane, row;
  int block_line;             // first line of the block
  int line, image, channel;   // first line of the thread, and which one of which image it is
  int site;                   // first site of the thread
  int packs;                  // how many packs the thread has, TEAM sites apart; 0 behind the last line
};
DEVICE Owner owner(int line_block, int split, const GroupNormParams& p) {
  Owner own;
  own.lane = CHANNELS_INNER ? threadIdx.x % LANES : threadIdx.x / TEAM;
  own.row = CHANNELS_INNER ? threadIdx.x / LANES : threadIdx.x % TEAM;
  own.block_line = line_block * p.block_lines;
  own.line = own.block_line + own.lane * K;
  own.site = split * tile_sites(p) + own.row;
  const bool active = own.lane * K < p.block_lines && own.line < p.lines && own.site < p.sites;
  own.packs = active ? min(tile_sites(p) / TEAM, ceil_div(p.sites - own.site, TEAM)) : 0;
  own.image = p.image_lines.divmod(own.line, own.channel);
  return own;
}
// Whether the thread is the first of a team that has a line.
DEVICE bool leads(const Owner& own) { return own.row == 0 && own.packs > 0; }

DEVICE Index offset(const Strides& s, int image, int channel, int site) {
  return image * (Index)s.image + channel * (Index)s.line + site * (Index)s.site;
}

// Calls body(n) for each turn, with the number of its first pack: once where all packs are in registers.
template <class Body> DEVICE void for_turns(const Owner& own, Body body) {
  if constexpr (TURNS) {
#pragma unroll 1
    for (int n = 0; n < own.packs; n += PACKS) body(n);
  } else {
    body(0);
  }
}
// Calls body(j) for the thread's packs of the turn that begins with its n-th, in order.
template <class Body> DEVICE void for_packs(const Owner& own, int n, Body body) {
#pragma unroll
  for (int j = 0; j < PACKS; j++) {
    if (n + j < own.packs) body(j);
  }
}

// ---- reading --------------------------------------------------------------------------------------------
// Where a crossed tile is turned over, PACKS times: lines of words, which are written by a lane for each line, and
// read by neighbours of a line, V values each. A word behind each row of banks, and a pitch that puts the lines of
// a warp into different banks, keep both free of conflicts. A word is 4 bytes, or what fits: a value, or a pack.
constexpr int WORD = sizeof(T) > 4 ? sizeof(T) : V * sizeof(T) < 4 ? V * sizeof(T) : 4;
constexpr int U = WORD / sizeof(T);  // values of a word
constexpr int BANKS = 128 / WORD;
constexpr int LINE_WORDS = TEAM * V / U;
DEVICE constexpr int pitch() {
  // Lines that a request writes, and how far apart they are to be: of each pair of odd places where they fill all.
  const int lines = LANES < 32 ? LANES : 32, apart = BANKS > lines ? BANKS / lines : 1;
  const int step = LANES < 32 ? BANKS : 2 * apart;
  int words = LINE_WORDS + LINE_WORDS / BANKS;
  while (words % step != apart % step) words++;
  return words;
}
constexpr int PITCH = CROSSED ? pitch() : 1;
using Stage = T[CROSSED ? LANES : 1][PITCH * U];
DEVICE T* word_of(Stage& stage, int line, int word) { return &stage[line][(word + word / BANKS) * U]; }

// Where the thread's n-th pack of one of the tensors is kept in shared memory: only itself comes there.
DEVICE T* held_pack(int tensor, int n, const Owner& own, const GroupNormParams& p) {
#if HELD
  extern __shared__ __align__(16) unsigned char held[];
  const int place = CHANNELS_INNER ? own.row * (p.block_lines / K) + own.lane : threadIdx.x;
  return reinterpret_cast<T*>(held) + ((tensor * p.turns * PACKS + n) * p.held + place) * V;
#else
  return nullptr;
#endif
}

// A turn's packs as they come from memory: all are asked for before any is waited for.
template <bool CROSS> struct Turn {
  Pack<T, CROSS ? U : V> raw[PACKS][CROSS ? V / U : 1];

  __device__ __forceinline__ void ask(const T* tensor, const Strides& s, const Owner& own, int n,
                                      const GroupNormParams& p) {
    if constexpr (!CROSS) {
      const Index first = offset(s, own.image, own.channel, own.site + n * TEAM), step = (Index)(TEAM * s.site);
      for_packs(own, n, [&](int j) { raw[j][0] = load_pack<V>(tensor + (first + j * step)); });
    } else {
      // A lane for each line, TEAM words apart.
      const int lane = threadIdx.x % LANES, first = threadIdx.x / LANES;
      int channel;
      const int image = p.image_lines.divmod(own.block_line + lane, channel);
      const int words = lane < p.block_lines && own.block_line + lane < p.lines ? p.sites * (V / U) - first : 0;
      const T* from = tensor + offset(s, image, channel, first * U);
#pragma unroll
      for (int i = 0; i < PACKS * (V / U); i++) {
        if (i * TEAM < words) {
#pragma unroll
          for (int u = 0; u < U; u++) raw[i / (V / U)][i % (V / U)].v[u] = from[u * (Index)s.site];
        }
        from += (Index)(TEAM * U * s.site);
      }
    }
  }

  // `tensor`: the place in shared memory, if packs are to be held there.
  __device__ __forceinline__ void give(A (&v)[PACKS][V], const Owner& own, int n, int tensor, Stage& stage,
                                       const GroupNormParams& p) {
    if constexpr (!CROSS) {
      for_packs(own, n, [&](int j) {
        if (HELD) store_pack(held_pack(tensor, n + j, own, p), raw[j][0]);
#pragma unroll
        for (int i = 0; i < V; i++) v[j][i] = convert<A>(raw[j][0].v[i]);
      });
    } else {
      const int lane = threadIdx.x % LANES, first = threadIdx.x / LANES;
#pragma unroll
      for (int j = 0; j < PACKS; j++) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < V / U; i++) store_pack(word_of(stage, lane, first + i * TEAM), raw[j][i]);
        __syncthreads();
        if (j >= own.packs) continue;
#pragma unroll
        for (int i = 0; i < V; i += U) {
          const Pack<T, U> word = load_pack<U>(word_of(stage, own.lane, own.row * (V / U) + i / U));
#pragma unroll
          for (int u = 0; u < U; u++) v[j][i + u] = convert<A>(word.v[u]);
        }
      }
    }
  }
};

// The same packs again, from shared memory.
DEVICE void load_held(A (&v)[PACKS][V], const Owner& own, int n, int tensor, const GroupNormParams& p) {
  for_packs(own, n, [&](int j) { load_as(v[j], held_pack(tensor, n + j, own, p)); });
}

// γ and β of the thread's lines, or of the values of a turn's packs. Either vector may be missing. A layer's are in
// shared memory, where a block that walks over rows has room for its sites'; backward needs no β.
constexpr int VECTORS = TENSORS == 1 ? 2 : 1, TILE_VALUES = TEAM * PACKS * V;
constexpr bool AFFINE_SHARED = LAYER && !TURNS && (VECTORS == 1 || TILE_VALUES * sizeof(P) <= 16384);
struct __align__(16) SharedAffine { P v[AFFINE_SHARED ? VECTORS : 1][AFFINE_SHARED ? TILE_VALUES : 1]; };
struct Affine {
  A w[LAYER ? PACKS : 1][W], b[LAYER ? PACKS : 1][W];
  const SharedAffine* shared;

  __device__ __forceinline__ void load(const P* weight, const P* bias, const Owner& own, int n,
                                       const GroupNormParams& p) {
#pragma unroll
    for (int j = 0; j < (LAYER ? PACKS : 1); j++) {
      const int site = own.site + (n + j) * TEAM, first = LAYER ? site * V : own.channel;
      const bool present = LAYER ? site < p.sites : own.packs > 0;
#pragma unroll
      for (int i = 0; i < W; i++) w[j][i] = A(1), b[j][i] = A(0);
      if (weight && present) load_as(w[j], weight + first);
      if (bias && present) load_as(b[j], bias + first);
    }
  }
  // Those of the block's values, before it walks. All threads must take part.
  __device__ __forceinline__ void share(const P* weight, const P* bias, SharedAffine& to, int split,
                                        const GroupNormParams& p) {
    if constexpr (AFFINE_SHARED) {
      const int first = split * TILE_VALUES;
#pragma unroll 1
      for (int i = threadIdx.x; i < TILE_VALUES; i += THREADS) {
        const bool present = first + i < p.sites * V;
        to.v[0][i] = weight && present ? weight[first + i] : convert<P>(A(1));
        if (VECTORS == 2) to.v[VECTORS - 1][i] = bias && present ? bias[first + i] : convert<P>(A(0));
      }
      __syncthreads();
      shared = &to;
    } else if (LAYER && !TURNS) {
      load(weight, bias, owner(0, split, p), 0, p);
    }
  }
  __device__ __forceinline__ void weights(A (&v)[W], int j) const { get(v, w, 0, j); }
  __device__ __forceinline__ void biases(A (&v)[W], int j) const { get(v, b, VECTORS - 1, j); }
  __device__ __forceinline__ void get(A (&v)[W], const A (&own)[LAYER ? PACKS : 1][W], int vector, int j) const {
    if constexpr (AFFINE_SHARED) {
      load_as(v, &shared->v[vector][(threadIdx.x % TEAM + j * TEAM) * V]);
    } else {
#pragma unroll
      for (int i = 0; i < W; i++) v[i] = own[LAYER ? j : 0][i];
    }
  }
};

// v[k] = of(line) for a line of each of the pack's slabs.
template <class Of> DEVICE void of_slabs(A (&v)[S], const Owner& own, Of of) {
#pragma unroll
  for (int k = 0; k < S; k++) v[k] = own.packs > 0 ? of(own.line + k) : A(0);
}
DEVICE void load_statistic(A (&v)[S], const A* statistic, const Owner& own, const GroupNormParams& p) {
  of_slabs(v, own, [&](int line) { return statistic[p.slab_lines.div(line)]; });
}

// Adds each of v over the team. In channels-last v[q·K + k] is of line k.
DEVICE constexpr int team_scratch(int n) {
  return CHANNELS_INNER ? rows_scratch<LANES, THREADS>(n) + n * LANES : neighbours_scratch<TEAM, THREADS>(n);
}
template <int N> DEVICE void sum_team(A (&v)[N], A* scratch) {
  if constexpr (CHANNELS_INNER) {
    A* sums = scratch + rows_scratch<LANES, THREADS>(N);
    sum_rows<LANES, THREADS>(v, scratch, [&](int n, int lane, A sum) { sums[n * LANES + lane] = sum; });
#pragma unroll
    for (int n = 0; n < N; n++) v[n] = sums[n * LANES + threadIdx.x % LANES];
  } else {
    sum_neighbours<TEAM, THREADS>(v, scratch);
  }
}

#ifdef FORWARD  // ---- forward -----------------------------------------------------------------------------
// The first values of the slabs of the thread's lines, to which everything is relative.
DEVICE void load_first(A (&v)[S], const T* x, const Owner& own, const GroupNormParams& p) {
  of_slabs(v, own, [&](int line) {
    int within;
    p.slab_lines.divmod(line, within);
    return convert<A>(x[offset(p.x, own.image, own.channel + line - own.line - within, 0)]);
  });
}

DEVICE void subtract(A (&v)[PACKS][V], const A (&first)[S], const Owner& own, int n) {
  for_packs(own, n, [&](int j) {
#pragma unroll
    for (int i = 0; i < V; i++) v[j][i] -= first[i % S];
  });
}

// Reads the tile, takes mean and M2 of what the team has of its lines, and leaves v relative to `first`.
DEVICE void statistics(A (&v)[PACKS][V], A (&mean)[K], A (&m2)[K], const T* x, const A (&first)[S], int split,
                       Stage& stage, A* scratch, const Owner& own, const GroupNormParams& p) {
  A count = A(0), sums[K];
#pragma unroll
  for (int k = 0; k < K; k++) mean[k] = m2[k] = A(0);
  for_turns(own, [&](int n) {
    Turn<X_CROSSED> turn;
    turn.ask(x, p.x, own, n, p);
    turn.give(v, own, n, 0, stage, p);
    const A values = A(min(PACKS, own.packs - n) * (V / K)), inverse = values > A(0) ? A(1) / values : A(0);
    A deviations[K];
#pragma unroll
    for (int k = 0; k < K; k++) sums[k] = deviations[k] = A(0);
    subtract(v, first, own, n);
    for_packs(own, n, [&](int j) {
#pragma unroll
      for (int i = 0; i < V; i++) sums[i % K] += v[j][i];
    });
#pragma unroll
    for (int k = 0; k < K; k++) sums[k] *= inverse;
    for_packs(own, n, [&](int j) {
#pragma unroll
      for (int i = 0; i < V; i++) {
        const A d = v[j][i] - sums[i % K];
        deviations[i % K] += d * d;
      }
    });
    const A total = count + values, weight = TURNS ? values / total : A(1);
#pragma unroll
    for (int k = 0; k < K; k++) {
      const A delta = sums[k] - mean[k];
      mean[k] += delta * weight;
      m2[k] += deviations[k] + delta * delta * (count * weight);
    }
    count = total;
  });
  const A inverse = A(1) / A(tile_values(split, p));
#pragma unroll
  for (int k = 0; k < K; k++) sums[k] = mean[k] * count;
  sum_team(sums, scratch);
#pragma unroll
  for (int k = 0; k < K; k++) {
    sums[k] *= inverse;
    const A delta = mean[k] - sums[k];
    mean[k] = sums[k];
    m2[k] += delta * delta * count;
  }
  sum_team(m2, scratch);
}

DEVICE A rstd_of(A m2, const GroupNormParams& p) { return A(1) / sqrt(m2 / A(p.count) + A(p.eps)); }

// y = act((v - centre)·rstd·γ + β) of a turn, v relative to `first` like the centre.
DEVICE void normalise(A (&v)[PACKS][V], const A (&centre)[S], const A (&rstd)[S], const Affine& affine, T* y,
                      const Owner& own, int n, const GroupNormParams& p) {
  const Index first = offset(p.y, own.image, own.channel, own.site + n * TEAM), step = (Index)(TEAM * p.y.site);
  for_packs(own, n, [&](int j) {
    A w[W], b[W];
    affine.weights(w, j);
    affine.biases(b, j);
#pragma unroll
    for (int i = 0; i < V; i++) {
      const A z = (v[j][i] - centre[i % S]) * (rstd[i % S] * w[i % W]) + b[i % W];
      v[j][i] = activate<ACT>(z);
    }
    store_as(y + (first + j * step), v[j]);
  });
}

#if WHOLE
extern "C" __global__ void __launch_bounds__(THREADS, (AFFINE_SHARED && sizeof(A) == 4 ? 1024 : 512) / THREADS)
group_norm_fwd(const T* __restrict__ x, const P* __restrict__ weight, const P* __restrict__ bias, T* __restrict__ y,
               A* __restrict__ mean, A* __restrict__ rstd, GroupNormParams p) {
  __shared__ A scratch[team_scratch(K)];
  __shared__ __align__(16) Stage stage;
  __shared__ SharedAffine shared_affine;
  Affine affine;
  affine.share(weight, bias, shared_affine, 0, p);
#pragma unroll 1
  for (int line_block = blockIdx.x; line_block < (int)p.line_blocks.divisor; line_block += gridDim.x) {
    const Owner own = owner(line_block, 0, p);
    A v[PACKS][V], first[S], centre[S], inverse[S], line_mean[K], m2[K];
    load_first(first, x, own, p);
    statistics(v, line_mean, m2, x, first, 0, stage, scratch, own, p);
    if (S == K && (LAYER || p.slab_lines.divisor == 1)) {
#pragma unroll
      for (int k = 0; k < S; k++) {
        centre[k] = line_mean[k];
        inverse[k] = rstd_of(m2[k], p);
        if (!leads(own)) continue;
        mean[own.line + k] = first[k] + centre[k];
        rstd[own.line + k] = inverse[k];
      }
    } else {
      __shared__ A parts[2][LANES * K], slabs[LANES * K][2];
      if (leads(own)) {
#pragma unroll
        for (int k = 0; k < K; k++) {
          parts[0][own.lane * K + k] = line_mean[k];
          parts[1][own.lane * K + k] = m2[k];
        }
      }
      __syncthreads();
      const int size = p.slab_lines.divisor, present = p.slab_lines.div(min(p.block_lines, p.lines - own.block_line));
      for (int slab = threadIdx.x / 32; slab < present; slab += WARPS) {
        Moments<A> moments{A(0), A(0), A(0)};
        for (int line = threadIdx.x % 32; line < size; line += 32) {
          moments.merge(A(tile_values(0, p)), parts[0][slab * size + line], parts[1][slab * size + line]);
        }
        moments.merge_warp();
        if (threadIdx.x % 32 == 0) {
          slabs[slab][0] = moments.mean;
          slabs[slab][1] = rstd_of(moments.m2, p);
        }
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < S; k++) {
        int within;
        const int slab = p.slab_lines.divmod(own.lane * K + k, within);
        centre[k] = own.packs > 0 ? slabs[slab][0] : A(0);
        inverse[k] = own.packs > 0 ? slabs[slab][1] : A(0);
        if (!leads(own) || within != 0) continue;
        mean[p.slab_lines.div(own.line + k)] = first[k] + centre[k];
        rstd[p.slab_lines.div(own.line + k)] = inverse[k];
      }
    }
    if (!LAYER) affine.load(weight, bias, own, 0, p);
    for_turns(own, [&](int n) {
      if (HELD) {
        load_held(v, own, n, 0, p);
        subtract(v, first, own, n);
      }
      if (LAYER && TURNS) affine.load(weight, bias, own, n, p);
      normalise(v, centre, inverse, affine, y, own, n, p);
    });
  }
}

#else
// partials[split][mean or M2][line], mean relative to the slab's first value.
extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS)
group_norm_stats(const T* __restrict__ x, A* __restrict__ partials, GroupNormParams p) {
  __shared__ A scratch[team_scratch(K)];
  __shared__ __align__(16) Stage stage;
  int line_block;
  const int split = p.line_blocks.divmod(blockIdx.x, line_block);
  const Owner own = owner(line_block, split, p);
  A v[PACKS][V], first[S], mean[K], m2[K];
  load_first(first, x, own, p);
  statistics(v, mean, m2, x, first, split, stage, scratch, own, p);
  if (!leads(own)) return;
  A* to = partials + (Index)split * 2 * p.lines + own.line;
  store_as(to, mean);
  store_as(to + p.lines, m2);
}

// One warp a slab. centre[slab] is the mean relative to the slab's first value.
extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS)
group_norm_merge(const T* __restrict__ x, const A* __restrict__ partials, A* __restrict__ mean, A* __restrict__ rstd,
                 A* __restrict__ centre, GroupNormParams p) {
  const int slab = blockIdx.x * WARPS + threadIdx.x / 32;
  if (slab >= p.slab_lines.div(p.lines)) return;
  const int size = p.slab_lines.divisor, line = slab * size;
  Moments<A> moments{A(0), A(0), A(0)};
  for (int i = threadIdx.x % 32; i < size * (int)p.splits.divisor; i += 32) {
    int within;
    const int split = p.slab_lines.divmod(i, within);
    const A* part = partials + (Index)split * 2 * p.lines + line + within;
    moments.merge(A(tile_values(split, p)), part[0], part[p.lines]);
  }
  moments.merge_warp();
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
  __shared__ __align__(16) Stage stage;
  int line_block;
  const int split = p.line_blocks.divmod(gridDim.x - 1 - blockIdx.x, line_block);
  const Owner own = owner(line_block, split, p);
  A first[S], centres[S], inverse[S];
  Affine affine;
  load_first(first, x, own, p);
  load_statistic(centres, centre, own, p);
  load_statistic(inverse, rstd, own, p);
  if (!LAYER) affine.load(weight, bias, own, 0, p);
  for_turns(own, [&](int n) {
    A v[PACKS][V];
    Turn<false> turn;
    turn.ask(x, p.x, own, n, p);
    if (LAYER) affine.load(weight, bias, own, n, p);
    turn.give(v, own, n, 0, stage, p);
    subtract(v, first, own, n);
    normalise(v, centres, inverse, affine, y, own, n, p);
  });
}
#endif
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

// coefficients[slope, offset or error][slab]
DEVICE int slabs_of(const GroupNormParams& p) { return p.slab_lines.div(p.lines); }
DEVICE void store(A* coefficients, int slab, const Coefficients& c, const GroupNormParams& p) {
  coefficients[slab] = c.slope;
  coefficients[slabs_of(p) + slab] = c.offset;
  coefficients[2 * slabs_of(p) + slab] = c.error;
}

// What a thread holds of grad_y and x, and the statistics of its lines.
struct Gradient {
  A g[PACKS][V], d[PACKS][V];  // grad_y · act'(z), x - mean
  A mean[S], rstd[S];

  __device__ __forceinline__ void load_statistics(const A* means, const A* inverses, const Owner& own,
                                                  const GroupNormParams& p) {
    load_statistic(mean, means, own, p);
    load_statistic(rstd, inverses, own, p);
  }

  __device__ __forceinline__ void load(const T* grad_y, const T* x, const Affine& affine, Stage& stage,
                                       const Owner& own, int n, const GroupNormParams& p) {
    Turn<GRAD_CROSSED> gradients;
    Turn<X_CROSSED> values;
    gradients.ask(grad_y, p.y, own, n, p);
    values.ask(x, p.x, own, n, p);
    gradients.give(g, own, n, 0, stage, p);
    values.give(d, own, n, 1, stage, p);
    prepare(affine, own, n);
  }
  __device__ __forceinline__ void load_again(const Affine& affine, const Owner& own, int n, const GroupNormParams& p) {
    load_held(g, own, n, 0, p);
    load_held(d, own, n, 1, p);
    prepare(affine, own, n);
  }

  // From grad_y and x.
  __device__ __forceinline__ void prepare(const Affine& affine, const Owner& own, int n) {
    for_packs(own, n, [&](int j) {
      A w[W], b[W];
      if (!LAYER) affine.weights(w, j), affine.biases(b, j);
#pragma unroll
      for (int i = 0; i < V; i++) {
        d[j][i] -= mean[i % S];
        if (LAYER) continue;
        const A z = d[j][i] * (rstd[i % S] * w[i % W]) + b[i % W];
        g[j][i] = activation_grad<ACT>(z, g[j][i]);
      }
    });
  }

  // Adds the turn's part of Σg, Σgd and Σd of each line; in a layer, where γ is no constant of the line, of Σγg and
  // Σγgd. s[q·K + k] is the sum q of line k.
  __device__ __forceinline__ void add_to(A (&s)[3 * K], const Affine& affine, const Owner& own, int n) const {
    for_packs(own, n, [&](int j) {
      A w[W];
      if (LAYER) affine.weights(w, j);
#pragma unroll
      for (int i = 0; i < V; i++) {
        const A gw = LAYER ? g[j][i] * w[i % W] : g[j][i];
        s[i % K] += gw;
        s[K + i % K] += gw * d[j][i];
        s[2 * K + i % K] += d[j][i];
      }
    });
  }

  __device__ __forceinline__ void store(T* grad_x, const Coefficients (&c)[S], const Affine& affine, const Owner& own,
                                        int n, const GroupNormParams& p) const {
    const Index first = offset(p.grad_x, own.image, own.channel, own.site + n * TEAM);
    const Index step = (Index)(TEAM * p.grad_x.site);
    for_packs(own, n, [&](int j) {
      A result[V], w[W];
      affine.weights(w, j);
#pragma unroll
      for (int i = 0; i < V; i++) {
        const Coefficients& slab = c[i % S];
        result[i] = rstd[i % S] * w[i % W] * g[j][i] + (slab.slope * d[j][i] + slab.offset);
      }
      store_as(grad_x + (first + j * step), result);
    });
  }
};

// A layer's Σg and Σ g·x̂ of each value of the tile, over the rows that a block walks. They are left as
// partials[block][g or gx][split, pack, element][row of the team]: in the order that threads have them in.
struct Columns {
  A sums[LAYER ? PACKS : 1][2 * V];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < (LAYER ? PACKS : 1) * 2 * V; i++) sums[i / (2 * V)][i % (2 * V)] = A(0);
  }
  __device__ __forceinline__ void add(const Gradient& gradient, A error, const Owner& own) {
    for_packs(own, 0, [&](int j) {
#pragma unroll
      for (int i = 0; i < V; i++) {
        sums[j][i] += gradient.g[j][i];
        sums[j][V + i] += gradient.g[j][i] * ((gradient.d[j][i] - error) * gradient.rstd[0]);
      }
    });
  }
  // `split` is the block's part of the sites. All threads must take part.
  __device__ __forceinline__ void store(A* partials, int walker, int split, A* scratch, const GroupNormParams& p) {
    const int tile = PACKS * V * TEAM, vector = (int)p.splits.divisor * tile;
    A* to = partials + (Index)walker * 2 * vector + split * tile;
#pragma unroll
    for (int j = 0; j < (LAYER ? PACKS : 1); j++) {
      sum_rows<TEAM, THREADS, false>(sums[j], scratch, [&](int n, int row, A sum) {
        to[n / V * vector + (j * V + n % V) * TEAM + row] = sum;
      });
    }
  }
};
// The value that is in that place of the vector.
DEVICE int column_value(int place) {
  const int element = place / TEAM % V, pack = place / (TEAM * V);
  return (pack * TEAM + place % TEAM) * V + element;
}

constexpr int LINE_SCRATCH = team_scratch(3 * K), COLUMN_SCRATCH = rows_scratch<TEAM, THREADS, false>(2 * V);
constexpr int SCRATCH = LAYER && COLUMN_SCRATCH > LINE_SCRATCH ? COLUMN_SCRATCH : LINE_SCRATCH;

#if WHOLE
// A group writes partials[Σg, Σgd or Σd][line] and coefficients, a layer partials as `Columns` does. Any of
// the results may be missing.
extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS)
group_norm_bwd(const T* __restrict__ grad_y, const T* __restrict__ x, const P* __restrict__ weight,
               const P* __restrict__ bias, const A* __restrict__ mean, const A* __restrict__ rstd,
               T* __restrict__ grad_x, A* __restrict__ partials, A* __restrict__ coefficients, GroupNormParams p) {
  __shared__ A scratch[SCRATCH];
  __shared__ __align__(16) Stage stage;
  Columns columns;
  columns.clear();
  __shared__ SharedAffine shared_affine;
  Affine affine;
  affine.share(weight, nullptr, shared_affine, 0, p);
#pragma unroll 1
  for (int line_block = blockIdx.x; line_block < (int)p.line_blocks.divisor; line_block += gridDim.x) {
    const Owner own = owner(line_block, 0, p);
    Gradient gradient;
    A s[3 * K];
    Coefficients c[S];
    gradient.load_statistics(mean, rstd, own, p);
    if (!LAYER) affine.load(weight, bias, own, 0, p);
#pragma unroll
    for (int i = 0; i < 3 * K; i++) s[i] = A(0);
    for_turns(own, [&](int n) {
      gradient.load(grad_y, x, affine, stage, own, n, p);
      gradient.add_to(s, affine, own, n);
    });
    sum_team(s, scratch);
    if (!LAYER && partials && leads(own)) {
#pragma unroll
      for (int q = 0; q < 3; q++) {
        A line_sums[K];
#pragma unroll
        for (int k = 0; k < K; k++) line_sums[k] = s[q * K + k];
        store_as(partials + (Index)q * p.lines + own.line, line_sums);
      }
    }
    if (S == K && (LAYER || p.slab_lines.divisor == 1)) {
#pragma unroll
      for (int k = 0; k < S; k++) {
        const A w = LAYER ? A(1) : affine.w[0][k % W], slab[3] = {w * s[k], w * s[K + k], s[2 * K + k]};
        c[k] = coefficients_of(slab, gradient.rstd[k], p);
      }
    } else {
      __shared__ A parts[3][LANES * K], slabs[3][LANES * K];
      if (leads(own)) {
#pragma unroll
        for (int k = 0; k < K; k++) {
          const A w = affine.w[0][k % W];
          parts[0][own.lane * K + k] = w * s[k];
          parts[1][own.lane * K + k] = w * s[K + k];
          parts[2][own.lane * K + k] = s[2 * K + k];
        }
      }
      __syncthreads();
      const int size = p.slab_lines.divisor, present = p.slab_lines.div(min(p.block_lines, p.lines - own.block_line));
      for (int slab = threadIdx.x / 32; slab < present; slab += WARPS) {
        A sums[3] = {A(0), A(0), A(0)};
        for (int line = threadIdx.x % 32; line < size; line += 32) {
#pragma unroll
          for (int q = 0; q < 3; q++) sums[q] += parts[q][slab * size + line];
        }
        sum_neighbours<32, THREADS>(sums, (A*)nullptr);
        if (threadIdx.x % 32 == 0) {
          const Coefficients found = coefficients_of(sums, rstd[p.slab_lines.div(own.block_line) + slab], p);
          slabs[0][slab] = found.slope;
          slabs[1][slab] = found.offset;
          slabs[2][slab] = found.error;
        }
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < S; k++) {
        const int slab = own.packs > 0 ? p.slab_lines.div(own.lane * K + k) : 0;
        c[k] = {slabs[0][slab], slabs[1][slab], slabs[2][slab]};
      }
    }
    if (!LAYER && coefficients && leads(own)) {
#pragma unroll
      for (int k = 0; k < S; k++) {
        int within;
        const int slab = p.slab_lines.divmod(own.line + k, within);
        if (within != 0) continue;
        store(coefficients, slab, c[k], p);
      }
    }
    if (grad_x) {
      for_turns(own, [&](int n) {
        if (HELD) gradient.load_again(affine, own, n, p);
        gradient.store(grad_x, c, affine, own, n, p);
      });
    }
    if (LAYER && partials) columns.add(gradient, c[0].error, own);
  }
  if (LAYER && partials) columns.store(partials, blockIdx.x, 0, scratch, p);
}

#else
// partials[split][Σg, Σgd or Σd][line]; in a layer Σγg, Σγgd and Σd
extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS)
group_norm_bwd_sums(const T* __restrict__ grad_y, const T* __restrict__ x, const P* __restrict__ weight,
                    const P* __restrict__ bias, const A* __restrict__ mean, const A* __restrict__ rstd,
                    A* __restrict__ partials, GroupNormParams p) {
  __shared__ A scratch[SCRATCH];
  __shared__ __align__(16) Stage stage;
  int line_block;
  const int split = p.line_blocks.divmod(blockIdx.x, line_block);
  const Owner own = owner(line_block, split, p);
  Gradient gradient;
  __shared__ SharedAffine shared_affine;
  Affine affine;
  A s[3 * K];
  gradient.load_statistics(mean, rstd, own, p);
  affine.share(weight, nullptr, shared_affine, split, p);
  if (!LAYER) affine.load(weight, bias, own, 0, p);
#pragma unroll
  for (int i = 0; i < 3 * K; i++) s[i] = A(0);
  for_turns(own, [&](int n) {
    gradient.load(grad_y, x, affine, stage, own, n, p);
    gradient.add_to(s, affine, own, n);
  });
  sum_team(s, scratch);
  if (!leads(own)) return;
#pragma unroll
  for (int q = 0; q < 3; q++) {
    A line_sums[K];
#pragma unroll
    for (int k = 0; k < K; k++) line_sums[k] = s[q * K + k];
    store_as(partials + ((Index)split * 3 + q) * p.lines + own.line, line_sums);
  }
}

// One warp a slab.
extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS)
group_norm_bwd_merge(const A* __restrict__ partials, const P* __restrict__ weight, const A* __restrict__ rstd,
                     A* __restrict__ coefficients, GroupNormParams p) {
  const int slab = blockIdx.x * WARPS + threadIdx.x / 32;
  if (slab >= p.slab_lines.div(p.lines)) return;
  const int size = p.slab_lines.divisor, line = slab * size;
  int channel;
  p.image_lines.divmod(line, channel);
  A sums[3] = {A(0), A(0), A(0)};
  for (int i = threadIdx.x % 32; i < size * (int)p.splits.divisor; i += 32) {
    int within;
    const int split = p.slab_lines.divmod(i, within);
    const A w = !LAYER && weight ? convert<A>(weight[channel + within]) : A(1);
    const A* part = partials + (Index)split * 3 * p.lines + line + within;
    sums[0] += w * part[0];
    sums[1] += w * part[p.lines];
    sums[2] += part[2 * (Index)p.lines];
  }
  sum_neighbours<32, THREADS>(sums, (A*)nullptr);
  if (threadIdx.x % 32 != 0) return;
  store(coefficients, slab, coefficients_of(sums, rstd[slab], p), p);
}

// A layer also writes partials, as `Columns` does.
extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS)
group_norm_bwd_apply(const T* __restrict__ grad_y, const T* __restrict__ x, const P* __restrict__ weight,
                     const P* __restrict__ bias, const A* __restrict__ mean, const A* __restrict__ rstd,
                     const A* __restrict__ coefficients, T* __restrict__ grad_x, A* __restrict__ partials,
                     GroupNormParams p) {
  __shared__ A scratch[LAYER ? COLUMN_SCRATCH : 1];
  __shared__ __align__(16) Stage stage;
  int walker;
  const int split = p.walkers.divmod(gridDim.x - 1 - blockIdx.x, walker);
  Columns columns;
  columns.clear();
  __shared__ SharedAffine shared_affine;
  Affine affine;
  affine.share(weight, nullptr, shared_affine, split, p);
#pragma unroll 1
  for (int line_block = walker; line_block < (int)p.line_blocks.divisor; line_block += (int)p.walkers.divisor) {
    const Owner own = owner(line_block, split, p);
    Gradient gradient;
    gradient.load_statistics(mean, rstd, own, p);
    if (!LAYER) affine.load(weight, bias, own, 0, p);
    A slope[S], shift[S], error[S];
    load_statistic(slope, coefficients, own, p);
    load_statistic(shift, coefficients + slabs_of(p), own, p);
    load_statistic(error, coefficients + 2 * slabs_of(p), own, p);
    Coefficients c[S];
#pragma unroll
    for (int k = 0; k < S; k++) c[k] = {slope[k], shift[k], error[k]};
    for_turns(own, [&](int n) {
      gradient.load(grad_y, x, affine, stage, own, n, p);
      if (grad_x) gradient.store(grad_x, c, affine, own, n, p);
    });
    if (LAYER && partials) columns.add(gradient, c[0].error, own);
  }
  if (LAYER && partials) columns.store(partials, walker, split, scratch, p);
}
#endif

// The gradients of 8 parameters, from the partials of a group's lines or of a layer's blocks.
extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS)
group_norm_bwd_params(const A* __restrict__ partials, const A* __restrict__ rstd, const A* __restrict__ coefficients,
                      P* __restrict__ grad_weight, P* __restrict__ grad_bias, GroupNormParams p) {
  constexpr int TOGETHER = 8;
  __shared__ A scratch[rows_scratch<TOGETHER, THREADS>(2)];
  const int splits = p.splits.divisor, parameters = LAYER ? p.sites * V : p.image_lines.divisor;
  const int places = LAYER ? splits * PACKS * V * TEAM : parameters;
  const int place = blockIdx.x * TOGETHER + threadIdx.x % TOGETHER;
  const int parts = LAYER ? p.walkers.divisor : p.lines / parameters * splits;
  A s[2] = {A(0), A(0)};
  if (place < places) {
#pragma unroll 4
    for (int part = threadIdx.x / TOGETHER; part < parts; part += THREADS / TOGETHER) {
      if (LAYER) {
        const A* from = partials + (Index)part * 2 * places + place;
        s[0] += from[0];
        s[1] += from[places];
      } else {
        int split;
        const int line = p.splits.divmod(part, split) * parameters + place, slab = p.slab_lines.div(line);
        const A* from = partials + (Index)split * 3 * p.lines + line;
        s[0] += from[0];
        s[1] += (from[p.lines] - coefficients[2 * slabs_of(p) + slab] * from[0]) * rstd[slab];
      }
    }
  }
  sum_rows<TOGETHER, THREADS>(s, scratch, [&](int n, int column, A sum) {
    const int found = blockIdx.x * TOGETHER + column, parameter = LAYER ? column_value(found) : found;
    P* to = n == 0 ? grad_bias : grad_weight;
    if (to && found < places && parameter < parameters) to[parameter] = convert<P>(sum);
  });
}
#endif
