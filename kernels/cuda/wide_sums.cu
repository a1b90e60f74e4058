// partial[chunk, o] = sum over the chunk's inputs of x[k] * W[o, k] (before the scale) for exactly one token, for codes of
// 9 to 12 bits, 16 bits each.
//
// As in partial_sums.cu a block first tabulates the products of every entry with its chunk's groups. There are too many for
// a word of each, so they are rounded to 16 bits as weights are in the other kernels (products.cuh). A chunk has 16 codes
// of each row; code c has banks 2 c and 2 c + 1, and a row of 128 bytes of the table four entries of every code.
//
// Lane (row = lane / 2, half = lane % 2) looks up codes 8 half .. 8 half + 7 of one row of the weight, each row starting at
// another one: at any time two lanes look up products of the same code, and at most those two meet in a bank.
//
// Grid: (chunks, row ranges, row partitions). Compile-time constants: NUM_BOOKS (1 or 2), NBITS (9 to 12), DTYPE_BF16 (and GROUP: 8).
#include "products.cuh"

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * 32;
constexpr int kEntries = 1 << NBITS;
constexpr int kTableBytes = kEntries * 32;
constexpr int kMine = kEntries / 32 / kWarps;  // tiles of 32 entries of a warp
constexpr int kUnits = 2;                      // of 16 rows, that a warp takes at once

struct WideSumsParams {
  const u16* x;          // [8 * groups]
  const u8* codes;       // [partitions * rows, groups, NUM_BOOKS] of 16 bits
  const u32* books;      // [partitions, NUM_BOOKS, 2^NBITS, 4] pairs
  float* partial;        // [chunks, partitions * rows]
  long long code_stride;  // bytes
  int rows, groups;
  int batches_each, batches_over;  // of 16 * kUnits rows per block of the grid's y; the first take one more
};

// Tabulate. Four entries in turn are the rows of A, eight groups the columns of B; code 2 * column + t of the chunk belongs to
// tile t, which is book t or, with one book, every second group. Returns what sums must be multiplied by.
__device__ __forceinline__ float build_table(const WideSumsParams& p, u8* table, int warp, int lane) {
  const int place = lane / 4, quad = lane % 4;
  const u32* books = p.books + static_cast<long long>(blockIdx.z) * NUM_BOOKS * kEntries * 4;
  u32 a[kMine][NUM_BOOKS][4], b[3 - NUM_BOOKS];  // all loads first: they are what the block waits for
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
#pragma unroll
    for (int book = 0; book < NUM_BOOKS; ++book) {
      const u32* from = books + (book * kEntries + (warp + i * kWarps) * 32 + place * 4) * 4 + quad;
#pragma unroll
      for (int e = 0; e < 4; ++e) a[i][book][e] = __ldg(from + e * 4);
    }
  }
  u32 most_x = 0;
  const u32* x = reinterpret_cast<const u32*>(p.x) + blockIdx.x * (16 / NUM_BOOKS) * 4 + quad;
#pragma unroll
  for (int t = 0; t < 3 - NUM_BOOKS; ++t) {
    const int group = NUM_BOOKS == 2 ? place : 2 * place + t;
    b[t] = static_cast<int>(blockIdx.x) * (16 / NUM_BOOKS) + group < p.groups ? __ldg(x + group * 4) : 0;
    most_x = largest(most_x, b[t]);
  }
  most_x = __reduce_max_sync(~0u, most_x);
  u32 most = 0;
#pragma unroll
  for (int i = 0; i < kMine * NUM_BOOKS * 4; ++i) most = largest_finite(most, a[i / (NUM_BOOKS * 4)][i / 4 % NUM_BOOKS][i % 4]);
  const int above = exponent_above_all(most, reinterpret_cast<u32*>(table + kTableBytes));
  const int exponent = most_x < kInfinity ? exponent_into_range<8>(above, most_x) : 0;
  const float factor = power_of_two(exponent);
  bool valid[2];  // Beyond the last group, whose codes fill whole lanes, products are zero, also of an entry that is not finite.
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    valid[j] = static_cast<int>(blockIdx.x) * 16 + 4 * quad + 2 * j < p.groups * NUM_BOOKS;
  }
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    u32 v[2][4];  // of columns 2 quad and 2 quad + 1: four entries of two codes
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const u32(&entries)[4] = a[i][t % NUM_BOOKS];
      float low[4] = {}, high[4] = {};
      mma_16x8x8(low, entries[0], entries[1], b[NUM_BOOKS == 2 ? 0 : t]);
      mma_16x8x8(high, entries[2], entries[3], b[NUM_BOOKS == 2 ? 0 : t]);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        v[j][2 * t] = valid[j] ? round_pair(low[j] * factor, low[2 + j] * factor) : 0;
        v[j][2 * t + 1] = valid[j] ? round_pair(high[j] * factor, high[2 + j] * factor) : 0;
      }
    }
    u8* to = table + ((warp + i * kWarps) * 8 + place) * 128 + quad * 32;
    const bool odd = place & 1;  // neighbouring rows start with different columns: eight lanes store to all banks
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const u32(&even)[4] = v[j], (&other)[4] = v[1 - j];
      *reinterpret_cast<uint4*>(to + (j ^ odd) * 16) =
          make_uint4(odd ? other[0] : even[0], odd ? other[1] : even[1], odd ? other[2] : even[2], odd ? other[3] : even[3]);
    }
  }
  return power_of_two(-exponent);
}

// The product that code CODE of the rotated ones names, whose banks start at byte `column` of a row of the table.
template <int CODE>
__device__ __forceinline__ float look_up(const u8* table, const u32 (&codes)[4], u32 column) {
  const u32 word = codes[CODE / 2];
  const u32 row = CODE % 2 ? word >> 11 : word << 5, within = CODE % 2 ? word >> 15 : word << 1;
  const u32 offset = (row & (kEntries / 4 - 1) << 7) | (within & 6) | column;
  return to_float(*reinterpret_cast<const u16*>(table + offset));
}

template <int CODE = 0>
__device__ __forceinline__ float sum_codes(const u8* table, const u32 (&codes)[4], const u32 (&columns)[8]) {
  float sum = look_up<CODE>(table, codes, columns[CODE]);
  if constexpr (CODE < 7) sum += sum_codes<CODE + 1>(table, codes, columns);
  return sum;
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) wide_sums(const __grid_constant__ WideSumsParams p) {
  extern __shared__ __align__(1024) u8 table[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, y = blockIdx.y;
  const int row = lane / 2, half = lane % 2;
  const int first_batch = y * p.batches_each + min(y, p.batches_over) + warp;
  const int last_batch = first_batch - warp + p.batches_each + (y < p.batches_over);
  const int vector = min(static_cast<int>(blockIdx.x) * 2 + half, p.groups * NUM_BOOKS / 8 - 1);
  const u8* codes = p.codes + static_cast<long long>(blockIdx.z) * p.rows * p.code_stride + vector * 16;
  u32 now[kUnits][4], next[kUnits][4];
  const auto fetch = [&](int batch) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int r = min((batch * kUnits + u) * 16 + row, p.rows - 1);
      load_once(codes + r * p.code_stride, batch < last_batch, next[u]);
    }
  };
  begin_after_previous_kernel();
  fetch(first_batch);
  const float back = build_table(p, table, warp, lane);
  u32 columns[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) columns[i] = (half * 8 + (row + i) % 8) * 8;
  __syncthreads();

  float* out = p.partial + (static_cast<long long>(blockIdx.x) * gridDim.z + blockIdx.z) * p.rows;
  for (int batch = first_batch; batch < last_batch; batch += kWarps) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
#pragma unroll
      for (int w = 0; w < 4; ++w) now[u][w] = next[u][w];
    }
    fetch(batch + kWarps);
    float sums[kUnits];
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      rotate(now[u], row % 8 * 2);
      sums[u] = sum_codes(table, now[u], columns);
    }
#pragma unroll
    for (int u = 0; u < kUnits; u += 2) {  // a lane adds its half of a unit to the other lane's
      const float mine = half ? sums[u + 1] : sums[u], other = half ? sums[u] : sums[u + 1];
      const float sum = mine + __shfl_xor_sync(~0u, other, 1);
      const int r = (batch * kUnits + u + half) * 16 + row;
      if (r < p.rows) out[r] = sum * back;
    }
  }
}
