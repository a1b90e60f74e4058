// partial[chunk, o, n] = sum over the chunk's inputs of x[n, k] * W[o, k] (before the scale) for up to four tokens n.
//
// As in partial_sums.cu a block first tabulates the products of every entry with its chunk's inputs ("psumbooks" of CodeGEMM,
// arXiv 2512.17970). An element of the tables has the products of four tokens in 16 bits each, so that a lookup takes 8
// bytes instead of an entry's 16. They are rounded as weights are in the other kernels: to bfloat16, or to float16 after
// a power of two for each token has brought them into its range. Two tables (of the codebooks, or of the first and
// the last groups) have rows of 256 bytes, one for each entry, in which every group has two banks of its own.
//
// Lane (row = lane / 4, q = lane % 4) looks up the groups q * kLaneGroups .. + kLaneGroups - 1 of one row of the weight,
// each lane starting at another one, so that no two lanes of a half warp meet in a bank. The tensor cores add: two lookups
// are a lane's share of an A fragment whose rows are those of the weight (tokens 0 and 1 above, 2 and 3 below), and ones in
// B add up its even and its odd columns, those of all four lanes of a row.
//
// Grid: (chunks, row ranges, row partitions). Compile-time constants: NUM_BOOKS (1 or 2), NBITS, DTYPE_BF16.
#include "common.cuh"

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * 32;
constexpr int kEntries = 1 << NBITS;
constexpr int kTableBytes = kEntries * 256;      // two of them: of the codebooks, or of the first and last groups
constexpr int kGroups = 64 / NUM_BOOKS;          // of a chunk
constexpr int kLaneGroups = 16 / NUM_BOOKS;      // of a lane: 16 bytes of codes
constexpr int kBlocks = kGroups / 4;             // of four groups, multiplied at once to make tables
constexpr int kUnits = 4;                        // of eight rows, that a warp takes at once
constexpr int kScratch = 2 * kTableBytes;        // the codebooks' largest magnitude

struct FewTokensParams {
  const u16* x;          // [tokens, 8 * groups]
  const u8* codes;       // [partitions * rows, groups, NUM_BOOKS]
  const u32* books;      // [partitions, NUM_BOOKS, 2^NBITS, 4] pairs
  float4* partial;       // [chunks, partitions * rows]
  long long x_stride;    // elements
  long long code_stride;  // bytes
  int tokens, rows, groups;
  int batches_each, batches_over;  // of 8 * kUnits rows per block of the grid's y; the first take one more
};

#if DTYPE_BF16
#define PAIR "bf16"
constexpr u32 kOne = 0x3f80, kInfinity = 0x7f80;
#else
#define PAIR "f16"
constexpr u32 kOne = 0x3c00, kInfinity = 0x7c00;
#endif

__device__ __forceinline__ u32 round_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn." PAIR "x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// The larger of `most` and the magnitudes of a pair, as bits, which compare like the numbers.
__device__ __forceinline__ u32 largest(u32 most, u32 pair) { return max(most, max(pair & 0x7fff, pair >> 16 & 0x7fff)); }

// The exponent of the least power of two above a finite magnitude; 0 for 0.
__device__ __forceinline__ int exponent_above(u32 bits) {
  return bits == 0 ? 0 : static_cast<int>(__float_as_uint(to_float(static_cast<u16>(bits))) >> 23) - 126;
}

__device__ __forceinline__ float power_of_two(int exponent) { return __uint_as_float(exponent + 127 << 23); }

// Store four words, one for each block of four groups, to a row of a table. Lane quads hold different entries of the same
// groups, which share banks: each quad starts at another block.
__device__ __forceinline__ void store_blocks(u8* row, const u32 (&v)[4], int place, int quad) {
  const bool odd = quad & 1, high = quad & 2;
  const u32 once[4] = {odd ? v[1] : v[0], odd ? v[2] : v[1], odd ? v[3] : v[2], odd ? v[0] : v[3]};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    *reinterpret_cast<u32*>(row + ((i + quad) % 4 * 8 + place) * 4) = high ? once[(i + 2) % 4] : once[i];
  }
}

// What products are multiplied by before they are rounded, and sums afterwards, for a lane's two tokens.
struct Factors {
  float before[2], after[2];
};

// `most_x`: the largest magnitudes of the two tokens, as bits; `b`: the lane's entries. All threads of the block take part.
template <int COUNT>
__device__ __forceinline__ Factors choose_factors(const u32 (&most_x)[2], const u32 (&b)[COUNT], u32* scratch) {
  int above = 0;
#if !DTYPE_BF16
  if (threadIdx.x == 0) *scratch = 0;
  u32 most = 0;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {  // entries that are not finite only matter to the rows that use them
    const u32 low = b[i] & 0x7fff, high = b[i] >> 16 & 0x7fff;
    if (low < kInfinity) most = max(most, low);
    if (high < kInfinity) most = max(most, high);
  }
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) most = max(most, __shfl_xor_sync(~0u, most, distance));
  __syncthreads();
  if (threadIdx.x % 32 == 0) atomicMax(scratch, most);
  __syncthreads();
  above = exponent_above(*scratch);
#endif
  Factors factors;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool finite = most_x[i] < kInfinity;
    // Sums of eight products of less than 2^12 stay in float16's range.
    const int exponent = DTYPE_BF16 || !finite ? 0 : 12 - above - exponent_above(most_x[i]);
    factors.before[i] = power_of_two(exponent);
    // Zero times infinity would carry a token that is not finite to its neighbour: it counts as zeros and becomes NaN.
    factors.after[i] = finite ? power_of_two(-exponent) : __uint_as_float(0x7fffffff);
  }
  return factors;
}

// Tabulate. Four groups and pairs of tokens are the rows of A (0, 2 above, 1, 3 below), eight entries the columns of B.
// Returns what the four tokens' sums must be multiplied by.
__device__ __forceinline__ float4 build_tables(const FewTokensParams& p, u8* shared, int warp, int lane) {
  const int place = lane / 4, quad = lane % 4;
  const u32* books = p.books + static_cast<long long>(blockIdx.z) * NUM_BOOKS * kEntries * 4;
  constexpr int kTiles = NUM_BOOKS * kEntries / 8;
  constexpr int kMine = (kTiles + kWarps - 1) / kWarps;
  u32 b[kMine], a[kBlocks][2];  // all loads first: they are what the block waits for
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int tile = warp + i * kWarps;
    b[i] = tile < kTiles ? __ldg(books + (tile * 8 + place) * 4 + quad) : 0;
  }
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    const int group = blockIdx.x * kGroups + block * 4 + place / 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = place % 2 * 2 + i;
      const u32* from = reinterpret_cast<const u32*>(p.x + token * p.x_stride) + group * 4 + quad;
      a[block][i] = token < p.tokens && group < p.groups ? __ldg(from) : 0;
    }
  }
  u32 most[2] = {0, 0};
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int i = 0; i < 2; ++i) most[i] = largest(most[i], a[block][i]);
  }
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    if (distance == 4) continue;  // lanes that far apart hold other tokens
    most[0] = max(most[0], __shfl_xor_sync(~0u, most[0], distance));
    most[1] = max(most[1], __shfl_xor_sync(~0u, most[1], distance));
  }
  const Factors factors = choose_factors(most, b, reinterpret_cast<u32*>(shared + kScratch));
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (most[i] >= kInfinity) a[block][i] = 0;
    }
  }
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int tile = warp + i * kWarps;
    if (tile >= kTiles) break;
    const int entry = tile * 8 % kEntries + 2 * quad, book = tile * 8 / kEntries;
#pragma unroll
    for (int window = 0; window < kBlocks / 4; ++window) {  // 128 bytes of a table's row
      u32 even[4], odd[4];
#pragma unroll
      for (int block = 0; block < 4; ++block) {
        float sums[4] = {};
        mma_16x8x8(sums, a[window * 4 + block][0], a[window * 4 + block][1], b[i]);
        // Beyond the last group every product is zero, also for an entry that is not finite.
        const bool valid = blockIdx.x * kGroups + (window * 4 + block) * 4 + place / 2 < p.groups;
        even[block] = valid ? round_pair(sums[0] * factors.before[0], sums[2] * factors.before[1]) : 0;
        odd[block] = valid ? round_pair(sums[1] * factors.before[0], sums[3] * factors.before[1]) : 0;
      }
      const int table = NUM_BOOKS == 2 ? book : window / 2;
      u8* to = shared + table * kTableBytes + entry * 256 + window % 2 * 128;
      store_blocks(to, even, place, quad);
      store_blocks(to + 256, odd, place, quad);
    }
  }
  // Lanes 0 and 4 hold the factors of tokens 0, 1 and 2, 3.
  const float* after = factors.after;
  return make_float4(__shfl_sync(~0u, after[0], 0), __shfl_sync(~0u, after[1], 0), __shfl_sync(~0u, after[0], 4),
                     __shfl_sync(~0u, after[1], 4));
}

// A lane's place among the lanes: where it starts in its 16 bytes of codes, and the offsets of its groups in a table.
struct Lane {
  int start;
  u32 table;                  // bytes to the lane's table; with two codebooks 0
  u32 columns[kLaneGroups];   // of the groups in the order that they are looked up in
};

__device__ __forceinline__ Lane lane_of(int lane) {
  const int row = lane / 4, quad = lane % 4;
  Lane at;
  const int first = NUM_BOOKS == 2 ? row % 4 + quad / 2 * 4 : row % 4 * 4 + quad;
  at.start = first * NUM_BOOKS;
  at.table = NUM_BOOKS == 2 ? 0 : quad / 2 * kTableBytes;
#pragma unroll
  for (int i = 0; i < kLaneGroups; ++i) {
    at.columns[i] = ((NUM_BOOKS == 2 ? quad : quad % 2) * kLaneGroups + (first + i) % kLaneGroups) * 8;
  }
  return at;
}

// Rotate the 16 bytes so that byte `start` comes first.
__device__ __forceinline__ void rotate(u32 (&w)[4], int start) {
  u32 by8[4], by4[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) by8[i] = start & 8 ? w[(i + 2) % 4] : w[i];
#pragma unroll
  for (int i = 0; i < 4; ++i) by4[i] = start & 4 ? by8[(i + 1) % 4] : by8[i];
#pragma unroll
  for (int i = 0; i < 4; ++i) w[i] = __funnelshift_r(by4[i], by4[(i + 1) % 4], start % 4 * 8);
}

// The products of the group that byte BYTE of the rotated codes belongs to, by the entry that it names.
template <int BYTE>
__device__ __forceinline__ uint2 look_up(const u8* tables, const Lane& at, const u32 (&codes)[4]) {
  constexpr int kOffset = NUM_BOOKS == 2 ? BYTE % 2 * kTableBytes : 0;
  const u32 word = codes[BYTE / 4], column = at.columns[BYTE / NUM_BOOKS];
  u32 offset;
  if constexpr (NBITS == 8) {
    offset = __byte_perm(word, column, 0x5504 | BYTE % 4 << 4);  // bytes: column, code, 0, 0
  } else {
    offset = (word >> BYTE % 4 * 8 & (kEntries - 1)) << 8 | column;
  }
  return *reinterpret_cast<const uint2*>(tables + offset + kOffset);
}

template <int BYTE = 0>
__device__ __forceinline__ void sum_units(const u8* tables, const Lane& at, const u32 (&codes)[kUnits][4], u32 ones,
                                          float (&acc)[kUnits][4]) {
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    const uint2 first = look_up<BYTE>(tables, at, codes[u]), second = look_up<BYTE + 1>(tables, at, codes[u]);
    mma_16x8x16(acc[u], first.x, first.y, second.x, second.y, ones, ones);
  }
  if constexpr (BYTE + 2 < 16) sum_units<BYTE + 2>(tables, at, codes, ones, acc);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) few_tokens(const __grid_constant__ FewTokensParams p) {
  extern __shared__ __align__(1024) u8 shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, y = blockIdx.y;
  const int first_batch = y * p.batches_each + min(y, p.batches_over) + warp;
  const int last_batch = first_batch - warp + p.batches_each + (y < p.batches_over);
  const int vector = min(static_cast<int>(blockIdx.x) * 4 + lane % 4, p.groups / kLaneGroups - 1);
  const u8* codes = p.codes + static_cast<long long>(blockIdx.z) * p.rows * p.code_stride + vector * 16;
  u32 now[kUnits][4], next[kUnits][4];
  const auto fetch = [&](int batch) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int row = min((batch * kUnits + u) * 8 + lane / 4, p.rows - 1);
      load_once(codes + row * p.code_stride, batch < last_batch, next[u]);
    }
  };
  begin_after_previous_kernel();
  fetch(first_batch);
  const float4 back = build_tables(p, shared, warp, lane);
  const Lane at = lane_of(lane);
  const u32 ones = lane / 4 == 0 ? kOne : lane / 4 == 1 ? kOne << 16 : 0;  // columns 0 and 1 of the sums
  __syncthreads();

  float4* out = p.partial + (static_cast<long long>(blockIdx.x) * gridDim.z + blockIdx.z) * p.rows;
  for (int batch = first_batch; batch < last_batch; batch += kWarps) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
#pragma unroll
      for (int w = 0; w < 4; ++w) now[u][w] = next[u][w];
    }
    fetch(batch + kWarps);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) rotate(now[u], at.start);
    float acc[kUnits][4] = {};
    sum_units(shared + at.table, at, now, ones, acc);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int row = (batch * kUnits + u) * 8 + lane / 4;
      if (lane % 4 == 0 && row < p.rows) {
        out[row] = make_float4(acc[u][0] * back.x, acc[u][1] * back.y, acc[u][2] * back.z, acc[u][3] * back.w);
      }
    }
  }
}

struct FinishFewTokensParams {
  const float* partial;  // [chunks, rows, 4]
  const u16* scales;
  const u16* bias;
  u16* out;  // [tokens, rows]
  int tokens, rows, chunks;
};

// out[n, o] = scale[o] * sum over c of partial[c, o, n] + bias[o], in the order of c.
extern "C" __global__ void __launch_bounds__(256) finish_few_tokens(const __grid_constant__ FinishFewTokensParams p) {
  const int e = blockIdx.x * 256 + threadIdx.x, o = e / 4, token = e % 4;
  if (o >= p.rows || token >= p.tokens) return;
  const float scale = to_float(p.scales[o]);
  const float bias = p.bias ? to_float(p.bias[o]) : 0.0f;
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");  // until the partial sums are written
#endif
  float sum = 0.0f;
#pragma unroll 8
  for (int c = 0; c < p.chunks; ++c) sum += p.partial[static_cast<long long>(c) * p.rows * 4 + e];
  p.out[static_cast<long long>(token) * p.rows + o] = from_float(fmaf(sum, scale, bias));
}
