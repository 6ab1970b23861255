// Barriers 0-15 of the CTA: barrier_sync waits, barrier_arrive does not; both count towards `threads`, whole warps.
// Ids must be constants at the call, or ptxas reserves all sixteen. cta_sync is barrier 0 with every thread.
#pragma once
#include <ptx/language.h>

namespace ptx {

__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void cta_sync() { __syncthreads(); }

}  // namespace ptx
