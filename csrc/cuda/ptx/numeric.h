// Conversions (round to nearest even) and the approximate functions of the special function unit.
#pragma once
#include <ptx/types.h>

namespace ptx {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float to_float(fp16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) {
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <> __device__ __forceinline__ fp16 from_float<fp16>(float x) {
  fp16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

// Two elements in one register, `lo` in the low half.
template <class T> __device__ __forceinline__ uint32_t pack(float lo, float hi);
template <> __device__ __forceinline__ uint32_t pack<bf16>(float lo, float hi) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
  return y;
}
template <> __device__ __forceinline__ uint32_t pack<fp16>(float lo, float hi) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
  return y;
}

#define FASTATTN_APPROXIMATE(NAME, OPCODE)            \
  __device__ __forceinline__ float NAME(float x) {    \
    float y;                                          \
    asm(OPCODE " %0, %1;" : "=f"(y) : "f"(x));        \
    return y;                                         \
  }
FASTATTN_APPROXIMATE(exp2_approx, "ex2.approx.ftz.f32")      // 2^x; 2^-inf = 0
FASTATTN_APPROXIMATE(log2_approx, "lg2.approx.ftz.f32")
FASTATTN_APPROXIMATE(rcp_approx, "rcp.approx.ftz.f32")       // 1 / x
FASTATTN_APPROXIMATE(rsqrt_approx, "rsqrt.approx.ftz.f32")   // 1 / √x
FASTATTN_APPROXIMATE(tanh_approx, "tanh.approx.f32")
#undef FASTATTN_APPROXIMATE

// The larger; NaN if either is (fmaxf ignores one).
__device__ __forceinline__ float max_nan(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

}  // namespace ptx
