// Read by g++ before any kernel file: gives plain C++ the part of CUDA C++ that the kernels use.
//
// A CUDA thread is a fiber, `__shared__` is thread_local, where the runtime answers for its address, and what
// a GPU does in hardware (barriers, shuffles, votes) is a call into the runtime library. Loads and stores stay
// plain C++; the compiler reports each of them to the runtime through the call-backs of -fsanitize=thread.
// No toolkit and no standard header is used: compiling a kernel takes a fraction of a second, and a header
// that a kernel forgot is missed here as it is by NVRTC.
#pragma once

#define EMULATOR 1
#define __CUDA_ARCH__ 800

#include "interface.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ thread_local
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __grid_constant__
// Kept in the preprocessed text, where emulator_build.py reads it next to the entry's name; the compiler skips it.
#define __launch_bounds__(...) __attribute__((emulator_launch_bounds(__VA_ARGS__)))
#define __cluster_dims__(...) __attribute__((emulator_cluster_dims(__VA_ARGS__)))

// Last parameters of whatever threads do together: as default arguments, they name the caller's line.
#define EMULATOR_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define EMULATOR_INLINE static inline __attribute__((always_inline))

typedef __SIZE_TYPE__ size_t;
extern "C" int printf(const char*, ...);

#include "cuda_vectors.h"
#include "cuda_math.h"

// ---- indices --------------------------------------------------------------------------------------------
EMULATOR_INLINE uint3 emulator_unpack(unsigned long packed) {
  return {(unsigned)(packed & 0x7fffffff), (unsigned)(packed >> 31 & 0xffff), (unsigned)(packed >> 47)};
}
#define threadIdx emulator_unpack(emulator_thread_index())
#define blockIdx emulator_unpack(emulator_block_index())
#define blockDim emulator_unpack(emulator_block_size())
#define gridDim emulator_unpack(emulator_grid_size())
#define warpSize 32

// ---- barriers and fences --------------------------------------------------------------------------------
EMULATOR_INLINE void __syncthreads(EMULATOR_CALLER) { emulator_block_barrier(0, {file, line}); }
EMULATOR_INLINE int __syncthreads_count(int predicate, EMULATOR_CALLER) {
  return emulator_block_barrier(predicate, {file, line});
}
EMULATOR_INLINE int __syncthreads_or(int predicate, EMULATOR_CALLER) {
  return emulator_block_barrier(predicate, {file, line}) != 0;
}
EMULATOR_INLINE int __syncthreads_and(int predicate, EMULATOR_CALLER) {
  return emulator_block_barrier(!predicate, {file, line}) == 0;
}
EMULATOR_INLINE void __syncwarp(unsigned mask = 0xffffffffu, EMULATOR_CALLER) {
  emulator_warp_barrier(mask, {file, line});
}
// Fences order memory but wait for nobody; fibers run one after the other, so memory is always in order.
EMULATOR_INLINE void __threadfence_block() {}
EMULATOR_INLINE void __threadfence() {}
EMULATOR_INLINE void __threadfence_system() {}
EMULATOR_INLINE void __trap(EMULATOR_CALLER) { emulator_trap("__trap()", {file, line}); }
#define assert(condition) ((condition) ? (void)0 : emulator_trap("assertion failed: " #condition, {__FILE__, __LINE__}))

// ---- warp collectives -----------------------------------------------------------------------------------
template <class T> EMULATOR_INLINE T emulator_shuffle_value(EmulatorShuffle kind, unsigned mask, T value, int lane,
                                                            int width, EmulatorPlace place) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  unsigned long bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  bits = emulator_shuffle(kind, mask, bits, lane, width, place);
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}
template <class T>
EMULATOR_INLINE T __shfl_sync(unsigned mask, T value, int lane, int width = 32, EMULATOR_CALLER) {
  return emulator_shuffle_value(EMULATOR_SHUFFLE_INDEX, mask, value, lane, width, {file, line});
}
template <class T>
EMULATOR_INLINE T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                                 EMULATOR_CALLER) {
  return emulator_shuffle_value(EMULATOR_SHUFFLE_UP, mask, value, (int)delta, width, {file, line});
}
template <class T>
EMULATOR_INLINE T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                                   EMULATOR_CALLER) {
  return emulator_shuffle_value(EMULATOR_SHUFFLE_DOWN, mask, value, (int)delta, width, {file, line});
}
template <class T>
EMULATOR_INLINE T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                                  EMULATOR_CALLER) {
  return emulator_shuffle_value(EMULATOR_SHUFFLE_XOR, mask, value, lanes, width, {file, line});
}
EMULATOR_INLINE unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_CALLER) {
  return emulator_ballot(mask, predicate, {file, line});
}
EMULATOR_INLINE int __any_sync(unsigned mask, int predicate, EMULATOR_CALLER) {
  return emulator_ballot(mask, predicate, {file, line}) != 0;
}
EMULATOR_INLINE int __all_sync(unsigned mask, int predicate, EMULATOR_CALLER) {
  return emulator_ballot(mask, !predicate, {file, line}) == 0;
}
EMULATOR_INLINE unsigned __activemask() { return emulator_active_mask(); }

// ---- atomics --------------------------------------------------------------------------------------------
// The runtime checks the address and lets other threads run; then nothing can come between load and store.
// Not inlined, so that the plain load and store here are not reported once more.
template <class T, class Operation>
__attribute__((noinline, no_sanitize("thread", "undefined"))) T emulator_update(T* address, Operation operation) {
  emulator_atomic(address, sizeof(T), __builtin_return_address(0));
  const T old = *address;
  *address = operation(old);
  return old;
}
#define EMULATOR_ATOMICS(T)                                                                                        \
  EMULATOR_INLINE T atomicAdd(T* p, T v) { return emulator_update(p, [=](T old) { return (T)(old + v); }); }       \
  EMULATOR_INLINE T atomicMax(T* p, T v) { return emulator_update(p, [=](T old) { return old > v ? old : v; }); }  \
  EMULATOR_INLINE T atomicMin(T* p, T v) { return emulator_update(p, [=](T old) { return old < v ? old : v; }); }  \
  EMULATOR_INLINE T atomicExch(T* p, T v) { return emulator_update(p, [=](T) { return v; }); }                     \
  EMULATOR_INLINE T atomicCAS(T* p, T expected, T v) {                                                             \
    return emulator_update(p, [=](T old) { return old == expected ? v : old; });                                   \
  }
#define EMULATOR_BIT_ATOMICS(T)                                                                                    \
  EMULATOR_INLINE T atomicSub(T* p, T v) { return emulator_update(p, [=](T old) { return (T)(old - v); }); }       \
  EMULATOR_INLINE T atomicOr(T* p, T v) { return emulator_update(p, [=](T old) { return (T)(old | v); }); }        \
  EMULATOR_INLINE T atomicAnd(T* p, T v) { return emulator_update(p, [=](T old) { return (T)(old & v); }); }       \
  EMULATOR_INLINE T atomicXor(T* p, T v) { return emulator_update(p, [=](T old) { return (T)(old ^ v); }); }
EMULATOR_ATOMICS(int)
EMULATOR_ATOMICS(unsigned)
EMULATOR_ATOMICS(unsigned long long)
EMULATOR_ATOMICS(float)
EMULATOR_ATOMICS(double)
EMULATOR_BIT_ATOMICS(int)
EMULATOR_BIT_ATOMICS(unsigned)
EMULATOR_BIT_ATOMICS(unsigned long long)
EMULATOR_INLINE unsigned atomicInc(unsigned* p, unsigned limit) {
  return emulator_update(p, [=](unsigned old) { return old >= limit ? 0u : old + 1; });
}

// ---- loads and stores with a cache hint -----------------------------------------------------------------
template <class T> EMULATOR_INLINE T __ldg(const T* p) { return *p; }
template <class T> EMULATOR_INLINE T __ldcs(const T* p) { return *p; }
template <class T> EMULATOR_INLINE T __ldcg(const T* p) { return *p; }
template <class T> EMULATOR_INLINE T __ldca(const T* p) { return *p; }
template <class T> EMULATOR_INLINE void __stcs(T* p, T v) { *p = v; }
template <class T> EMULATOR_INLINE void __stcg(T* p, T v) { *p = v; }

// ---- from an entry's C++ signature to a call with an array of arguments ----------------------------------
template <class T> struct EmulatorDescribe { static constexpr EmulatorParameter value{sizeof(T), 0, 0}; };
template <class T> struct EmulatorDescribe<T*> {
  static constexpr EmulatorParameter value{sizeof(T*), sizeof(T), 0};
};
template <class T> struct EmulatorDescribe<const T*> {
  static constexpr EmulatorParameter value{sizeof(T*), sizeof(T), 1};
};
template <class T> struct EmulatorDescribe<T* __restrict> : EmulatorDescribe<T*> {};
template <class T> struct EmulatorDescribe<const T* __restrict> : EmulatorDescribe<const T*> {};

// The arguments of __launch_bounds__ and __cluster_dims__.
struct EmulatorBounds { unsigned threads = 0, blocks = 0, cluster_blocks = 0; };
struct EmulatorClusterDims { unsigned x = 0, y = 1, z = 1; };

template <class... T>
constexpr EmulatorSignature emulator_signature(void (*)(T...), EmulatorBounds bounds, EmulatorClusterDims dims) {
  static_assert(sizeof...(T) <= 32, "an entry has at most 32 parameters");
  return {sizeof...(T), bounds.threads, dims.x * dims.y * dims.z, {EmulatorDescribe<T>::value...}};
}
template <class T> struct EmulatorValue { typedef T type; };
template <class T> struct EmulatorValue<T&> { typedef T type; };
template <class T, T... I> struct EmulatorIndices {};
#ifdef __clang__
template <int n> using EmulatorCount = __make_integer_seq<EmulatorIndices, int, n>;
#else
template <int n> using EmulatorCount = EmulatorIndices<int, __integer_pack(n)...>;
#endif
template <class... T, int... I>
EMULATOR_INLINE void emulator_call(void (*entry)(T...), void** arguments, EmulatorIndices<int, I...>) {
  void (*volatile call)(T...) = entry;  // an entry that is inlined here would lose its call-backs
  call(*(typename EmulatorValue<T>::type*)arguments[I]...);
}
template <class... T> EMULATOR_INLINE void emulator_call(void (*entry)(T...), void** arguments) {
  emulator_call(entry, arguments, EmulatorCount<sizeof...(T)>());
}
