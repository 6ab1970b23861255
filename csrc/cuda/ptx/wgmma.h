// sm_90a: d += A·B by the four warps of a warpgroup, asynchronously. A is 64 × 16, B 16 × N, R = N / 2 accumulators a
// thread, N a multiple of 8 up to 256. E is the element type, ptx::bf16 or ptx::fp16. TRANS 1: the operand is MN-major.
//   accumulator i of thread t, lane l:  row 16·(t / 32) + l / 4 + 8·((i >> 1) & 1)
//                                       column 8·(i / 4) + 2·(l % 4) + (i & 1)
//   A register j (two elements):        row 16·(t / 32) + l / 4 + 8·(j & 1),  k = 2·(l % 4) + 8·(j >> 1)
// Order: wgmma_fence, any number of wgmma, wgmma_commit; wgmma_wait<N> returns with at most N groups unfinished, and
// takes the accumulator arrays of the finished ones, which the compiler must not touch before it. Between commit and
// wait neither the accumulators nor the A registers may be touched.
#pragma once
#include <ptx/layout.h>
#include <ptx/wgmma_shapes.h>

namespace ptx {

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

namespace detail {
__device__ __forceinline__ void pin(float& r) { asm volatile("" : "+f"(r)::"memory"); }
__device__ __forceinline__ void pin(uint32_t& r) { asm volatile("" : "+r"(r)::"memory"); }
template <class T, int R> __device__ __forceinline__ void pin(T (&r)[R]) {
#pragma unroll
  for (int i = 0; i < R; ++i) pin(r[i]);
}
}  // namespace detail

template <int N, class... Arrays> __device__ __forceinline__ void wgmma_wait(Arrays&... pinned_arrays) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
  (detail::pin(pinned_arrays), ...);
}

// A and B by descriptor.
template <class E, int TRANS_A, int TRANS_B, int R>
__device__ __forceinline__ void wgmma_ss(float (&d)[R], uint64_t a, uint64_t b, int accumulate) {
  detail::WgmmaShape<2 * R>::template ss<E, TRANS_A, TRANS_B>(d, a, b, accumulate);
}

// A from four registers, K-major.
template <class E, int TRANS_B, int R>
__device__ __forceinline__ void wgmma_rs(float (&d)[R], const uint32_t* a, uint64_t b, int accumulate) {
  detail::WgmmaShape<2 * R>::template rs<E, TRANS_B>(d, a, b, accumulate);
}

}  // namespace ptx
