// The 16-bit types of tensors. Functions on them are in simd.h, once for each instruction set.
#pragma once
#include <cstdint>

#define FASTATTN_INLINE __attribute__((always_inline)) inline

namespace fastattn {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// What the bindings pass for a dtype.
enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

inline constexpr float LOG2_E = 1.4426950408889634f;
inline constexpr float LN_2 = 0.6931471805599453f;

}  // namespace fastattn
