// out[n, o] = scale[o] * sum over k of x[n, k] * W[o, k] + bias[o] for 1 to 8 * TOKEN_TILES tokens n, where the weight
// is decoded from shared memory straight into tensor-core fragments and never stored.
//
// One 16-byte lookup gives 8 neighbouring weights of one row: exactly one lane's share of two m16n8k16 A fragments, if
// the fragment's k positions are renamed. Lane (row = lane / 4, q = lane % 4) holds GROUPS_PER_LANE neighbouring groups
// of its row, so step j of a "superblock" of 4 * GROUPS_PER_LANE groups multiplies groups {q * GROUPS_PER_LANE + j}, and
// the B fragment of lane (token = lane / 4, q) is the 16 bytes of x of that same group. No weight or activation is moved
// between lanes. The codebooks stand in shared memory COPIES times, copy c in the c-th 16-byte column, and lane l reads
// copy l % COPIES: with 8 copies every lookup is free of bank conflicts, which is what bounds this kernel.
//
// A block owns a range of 16-row tiles. Its warps form ROW_WARPS x WARPS / ROW_WARPS: row warps take different tiles and share
// staged activations, k warps take different superblocks and are summed in fixed order at the end of every batch of
// tiles. Grid: (row ranges, splits of k, row partitions with codebooks of their own); with more than one split the sums
// go to `partial` and `finish_linear.cu` adds them in fixed order.
//
// Compile-time constants: NUM_BOOKS, NBITS, DTYPE_BF16, WARPS, ROW_TILES (tiles a warp accumulates at once), TOKEN_TILES,
// ROW_WARPS, GROUPS_PER_LANE, COPIES, ALIGNED (1: every row of codes is a whole number of aligned lane vectors).
#include "codebooks.cuh"

#define GROUPS_PER_STEP 4
constexpr int kSuperblock = GROUPS_PER_STEP * GROUPS_PER_LANE;  // groups of one staged piece of x
constexpr int kSlotBytes = TOKEN_TILES * 8 * kSuperblock * 16;
constexpr int kKWarps = WARPS / ROW_WARPS;
constexpr int kBatch = ROW_TILES * ROW_WARPS;  // tiles a block accumulates at once
constexpr int kTilesPerRound = TOKEN_TILES >= ROW_TILES ? 1 : ROW_TILES / TOKEN_TILES;  // tiles summed per barrier

struct Place {  // of a thread in its block
  int lane, row, quad, k_warp, row_warp;
};

__device__ __forceinline__ Place place(int thread) {
  int lane = thread % 32, warp = thread / 32;
  return {lane, lane / 4, lane % 4, warp / ROW_WARPS, warp % ROW_WARPS};
}

// Where a slot keeps the 16 bytes of x of a token and group: spread so that a fragment load, which reads groups
// GROUPS_PER_LANE apart of eight tokens, is free of bank conflicts.
__device__ __forceinline__ int place_of(int token, int group) {
  int quad = group / GROUPS_PER_LANE;
  int turn = GROUPS_PER_LANE == 4 ? (quad >> 1) | ((token & 1) << 1) : quad | ((token & 1) << 2);
  return (token * kSuperblock + (group ^ turn)) * 16;
}

// Stage x[:, superblock] by the group's threads; zeros beyond the last group, nothing beyond the last token.
__device__ __forceinline__ void stage_x(const LinearParams& p, u8* slot, int superblock, int thread) {
  constexpr int tokens_at_once = ROW_WARPS * 32 / kSuperblock;
  constexpr int flip = tokens_at_once % 2 ? (GROUPS_PER_LANE == 4 ? 32 : 64) : 0;  // the token's parity changes
  const int first = thread / kSuperblock, group = thread % kSuperblock;
  const int source = superblock * kSuperblock + group;
  const bool valid = source < p.groups;
  const u16* from = p.x + first * p.x_stride + (valid ? source : 0) * 8;
  const long long step = tokens_at_once * p.x_stride;
  u32 to = shared_address(slot) + place_of(first, group);
#pragma unroll 4
  for (int token = first; token < p.tokens; token += tokens_at_once) {
    copy_async_16(to, from, valid);
    from += step;
    to = (to + tokens_at_once * kSuperblock * 16) ^ flip;
  }
}

// The lane's codes of one row; zeros without a memory access where `wanted` is false.
__device__ __forceinline__ void load_codes(const LinearParams& p, const u8* row, int superblock, int quad, bool wanted,
                                           u32 (&words)[kWords]) {
  // Past the end read the row's last codes again: their x is zero, and no entry is used that the row does not use.
#if ALIGNED
  int vector = min(superblock * GROUPS_PER_STEP + quad, p.groups / GROUPS_PER_LANE - 1);
  load_once(row + vector * kLaneBytes, wanted, words);
#else
  constexpr int kGroupBytes = NUM_BOOKS * kCodeBytes;
  int first = (superblock * GROUPS_PER_STEP + quad) * GROUPS_PER_LANE;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    words[w] = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int byte = 4 * w + i;
      int group = min(first + byte / kGroupBytes, p.groups - 1);
      if (wanted) words[w] |= static_cast<u32>(row[group * kGroupBytes + byte % kGroupBytes]) << (8 * i);
    }
  }
#endif
}

// The 16 bytes of x that lane (token, quad) feeds to step STEP of a token tile. Beyond the last token they are whatever
// the slot holds: that reaches only columns of the product which are never stored.
template <int STEP>
__device__ __forceinline__ uint4 load_x(const Place& at, const u8* slot, int token_tile) {
  int place = place_of(at.row, at.quad * GROUPS_PER_LANE + STEP) + token_tile * 8 * kSuperblock * 16;
  return *reinterpret_cast<const uint4*>(slot + place);
}

__device__ __forceinline__ void multiply_pair(float (&acc)[4], const uint4& low, const uint4& high, const uint4& x) {
  mma_16x8x16(acc, low.x, high.x, low.y, high.y, x.x, x.y);
  mma_16x8x16(acc, low.z, high.z, low.w, high.w, x.z, x.w);
}

template <int STEP, int TILES>
__device__ __forceinline__ void multiply_step(const Place& at, const u8* books, const u8* slot,
                                              const u32 (&codes)[ROW_TILES][2][kWords], u32 column,
                                              float (&acc)[ROW_TILES][TOKEN_TILES][4]) {
  if constexpr (TOKEN_TILES <= 2) {  // hold x, decode one row tile at a time
    uint4 x[TOKEN_TILES];
#pragma unroll
    for (int t = 0; t < TOKEN_TILES; ++t) x[t] = load_x<STEP>(at, slot, t);
#pragma unroll
    for (int r = 0; r < TILES; ++r) {
      uint4 low = decode<STEP>(books, codes[r][0], column), high = decode<STEP>(books, codes[r][1], column);
#pragma unroll
      for (int t = 0; t < TOKEN_TILES; ++t) multiply_pair(acc[r][t], low, high, x[t]);
    }
  } else {  // hold the decoded row tiles, take x one token tile at a time
    uint4 low[TILES], high[TILES];
#pragma unroll
    for (int r = 0; r < TILES; ++r) {
      low[r] = decode<STEP>(books, codes[r][0], column);
      high[r] = decode<STEP>(books, codes[r][1], column);
    }
#pragma unroll
    for (int t = 0; t < TOKEN_TILES; ++t) {
      uint4 x = load_x<STEP>(at, slot, t);
#pragma unroll
      for (int r = 0; r < TILES; ++r) multiply_pair(acc[r][t], low[r], high[r], x);
    }
  }
}

template <int TILES, int STEP = 0>
__device__ __forceinline__ void multiply(const Place& at, const u8* books, const u8* slot,
                                         const u32 (&codes)[ROW_TILES][2][kWords], u32 column,
                                         float (&acc)[ROW_TILES][TOKEN_TILES][4]) {
  multiply_step<STEP, TILES>(at, books, slot, codes, column, acc);
  if constexpr (STEP + 1 < GROUPS_PER_LANE) multiply<TILES, STEP + 1>(at, books, slot, codes, column, acc);
}

// `multiply` for a number of tiles known at run time only.
template <int TILES>
__device__ __forceinline__ void multiply_tiles(const Place& at, int tiles, const u8* books,
                                               const u8* slot, const u32 (&codes)[ROW_TILES][2][kWords], u32 column,
                                               float (&acc)[ROW_TILES][TOKEN_TILES][4]) {
  if constexpr (TILES > 0) {
    if (tiles == TILES) {
      multiply<TILES>(at, books, slot, codes, column, acc);
    } else {
      multiply_tiles<TILES - 1>(at, tiles, books, slot, codes, column, acc);
    }
  }
}

// Sum the k warps' accumulators of one batch in fixed order and write the batch's outputs.
__device__ __forceinline__ void reduce_and_store(const LinearParams& p, float* sums, float unit, int tile0, int tiles,
                                                 const float (&acc)[ROW_TILES][TOKEN_TILES][4]) {
  constexpr int span = 16 * kTilesPerRound * ROW_WARPS;  // rows of one round
  constexpr int pitch = span + 4;                        // conflict-free for the fragment layout
  constexpr int tokens_at_once = WARPS * 32 / span;
  const int thread = opaque_thread();
  const Place at = place(thread);
  const int row = thread % span;
  const long long all_rows = static_cast<long long>(gridDim.z) * p.rows;
#pragma unroll
  for (int round = 0; round < ROW_TILES; round += kTilesPerRound) {
    if (round * ROW_WARPS >= tiles) break;
    const int in_part = (tile0 + round * ROW_WARPS) * 16 + row;
    const bool valid = thread < span * tokens_at_once && round * ROW_WARPS + row / 16 < tiles && in_part < p.rows;
    const long long o = static_cast<long long>(blockIdx.z) * p.rows + in_part;
    const float scale = valid ? to_float(p.scales[o]) : 0.0f;
    const float bias = valid && p.bias ? to_float(p.bias[o]) : 0.0f;
    __syncthreads();  // the previous round has been read
#pragma unroll
    for (int r = 0; r < kTilesPerRound; ++r) {
#pragma unroll
      for (int t = 0; t < TOKEN_TILES; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          int token = t * 8 + at.quad * 2 + (i & 1);
          int place_in_round = (r * ROW_WARPS + at.row_warp) * 16 + at.row + (i >> 1) * 8;
          if (round + r < ROW_TILES && token < p.tokens) {
            sums[(at.k_warp * p.tokens + token) * pitch + place_in_round] = acc[round + r][t][i];
          }
        }
      }
    }
    __syncthreads();
    const int end = valid ? p.tokens : 0;
#pragma unroll 4
    for (int token = thread / span; token < end; token += tokens_at_once) {
      float sum = 0.0f;
#pragma unroll
      for (int k = 0; k < kKWarps; ++k) sum += sums[(k * p.tokens + token) * pitch + row];
      sum *= unit;
      if (gridDim.y > 1) {
        p.partial[(static_cast<long long>(blockIdx.y) * p.tokens + token) * all_rows + o] = sum;
      } else {
        p.out[token * all_rows + o] = from_float(fmaf(sum, scale, bias));
      }
    }
    __syncwarp();  // whole warps at the next barrier
  }
}

// Bring the scales and biases that the batch will end with near.
__device__ __forceinline__ void prefetch_scales(const LinearParams& p, int tile0) {
  int row = tile0 * 16 + threadIdx.x * 64;  // a line of 128 bytes holds 64
  if (threadIdx.x * 64 >= kBatch * 16 || row >= p.rows) return;
  long long o = static_cast<long long>(blockIdx.z) * p.rows + row;
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p.scales + o));
  if (p.bias) asm volatile("prefetch.global.L2 [%0];" ::"l"(p.bias + o));
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) lookup_linear(const __grid_constant__ LinearParams p) {
  extern __shared__ __align__(1024) u8 shared[];
  u8* books = shared;
  const Place at = place(threadIdx.x);
  u8* slots = shared + kBooksBytes + at.k_warp * p.slots * kSlotBytes;
  float* sums = reinterpret_cast<float*>(shared + kBooksBytes + kKWarps * p.slots * kSlotBytes);
  const u32 column = at.lane % COPIES * 16;
  const int group_thread = at.row_warp * 32 + at.lane;

  const int bx = blockIdx.x, by = blockIdx.y;
  const int first_tile = bx * p.tiles_each + min(bx, p.tiles_over);
  const int last_tile = first_tile + p.tiles_each + (bx < p.tiles_over);
  const int first_block = by * p.blocks_each + min(by, p.blocks_over) + at.k_warp;
  const int last_block = first_block - at.k_warp + p.blocks_each + (by < p.blocks_over);
  const int blocks = first_block < last_block ? (last_block - first_block + kKWarps - 1) / kKWarps : 0;
  // Every k warp goes this often through the loop, so that all meet their barriers equally often; the last may find no work.
  const int rounds = (p.blocks_each + (by < p.blocks_over) + kKWarps - 1) / kKWarps;
  const bool resident = blocks <= p.slots;  // x of all this warp's superblocks stays staged

  const u8* codes = p.codes + blockIdx.z * p.code_stride * p.rows;
  u32 now[ROW_TILES][2][kWords], next[ROW_TILES][2][kWords];
  auto fetch = [&](int tile0, int superblock) {
    const int row0 = (tile0 + at.row_warp) * 16 + at.row;
#if ALIGNED
    // The usual case without a clamp: whole batches of whole tiles.
    const int last_vector = (superblock + 1) * GROUPS_PER_STEP;
    if (tile0 + kBatch <= last_tile && (tile0 + kBatch) * 16 <= p.rows && last_vector * GROUPS_PER_LANE <= p.groups) {
      const u8* from = codes + row0 * p.code_stride + (superblock * GROUPS_PER_STEP + at.quad) * kLaneBytes;
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          load_once(from + (r * ROW_WARPS * 16 + half * 8) * p.code_stride, true, next[r][half]);
        }
      }
      return;
    }
#endif
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int row = min(row0 + r * ROW_WARPS * 16 + half * 8, p.rows - 1);
        bool wanted = tile0 + r * ROW_WARPS + at.row_warp < last_tile;
        load_codes(p, codes + row * p.code_stride, superblock, at.quad, wanted, next[r][half]);
      }
    }
  };
  begin_after_previous_kernel();
  if (blocks > 0 && first_tile < last_tile) {
    stage_x(p, slots, first_block, group_thread);
    fetch(first_tile, first_block);
  }
  const float unit = fill_books<WARPS * 32>(
      reinterpret_cast<const uint4*>(p.books) + (static_cast<long long>(blockIdx.z) * NUM_BOOKS << NBITS), books,
      reinterpret_cast<u32*>(sums));
  __syncthreads();

  int slot = 0;
  for (int tile0 = first_tile; tile0 < last_tile; tile0 += kBatch) {
    const int tiles = min(kBatch, last_tile - tile0);
    const int mine = (tiles - at.row_warp + ROW_WARPS - 1) / ROW_WARPS;
    prefetch_scales(p, tile0);
    float acc[ROW_TILES][TOKEN_TILES][4] = {};
    for (int b = 0; b < rounds; ++b) {
      copy_async_wait();
      if constexpr (ROW_WARPS == 1) {
        __syncwarp();
      } else {
        group_barrier<ROW_WARPS * 32, kKWarps>(at.k_warp);
      }
      if (b >= blocks) continue;
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int w = 0; w < kWords; ++w) now[r][half][w] = next[r][half][w];
      const u8* staged = slots + slot * kSlotBytes;
      const bool wraps = b + 1 == blocks;
      const int next_tile0 = wraps ? tile0 + kBatch : tile0;
      const int next_block = wraps ? first_block : first_block + (b + 1) * kKWarps;
      slot = slot + 1 == p.slots || (resident && wraps) ? 0 : slot + 1;
      if (next_tile0 < last_tile) {
        if (!resident || (tile0 == first_tile && !wraps)) {
          stage_x(p, slots + slot * kSlotBytes, next_block, group_thread);
        }
        fetch(next_tile0, next_block);
      }
      multiply_tiles<ROW_TILES>(at, mine, books, staged, now, column, acc);
    }
    reduce_and_store(p, sums, unit, tile0, tiles, acc);
  }
}
