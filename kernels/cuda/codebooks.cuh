// Codebooks in shared memory and the lookup of 16-byte entries, for kernels that decode weights into tensor-core fragments,
// and their parameters.
//
// Compile-time constants: NUM_BOOKS, NBITS (up to 12; beyond 8, codes have 16 bits), DTYPE_BF16, GROUPS_PER_LANE (groups of
// one row that a lane decodes from one load of codes), COPIES (of each entry, in neighbouring 16-byte columns: with 8, no
// lookups collide in a bank).
#pragma once
#include "common.cuh"

constexpr int kCodeBytes = NBITS > 8 ? 2 : 1;
constexpr int kLaneBytes = GROUPS_PER_LANE * NUM_BOOKS * kCodeBytes;  // codes one lane reads at once from one row
constexpr int kWords = (kLaneBytes + 3) / 4;
// Two codebooks share a table row: entry e of book b stands at table b / 2, row e, half b % 2. With 8 copies a row has
// 256 bytes, so that one byte permutation makes a code byte into an address.
constexpr int kHalfBytes = 16 * COPIES;
constexpr int kRowBytes = COPIES == 8 || NUM_BOOKS > 1 ? 2 * kHalfBytes : kHalfBytes;
constexpr int kTableBytes = kRowBytes << NBITS;
constexpr int kBooksBytes = (NUM_BOOKS + 1) / 2 * kTableBytes;

// What both kernels take; `cuda_linear_launch.py` packs it.
struct LinearParams {
  const u16* x;         // [tokens, 8 * groups]
  const u8* codes;      // [partitions * rows, groups, NUM_BOOKS], of kCodeBytes each
  const u16* books;     // [partitions, NUM_BOOKS, 2^NBITS, 8]
  const u16* scales;    // [partitions * rows]
  const u16* bias;      // [partitions * rows] or null
  u16* out;             // [tokens, partitions * rows]
  float* partial;       // [splits, tokens, partitions * rows] if gridDim.y > 1
  long long x_stride;   // elements
  long long code_stride;  // bytes from one row of codes to the next
  int tokens, rows, groups;
  int tiles_each, tiles_over;    // tiles per block of the grid's x; the first `tiles_over` blocks take one more
  int blocks_each, blocks_over;  // superblocks per block of the grid's y, likewise
  int slots;                     // lookup_linear.cu: staged superblocks of x per k warp
};

// A barrier among the block's first THREADS threads.
template <int THREADS>
__device__ __forceinline__ void first_threads_barrier() {
  asm volatile("bar.sync 0, %0;" ::"n"(THREADS) : "memory");
}

// Where in the codebooks the entry of book BOOK that code CODE of the lane names stands, without the constant
// kBookOffset<BOOK>. `column` is the lane's copy, in bytes.
template <int CODE>
__device__ __forceinline__ u32 entry_offset(const u32 (&words)[kWords], u32 column) {
  constexpr int kByte = CODE * kCodeBytes, kShift = 8 * (kByte % 4);
  const u32 word = words[kByte / 4];
  if constexpr (kRowBytes == 256 && NBITS == 8) {
    return __byte_perm(word, column, 0x5504 | (kByte % 4) << 4);  // bytes: column, code, 0, 0
  } else {
    return (word >> kShift & ((1u << NBITS) - 1)) * kRowBytes | column;
  }
}

template <int BOOK>
constexpr int kBookOffset = BOOK / 2 * kTableBytes + BOOK % 2 * kHalfBytes;

template <int CODE, int BOOK>
__device__ __forceinline__ uint4 look_up(const u8* books, const u32 (&words)[kWords], u32 column) {
  return *reinterpret_cast<const uint4*>(books + entry_offset<CODE>(words, column) + kBookOffset<BOOK>);
}

// The eight weights (before the scale) of the lane's group STEP. The packed adds write straight into the fragments'
// registers, which one multiply per codebook could not do without a move per register.
template <int STEP, int BOOK = NUM_BOOKS - 1>
__device__ __forceinline__ uint4 decode(const u8* books, const u32 (&words)[kWords], u32 column) {
  uint4 entry = look_up<STEP * NUM_BOOKS + BOOK, BOOK>(books, words, column);
  if constexpr (BOOK == 0) {
    return entry;
  } else {
    return add_entries(decode<STEP, BOOK - 1>(books, words, column), entry);
  }
}

// The power of two by which entries are divided so that no sum of one entry per codebook leaves the range of float16;
// 1 unless a codebook holds entries near the end of that range, and always in bfloat16. `largest` is scratch.
template <int THREADS>
__device__ __forceinline__ float headroom(const uint4* entries, u32* largest) {
#if DTYPE_BF16 || NUM_BOOKS == 1
  return 1.0f;
#else
  if (threadIdx.x == 0) *largest = 0;
  first_threads_barrier<THREADS>();
  u32 most = 0;  // finite magnitudes compare like their bits
  for (int i = threadIdx.x; i < NUM_BOOKS << NBITS; i += THREADS) {
    const uint4 entry = entries[i];
    const u32 words[4] = {entry.x, entry.y, entry.z, entry.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const u32 low = words[w] & 0x7fff, high = words[w] >> 16 & 0x7fff;
      if (low < 0x7c00) most = max(most, low);
      if (high < 0x7c00) most = max(most, high);
    }
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) most = max(most, __shfl_xor_sync(~0u, most, distance));
  if (threadIdx.x % 32 == 0) atomicMax(largest, most);
  first_threads_barrier<THREADS>();
  return to_float(static_cast<u16>(*largest)) * NUM_BOOKS > 65504.0f ? NUM_BOOKS : 1.0f;
#endif
}

__device__ __forceinline__ u32 divide_pair(u32 pair, float divisor) {
  return pack(to_float(static_cast<u16>(pair)) / divisor, to_float(static_cast<u16>(pair >> 16)) / divisor);
}

// Store entry `i` of the codebooks to shared memory, once per copy, divided; lanes start at different columns so that the
// stores are free of bank conflicts too.
__device__ __forceinline__ void store_entry(u8* books, int i, uint4 value, float divisor) {
  int book = i >> NBITS, entry = i & ((1 << NBITS) - 1);
  if (divisor != 1.0f) {
    value = make_uint4(divide_pair(value.x, divisor), divide_pair(value.y, divisor), divide_pair(value.z, divisor),
                       divide_pair(value.w, divisor));
  }
  u8* to = books + book / 2 * kTableBytes + entry * kRowBytes + book % 2 * kHalfBytes;
#pragma unroll
  for (int c = 0; c < COPIES; ++c) *reinterpret_cast<uint4*>(to + (c + threadIdx.x) % COPIES * 16) = value;
}

// Copy the codebooks [NUM_BOOKS, 2^NBITS, 8] from global to shared memory by the block's first THREADS threads. Returns what
// the products must be multiplied by. The caller ends with a barrier.
template <int THREADS>
__device__ __forceinline__ float fill_books(const uint4* from, u8* books, u32* scratch) {
  const float divisor = headroom<THREADS>(from, scratch);
#pragma unroll 2
  for (int i = threadIdx.x; i < NUM_BOOKS << NBITS; i += THREADS) store_entry(books, i, from[i], divisor);
  return divisor;
}
