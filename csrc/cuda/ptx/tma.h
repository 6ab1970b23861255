// sm_90: boxes of a tensor map between global and shared memory, by one thread; coordinates innermost first.
// A load adds its bytes (those out of bounds too) to the barrier `bar`; a store belongs to the thread's bulk group,
// closed by tma_store_commit. Shared addresses are aligned to 128 bytes, or to the swizzle's atom of 8 rows.
#pragma once
#include <ptx/l2_hint.h>
#include <ptx/tensor_map.h>

namespace ptx {

#define FASTATTN_R2 "r"(c0), "r"(c1)
#define FASTATTN_R3 FASTATTN_R2, "r"(c2)
#define FASTATTN_R4 FASTATTN_R3, "r"(c3)
#define FASTATTN_R5 FASTATTN_R4, "r"(c4)

// LOAD, MULTICAST, STORE: the operands that are the coordinates; then the parameters they come from.
// A multicast box and its bytes go to `dst` and `bar` of every CTA of the cluster whose bit is set in `cta_mask`.
#define FASTATTN_TMA(RANK, LOAD, MULTICAST, STORE, ...)                                                            \
  __device__ __forceinline__ void tma_load(uint32_t dst, const TensorMap* map, uint32_t bar, __VA_ARGS__,          \
                                           L2Hint hint = L2Hint::None) {                                           \
    if (hint == L2Hint::None)                                                                                      \
      asm volatile("cp.async.bulk.tensor." #RANK "d.shared::cluster.global.mbarrier::complete_tx::bytes"           \
                   " [%0], [%1, {" LOAD "}], [%2];"                                                                \
                   ::"r"(dst), "l"(map), "r"(bar), "n"(0), FASTATTN_R##RANK : "memory");                           \
    else                                                                                                           \
      asm volatile("cp.async.bulk.tensor." #RANK "d.shared::cluster.global.mbarrier::complete_tx::bytes"           \
                   ".L2::cache_hint [%0], [%1, {" LOAD "}], [%2], %3;"                                             \
                   ::"r"(dst), "l"(map), "r"(bar), "l"(static_cast<uint64_t>(hint)), FASTATTN_R##RANK : "memory"); \
  }                                                                                                                \
  __device__ __forceinline__ void tma_load_multicast(uint32_t dst, const TensorMap* map, uint32_t bar,             \
                                                     uint16_t cta_mask, __VA_ARGS__, L2Hint hint = L2Hint::None) { \
    if (hint == L2Hint::None)                                                                                      \
      asm volatile("cp.async.bulk.tensor." #RANK "d.shared::cluster.global.mbarrier::complete_tx::bytes"           \
                   ".multicast::cluster [%0], [%1, {" MULTICAST "}], [%2], %4;"                                    \
                   ::"r"(dst), "l"(map), "r"(bar), "n"(0), "h"(cta_mask), FASTATTN_R##RANK : "memory");            \
    else                                                                                                           \
      asm volatile("cp.async.bulk.tensor." #RANK "d.shared::cluster.global.mbarrier::complete_tx::bytes"           \
                   ".multicast::cluster.L2::cache_hint [%0], [%1, {" MULTICAST "}], [%2], %4, %3;"                 \
                   ::"r"(dst), "l"(map), "r"(bar), "l"(static_cast<uint64_t>(hint)), "h"(cta_mask),                \
                   FASTATTN_R##RANK : "memory");                                                                   \
  }                                                                                                                \
  __device__ __forceinline__ void tma_store(const TensorMap* map, uint32_t src, __VA_ARGS__) {                     \
    asm volatile("cp.async.bulk.tensor." #RANK "d.global.shared::cta.bulk_group [%0, {" STORE "}], [%1];"          \
                 ::"l"(map), "r"(src), FASTATTN_R##RANK : "memory");                                               \
  }
FASTATTN_TMA(2, "%4, %5", "%5, %6", "%2, %3", int c0, int c1)
FASTATTN_TMA(3, "%4, %5, %6", "%5, %6, %7", "%2, %3, %4", int c0, int c1, int c2)
FASTATTN_TMA(4, "%4, %5, %6, %7", "%5, %6, %7, %8", "%2, %3, %4, %5", int c0, int c1, int c2, int c3)
FASTATTN_TMA(5, "%4, %5, %6, %7, %8", "%5, %6, %7, %8, %9", "%2, %3, %4, %5, %6",
             int c0, int c1, int c2, int c3, int c4)
#undef FASTATTN_TMA
#undef FASTATTN_R2
#undef FASTATTN_R3
#undef FASTATTN_R4
#undef FASTATTN_R5

// global[0 … bytes/4) += shared[0 … bytes/4); both 16-byte aligned, bytes a multiple of 16. In the thread's bulk group.
__device__ __forceinline__ void bulk_reduce_add(float* global, uint32_t src, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;"
               ::"l"(global), "r"(src), "r"(bytes) : "memory");
}

__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// At most N of this thread's groups still read shared memory (_read) or are still to be seen in global memory.
template <int N> __device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
template <int N> __device__ __forceinline__ void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}

__device__ __forceinline__ void tma_prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

}  // namespace ptx
