// Gathering entries of a large codebook into tiles of weights for gather_gemm.cu, which says what its constants mean: the
// work of a block, and the warps that fetch codes and entries.
#pragma once
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
