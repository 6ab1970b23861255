// What is reduced over a row: sums, mean and squares, maximum and sum of exponentials.
#pragma once
#include <ptx/numeric.h>

#include <cmath>

namespace rows {

constexpr float INF = __builtin_huge_valf();
constexpr float LOG2_E = 1.4426950408889634f;

__device__ __forceinline__ float exponential(float x) { return ptx::exp2_approx(x * LOG2_E); }

template <int K> struct Sums {
  static constexpr int FIELDS = K;
  float field[K];
  __device__ __forceinline__ static Sums merge(const Sums& a, const Sums& b) {
    Sums out;
#pragma unroll
    for (int i = 0; i < K; ++i) out.field[i] = a.field[i] + b.field[i];
    return out;
  }
};

// Count, mean and Σ (h - mean)² of some elements.
struct Moments {
  static constexpr int FIELDS = 3;
  float field[3];
  __device__ __forceinline__ float mean() const { return field[1]; }
  __device__ __forceinline__ float squares() const { return field[2]; }

  // Chan: with δ = mean_b - mean_a, mean = mean_a + δ · n_b / n, squares = squares_a + squares_b + δ² · n_a · n_b / n
  __device__ __forceinline__ static Moments merge(const Moments& a, const Moments& b) {
    const float count = a.field[0] + b.field[0];
    const float share = count > 0.f ? b.field[0] * ptx::rcp_approx(count) : 0.f;
    const float delta = b.mean() - a.mean();
    return {{count, a.mean() + delta * share, a.squares() + b.squares() + delta * delta * (a.field[0] * share)}};
  }
};

// The maximum of some s, Σ exp(s - maximum), and one more sum. All handling of a maximum of -inf is here.
struct ExpSum {
  static constexpr int FIELDS = 3;
  float field[3];  // maximum, sum; at: the value of the target, or 0
  __device__ __forceinline__ static ExpSum none() { return {{-INF, 0.f, 0.f}}; }
  __device__ __forceinline__ float max() const { return field[0]; }
  __device__ __forceinline__ float sum() const { return field[1]; }
  __device__ __forceinline__ float at() const { return field[2]; }

  // What is subtracted from s: the maximum, or 0 where nothing but -inf has come by.
  __device__ __forceinline__ static float finite(float max) { return max == -INF ? 0.f : max; }

  __device__ __forceinline__ static ExpSum merge(const ExpSum& a, const ExpSum& b) {
    const float max = fmaxf(a.max(), b.max()), base = finite(max);
    const float sum = a.sum() * exponential(a.max() - base) + b.sum() * exponential(b.max() - base);
    return {{max, sum, a.at() + b.at()}};
  }

  template <int E> __device__ __forceinline__ void add(const float (&s)[E]) {
    float max = field[0];
#pragma unroll
    for (int i = 0; i < E; ++i) max = fmaxf(max, s[i]);
    const float base = finite(max);
    float sum = field[1] * exponential(field[0] - base);
#pragma unroll
    for (int i = 0; i < E; ++i) sum += exponential(s[i] - base);
    field[0] = max;
    field[1] = sum;
  }
};

}  // namespace rows
