// out[n, o] = scale[o] * sum over k of x[n, k] * W[o, k] + bias[o] for many tokens n on Hopper (sm_90a), with one codebook
// that is larger than shared memory.
//
// Some warps gather entries by asynchronous copies of 16 bytes from the second level of the cache straight to where the
// tensor cores read them: tiles of 128 rows of W by 64 inputs, of which a ring keeps thousands of copies under way. What
// bounds is how many requests that cache serves (150 G/s on one H200), so as little as possible is asked for twice:
// - A cluster of TOKEN_BLOCKS x ROW_BLOCKS blocks works on ROW_BLOCKS tiles of rows and TOKEN_BLOCKS tiles of tokens. Of each
//   tile of rows every block gathers a part and sends it to the others, and of each tile of x it fetches a part that the
//   copy engine writes to several blocks.
// - Each block of a cluster of one or two can keep the first NEAR entries (the second block the next NEAR) in shared
//   memory, from which both read; two neighbours do that fast, larger clusters do not.
//
// Work is counted in stages, 64 inputs of a cluster's tiles. With `quantum` 1 all clusters get the same number of
// consecutive stages ("stream-K", Osama et al., PPoPP 2023) and `add_parts` adds the parts of a tile in order; with the
// number of stages of a tile they get whole tiles.
//
// Grid: (blocks, 1, row partitions with codebooks of their own). Compile-time constants: NBITS (9 to 16), GROUP (inputs of a
// group: 8 or 16), DTYPE_BF16, TOKEN_TILES (of 8 tokens, of a block: 4, 8, 16 or 32), TOKEN_BLOCKS (1, 2 or 4), ROW_BLOCKS,
// STAGES (of the ring), GATHER_WARPS (2, or 4 or 8 with at most 16 token tiles), NEAR (0: none).
#include "gather_tiles.cuh"

// Fetch the block's part of a tile of x to all blocks that multiply it; arrives at their barriers.
__device__ __forceinline__ void fetch_x(u32 to, const TensorMap& x, int input, int token, u32 barrier, u16 blocks) {
  if constexpr (ROW_BLOCKS == 1) {
    copy_box(to, x, input, token, barrier);
  } else {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
        "l"(&x), "r"(input), "r"(token), "r"(barrier), "h"(blocks)
        : "memory");
  }
}

// One thread: have x fetched.
__device__ __forceinline__ void fetch(const GatherParams& p, const Work& work) {
  const Place at = place();
  const u32 base = shared_address(shared);
  constexpr int share = kTokens / ROW_BLOCKS;
  u16 blocks = 0;  // with these tokens
#pragma unroll
  for (int r = 0; r < ROW_BLOCKS; ++r) blocks |= 1 << (r * TOKEN_BLOCKS + at.token_block);
  Ring<STAGES> ring;
  for (int unit = work.first; unit < work.last; ++unit, ring.advance()) {
    const Batch batch = batch_at(work, unit, 1);
    const u32 full = base + kFull + ring.slot * 8;
    const int token = (batch.token_tile * TOKEN_BLOCKS + at.token_block) * kTokens + at.row_block * share;
    barrier_wait(base + kEmpty + ring.slot * 8, ring.parity ^ 1);
    barrier_expect(full, kStageBytes - kWeightBytes / TOKEN_BLOCKS);
    const u32 to = base + ring.slot * kStageBytes + kWeightBytes + at.row_block * share * kRowBytes;
    fetch_x(to, p.x, batch.stage * kInputs, token, full, blocks);
  }
}

// One thread: hand gathered weights over to the tensor cores, and to the blocks with the same rows.
__device__ __forceinline__ void hand_over(const Work& work) {
  const Place at = place();
  const u32 base = shared_address(shared);
  constexpr int part_bytes = kWeightBytes / TOKEN_BLOCKS;
  Ring<STAGES> ring;
  for (int unit = work.first; unit < work.last; ++unit, ring.advance()) {
    const u32 full = base + kFull + ring.slot * 8, part = base + ring.slot * kStageBytes + at.token_block * part_bytes;
    barrier_wait(base + kGathered + ring.slot * 8, ring.parity);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#pragma unroll
    for (int other = 1; other < TOKEN_BLOCKS; ++other) {
      const int rank = at.row_block * TOKEN_BLOCKS + (at.token_block + other) % TOKEN_BLOCKS;
      const u32 to = at_rank(part, rank), barrier = at_rank(full, rank);
      asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                   "r"(part), "r"(part_bytes), "r"(barrier)
                   : "memory");
    }
    barrier_arrive(full);
  }
}

// Write a part of a tile's sums, [kTokens, kTileRows].
__device__ __forceinline__ void store_part(float* to, const float (&acc)[4 * TOKEN_TILES]) {
  const int lane = opaque_thread() % 32;
  to += lane % 4 * 2 * kTileRows + opaque_thread() / 32 * 16 + lane / 4;
#pragma unroll
  for (int t = 0; t < TOKEN_TILES; ++t, to += 8 * kTileRows) {
    to[0] = acc[4 * t], to[kTileRows] = acc[4 * t + 1];
    to[8] = acc[4 * t + 2], to[kTileRows + 8] = acc[4 * t + 3];
  }
}

__device__ __forceinline__ void multiply(const GatherParams& p, const Work& work) {
  const Place at = place();
  const int warp = threadIdx.x / 32, peer = threadIdx.x % 32;  // the block that this lane tells of a stage that was multiplied
  const u32 base = shared_address(shared);
  Ring<STAGES> ring;
  for (int unit = work.first; unit < work.last;) {
    const Batch batch = batch_at(work, unit, work.of_tile);
    unit += batch.count;
    float acc[4 * TOKEN_TILES] = {};
    u32 release = 0;  // the barrier of the stage before, which may still be read
    for (int i = 0; i < batch.count; ++i) {
      barrier_wait(base + kFull + ring.slot * 8, ring.parity);
      const u32 slot = base + ring.slot * kStageBytes;
      const u64 a = swizzled_descriptor(slot + warp / 4 * (64 * kRowBytes)), b = swizzled_descriptor(slot + kWeightBytes);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int k = 0; k < kInputs / 16; ++k) wgmma(acc, a + 2 * k, b + 2 * k);
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      wgmma_wait<1>();
      if (peer < kCluster && release) barrier_arrive_at(release, peer);
      release = base + kEmpty + ring.slot * 8;
      ring.advance();
    }
    wgmma_wait<0>();
    if (peer < kCluster && release) barrier_arrive_at(release, peer);
    if (batch.count == work.of_tile) {
      const int row = (batch.row_tile * ROW_BLOCKS + at.row_block) * kTileRows + warp * 16;
      if (row < p.rows) store(p, row, (batch.token_tile * TOKEN_BLOCKS + at.token_block) * kTokens, 1.0f, acc);
    } else {
      const int cluster = (blockIdx.z * gridDim.x + blockIdx.x) / kCluster;
      const long long part = (cluster * 2 + (batch.stage == 0)) * kCluster + at.rank;
      store_part(p.parts + part * (kTokens * kTileRows), acc);
    }
  }
}

// Tiles of rows and tokens that a cluster works on at once.
__device__ __forceinline__ int row_tiles(int rows) { return (rows + ROW_BLOCKS * kTileRows - 1) / (ROW_BLOCKS * kTileRows); }
__device__ __forceinline__ int token_tiles(int tokens) {
  return (tokens + TOKEN_BLOCKS * kTokens - 1) / (TOKEN_BLOCKS * kTokens);
}

__device__ __forceinline__ void keep_near(const u8* book) {
  const u32 first = rank_in_cluster() * NEAR, to = shared_address(shared) + kTable;
  book += ((static_cast<long long>(blockIdx.z) << NBITS) + first) * kEntryBytes;
#pragma unroll 8
  for (int i = threadIdx.x; i < NEAR * kPieces; i += kThreads) {
    copy_async_16(to + i * 16, book + i * 16, first + i / kPieces < 1u << NBITS);
  }
  copy_async_wait();
  cluster_barrier();
}

extern "C" __global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kThreads, 1)
    gather_gemm(const __grid_constant__ GatherParams p) {
  if (threadIdx.x == 0) {
    const u32 base = shared_address(shared);
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(base + kFull + s * 8, 2);
      barrier_init(base + kEmpty + s * 8, kCluster * kConsumers / 32);
      barrier_init(base + kGathered + s * 8, kGatherers + (NEAR > 0 ? GATHER_WARPS : 0));
    }
    publish_barriers();
  }
  cluster_barrier();
  begin_after_previous_kernel();
  if constexpr (NEAR > 0) keep_near(p.book);
  Work work;
  work.of_tile = p.stages;
  work.of_tokens = token_tiles(p.tokens);
  const int clusters = gridDim.x / kCluster, cluster = blockIdx.x / kCluster;
  const long long quanta = static_cast<long long>(row_tiles(p.rows)) * work.of_tokens * (p.stages / p.quantum);
  work.first = static_cast<int>(cluster * quanta / clusters) * p.quantum;
  work.last = static_cast<int>((cluster + 1) * quanta / clusters) * p.quantum;
  // The tensor cores' warps need registers for 4 * TOKEN_TILES sums.
  if (threadIdx.x >= kConsumers) {
    if constexpr (GATHER_WARPS == 2) asm volatile("setmaxnreg.dec.sync.aligned.u32 104;");
    if (threadIdx.x < kConsumers + kGatherers) {
      gather(p, work);
    } else if (threadIdx.x == kConsumers + kGatherers) {
      fetch(p, work);
    } else if (threadIdx.x == kConsumers + kGatherers + 32) {
      hand_over(work);
    }
  } else {
    if constexpr (GATHER_WARPS == 2) asm volatile("setmaxnreg.inc.sync.aligned.u32 200;");
    multiply(p, work);
  }
  __syncwarp();
  cluster_barrier();  // the other blocks may still send to this one, read its near entries or its barriers
}

struct AddParams {
  const float* parts;  // of GatherParams
  const u16* scales;
  const u16* bias;
  u16* out;
  int tokens, rows, stages, clusters;
};

// Write the outputs of tiles that several clusters worked on: scale * the sum of the parts in order + bias. A block takes 8
// tokens of 128 rows.
extern "C" __global__ void __launch_bounds__(256) add_parts(const __grid_constant__ AddParams p) {
  begin_after_previous_kernel();
  const int rank = blockIdx.x / TOKEN_TILES % kCluster, tile = blockIdx.x / TOKEN_TILES / kCluster;
  const int of_tokens = token_tiles(p.tokens);
  const long long units = static_cast<long long>(row_tiles(p.rows)) * of_tokens * p.stages;
  const auto cluster_of = [&](long long unit) { return static_cast<int>(((unit + 1) * p.clusters - 1) / units); };
  const int first = cluster_of(static_cast<long long>(tile) * p.stages), last = cluster_of((tile + 1LL) * p.stages - 1);
  if (first == last) return;  // written by that cluster
  const int in_tile = threadIdx.x % 32 * 4, token_in_tile = blockIdx.x % TOKEN_TILES * 8 + threadIdx.x / 32;
  const int row0 = (tile / of_tokens * ROW_BLOCKS + rank / TOKEN_BLOCKS) * kTileRows + in_tile;
  const int token = (tile % of_tokens * TOKEN_BLOCKS + rank % TOKEN_BLOCKS) * kTokens + token_in_tile;
  if (token >= p.tokens) return;
  float sums[4] = {};
  for (int c = first; c <= last; ++c) {
    const long long part = ((blockIdx.z * p.clusters + c) * 2LL + (c == first)) * kCluster + rank;
    const float4 v = *reinterpret_cast<const float4*>(p.parts + (part * kTokens + token_in_tile) * kTileRows + in_tile);
    sums[0] += v.x, sums[1] += v.y, sums[2] += v.z, sums[3] += v.w;
  }
  const long long all_rows = static_cast<long long>(gridDim.z) * p.rows;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (row0 + i >= p.rows) return;
    const long long o = static_cast<long long>(blockIdx.z) * p.rows + row0 + i;
    p.out[token * all_rows + o] = from_float(fmaf(sums[i], to_float(p.scales[o]), p.bias ? to_float(p.bias[o]) : 0.0f));
  }
}
