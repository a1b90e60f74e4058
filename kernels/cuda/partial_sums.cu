// partial[chunk, o] = sum over the chunk's inputs of x[k] * W[o, k] (before the scale) for exactly one token.
//
// With one token, an entry is only ever multiplied by its group's x. So a block first tabulates that product for every
// entry and every group of its chunk of inputs (by tensor cores: entries times groups), and a lookup is 4 bytes instead
// of an entry's 16 to 64: "psumbooks" of CodeGEMM (arXiv 2512.17970), laid out here so that no two lanes ever meet in a
// bank. A chunk has 128 codes of each row: lane l owns codes 4 l .. 4 l + 3 and bank l holds their tables; the lanes'
// sums of eight rows are then added by nine shuffles. `finish_linear.cu` adds the chunks in fixed order.
//
// Grid: (chunks, row ranges, row partitions). Compile-time constants: those of tables.cuh.
#include "tables.cuh"

constexpr int kRows = 8;  // rows of a warp's unit of work
constexpr int kSlots = NUM_BOOKS < 4 ? 4 / NUM_BOOKS : 1;  // groups of a lane, which may be half of one
constexpr int kHalves = NUM_BOOKS < 8 ? 2 : 1;             // of the lanes that have different groups

struct PartialParams {
  const u16* x;          // [GROUP * groups]
  const u8* codes;       // [partitions * rows, groups, NUM_BOOKS]
  const u32* books;      // [partitions, NUM_BOOKS, 2^NBITS, GROUP / 2] pairs
  float* partial;        // [chunks, partitions * rows]
  long long code_stride;  // bytes
  int rows, groups;
  int units_each, units_over;  // units of kRows rows per block of the grid's y; the first `units_over` take one more
};

// Where the products of byte `byte` of a lane's codes stand in an entry of the tables, without the lane.
__device__ __forceinline__ constexpr int byte_offset(int byte) { return byte / 2 * kTableBytes + byte % 2 * 128; }

// The lane that owns row `row` of block `block` of eight lanes. Two blocks are the rows of an A fragment, and share a book.
__device__ __forceinline__ constexpr int owner(int block, int row) {
  return NUM_BOOKS == 8 ? block % 2 * 16 + row * 2 + block / 2 : block * 8 + row;
}

// Two blocks of lanes are the 16 rows of A, eight entries the columns of B.
__device__ __forceinline__ void build_tables(const PartialParams& p, u8* tables, int warp, int lane) {
  const int row = lane / 4, quad = lane % 4;
  const u32* books = p.books + static_cast<long long>(blockIdx.z) * NUM_BOOKS * kEntries * kSteps * 4;
  u32 b[kMine][NUM_BOOKS][kSteps], a[kSlots][kHalves][2][kSteps];  // all loads first: they are what the block waits for
  load_entries(books, warp, lane, b);
  bool valid[4];  // Beyond the last group, whose codes fill whole lanes, sums are zero, also for an entry that is not finite.
#pragma unroll
  for (int block = 0; block < 4; ++block) {
    const int code = (blockIdx.x * 32 + owner(block, row)) * 4;
    valid[block] = code < p.groups * NUM_BOOKS;
    if (block >= 2 * kHalves) continue;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      u32(&to)[kSteps] = a[slot][block / 2][block % 2];
      clear(to);
      if (valid[block]) load_share(reinterpret_cast<const u32*>(p.x) + (code / NUM_BOOKS + slot) * kSteps * 4, quad, to);
    }
  }
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int tile = warp + i * kWarps;
    if (tile >= kEntryTiles) break;
#pragma unroll
    for (int byte = 0; byte < 4; ++byte) {
      float sums[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const u32(&groups)[2][kSteps] = a[byte / NUM_BOOKS][half % kHalves];
        multiply(sums[half], groups[0], groups[1], b[i][(owner(2 * half, 0) * 4 + byte) % NUM_BOOKS]);
      }
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        u8* to = tables + byte_offset(byte) + (tile * 8 + 2 * quad + column) * 256;
        float v[4];
#pragma unroll
        for (int block = 0; block < 4; ++block) v[block] = valid[block] ? sums[block / 2][block % 2 * 2 + column] : 0.0f;
        store_blocks(v, quad, [&](int block) { return to + owner(block, row) * 4; });
      }
    }
  }
}

template <int BYTE>
__device__ __forceinline__ float look_up(const u8* tables, u32 word, u32 lane_offset) {
  constexpr int kOffset = byte_offset(BYTE);
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

extern "C" __global__ void __launch_bounds__(kThreads, 1) partial_sums(const __grid_constant__ PartialParams p) {
  extern __shared__ __align__(1024) u8 tables[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, y = blockIdx.y;
  const int first_unit = y * p.units_each + min(y, p.units_over) + warp;
  const int last_unit = first_unit - warp + p.units_each + (y < p.units_over);
  const int vector = min(static_cast<int>(blockIdx.x) * 32 + lane, p.groups * NUM_BOOKS / 4 - 1);
  const u8* codes = p.codes + static_cast<long long>(blockIdx.z) * p.rows * p.code_stride + vector * 4;

#pragma unroll
  for (int r = 0; r < 2 * kRows; ++r) {
    const int row = min((first_unit + r / kRows * kWarps) * kRows + r % kRows, p.rows - 1);
    prefetch_to_l2(codes + row * p.code_stride);
  }
  constexpr int kBookBytes = NUM_BOOKS * kEntries * GROUP * 2;  // more would hold up what all blocks wait for
  if (kBookBytes <= 16384 && threadIdx.x * 128 < kBookBytes) {
    prefetch_to_l2(reinterpret_cast<const u8*>(p.books) + static_cast<long long>(blockIdx.z) * kBookBytes + threadIdx.x * 128);
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
