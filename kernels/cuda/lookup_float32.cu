// out[n, o] = scale[o] * sum over k of x[n, k] * W[o, k] + bias[o] in float32 on the ordinary arithmetic units (tensor
// cores would round to TF32). A warp takes one row of the weight, its lanes neighbouring groups; a decoded group serves
// TOKENS tokens from registers. Lane sums are added by a fixed butterfly, so results do not depend on scheduling.
//
// Compile-time constants: NUM_BOOKS, NBITS (at most 8), TOKENS.
#define DTYPE_BF16 0
#include "common.cuh"

constexpr int kThreads = 256;
constexpr int kEntries = NUM_BOOKS << NBITS;

struct Float32Params {
  const float* x;       // [tokens, 8 * groups]
  const u8* codes;      // [partitions * rows, groups, NUM_BOOKS]
  const float4* books;  // [partitions, NUM_BOOKS, 2^NBITS, 8]
  const float* scales;  // [partitions * rows]
  const float* bias;    // [partitions * rows] or null
  float* out;           // [tokens, partitions * rows]
  long long x_stride;   // elements
  long long code_stride;  // bytes
  int tokens, rows, groups;
};

__device__ __forceinline__ void add(float4& sum, float4 v) {
  sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
}

__device__ __forceinline__ float dot(float4 a, float4 b, float sum) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

extern "C" __global__ void __launch_bounds__(kThreads) lookup_float32(const __grid_constant__ Float32Params p) {
  extern __shared__ __align__(16) float4 books[];  // [book][entry][2]
  const int lane = threadIdx.x % 32, partition = blockIdx.z, first_token = blockIdx.y * TOKENS;
  for (int i = threadIdx.x; i < kEntries * 2; i += kThreads) {
    books[i] = p.books[static_cast<long long>(partition) * kEntries * 2 + i];
  }
  __syncthreads();
  const int warps = gridDim.x * (kThreads / 32);
  for (int r = blockIdx.x * (kThreads / 32) + threadIdx.x / 32; r < p.rows; r += warps) {
    const long long row = static_cast<long long>(partition) * p.rows + r;
    const u8* codes = p.codes + row * p.code_stride;
    float sums[TOKENS] = {};
    for (int group = lane; group < p.groups; group += 32) {
      float4 low = make_float4(0, 0, 0, 0), high = low;
#pragma unroll
      for (int c = 0; c < NUM_BOOKS; ++c) {
        const int entry = (c << NBITS) + (codes[group * NUM_BOOKS + c] & ((1 << NBITS) - 1));
        add(low, books[2 * entry]);
        add(high, books[2 * entry + 1]);
      }
#pragma unroll
      for (int t = 0; t < TOKENS; ++t) {
        const int token = min(first_token + t, p.tokens - 1);
        const float4* x = reinterpret_cast<const float4*>(p.x + token * p.x_stride + group * 8);
        sums[t] = dot(high, x[1], dot(low, x[0], sums[t]));
      }
    }
    const float bias = p.bias ? p.bias[row] : 0.0f;
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) sums[t] += __shfl_xor_sync(~0u, sums[t], distance);
      const int token = first_token + t;
      if (lane == 0 && token < p.tokens) {
        p.out[static_cast<long long>(token) * gridDim.z * p.rows + row] = fmaf(sums[t], p.scales[row], bias);
      }
    }
  }
}
