// out[n, o] = scale[o] * sum over k of x[n, k] * W[o, k] + bias[o] for 1 to 8 * TOKEN_TILES tokens n on Hopper (sm_90a).
//
// An entry is 8 neighbouring weights of a row, which is one row of a matrix that `ldmatrix` spreads over four lanes: lane
// (row = lane % 16, half = lane / 16) looks up group 2 * i + half of its row, and what a warp receives are the A fragments of
// 16 rows and the 16 inputs i, in their natural order. The sum of the codebooks' fragments goes from registers into the
// warpgroup instruction, which reads x itself from shared memory, once for 64 rows. With 8 copies of the codebooks no lookups
// meet in a bank, and 16 warps of one row tile each keep them going; that bounds this kernel.
//
// One thread brings codes and x by tensor copies into two rings, so that they cost the load/store unit next to nothing:
// 64 bytes of codes of all rows are a superblock; x comes in slots of kSlotSteps steps of 32 inputs. What lies outside x is
// zero there; past the last codes of a row these are read again, so that no entry is used that the row does not use.
//
// A warp owns its 16 rows for all of its K; sums of several parts of K in a block are added once, at the end, in fixed order.
// Grid: (row ranges, splits of K, row partitions with codebooks of their own); with more than one split the sums go to
// `partial` and `finish_linear.cu` adds them in fixed order.
//
// Compile-time constants: those of codebooks.cuh (NBITS up to 8, COPIES 8), TOKEN_TILES (1, 2, 4 or 8), K_GROUPS (parts of K
// in a block: 1, 2 or 4; above 1 a block has at most 16 / K_GROUPS row tiles), X_SLOTS, CODE_SLOTS,
// AHEAD (1: look up a step ahead, which takes registers).
#include "codebooks.cuh"
#include "gemm.cuh"
#include "tensor_map.cuh"

constexpr int kConsumers = 512, kThreads = kConsumers + 32;  // the last warp has one thread that loads
constexpr int kTiles = 16 / K_GROUPS;                        // row tiles a block accumulates at once
constexpr int kSteps = 16 / NUM_BOOKS;                       // of a superblock
constexpr int kSlotSteps = (TOKEN_TILES == 8 ? 4 : 8) < kSteps ? (TOKEN_TILES == 8 ? 4 : 8) : kSteps;
constexpr int kStages = kSteps / kSlotSteps;                 // slots of a superblock
constexpr int kBoxBytes = TOKEN_TILES * 1024;                // 64 inputs of all tokens, two steps
constexpr int kSlotBytes = kSlotSteps / 2 * kBoxBytes;
constexpr int kCodeSlotBytes = kTiles * 16 * 64;
constexpr int kX = (kBooksBytes + 1023) / 1024 * 1024;       // swizzled boxes start at multiples of 1024
constexpr int kCodes = kX + X_SLOTS * kSlotBytes;
constexpr int kFull = kCodes + CODE_SLOTS * kCodeSlotBytes;  // barriers: a slot of x has been filled
constexpr int kEmpty = kFull + X_SLOTS * 8;                    // and read
constexpr int kCodesFull = kEmpty + X_SLOTS * 8;               // the same of codes
constexpr int kCodesEmpty = kCodesFull + CODE_SLOTS * 8;
constexpr int kScratch = kCodesEmpty + CODE_SLOTS * 8;
static_assert(X_SLOTS % K_GROUPS == 0, "each part meets every phase of its slots' barriers");
static_assert(CODE_SLOTS >= K_GROUPS, "the codes of all parts are asked for before x");
static_assert((K_GROUPS - 1) * (kConsumers / K_GROUPS) * TOKEN_TILES * 16 <= kFull,
              "the parts' sums take the place of codebooks and rings");

struct WgmmaParams {
  TensorMap codes, x;
  LinearParams linear;  // `slots`: row tiles in a box of codes
};

extern __shared__ __align__(1024) u8 shared[];  // codebooks, rings of x and of codes, barriers, scratch of fill_books

struct Work {  // of this block
  int first_tile, last_tile, first_block, blocks;
};

// A slot's place in the ring of x, and the parity of its barriers' phase.
struct XRing {
  int slot = 0;
  u32 parity = 0;

  __device__ __forceinline__ void advance(int count) {
    slot += count;
    if (slot >= X_SLOTS) {  // `count` is at most X_SLOTS
      slot -= X_SLOTS;
      parity ^= 1;
    }
  }
};

// The slot of the n-th superblock of codes, and the parity of its barriers' phase.
struct CodeSlot {
  int slot;
  u32 parity;

  __device__ __forceinline__ explicit CodeSlot(int n) : slot(n % CODE_SLOTS), parity(n / CODE_SLOTS & 1) {}
};

struct Producer {
  XRing at;
  int n = 0;  // superblocks of codes so far
};

// One thread fills both rings in the order in which the consumers multiply: codes of a superblock of all parts, then x.
__device__ __forceinline__ void produce(const WgmmaParams& params, const Work& work, Producer& producer, int tile, int block) {
  const u32 base = shared_address(shared);
  const int row = blockIdx.z * params.linear.rows + tile * 16, box_tiles = params.linear.slots;
  const int parts = min(K_GROUPS, work.blocks - block), first = work.first_block + block;
  for (int part = 0; part < parts; ++part, ++producer.n) {
    const CodeSlot code(producer.n);
    const u32 full = base + kCodesFull + code.slot * 8;
    barrier_wait(base + kCodesEmpty + code.slot * 8, code.parity ^ 1);
    barrier_expect(full, box_tiles * 16 * 64);
    copy_box(base + kCodes + code.slot * kCodeSlotBytes, params.codes, (first + part) * 64, row, full);
  }
  for (int i = 0; i < kStages * K_GROUPS; ++i, producer.at.advance(1)) {
    const int part = i % K_GROUPS, step = ((first + part) * kStages + i / K_GROUPS) * kSlotSteps;
    if (part >= parts) continue;  // in the last round, whose slots are not used again
    const u32 full = base + kFull + producer.at.slot * 8, to = base + kX + producer.at.slot * kSlotBytes;
    barrier_wait(base + kEmpty + producer.at.slot * 8, producer.at.parity ^ 1);
    barrier_expect(full, kSlotBytes);
#pragma unroll
    for (int box = 0; box < kSlotSteps / 2; ++box) {
      copy_box(to + box * kBoxBytes, params.x, step * 32 + box * 64, 0, full);
    }
  }
}

// All of the block's work. The first superblock's copies start at once, the others when the codebooks have been read, for
// which everything waits, and which must not queue behind codes.
__device__ __forceinline__ void produce_all(const WgmmaParams& params, const Work& work) {
  const bool leader = threadIdx.x == kConsumers;
  constexpr bool early = X_SLOTS >= kStages * K_GROUPS;  // or it would wait for the consumers, who wait for this warp
  Producer producer;
  if (leader && early) produce(params, work, producer, work.first_tile, 0);
  __syncwarp();
  group_barrier<kThreads, 1>(0);
  if (!leader) return;
  for (int tile = work.first_tile; tile < work.last_tile; tile += kTiles) {
    for (int block = early && tile == work.first_tile ? K_GROUPS : 0; block < work.blocks; block += K_GROUPS) {
      produce(params, work, producer, tile, block);
    }
  }
}

struct Consumer {
  const u8* codes;       // of the lane's row in the superblock
  int last_piece;        // of them, that the row has
  u32 swizzle;           // of the pieces of 16 bytes
  u32 column;            // of the lane's copy of the codebooks, in bytes
  u32 select;            // of __byte_perm, for the lane's half
  bool upper, active, leader;  // the lane's half; the warp has rows; one lane of the warp
  XRing at;
  u32 release;           // the barrier of the slot before, which may still be read; 0 if none
};

// The codebooks' fragments of the two products of a step, still to be added.
struct Entries {
  uint4 of[2][NUM_BOOKS];
};

__device__ __forceinline__ uint4 load_matrices(u32 address) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address));
  return v;
}

// Load the 16 bytes of codes that step STEP begins, if it does.
template <int STEP>
__device__ __forceinline__ void load_codes(const Consumer& c, u32 (&words)[4]) {
  constexpr int kStepsOfPiece = 4 / NUM_BOOKS;
  if constexpr (STEP % kStepsOfPiece == 0) {
    const int piece = min(STEP / kStepsOfPiece, c.last_piece);
    const uint4 v = *reinterpret_cast<const uint4*>(c.codes + (piece ^ c.swizzle) * 16);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  }
}

// Look up product PRODUCT of the superblock and the next.
template <int PRODUCT, int INDEX = 0, int BOOK = 0>
__device__ __forceinline__ void look_up_products(const Consumer& c, const u32 (&words)[4], Entries& entries) {
  constexpr int kProduct = (PRODUCT + INDEX) % (8 / NUM_BOOKS);  // of the 16 bytes of codes
  constexpr int kByte = NUM_BOOKS == 1 ? kProduct % 2 * 2 : BOOK;
  u32 word = words[kProduct * NUM_BOOKS / 2];
  if (NUM_BOOKS == 4 && c.upper) word = words[kProduct * NUM_BOOKS / 2 + 1];
  u32 offset = __byte_perm(word, c.column, c.select + kByte * 16);
  if constexpr (NBITS < 8) offset &= ((1 << NBITS) - 1) << 8 | 255;
  entries.of[INDEX][BOOK] = load_matrices(shared_address(shared) + offset + kBookOffset<BOOK>);
  if constexpr (BOOK + 1 < NUM_BOOKS) {
    look_up_products<PRODUCT, INDEX, BOOK + 1>(c, words, entries);
  } else if constexpr (INDEX == 0) {
    look_up_products<PRODUCT, 1>(c, words, entries);
  }
}

__device__ __forceinline__ uint4 add_books(const uint4 (&entries)[NUM_BOOKS]) {
  uint4 sum = entries[0];
#pragma unroll
  for (int book = 1; book < NUM_BOOKS; ++book) sum = add_entries(sum, entries[book]);
  return sum;
}

// The descriptor of the 16 inputs of all tokens that start `offset` bytes after a slot: rows of 128 bytes, swizzled, 8 of
// them 1024 bytes from the next 8.
__device__ __forceinline__ u64 x_descriptor(u32 slot, int offset) {
  u64 bits;
  asm("mov.b64 %0, {%1, %2};" : "=l"(bits) : "r"((slot >> 4 | 1 << 16) + offset / 16), "r"(1024 / 16 | 1 << 30));
  return bits;
}

// The steps from STEP on of a superblock. With AHEAD the next step's lookups are on
// their way while this one's products begin.
template <int STEP = 0>
__device__ __forceinline__ void multiply_block(Consumer& c, u32 codes_read, u32 (&words)[4], Entries& entries,
                                               float (&acc)[4 * TOKEN_TILES]) {
  const u32 base = shared_address(shared);
  uint4 first = make_uint4(0, 0, 0, 0), second = first;  // all warps of a warpgroup must take part in the product
  if (c.active) {
    if constexpr (STEP == 0 || !AHEAD) {
      load_codes<STEP>(c, words);
      look_up_products<2 * STEP>(c, words, entries);
    }
    first = add_books(entries.of[0]), second = add_books(entries.of[1]);
    if constexpr (AHEAD && STEP + 1 < kSteps) {
      load_codes<STEP + 1>(c, words);
      look_up_products<2 * STEP + 2>(c, words, entries);
    }
  }
  if constexpr (STEP == kSteps - 1) {
    __syncwarp();
    if (c.leader) barrier_arrive(codes_read);
  }
  if constexpr (STEP % kSlotSteps == 0) barrier_wait(base + kFull + c.at.slot * 8, c.at.parity);
  const u32 slot = base + kX + c.at.slot * kSlotBytes;
  constexpr int kOffset = STEP % kSlotSteps / 2 * kBoxBytes + STEP % 2 * 64;
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  wgmma(acc, first.x, first.y, first.z, first.w, x_descriptor(slot, kOffset));
  wgmma(acc, second.x, second.y, second.z, second.w, x_descriptor(slot, kOffset + 32));
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  wgmma_wait<1>();
  if constexpr (STEP % kSlotSteps == 0) {  // all steps of the slot before are finished
    if (c.leader && c.release) barrier_arrive(c.release);
  }
  if constexpr ((STEP + 1) % kSlotSteps == 0) {
    c.release = base + kEmpty + c.at.slot * 8;
    if constexpr (K_GROUPS > 1) {  // a part has few slots: release them at once
      wgmma_wait<0>();
      if (c.leader) barrier_arrive(c.release);
      c.release = 0;
    }
    c.at.advance(K_GROUPS);
  }
  if constexpr (STEP + 1 < kSteps) multiply_block<STEP + 1>(c, codes_read, words, entries, acc);
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

// Write one row tile's sums of a part of K.
__device__ __forceinline__ void store_sums(const LinearParams& p, int tile, float unit, const float (&acc)[4 * TOKEN_TILES]) {
  const int lane = opaque_thread() % 32;
  const long long all_rows = static_cast<long long>(gridDim.z) * p.rows;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = tile * 16 + half * 8 + lane / 4;
    if (row >= p.rows) continue;
    int token = lane % 4 * 2;  // and the next
    float* to = p.partial + (static_cast<long long>(blockIdx.y) * p.tokens + token) * all_rows +
                static_cast<long long>(blockIdx.z) * p.rows + row;
#pragma unroll
    for (int t = 0; t < TOKEN_TILES; ++t, token += 8, to += 8 * all_rows) {
      if (token < p.tokens) to[0] = acc[4 * t + half * 2] * unit;
      if (token + 1 < p.tokens) to[all_rows] = acc[4 * t + half * 2 + 1] * unit;
    }
  }
}

__device__ __forceinline__ void consume(const LinearParams& p, const Work& work) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane % 16, half = lane / 16;
  const int part = K_GROUPS == 1 ? 0 : warp / kTiles, my_tile = warp % kTiles;
  const float unit = fill_books<kConsumers>(
      reinterpret_cast<const uint4*>(p.books) + (static_cast<long long>(blockIdx.z) * NUM_BOOKS << NBITS), shared,
      reinterpret_cast<u32*>(shared + kScratch));
  group_barrier<kThreads, 1>(0);

  Consumer c = {};
  c.swizzle = row >> 1 & 3;
  c.column = lane % COPIES * 16;
  c.select = 0x5504 + half * (NUM_BOOKS == 1 ? 16 : NUM_BOOKS == 2 ? 32 : 0);  // bytes: column, code, 0, 0
  c.upper = half;
  c.leader = lane == 0;
  c.at.advance(part);
  const u32 base = shared_address(shared);
  int first = 0;  // superblock of the batch
  for (int tile = work.first_tile + my_tile; tile - my_tile < work.last_tile; tile += kTiles, first += work.blocks) {
    c.active = tile < work.last_tile;
    float acc[4 * TOKEN_TILES] = {};
    Entries entries;
    u32 words[4];
    for (int block = part; block < work.blocks; block += K_GROUPS) {
      const CodeSlot code(first + block);
      c.codes = shared + kCodes + code.slot * kCodeSlotBytes + (my_tile * 16 + row) * 64;
      c.last_piece = p.groups * NUM_BOOKS / 16 - (work.first_block + block) * 4 - 1;
      barrier_wait(base + kCodesFull + code.slot * 8, code.parity);
      multiply_block(c, base + kCodesEmpty + code.slot * 8, words, entries, acc);
    }
    wgmma_wait<0>();
    if (K_GROUPS == 1 || add_parts(reinterpret_cast<float4*>(shared), part, acc)) {
      if (c.active && gridDim.y > 1) {
        store_sums(p, tile, unit, acc);
      } else if (c.active) {
        store(p, tile * 16, 0, unit, acc);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) lookup_wgmma(const __grid_constant__ WgmmaParams params) {
  const LinearParams& p = params.linear;
  if (threadIdx.x == 0) {
    const u32 base = shared_address(shared);
    for (int s = 0; s < X_SLOTS; ++s) {
      barrier_init(base + kFull + s * 8, 1);
      barrier_init(base + kEmpty + s * 8, kTiles);
    }
    for (int s = 0; s < CODE_SLOTS; ++s) {
      barrier_init(base + kCodesFull + s * 8, 1);
      barrier_init(base + kCodesEmpty + s * 8, kTiles);
    }
    publish_barriers();
  }
  __syncthreads();
  begin_after_previous_kernel();
  const int bx = blockIdx.x, by = blockIdx.y;
  Work work;
  work.first_tile = bx * p.tiles_each + min(bx, p.tiles_over);
  work.last_tile = work.first_tile + p.tiles_each + (bx < p.tiles_over);
  work.first_block = by * p.blocks_each + min(by, p.blocks_over);
  work.blocks = p.blocks_each + (by < p.blocks_over);
  if (threadIdx.x < kConsumers) {
    consume(p, work);
  } else {
    produce_all(params, work);
  }
}
