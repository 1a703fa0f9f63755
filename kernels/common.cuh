// What every kernel here shares: element types and their conversion, 16-byte vector access, division by
// numbers known at launch, and warp and block reductions in a fixed order.
#pragma once
#include "ptx.cuh"

// ---- elements and accumulators --------------------------------------------------------------------------
// Element types are float, double, half_t and bfloat_t; accumulators are float and double.
template <class To, class From> struct Convert { DEVICE To apply(From v) { return (To)v; } };
template <> struct Convert<float, half_t> { DEVICE float apply(half_t v) { return to_float(v); } };
template <> struct Convert<float, bfloat_t> { DEVICE float apply(bfloat_t v) { return to_float(v); } };
template <> struct Convert<half_t, float> { DEVICE half_t apply(float v) { return float_to_half(v); } };
template <> struct Convert<bfloat_t, float> { DEVICE bfloat_t apply(float v) { return float_to_bfloat(v); } };

// convert<float>(half) and back: exact when widening, round to nearest even when narrowing.
template <class To, class From> DEVICE To convert(From v) { return Convert<To, From>::apply(v); }

DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
// For negative a too: 0 <= modulo(a, b) < b, and a = floor_div(a, b) * b + modulo(a, b).
DEVICE constexpr int modulo(int a, int b) { return (a % b + b) % b; }
DEVICE constexpr int floor_div(int a, int b) { return (a - modulo(a, b)) / b; }

// ---- vector access --------------------------------------------------------------------------------------
// V elements moved by one instruction; the address must be a multiple of V * sizeof(T) (at most 16 bytes).
template <class T, int V> struct __align__(sizeof(T) * V) Pack {
  static_assert(sizeof(T) * V <= 16, "one access moves at most 16 bytes");
  T v[V];
};
template <int V, class T> DEVICE Pack<T, V> load_pack(const T* p) { return *reinterpret_cast<const Pack<T, V>*>(p); }
template <int V, class T> DEVICE void store_pack(T* p, const Pack<T, V>& v) { *reinterpret_cast<Pack<T, V>*>(p) = v; }

// V elements as accumulators, by as few accesses of at most 16 bytes as they need; the address must be a
// multiple of V * sizeof(T), or of 16 where that is less.
template <int V, class T> DEVICE constexpr int access_width() { return V * sizeof(T) <= 16 ? V : 16 / (int)sizeof(T); }
template <int V, class A, class T> DEVICE void load_as(A (&to)[V], const T* from) {
  constexpr int W = access_width<V, T>();
#pragma unroll
  for (int i = 0; i < V; i += W) {
    const Pack<T, W> pack = load_pack<W>(from + i);
#pragma unroll
    for (int j = 0; j < W; j++) to[i + j] = convert<A>(pack.v[j]);
  }
}
template <int V, class A, class T> DEVICE void store_as(T* to, const A (&from)[V]) {
  constexpr int W = access_width<V, T>();
#pragma unroll
  for (int i = 0; i < V; i += W) {
    Pack<T, W> pack;
#pragma unroll
    for (int j = 0; j < W; j++) pack.v[j] = convert<T>(from[i + j]);
    store_pack(to + i, pack);
  }
}

// ---- index arithmetic -----------------------------------------------------------------------------------
// Division of 0 <= n < 2^31 by a divisor known at launch: one multiply-high, one add, one shift.
// Mirrors FastDiv in cnnops/cuda/kernel.py, which derives multiplier and shift.
struct FastDiv {
  unsigned divisor, multiplier, shift;
  __device__ __forceinline__ int div(int n) const { return (int)((__umulhi((unsigned)n, multiplier) + (unsigned)n) >> shift); }
  // n = quotient * divisor + remainder
  __device__ __forceinline__ int divmod(int n, int& remainder) const {
    const int quotient = div(n);
    remainder = n - quotient * (int)divisor;
    return quotient;
  }
};

// ---- reductions -----------------------------------------------------------------------------------------
// Fixed order: the same input gives the same bits in every run. All 32 lanes must take part.
template <class A> DEVICE A warp_sum(A v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

// The sum of v over a block of WARPS * 32 threads, returned to every thread; `scratch` holds WARPS values.
// Begins and ends with a barrier's worth of ordering, so scratch may be used again right after.
template <int WARPS, class A> DEVICE A block_sum(A v, A* scratch) {
  v = warp_sum(v);
  if (WARPS == 1) return v;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  A total = A(0);
#pragma unroll
  for (int w = 0; w < WARPS; w++) total += scratch[w];
  __syncthreads();
  return total;
}
