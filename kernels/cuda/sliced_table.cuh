// What a block of sliced_codebook.cu, which says what the constants mean, keeps of the codebook, and how a lane loads codes
// and looks up their entries.
#pragma once
#include "barriers.cuh"

constexpr int kThreads = WARPS * 32;
constexpr int kKWarps = WARPS / ROW_WARPS;
constexpr int kBatch = ROW_TILES * ROW_WARPS;  // tiles a block accumulates at once
constexpr int kGroups = 8;                     // of a lane in a superblock and row: 16 bytes of codes
constexpr int kHalves = FEW_TOKENS ? 1 : 2;
constexpr int kTileRows = 4 * kHalves;
constexpr int kSuperblock = 8 * kGroups;
constexpr int kWords = kGroups / 2;
constexpr int kDimParts = GROUP * 2 / WIDTH;
constexpr int kEntryBytes = INT8 ? WIDTH / 2 : WIDTH;  // of a slice, in shared memory
constexpr int kCopied = INT8 ? 16 / kEntryBytes : 1;   // entries copied at once
constexpr int kEntries = ((1 << NBITS) + ENTRY_PARTS * kCopied - 1) / (ENTRY_PARTS * kCopied) * kCopied;
constexpr int kTableBytes = (kEntries * kEntryBytes + 127) / 128 * 128;
constexpr int kFragments = kHalves * kGroups * WIDTH / 8;  // of a lane in a superblock, each for one product
constexpr int kSumPitch = kTileRows * ROW_WARPS + 4;       // floats that a token and k warp has for sums
constexpr int kRowBytes = 4 * kFragments * 16;             // of one row of fragments (two rows of A) in a superblock

struct SlicedParams {
  const u8* x;           // [dimension parts, superblocks, fragment rows, kRowBytes], from slice_x
  const u16* codes;      // [partitions * rows, groups]
  const u8* book;        // [partitions, 2^NBITS, GROUP] 16-bit floats; INT8: [partitions, dimension parts, 2^NBITS, 2]
  const float* scales;   // [partitions, dimension parts], INT8 only
  float* partial;        // [slices, tokens, partitions * rows]
  long long code_stride;  // elements from one row of codes to the next
  int tokens, rows, groups;
  int tiles_each, tiles_over;  // tiles per block of the grid's y; the first `tiles_over` blocks take one more
  int slots;                   // staged superblocks of x per k warp
};

struct Place {  // of a thread in its block
  int lane, k_warp, row_warp;
};

__device__ __forceinline__ Place place(int thread) {
  int lane = thread % 32, warp = thread / 32;
  return {lane, warp / ROW_WARPS, warp % ROW_WARPS};
}

// Rows of fragments: tokens n and n + 8 of each tile share one; few tokens have one each.
__device__ __forceinline__ int fragment_rows(int tokens) { return FEW_TOKENS ? tokens : TOKEN_TILES * 8; }

// WIDTH bytes from global to shared memory; asynchronous from sm_80 on.
__device__ __forceinline__ void copy_entry(u32 shared, const u8* global) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared), "l"(global), "n"(WIDTH) : "memory");
#else
#pragma unroll
  for (int i = 0; i < WIDTH; i += 4) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(shared + i), "r"(*reinterpret_cast<const u32*>(global + i)) : "memory");
  }
#endif
}

// Copy the block's entries; asynchronously from sm_80 on.
__device__ __forceinline__ void copy_table(const SlicedParams& p, u32 table, int dim_part, int first, int thread) {
  const int entries = min(kEntries, (1 << NBITS) - first);
#if INT8
  const long long slice = static_cast<long long>(blockIdx.z) * kDimParts + dim_part;
  const u8* book = p.book + ((slice << NBITS) + first) * kEntryBytes;
#pragma unroll 4
  for (int i = thread * 16; i < entries * kEntryBytes; i += kThreads * 16) copy_async_16(table + i, book + i, true);
#else
  const u8* book = p.book + ((static_cast<long long>(blockIdx.z) << NBITS) + first) * GROUP * 2 + dim_part * WIDTH;
#pragma unroll 4
  for (int i = thread; i < entries; i += kThreads) copy_entry(table + i * WIDTH, book + static_cast<long long>(i) * GROUP * 2);
#endif
}

// The lane's codes of one row; zeros without a memory access where `wanted` is false.
__device__ __forceinline__ void load_codes(const SlicedParams& p, const u16* row, int superblock, int part, bool wanted,
                                           u32 (&words)[kWords]) {
  // Past the end read the row's last codes again: their x is zero, and no entry is used that the row does not use.
#if ALIGNED
  const int vector = min(superblock * 8 + part, p.groups / kGroups - 1);
  load_once(reinterpret_cast<const u8*>(row + vector * kGroups), wanted, words);
#else
  const int first = (superblock * 8 + part) * kGroups;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    u32 low = 0, high = 0;
    if (wanted) low = row[min(first + 2 * w, p.groups - 1)], high = row[min(first + 2 * w + 1, p.groups - 1)];
    words[w] = low | high << 16;
  }
#endif
}

#if INT8
// Two 8-bit integers as 16-bit floats. The bits 0x43uu are 128 + u of bfloat16 below u = 128, whose sign bit makes 128 into
// 256: without it and alone, their difference is the integer. Of float16, 0x64uu is 1024 + u.
__device__ __forceinline__ u32 widen(u32 pair) {
  u32 value;
#if DTYPE_BF16
  const u32 both = __byte_perm(pair, 0x43, 0x4140);
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(value) : "r"(both & 0xff80ff80), "r"(0xbf80bf80u), "r"(both & 0xff7fff7f));
#else
  const u32 both = __byte_perm(pair, 0x64, 0x4140) ^ 0x00800080;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(value) : "r"(both), "r"(0xe480e480u));  // -(1024 + 128)
#endif
  return value;
}
#endif

// What the slice keeps of the entry of the lane's group INDEX: zeros if that is not in the block's range. `base` is the
// range's first entry in bytes.
template <int INDEX>
__device__ __forceinline__ void look_up(const u8* table, const u32 (&codes)[kHalves * kWords], u32 base, u32* words) {
  u32 code;
  if constexpr (NBITS == 16) {
    code = __byte_perm(codes[INDEX / 2], 0, INDEX % 2 ? 0x4432 : 0x4410);
  } else {
    code = codes[INDEX / 2] >> INDEX % 2 * 16 & ((1u << NBITS) - 1);
  }
  const u32 offset = code * kEntryBytes - base;
  const bool mine = ENTRY_PARTS == 1 || offset < kEntries * kEntryBytes;
#if INT8
  u32 pair = 0;
  if (mine) pair = *reinterpret_cast<const u16*>(table + offset);
  words[0] = widen(pair);
#elif WIDTH == 8
  uint2 v = make_uint2(0, 0);
  if (mine) v = *reinterpret_cast<const uint2*>(table + offset);
  words[0] = v.x, words[1] = v.y;
#else
  words[0] = 0;
  if (mine) words[0] = *reinterpret_cast<const u32*>(table + offset);
#endif
}
