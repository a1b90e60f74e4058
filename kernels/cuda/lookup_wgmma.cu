// out[n, o] = scale[o] * sum over k of x[n, k] * W[o, k] + bias[o] for 1 to 8 * TOKEN_TILES tokens n on Hopper (sm_90a).
//
// As in lookup_linear.cu a 16-byte lookup is one lane's share of two A fragments. Here the warpgroup instruction takes
// them from registers and reads x^T itself from shared memory, once for 64 rows: no warp loads activations, and no warp
// waits for a product, so that 16 warps of one row tile each keep the lookups going. A warp owns its 16 rows for all of
// its K; sums of several warpgroups over parts of K are added once, at the end, in fixed order.
//
// Lane (row = lane / 4, q = lane % 4) holds GROUPS_PER_LANE neighbouring groups, and step j multiplies groups
// {q * GROUPS_PER_LANE + j}. Pair i (of four) of the lane's entry stands in instruction i / 2, core matrix i % 2, position q,
// so x must stand in shared memory with pairs transposed over q: four warps that do nothing else load it, kSteps steps
// to a slot of a ring, and hand it over by mbarriers.
//
// Grid: (row ranges, splits of K, row partitions with codebooks of their own); with more than one split the sums go to
// `partial` and `finish_linear.cu` adds them in fixed order.
//
// Compile-time constants: those of codebooks.cuh, TOKEN_TILES (1, 2, 4 or 8), K_GROUPS (parts of K in a block: 1, or with
// fewer than 8 token tiles also 2 or 4; above 1 a block has at most 16 / K_GROUPS row tiles).
#include "codebooks.cuh"
#include "wgmma.cuh"

constexpr int kConsumers = 512, kProducers = 128;  // threads
constexpr int kSteps = TOKEN_TILES == 8 || GROUPS_PER_LANE < 8 ? 4 : 8;  // of one slot
constexpr int kStages = GROUPS_PER_LANE / kSteps;                        // slots of one superblock
// Slots take turns among the parts of K, so that each part meets every phase of its slots' barriers. For the same reason
// there must be no fewer slots than producers.
constexpr int kSlots = TOKEN_TILES == 8 ? 6 : 8;
static_assert(kSlots % K_GROUPS == 0 && kSlots >= kProducers / 32);
static_assert(K_GROUPS == 1 || TOKEN_TILES < 8);
constexpr int kSuperblock = 4 * GROUPS_PER_LANE;   // groups
constexpr int kStepBytes = 4 * kCore + 128 / kSteps;  // the rest spreads the producers' stores over the banks
constexpr int kSlotBytes = kSteps * kStepBytes;
constexpr int kTiles = 16 / K_GROUPS;              // row tiles a block accumulates at once
constexpr int kItems = TOKEN_TILES * 8 * kSteps / 32;  // (token, step) pairs of a producer lane in one slot
constexpr int kSumBytes = (K_GROUPS - 1) * (kConsumers / K_GROUPS) * TOKEN_TILES * 16;
constexpr int kFull = kBooksBytes + kSlots * kSlotBytes;  // barriers: a slot has been filled
constexpr int kEmpty = kFull + kSlots * 8;                // and read
constexpr int kScratch = kEmpty + kSlots * 8;
static_assert(kSumBytes <= kBooksBytes, "the parts' sums take the codebooks' place");

extern __shared__ __align__(1024) u8 shared[];  // codebooks, ring of x, barriers, scratch of fill_books

struct Work {  // of this block
  int first_tile, last_tile, first_block, blocks;
};

// A slot's place in the ring, and the parity of its barriers' phase.
struct Ring {
  int slot = 0;
  u32 parity = 0;

  __device__ __forceinline__ void advance(int count) {
    slot += count;
    if (slot >= kSlots) {  // `count` is at most kSlots
      slot -= kSlots;
      parity ^= 1;
    }
  }
};

// Load x in the order that the consumers multiply it in; zeros beyond the last group, nothing beyond the last token.
__device__ __forceinline__ void produce(const LinearParams& p, const Work& work) {
  const int warp = (threadIdx.x - kConsumers) / 32, lane = threadIdx.x % 32;
  const int step = lane % kSteps, first = lane / kSteps;
  constexpr int tokens_at_once = 32 / kSteps;
  constexpr int at_once = kItems < 2 ? kItems : 2;
  const int batches = (work.last_tile - work.first_tile + kTiles - 1) / kTiles;
  const int stages = (work.blocks + K_GROUPS - 1) / K_GROUPS * kStages * K_GROUPS;
  const u32 base = shared_address(shared);
  Ring at;
  at.advance(warp);
  for (int n = warp; n < stages * batches; n += kProducers / 32, at.advance(kProducers / 32)) {
    const int stage = n % stages / K_GROUPS;
    const int block = stage / kStages * K_GROUPS + n % K_GROUPS;
    if (block >= work.blocks) continue;  // the last parts may have one less
    const int group = (work.first_block + block) * kSuperblock + stage % kStages * kSteps + step;
    const u32 slot = base + kBooksBytes + at.slot * kSlotBytes + step * kStepBytes;
#pragma unroll
    for (int item = 0; item < kItems; item += at_once) {
      u32 v[at_once][4][4];
#pragma unroll
      for (int i = 0; i < at_once; ++i) {
        const int token = first + (item + i) * tokens_at_once;
        const u16* from = p.x + token * p.x_stride + group * 8;
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const bool valid = token < p.tokens && group + q * GROUPS_PER_LANE < p.groups;
          load_once(reinterpret_cast<const u8*>(from + q * GROUPS_PER_LANE * 8), valid, v[i][q]);
        }
      }
      if (item == 0) barrier_wait(base + kEmpty + at.slot * 8, at.parity ^ 1);
#pragma unroll
      for (int i = 0; i < at_once; ++i) {
        const int token = first + (item + i) * tokens_at_once;
        const u32 to = slot + token * 16;
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(to + pair * kCore), "r"(v[i][0][pair]),
                       "r"(v[i][1][pair]), "r"(v[i][2][pair]), "r"(v[i][3][pair])
                       : "memory");
        }
      }
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    barrier_arrive(base + kFull + at.slot * 8);
  }
}

struct Consumer {
  u32 column;
  bool active;  // the warp has rows
  bool leader;  // one lane of the warp
  Ring at;
  u32 release;  // the barrier of the slot before, which may still be read; 0 if none
};

// The steps from STEP on of a superblock.
template <int STEP = 0>
__device__ __forceinline__ void multiply_block(Consumer& c, const u32 (&words)[2][kWords], float (&acc)[4 * TOKEN_TILES]) {
  const u32 base = shared_address(shared);
  uint4 low = make_uint4(0, 0, 0, 0), high = low;  // all warps of a warpgroup must take part in the product
  if (c.active) {
    low = decode<STEP>(shared, words[0], c.column);
    high = decode<STEP>(shared, words[1], c.column);
  }
  if (STEP % kSteps == 0) barrier_wait(base + kFull + c.at.slot * 8, c.at.parity);
  const u32 slot = base + kBooksBytes + c.at.slot * kSlotBytes;
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  wgmma(acc, low.x, high.x, low.y, high.y, descriptor(slot, STEP % kSteps * kStepBytes));
  wgmma(acc, low.z, high.z, low.w, high.w, descriptor(slot, STEP % kSteps * kStepBytes + 2 * kCore));
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  wgmma_wait<1>();
  if (STEP % kSteps == 0) {  // all steps of the slot before are finished
    if (c.leader && c.release) barrier_arrive(c.release);
  }
  if ((STEP + 1) % kSteps == 0) {
    c.release = base + kEmpty + c.at.slot * 8;
    if constexpr (K_GROUPS > 1) {  // a part has few slots: release them at once
      wgmma_wait<0>();
      if (c.leader) barrier_arrive(c.release);
      c.release = 0;
    }
    c.at.advance(K_GROUPS);
  }
  if constexpr (STEP + 1 < GROUPS_PER_LANE) multiply_block<STEP + 1>(c, words, acc);
}

// Add the parts of K in order; true in the warps that hold the sums.
__device__ __forceinline__ bool add_parts(float4* sums, int part, float (&acc)[4 * TOKEN_TILES]) {
  constexpr int threads = kConsumers / K_GROUPS;
  const int thread = threadIdx.x % threads;
  first_threads_barrier<kConsumers>();  // the codebooks have been read
  if (part > 0) {
#pragma unroll
    for (int t = 0; t < TOKEN_TILES; ++t) {
      sums[((part - 1) * TOKEN_TILES + t) * threads + thread] =
          make_float4(acc[4 * t], acc[4 * t + 1], acc[4 * t + 2], acc[4 * t + 3]);
    }
  }
  first_threads_barrier<kConsumers>();
  if (part > 0) return false;
#pragma unroll
  for (int other = 0; other + 1 < K_GROUPS; ++other) {
#pragma unroll
    for (int t = 0; t < TOKEN_TILES; ++t) {
      const float4 sum = sums[(other * TOKEN_TILES + t) * threads + thread];
      acc[4 * t] += sum.x, acc[4 * t + 1] += sum.y, acc[4 * t + 2] += sum.z, acc[4 * t + 3] += sum.w;
    }
  }
  return true;
}

// Write one row tile's outputs or partial sums.
__device__ __forceinline__ void store(const LinearParams& p, int tile, float unit, const float (&acc)[4 * TOKEN_TILES]) {
  const int lane = opaque_thread() % 32;
  const long long all_rows = static_cast<long long>(gridDim.z) * p.rows;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int in_part = tile * 16 + half * 8 + lane / 4;
    if (in_part >= p.rows) continue;
    const long long o = static_cast<long long>(blockIdx.z) * p.rows + in_part;
    const float scale = to_float(p.scales[o]);
    const float bias = p.bias ? to_float(p.bias[o]) : 0.0f;
#pragma unroll
    for (int i = 0; i < 2 * TOKEN_TILES; ++i) {
      const int token = i / 2 * 8 + lane % 4 * 2 + i % 2;
      const float sum = acc[i / 2 * 4 + half * 2 + i % 2] * unit;
      if (token >= p.tokens) continue;
      if (gridDim.y > 1) {
        p.partial[(static_cast<long long>(blockIdx.y) * p.tokens + token) * all_rows + o] = sum;
      } else {
        p.out[token * all_rows + o] = from_float(fmaf(sum, scale, bias));
      }
    }
  }
}

__device__ __forceinline__ void consume(const LinearParams& p, const Work& work) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int part = K_GROUPS == 1 ? 0 : warp / kTiles, my_tile = warp % kTiles;
  const int first_vector = work.first_block * 4 + lane % 4, last_vector = p.groups / GROUPS_PER_LANE - 1;
  const u8* codes;     // of the lane's first row
  long long to_other;  // from there to its second row
  u32 now[2][kWords], next[2][kWords];
  // Past the last row or group read the last codes again: rows are not stored, and x is zero there.
  const auto start_tile = [&](int tile) {
    const int row = min(tile * 16 + lane / 4, p.rows - 1);
    codes = p.codes + (static_cast<long long>(blockIdx.z) * p.rows + row) * p.code_stride;
    to_other = (min(tile * 16 + lane / 4 + 8, p.rows - 1) - row) * p.code_stride;
  };
  const auto fetch = [&](int block, bool wanted) {
    const u8* from = codes + min(first_vector + block * 4, last_vector) * kLaneBytes;
    load_once(from, wanted, next[0]);
    load_once(from + to_other, wanted, next[1]);
  };
  int tile = work.first_tile + my_tile;
  start_tile(tile);
  fetch(part, tile < work.last_tile && part < work.blocks);
  const float unit = fill_books<kConsumers>(
      reinterpret_cast<const uint4*>(p.books) + (static_cast<long long>(blockIdx.z) * NUM_BOOKS << NBITS), shared,
      reinterpret_cast<u32*>(shared + kScratch));
  first_threads_barrier<kConsumers>();

  Consumer c = {lane % COPIES * 16u, false, lane == 0, {}, 0};
  c.at.advance(part);
  for (; tile - my_tile < work.last_tile; tile += kTiles) {
    c.active = tile < work.last_tile;
    float acc[4 * TOKEN_TILES] = {};
    for (int block = part; block < work.blocks; block += K_GROUPS) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) now[0][w] = next[0][w], now[1][w] = next[1][w];
      if (block + K_GROUPS < work.blocks) {
        fetch(block + K_GROUPS, c.active);
      } else {
        start_tile(tile + kTiles);
        fetch(part, tile + kTiles < work.last_tile);
      }
      multiply_block(c, now, acc);
    }
    wgmma_wait<0>();
    if (K_GROUPS == 1 || add_parts(reinterpret_cast<float4*>(shared), part, acc)) {
      if (c.active) store(p, tile, unit, acc);
    }
  }
}

extern "C" __global__ void __launch_bounds__(kConsumers + kProducers, 1)
    lookup_wgmma(const __grid_constant__ LinearParams p) {
  if (threadIdx.x == 0) {
    const u32 base = shared_address(shared);
    for (int s = 0; s < kSlots; ++s) {
      barrier_init(base + kFull + s * 8, 32);
      barrier_init(base + kEmpty + s * 8, kTiles);
    }
  }
  __syncthreads();
  begin_after_previous_kernel();
  const int bx = blockIdx.x, by = blockIdx.y;
  Work work;
  work.first_tile = bx * p.tiles_each + min(bx, p.tiles_over);
  work.last_tile = work.first_tile + p.tiles_each + (bx < p.tiles_over);
  work.first_block = by * p.blocks_each + min(by, p.blocks_over);
  work.blocks = p.blocks_each + (by < p.blocks_over);
  if (threadIdx.x >= kConsumers) {
    produce(p, work);
  } else {
    consume(p, work);
  }
}
