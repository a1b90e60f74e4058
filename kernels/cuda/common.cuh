// Small device functions shared by the AQLM kernels: 16-bit float conversion, packed adds, tensor-core and copy
// instructions. Written as PTX where a header would be needed otherwise, so that NVRTC compiles without a toolkit.
//
// Compile-time constants: DTYPE_BF16 (1: bfloat16, 0: float16).
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __forceinline__ float to_float(u16 bits) {
#if DTYPE_BF16
  return __uint_as_float(static_cast<u32>(bits) << 16);
#else
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
#endif
}

// Round to nearest even, as torch does.
__device__ __forceinline__ u16 from_float(float value) {
  u16 bits;
#if DTYPE_BF16
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#endif
  return bits;
}

// Two 16-bit floats in one register, low half first.
__device__ __forceinline__ u32 pack(float low, float high) {
  return static_cast<u32>(from_float(low)) | (static_cast<u32>(from_float(high)) << 16);
}

__device__ __forceinline__ u32 add_pair(u32 a, u32 b) {
  u32 sum;
#if !DTYPE_BF16
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
#elif __CUDA_ARCH__ >= 900
  asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
#else  // sm_80 to sm_89 have only the packed multiply-add: a * 1 + b
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3f803f80u), "r"(b));
#endif
  return sum;
}

__device__ __forceinline__ uint4 add_entries(uint4 a, uint4 b) {
  return make_uint4(add_pair(a.x, b.x), add_pair(a.y, b.y), add_pair(a.z, b.z), add_pair(a.w, b.w));
}

// acc[16x8] += A[16x8] * B[8x8], fp32 accumulation.
__device__ __forceinline__ void mma_16x8x8(float (&acc)[4], u32 a0, u32 a1, u32 b) {
#if DTYPE_BF16
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
#endif
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a0), "r"(a1), "r"(b));
}

// acc[16x8] += A[16x16] * B[16x8], fp32 accumulation. Turing has the k = 8 instruction only.
__device__ __forceinline__ void mma_16x8x16(float (&acc)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
#if DTYPE_BF16
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  mma_16x8x8(acc, a0, a1, b0);
  mma_16x8x8(acc, a2, a3, b1);
#endif
}

__device__ __forceinline__ u32 shared_address(const void* shared) {
  return static_cast<u32>(__cvta_generic_to_shared(shared));
}

// 16 bytes from global to shared memory, zeros where `valid` is false; asynchronous from sm_80 on.
__device__ __forceinline__ void copy_async_16(u32 shared, const void* global, bool valid) {
#if __CUDA_ARCH__ >= 800
  int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
#else
  uint4 v = valid ? *static_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(shared), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
#endif
}

__device__ __forceinline__ void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// A barrier among the THREADS threads (whole warps) that call it with the same `number`, below COUNT. Barrier 0 is
// __syncthreads.
template <int THREADS, int COUNT>
__device__ __forceinline__ void group_barrier(int number) {
  if constexpr (COUNT > 0) {
    if (number == COUNT - 1) {
      asm volatile("bar.sync %0, %1;" ::"n"(COUNT), "n"(THREADS) : "memory");
    } else {
      group_barrier<THREADS, COUNT - 1>(number);
    }
  }
}

// Codes are read once: keep them out of L1, which serves the shared memory as well. Zeros where `wanted` is false.
__device__ __forceinline__ void load_once(const u8* from, bool wanted, u32 (&words)[4]) {
  asm volatile(
      "{.reg .pred wanted; setp.ne.u32 wanted, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;\n"
      "@wanted ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];}"
      : "=&r"(words[0]), "=&r"(words[1]), "=&r"(words[2]), "=&r"(words[3])
      : "l"(from), "r"(static_cast<u32>(wanted)));
}

__device__ __forceinline__ void load_once(const u8* from, bool wanted, u32 (&words)[2]) {
  asm volatile(
      "{.reg .pred wanted; setp.ne.u32 wanted, %3, 0; mov.b32 %0, 0; mov.b32 %1, 0;\n"
      "@wanted ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0,%1}, [%2];}"
      : "=&r"(words[0]), "=&r"(words[1])
      : "l"(from), "r"(static_cast<u32>(wanted)));
}

__device__ __forceinline__ void load_once(const u8* from, bool wanted, u32 (&words)[1]) {
  asm volatile(
      "{.reg .pred wanted; setp.ne.u32 wanted, %2, 0; mov.b32 %0, 0;\n"
      "@wanted ld.global.nc.L1::no_allocate.L2::128B.u32 %0, [%1];}"
      : "=&r"(words[0])
      : "l"(from), "r"(static_cast<u32>(wanted)));
}

// Wait for the kernel before this one in the stream, whose end this one need not have waited for to start (programmatic
// dependent launch), and let the next start in turn. Nothing may be read from global memory before, not even weights,
// which an optimizer may just have written; and because every block lets go only then, the next kernel may count on all
// that came before this one.
__device__ __forceinline__ void begin_after_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Bring what will be read near: the second level of the cache sees later writes.
__device__ __forceinline__ void prefetch_to_l2(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

// Rotate 16 bytes so that byte `first` comes first.
__device__ __forceinline__ void rotate(u32 (&w)[4], int first) {
  u32 by8[4], by4[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) by8[i] = first & 8 ? w[(i + 2) % 4] : w[i];
#pragma unroll
  for (int i = 0; i < 4; ++i) by4[i] = first & 4 ? by8[(i + 1) % 4] : by8[i];
#pragma unroll
  for (int i = 0; i < 4; ++i) w[i] = __funnelshift_r(by4[i], by4[(i + 1) % 4], first % 4 * 8);
}

// The thread's number as a value that the compiler cannot compute ahead: what is derived from it in a rarely run part
// of a kernel then takes no registers in the hot loop.
__device__ __forceinline__ int opaque_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}
