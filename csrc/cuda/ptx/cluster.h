// sm_90: the CTAs of a cluster, their barrier, and one another's shared memory.
#pragma once
#include <ptx/types.h>

namespace ptx {

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t r;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}

__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t n;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
  return n;
}

// arrive releases and wait acquires at cluster scope; every thread of the cluster executes each, whole warps together.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

namespace detail {
// The shared address `a` of this CTA, in CTA `rank`.
__device__ __forceinline__ uint32_t mapa(uint32_t a, uint32_t rank) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(a), "r"(rank));
  return remote;
}
}  // namespace detail

template <class T> __device__ __forceinline__ T ld_shared_cluster(uint32_t a, uint32_t rank) {
  const uint32_t remote = detail::mapa(a, rank);
  if constexpr (sizeof(T) == 16) {
    packet<uint32_t, 4> w;
    asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "r"(remote));
    return bit_cast<T>(w);
  } else if constexpr (sizeof(T) == 8) {
    uint64_t w;
    asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(w) : "r"(remote));
    return bit_cast<T>(w);
  } else {
    static_assert(sizeof(T) == 4, "4, 8 or 16 bytes");
    uint32_t w;
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(w) : "r"(remote));
    return bit_cast<T>(w);
  }
}

template <class T> __device__ __forceinline__ void st_shared_cluster(uint32_t a, uint32_t rank, T v) {
  const uint32_t remote = detail::mapa(a, rank);
  if constexpr (sizeof(T) == 16) {
    const auto w = bit_cast<packet<uint32_t, 4>>(v);
    asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};"
                 ::"r"(remote), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(remote), "l"(bit_cast<uint64_t>(v)) : "memory");
  } else {
    static_assert(sizeof(T) == 4, "4, 8 or 16 bytes");
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(remote), "r"(bit_cast<uint32_t>(v)) : "memory");
  }
}

}  // namespace ptx
