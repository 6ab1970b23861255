// What happens to a logit between the matrix product and the softmax.
//
//   s = q·k · scale                                    a plain score: the factor of exp2 does it
//   s = softcap · tanh(q·k · scale / softcap)          and any scale <= 0: done on the logits, before the mask
//
// p = exp2(factor · (s - row_max)) needs a factor > 0: with a negative one the row maximum would be the minimum, and
// with 0 the -inf of a masked entry would become a NaN.
#pragma once
#include <ptx/language.h>
#include <ptx/numeric.h>

#include <cmath>

namespace attention {

struct Score {
  float factor;     // exp2's: scale · log2 e
  float scale;      // the logit is scale · s
  int transformed;  // 0: logits are used as they are
  float inner;      // softcap: 2·log2(e)·scale / softcap; otherwise the scale
  float softcap;    // 0: none
};

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

// a + b - sum, where sum = a + b was rounded; source: Knuth, "The Art of Computer Programming", 4.2.2, theorem B
__device__ __forceinline__ float rounded_off(float a, float b, float sum) {
  const float second = sum - a;
  return (a - (sum - second)) + (b - second);
}

// lse + lse_low = scale · row_max + log_sum, where lse_low is what fp32 rounds off lse; -inf and 0 for a sum of 0.
__device__ __forceinline__ void split_lse(float row_max, float scale, float log_sum, float sum, float& lse,
                                          float& lse_low) {
  const float highest = row_max * scale, total = highest + log_sum;
  lse = sum == 0 ? -INFINITY : total;
  lse_low = sum == 0 ? 0.0f : rounded_off(highest, log_sum, total) + fmaf(row_max, scale, -highest);
}

inline Score make_score(float scale, float softcap) {
  constexpr float SMALLEST = 1e-30f;  // below it, factor · s may be flushed to 0
  if (softcap > 0) return {LOG2_E, 1, 1, 2 * LOG2_E * scale / softcap, softcap};
  if (scale < SMALLEST) return {LOG2_E, 1, 1, scale, 0};
  return {scale * LOG2_E, scale, 0, 1, 0};
}

// c·tanh(x / c) = c - 2c / (1 + exp2(2·log2(e)·x / c)), to 2^-23 of c (tanh.approx: 2^-11)
__device__ __forceinline__ float apply_score(float s, const Score& score) {
  const float x = s * score.inner;
  if (score.softcap == 0) return x;
  return score.softcap - 2 * score.softcap * ptx::rcp_approx(1 + ptx::exp2_approx(x));
}

template <int N>
__device__ __forceinline__ void apply_score(float (&s)[N], const Score& score) {
  if (!score.transformed) return;
#pragma unroll
  for (int i = 0; i < N; i++) s[i] = apply_score(s[i], score);
}

}  // namespace attention
