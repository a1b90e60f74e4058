// weight[o, G g .. G g + G - 1] = scale[o] * sum over c of books[c, codes[o, g, c]]: written once, in full 16-byte stores,
// which is what bounds it. A lane takes 16 bytes of the output, a warp neighbouring pieces of one row, so that its stores
// are one piece. The codebooks stand in shared memory COPIES times, copy c in the c-th column of 16 bytes, against bank
// conflicts; those that do not fit are gathered from L2.
//
// Compile-time constants: NUM_BOOKS, NBITS (at most 16), GROUP (G, a multiple of 8), DTYPE (0 float16, 1 bfloat16,
// 2 float32), COPIES (0: the codebooks stay in global memory), UNROLL (pieces that a lane has in flight), ALIGNED
// (1: a group's codes start at a multiple of their size).
#define DTYPE_BF16 (DTYPE == 1)
#include "common.cuh"

constexpr int kThreads = 256;
constexpr int kFloats = DTYPE == 2 ? 4 : 8;   // of a piece
constexpr int kPieces = GROUP / kFloats;      // of an entry
constexpr int kEntries = NUM_BOOKS << NBITS;

#if NBITS > 8
typedef u16 Code;
#else
typedef u8 Code;
#endif

struct DequantizeParams {
  const Code* codes;     // [partitions * rows, groups, NUM_BOOKS]
  const uint4* books;    // [partitions, NUM_BOOKS, 2^NBITS, GROUP]
  const void* scales;    // [partitions * rows]
  uint4* out;            // [partitions * rows, GROUP * groups]
  long long code_stride;  // elements from one row of codes to the next
  int rows, groups;
};

struct Codes {
  Code at[NUM_BOOKS];
};

__device__ __forceinline__ Codes load_codes(const Code* from) {
  Codes codes;
#if ALIGNED && NUM_BOOKS == 2 && NBITS <= 8
  const u16 both = __ldcs(reinterpret_cast<const u16*>(from));
  codes.at[0] = both & 255, codes.at[1] = both >> 8;
#else
#pragma unroll
  for (int c = 0; c < NUM_BOOKS; ++c) codes.at[c] = __ldcs(from + c);
#endif
  return codes;
}

__device__ __forceinline__ void add_piece(float (&sums)[kFloats], uint4 v) {
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

__device__ __forceinline__ void store_scaled(uint4* out, const float (&sums)[kFloats], float scale) {
#if DTYPE == 2
  __stcs(out, make_uint4(__float_as_uint(sums[0] * scale), __float_as_uint(sums[1] * scale),
                         __float_as_uint(sums[2] * scale), __float_as_uint(sums[3] * scale)));
#else
  __stcs(out, make_uint4(pack(sums[0] * scale, sums[1] * scale), pack(sums[2] * scale, sums[3] * scale),
                         pack(sums[4] * scale, sums[5] * scale), pack(sums[6] * scale, sums[7] * scale)));
#endif
}

__device__ __forceinline__ uint4 look_up(const uint4* books, int index, int lane) {
#if COPIES > 0
  return books[index * COPIES + lane % COPIES];
#else
  return __ldg(books + index);
#endif
}

// A lane's pieces first, first + 32, ... of one row; FULL if all of them lie within it, which lets the loads run ahead.
template <bool FULL>
__device__ __forceinline__ void decode(const Code* codes, const uint4* books, uint4* out, float scale, int first,
                                       int pieces) {
  const int lane = threadIdx.x % 32;
  Codes code[UNROLL];
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    const int piece = FULL ? first + u * 32 : min(first + u * 32, pieces - 1);
    code[u] = load_codes(codes + piece / kPieces * NUM_BOOKS);
  }
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    const int piece = first + u * 32;
    if (!FULL && piece >= pieces) break;
    float sums[kFloats] = {};
#pragma unroll
    for (int c = 0; c < NUM_BOOKS; ++c) {
      const int entry = (c << NBITS) + (code[u].at[c] & ((1 << NBITS) - 1));
      add_piece(sums, look_up(books, entry * kPieces + piece % kPieces, lane));
    }
    store_scaled(out + piece, sums, scale);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads) dequantize(const __grid_constant__ DequantizeParams p) {
  const int lane = threadIdx.x % 32, partition = blockIdx.y;
  const uint4* books = p.books + static_cast<long long>(partition) * kEntries * kPieces;
#if COPIES > 0
  extern __shared__ __align__(16) uint4 table[];  // [entry][piece][copy]
  for (int i = threadIdx.x; i < kEntries * kPieces; i += kThreads) {
    uint4 v = books[i];
#pragma unroll
    for (int c = 0; c < COPIES; ++c) table[i * COPIES + (c + lane) % COPIES] = v;
  }
  __syncthreads();
  books = table;
#endif

  const int pieces = p.groups * kPieces;                              // of a row
  const int turns_of_row = (pieces + 32 * UNROLL - 1) / (32 * UNROLL);  // of a warp
  const long long turns = static_cast<long long>(p.rows) * turns_of_row;
  const long long warps = static_cast<long long>(gridDim.x) * (kThreads / 32);
  for (long long turn = blockIdx.x * (kThreads / 32) + threadIdx.x / 32; turn < turns; turn += warps) {
    const long long row = turn / turns_of_row + static_cast<long long>(partition) * p.rows;
    const int first = static_cast<int>(turn % turns_of_row) * 32 * UNROLL + lane;
    const Code* codes = p.codes + row * p.code_stride;
    uint4* out = p.out + row * pieces;
#if DTYPE == 2
    const float scale = static_cast<const float*>(p.scales)[row];
#else
    const float scale = to_float(static_cast<const u16*>(p.scales)[row]);
#endif
    if (first - lane + 32 * UNROLL <= pieces) {
      decode<true>(codes, books, out, scale, first, pieces);
    } else {
      decode<false>(codes, books, out, scale, first, pieces);
    }
  }
}
