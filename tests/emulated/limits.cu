// Planted bugs that end in undefined arithmetic, run out of a limit, or never end.
#include "planted.cuh"

extern "C" __global__ void signed_overflow(const float* __restrict__ x, float* __restrict__ y, Params p) {
  const int i = p.huge + (BUG ? (int)threadIdx.x : 0);  // <- signed_overflow
  y[threadIdx.x] = x[threadIdx.x] + (float)i;
}

extern "C" __global__ void product_overflow(const float* __restrict__ x, float* __restrict__ y, Params p) {
  const int i = BUG ? p.huge * (2 + p.zero) : p.huge;  // <- product_overflow
  y[threadIdx.x] = x[threadIdx.x] + (float)i;
}

extern "C" __global__ void wide_shift(const float* __restrict__ x, float* __restrict__ y, Params p) {
  const unsigned i = 1u << (BUG ? threadIdx.x : threadIdx.x % 32);  // <- wide_shift
  y[threadIdx.x] = x[threadIdx.x] + (float)i;
}

extern "C" __global__ void division_by_zero(const float* __restrict__ x, float* __restrict__ y, Params p) {
  const int i = p.n / (BUG ? p.zero : 1);  // <- division_by_zero
  y[threadIdx.x] = x[threadIdx.x] + (float)i;
}

extern "C" __global__ void failed_assertion(const float* __restrict__ x, float* __restrict__ y, Params p) {
  assert(threadIdx.x < 100 || !BUG);  // <- failed_assertion
  y[threadIdx.x] = x[threadIdx.x];
}

extern "C" __global__ void trap(const float* __restrict__ x, float* __restrict__ y, Params p) {
  if (BUG && threadIdx.x == 9) __trap();  // <- trap
  y[threadIdx.x] = x[threadIdx.x];
}

// Waits for memory that nobody changes; no barrier, no call-back, nothing.
extern "C" __global__ void endless_loop(const float* __restrict__ x, float* __restrict__ y, Params p) {
  int i = 0;
  while (BUG && i >= 0) {  // <- endless_loop
    i = (i + 1) & 1023;  // <- endless_loop
    asm volatile("" : "+r"(i));  // <- endless_loop
  }
  y[threadIdx.x] = x[threadIdx.x];
}

// Every thread keeps arriving at a barrier.
extern "C" __global__ void endless_barriers(const float* __restrict__ x, float* __restrict__ y, Params p) {
  do {
    y[threadIdx.x] = x[threadIdx.x];  // <- endless_barriers
    __syncthreads();  // <- endless_barriers
  } while (BUG);  // <- endless_barriers
}

// A spin lock that is never freed.
extern "C" __global__ void spin_lock(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ int lock;
  if (threadIdx.x == 0) lock = 0;
  __syncthreads();
  while (atomicCAS(&lock, 0, 1) != 0) {  // <- spin_lock
  }
  if (!BUG) atomicExch(&lock, 0);
  y[threadIdx.x] = x[threadIdx.x];
}

__noinline__ __device__ int deep(int n, volatile int* out) {  // <- deep_recursion
  volatile char frame[256];
  frame[n & 255] = (char)n;  // <- deep_recursion
  *out = *out + frame[n & 255];  // <- deep_recursion
  return n == 0 ? 0 : deep(n - 1, out) + frame[(n + 1) & 255];  // <- deep_recursion
}
extern "C" __global__ void deep_recursion(const float* __restrict__ x, float* __restrict__ y, Params p) {
  int sum = 0;
  const int v = deep(BUG ? 100000 + p.zero : 3, &sum);
  y[threadIdx.x] = x[threadIdx.x] + (float)(v + sum == p.huge);
}

// A frame larger than the stack and its guard zone together.
__noinline__ __device__ float large_frame(int n) {  // <- large_local_array
  float frame[100000];
  for (int i = 0; i < n; i++) frame[i] = (float)i;
  float sum = 0.f;
  for (int i = 0; i < n; i++) sum += frame[n - 1 - i];
  return sum;
}
extern "C" __global__ void large_local_array(const float* __restrict__ x, float* __restrict__ y, Params p) {
  y[threadIdx.x] = x[threadIdx.x] + (BUG ? large_frame(p.n) : 0.f);
}

extern "C" __global__ void __launch_bounds__(BUG ? 64 : 128, 1)
launch_bounds(const float* __restrict__ x, float* __restrict__ y, Params p) {
  y[threadIdx.x] = x[threadIdx.x];
}

// More static shared memory than ptxas allows.
extern "C" __global__ void static_shared(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ float s[BUG ? 12289 : 12288];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = s[127 - threadIdx.x];
}

// As much dynamic shared memory as the launch asks for.
extern "C" __global__ void dynamic_shared(const float* __restrict__ x, float* __restrict__ y, Params p) {
  extern __shared__ float dynamic[];
  dynamic[threadIdx.x] = x[threadIdx.x];  // <- dynamic_shared
  __syncthreads();
  y[threadIdx.x] = dynamic[127 - threadIdx.x];
}
