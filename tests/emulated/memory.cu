// Planted bugs in the use of memory.
#include "planted.cuh"

// Reads one element too many, as a halo that is off by one does.
extern "C" __global__ void read_behind(const float* __restrict__ x, float* __restrict__ y, Params p) {
  const int i = threadIdx.x;
  y[i] = i + 1 < p.n + BUG ? x[i + 1] : 0.f;  // <- read_behind
}

// Reads the element before the first.
extern "C" __global__ void read_before(const float* __restrict__ x, float* __restrict__ y, Params p) {
  const int i = threadIdx.x;
  y[i] = i - 1 >= -BUG ? x[i - 1] : 0.f;  // <- read_before
}

extern "C" __global__ void write_behind(const float* __restrict__ x, float* __restrict__ y, Params p) {
  const int i = threadIdx.x;
  if (i < p.n) y[i + BUG] = x[i];  // <- write_behind
}

extern "C" __global__ void write_input(const float* __restrict__ x, float* __restrict__ y, Params p) {
  const int i = threadIdx.x;
  if (BUG) const_cast<float*>(x)[i] = 0.f;  // <- write_input
  y[i] = x[i];
}

// A 16-byte load from an address that is only a multiple of 4.
extern "C" __global__ void misaligned_load(const float* __restrict__ x, float* __restrict__ y, Params p) {
  if (4 * threadIdx.x + 4 < p.n) {
    const float4 v = *reinterpret_cast<const float4*>(x + 4 * threadIdx.x + BUG);  // <- misaligned_load
    y[threadIdx.x] = v.x + v.y + v.z + v.w;
  } else {
    y[threadIdx.x] = 0.f;
  }
}

extern "C" __global__ void misaligned_pack(const float* __restrict__ x, float* __restrict__ y, Params p) {
  Pack<float, 2> v;
  v.v[0] = v.v[1] = x[threadIdx.x];
  if (2 * threadIdx.x + 2 + BUG <= p.n) store_pack<2>(y + 2 * threadIdx.x + BUG, v);  // <- misaligned_pack
}

extern "C" __global__ void misaligned_shared(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ __align__(8) float s[128];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  const float2 v = *reinterpret_cast<float2*>(&s[2 + BUG]);  // <- misaligned_shared
  y[threadIdx.x] = v.x + v.y;
}

// `x` may be null here.
extern "C" __global__ void null_tensor(const float* __restrict__ x, float* __restrict__ y, Params p) {
  y[threadIdx.x] = x || BUG ? x[threadIdx.x + 2] : 0.f;  // <- null_tensor
}

extern "C" __global__ void shared_index(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ float s[4][32];
  s[threadIdx.x / 32][threadIdx.x % 32] = x[threadIdx.x];
  __syncthreads();
  const int column = threadIdx.x % 32 + BUG;  // stays inside s, but leaves its row
  y[threadIdx.x] = s[threadIdx.x / 32][column];  // <- shared_index
}

DEVICE void store_at(float* p, int i, float v) {
  p[i] = v;  // <- shared_behind dynamic_behind
}

// Through a pointer no array type can help; only the variable's own end does.
extern "C" __global__ void shared_behind(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ float s[128];
  __shared__ float neighbour[128];
  store_at(neighbour, threadIdx.x, 0.f);
  store_at(s, threadIdx.x + (BUG && threadIdx.x == 127), x[threadIdx.x]);
  __syncthreads();
  y[threadIdx.x] = s[127 - threadIdx.x - (BUG && threadIdx.x == 0)] + neighbour[threadIdx.x];
}

// Runs over the edge of all shared memory, where no other variable lies behind or before.
extern "C" __global__ void shared_edge(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ float s[128];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  const float* from = s;
  asm volatile("" : "+r"(from));  // hides from the compiler that this is an array of 128
  y[threadIdx.x] = from[127 - (int)threadIdx.x] + (BUG ? from[(int)threadIdx.x - 1] + from[threadIdx.x + 1] : 0.f);  // <- shared_edge
}

// One dynamic array; the launch asks for 128 floats of it.
extern "C" __global__ void dynamic_behind(const float* __restrict__ x, float* __restrict__ y, Params p) {
  extern __shared__ __align__(1024) unsigned char dynamic[];
  float* s = reinterpret_cast<float*>(dynamic);
  if (threadIdx.x == 0) assert(reinterpret_cast<size_t>(dynamic) % 1024 == 0);
  store_at(s, threadIdx.x + BUG, x[threadIdx.x]);
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x + BUG];
}

extern "C" __global__ void uninitialised_shared(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ float s[128];
  if (threadIdx.x < 128 - BUG) s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = s[127 - threadIdx.x];  // <- uninitialised_shared
}

extern "C" __global__ void local_index(const float* __restrict__ x, float* __restrict__ y, Params p) {
  float v[4] = {};
  for (int i = 0; i < 4 + BUG; i++) v[i] = x[i];  // <- local_index
  y[threadIdx.x] = v[threadIdx.x % 4];
}

// Takes the address of a thread's own variable to another thread.
extern "C" __global__ void foreign_stack(const float* __restrict__ x, float* __restrict__ y, Params p) {
  __shared__ float* address;
  float own = x[threadIdx.x];
  float* mine = &own;
  asm volatile("" : "+r"(mine) : : "memory");
  if (threadIdx.x == 0) address = mine;
  __syncthreads();
  const float* from = BUG ? address : mine;
  asm volatile("" : "+r"(from) : : "memory");
  if (threadIdx.x == 1) y[1] = *from;  // <- foreign_stack
  else y[threadIdx.x] = own;
}

// An element of y is never written.
extern "C" __global__ void unwritten(const float* __restrict__ x, float* __restrict__ y, Params p) {
  if (threadIdx.x != 5 || !BUG) y[threadIdx.x] = x[threadIdx.x];
}

// Adds to an output as if it were zero at first.
extern "C" __global__ void read_output(const float* __restrict__ x, float* __restrict__ y, Params p) {
  if (!BUG) y[threadIdx.x] = 0.f;
  y[threadIdx.x] += x[threadIdx.x];  // <- read_output
}
