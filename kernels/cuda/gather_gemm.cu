// out[n, o] = scale[o] * sum over k of x[n, k] * W[o, k] + bias[o] for many tokens n on Hopper (sm_90a), with one codebook
// that is larger than shared memory.
//
// Some warps gather entries by asynchronous copies of 16 bytes from the second level of the cache straight to where the
// tensor cores read them: tiles of 128 rows of W by 64 inputs, of which a ring keeps thousands of copies under way. What
// bounds is how many requests that cache serves (150 G/s on one H100), so as little as possible is asked for twice:
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
#include "gemm.cuh"
#include "tensor_map.cuh"

constexpr int kConsumers = 256, kGatherers = 32 * GATHER_WARPS;
constexpr int kThreads = kConsumers + (GATHER_WARPS + 5) / 4 * 128;  // whole warpgroups with two more warps
constexpr int kTileRows = 128;
constexpr int kTokens = 8 * TOKEN_TILES;
constexpr int kCluster = TOKEN_BLOCKS * ROW_BLOCKS;
constexpr int kInputs = 64, kRowBytes = 2 * kInputs;  // of one row of either operand in a stage
constexpr int kWeightBytes = kTileRows * kRowBytes;
constexpr int kStageBytes = kWeightBytes + kTokens * kRowBytes;
constexpr int kEntryBytes = 2 * GROUP;
constexpr int kTable = STAGES * kStageBytes;           // the near entries
constexpr int kFull = kTable + NEAR * kEntryBytes;     // barriers: a stage is complete
constexpr int kEmpty = kFull + STAGES * 8;             // and has been multiplied in all blocks of the cluster
constexpr int kGathered = kEmpty + STAGES * 8;         // the block's own part of the weights is there
static_assert(NEAR == 0 || kCluster <= 2);

// A lane gathers kLanePieces of 16 bytes for each stage: of kLaneCodes codes of each of kLaneRows rows the piece that is its
// own, so that neighbouring lanes read the pieces of one entry.
constexpr int kPieces = GROUP / 8;
constexpr int kWarpRows = kTileRows / TOKEN_BLOCKS / GATHER_WARPS;
constexpr int kLanePieces = kWarpRows / 4;
constexpr int kRowCodes = kInputs / GROUP;
constexpr int kLaneCodes = kLanePieces < kRowCodes ? kLanePieces : kRowCodes;
constexpr int kLaneRows = kLanePieces / kLaneCodes;
constexpr int kParts = kRowCodes / kLaneCodes;    // lanes that share a row's codes
constexpr int kRowStep = 32 / kPieces / kParts;   // between a lane's rows
constexpr int kWords = kLaneCodes / 2;
constexpr int kAhead = NEAR || kLanePieces > 8 ? 2 : 4;  // stages whose codes are loaded at once

struct GatherParams {
  TensorMap x;            // [tokens, 64 * stages] in tiles of kTokens / ROW_BLOCKS rows
  const u8* codes;        // [partitions * rows, groups] of 16 bits
  const u8* book;         // [partitions, 2^NBITS, GROUP] 16-bit floats
  const u16* scales;      // [partitions * rows]
  const u16* bias;        // [partitions * rows] or null
  u16* out;               // [tokens, partitions * rows]
  float* parts;           // [partitions, clusters, 2, kCluster, kTokens, kTileRows] with quantum 1
  long long code_stride;  // bytes from one row of codes to the next
  int tokens, rows, stages, quantum;
};

extern __shared__ __align__(1024) u8 shared[];  // ring of tiles of W and x, near entries, barriers

struct Place {  // of a block in its cluster
  int rank, token_block, row_block;
};

__device__ __forceinline__ Place place() {
  const int rank = rank_in_cluster();
  return {rank, rank % TOKEN_BLOCKS, rank / TOKEN_BLOCKS};
}

struct Work {  // of a cluster: stages of all tiles in a row; tiles of tokens follow each other
  int first, last;
  int of_tile, of_tokens;  // stages of a tile; tiles of tokens
};

struct Batch {  // of stages of one tile
  int row_tile, token_tile, stage, count;
};

__device__ __forceinline__ Batch batch_at(const Work& work, int unit, int most) {
  const int tile = unit / work.of_tile, stage = unit - tile * work.of_tile;
  return {tile / work.of_tokens, tile % work.of_tokens, stage, min(most, min(work.of_tile - stage, work.last - unit))};
}

__device__ __forceinline__ u32 at_rank(u32 address, int rank) {
  u32 remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}

// Codes stay in the first level of the cache until the stages that share a sector have taken theirs.
__device__ __forceinline__ void load_codes(const u8* from, u32 (&words)[kWords]) {
  if constexpr (kWords == 4) {
    asm volatile("ld.global.nc.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "l"(from));
  } else if constexpr (kWords == 2) {
    asm volatile("ld.global.nc.L2::128B.v2.u32 {%0,%1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(from));
  } else {
    asm volatile("ld.global.nc.L2::128B.u32 %0, [%1];" : "=r"(words[0]) : "l"(from));
  }
}

// 16 bytes from global to shared memory where `wanted`.
__device__ __forceinline__ void gather_16(u32 to, const u8* from, bool wanted) {
  asm volatile("{.reg .pred wanted; setp.ne.u32 wanted, %2, 0; @wanted cp.async.cg.shared.global [%0], [%1], 16;}" ::"r"(to),
               "l"(from), "r"(static_cast<u32>(wanted))
               : "memory");
}

// 16 bytes from the shared memory of a block of the cluster, where `wanted`.
__device__ __forceinline__ uint4 load_near(u32 from, bool wanted) {
  uint4 v;
  asm volatile("{.reg .pred wanted; setp.ne.u32 wanted, %5, 0; @wanted ld.shared::cluster.v4.u32 {%0,%1,%2,%3}, [%4];}"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from), "r"(static_cast<u32>(wanted)));
  return v;
}

__device__ __forceinline__ void store_near(u32 to, uint4 v, bool wanted) {
  asm volatile("{.reg .pred wanted; setp.ne.u32 wanted, %5, 0; @wanted st.shared.v4.u32 [%0], {%1,%2,%3,%4};}" ::"r"(to),
               "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(static_cast<u32>(wanted))
               : "memory");
}

// Gather the block's part of one stage's weights to the slot of the ring, and say so.
__device__ __forceinline__ void gather_stage(const u8* book, const u32 (&codes)[kLaneRows][kWords],
                                             const u32 (&to)[kLanePieces], u32 slot, u32 gathered) {
  const u32 base = shared_address(shared);
  u32 near[kLanePieces];  // addresses, 0: far
#pragma unroll
  for (int j = 0; j < kLanePieces; ++j) {
    const u32 word = codes[j / kLaneCodes][j % kLaneCodes / 2];
    u32 code;
    if constexpr (NBITS == 16) {
      code = __byte_perm(word, 0, j % 2 ? 0x4432 : 0x4410);
    } else {
      code = word >> j % 2 * 16 & ((1u << NBITS) - 1);
    }
    near[j] = 0;
    if constexpr (NEAR > 0) {
      const u32 owner = code >= NEAR, at = base + kTable + (code - owner * NEAR) * kEntryBytes + threadIdx.x % kPieces * 16;
      if (code < kCluster * NEAR) near[j] = at_rank(at, owner);
    }
    gather_16(to[j] + slot, book + static_cast<u64>(code) * kEntryBytes, near[j] == 0);
  }
  uint4 values[kLanePieces];
  if constexpr (NEAR > 0) {
#pragma unroll
    for (int j = 0; j < kLanePieces; ++j) values[j] = load_near(near[j], near[j] != 0);
  }
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(gathered) : "memory");
  if constexpr (NEAR > 0) {
#pragma unroll
    for (int j = 0; j < kLanePieces; ++j) store_near(to[j] + slot, values[j], near[j] != 0);
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(gathered);
  }
}

__device__ __forceinline__ void gather(const GatherParams& p, const Work& work) {
  const Place at = place();
  const int warp = threadIdx.x / 32 - kConsumers / 32, lane = threadIdx.x % 32;
  const int piece = lane % kPieces, part = lane / kPieces % kParts;
  const int lane_row = at.token_block * (kTileRows / TOKEN_BLOCKS) + warp * kWarpRows + lane / kPieces / kParts;
  const u32 base = shared_address(shared);
  const u8* book = p.book + (static_cast<long long>(blockIdx.z) << NBITS) * kEntryBytes + piece * 16;
  u32 to[kLanePieces];
#pragma unroll
  for (int j = 0; j < kLanePieces; ++j) {
    const int row = lane_row + j / kLaneCodes * kRowStep, column = (part * kLaneCodes + j % kLaneCodes) * kPieces + piece;
    to[j] = base + row * kRowBytes + ((column ^ (row & 7)) << 4);
  }
  u32 next[kAhead][kLaneRows][kWords], now[kAhead][kLaneRows][kWords];
  const auto fetch = [&](const Batch& batch) {  // past the last row or stage the last codes again
    const int row0 = (batch.row_tile * ROW_BLOCKS + at.row_block) * kTileRows + lane_row;
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      const int row = min(row0 + r * kRowStep, p.rows - 1);
      const u8* from = p.codes + (static_cast<long long>(blockIdx.z) * p.rows + row) * p.code_stride + part * (2 * kLaneCodes);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) load_codes(from + min(batch.stage + i, p.stages - 1) * (2 * kRowCodes), next[i][r]);
    }
  };
  Ring<STAGES> ring;
  int unit = work.first;
  Batch following = batch_at(work, unit, kAhead);
  if (unit < work.last) fetch(following);
  while (unit < work.last) {
    const int count = following.count;
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
#pragma unroll
      for (int r = 0; r < kLaneRows; ++r)
#pragma unroll
        for (int w = 0; w < kWords; ++w) now[i][r][w] = next[i][r][w];
    unit += count;
    if (unit < work.last) fetch(following = batch_at(work, unit, kAhead));
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (i >= count) break;
      barrier_wait(base + kEmpty + ring.slot * 8, ring.parity ^ 1);
      gather_stage(book, now[i], to, ring.slot * kStageBytes, base + kGathered + ring.slot * 8);
      ring.advance();
    }
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
}

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
