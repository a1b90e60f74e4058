// partial[chunk, o] = sum over the chunk's inputs of x[k] * W[o, k] (before the scale) for exactly one token.
//
// With one token, an entry is only ever multiplied by its group's eight x. So a block first tabulates that product for
// every entry and every group of its chunk of inputs (by tensor cores: entries times groups, k = 8), and a lookup is 4
// bytes instead of 16: "psumbooks" of CodeGEMM (arXiv 2512.17970), laid out here so that no two lanes ever meet in a
// bank. Lane l owns the chunk's groups l * SLOTS .. l * SLOTS + SLOTS - 1 and bank l holds their tables; the lanes' sums of
// eight rows are then added by nine shuffles. `finish_linear.cu` adds the chunks in fixed order.
//
// Grid: (chunks, row ranges, row partitions). Compile-time constants: NUM_BOOKS (1 or 2), NBITS, DTYPE_BF16.
#include "common.cuh"

constexpr int kWarps = 16;
constexpr int kSlots = 4 / NUM_BOOKS;              // groups of a lane: one word of codes
constexpr int kRows = 8;                           // rows of a warp's unit of work
constexpr int kEntries = 1 << NBITS;
constexpr int kTableBytes = kEntries * 256;        // an entry: two words of each lane

struct PartialParams {
  const u16* x;          // [8 * groups]
  const u8* codes;       // [partitions * rows, groups, NUM_BOOKS]
  const u32* books;      // [partitions, NUM_BOOKS, 2^NBITS, 4] pairs
  float* partial;        // [chunks, partitions * rows]
  long long code_stride;  // bytes
  int rows, groups;
  int units_each, units_over;  // units of kRows rows per block of the grid's y; the first `units_over` take one more
};

// Where the sum of `slot` and `book` stands in an entry of the tables, without the lane.
__device__ __forceinline__ constexpr int slot_offset(int book, int slot) {
  return (NUM_BOOKS == 2 ? book : slot / 2) * kTableBytes + slot % 2 * 128;
}

// Store four sums, one for each block of eight owners, to an entry of the tables. Lane quads hold different entries of
// the same owners, which share a bank: each quad starts at another block.
__device__ __forceinline__ void store_blocks(u8* entry, const float (&v)[4], int row, int quad) {
  const bool odd = quad & 1, high = quad & 2;
  const float once[4] = {odd ? v[1] : v[0], odd ? v[2] : v[1], odd ? v[3] : v[2], odd ? v[0] : v[3]};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    *reinterpret_cast<float*>(entry + ((i + quad) % 4 * 8 + row) * 4) = high ? once[(i + 2) % 4] : once[i];
  }
}

// Two neighbouring slots of eight lanes are the 16 rows of A, eight entries the columns of B.
__device__ __forceinline__ void build_tables(const PartialParams& p, u8* tables, int warp, int lane) {
  const int row = lane / 4, quad = lane % 4;
  const u32* books = p.books + static_cast<long long>(blockIdx.z) * NUM_BOOKS * kEntries * 4;
  constexpr int kTiles = NUM_BOOKS * kEntries / 8;
  constexpr int kMine = (kTiles + kWarps - 1) / kWarps;
  u32 b[kMine], a[kSlots / 2][4][2];  // all loads first: they are what the block waits for
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int tile = warp + i * kWarps;
    b[i] = tile < kTiles ? __ldg(books + (tile * 8 + row) * 4 + quad) : 0;
  }
#pragma unroll
  for (int i = 0; i < kSlots * 4; ++i) {
    const int slot = i / 8 * 2 + i % 2, block = i / 2 % 4;
    const int group = (blockIdx.x * 32 + block * 8 + row) * kSlots + slot;
    a[i / 8][block][i % 2] = group < p.groups ? __ldg(reinterpret_cast<const u32*>(p.x) + group * 4 + quad) : 0;
  }
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int tile = warp + i * kWarps;
    if (tile >= kTiles) break;
    const int entry = tile * 8 % kEntries + 2 * quad, book = tile * 8 / kEntries;
#pragma unroll
    for (int pair = 0; pair < kSlots / 2; ++pair) {
      float sums[4][4] = {};
#pragma unroll
      for (int block = 0; block < 4; ++block) {
        mma_16x8x8(sums[block], a[pair][block][0], a[pair][block][1], b[i]);
        // The last groups' owners are whole lanes. Beyond them every sum is zero, also for an entry that is not finite.
        if ((blockIdx.x * 32 + block * 8 + row) * kSlots >= p.groups) {
          sums[block][0] = sums[block][1] = sums[block][2] = sums[block][3] = 0.0f;
        }
      }
      u8* to = tables + slot_offset(book, 2 * pair) + entry * 256;
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        float low[4], high[4];
#pragma unroll
        for (int block = 0; block < 4; ++block) {
          low[block] = sums[block][column];
          high[block] = sums[block][2 + column];
        }
        store_blocks(to + column * 256, low, row, quad);
        store_blocks(to + column * 256 + slot_offset(0, 1), high, row, quad);
      }
    }
  }
}

template <int BYTE>
__device__ __forceinline__ float look_up(const u8* tables, u32 word, u32 lane_offset) {
  constexpr int kOffset = slot_offset(BYTE % NUM_BOOKS, BYTE / NUM_BOOKS);
  u32 offset;
  if constexpr (NBITS == 8) {
    offset = __byte_perm(word, lane_offset, 0x5504 | BYTE << 4);  // bytes: lane, code, 0, 0
  } else {
    offset = (word >> BYTE * 8 & (kEntries - 1)) << 8 | lane_offset;
  }
  return *reinterpret_cast<const float*>(tables + offset + kOffset);
}

template <int BYTE = 0>
__device__ __forceinline__ float sum_lane(const u8* tables, u32 word, u32 lane_offset) {
  float sum = look_up<BYTE>(tables, word, lane_offset);
  if constexpr (BYTE < 3) sum += sum_lane<BYTE + 1>(tables, word, lane_offset);
  return sum;
}

// The sums over all lanes of eight values: lane l returns that of value l / 4.
__device__ __forceinline__ float sum_over_lanes(float (&v)[kRows], int lane) {
#pragma unroll
  for (int count = kRows / 2; count > 0; count /= 2) {  // lanes apart by 4 * count exchange halves of the values
    const bool upper = lane & 4 * count;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      float mine = upper ? v[count + i] : v[i], other = upper ? v[i] : v[count + i];
      v[i] = mine + __shfl_xor_sync(~0u, other, 4 * count);
    }
  }
  v[0] += __shfl_xor_sync(~0u, v[0], 2);
  return v[0] + __shfl_xor_sync(~0u, v[0], 1);
}

extern "C" __global__ void __launch_bounds__(kWarps * 32, 1) partial_sums(const __grid_constant__ PartialParams p) {
  extern __shared__ __align__(1024) u8 tables[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, y = blockIdx.y;
  const int first_unit = y * p.units_each + min(y, p.units_over) + warp;
  const int last_unit = first_unit - warp + p.units_each + (y < p.units_over);
  const int vector = min(static_cast<int>(blockIdx.x) * 32 + lane, p.groups / kSlots - 1);
  const u8* codes = p.codes + static_cast<long long>(blockIdx.z) * p.rows * p.code_stride + vector * 4;

#pragma unroll
  for (int r = 0; r < 2 * kRows; ++r) {
    const int row = min((first_unit + r / kRows * kWarps) * kRows + r % kRows, p.rows - 1);
    prefetch_to_l2(codes + row * p.code_stride);
  }
  if (threadIdx.x < NUM_BOOKS * kEntries / 8) {
    prefetch_to_l2(p.books + (static_cast<long long>(blockIdx.z) * NUM_BOOKS * kEntries + threadIdx.x * 8) * 4);
  }
  begin_after_previous_kernel();
  u32 words[3][kRows];
  auto fetch = [&](int unit, u32 (&to)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      load_once(codes + min(unit * kRows + r, p.rows - 1) * p.code_stride, unit < last_unit, reinterpret_cast<u32(&)[1]>(to[r]));
    }
  };
  fetch(first_unit, words[0]);
  fetch(first_unit + kWarps, words[1]);
  build_tables(p, tables, warp, lane);
  __syncthreads();

  float* out = p.partial + (static_cast<long long>(blockIdx.x) * gridDim.z + blockIdx.z) * p.rows;
  auto work = [&](int unit, const u32 (&from)[kRows]) {
    float sums[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) sums[r] = sum_lane(tables, from[r], lane * 4);
    const float sum = sum_over_lanes(sums, lane);
    const int row = unit * kRows + lane / 4;
    if (lane % 4 == 0 && row < p.rows) out[row] = sum;
  };
  for (int unit = first_unit; unit < last_unit; unit += 3 * kWarps) {
    fetch(unit + 2 * kWarps, words[2]);
    work(unit, words[0]);
    if (unit + kWarps >= last_unit) break;
    fetch(unit + 3 * kWarps, words[0]);
    work(unit + kWarps, words[1]);
    if (unit + 2 * kWarps >= last_unit) break;
    fetch(unit + 4 * kWarps, words[1]);
    work(unit + 2 * kWarps, words[2]);
  }
}
