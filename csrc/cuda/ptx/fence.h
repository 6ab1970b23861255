// Fences between the generic proxy (ld, st, ldmatrix, stmatrix) and the asynchronous one (TMA, wgmma, bulk copies).
#pragma once
#include <ptx/language.h>

namespace ptx {

// This thread's generic stores to shared memory before it are seen by asynchronous operations after it.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// This thread's mbarrier_init calls are seen by asynchronous operations and by the other CTAs of the cluster.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

}  // namespace ptx
