// Convolution as an implicit matrix product on Hopper's tensor cores (wgmma, sm_90a): the output and both gradients
// over one to three axes, any stride, padding and dilation, channels-last, fp16 and bf16; the output and the input
// gradient of fp32 as TF32, too. What it computes is what conv_igemm.cu computes; what lies in another way, or has
// channels that are no multiple of eight (groups: of sixteen), stays there.
//
// Maths, roles, phases and places: implicit_gemm.cuh. What fprop and dgrad write is act(scale · sum + bias + residual),
// see epilogue.cuh; fprop may gather its channels' moments (statistics.cuh).
//
//              rows                          columns   a stage: 128 bytes of steps       A: gathered        B: plain
//     fprop    places n,p,q                  k         channels of a tap, or of several  x, K-major         w, K-major
//     dgrad    places n,h,w of a phase       c         the same of grad_y                grad_y, K-major    w, MN-major
//     wgrad    channels of a tap, panel      k         64 places                         x, MN-major        grad_y,
//              by panel                                                                                     MN-major
//
// Cluster. CLUSTER blocks have neighbouring tiles of rows and the same columns. Each copies its share of B and
// multicasts it, so that B comes from L2 once a cluster; a slot is given back to the producers of all of them.
//
// Roles. Three warpgroups. The first gives its registers away, and one thread of it walks the tiles' stages and asks
// for copies (produce). The two others own half of a tile's rows each, multiply, and write (consume). All walk the same
// tiles in the same order and meet in a ring of STAGES slots by two mbarriers a slot:
//
//     producer    wait empty[s] ─▶ expect bytes at full[s] ─▶ TMA: gathered, plain ─▶ slot s + 1
//     consumers   wait full[s] ─▶ wgmma on s, commit ─▶ wait for the wgmma of s - 1 ─▶ arrive at empty[s - 1]
//
//     time ──▶    copies     │ t0 s0 │ t0 s1 │ t0 s2 │ t1 s0 │ t1 s1 │ t1 s2 │ t2 s0 …
//                 products           │ t0 s0 │ t0 s1 │ t0 s2 │ ····· │ t1 s0 │ t1 s1 …
//                 results                                    │  t0   │
//                 stores                                             │  t0 ──────▶
//
// So one product is always in flight while the next one's operands are checked for, copies run ahead by up to STAGES
// stages, across tiles too, and the stores of a tile run beside the next one's main loop.
//
// Grid. Persistent: a block a multiprocessor, which takes every gridDim-th tile. Columns come fastest, then groups,
// phases, parts of the sum, and rows slowest: blocks that run together read the same gathered rows, and meet in L2.
//
// Gathered operand. TMA walks the places itself: an im2col map has the lowest corner that a window has, the step from
// place to place and the corner of the last place of a line, so that 128 places from any first one on are one copy,
// lines and images included; the tap is an offset, and what is outside of the image arrives as zero. The map of dgrad
// is that of its phases together: windows begin at the `lowest` of all, and a phase's own begin is part of the offset.
// Where all taps are one and places lie evenly (1x1), a plain map of channels x places does the same.
//
// Stage. CHUNK channels (64, 32 or 16; of fp32 half of that) are a line of 128, 64 or 32 bytes, swizzled by as much;
// narrow ones take several taps a stage, so that its steps are full. Units of channels and taps are numbered with taps
// fastest: a block reads its places' channels at all taps before it goes on, while they are in L2. A unit beyond the
// last one is asked for beyond the last channel: zeros, of either operand.
//
// wgrad sums over places. A unit is then a panel of CHUNK channels at one tap: 64 places, one a line, channels
// contiguous, which wgmma takes as A transposed (MN-major), as it takes grad_y as B. Rows are panels, so no row is of
// two taps. Parts of the sum are added up by conv_reduce_direct in a fixed order.
//
// TF32. wgmma would truncate what TMA brought, which is biased; so A passes through registers (ldmatrix), where it is
// rounded to nearest, and B, the filters, are packed once a call by conv_pack_sm90, rounded, with the summed channel
// fastest, since wgmma knows no other order of fp32. For wgrad that would be both operands: it stays in conv_igemm.cu.
// Filters of half types are packed where their channels are not contiguous (K C R S).
//
// Way out. Sums meet factor and bias in registers. STORE_TILES: residual and activation, too; then each warpgroup puts
// its rows into shared memory, swizzled so that neither its words nor TMA's lines meet a bank twice, and one thread
// stores them by TMA, which leaves out what is beyond the last place or channel. Otherwise (phases, parts of the sum,
// wgrad, results with gaps) pairs or single elements go from registers to the addresses in `targets`.
//
// Order of sums. wgmma's own within 16 (8) steps; stages one after another: the same bits on every run. No atomics.
//
// PTX relied on. mbarrier: a phase ends when all have arrived and all expected bytes have come, and who waited sees
// both; boxes count in full, zeros included. wgmma reads by the async proxy what TMA wrote by it: no fence between. A
// slot may be written again when the wgmma that read it have been waited for (by each warp: eight arrivals a block).
// wgmma.fence before the first product after registers were touched. fence.proxy.async between a warpgroup's stores to
// shared memory and TMA's reading of them; bulk_wait_read before they are overwritten, and before the block ends.
//
// Constants. PASS ELEMENT ACCUMULATOR RESULT DIMS WIDE PADDING (implicit_gemm.cuh); ACTIVATION, none where partial
//   results are written, for fprop and dgrad
//   BLOCK_M BLOCK_N CHUNK STAGES CLUSTER; POINTWISE: the gathered operand has a plain map
//   PLAIN_ALONG_STEPS: B is K-major; STORE_TILES; MOMENTS: 1 where fprop gathers them
//
// Least: x, w and y are moved once, and 2 N·P·Q·K·C·R·S operations done, over groups where there are some.
// Cost, of a stage of 128 x 256 x 64 in a half type: 1024 cycles of wgmma, 48 KB from L2 (48 bytes a cycle); three
// stages hold 3072 cycles against the some 1000 that a copy is on its way. Bytes and cycles of all tiles, and what
// that makes of every layer: bench/notes.md.
#define PACK 6  // a value of PASS
#include "implicit_gemm.cuh"
#include "moments.cuh"
#include "ptx_cluster.cuh"
#include "ptx_sm90.cuh"
#include "tensor_tile.cuh"

#if PASS == PACK
// The filters as groups x rows (the product's columns) x taps x channels, the summed channel fastest; fp32 rounded to
// TF32. p.numel: how many elements that makes.
DEVICE float packed(float v) { return __uint_as_float(float_to_tf32(v)); }
template <class H> DEVICE H packed(H v) { return v; }

extern "C" __global__ void __launch_bounds__(256)
conv_pack_sm90(const T* __restrict__ w, T* __restrict__ out, const Params p) {
  const long long i = blockIdx.x * 256ll + threadIdx.x;
  if (i >= p.numel) return;
  int c, tap;
  int rest = p.channels.divmod((int)i, c);
  Offset from = c * (Offset)p.filter.channel;
#pragma unroll
  for (int a = DIMS - 1; a >= 0; a--) {
    tap = rest % p.taps[a], rest /= p.taps[a];
    from += tap * (Offset)p.filter.tap[a];
  }
  from += rest % p.outputs * (Offset)p.filter.row + rest / p.outputs * (Offset)p.filter.group;
  out[i] = packed(w[from]);
}
#else

constexpr int BM = BLOCK_M, BN = BLOCK_N;
constexpr bool TF32 = sizeof(T) == 4;
constexpr int GROUPS_OF_WARPS = 2;                         // that multiply
constexpr int CONSUMERS = 128 * GROUPS_OF_WARPS, THREADS = CONSUMERS + 128;
constexpr int WM = BM / GROUPS_OF_WARPS;                   // rows of a warpgroup, in products of 64
constexpr int MMA_K = 32 / sizeof(T);
constexpr int STEP = PASS == WGRAD ? 64 : 128 / sizeof(T); // steps of a stage
constexpr int UNITS = (PASS == WGRAD ? BM : STEP) / CHUNK; // copies of the gathered operand
// Columns that lie side by side where operands or results are copied by lines of them: all, or so many at most.
DEVICE constexpr int panel_of(int most) { return BN % most == 0 ? most : panel_of(most / 2); }
constexpr int PANEL = panel_of(64);

// Bytes: of a line, of a unit of a stage, of an operand's part of it.
constexpr int A_LINE = CHUNK * sizeof(T), A_UNIT = (PASS == WGRAD ? STEP : BM) * A_LINE;
constexpr int B_LINE = PLAIN_ALONG_STEPS ? A_LINE : PANEL * (int)sizeof(T);
constexpr int B_UNITS = PASS == WGRAD ? 1 : UNITS, B_STEPS = STEP / B_UNITS;
constexpr int B_PANEL = (PLAIN_ALONG_STEPS ? BN : B_STEPS) * B_LINE;
constexpr int B_UNIT = BN * B_STEPS * sizeof(T);
constexpr int A_BYTES = UNITS * A_UNIT, B_BYTES = B_UNITS * B_UNIT, STAGE_BYTES = A_BYTES + B_BYTES;

DEVICE constexpr Swizzle swizzle_of(int line) {
  return line == 128 ? SWIZZLE_128B : line == 64 ? SWIZZLE_64B : SWIZZLE_32B;
}
static_assert(WM % 64 == 0 && BN % PANEL == 0 && STEP % CHUNK == 0, "wgmma fills the tile");
static_assert(A_LINE == 128 || A_LINE == 64 || A_LINE == 32, "a line is a swizzle's");
static_assert(A_UNIT % 1024 == 0 || A_UNIT % (8 * A_LINE) == 0, "units begin where a swizzle does");
static_assert(B_PANEL % (8 * B_LINE) == 0 && B_UNIT % B_PANEL == 0, "panels begin where a swizzle does");
static_assert(CLUSTER == 1 || (!TF32 && (PLAIN_ALONG_STEPS ? BN % (8 * CLUSTER) == 0 : BN / PANEL >= CLUSTER)),
              "every block of a cluster has a share of B");
static_assert(!TF32 || (PASS != WGRAD && PLAIN_ALONG_STEPS), "wgmma takes fp32 K-major only");

constexpr unsigned short ALL_RANKS = (1 << CLUSTER) - 1;
#define FIRST_TILE ((int)blockIdx.x / CLUSTER)
#define TILES_APART ((int)gridDim.x / CLUSTER)
#define METHOD __device__ __forceinline__

// One tile: what all roles decode of its number, which the blocks of a cluster share: theirs are the rows of
// neighbouring tiles.
struct Tile {
  Work work;
  int group, part, m0, n0, begin, end;  // of the sum's parts, which; stages

  METHOD Tile(const Params& p, int number) {
    int phase, column;
    int rest = p.tiles.divmod(number, column);
    rest = p.groups.divmod(rest, group);
    rest = p.phases.divmod(rest, phase);
    m0 = (p.splits.divmod(rest, part) * CLUSTER + (int)cluster_rank()) * BM, n0 = column * BN;
    work = work_on(p, group, phase);
    const int stages = PASS == WGRAD ? ceil_div(p.places, STEP) : ceil_div(units(p), UNITS);
    const int share = ceil_div(stages, (int)p.splits.divisor);
    begin = part * share, end = min_of(stages, begin + share);
  }
  // Chunks of channels at all taps.
  METHOD int units(const Params& p) const { return work.entries / (int)p.channels.divisor * chunks(p); }
  METHOD static int chunks(const Params& p) { return ceil_div((int)p.channels.divisor, CHUNK); }
  METHOD static int count(const Params& p) {
    int rows = p.places;
    if (PASS == WGRAD) {
      rows = chunks(p) * CHUNK;
      for (int a = 0; a < DIMS; a++) rows *= p.taps[a];
    }
    return (int)(p.tiles.divisor * p.groups.divisor * p.phases.divisor * p.splits.divisor) *
           ceil_div(rows, BM * CLUSTER);
  }
};

// A unit: CHUNK channels at one tap.
struct Unit {
  int tap[DIMS], chunk;

  METHOD Unit(const Work& work, int number) {
#pragma unroll
    for (int a = DIMS - 1; a >= 0; a--) {
      const int taps = max(work.taps[a], 1);
      tap[a] = number % taps, number /= taps;
    }
    chunk = number;
  }
  METHOD void advance(const Work& work) {
#pragma unroll
    for (int a = DIMS - 1; a >= 0; a--) {
      if (++tap[a] < work.taps[a]) return;
      tap[a] = 0;
    }
    chunk++;
  }
  // Of the filter, all of whose taps are one axis of its map.
  METHOD int filter_tap(const Params& p, const Work& work) const {
    int number = 0;
#pragma unroll
    for (int a = 0; a < DIMS; a++) number = number * p.taps[a] + work.first[a] + tap[a] * p.tap_step[a];
    return number;
  }
};

// Where the ring stands. Producer and consumers each have their own, and advance it alike.
struct Ring {
  unsigned tiles, full, empty;  // shared addresses
  int slot = 0;
  unsigned parity = 0;          // of the round

  METHOD unsigned a_tile() const { return tiles + slot * STAGE_BYTES; }
  METHOD unsigned b_tile() const { return a_tile() + A_BYTES; }
  METHOD unsigned full_barrier() const { return full + slot * (unsigned)sizeof(Mbarrier); }
  METHOD unsigned empty_barrier() const { return empty + slot * (unsigned)sizeof(Mbarrier); }
  METHOD void advance() {
    if (++slot < STAGES) return;
    slot = 0, parity ^= 1;
  }
};

// ---- producer -------------------------------------------------------------------------------------------
// The lowest source coordinate of a window along axis a: where the map's walk over places begins.
DEVICE int lowest(const Params& p, int a) {
  return PASS == DGRAD ? floor_div(p.pad[a] - (p.taps[a] - 1) * p.dilation[a], p.stride[a]) : -p.pad[a];
}

// A place by its index along each axis and its image.
struct Place {
  int at[DIMS], image;
  METHOD Place(const Params& p, int number) {
#pragma unroll
    for (int a = DIMS - 1; a >= 0; a--) number = p.count[a].divmod(number, at[a]);
    image = number;
  }
};

// Copies channels from c on of so many places as the map says: of the first one's window the corner, and `offset`
// further; to all blocks of the cluster if it is to be SHARED.
template <bool SHARED>
DEVICE void copy_places(unsigned tile, const TensorMap& map, unsigned barrier, int c, const int (&corner)[DIMS],
                        int image, const int (&offset)[DIMS]) {
  unsigned short by[DIMS];
#pragma unroll
  for (int a = 0; a < DIMS; a++) by[a] = (unsigned short)offset[a];
  if constexpr (DIMS == 1) {
    if constexpr (SHARED) tma_load_im2col_multicast(tile, map, barrier, c, corner[0], image, by[0], ALL_RANKS);
    else tma_load_im2col(tile, map, barrier, c, corner[0], image, by[0]);
  } else if constexpr (DIMS == 2) {
    if constexpr (SHARED)
      tma_load_im2col_multicast(tile, map, barrier, c, corner[1], corner[0], image, by[1], by[0], ALL_RANKS);
    else tma_load_im2col(tile, map, barrier, c, corner[1], corner[0], image, by[1], by[0]);
  } else {
    if constexpr (SHARED)
      tma_load_im2col_multicast(tile, map, barrier, c, corner[2], corner[1], corner[0], image, by[2], by[1], by[0],
                                ALL_RANKS);
    else tma_load_im2col(tile, map, barrier, c, corner[2], corner[1], corner[0], image, by[2], by[1], by[0]);
  }
}

DEVICE void copy_gathered(unsigned tile, const TensorMap& map, unsigned barrier, const Params& p, const Tile& t,
                          const Unit& unit, int first, const Place& place) {
  const int channels = (int)p.channels.divisor, groups = (int)p.groups.divisor;
  const int c = unit.chunk * CHUNK < channels ? t.group * channels + unit.chunk * CHUNK : groups * channels;
  if constexpr (POINTWISE) {
    tma_load(tile, map, barrier, c, first);
  } else {
    int corner[DIMS], offset[DIMS];
#pragma unroll
    for (int a = 0; a < DIMS; a++) {
      const int low = lowest(p, a);
      corner[a] = low + place.at[a] * (PASS == DGRAD ? 1 : p.stride[a]);
      offset[a] = t.work.origin[a] + unit.tap[a] * p.reach[a] - low;
    }
    copy_places<false>(tile, map, barrier, c, corner, place.image, offset);
  }
}

// The plain operand's share of this block, for all blocks of the cluster: of rows (K-major) or of panels.
DEVICE void copy_plain(unsigned tile, const TensorMap& map, unsigned barrier, int c0, int c1, int c2) {
  if constexpr (CLUSTER > 1) tma_load_multicast(tile, map, barrier, c0, c1, c2, ALL_RANKS);
  else tma_load(tile, map, barrier, c0, c1, c2);
}

DEVICE void produce(Ring ring, const TensorMap& gathered, const TensorMap& plain, const Params& p) {
  const int tiles = Tile::count(p), rank = (int)cluster_rank();
  for (int number = FIRST_TILE; number < tiles; number += TILES_APART) {
    const Tile t(p, number);
    const int outputs = p.outputs, channels = (int)p.channels.divisor;
    Unit unit(t.work, PASS == WGRAD ? t.m0 / CHUNK : t.begin * UNITS);
    int first = t.m0;
    for (int stage = t.begin; stage < t.end; stage++) {
      if (PASS == WGRAD) first = stage * STEP;
      const Place place(p, first);
      const unsigned full = ring.full_barrier(), a_tile = ring.a_tile(), b_tile = ring.b_tile();
      if constexpr (CLUSTER > 1) mbarrier_wait_cluster(ring.empty_barrier(), ring.parity ^ 1);
      else mbarrier_wait(ring.empty_barrier(), ring.parity ^ 1);
      mbarrier_arrive_expect_tx(full, STAGE_BYTES);
      Unit at = unit;
#pragma unroll 1
      for (int u = 0; u < UNITS; u++) {
        copy_gathered(a_tile + u * A_UNIT, gathered, full, p, t, at, first, place);
        if constexpr (PASS != WGRAD) {
          const int tap = at.filter_tap(p, t.work), c = at.chunk * CHUNK;
          if constexpr (PLAIN_ALONG_STEPS) {
            constexpr int SHARE = BN / CLUSTER;
            copy_plain(b_tile + u * B_UNIT + rank * SHARE * B_LINE, plain, full, c, tap,
                       t.group * outputs + t.n0 + rank * SHARE);
          } else {
            // The summed channel counts the filters of all groups: beyond this one's, beyond all.
            const int k = c < channels ? t.group * channels + c : (int)p.groups.divisor * channels;
            for (int n = rank * PANEL; n < BN; n += CLUSTER * PANEL)
              copy_plain(b_tile + u * B_UNIT + n / PANEL * B_PANEL, plain, full, t.n0 + n, tap, k);
          }
        }
        at.advance(t.work);
      }
      if constexpr (PASS == WGRAD) {
        const int none[DIMS] = {};
        for (int n = rank * PANEL; n < BN; n += CLUSTER * PANEL)
          copy_places<(CLUSTER > 1)>(b_tile + n / PANEL * B_PANEL, plain, full, t.group * outputs + t.n0 + n, place.at,
                                     place.image, none);
      } else {
        unit = at;
      }
      ring.advance();
    }
  }
}

// ---- consumers ------------------------------------------------------------------------------------------
constexpr int ROUNDS = WM / 64;
using Sums = float[ROUNDS][BN / 2];

// Descriptors of 32 bytes of steps, the `k`-th of the stage: of A for 64 rows from `row` on, and of B.
DEVICE unsigned long long describe_a(unsigned tile, int row, int k) {
  constexpr Swizzle swizzle = swizzle_of(A_LINE);
  if constexpr (PASS == WGRAD)
    return wgmma_descriptor(tile + row / CHUNK * A_UNIT + k * MMA_K * A_LINE, A_UNIT, 8 * A_LINE, swizzle);
  else
    return wgmma_descriptor(tile + k * MMA_K / CHUNK * A_UNIT + row * A_LINE + k * MMA_K % CHUNK * (int)sizeof(T), 0,
                            8 * A_LINE, swizzle);
}
DEVICE unsigned long long describe_b(unsigned tile, int k) {
  constexpr Swizzle swizzle = swizzle_of(B_LINE);
  const int unit = k * MMA_K / B_STEPS, within = k * MMA_K % B_STEPS;
  if constexpr (PLAIN_ALONG_STEPS)
    return wgmma_descriptor(tile + unit * B_UNIT + within * (int)sizeof(T), 0, 8 * B_LINE, swizzle);
  else
    return wgmma_descriptor(tile + unit * B_UNIT + within * B_LINE, B_PANEL, 8 * B_LINE, swizzle);
}

// A's registers for wgmma (ptx_sm90.cuh), rounded to TF32: 64 rows from `row` on, of which a warp has 16.
DEVICE void load_a(unsigned (&a)[4], unsigned tile, int row, int k) {
  const int warp = (int)threadIdx.x / 32 % 4, lane = (int)threadIdx.x % 32, i = lane % 8, j = lane / 8;
  const int unit = k * MMA_K / CHUNK, within = k * MMA_K % CHUNK;
  const unsigned line = tile + unit * A_UNIT + (row + warp * 16 + j % 2 * 8 + i) * A_LINE;
  ldmatrix(a, swizzled(line + within * (int)sizeof(T) + j / 2 * 16, swizzle_of(A_LINE)));
#pragma unroll
  for (int v = 0; v < 4; v++) a[v] = float_to_tf32(__uint_as_float(a[v]));
}

// One stage's products, issued and committed.
DEVICE void multiply(Sums& sums, const Ring& ring, int row) {
  constexpr int STEPS = STEP / MMA_K;
  constexpr Major A_MAJOR = PASS == WGRAD ? MN_MAJOR : K_MAJOR, B_MAJOR = PLAIN_ALONG_STEPS ? K_MAJOR : MN_MAJOR;
  unsigned a[TF32 ? STEPS : 1][TF32 ? ROUNDS : 1][4];
  if constexpr (TF32) {
#pragma unroll
    for (int k = 0; k < STEPS; k++)
#pragma unroll
      for (int i = 0; i < ROUNDS; i++) load_a(a[k][i], ring.a_tile(), row + i * 64, k);
  }
#pragma unroll
  for (int i = 0; i < ROUNDS; i++) wgmma_pin(sums[i]);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < STEPS; k++) {
    const unsigned long long b = describe_b(ring.b_tile(), k);
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
      if constexpr (TF32) wgmma<T, B_MAJOR>(sums[i], a[k][i], b, true);
      else wgmma<T, A_MAJOR, B_MAJOR>(sums[i], describe_a(ring.a_tile(), row + i * 64, k), b, true);
    }
  }
  wgmma_commit();
  if constexpr (TF32) {  // the next stage's fragments go into the same registers
    wgmma_wait<0>();
  }
}

// Tells the producers of all blocks of the cluster, whose copies come here.
DEVICE void give_back(unsigned empty_barrier) {
  __syncwarp();  // a warp's other lanes have waited, too
  const unsigned lane = threadIdx.x % 32;
  if constexpr (CLUSTER > 1) {
    if (lane < CLUSTER) mbarrier_arrive_at(empty_barrier, lane);
  } else if (lane == 0) {
    mbarrier_arrive(empty_barrier);
  }
}

// The share of a warpgroup, from `row` on, which its threads number 0 to 127.
struct Consumer {
  int group, thread, warp, lane, row;

  METHOD Consumer() : group((int)threadIdx.x / 128 - 1), thread((int)threadIdx.x % 128), warp(thread / 32),
                      lane(thread % 32), row(group * WM) {}
  METHOD void meet() const { bar_sync(1 + group, 128); }
  // Of the tile: row and column of sums[i][4 j + v].
  METHOD int row_of(int i, int v) const { return row + i * 64 + warp * 16 + lane / 4 + v / 2 * 8; }
  METHOD int column_of(int j, int v) const { return j * 8 + lane % 4 * 2 + v % 2; }
};

#ifdef ACTIVATION
DEVICE void scale_and_shift(Sums& sums, const Consumer& own, const Tile& t, const Finish& finish, const Params& p) {
#pragma unroll
  for (int j = 0; j < BN / 8; j++)
#pragma unroll
    for (int v = 0; v < 2; v++) {
      const int n = t.n0 + own.column_of(j, v);
      if (n >= p.outputs) continue;
      const ScaleShift<A> scale_shift = ScaleShift<A>::of(finish.scale, finish.bias, t.group * p.outputs + n);
#pragma unroll
      for (int i = 0; i < ROUNDS; i++) {
        sums[i][j * 4 + v] = scale_shift(sums[i][j * 4 + v]);
        sums[i][j * 4 + v + 2] = scale_shift(sums[i][j * 4 + v + 2]);
      }
    }
}

// act(z + residual) of two neighbours, `residual` lying as the result does (null: none).
DEVICE void finish_pair(A (&z)[2], const T* residual) {
  if (residual) {
    A r[2];
    load_as(r, residual);
    z[0] += r[0], z[1] += r[1];
  }
  z[0] = activate<ACT>(z[0]), z[1] = activate<ACT>(z[1]);
}
#endif

#if STORE_TILES
constexpr int OUT_PANEL = panel_of(128 / sizeof(T)), OUT_LINE = OUT_PANEL * sizeof(T);
constexpr int OUT_BYTES = WM * BN * sizeof(T);  // of a warpgroup

#if MOMENTS
// Of the results as they are stored, and of the places that exist: a thread's own, a warp's, then the tile's.
DEVICE void gather_moments(const Sums& sums, unsigned char* scratch_bytes, const Consumer& own, const Tile& t,
                           const Finish& finish, const Params& p) {
  constexpr int WARPS = CONSUMERS / 32;
  struct Scratch { A counts[WARPS], means[WARPS][BN + 1], m2s[WARPS][BN + 1]; };
  static_assert(sizeof(Scratch) <= GROUPS_OF_WARPS * OUT_BYTES, "moments fit where results will lie");
  Scratch& scratch = *reinterpret_cast<Scratch*>(scratch_bytes);
  const int warp = own.group * 4 + own.warp;
  bar_sync(3, CONSUMERS);  // both warpgroups' former results have left
  const auto exists = [&](int r) { return t.m0 + own.row_of(r / 2, r % 2 * 2) < p.places; };
#pragma unroll
  for (int j = 0; j < BN / 8; j++)
#pragma unroll
    for (int v = 0; v < 2; v++) {
      const Moments<A> all = column_moments<T, 2 * ROUNDS>(
          [&](int r) { return sums[r / 2][j * 4 + r % 2 * 2 + v]; }, exists);
      if (own.lane < 4) {
        const int column = own.column_of(j, v);
        scratch.means[warp][column] = all.mean, scratch.m2s[warp][column] = all.m2;
        if (column == 0) scratch.counts[warp] = all.count;
      }
    }
  bar_sync(3, CONSUMERS);
  const int channels = (int)p.groups.divisor * p.outputs, first = t.group * p.outputs + t.n0;
  A* part = finish.moments + (long long)(t.m0 / BM) * 3 * channels + first;
  const int columns = min_of(BN, p.outputs - t.n0);
  for (int c = (int)threadIdx.x - 128; c < columns; c += CONSUMERS) {
    Moments<A> all{A(0), A(0), A(0)};
    for (int w = 0; w < WARPS; w++) all.merge(scratch.counts[w], scratch.means[w][c], scratch.m2s[w][c]);
    part[c] = all.count, part[channels + c] = all.mean, part[2 * channels + c] = all.m2;
  }
  bar_sync(3, CONSUMERS);
}
#endif

// Through shared memory, `out`, by TMA.
DEVICE void store_tile(Sums& sums, unsigned char* out, const TensorMap& map, const Consumer& own, const Tile& t,
                       const Finish& finish, const Params& p) {
  unsigned char* mine = out + own.group * OUT_BYTES;
  // 16-byte pieces of a line are exchanged by TMA's pattern, which repeats with eight rows.
  const int turn = own.lane / 4 / (128 / OUT_LINE) % (OUT_LINE / 16);
  if (own.thread == 0) bulk_wait_read<0>();  // the former tile's results have left
  own.meet();
#if MOMENTS
  gather_moments(sums, out, own, t, finish, p);
#endif
#pragma unroll
  for (int i = 0; i < ROUNDS; i++)
#pragma unroll
    for (int j = 0; j < BN / 8; j++)
#pragma unroll
      for (int v = 0; v < 4; v += 2) {
        const int row = own.row_of(i, v), column = own.column_of(j, 0), m = t.m0 + row, n = t.n0 + column;
        A z[2] = {sums[i][j * 4 + v], sums[i][j * 4 + v + 1]};
        const bool inside = m < p.places && n < p.outputs;
        const Offset at = t.work.result + m * (Offset)p.result.axis[DIMS - 1] + n;
        finish_pair(z, finish.residual && inside ? finish.residual + at : nullptr);
        const int in_line = (j * 8 % OUT_PANEL + own.lane % 4 * 2) * (int)sizeof(T);
        unsigned char* line = mine + j * 8 / OUT_PANEL * (WM * OUT_LINE) + (row - own.row) * OUT_LINE;
        store_as(reinterpret_cast<T*>(line + (in_line / 16 ^ turn) * 16 + in_line % 16), z);
      }
  fence_proxy_async();
  own.meet();
  if (own.thread == 0) {
    const unsigned base = shared_address(mine);
    for (int n = 0; n < BN; n += OUT_PANEL)
      if (t.n0 + n < p.outputs && t.m0 + own.row < p.places)
        tma_store(map, base + n / OUT_PANEL * (WM * OUT_LINE), t.n0 + n, t.group, t.m0 + own.row);
    bulk_commit();
  }
}
#else
// Where the results of row m go.
DEVICE Offset target_of(const Params& p, const Tile& t, int m) {
  if constexpr (PASS != WGRAD) return place_at(p, t.work, m).other;
  const Unit unit(t.work, m / CHUNK);
  const int c = unit.chunk * CHUNK + m % CHUNK;
  return c < (int)p.channels.divisor ? entry_at(p, t.work, c, unit.tap).other : NOWHERE;
}

// From registers to the addresses of rows, `targets`.
DEVICE void store_rows(Sums& sums, Offset* targets, Result* __restrict__ out, const Consumer& own, const Tile& t,
                       const Finish& finish, const Params& p) {
  own.meet();  // the former tile's are no longer read
  if (own.thread < WM) {
    const int m = t.m0 + own.row + own.thread;
    targets[own.row + own.thread] = target_of(p, t, m);
  }
  own.meet();
  out += t.part * p.numel;
#pragma unroll
  for (int i = 0; i < ROUNDS; i++)
#pragma unroll
    for (int v = 0; v < 4; v += 2) {
      const Offset target = targets[own.row_of(i, v)];
#pragma unroll
      for (int j = 0; j < BN / 8; j++) {
        const int n = t.n0 + own.column_of(j, 0);
        if (target < 0 || n >= p.outputs) continue;
        A z[2] = {sums[i][j * 4 + v], sums[i][j * 4 + v + 1]};
#ifdef ACTIVATION
        finish_pair(z, finish.residual ? finish.residual + target + n : nullptr);
        store_as(out + target + n, z);
#else
        out[target + n * (Offset)p.filter.row] = convert<Result>(z[0]);
        out[target + (n + 1) * (Offset)p.filter.row] = convert<Result>(z[1]);
#endif
      }
    }
}
#endif

DEVICE void consume(Ring ring, unsigned char* out_tile, Offset* targets, Result* out, const TensorMap* out_map,
                    const Finish& finish, const Params& p) {
  const Consumer own;
  const int tiles = Tile::count(p);
  for (int number = FIRST_TILE; number < tiles; number += TILES_APART) {
    const Tile t(p, number);
    Sums sums = {};
    unsigned former = 0;
    for (int stage = t.begin; stage < t.end; stage++) {
      mbarrier_wait(ring.full_barrier(), ring.parity);
      multiply(sums, ring, own.row);
      if constexpr (!TF32) wgmma_wait<1>();
#pragma unroll
      for (int i = 0; i < ROUNDS; i++) wgmma_pin(sums[i]);
      if constexpr (TF32) give_back(ring.empty_barrier());
      else if (stage > t.begin) give_back(former);
      former = ring.empty_barrier();
      ring.advance();
    }
    if constexpr (!TF32) {
      wgmma_wait<0>();
#pragma unroll
      for (int i = 0; i < ROUNDS; i++) wgmma_pin(sums[i]);
      if (t.end > t.begin) give_back(former);
    }
#ifdef ACTIVATION
    scale_and_shift(sums, own, t, finish, p);
#endif
#if STORE_TILES
    store_tile(sums, out_tile, *out_map, own, t, finish, p);
#else
    store_rows(sums, targets, out, own, t, finish, p);
#endif
  }
#if STORE_TILES
  if (own.thread == 0) bulk_wait_read<0>();
#endif
}

DEVICE void product(const TensorMap& gathered, const TensorMap& plain, const TensorMap* out_map, Result* out,
                    const Finish& finish, const Params& p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ Mbarrier full[STAGES], empty[STAGES];
  __shared__ Offset targets[STORE_TILES ? 1 : BM];
  const Ring ring{shared_address(shared), shared_address(full), shared_address(empty)};
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      mbarrier_init(shared_address(&full[s]), 1);
      mbarrier_init(shared_address(&empty[s]), CONSUMERS / 32 * CLUSTER);
    }
    fence_mbarrier_init();
    tma_prefetch(gathered);
    tma_prefetch(plain);
  }
  if constexpr (CLUSTER > 1) cluster_sync();
  else __syncthreads();
  if (threadIdx.x < 128) {
    setmaxnreg_dec<56>();
    if (threadIdx.x < 32 && elect_one()) produce(ring, gathered, plain, p);
  } else {
    setmaxnreg_inc<224>();
    consume(ring, shared + STAGES * STAGE_BYTES, targets, out, out_map, finish, p);
  }
  if constexpr (CLUSTER > 1) {  // copies and arrivals of the others have come
    __syncwarp();
    cluster_sync();
  }
}

#define MAP const __grid_constant__ TensorMap
#if PASS == FPROP && STORE_TILES
extern "C" __global__ void __launch_bounds__(THREADS, 1) __cluster_dims__(CLUSTER, 1, 1)
conv_fprop_sm90(const T* __restrict__ x, const T* __restrict__ w, const T* __restrict__ scale,
                const T* __restrict__ bias, const T* __restrict__ residual, Result* __restrict__ y,
                A* __restrict__ moments, MAP x_map, MAP w_map, MAP y_map, const __grid_constant__ Params p) {
  product(x_map, w_map, &y_map, y, {scale, bias, residual, moments}, p);
}
#elif PASS == FPROP
extern "C" __global__ void __launch_bounds__(THREADS, 1) __cluster_dims__(CLUSTER, 1, 1)
conv_fprop_sm90(const T* __restrict__ x, const T* __restrict__ w, const T* __restrict__ scale,
                const T* __restrict__ bias, const T* __restrict__ residual, Result* __restrict__ y,
                A* __restrict__ moments, MAP x_map, MAP w_map, const __grid_constant__ Params p) {
  product(x_map, w_map, nullptr, y, {scale, bias, residual, moments}, p);
}
#elif PASS == DGRAD && STORE_TILES
extern "C" __global__ void __launch_bounds__(THREADS, 1) __cluster_dims__(CLUSTER, 1, 1)
conv_dgrad_sm90(const T* __restrict__ grad_y, const T* __restrict__ w, const T* __restrict__ scale,
                const T* __restrict__ bias, const T* __restrict__ residual, Result* __restrict__ grad_x,
                MAP grad_y_map, MAP w_map, MAP grad_x_map, const __grid_constant__ Params p) {
  product(grad_y_map, w_map, &grad_x_map, grad_x, {scale, bias, residual, nullptr}, p);
}
#elif PASS == DGRAD
extern "C" __global__ void __launch_bounds__(THREADS, 1) __cluster_dims__(CLUSTER, 1, 1)
conv_dgrad_sm90(const T* __restrict__ grad_y, const T* __restrict__ w, const T* __restrict__ scale,
                const T* __restrict__ bias, const T* __restrict__ residual, Result* __restrict__ grad_x,
                MAP grad_y_map, MAP w_map, const __grid_constant__ Params p) {
  product(grad_y_map, w_map, nullptr, grad_x, {scale, bias, residual, nullptr}, p);
}
#else
extern "C" __global__ void __launch_bounds__(THREADS, 1) __cluster_dims__(CLUSTER, 1, 1)
conv_wgrad_sm90(const T* __restrict__ grad_y, const T* __restrict__ x, Result* __restrict__ partial, MAP grad_y_map,
                MAP x_map, const __grid_constant__ Params p) {
  product(x_map, grad_y_map, nullptr, partial, {}, p);
}
#endif
#endif
