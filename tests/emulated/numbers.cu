// Intrinsics and built-ins, one column of results each, to be compared with what Python says they are.
#include "common.cuh"

struct Params {
  int n, x_stride, y_stride;
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from test_emulator.py");

DEVICE int element() { return blockIdx.x * blockDim.x + threadIdx.x; }

extern "C" __global__ void conversions(const unsigned short* __restrict__ halves, const float* __restrict__ floats,
                                       float* __restrict__ from_half, float* __restrict__ from_bfloat,
                                       unsigned short* __restrict__ to_half, unsigned short* __restrict__ to_bfloat,
                                       Params p) {
  const int i = element();
  if (i >= p.n) return;
  from_half[i] = to_float(half_t{halves[i]});
  from_bfloat[i] = to_float(bfloat_t{halves[i]});
  to_half[i] = float_to_half(floats[i]).bits;
  to_bfloat[i] = float_to_bfloat(floats[i]).bits;
}

extern "C" __global__ void integers(const unsigned* __restrict__ a, const unsigned* __restrict__ b,
                                    unsigned* __restrict__ out, Params p) {
  const int i = element();
  if (i >= p.n) return;
  const unsigned x = a[i], y = b[i];
  unsigned* r = out + 16 * i;
  r[0] = __umulhi(x, y);
  r[1] = (unsigned)__mulhi((int)x, (int)y);
  r[2] = (unsigned)__popc(x);
  r[3] = (unsigned)__clz((int)x);
  r[4] = (unsigned)__ffs((int)x);
  r[5] = __brev(x);
  r[6] = min(x, y);
  r[7] = max(x, y);
  r[8] = (unsigned)min((int)x, (int)y);
  r[9] = (unsigned)max((int)x, (int)y);
  r[10] = (unsigned)__popcll((unsigned long long)x << 32 | y);
  r[11] = (unsigned)__clzll((long long)((unsigned long long)x << 32 | y));
  r[12] = (unsigned)__ffsll((long long)((unsigned long long)x << 32 | y));
  r[13] = (unsigned)(__umul64hi((unsigned long long)x << 32 | y, (unsigned long long)y << 32 | x) >> 32);
  r[14] = __float_as_uint(__uint_as_float(x));
  r[15] = (unsigned)(__double_as_longlong(__longlong_as_double((long long)x << 20 | y)) >> 20);
}

extern "C" __global__ void reals(const float* __restrict__ a, const float* __restrict__ b, float* __restrict__ out,
                                 Params p) {
  const int i = element();
  if (i >= p.n) return;
  const float x = a[i], y = b[i];
  float* r = out + 20 * i;
  r[0] = rsqrtf(fabsf(x));
  r[1] = __expf(x);
  r[2] = __fdividef(x, y);
  r[3] = erff(x);
  r[4] = tanhf(x);
  r[5] = expf(x);
  r[6] = fmaf(x, y, 1.f);
  r[7] = fminf(x, y);
  r[8] = fmaxf(x, y);
  r[9] = min(x, y);
  r[10] = max(x, y);
  r[11] = sqrtf(fabsf(x));
  r[12] = logf(fabsf(x));
  r[13] = floorf(x);
  r[14] = (float)fma((double)x, (double)y, 1.);
  r[15] = (float)erf((double)x);
  r[16] = isnan(x) ? 1.f : isinf(x) ? 2.f : 3.f;
  r[17] = __saturatef(x);
  r[18] = __fadd_rn(__fmul_rn(x, y), 1.f);
  r[19] = copysignf(x, y);
}

// 64 threads: two warps.
extern "C" __global__ void shuffles(const float* __restrict__ x, const double* __restrict__ d, float* __restrict__ f,
                                    double* __restrict__ g, Params p) {
  const unsigned all = 0xffffffffu;
  const int i = threadIdx.x;
  const float v = x[i];
  const double w = d[i];
  float* r = f + 10 * i;
  r[0] = __shfl_sync(all, v, 5);
  r[1] = __shfl_up_sync(all, v, 3);
  r[2] = __shfl_down_sync(all, v, 3);
  r[3] = __shfl_xor_sync(all, v, 6);
  r[4] = __shfl_sync(all, v, 5, 8);
  r[5] = __shfl_up_sync(all, v, 3, 8);
  r[6] = __shfl_down_sync(all, v, 3, 8);
  r[7] = __shfl_xor_sync(all, v, 6, 8);
  r[8] = __shfl_sync(all, v, i + 1);
  r[9] = (float)__shfl_sync(all, half_t{(unsigned short)i}, 7).bits;
  g[2 * i] = __shfl_xor_sync(all, w, 1);
  g[2 * i + 1] = warp_sum(w);
}

extern "C" __global__ void votes(const int* __restrict__ x, unsigned* __restrict__ y, Params p) {
  const unsigned all = 0xffffffffu;
  const int v = x[threadIdx.x];
  unsigned* r = y + 8 * threadIdx.x;
  r[0] = __ballot_sync(all, v > 0);
  r[1] = (unsigned)__any_sync(all, v > 0);
  r[2] = (unsigned)__all_sync(all, v > 0);
  r[3] = __activemask();
  r[4] = (unsigned)__syncthreads_count(v > 0);
  r[5] = (unsigned)__syncthreads_or(v > 0);
  r[6] = (unsigned)__syncthreads_and(v > 0);
  r[7] = __ballot_sync(v > 0 ? r[0] : ~r[0], v & 1);
}

extern "C" __global__ void atomics(const int* __restrict__ x, int* __restrict__ i, unsigned* __restrict__ u,
                                   float* __restrict__ f, double* __restrict__ d,
                                   unsigned long long* __restrict__ l, Params p) {
  const int v = x[element()];
  atomicAdd(&i[0], v);
  atomicMax(&i[1], v);
  atomicMin(&i[2], v);
  atomicSub(&i[3], v);
  atomicAdd(&u[0], (unsigned)v);
  atomicOr(&u[1], 1u << (v & 31));
  atomicAnd(&u[2], ~(1u << (v & 31)));
  atomicXor(&u[3], (unsigned)v);
  atomicInc(&u[4], 5u);
  atomicAdd(&f[0], (float)v);
  atomicMax(&f[1], (float)v);
  atomicAdd(&d[0], (double)v);
  atomicAdd(&l[0], (unsigned long long)v);
  int old = i[4 + element()];  // an element of its own: nobody else touches it
  if (atomicCAS(&i[4 + element()], old, v) == old) old = atomicExch(&i[4 + element()], old + 1);
  if (old != v) atomicAdd(&i[4 + element()], 1000);
}

// A three-dimensional grid of three-dimensional blocks.
extern "C" __global__ void indices(int* __restrict__ y, Params p) {
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  y[block * threads + thread] = (blockIdx.x << 20) + (blockIdx.y << 16) + (blockIdx.z << 12) +
                                (threadIdx.x << 8) + (threadIdx.y << 4) + threadIdx.z;
}

static_assert(sizeof(float3) == 12 && alignof(float3) == 4 && alignof(float4) == 16 && alignof(float2) == 8, "");
static_assert(alignof(int4) == 16 && alignof(uint2) == 8 && alignof(double2) == 16 && alignof(uchar4) == 4, "");
static_assert(sizeof(double4) == 32 && alignof(double4) == 16 && sizeof(dim3) == 12, "");

extern "C" __global__ void vectors(const float* __restrict__ x, float* __restrict__ y, Params p) {
  const int i = element();
  const float4 v = __ldg(reinterpret_cast<const float4*>(x) + i);
  const int2 n = make_int2((int)v.x, (int)v.y);
  const uchar4 bytes = make_uchar4((unsigned char)n.x, (unsigned char)n.y, 3, 4);
  __stcs(reinterpret_cast<float4*>(y) + i, make_float4(v.w, v.z, (float)bytes.y, (float)(bytes.x + bytes.w)));
}

extern "C" __global__ void copy_strided(const float* __restrict__ x, float* __restrict__ y, Params p) {
  const int i = element();
  if (i < p.n) y[(long long)i * p.y_stride] = x[(long long)i * p.x_stride];
}

extern "C" __global__ void accumulate(const float* __restrict__ x, float* __restrict__ y, float* __restrict__ sum,
                                      Params p) {
  __shared__ float scratch[4];
  const float v = element() < p.n ? x[element() * p.x_stride] : 0.f;
  if (element() < p.n) y[element() * p.y_stride] = v;
  const float total = block_sum<4>(v, scratch);
  if (threadIdx.x == 0) sum[blockIdx.x] += total;
}
