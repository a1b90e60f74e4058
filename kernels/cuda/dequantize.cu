// weight[o, 8g .. 8g + 7] = scale[o] * sum over c of books[c, codes[o, g, c]]: written once, in full 16-byte stores, which
// is what bounds it. A lane takes one group, a warp neighbouring groups of one row, so that its stores are one piece. The
// codebooks stand in shared memory COPIES times, copy c in the c-th column of 16 bytes, against bank conflicts.
//
// Compile-time constants: NUM_BOOKS, NBITS (at most 8), DTYPE (0 float16, 1 bfloat16, 2 float32), COPIES,
// ALIGNED (1: a group's codes start at a multiple of their size).
#define DTYPE_BF16 (DTYPE == 1)
#include "common.cuh"

constexpr int kThreads = 256;
constexpr int kUnroll = 8;                              // groups a lane has in flight
constexpr int kPieces = DTYPE == 2 ? 2 : 1;             // 16-byte pieces of an entry
constexpr int kEntries = NUM_BOOKS << NBITS;

struct DequantizeParams {
  const u8* codes;       // [partitions * rows, groups, NUM_BOOKS]
  const uint4* books;    // [partitions, NUM_BOOKS, 2^NBITS, 8]
  const void* scales;    // [partitions * rows]
  uint4* out;            // [partitions * rows, 8 * groups]
  long long code_stride;  // bytes from one row of codes to the next
  int rows, groups;
};

struct Codes {
  u8 at[NUM_BOOKS];
};

__device__ __forceinline__ Codes load_codes(const u8* from) {
  Codes codes;
#if ALIGNED && NUM_BOOKS == 2
  const u16 both = __ldcs(reinterpret_cast<const u16*>(from));
  codes.at[0] = both & 255, codes.at[1] = both >> 8;
#else
#pragma unroll
  for (int c = 0; c < NUM_BOOKS; ++c) codes.at[c] = __ldcs(from + c);
#endif
  return codes;
}

__device__ __forceinline__ void add_piece(float* sums, uint4 v) {
  const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#if DTYPE == 2
    sums[i] += __uint_as_float(words[i]);
#else
    sums[2 * i] += to_float(static_cast<u16>(words[i]));
    sums[2 * i + 1] += to_float(static_cast<u16>(words[i] >> 16));
#endif
  }
}

__device__ __forceinline__ void store_scaled(uint4* out, const float* sums, float scale) {
#if DTYPE == 2
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    __stcs(out + i / 4, make_uint4(__float_as_uint(sums[i] * scale), __float_as_uint(sums[i + 1] * scale),
                                   __float_as_uint(sums[i + 2] * scale), __float_as_uint(sums[i + 3] * scale)));
  }
#else
  __stcs(out, make_uint4(pack(sums[0] * scale, sums[1] * scale), pack(sums[2] * scale, sums[3] * scale),
                         pack(sums[4] * scale, sums[5] * scale), pack(sums[6] * scale, sums[7] * scale)));
#endif
}

extern "C" __global__ void __launch_bounds__(kThreads) dequantize(const __grid_constant__ DequantizeParams p) {
  extern __shared__ __align__(16) uint4 books[];  // [entry][piece][copy]
  const int lane = threadIdx.x % 32, partition = blockIdx.y;
  for (int i = threadIdx.x; i < kEntries * kPieces; i += kThreads) {
    uint4 v = p.books[static_cast<long long>(partition) * kEntries * kPieces + i];
#pragma unroll
    for (int c = 0; c < COPIES; ++c) books[i * COPIES + (c + lane) % COPIES] = v;
  }
  __syncthreads();

  const int pieces = (p.groups + 32 * kUnroll - 1) / (32 * kUnroll);  // of a row, one for each turn of a warp
  const long long turns = static_cast<long long>(p.rows) * pieces;
  const long long warps = static_cast<long long>(gridDim.x) * (kThreads / 32);
  for (long long turn = blockIdx.x * (kThreads / 32) + threadIdx.x / 32; turn < turns; turn += warps) {
    const long long row = turn / pieces + static_cast<long long>(partition) * p.rows;
    const int first = static_cast<int>(turn % pieces) * 32 * kUnroll + lane;
    const u8* codes = p.codes + row * p.code_stride;
    Codes code[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int group = min(first + u * 32, p.groups - 1);
      code[u] = load_codes(codes + group * NUM_BOOKS);
    }
#if DTYPE == 2
    const float scale = static_cast<const float*>(p.scales)[row];
#else
    const float scale = to_float(static_cast<const u16*>(p.scales)[row]);
#endif
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int group = first + u * 32;
      if (group >= p.groups) break;
      float sums[8] = {};
#pragma unroll
      for (int c = 0; c < NUM_BOOKS; ++c) {
        const int entry = (c << NBITS) + (code[u].at[c] & ((1 << NBITS) - 1));
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
          add_piece(sums + piece * 4, books[(entry * kPieces + piece) * COPIES + lane % COPIES]);
        }
      }
      store_scaled(p.out + (row * p.groups + group) * kPieces, sums, scale);
    }
  }
}
