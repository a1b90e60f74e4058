// Products of a group of inputs and an entry, rounded to 16 bits: to bfloat16, or to float16 after a power of two has
// brought them into its range.
//
// Compile-time constants: DTYPE_BF16.
#pragma once
#include "common.cuh"

#if DTYPE_BF16
#define PAIR "bf16"
constexpr u32 kInfinity = 0x7f80;
#else
#define PAIR "f16"
constexpr u32 kInfinity = 0x7c00;
#endif

__device__ __forceinline__ u32 round_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn." PAIR "x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// The larger of `most` and the magnitudes of a pair, as bits, which compare like the numbers.
__device__ __forceinline__ u32 largest(u32 most, u32 pair) { return max(most, max(pair & 0x7fff, pair >> 16 & 0x7fff)); }

// The same without magnitudes that are not finite: such entries only matter to the rows that use them.
__device__ __forceinline__ u32 largest_finite(u32 most, u32 pair) {
  const u32 low = pair & 0x7fff, high = pair >> 16 & 0x7fff;
  return max(most, max(low < kInfinity ? low : 0, high < kInfinity ? high : 0));
}

// The exponent of the least power of two above a finite magnitude; 0 for 0.
__device__ __forceinline__ int exponent_above(u32 bits) {
  return bits == 0 ? 0 : static_cast<int>(__float_as_uint(to_float(static_cast<u16>(bits))) >> 23) - 126;
}

// That of the largest magnitude of a block's threads, all of which take part; always 0 in bfloat16, which needs none.
__device__ __forceinline__ int exponent_above_all(u32 most, u32* scratch) {
#if DTYPE_BF16
  return 0;
#else
  if (threadIdx.x == 0) *scratch = 0;
  most = __reduce_max_sync(~0u, most);
  __syncthreads();
  if (threadIdx.x % 32 == 0) atomicMax(scratch, most);
  __syncthreads();
  return exponent_above(*scratch);
#endif
}

// The exponent of what products of COUNT inputs of magnitudes up to `most_x` with entries below 2^above are multiplied by.
template <int COUNT>
__device__ __forceinline__ int exponent_into_range(int above, u32 most_x) {
  constexpr int kRoom = COUNT == 8 ? 12 : COUNT == 16 ? 11 : 10;  // COUNT products below 2^kRoom add up to at most 2^15
  return DTYPE_BF16 ? 0 : kRoom - above - exponent_above(most_x);
}

__device__ __forceinline__ float power_of_two(int exponent) { return __uint_as_float(exponent + 127 << 23); }
