// sm_90: boxes of a tensor map between global and shared memory, by one thread; coordinates innermost first.
// A load adds its bytes (those out of bounds too) to the barrier `bar`; a store belongs to the thread's bulk group,
// closed by tma_store_commit. Shared addresses are aligned to 128 bytes, or to the swizzle's atom of 8 rows.
#pragma once
#include <ptx/tensor_map.h>

namespace ptx {

// The L2 eviction policies of cp.async.bulk's cache hint.
enum class L2Hint : uint64_t {
  None = 0,
  EvictNormal = 0x1000000000000000,
  EvictFirst = 0x12F0000000000000,
  EvictLast = 0x14F0000000000000,
};

// COORDS: the brace list of coordinate operands, the first of them %FIRST = 4 (load), 5 (multicast), 2 (store).
#define FASTATTN_TMA_LOAD(RANK, PARAMETERS, COORDS, ...)                                                               \
  __device__ __forceinline__ void tma_load(uint32_t dst, const TensorMap* map, uint32_t bar, PARAMETERS,               \
                                           L2Hint hint = L2Hint::None) {                                               \
    if (hint == L2Hint::None)                                                                                          \
      asm volatile("cp.async.bulk.tensor." RANK "d.shared::cluster.global.mbarrier::complete_tx::bytes"                \
                   " [%0], [%1, " COORDS "], [%2];"                                                                    \
                   ::"r"(dst), "l"(map), "r"(bar), "n"(0), __VA_ARGS__ : "memory");                                    \
    else                                                                                                               \
      asm volatile("cp.async.bulk.tensor." RANK "d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint" \
                   " [%0], [%1, " COORDS "], [%2], %3;"                                                                \
                   ::"r"(dst), "l"(map), "r"(bar), "l"(static_cast<uint64_t>(hint)), __VA_ARGS__ : "memory");          \
  }

// The box and its bytes go to `dst` and `bar` of every CTA of the cluster whose bit is set in `cta_mask`.
#define FASTATTN_TMA_LOAD_MULTICAST(RANK, PARAMETERS, COORDS, ...)                                                     \
  __device__ __forceinline__ void tma_load_multicast(uint32_t dst, const TensorMap* map, uint32_t bar,                 \
                                                     uint16_t cta_mask, PARAMETERS, L2Hint hint = L2Hint::None) {      \
    if (hint == L2Hint::None)                                                                                          \
      asm volatile("cp.async.bulk.tensor." RANK "d.shared::cluster.global.mbarrier::complete_tx::bytes"                \
                   ".multicast::cluster [%0], [%1, " COORDS "], [%2], %4;"                                             \
                   ::"r"(dst), "l"(map), "r"(bar), "n"(0), "h"(cta_mask), __VA_ARGS__ : "memory");                     \
    else                                                                                                               \
      asm volatile("cp.async.bulk.tensor." RANK "d.shared::cluster.global.mbarrier::complete_tx::bytes"                \
                   ".multicast::cluster.L2::cache_hint [%0], [%1, " COORDS "], [%2], %4, %3;"                          \
                   ::"r"(dst), "l"(map), "r"(bar), "l"(static_cast<uint64_t>(hint)), "h"(cta_mask), __VA_ARGS__        \
                   : "memory");                                                                                        \
  }

#define FASTATTN_TMA_STORE(RANK, PARAMETERS, COORDS, ...)                                                              \
  __device__ __forceinline__ void tma_store(const TensorMap* map, uint32_t src, PARAMETERS) {                          \
    asm volatile("cp.async.bulk.tensor." RANK "d.global.shared::cta.bulk_group [%0, " COORDS "], [%1];"                \
                 ::"l"(map), "r"(src), __VA_ARGS__ : "memory");                                                        \
  }

#define FASTATTN_COMMA ,
#define FASTATTN_C2 int c0 FASTATTN_COMMA int c1
#define FASTATTN_C3 FASTATTN_C2 FASTATTN_COMMA int c2
#define FASTATTN_C4 FASTATTN_C3 FASTATTN_COMMA int c3
#define FASTATTN_C5 FASTATTN_C4 FASTATTN_COMMA int c4

FASTATTN_TMA_LOAD("2", FASTATTN_C2, "{%4, %5}", "r"(c0), "r"(c1))
FASTATTN_TMA_LOAD("3", FASTATTN_C3, "{%4, %5, %6}", "r"(c0), "r"(c1), "r"(c2))
FASTATTN_TMA_LOAD("4", FASTATTN_C4, "{%4, %5, %6, %7}", "r"(c0), "r"(c1), "r"(c2), "r"(c3))
FASTATTN_TMA_LOAD("5", FASTATTN_C5, "{%4, %5, %6, %7, %8}", "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4))

FASTATTN_TMA_LOAD_MULTICAST("2", FASTATTN_C2, "{%5, %6}", "r"(c0), "r"(c1))
FASTATTN_TMA_LOAD_MULTICAST("3", FASTATTN_C3, "{%5, %6, %7}", "r"(c0), "r"(c1), "r"(c2))
FASTATTN_TMA_LOAD_MULTICAST("4", FASTATTN_C4, "{%5, %6, %7, %8}", "r"(c0), "r"(c1), "r"(c2), "r"(c3))
FASTATTN_TMA_LOAD_MULTICAST("5", FASTATTN_C5, "{%5, %6, %7, %8, %9}", "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4))

FASTATTN_TMA_STORE("2", FASTATTN_C2, "{%2, %3}", "r"(c0), "r"(c1))
FASTATTN_TMA_STORE("3", FASTATTN_C3, "{%2, %3, %4}", "r"(c0), "r"(c1), "r"(c2))
FASTATTN_TMA_STORE("4", FASTATTN_C4, "{%2, %3, %4, %5}", "r"(c0), "r"(c1), "r"(c2), "r"(c3))
FASTATTN_TMA_STORE("5", FASTATTN_C5, "{%2, %3, %4, %5, %6}", "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4))

#undef FASTATTN_TMA_LOAD
#undef FASTATTN_TMA_LOAD_MULTICAST
#undef FASTATTN_TMA_STORE
#undef FASTATTN_COMMA
#undef FASTATTN_C2
#undef FASTATTN_C3
#undef FASTATTN_C4
#undef FASTATTN_C5

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
