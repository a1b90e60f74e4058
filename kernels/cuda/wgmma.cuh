// Hopper's warpgroup products with x in shared memory.
//
// Compile-time constants: DTYPE_BF16, TOKEN_TILES (1, 2, 4, 8, 16 or 32).
#pragma once
#include "barriers.cuh"

constexpr int kCore = TOKEN_TILES * 128;  // bytes of x of one core-matrix column

#if DTYPE_BF16
#define WGMMA_TYPE "bf16.bf16"
#else
#define WGMMA_TYPE "f16.f16"
#endif

// The sums of a lane as operands, and the numbers that these have in an instruction.
#define SUMS4(i) "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3])
#define SUMS16(i) SUMS4(i), SUMS4(i + 4), SUMS4(i + 8), SUMS4(i + 12)
#define SUMS64(i) SUMS16(i), SUMS16(i + 16), SUMS16(i + 32), SUMS16(i + 48)
#define NUMBERS8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define NUMBERS16 NUMBERS8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define NUMBERS32 NUMBERS16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define NUMBERS64 NUMBERS32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define NUMBERS128 NUMBERS64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79," \
  "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95," \
  "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111," \
  "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
// The shape of the instruction, its sums, their numbers, and those of A in registers (with B's) or in shared memory.
#if TOKEN_TILES == 1
#define WGMMA_SHAPE "m64n8k16"
#define WGMMA_SUMS SUMS4(0)
#define WGMMA_NUMBERS "%0,%1,%2,%3"
#define WGMMA_A_REGISTERS "{%4,%5,%6,%7}, %8"
#define WGMMA_A_SHARED "%4, %5"
#elif TOKEN_TILES == 2
#define WGMMA_SHAPE "m64n16k16"
#define WGMMA_SUMS SUMS4(0), SUMS4(4)
#define WGMMA_NUMBERS NUMBERS8
#define WGMMA_A_REGISTERS "{%8,%9,%10,%11}, %12"
#define WGMMA_A_SHARED "%8, %9"
#elif TOKEN_TILES == 4
#define WGMMA_SHAPE "m64n32k16"
#define WGMMA_SUMS SUMS16(0)
#define WGMMA_NUMBERS NUMBERS16
#define WGMMA_A_REGISTERS "{%16,%17,%18,%19}, %20"
#define WGMMA_A_SHARED "%16, %17"
#elif TOKEN_TILES == 8
#define WGMMA_SHAPE "m64n64k16"
#define WGMMA_SUMS SUMS16(0), SUMS16(16)
#define WGMMA_NUMBERS NUMBERS32
#define WGMMA_A_REGISTERS "{%32,%33,%34,%35}, %36"
#define WGMMA_A_SHARED "%32, %33"
#elif TOKEN_TILES == 16
#define WGMMA_SHAPE "m64n128k16"
#define WGMMA_SUMS SUMS64(0)
#define WGMMA_NUMBERS NUMBERS64
#define WGMMA_A_REGISTERS "{%64,%65,%66,%67}, %68"
#define WGMMA_A_SHARED "%64, %65"
#elif TOKEN_TILES == 32
#define WGMMA_SHAPE "m64n256k16"
#define WGMMA_SUMS SUMS64(0), SUMS64(64)
#define WGMMA_NUMBERS NUMBERS128
#define WGMMA_A_REGISTERS "{%128,%129,%130,%131}, %132"
#define WGMMA_A_SHARED "%128, %129"
#endif

// acc[64 x 8 * TOKEN_TILES] += A[64 x 16] * B, asynchronously; a warp holds 16 rows of A and of the sums.
__device__ __forceinline__ void wgmma(float (&acc)[4 * TOKEN_TILES], u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {
  asm volatile("wgmma.mma_async.sync.aligned." WGMMA_SHAPE ".f32." WGMMA_TYPE " {" WGMMA_NUMBERS "}, " WGMMA_A_REGISTERS
               ", 1, 1, 1, 0;"
               : WGMMA_SUMS
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
}

// The same with A in shared memory, rows of inputs as in B.
__device__ __forceinline__ void wgmma(float (&acc)[4 * TOKEN_TILES], u64 a, u64 b) {
  asm volatile("wgmma.mma_async.sync.aligned." WGMMA_SHAPE ".f32." WGMMA_TYPE " {" WGMMA_NUMBERS "}, " WGMMA_A_SHARED
               ", 1, 1, 1, 0, 0;"
               : WGMMA_SUMS
               : "l"(a), "l"(b));
}

// Until at most PENDING of the warpgroup's committed steps are unfinished.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// The descriptor of 16 x (8 * TOKEN_TILES) values of x that stand `offset` bytes after `address`, without swizzle: core
// matrices of 8 tokens x 16 bytes, neighbours in K kCore bytes apart, neighbours in tokens 128.
__device__ __forceinline__ u64 descriptor(u32 address, int offset) {
  u64 bits;
  const u32 low = (address >> 4 | kCore / 16 << 16) + offset / 16;
  asm("mov.b64 %0, {%1, %2};" : "=l"(bits) : "r"(low), "r"(128 / 16));
  return bits;
}

// The descriptor of rows of 64 inputs, 128 bytes apart from `address` (a multiple of 1024) on, in which 16 bytes stand at
// their place xor the row's number modulo 8 (the 128-byte swizzle). Advances by 2 for 16 inputs.
__device__ __forceinline__ u64 swizzled_descriptor(u32 address) {
  u64 bits;
  const u32 low = (address & 0x3ffff) >> 4 | 1 << 16;  // in a cluster the highest byte is the rank
  asm("mov.b64 %0, {%1, %2};" : "=l"(bits) : "r"(low), "r"(1024 / 16 | 1 << 30));  // 8 rows; the kind of swizzle
  return bits;
}
