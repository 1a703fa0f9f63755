// Convolution on tensor cores of tensors whose planes are dense (NCHW): the output, and of stride 1 the input's gradient
// or a transposed convolution. fp16, bf16, and fp32 as TF32; one to three axes, any groups, padding and dilation.
//
// Maths. fprop and dgrad of implicit_gemm.cuh; what is written is act(scale · sum + bias + residual), see epilogue.cuh.
// With stride 1 dgrad is a correlation whose taps step backwards (REACH < 0).
//
// Why another kernel. In NCHW places are neighbours, not channels, so that conv_igemm.cu gathers a tile element by
// element, once for each tap: some 16 instructions each, R·S times. Here a block keeps a patch of the source in shared
// memory and multiplies it from there at all taps: an element is fetched once, by some 14 instructions.
//
// Tile. A block owns TILE_H x TILE_W places of one image (and depth), BLOCK_N channels of one group, and walks the
// source's channels in chunks of eight words (8 floats, or 8 pairs of neighbouring channels in half types), once for
// each tap along depth that is inside. A stage is the patch that the tile's windows cover, in eight planes,
//
//     PATCH_H = (TILE_H - 1)·STEP_H + (TAPS_H - 1)·|REACH_H| + 1, and PATCH_W likewise,
//
// and the filters' words for it, [tap][channel of the result][8]. While a stage is multiplied the next one's patch is
// on its way into registers, its filters into the other buffer; one barrier a stage.
//
// Fragments. mma's A wants, of a place, words t and t + 4: lane (g, t) reads plane t at the place's spot plus the tap's
// offset, a constant, as taps stand unrolled. Planes are PLANE words apart, 8 modulo 32, so that eight neighbouring
// places of four planes meet no bank twice (with STEP_W 2 every bank twice). B's two words lie side by side: filters are
// packed beforehand, by conv_pack_planes, as
//
//     packed[group][chunk][depth tap][tap][column, filled up to BLOCK_N][word: t, t + 4 for t = 0 to 3]
//
// rounded to TF32, or in pairs, with zeros for channels that are not there: R·S·C·K words, once a call.
//
// Way out: as conv_igemm.cu, along rows. Sums: one thread, in a fixed order; no parts, no atomics.
//
// Grid. One axis: column tiles fastest, then groups, tiles along w, h, depth, and images.
//
// Constants. PASS ELEMENT RESULT WIDE PADDING ACTIVATION; TILE_H TILE_W BLOCK_N WARPS_M WARPS_N RESIDENT; TAPS_H TAPS_W,
//   STEP_H STEP_W: source coordinates from a place to the next, REACH_H REACH_W: from a tap to the next; STORE_VECTOR.
//
// Cost of 3x3, a stage of 8 x 16 places x 64 channels in TF32: 576 mma of 16 x 8 x 8 a block, 900 cycles of an H100 by
// mma.sync, while 790 instructions are issued a warp, of which 336 multiply and read fragments. For as many products
// conv_igemm.cu issues half as many again with tiles of 128 channels, and more with narrower ones.
#include "padding.cuh"
#include "ptx_async.cuh"
#include "tensor_tile.cuh"

#define FPROP 0  // values of PASS
#define DGRAD 1
#define PACK 2

using T = ELEMENT;
constexpr bool HALF_TYPE = sizeof(T) == 2;
constexpr int WORD = HALF_TYPE ? 2 : 1;  // channels of a word

#if WIDE
typedef long long Offset;
#else
typedef int Offset;
#endif

struct Strides {
  long long batch, group, channel, axis[3];
};

struct Params {
  Strides source, result;
  long long filter_group, filter_row, filter_channel, filter_tap[3];  // row: along the result's channel
  FastDiv columns, groups, tiles_w, tiles_h, depths;                  // what a block's number is made of
  FastDiv words_tap, words_depth, words_chunk, words_group;           // of `packed`: from an index to what it is of
  int size[3];                                                        // of the source
  int limit[3];                                                       // of the result
  int origin[3];                                                      // source coordinate of the first place's first tap
  int taps_d, step_d, reach_d;
  int channels, outputs, chunks;  // of a group; chunks of eight words
  int padded;                     // columns of a group in `packed`
  int words;                      // of `packed`
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from the structure in conv_igemm_planes.py");

DEVICE unsigned as_word(float v, float) { return float_to_tf32(v); }
DEVICE unsigned as_word(half_t low, half_t high) { return low.bits | (unsigned)high.bits << 16; }
DEVICE unsigned as_word(bfloat_t low, bfloat_t high) { return low.bits | (unsigned)high.bits << 16; }

#if PASS == PACK
constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS)
conv_pack_planes(const T* __restrict__ w, unsigned* __restrict__ packed, const Params p) {
  const int at = (int)blockIdx.x * THREADS + (int)threadIdx.x;
  if (at >= p.words) return;
  int rest = at, depth, tap, group, chunk;
  group = p.words_group.divmod(rest, rest);
  chunk = p.words_chunk.divmod(rest, rest);
  depth = p.words_depth.divmod(rest, rest);
  tap = p.words_tap.divmod(rest, rest);
  const int column = rest / 8, word = rest % 8 / 2 + rest % 2 * 4;
  const T* from = w + group * p.filter_group + column * p.filter_row + depth * p.filter_tap[0] +
                  tap / TAPS_W * p.filter_tap[1] + tap % TAPS_W * p.filter_tap[2];
  T pair[2] = {};
#pragma unroll
  for (int i = 0; i < WORD; i++) {
    const int c = (chunk * 8 + word) * WORD + i;
    if (column < p.outputs && c < p.channels) pair[i] = from[c * p.filter_channel];
  }
  packed[at] = as_word(pair[0], pair[1]);
}

#else
using A = float;
using Result = RESULT;
constexpr Activation ACT = Activation::ACTIVATION;
constexpr int THREADS = 32 * WARPS_M * WARPS_N;
constexpr int BM = TILE_H * TILE_W, BN = BLOCK_N, WM = BM / WARPS_M, WN = BN / WARPS_N;
constexpr int TAPS = TAPS_H * TAPS_W;
DEVICE constexpr int magnitude(int a) { return a < 0 ? -a : a; }
constexpr int PATCH_H = (TILE_H - 1) * STEP_H + (TAPS_H - 1) * magnitude(REACH_H) + 1;
constexpr int PATCH_W = (TILE_W - 1) * STEP_W + (TAPS_W - 1) * magnitude(REACH_W) + 1;
constexpr int SPOTS = PATCH_H * PATCH_W;
constexpr int PLANE = ceil_div(SPOTS - 8, 32) * 32 + 8;  // words
constexpr int SHARE = ceil_div(SPOTS, THREADS);          // spots of a thread
constexpr int FILTERS = TAPS * BN * 8;                   // words of a stage
static_assert(TILE_W % 8 == 0 && WM % 16 == 0 && (WN == 8 || WN % 16 == 0), "mma fills the tile");
using Out = Slab<WM, WN, STORE_VECTOR, true>;
static_assert(THREADS / 32 * Out::FLOATS <= 2 * (8 * PLANE + FILTERS), "slabs fit into the buffers");

DEVICE void planes(const T* __restrict__ source, const unsigned* __restrict__ packed, const T* __restrict__ scale,
                   const T* __restrict__ bias, const T* __restrict__ residual, Result* __restrict__ out,
                   const Params& p) {
  extern __shared__ __align__(128) unsigned buffers[];  // two of filters, then two of patches
  __shared__ Offset targets[BM];
  unsigned* const filters = buffers;
  unsigned* const patches = buffers + 2 * FILTERS;
  const int tid = (int)threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;

  int n0, group, h0, w0, z, image, block = (int)blockIdx.x;
  block = p.columns.divmod(block, n0);
  block = p.groups.divmod(block, group);
  block = p.tiles_w.divmod(block, w0);
  block = p.tiles_h.divmod(block, h0);
  image = p.depths.divmod(block, z);
  n0 *= BN, h0 *= TILE_H, w0 *= TILE_W;

  for (int m = tid; m < BM; m += THREADS) {
    const int h = h0 + m / TILE_W, w = w0 + m % TILE_W;
    const Offset to = image * (Offset)p.result.batch + group * (Offset)p.result.group +
                      z * (Offset)p.result.axis[0] + h * (Offset)p.result.axis[1] + w * (Offset)p.result.axis[2];
    targets[m] = h < p.limit[1] && w < p.limit[2] ? to : (Offset)-1;
  }

  // Where this thread's spots of a plane lie in the source, in the first channel at depth 0; -1: nowhere.
  source += image * (Offset)p.source.batch + group * (Offset)p.source.group;
  Offset spots[SHARE];
#pragma unroll
  for (int i = 0; i < SHARE; i++) {
    const int spot = tid + i * THREADS;
    int h = p.origin[1] + h0 * STEP_H + spot / PATCH_W + (REACH_H < 0 ? (TAPS_H - 1) * REACH_H : 0);
    int w = p.origin[2] + w0 * STEP_W + spot % PATCH_W + (REACH_W < 0 ? (TAPS_W - 1) * REACH_W : 0);
    bool in = spot < SPOTS;
    if (PADDING == ZEROS) {
      in &= (unsigned)h < (unsigned)p.size[1] && (unsigned)w < (unsigned)p.size[2];
    } else {
      // Beyond the last place's windows there is nothing that a padding mode would continue.
      const int most_h = p.origin[1] + (p.limit[1] - 1) * STEP_H + (TAPS_H - 1) * REACH_H;
      const int most_w = p.origin[2] + (p.limit[2] - 1) * STEP_W + (TAPS_W - 1) * REACH_W;
      in &= h <= most_h && w <= most_w;
      h = in ? continued(h, p.size[1]) : 0, w = in ? continued(w, p.size[2]) : 0;
    }
    spots[i] = in ? h * (Offset)p.source.axis[1] + w * (Offset)p.source.axis[2] : (Offset)-1;
  }

  // Taps along depth that are inside, which are neighbours, in every chunk.
  const int z0 = p.origin[0] + z * p.step_d;
  int first = 0, last = p.taps_d - 1;
  if (PADDING == ZEROS) {
    while (first <= last && (unsigned)(z0 + first * p.reach_d) >= (unsigned)p.size[0]) first++;
    while (first <= last && (unsigned)(z0 + last * p.reach_d) >= (unsigned)p.size[0]) last--;
  }
  const int depths = last - first + 1, stages = p.chunks * depths;

  T fetched[SHARE][8][WORD];
  const auto fetch = [&](int chunk, int depth, int slot) {
    const unsigned* from = packed + (((long long)group * p.chunks + chunk) * p.taps_d + depth) * (TAPS * 8) * p.padded;
    const unsigned to = shared_address(filters + slot * FILTERS);
#pragma unroll
    for (int i = tid; i < FILTERS / 4; i += THREADS) {
      const int tap = i / (BN * 2), of_tap = i % (BN * 2);
      cp_async<16>(to + i * 16, from + ((long long)tap * p.padded + n0) * 8 + of_tap * 4);
    }
    int at = z0 + depth * p.reach_d;
    if (PADDING != ZEROS) at = continued(at, p.size[0]);
    const T* plane = source + at * (Offset)p.source.axis[0];
#pragma unroll
    for (int word = 0; word < 8; word++)
#pragma unroll
      for (int v = 0; v < WORD; v++) {
        const int c = (chunk * 8 + word) * WORD + v;
        const T* channel = plane + c * (Offset)p.source.channel;
#pragma unroll
        for (int i = 0; i < SHARE; i++)
          fetched[i][word][v] = c < p.channels && spots[i] >= 0 ? channel[spots[i]] : T{};
      }
  };
  const auto put = [&](int slot) {
#pragma unroll
    for (int i = 0; i < SHARE; i++)
      if (tid + i * THREADS < SPOTS)
#pragma unroll
        for (int word = 0; word < 8; word++)
          patches[slot * 8 * PLANE + word * PLANE + tid + i * THREADS] =
              as_word(fetched[i][word][0], fetched[i][word][WORD - 1]);
  };

  const int wm = warp % WARPS_M * WM, wn = warp / WARPS_M * WN;
  int spot_of[WM / 8];  // in a plane: of place g of eight, for its first tap
#pragma unroll
  for (int i = 0; i < WM / 8; i++) {
    const int m = wm + i * 8 + g;
    spot_of[i] = t * PLANE + (m / TILE_W * STEP_H + (REACH_H < 0 ? (1 - TAPS_H) * REACH_H : 0)) * PATCH_W +
                 m % TILE_W * STEP_W + (REACH_W < 0 ? (1 - TAPS_W) * REACH_W : 0);
  }
  float acc[WM / 16][WN / 8][4] = {};
  const auto multiply = [&](int slot) {
    const unsigned* const patch = patches + slot * 8 * PLANE;
    const unsigned* const weights = filters + slot * FILTERS + (wn + g) * 8 + t * 2;
#pragma unroll
    for (int tap = 0; tap < TAPS; tap++) {
      const int offset = tap / TAPS_W * REACH_H * PATCH_W + tap % TAPS_W * REACH_W;
      unsigned a[WM / 16][4], b[WN / 8][2];
#pragma unroll
      for (int j = 0; j < WN / 8; j++) {
        const Pack<unsigned, 2> two = load_pack<2>(weights + (tap * BN + j * 8) * 8);
        b[j][0] = two.v[0], b[j][1] = two.v[1];
      }
#pragma unroll
      for (int i = 0; i < WM / 16; i++)
#pragma unroll
        for (int v = 0; v < 4; v++) a[i][v] = patch[spot_of[i * 2 + v % 2] + offset + v / 2 * 4 * PLANE];
#pragma unroll
      for (int i = 0; i < WM / 16; i++)
#pragma unroll
        for (int j = 0; j < WN / 8; j++) multiply_add(acc[i][j], a[i], b[j], T{});
    }
  };

  int chunk = 0, depth = first;
  if (stages > 0) {
    fetch(chunk, depth, 0);
    put(0);
    cp_async_wait_all();
  }
  __syncthreads();
  for (int s = 0; s < stages; s++) {
    const bool more = s + 1 < stages;
    if (++depth > last) depth = first, chunk++;
    if (more) fetch(chunk, depth, (s + 1) & 1);
    multiply(s & 1);
    if (more) {
      put((s + 1) & 1);
      cp_async_wait_all();
    }
    __syncthreads();
  }

#pragma unroll
  for (int j = 0; j < WN / 8; j++)
#pragma unroll
    for (int c = 0; c < 2; c++) {
      const int n = n0 + wn + j * 8 + t * 2 + c;
      if (n >= p.outputs) continue;
      const ScaleShift<A> scale_shift = ScaleShift<A>::of(scale, bias, group * p.outputs + n);
#pragma unroll
      for (int i = 0; i < WM / 16; i++) {
        acc[i][j][c] = scale_shift(acc[i][j][c]);
        acc[i][j][c + 2] = scale_shift(acc[i][j][c + 2]);
      }
    }
  float* slab = reinterpret_cast<float*>(buffers) + warp * Out::FLOATS;
  Out::write(slab, acc, [&](int row, int column, A(&v)[STORE_VECTOR]) {
    const Offset to = targets[wm + row];
    const int n = n0 + wn + column;
    if (to < 0 || n >= p.outputs) return;
    const Offset at = to + n * (Offset)p.result.channel;
    store_finished<ACT>(out + at, residual ? residual + at : nullptr, v);
  });
}

#if PASS == FPROP
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
conv_fprop_planes(const T* __restrict__ x, const unsigned* __restrict__ packed, const T* __restrict__ scale,
                  const T* __restrict__ bias, const T* __restrict__ residual, Result* __restrict__ y, const Params p) {
  planes(x, packed, scale, bias, residual, y, p);
}
#else
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
conv_dgrad_planes(const T* __restrict__ grad_y, const unsigned* __restrict__ packed, const T* __restrict__ scale,
                  const T* __restrict__ bias, const T* __restrict__ residual, Result* __restrict__ grad_x,
                  const Params p) {
  planes(grad_y, packed, scale, bias, residual, grad_x, p);
}
#endif
#endif
