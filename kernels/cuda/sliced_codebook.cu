// partial[slice, n, o] = sum over k of x[n, k] * W[o, k] (before the scale), restricted to one slice of the only codebook.
//
// A codebook of 65536 entries is larger than the shared memory of any multiprocessor, and gathering from L2 is slower than
// reading a dense weight. So a block keeps a slice: of every entry WIDTH neighbouring bytes ("dimensions"), of all entries
// one of ENTRY_PARTS ranges. It reads all codes of its rows, looks up those that name its entries and takes zeros for the
// others. The slices' sums are added in fixed order by `finish_linear.cu`. Lookups with idle lanes meet fewer bank
// conflicts, so that splitting entries costs hardly more than splitting dimensions, and fewer, wider lookups cost less.
//
// Each lookup is one lane's share of m16n8k16 B fragments, if the k positions are renamed: lane (row = lane / 4,
// quad = lane % 4) holds eight neighbouring groups of its row. `slice_x` has arranged x as the A fragments that go
// with them, 16 bytes a lane. Codes come in pieces of 128 bytes of a row: pieces of 64 bytes from twice as many rows take
// twice the cycles of the load unit, what bounds the kernel.
// - At most 8 tokens (FEW_TOKENS): half of A's 16 rows would be idle, so they hold the same tokens at other inputs. A tile
//   has four rows of the weight, of each of which eight lanes hold neighbouring groups, even columns of the product belong
//   to the first half of these groups and to A's upper rows, odd columns to the second half and the lower rows; the rest
//   of the product is unused.
// - More: a tile has eight rows and a lane two vectors of codes, one of the first four rows and one of the others; lanes of
//   odd columns take the halves of a row the other way round. Each product takes one half: even columns then are rows of the
//   first vector and odd ones of the second for the first half, the opposite for the second half, and the sums' columns
//   are swapped in between.
//
// Warps form ROW_WARPS x WARPS / ROW_WARPS: row warps take different tiles of rows and share staged fragments, k warps take
// different superblocks (all lanes' groups of a row). Where x does not stay in shared memory, the copy engine brings it again
// for every batch of tiles (sm_90; elsewhere the warps copy it themselves).
//
// With INT8 a slice is two dimensions rounded to 8-bit integers, of which shared memory holds all entries of a 16-bit code:
// no lookup is in vain. They become 16-bit floats in registers, exactly, and the slice's scale multiplies the sums.
//
// Grid: (slices, row ranges, row partitions with codebooks of their own). Compile-time constants: NBITS, GROUP (inputs of a
// group: 8 or 16), WIDTH (4 or 8; 4 with INT8), INT8 (1: the codebook is the copy in 8-bit integers), ENTRY_PARTS,
// DTYPE_BF16, WARPS, ROW_WARPS, ROW_TILES (tiles a warp accumulates at once), TOKEN_TILES (of 16 tokens), FEW_TOKENS (1: at
// most 8), ALIGNED (1: every row of codes is a whole number of aligned vectors of eight).
#include "sliced_table.cuh"

constexpr int kStepGroups = 8 / WIDTH;  // looked up for one fragment

// Each lane's even columns become its odd ones and the other way round.
__device__ __forceinline__ void swap_columns(float (&acc)[ROW_TILES][TOKEN_TILES][4]) {
#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
    for (int t = 0; t < TOKEN_TILES; ++t)
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const float even = acc[r][t][i];
        acc[r][t][i] = acc[r][t][i + 1], acc[r][t][i + 1] = even;
      }
}

// `even` and `odd` are where the lane's fragments of even and odd numbers start in the slot.
template <int TILES, int STEP = 0>
__device__ __forceinline__ void multiply(const u8* table, const u8* even, const u8* odd,
                                         const u32 (&codes)[ROW_TILES][kHalves * kWords], u32 base,
                                         float (&acc)[ROW_TILES][TOKEN_TILES][4]) {
  u32 weights[TILES][2];
#pragma unroll
  for (int r = 0; r < TILES; ++r) {
    look_up<STEP * kStepGroups>(table, codes[r], base, weights[r]);
    if constexpr (kStepGroups == 2) look_up<STEP * kStepGroups + 1>(table, codes[r], base, weights[r] + 1);
  }
#pragma unroll
  for (int t = 0; t < TOKEN_TILES; ++t) {
    const uint4 x = *reinterpret_cast<const uint4*>((STEP % 2 ? odd : even) + STEP / 2 * 128 + t * 8 * kRowBytes);
#pragma unroll
    for (int r = 0; r < TILES; ++r) mma_16x8x16(acc[r][t], x.x, x.y, x.z, x.w, weights[r][0], weights[r][1]);
  }
  if constexpr (kHalves == 2 && (STEP + 1) % (kFragments / 2) == 0) swap_columns(acc);
  if constexpr (STEP + 1 < kFragments) multiply<TILES, STEP + 1>(table, even, odd, codes, base, acc);
}

// `multiply` for a number of tiles known at run time only.
template <int TILES>
__device__ __forceinline__ void multiply_tiles(int tiles, const u8* table, const u8* even, const u8* odd,
                                               const u32 (&codes)[ROW_TILES][kHalves * kWords], u32 base,
                                               float (&acc)[ROW_TILES][TOKEN_TILES][4]) {
  if constexpr (TILES > 0) {
    if (tiles == TILES) {
      multiply<TILES>(table, even, odd, codes, base, acc);
    } else {
      multiply_tiles<TILES - 1>(tiles, table, even, odd, codes, base, acc);
    }
  }
}

// Write one batch's sums: of one k warp straight from registers, of several through shared memory in fixed order.
__device__ __forceinline__ void store_sums(const SlicedParams& p, float* sums, int tile0, int last_tile,
                                           const float (&acc)[ROW_TILES][TOKEN_TILES][4]) {
  constexpr int span = kTileRows * ROW_WARPS;  // rows of one round
  const int thread = opaque_thread();
  const Place at = place(thread);
  const long long all_rows = static_cast<long long>(gridDim.z) * p.rows;
#if INT8
  const float scale = p.scales[blockIdx.z * kDimParts + blockIdx.x % kDimParts];
#else
  constexpr float scale = 1.0f;
#endif
  float* out = p.partial + static_cast<long long>(blockIdx.x) * p.tokens * all_rows + static_cast<long long>(blockIdx.z) * p.rows;
#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r) {
    const int first = (tile0 + r * ROW_WARPS) * kTileRows, end = min(last_tile * kTileRows, p.rows);
    if (first >= end) break;
    if constexpr (kKWarps > 1) __syncthreads();  // the previous round has been read
    auto put = [&](int token, int row, float sum) {
      const int in_span = at.row_warp * kTileRows + row;
      if (token >= p.tokens) return;
      if constexpr (kKWarps > 1) {
        sums[(at.k_warp * p.tokens + token) * kSumPitch + in_span] = sum;
      } else if (first + in_span < end) {
        out[token * all_rows + first + in_span] = sum * scale;
      }
    };
    if constexpr (FEW_TOKENS) {
      put(at.lane / 4, at.lane % 4, acc[r][0][0] + acc[r][0][3]);
    } else {
#pragma unroll
      for (int t = 0; t < TOKEN_TILES; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) put(t * 16 + at.lane / 4 + (i >> 1) * 8, at.lane % 4 + (i & 1) * 4, acc[r][t][i]);
      }
    }
    if constexpr (kKWarps > 1) {
      __syncthreads();
      for (int i = thread; i < p.tokens * span; i += kThreads) {
        const int token = i / span, in_span = i % span;
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < kKWarps; ++k) sum += sums[(k * p.tokens + token) * kSumPitch + in_span];
        if (first + in_span < end) out[token * all_rows + first + in_span] = sum * scale;
      }
      __syncwarp();  // whole warps at the next barrier
    }
  }
}

// Slots of a k warp that the copy engine fills with superblocks of x, over and over, and all its row warps read. One
// thread asks for copies, one slot ahead; the others only wait until a slot is full.
struct Ring {
  u32 slots, barriers;  // in shared memory; of each slot one barrier that it is full, one that it has been read
  int slot_bytes, count;
  int superblock, copies;  // the k warp's next superblock to copy, how many copies are still to be asked for
  int to = 0, to_parity = 1, from = 0, from_parity = 0;

  __device__ __forceinline__ void init() {
    for (int i = 0; i < count; ++i) barrier_init(full(i), 1), barrier_init(read(i), ROW_WARPS);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __device__ __forceinline__ u32 full(int slot) const { return barriers + slot * 16; }
  __device__ __forceinline__ u32 read(int slot) const { return barriers + slot * 16 + 8; }

  // `x` is the k warp's first superblock; it takes every kKWarps-th of so many `blocks`.
  __device__ __forceinline__ void copy_next(const u8* x, int blocks) {
    if (copies-- <= 0) return;
    barrier_wait(read(to), to_parity);
    barrier_expect(full(to), slot_bytes);
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     slots + to * slot_bytes),
                 "l"(x + static_cast<long long>(superblock) * kKWarps * slot_bytes), "r"(slot_bytes), "r"(full(to))
                 : "memory");
    superblock = superblock + 1 == blocks ? 0 : superblock + 1;
    to = to + 1 == count ? 0 : to + 1, to_parity ^= to == 0;
  }
  __device__ __forceinline__ void wait() const { barrier_wait(full(from), from_parity); }
  __device__ __forceinline__ void release(int lane) {
    __syncwarp();
    if (lane == 0) barrier_arrive(read(from));
    from = from + 1 == count ? 0 : from + 1, from_parity ^= from == 0;
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, 1) sliced_codebook(const __grid_constant__ SlicedParams p) {
  extern __shared__ __align__(1024) u8 shared[];
  const u8* table = shared;
  const Place at = place(threadIdx.x);
  const int slot_bytes = fragment_rows(p.tokens) * kRowBytes;
  u8* slots = shared + kTableBytes + at.k_warp * p.slots * slot_bytes;
  float* sums = reinterpret_cast<float*>(shared + kTableBytes + kKWarps * p.slots * slot_bytes);
  const int group_thread = at.row_warp * 32 + at.lane;
  const int dim_part = blockIdx.x % kDimParts, entry_part = blockIdx.x / kDimParts;
  const u32 base = entry_part * kEntries * kEntryBytes;

  const int by = blockIdx.y;
  const int first_tile = by * p.tiles_each + min(by, p.tiles_over);
  const int last_tile = first_tile + p.tiles_each + (by < p.tiles_over);
  const int superblocks = (p.groups + kSuperblock - 1) / kSuperblock;
  const int blocks = (superblocks - at.k_warp + kKWarps - 1) / kKWarps;  // of this k warp
  // Every k warp goes this often through the loop, so that all meet their barriers equally often; the last may find no work.
  const int rounds = (superblocks + kKWarps - 1) / kKWarps;
  const bool resident = rounds <= p.slots;  // x of all a warp's superblocks stays staged

  const u16* codes = p.codes + blockIdx.z * p.code_stride * p.rows;
  const int row_in_tile = at.lane / 8, part = at.lane % 8;
  u32 next[ROW_TILES][kHalves][kWords];
  auto fetch = [&](int tile0, int superblock) {
    const int tile = tile0 + at.row_warp;
#if ALIGNED
    // The usual case without a clamp: whole batches of whole tiles.
    if (tile0 + kBatch <= last_tile && (tile0 + kBatch) * kTileRows <= p.rows && (superblock + 1) * kSuperblock <= p.groups) {
      const u16* from = codes + (tile * kTileRows + row_in_tile) * p.code_stride + superblock * kSuperblock;
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
        for (int h = 0; h < kHalves; ++h) {
          const u16* row = from + (r * ROW_WARPS * kTileRows + h * 4) * p.code_stride;
          load_once(reinterpret_cast<const u8*>(row + (part ^ h * 4) * kGroups), true, next[r][h]);
        }
      return;
    }
#endif
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        const u16* row = codes + min((tile + r * ROW_WARPS) * kTileRows + h * 4 + row_in_tile, p.rows - 1) * p.code_stride;
        load_codes(p, row, superblock, part ^ h * 4, tile + r * ROW_WARPS < last_tile, next[r][h]);
      }
  };
  auto stage = [&](int slot, int superblock) {
    const u8* from = p.x + (static_cast<long long>(dim_part) * superblocks + superblock) * slot_bytes;
    const u32 to = shared_address(slots) + slot * slot_bytes;
#pragma unroll 2
    for (int i = group_thread * 16; i < slot_bytes; i += ROW_WARPS * 32 * 16) copy_async_16(to + i, from + i, true);
  };
  if (blocks > 0 && first_tile < last_tile) fetch(first_tile, at.k_warp);
  copy_table(p, shared_address(table), dim_part, entry_part * kEntries, threadIdx.x);
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");                // until slice_x is done
  asm volatile("griddepcontrol.launch_dependents;");  // finish_linear may come and wait
#endif
#if __CUDA_ARCH__ >= 900
  const bool rings = !resident && blocks > 0;
  const u8* x = p.x + (static_cast<long long>(dim_part) * superblocks + at.k_warp) * slot_bytes;
  const int batches = (last_tile - first_tile + kBatch - 1) / kBatch;
  const int sum_bytes = kKWarps > 1 ? kKWarps * p.tokens * kSumPitch * 4 : 0;
  Ring ring = {shared_address(slots), shared_address(sums) + sum_bytes + at.k_warp * p.slots * 16, slot_bytes, p.slots, 0,
               blocks * batches};
  if (rings && group_thread == 0) {
    ring.init();
    for (int i = 1; i < p.slots; ++i) ring.copy_next(x, blocks);
  }
#else
  constexpr bool rings = false;
#endif
  if (!rings && blocks > 0 && first_tile < last_tile) stage(0, at.k_warp);
  copy_async_wait();
  __syncthreads();

  // Fragments of odd rows have neighbours swapped, against bank conflicts.
  const int fragment_row = min(at.lane / 4, fragment_rows(p.tokens) - 1);
  const u8* lane_slots = slots + fragment_row * kRowBytes + at.lane % 4 * 16;
  const int even = (fragment_row & 1) * 64, odd = 64 - even;
  int slot = 0;
  for (int tile0 = first_tile; tile0 < last_tile; tile0 += kBatch) {
    const int mine = (min(kBatch, last_tile - tile0) - at.row_warp + ROW_WARPS - 1) / ROW_WARPS;
    const bool stages = !resident || tile0 == first_tile;
    float acc[ROW_TILES][TOKEN_TILES][4] = {};
    for (int b = 0; b < rounds; ++b) {
#if __CUDA_ARCH__ >= 900
      if (rings && b < blocks) {
        if (group_thread == 0) ring.copy_next(x, blocks);
        __syncwarp();
        ring.wait();
      }
#endif
      if (stages && !rings) {
        copy_async_wait();
        if constexpr (ROW_WARPS == 1) {
          __syncwarp();
        } else if constexpr (kKWarps == 1) {
          __syncthreads();
        } else {
          group_barrier<ROW_WARPS * 32, kKWarps>(at.k_warp);
        }
      }
      if (b >= blocks) continue;
      // Waits for the codes before more are asked for: the hardware cannot wait for the older of two loads.
      u32 now[ROW_TILES][kHalves * kWords];
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
        for (int h = 0; h < kHalves; ++h)
#pragma unroll
          for (int w = 0; w < kWords; ++w) {
            const bool swapped = kHalves == 2 && at.lane & 4;
            now[r][h * kWords + w] = swapped ? next[r][kHalves - 1 - h][w] : next[r][h][w];
          }
      const u8* staged = lane_slots + slot * slot_bytes;
      const bool wraps = b + 1 == blocks;
      const int next_tile0 = wraps ? tile0 + kBatch : tile0;
      const int next_block = at.k_warp + (wraps ? 0 : (b + 1) * kKWarps);
      slot = slot + 1 == p.slots || (resident && wraps) ? 0 : slot + 1;
      if (next_tile0 < last_tile) {
        if (!rings && (!resident || (stages && !wraps))) stage(slot, next_block);
        fetch(next_tile0, next_block);
      }
      multiply_tiles<ROW_TILES>(mine, table, staged + even, staged + odd, now, base, acc);
#if __CUDA_ARCH__ >= 900
      if (rings) ring.release(at.lane);
#endif
    }
    store_sums(p, sums, tile0, last_tile, acc);
  }
}

struct FragmentParams {
  const u16* x;        // [tokens, GROUP * groups], rows start at multiples of 4 bytes
  u8* fragments;       // SlicedParams.x
  long long x_stride;  // elements
  int tokens, groups, superblocks;
};

// Arrange x as the A fragments of `sliced_codebook`, zeros beyond the last token and group. One thread for each 16 bytes.
extern "C" __global__ void __launch_bounds__(256) slice_x(const __grid_constant__ FragmentParams p) {
  begin_after_previous_kernel();  // sliced_codebook may load its table meanwhile
  const int rows = fragment_rows(p.tokens);
  const int i = blockIdx.x * 256 + threadIdx.x;
  int rest = i / (4 * kFragments);
  const int column = i % (4 * kFragments), row = rest % rows;
  rest /= rows;
  const int superblock = rest % p.superblocks, dim_part = rest / p.superblocks;
  if (dim_part >= kDimParts) return;
  const int fragment = column / 4 ^ (row & 1), quad = column % 4;
  const int half_part = fragment / (kFragments / kHalves);  // which half of the superblock
  u32 words[4];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int byte = (fragment % (kFragments / kHalves) * 2 + half) * 4;  // of the lane's groups, in the slice
    const int at = dim_part * WIDTH + byte % WIDTH;
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      const int token = FEW_TOKENS ? row : row / 8 * 16 + row % 8 + lower * 8;
      const int part = (FEW_TOKENS ? lower : half_part) * 4 + quad;
      const int group = superblock * kSuperblock + part * kGroups + byte / WIDTH;
      const u16* from = p.x + token * p.x_stride + static_cast<long long>(group) * GROUP + at / 2;
      words[half * 2 + lower] = token < p.tokens && group < p.groups ? *reinterpret_cast<const u32*>(from) : 0;
    }
  }
  reinterpret_cast<uint4*>(p.fragments)[i] = make_uint4(words[0], words[1], words[2], words[3]);
}
