// "A masked key never leaks, whatever V holds there": a hidden key has p = 0, but 0 · NaN and 0 · inf are NaN, and
// the tensor cores multiply them. Nothing is done about it in the main loop. A NaN in the accumulator stays there, so
// a row whose o is finite got nothing from hidden keys; a row whose o is not is computed again here, one key after
// the other, from those it sees alone. Rare, hence small rather than fast. Where no row has a hidden key that exists,
// and where the scores themselves are NaN, what is not finite is right as it is.
//
// Rows of scores beyond FAR (softmax.h) are computed again here too.
#pragma once
#include <attention/mask.h>
#include <ptx/global.h>
#include <ptx/warp.h>

namespace attention {

// NaN if anything in x is not finite, else 0.
template <int N>
__device__ __forceinline__ void accumulate_non_finite(float (&result)[2], const float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) result[row_half(i)] = fmaf(x[i], 0.0f, result[row_half(i)]);
}

template <class T>
__device__ __forceinline__ void load_pair(float (&x)[2], const T* row) {
  const auto pair = ptx::ld_global_nc(reinterpret_cast<const ptx::packet<T, 2>*>(row));
  x[0] = ptx::to_float(pair[0]);
  x[1] = ptx::to_float(pair[1]);
}

// q·k by a whole warp, in every lane: lane l multiplies columns 2l + 64j and the next.
template <class T, int D>
__device__ __forceinline__ float exact_score(const T* q, const T* k, const Score& score) {
  float s = 0;
  for (int c = 2 * (threadIdx.x % 32); c < D; c += 64) {
    float x[2], y[2];
    load_pair(x, q + c);
    load_pair(y, k + c);
    s += x[0] * y[0] + x[1] * y[1];
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) s += ptx::shuffle_xor(s, mask);
  return score.transformed ? apply_score(s, score) : s;
}

// One row of o by a whole warp: lane l has columns 2l + 64j and the next in o[2j] and o[2j + 1].
//   p = exp(s - max);   o = Σ p v / Σ p over the keys that the row sees;   p · v = v where v is not finite
template <class T, int D, int D_V>
__device__ __forceinline__ void exact_row(float (&o)[(D_V + 63) / 64 * 2], float& lse, float& lse_low, const T* q,
                                          const T* k, const T* v, const VisibleKeys& keys, const ForwardArguments& p) {
  const int column = 2 * (threadIdx.x % 32);
  float row_max = -INFINITY, sum = 0;
  for (int64_t j = keys.begin; j < keys.end; j++)
    row_max = ptx::max_nan(row_max, exact_score<T, D>(q, k + j * p.stride_kn, p.score));
  const float top = row_max == -INFINITY ? 0.0f : row_max;
#pragma unroll
  for (float& x : o) x = 0;
  for (int64_t j = keys.begin; j < keys.end; j++) {
    const float s = exact_score<T, D>(q, k + j * p.stride_kn, p.score);
    const float probability = ptx::exp2_approx((s - top) * p.score.factor);
    sum += probability;
#pragma unroll
    for (int t = 0; t < (D_V + 63) / 64; t++) {
      if (column + 64 * t >= D_V) continue;
      float y[2];
      load_pair(y, v + j * p.stride_vn + column + 64 * t);
#pragma unroll
      for (int e = 0; e < 2; e++) o[2 * t + e] += fabsf(y[e]) < INFINITY ? probability * y[e] : y[e];
    }
  }
#pragma unroll
  for (float& x : o) x = sum == 0 ? x : x / sum;
  split_lse(row_max, p.score.scale, ptx::log2_approx(sum) * LN_2, sum, lse, lse_low);
}

}  // namespace attention
