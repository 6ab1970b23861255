// Whole-warp operations: all 32 lanes (or all that have not exited) execute them together.
// Shuffles and votes do not order memory; warp_sync does.
#pragma once
#include <ptx/language.h>

namespace ptx {

template <class T> __device__ __forceinline__ T shuffle_xor(T v, int mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}
template <class T> __device__ __forceinline__ T shuffle(T v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
__device__ __forceinline__ uint32_t ballot(bool v) { return __ballot_sync(0xffffffffu, v); }
__device__ __forceinline__ void warp_sync() { __syncwarp(); }

// True in exactly one lane of the converged warp.
__device__ __forceinline__ bool elect_one() {
#if __CUDA_ARCH__ >= 900
  uint32_t elected;
  asm volatile(
      "{\n.reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(elected));
  return elected;
#else
  return threadIdx.x % 32 == 0;
#endif
}

// sm_90a. Registers per thread of this warpgroup: N a multiple of 8, 24 to 256; all four warps execute it.
template <int N> __device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> __device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

}  // namespace ptx
