// out[n, o] = scale[o] * sum over k of x[n, k] * W[o, k] + bias[o] for many tokens n on Hopper (sm_90a).
//
// As in lookup_wgmma.cu a warp decodes its 16 rows of W from the codebooks in shared memory straight into the registers
// that the warpgroup instruction multiplies, and x^T comes from shared memory. Here a block multiplies 128 rows (two
// warpgroups of 64) with 8 * TOKEN_TILES tokens at once, which keeps the tensor cores busy while one of the warpgroups
// decodes; every weight is decoded once for each of the ceil(tokens / (8 * TOKEN_TILES)) tiles of tokens and never stored.
//
// `arrange_x` first writes x in the order in which it is consumed, so that one thread can feed a ring of stages by bulk
// copies. Two blocks of a cluster, with neighbouring rows and the same tokens, load half of each stage and send it to both.
//
// Grid: (blocks, splits of K, row partitions with codebooks of their own); clusters take pairs of row tiles in turn, all
// tiles of tokens of one pair in a row. With more than one split the sums go to `partial`, and `finish_linear.cu` adds them
// in fixed order.
//
// Compile-time constants: those of codebooks.cuh with COPIES 8, TOKEN_TILES (16 or 32).
#include "codebooks.cuh"
#include "gemm.cuh"

constexpr int kConsumers = 256;
constexpr int kThreads = kConsumers + 128;         // the last warpgroup has one thread that loads
constexpr int kCluster = 2;
constexpr int kTileRows = 128;
constexpr int kTokens = 8 * TOKEN_TILES;
constexpr int kStepBytes = 4 * kCore;              // of x: 4 groups of 8 inputs
constexpr int kSteps = 2;                          // of one slot
constexpr int kSlotBytes = kSteps * kStepBytes;
constexpr int kStages = GROUPS_PER_LANE / kSteps;  // slots of one superblock
constexpr int kSlots = (NUM_BOOKS > 2 ? 96 : 160) * 1024 / kSlotBytes < 8 ? (NUM_BOOKS > 2 ? 96 : 160) * 1024 / kSlotBytes : 8;
constexpr int kSuperblock = 4 * GROUPS_PER_LANE;   // groups
constexpr int kFull = kBooksBytes + kSlots * kSlotBytes;  // barriers: a slot has been filled
constexpr int kEmpty = kFull + kSlots * 8;                // and read, by both blocks
constexpr int kScratch = kEmpty + kSlots * 8;

struct GemmParams {
  const u8* x;            // [token tiles, superblocks, GROUPS_PER_LANE, 4, kTokens, 16 bytes], from arrange_x
  const u8* codes;        // [partitions * rows, groups, NUM_BOOKS]
  const u16* books;       // [partitions, NUM_BOOKS, 2^NBITS, 8]
  const u16* scales;      // [partitions * rows]
  const u16* bias;        // [partitions * rows] or null
  u16* out;               // [tokens, partitions * rows]
  float* partial;         // [splits, tokens, partitions * rows] if gridDim.y > 1
  long long code_stride;  // bytes from one row of codes to the next
  int tokens, rows, groups;
  int blocks_each, blocks_over;  // superblocks per block of the grid's y; the first `blocks_over` take one more
};

extern __shared__ __align__(1024) u8 shared[];  // codebooks, ring of x, barriers, scratch of fill_books

// Bulk copy to the same place in both blocks of the cluster; arrives at both blocks' `barrier`.
__device__ __forceinline__ void copy_to_cluster(u32 to, const u8* from, int bytes, u32 barrier) {
  const u16 everyone = (1 << kCluster) - 1;
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "h"(everyone)
      : "memory");
}

struct Work {  // of this block: tiles first, first + step, ... of row pairs x token tiles, and some superblocks
  int first, step, count, of_tokens;
  int first_block, blocks, superblocks;
};

__device__ __forceinline__ void produce(const GemmParams& p, const Work& work) {
  const u32 base = shared_address(shared), rank = rank_in_cluster();
  constexpr int kShare = kSlotBytes / kCluster;
  const int stages = work.blocks * kStages;
  Ring<kSlots> at;
  for (int tile = work.first; tile < work.count; tile += work.step) {
    const long long first = static_cast<long long>(tile % work.of_tokens) * work.superblocks + work.first_block;
    const u8* from = p.x + first * kStages * kSlotBytes + rank * kShare;
    for (int stage = 0; stage < stages; ++stage, at.advance()) {
      const u32 full = base + kFull + at.slot * 8;
      barrier_wait(base + kEmpty + at.slot * 8, at.parity ^ 1);
      barrier_expect(full, kSlotBytes);
      copy_to_cluster(base + kBooksBytes + at.slot * kSlotBytes + rank * kShare, from, kShare, full);
      from += kSlotBytes;
    }
  }
}

struct Consumer {
  u32 column;
  bool active;    // the warp has rows
  int peer;       // the block that this lane tells of a slot that was read; -1: none
  Ring<kSlots> at;
  u32 release;    // the barrier of the slot before, which may still be read; 0 if none
};

template <int STEP = 0>
__device__ __forceinline__ void multiply_block(Consumer& c, const u32 (&words)[2][kWords], float (&acc)[4 * TOKEN_TILES]) {
  const u32 base = shared_address(shared);
  uint4 low = make_uint4(0, 0, 0, 0), high = low;  // all warps of a warpgroup must take part in the product
  if (c.active) {
    low = decode<STEP>(shared, words[0], c.column);
    high = decode<STEP>(shared, words[1], c.column);
  }
  if (STEP % kSteps == 0) barrier_wait(base + kFull + c.at.slot * 8, c.at.parity);
  const u32 slot = (base + kBooksBytes + c.at.slot * kSlotBytes) & 0x3ffff;  // in a cluster the highest byte is the rank
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  wgmma(acc, low.x, high.x, low.y, high.y, descriptor(slot, STEP % kSteps * kStepBytes));
  wgmma(acc, low.z, high.z, low.w, high.w, descriptor(slot, STEP % kSteps * kStepBytes + 2 * kCore));
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  wgmma_wait<1>();
  if (STEP % kSteps == 0) {  // all steps of the slot before are finished
    if (c.peer >= 0 && c.release) barrier_arrive_at(c.release, c.peer);
  }
  if ((STEP + 1) % kSteps == 0) {
    c.release = base + kEmpty + c.at.slot * 8;
    c.at.advance();
  }
  if constexpr (STEP + 1 < GROUPS_PER_LANE) multiply_block<STEP + 1>(c, words, acc);
}

// Write the sums of a part of K.
__device__ __forceinline__ void store_sums(const GemmParams& p, int row0, int token0, float unit,
                                           const float (&acc)[4 * TOKEN_TILES]) {
  const int lane = opaque_thread() % 32;
  const long long all_rows = static_cast<long long>(gridDim.z) * p.rows;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row0 + half * 8 + lane / 4;
    if (row >= p.rows) continue;
    int token = token0 + lane % 4 * 2;  // and the next
    float* to = p.partial + (static_cast<long long>(blockIdx.y) * p.tokens + token) * all_rows +
                static_cast<long long>(blockIdx.z) * p.rows + row;
#pragma unroll
    for (int t = 0; t < TOKEN_TILES; ++t, token += 8, to += 8 * all_rows) {
      if (token < p.tokens) to[0] = acc[4 * t + half * 2] * unit;
      if (token + 1 < p.tokens) to[all_rows] = acc[4 * t + half * 2 + 1] * unit;
    }
  }
}

__device__ __forceinline__ void consume(const GemmParams& p, const Work& work) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int last_vector = p.groups / GROUPS_PER_LANE - 1;
  const int warp_row = static_cast<int>(rank_in_cluster()) * kTileRows + warp * 16;
  const u8* codes;     // of the lane's first row
  long long to_other;  // from there to its second row
  u32 now[2][kWords], next[2][kWords];
  // Past the last row or group read the last codes again: rows are not stored, and x is zero there.
  const auto start_tile = [&](int tile) {
    const int row0 = tile / work.of_tokens * (kCluster * kTileRows) + warp_row + lane / 4, row = min(row0, p.rows - 1);
    codes = p.codes + (static_cast<long long>(blockIdx.z) * p.rows + row) * p.code_stride;
    to_other = (min(row0 + 8, p.rows - 1) - row) * p.code_stride;
  };
  const auto fetch = [&](int block, bool wanted) {
    const u8* from = codes + min((work.first_block + block) * 4 + lane % 4, last_vector) * kLaneBytes;
    load_once(from, wanted, next[0]);
    load_once(from + to_other, wanted, next[1]);
  };
  start_tile(work.first);
  fetch(0, work.first < work.count);
  const float unit = fill_books<kConsumers>(
      reinterpret_cast<const uint4*>(p.books) + (static_cast<long long>(blockIdx.z) * NUM_BOOKS << NBITS), shared,
      reinterpret_cast<u32*>(shared + kScratch));
  first_threads_barrier<kConsumers>();

  Consumer c = {lane % COPIES * 16u, false, lane < kCluster ? lane : -1, {}, 0};
  for (int tile = work.first; tile < work.count; tile += work.step) {
    const int row0 = tile / work.of_tokens * (kCluster * kTileRows) + warp_row;
    c.active = row0 < p.rows;
    float acc[4 * TOKEN_TILES] = {};
    for (int block = 0; block < work.blocks; ++block) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) now[0][w] = next[0][w], now[1][w] = next[1][w];
      if (block + 1 < work.blocks) {
        fetch(block + 1, true);
      } else {
        start_tile(tile + work.step);
        fetch(0, tile + work.step < work.count);
      }
      multiply_block(c, now, acc);
    }
    wgmma_wait<0>();
    if (c.active && gridDim.y > 1) {
      store_sums(p, row0, tile % work.of_tokens * kTokens, unit, acc);
    } else if (c.active) {
      store(p, row0, tile % work.of_tokens * kTokens, unit, acc);
    }
  }
}

extern "C" __global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kThreads, 1)
    lookup_gemm(const __grid_constant__ GemmParams p) {
  if (threadIdx.x == 0) {
    const u32 base = shared_address(shared);
    for (int s = 0; s < kSlots; ++s) {
      barrier_init(base + kFull + s * 8, 1);
      barrier_init(base + kEmpty + s * 8, kCluster * kConsumers / 32);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster_barrier();
  const int pairs = (p.rows + kCluster * kTileRows - 1) / (kCluster * kTileRows);
  const int by = blockIdx.y;
  Work work;
  work.superblocks = (p.groups + kSuperblock - 1) / kSuperblock;
  work.first_block = by * p.blocks_each + min(by, p.blocks_over);
  work.blocks = p.blocks_each + (by < p.blocks_over);
  work.of_tokens = (p.tokens + kTokens - 1) / kTokens;
  work.first = blockIdx.x / kCluster;
  work.step = gridDim.x / kCluster;
  work.count = pairs * work.of_tokens;
  if (threadIdx.x >= kConsumers) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == kConsumers) {
      asm volatile("griddepcontrol.wait;" ::: "memory");  // until arrange_x is done
      produce(p, work);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    consume(p, work);
  }
  __syncwarp();
  cluster_barrier();  // the other block may still send to this one, or read its barriers
}

struct ArrangeParams {
  const u16* x;  // [tokens, 8 * groups], rows start at multiples of 16 bytes
  u8* arranged;  // GemmParams.x
  long long x_stride;  // elements
  int tokens, groups, superblocks;
};

// Arrange x in the order that lookup_gemm multiplies it in, zeros beyond the last token and group: pair i of the four
// groups of a step together, as in lookup_wgmma.cu. One thread for each token and slot.
extern "C" __global__ void __launch_bounds__(256) arrange_x(const __grid_constant__ ArrangeParams p) {
  asm volatile("griddepcontrol.launch_dependents;");  // lookup_gemm may load its codebooks meanwhile
  const int token_tile = blockIdx.y, thread = blockIdx.x * 256 + threadIdx.x;
  const int in_tile = thread % kTokens, stage = thread / kTokens;
  if (stage >= p.superblocks * kStages) return;
  const int token = token_tile * kTokens + in_tile;
  const int group = stage / kStages * kSuperblock + stage % kStages * kSteps;
  u8* to = p.arranged + (static_cast<long long>(token_tile) * p.superblocks * kStages + stage) * kSlotBytes + in_tile * 16;
  u32 v[kSteps][4][4];
#pragma unroll
  for (int q = 0; q < 4; ++q) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int at = group + q * GROUPS_PER_LANE + s;
      const bool valid = token < p.tokens && at < p.groups;
      const u16* from = p.x + (valid ? token * p.x_stride + at * 8 : 0);
      const uint4 entry = valid ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
      v[s][0][q] = entry.x, v[s][1][q] = entry.y, v[s][2][q] = entry.z, v[s][3][q] = entry.w;
    }
  }
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      *reinterpret_cast<uint4*>(to + s * kStepBytes + pair * kCore) = make_uint4(v[s][pair][0], v[s][pair][1], v[s][pair][2], v[s][pair][3]);
    }
  }
}
