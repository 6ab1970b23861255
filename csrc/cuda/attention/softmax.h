// The online softmax of a thread's two rows; every case of a maximum of -inf is handled here.
//
//   p = exp2(factor · (s - row_max) + residue);   row_sum = Σ p;   what was summed before is multiplied by `rescale`
//
// Lazily: row_max may lag behind by up to LAZY / factor, so that p <= 2^LAZY and the sums need no rescaling; most tiles
// after the first raise no maximum that far. o / row_sum and row_max + log row_sum do not depend on row_max.
//
// The exponent is one fused multiply-add, s · factor - offset, where offset = factor · row_max was rounded; the residue,
// factor · row_max - offset, is at most 1/2 and known while offset is below FAR. Rows beyond are computed again, each
// key alone (exact_row.h).
#pragma once
#include <attention/exp2.h>
#include <attention/fragment.h>
#include <attention/score.h>
#include <ptx/warp.h>

#include <cmath>

namespace attention {

__device__ __forceinline__ float finite_max(float row_max) { return row_max == -INFINITY ? 0.0f : row_max; }

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, ptx::shuffle_xor(x, 1));
  return fmaxf(x, ptx::shuffle_xor(x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += ptx::shuffle_xor(x, 1);
  return x + ptx::shuffle_xor(x, 2);
}

constexpr float FAR = 16777216.0f;  // 2^24

// LAZY: how far, in log2, a maximum may lag behind; 0: not at all.
template <int LAZY, int POLYNOMIAL_EIGHTHS, int POLYNOMIAL_DEGREE>
struct OnlineSoftmax {
  float factor;
  float row_max[2] = {-INFINITY, -INFINITY};
  float row_sum[2] = {0, 0};  // of this thread's columns alone until `finish`
  float rescale[2] = {1, 1};

  // s becomes p; returns whether there is anything to rescale, the same in all lanes of a warp.
  template <int N>
  __device__ __forceinline__ bool update(float (&s)[N]) {
    const float old_max[2] = {row_max[0], row_max[1]};
    float partial[2][2] = {{row_max[0], row_max[0]}, {row_max[1], row_max[1]}}, new_max[2];  // two chains a row
#pragma unroll
    for (int i = 0; i < N; i++) partial[row_half(i)][i & 1] = fmaxf(partial[row_half(i)][i & 1], s[i]);
#pragma unroll
    for (int r = 0; r < 2; r++) new_max[r] = quad_max(fmaxf(partial[r][0], partial[r][1]));
    bool grown = true;
    if constexpr (LAZY > 0) {
      const bool far = (new_max[0] - old_max[0]) * factor > LAZY || (new_max[1] - old_max[1]) * factor > LAZY;
      grown = ptx::ballot(far) != 0;
    }
#pragma unroll
    for (int r = 0; r < 2; r++) row_max[r] = grown ? new_max[r] : old_max[r];
    const float offset[2] = {finite_max(row_max[0]) * factor, finite_max(row_max[1]) * factor};
    float sum[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < N; i++) {
      s[i] = exp2_shared_out<POLYNOMIAL_EIGHTHS, POLYNOMIAL_DEGREE>(fmaf(s[i], factor, -offset[row_half(i)]), i);
      sum[row_half(i)] += s[i];
    }
    if (grown) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        rescale[r] = ptx::exp2_approx(fmaf(old_max[r], factor, -offset[r]) - residue(old_max[r]));
        row_sum[r] *= rescale[r];
      }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) row_sum[r] += sum[r];
    return grown;
  }

  // -> (1 / row_sum, lse, lse_low) of logits scale · s; a row that saw nothing has 0, -inf and 0.
  __device__ __forceinline__ void finish(float scale, float (&normaliser)[2], float (&lse)[2], float (&lse_low)[2]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float sum = quad_sum(row_sum[r]);
      normaliser[r] = sum == 0 ? 0.0f : ptx::rcp_approx(sum);
      const float log_sum = (ptx::log2_approx(sum) - residue(row_max[r])) * LN_2;
      split_lse(row_max[r], scale, log_sum, sum, lse[r], lse_low[r]);
    }
  }

  // True if row r of this thread has scores whose exponents were rounded too much.
  __device__ __forceinline__ bool far(int r) const {
    const float offset = fabsf(row_max[r] * factor);
    return FAR <= offset && offset < INFINITY;
  }

 private:
  __device__ __forceinline__ float residue(float top) const {
    const float offset = top * factor;
    return fabsf(offset) < FAR ? fmaf(top, factor, -offset) : 0.0f;
  }
};

}  // namespace attention
