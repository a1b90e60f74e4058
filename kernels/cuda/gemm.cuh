// What the products of many tokens on Hopper share: rings of shared memory, clusters of blocks, and writing the outputs.
//
// Compile-time constants: those of wgmma.cuh.
#pragma once
#include "wgmma.cuh"

// A slot's place in the ring, and the parity of its barriers' phase.
template <int SLOTS>
struct Ring {
  int slot = 0;
  u32 parity = 0;

  __device__ __forceinline__ void advance() {
    if (++slot == SLOTS) slot = 0, parity ^= 1;
  }
};

__device__ __forceinline__ u32 rank_in_cluster() {
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// Arrive at the barrier that stands at the same place in another block of the cluster. Without the cluster's scope, which
// would cost a fence: a slot is read by products only, and those are finished.
__device__ __forceinline__ void barrier_arrive_at(u32 barrier, int rank) {
  asm volatile(
      "{.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];}" ::"r"(barrier), "r"(rank) : "memory");
}

// Write the outputs of a warp's 16 rows from `row0` of the partition on, for 8 * TOKEN_TILES tokens, pairs of neighbouring
// rows at once. Params have scales, bias (or null), out [tokens, all rows], tokens and rows (of one of gridDim.z partitions).
template <class Params>
__device__ __forceinline__ void store(const Params& p, int row0, int token0, float unit, const float (&acc)[4 * TOKEN_TILES]) {
  const int lane = opaque_thread() % 32;
  const long long all_rows = static_cast<long long>(gridDim.z) * p.rows;
  const bool odd = lane / 4 & 1, paired = (all_rows | p.rows) % 2 == 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row0 + half * 8 + lane / 4;
    const bool valid = row < p.rows;
    const long long o = static_cast<long long>(blockIdx.z) * p.rows + row;
    const float scale = valid ? to_float(p.scales[o]) * unit : 0.0f;
    const float bias = valid && p.bias ? to_float(p.bias[o]) : 0.0f;
    int token = token0 + lane % 4 * 2 + (paired && odd);  // and, unless paired, the next
    u16* to = p.out + token * all_rows + o - (paired && odd);
#pragma unroll
    for (int t = 0; t < TOKEN_TILES; ++t, token += 8, to += 8 * all_rows) {
      const float first = fmaf(acc[4 * t + half * 2], scale, bias), second = fmaf(acc[4 * t + half * 2 + 1], scale, bias);
      if (paired) {  // a lane of an even row takes the first token of both rows, its neighbour the second
        const float other = __shfl_xor_sync(~0u, odd ? first : second, 4);
        if (valid && token < p.tokens) *reinterpret_cast<u32*>(to) = odd ? pack(other, second) : pack(first, other);
      } else if (valid) {
        if (token < p.tokens) to[0] = from_float(first);
        if (token + 1 < p.tokens) to[all_rows] = from_float(second);
      }
    }
  }
}
