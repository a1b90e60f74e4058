// Boxes of a matrix that the copy engine brings into shared memory (tensor maps, sm_90); `cuda_tensor_map.py` encodes them.
#pragma once
#include "barriers.cuh"

// CUtensorMap; a kernel takes it by value, as a __grid_constant__.
struct __align__(64) TensorMap {
  u64 words[16];
};

// Make the barriers that this thread has initialised known to the copy engine.
__device__ __forceinline__ void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Start to copy the box whose first element is (row, column) to `to`; its bytes count for the barrier's phase.
__device__ __forceinline__ void copy_box(u32 to, const TensorMap& map, int column, int row, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}
