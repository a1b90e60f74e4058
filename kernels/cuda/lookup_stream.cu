// out[n, o] = scale[o] * sum over k of x[n, k] * W[o, k] + bias[o] for 1 to 32 tokens n on Hopper (sm_90).
//
// Like lookup_linear.cu: a 16-byte lookup is one lane's share of two m16n8k16 A fragments, whose k positions are renamed.
// Here the load/store unit has little to do besides the lookups, which bound this kernel. Codes and x come by tensor copies
// into a ring of stages, and every warp multiplies all row tiles of its block, at most 14, or half of them, with its share of
// K, so that x is read once or twice and no warp waits for another before the end.
//
// A stage has 128 bytes of codes of every row, and x of their inputs; the k warps take the eight 16-byte pieces in turn.
// Lane (row = lane / 4, q = lane % 4) has the q-th word of a piece: GROUPS_PER_LANE neighbouring groups, so that step s
// multiplies groups {q * GROUPS_PER_LANE + s}. Both arrive swizzled, which makes these loads free of bank conflicts (but for
// x with one or four codebooks, where two lanes meet).
//
// Grid: (row ranges, splits of K, row partitions with codebooks of their own); with more than one split the sums go to
// `partial` and `finish_linear.cu` adds them in fixed order.
//
// Compile-time constants: those of codebooks.cuh with GROUPS_PER_LANE = 4 / NUM_BOOKS and COPIES 8, TOKEN_TILES (1, 2 or 4),
// ROW_WARPS (1 or 2, that take row tiles in turn), ROW_TILES (the most of a warp), STAGES.
#include "codebooks.cuh"
#include "tensor_map.cuh"

constexpr int kWarps = 8, kThreads = kWarps * 32;
constexpr int kKWarps = kWarps / ROW_WARPS;
constexpr int kPieces = 8;                               // of 16 bytes of a row's codes, in a stage
constexpr int kPieceGroups = 4 * GROUPS_PER_LANE;
constexpr int kRows = 16 * ROW_TILES * ROW_WARPS;
constexpr int kCodeBytesOfStage = kRows * 128;
constexpr int kBoxes = kPieces * kPieceGroups / 8;       // of x in a stage, 64 inputs each
constexpr int kBoxBytes = TOKEN_TILES * 8 * 128;
constexpr int kStageBytes = kCodeBytesOfStage + kBoxes * kBoxBytes;
constexpr int kStages = (kBooksBytes + 1023) / 1024 * 1024;  // swizzled boxes start at multiples of 1024
constexpr int kFull = kStages + STAGES * kStageBytes;      // barriers: a stage has been filled
constexpr int kEmpty = kFull + STAGES * 8;                 // and read
constexpr int kScratch = kEmpty + STAGES * 8;
constexpr int kScales = kScratch + 16;                     // of the block's rows, and their biases
constexpr int kPitch = kRows + 4;                          // of the sums of a token: no bank conflicts
static_assert(kWords == 1);
static_assert(kKWarps * TOKEN_TILES * 8 * kPitch * 4 <= kFull, "the warps' sums take the place of codebooks and stages");

struct StreamParams {
  TensorMap codes, x;
  LinearParams linear;  // `blocks`: pieces of 16 bytes
};

struct Work {  // of this block
  int first_row, rows, first_piece, pieces;
};

extern __shared__ __align__(1024) u8 shared[];

// Start to fill the stage of chunk CHUNK, by one thread, as soon as all warps have read what it held.
__device__ __forceinline__ void fill_stage(const StreamParams& params, const Work& work, int chunk) {
  const int stage = chunk % STAGES, piece = work.first_piece + chunk * kPieces;
  const u32 base = shared_address(shared), full = base + kFull + stage * 8;
  if (chunk >= STAGES) barrier_wait(base + kEmpty + stage * 8, (chunk / STAGES + 1) & 1);
  barrier_expect(full, kStageBytes);
  const u32 to = base + kStages + stage * kStageBytes;
  copy_box(to, params.codes, piece * 16, blockIdx.z * params.linear.rows + work.first_row, full);
#pragma unroll
  for (int box = 0; box < kBoxes; ++box) {
    copy_box(to + kCodeBytesOfStage + box * kBoxBytes, params.x, piece * kPieceGroups * 8 + box * 64, 0, full);
  }
}

// Scales and biases of the block's rows, while there is time.
__device__ __forceinline__ void load_scales(const LinearParams& p, const Work& work, float* scales) {
  for (int row = threadIdx.x; row < work.rows; row += kThreads) {
    const long long o = static_cast<long long>(blockIdx.z) * p.rows + work.first_row + row;
    scales[row] = to_float(p.scales[o]);
    scales[kRows + row] = p.bias ? to_float(p.bias[o]) : 0.0f;
  }
}

struct Lane {
  int row, quad, k_warp, row_warp;
  u32 column;  // of its copy of the codebooks, in bytes
};

// x of a piece: lane (token = row, q) has what its groups are multiplied with. Beyond the last token it is zero.
__device__ __forceinline__ void load_x(const Lane& at, const u8* boxes, int piece, uint4 (&x)[GROUPS_PER_LANE][TOKEN_TILES]) {
#pragma unroll
  for (int s = 0; s < GROUPS_PER_LANE; ++s) {
    const int group = piece * kPieceGroups + at.quad * GROUPS_PER_LANE + s;
#pragma unroll
    for (int t = 0; t < TOKEN_TILES; ++t) {
      const u8* from = boxes + group / 8 * kBoxBytes + (t * 8 + at.row) * 128 + (group % 8 ^ at.row) * 16;
      x[s][t] = *reinterpret_cast<const uint4*>(from);
    }
  }
}

// Multiply the steps from STEP on of one row tile.
template <int STEP = 0>
__device__ __forceinline__ void multiply_tile(const u32 (&low)[1], const u32 (&high)[1], u32 column,
                                              const uint4 (&x)[GROUPS_PER_LANE][TOKEN_TILES],
                                              float (&acc)[TOKEN_TILES][4]) {
  const uint4 a = decode<STEP>(shared, low, column), b = decode<STEP>(shared, high, column);
#pragma unroll
  for (int t = 0; t < TOKEN_TILES; ++t) {
    mma_16x8x16(acc[t], a.x, b.x, a.y, b.y, x[STEP][t].x, x[STEP][t].y);
    mma_16x8x16(acc[t], a.z, b.z, a.w, b.w, x[STEP][t].z, x[STEP][t].w);
  }
  if constexpr (STEP + 1 < GROUPS_PER_LANE) multiply_tile<STEP + 1>(low, high, column, x, acc);
}

// Add the warps' sums in order and write the block's outputs, or sums of a part of K, two rows at once.
__device__ __forceinline__ void store(const LinearParams& p, const Work& work, float unit, const Lane& at,
                                      const float (&acc)[ROW_TILES][TOKEN_TILES][4]) {
  float* sums = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
    for (int t = 0; t < TOKEN_TILES; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = t * 8 + at.quad * 2 + i % 2;
        const int row = (r * ROW_WARPS + at.row_warp) * 16 + at.row + i / 2 * 8;
        if (token < p.tokens) sums[(at.k_warp * p.tokens + token) * kPitch + row] = acc[r][t][i];
      }
    }
  }
  __syncthreads();
  const float* scales = reinterpret_cast<const float*>(shared + kScales);
  const long long all_rows = static_cast<long long>(gridDim.z) * p.rows;
  const long long first = static_cast<long long>(blockIdx.z) * p.rows + work.first_row;
  const bool paired = (all_rows | p.rows) % 2 == 0;
#pragma unroll 2
  for (int i = threadIdx.x; i < p.tokens * (kRows / 2); i += kThreads) {
    const int token = i / (kRows / 2), row = i % (kRows / 2) * 2;
    if (row >= work.rows) continue;
    float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int k = 0; k < kKWarps; ++k) {
      const float2 v = *reinterpret_cast<const float2*>(sums + (k * p.tokens + token) * kPitch + row);
      sum.x += v.x, sum.y += v.y;
    }
    sum.x *= unit, sum.y *= unit;
    const bool both = row + 1 < work.rows;
    if (gridDim.y > 1) {
      float* to = p.partial + (static_cast<long long>(blockIdx.y) * p.tokens + token) * all_rows + first + row;
      to[0] = sum.x;
      if (both) to[1] = sum.y;
      continue;
    }
    sum.x = fmaf(sum.x, scales[row], scales[kRows + row]), sum.y = fmaf(sum.y, scales[row + 1], scales[kRows + row + 1]);
    u16* to = p.out + token * all_rows + first + row;
    if (paired) {
      *reinterpret_cast<u32*>(to) = pack(sum.x, sum.y);
    } else {
      to[0] = from_float(sum.x);
      if (both) to[1] = from_float(sum.y);
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) lookup_stream(const __grid_constant__ StreamParams params) {
  const LinearParams& p = params.linear;
  const u32 base = shared_address(shared);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init(base + kFull + stage * 8, 1);
      barrier_init(base + kEmpty + stage * 8, kWarps);
    }
    publish_barriers();
  }
  __syncthreads();
  begin_after_previous_kernel();
  const int bx = blockIdx.x, by = blockIdx.y;
  const int tiles = p.tiles_each + (bx < p.tiles_over), first_row = (bx * p.tiles_each + min(bx, p.tiles_over)) * 16;
  const Work work = {first_row, min(tiles * 16, p.rows - first_row), by * p.blocks_each + min(by, p.blocks_over),
                     p.blocks_each + (by < p.blocks_over)};
  const int chunks = (work.pieces + kPieces - 1) / kPieces;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Lane at = {lane / 4, lane % 4, warp / ROW_WARPS, warp % ROW_WARPS, lane % COPIES * 16u};

  // The codebooks first: everything waits for them, and they must not queue behind the codes.
  constexpr int entries = NUM_BOOKS << NBITS, mine = (entries + kThreads - 1) / kThreads;
  const uint4* books = reinterpret_cast<const uint4*>(p.books) + static_cast<long long>(blockIdx.z) * entries;
  uint4 entry[mine];
#pragma unroll
  for (int i = 0; i < mine; ++i) entry[i] = __ldg(books + min(static_cast<int>(threadIdx.x) + i * kThreads, entries - 1));
  if (threadIdx.x == 0) fill_stage(params, work, 0);
  load_scales(p, work, reinterpret_cast<float*>(shared + kScales));
  const float unit = headroom<kThreads>(books, reinterpret_cast<u32*>(shared + kScratch));
#pragma unroll
  for (int i = 0; i < mine; ++i) {
    const int n = threadIdx.x + i * kThreads;
    if (n < entries) store_entry(shared, n, entry[i], unit);
  }
  if (threadIdx.x == 0) {
    for (int chunk = 1; chunk < min(STAGES, chunks); ++chunk) fill_stage(params, work, chunk);
  }
  __syncthreads();

  float acc[ROW_TILES][TOKEN_TILES][4] = {};
  const bool last = (ROW_TILES - 1) * ROW_WARPS + at.row_warp < tiles;  // the warp's last tile exists
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int stage = chunk % STAGES;
    const u8* staged = shared + kStages + stage * kStageBytes;
    barrier_wait(base + kFull + stage * 8, chunk / STAGES & 1);
#pragma unroll 1
    for (int piece = at.k_warp; piece < min(kPieces, work.pieces - chunk * kPieces); piece += kKWarps) {
      uint4 x[GROUPS_PER_LANE][TOKEN_TILES];
      load_x(at, staged + kCodeBytesOfStage, piece, x);
      const u8* codes = staged + (at.row_warp * 16 + at.row) * 128 + (piece ^ at.row) * 16 + at.quad * 4;
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) {
        // Fill the stage of the chunk before, which all warps leave about now; one warp after another.
        if (r == ROW_TILES / 2 && piece < kKWarps && lane == 0 && warp == chunk % kWarps && chunk > 0 &&
            chunk + STAGES - 1 < chunks) {
          fill_stage(params, work, chunk + STAGES - 1);
        }
        if (r + 1 < ROW_TILES || last) {
          const u8* from = codes + r * ROW_WARPS * 16 * 128;
          const u32 low[1] = {*reinterpret_cast<const u32*>(from)};
          const u32 high[1] = {*reinterpret_cast<const u32*>(from + 8 * 128)};
          multiply_tile(low, high, at.column, x, acc[r]);
        }
      }
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(base + kEmpty + stage * 8);
  }
  __syncthreads();  // codebooks and stages have been read
  store(p, work, unit, at, acc);
}
