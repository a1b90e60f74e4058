// partial[chunk, tile, o, n] = sum over the chunk's inputs of x[4 * tile + n, k] * W[o, k] (before the scale) for four tokens n.
//
// As in partial_sums.cu a block first tabulates the products of every entry with its chunk's inputs ("psumbooks" of CodeGEMM,
// arXiv 2512.17970). An element of the tables has the products of four tokens in 16 bits each, so that a lookup takes 8
// bytes instead of an entry's 16 to 64. They are rounded as weights are in the other kernels: to bfloat16, or to float16
// after a power of two for each token has brought them into its range. A chunk has 64 codes of each row, and two tables of
// 32 of them (those of a codebook, or the first and the last) have rows of 256 bytes, one for each entry, in which every
// code has two banks of its own.
//
// Lane (row = lane / 4, q = lane % 4) looks up codes 16 q .. 16 q + 15 of one row of the weight, each lane starting at
// another one, so that no two lanes of a half warp meet in a bank. The tensor cores add: two lookups are a lane's share of
// an A fragment whose rows are those of the weight (tokens 0 and 1 above, 2 and 3 below), and ones in B add up its even and
// its odd columns, those of all four lanes of a row.
//
// Grid: (chunks, row ranges, row partitions x tiles of four tokens). Compile-time constants: those of tables.cuh.
#include "products.cuh"
#include "tables.cuh"

#if DTYPE_BF16
constexpr u32 kOne = 0x3f80;
#else
constexpr u32 kOne = 0x3c00;
#endif
constexpr int kGroups = 64 / NUM_BOOKS;      // of a chunk
constexpr int kSets = 8 / NUM_BOOKS;         // of eight groups, multiplied at once
constexpr bool kBookTables = NUM_BOOKS == 2;  // each table is a codebook's
constexpr int kPlaces = kBookTables ? 8 : 16;  // of a lane in a row of its table
constexpr int kUnits = 4;                    // of eight rows, that a warp takes at once
constexpr int kScratch = 2 * kTableBytes;    // the codebooks' largest magnitude

struct FewTokensParams {
  const u16* x;          // [tokens, GROUP * groups]
  const u8* codes;       // [partitions * rows, groups, NUM_BOOKS]
  const u32* books;      // [partitions, NUM_BOOKS, 2^NBITS, GROUP / 2] pairs
  float4* partial;       // [chunks, tiles, partitions * rows]
  long long x_stride;    // elements
  long long code_stride;  // bytes
  int tokens, tiles, rows, groups;
  int batches_each, batches_over;  // of 8 * kUnits rows per block of the grid's y; the first take one more
};

// What the products of four tokens are multiplied by before they are rounded, and sums afterwards.
struct Factors {
  float before[4], after[4];
};

// `most_x`: the largest magnitudes of the four tokens, as bits; `b`: the lane's entries. All threads of the block take part.
__device__ __forceinline__ Factors choose_factors(const u32 (&most_x)[4], const u32 (&b)[kMine][NUM_BOOKS][kSteps],
                                                  u32* scratch) {
  u32 most = 0;
#pragma unroll
  for (int i = 0; i < kMine * NUM_BOOKS * kSteps; ++i) {
    most = largest_finite(most, b[i / (NUM_BOOKS * kSteps)][i / kSteps % NUM_BOOKS][i % kSteps]);
  }
  const int above = exponent_above_all(most, scratch);
  Factors factors;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const bool finite = most_x[n] < kInfinity;
    const int exponent = finite ? exponent_into_range<GROUP>(above, most_x[n]) : 0;
    factors.before[n] = power_of_two(exponent);
    // Zero times infinity would carry a token that is not finite to its neighbour: it counts as zeros and becomes NaN.
    factors.after[n] = finite ? power_of_two(-exponent) : __uint_as_float(0x7fffffff);
  }
  return factors;
}

// Codebook and set of groups of block BLOCK of section SECTION of a row of the tables, which has two sections of four
// blocks of eight groups.
__device__ constexpr int book_of(int section, int block) {
  return NUM_BOOKS == 1 ? 0 : NUM_BOOKS == 2 ? section : NUM_BOOKS == 4 ? block : section * 4 + block;
}
__device__ constexpr int set_of(int section, int block) {
  return NUM_BOOKS == 1 ? section * 4 + block : NUM_BOOKS == 2 ? block : NUM_BOOKS == 4 ? section : 0;
}

// Group `place` of the eight in a set, counted in the chunk.
__device__ __forceinline__ int group_of(int set, int place) {
  if (NUM_BOOKS == 8) return place % 4 * 2 + place / 4;
  if (NUM_BOOKS == 4) return set * 8 + place;
  return set / 4 * 32 + place / 4 * 16 + set % 4 * 4 + place % 4;
}

// Where the products of the blocks of a section and one group stand in an entry of the tables. For four places and four
// blocks these are 16 pairs of banks.
constexpr int kBlockBytes = NUM_BOOKS < 4 ? 32 : 8;
__device__ __forceinline__ int section_offset(int section, int place) {
  const int low = place % 4, high = place / 4;
  if (NUM_BOOKS == 8) return low / 2 * kTableBytes + (low % 2 * 16 + (section + 2 * high + low) % 4 * 4) * 8;
  return section * kTableBytes + (NUM_BOOKS == 4 ? place * 4 : high * 16 + low) * 8;
}

// Tabulate. Eight groups and pairs of tokens are the rows of A (one token above, one below), eight entries the columns of B.
// Returns what the four tokens' sums must be multiplied by.
__device__ __forceinline__ float4 build_tables(const FewTokensParams& p, u8* shared, int warp, int lane) {
  const int place = lane / 4, quad = lane % 4, partition = blockIdx.z / p.tiles, first = blockIdx.z % p.tiles * 4;
  const u32* books = p.books + static_cast<long long>(partition) * NUM_BOOKS * kEntries * kSteps * 4;
  u32 b[kMine][NUM_BOOKS][kSteps], a[kSets][4][kSteps];  // all loads first: they are what the block waits for
  load_entries(books, warp, lane, b);
  bool valid[kSets];
#pragma unroll
  for (int set = 0; set < kSets; ++set) {
    const int group = blockIdx.x * kGroups + group_of(set, place);
    valid[set] = group < p.groups;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const u16* row = p.x + (first + n) * p.x_stride;
      clear(a[set][n]);
      if (valid[set] && first + n < p.tokens) {
        load_share(reinterpret_cast<const u32*>(row) + group * kSteps * 4, quad, a[set][n]);
      }
    }
  }
  u32 most[4] = {0, 0, 0, 0};
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int i = 0; i < kSets * kSteps; ++i) most[n] = largest(most[n], a[i / kSteps][n][i % kSteps]);
    most[n] = __reduce_max_sync(~0u, most[n]);
  }
  const Factors factors = choose_factors(most, b, reinterpret_cast<u32*>(shared + kScratch));
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
      if (most[n] >= kInfinity) clear(a[set][n]);
    }
  }
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int tile = warp + i * kWarps;
    if (tile >= kEntryTiles) break;
#pragma unroll
    for (int section = 0; section < 2; ++section) {
      uint2 even[4], odd[4];  // of the entries in the columns of B
#pragma unroll
      for (int block = 0; block < 4; ++block) {
        const int set = set_of(section, block);
        u32 pairs[2][2];  // by entry and pair of tokens
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          float sums[4];
          multiply(sums, a[set][2 * pair], a[set][2 * pair + 1], b[i][book_of(section, block)]);
          const float low = factors.before[2 * pair], high = factors.before[2 * pair + 1];
          pairs[0][pair] = round_pair(sums[0] * low, sums[2] * high);
          pairs[1][pair] = round_pair(sums[1] * low, sums[3] * high);
        }
        // Beyond the last group every product is zero, also for an entry that is not finite.
        even[block] = valid[set] ? make_uint2(pairs[0][0], pairs[0][1]) : make_uint2(0, 0);
        odd[block] = valid[set] ? make_uint2(pairs[1][0], pairs[1][1]) : make_uint2(0, 0);
      }
      u8* to = shared + (tile * 8 + 2 * quad) * 256 + section_offset(section, place);
      store_blocks(even, quad, [&](int block) { return to + block * kBlockBytes; });
      store_blocks(odd, quad, [&](int block) { return to + 256 + block * kBlockBytes; });
    }
  }
  return make_float4(factors.after[0], factors.after[1], factors.after[2], factors.after[3]);
}

// A lane's place among the lanes: where it starts in its 16 bytes of codes, and the offsets of its codes in a row of its
// table, in the order that they are looked up in; of its groups with a table for each of two codebooks.
struct Lane {
  int start;
  u32 table;  // bytes to the lane's table
  u32 columns[kPlaces];
};

__device__ __forceinline__ Lane lane_of(int lane) {
  const int row = lane / 4, quad = lane % 4;
  Lane at;
  const int first = kBookTables ? row % 4 + quad / 2 * 4 : row % 4 * 4 + quad;
  at.start = kBookTables ? first * 2 : first;
  at.table = kBookTables ? 0 : quad / 2 * kTableBytes;
#pragma unroll
  for (int i = 0; i < kPlaces; ++i) {
    const int turn = NUM_BOOKS == 8 ? quad * 4 : 0;  // section_offset turns them so
    at.columns[i] = ((kBookTables ? quad : quad % 2) * kPlaces + (first + i + turn) % kPlaces) * 8;
  }
  return at;
}

// The products of the entry that byte BYTE of the rotated codes names with its group.
template <int BYTE>
__device__ __forceinline__ uint2 look_up(const u8* tables, const Lane& at, const u32 (&codes)[4]) {
  constexpr int kOffset = kBookTables ? BYTE % 2 * kTableBytes : 0;
  const u32 word = codes[BYTE / 4], column = at.columns[kBookTables ? BYTE / 2 : BYTE];
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
  const int partition = blockIdx.z / p.tiles, tile = blockIdx.z % p.tiles, partitions = gridDim.z / p.tiles;
  const int first_batch = y * p.batches_each + min(y, p.batches_over) + warp;
  const int last_batch = first_batch - warp + p.batches_each + (y < p.batches_over);
  const int vector = min(static_cast<int>(blockIdx.x) * 4 + lane % 4, p.groups * NUM_BOOKS / 16 - 1);
  const u8* codes = p.codes + static_cast<long long>(partition) * p.rows * p.code_stride + vector * 16;
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

  float4* out = p.partial + ((static_cast<long long>(blockIdx.x) * p.tiles + tile) * partitions + partition) * p.rows;
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
  const float* partial;  // [chunks, tiles, rows, 4]
  const u16* scales;
  const u16* bias;
  u16* out;  // [tokens, rows]
  int tokens, rows, chunks;
};

// out[n, o] = scale[o] * sum over c of partial[c, n / 4, o, n % 4] + bias[o], in the order of c. Grid: (elements, tiles).
extern "C" __global__ void __launch_bounds__(256) finish_few_tokens(const __grid_constant__ FinishFewTokensParams p) {
  const int e = blockIdx.x * 256 + threadIdx.x, o = e / 4, token = blockIdx.y * 4 + e % 4;
  if (o >= p.rows || token >= p.tokens) return;
  const float scale = to_float(p.scales[o]);
  const float bias = p.bias ? to_float(p.bias[o]) : 0.0f;
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");  // until the partial sums are written
#endif
  const long long chunk = static_cast<long long>(gridDim.y) * p.rows * 4;
  const float* from = p.partial + static_cast<long long>(blockIdx.y) * p.rows * 4 + e;
  float sum = 0.0f;
#pragma unroll 8
  for (int c = 0; c < p.chunks; ++c) sum += from[c * chunk];
  p.out[static_cast<long long>(token) * p.rows + o] = from_float(fmaf(sum, scale, bias));
}
