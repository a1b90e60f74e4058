// Hopper's warpgroup products with one operand in registers, and the barriers of rings of shared memory that feed them.
//
// Compile-time constants: DTYPE_BF16, TOKEN_TILES (1, 2, 4, 8, 16 or 32).
#pragma once
#include "common.cuh"

constexpr int kCore = TOKEN_TILES * 128;  // bytes of x of one core-matrix column

__device__ __forceinline__ void barrier_init(u32 barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;}" ::"r"(barrier), "r"(parity) : "memory");
}

#if DTYPE_BF16
#define WGMMA_TYPE "bf16.bf16"
#else
#define WGMMA_TYPE "f16.f16"
#endif
#define SUMS4(i) "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3])
#define SUMS16(i) SUMS4(i), SUMS4(i + 4), SUMS4(i + 8), SUMS4(i + 12)

// acc[64 x 8 * TOKEN_TILES] += A[64 x 16] * B, asynchronously; a warp holds 16 rows of A and of the sums.
__device__ __forceinline__ void wgmma(float (&acc)[4 * TOKEN_TILES], u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {
#if TOKEN_TILES == 1
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n8k16.f32." WGMMA_TYPE " {"
      "%0,%1,%2,%3}, "
      "{%4,%5,%6,%7}, %8, 1, 1, 1, 0;"
      : SUMS4(0)
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
#elif TOKEN_TILES == 2
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n16k16.f32." WGMMA_TYPE " {"
      "%0,%1,%2,%3,%4,%5,%6,%7}, "
      "{%8,%9,%10,%11}, %12, 1, 1, 1, 0;"
      : SUMS4(0), SUMS4(4)
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
#elif TOKEN_TILES == 4
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n32k16.f32." WGMMA_TYPE " {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, "
      "{%16,%17,%18,%19}, %20, 1, 1, 1, 0;"
      : SUMS16(0)
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
#elif TOKEN_TILES == 8
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." WGMMA_TYPE " {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
      "{%32,%33,%34,%35}, %36, 1, 1, 1, 0;"
      : SUMS16(0), SUMS16(16)
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
#elif TOKEN_TILES == 16
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." WGMMA_TYPE " {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
      "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "
      "{%64,%65,%66,%67}, %68, 1, 1, 1, 0;"
      : SUMS16(0), SUMS16(16), SUMS16(32), SUMS16(48)
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
#elif TOKEN_TILES == 32
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." WGMMA_TYPE " {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
      "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"
      "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"
      "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"
      "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,"
      "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}, "
      "{%128,%129,%130,%131}, %132, 1, 1, 1, 0;"
      : SUMS16(0), SUMS16(16), SUMS16(32), SUMS16(48), SUMS16(64), SUMS16(80), SUMS16(96), SUMS16(112)
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
#endif
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
