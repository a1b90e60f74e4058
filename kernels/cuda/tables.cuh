// What the kernels with tables of partial sums share: products of groups of x with entries of the codebooks by tensor cores,
// and storing them without bank conflicts.
//
// Compile-time constants: NUM_BOOKS (1, 2, 4 or 8), NBITS, GROUP (inputs of a group: 8, 16 or 32), DTYPE_BF16.
#pragma once
#include "common.cuh"

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * 32;
constexpr int kEntries = 1 << NBITS;
constexpr int kTableRows = kEntries < 8 ? 8 : kEntries;  // entries are multiplied eight at a time
constexpr int kTableBytes = kTableRows * 256;            // two tables, in whose rows of 256 bytes an entry's products stand
constexpr int kEntryTiles = kTableRows / 8;
constexpr int kMine = (kEntryTiles + kWarps - 1) / kWarps;  // of a warp
constexpr int kSteps = GROUP / 8;                           // words that a lane holds of a group or an entry

// The lane's share of a group of inputs, for both sides of a product: renaming the inputs makes it neighbouring words.
__device__ __forceinline__ void load_share(const u32* group, int quad, u32 (&words)[1]) { words[0] = __ldg(group + quad); }

__device__ __forceinline__ void load_share(const u32* group, int quad, u32 (&words)[2]) {
  const uint2 v = __ldg(reinterpret_cast<const uint2*>(group) + quad);
  words[0] = v.x, words[1] = v.y;
}

__device__ __forceinline__ void load_share(const u32* group, int quad, u32 (&words)[4]) {
  const uint4 v = __ldg(reinterpret_cast<const uint4*>(group) + quad);
  words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
}

__device__ __forceinline__ void clear(u32 (&words)[kSteps]) {
#pragma unroll
  for (int i = 0; i < kSteps; ++i) words[i] = 0;
}

// acc[16x8] = A[16 x GROUP] * B[GROUP x 8]; `low` and `high` are shares of rows lane / 4 and lane / 4 + 8.
template <int STEPS>
__device__ __forceinline__ void multiply(float (&acc)[4], const u32 (&low)[STEPS], const u32 (&high)[STEPS],
                                         const u32 (&b)[STEPS]) {
  acc[0] = acc[1] = acc[2] = acc[3] = 0.0f;
  if constexpr (STEPS == 1) {
    mma_16x8x8(acc, low[0], high[0], b[0]);
  } else {
#pragma unroll
    for (int i = 0; i < STEPS; i += 2) mma_16x8x16(acc, low[i], high[i], low[i + 1], high[i + 1], b[i], b[i + 1]);
  }
}

// The lane's shares of all entries that its warp multiplies, column lane / 4 of tiles of eight.
__device__ __forceinline__ void load_entries(const u32* books, int warp, int lane, u32 (&b)[kMine][NUM_BOOKS][kSteps]) {
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int entry = (warp + i * kWarps) * 8 + lane / 4;
#pragma unroll
    for (int book = 0; book < NUM_BOOKS; ++book) {
      clear(b[i][book]);
      if (entry < kEntries) load_share(books + (book * kEntries + entry) * kSteps * 4, lane % 4, b[i][book]);
    }
  }
}

// Store four values, one for each block of owners, to a row of a table. Lane quads hold different entries of the same
// owners, which share banks: each quad starts at another block. `place_of(block)`: the block's address in bytes.
template <class T, class PLACE>
__device__ __forceinline__ void store_blocks(const T (&v)[4], int quad, PLACE place_of) {
  const bool odd = quad & 1, high = quad & 2;
  const T once[4] = {odd ? v[1] : v[0], odd ? v[2] : v[1], odd ? v[3] : v[2], odd ? v[0] : v[3]};
#pragma unroll
  for (int i = 0; i < 4; ++i) *reinterpret_cast<T*>(place_of((i + quad) % 4)) = high ? once[(i + 2) % 4] : once[i];
}
