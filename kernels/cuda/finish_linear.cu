// out[n, o] = scale[o] * sum over s of partial[s, n, o] + bias[o], in the order of s.
//
// Compile-time constants: DTYPE_BF16.
#include "common.cuh"

struct FinishParams {
  const float* partial;  // [splits, tokens, rows]
  const u16* scales;
  const u16* bias;
  u16* out;  // [tokens, rows]
  long long rows, elements;
  int splits;
};

extern "C" __global__ void __launch_bounds__(256) finish_linear(const __grid_constant__ FinishParams p) {
  long long e = static_cast<long long>(blockIdx.x) * 256 + threadIdx.x;
  if (e >= p.elements) return;
  long long o = e % p.rows;
  float scale = to_float(p.scales[o]);
  float bias = p.bias ? to_float(p.bias[o]) : 0.0f;
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");  // until the partial sums are written
#endif
  float sum = 0.0f;
#pragma unroll 8
  for (int s = 0; s < p.splits; ++s) sum += p.partial[s * p.elements + e];
  p.out[e] = from_float(fmaf(sum, scale, bias));
}
