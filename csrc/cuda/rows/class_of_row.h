// The class of a row, the weight of its loss, and the softcap of its logits.
#pragma once
#include <rows/place.h>
#include <rows/values.h>

namespace rows {

struct ClassOfRow {
  int t;         // -1: there is none
  bool counts;   // the row exists and is not to be ignored
  float poison;  // NaN where the class that counts is none of N; 0 elsewhere
  float weight;  // w_t, 0 without a class

  template <class T, class P>
  __device__ __forceinline__ static ClassOfRow of(const P& p, int64_t target, bool exists, int N) {
    const bool counts = exists && target != p.ignore_index, known = target >= 0 && target < N;
    ClassOfRow c{counts && known ? static_cast<int>(target) : -1, counts, counts && !known ? NAN : 0.f, 0.f};
    if (c.t < 0) return c;
    if (!p.weight.data) c.weight = 1.f;
    else if (p.weight.dtype == Dtype::Float32) c.weight = static_cast<const float*>(p.weight.data)[c.t];
    else c.weight = ptx::to_float(static_cast<const T*>(p.weight.data)[c.t]);
    return c;
  }
};

__device__ __forceinline__ int64_t load_target(const void* target, bool is_64, int64_t i) {
  return is_64 ? static_cast<const int64_t*>(target)[i] : static_cast<const int32_t*>(target)[i];
}

// s = softcap · tanh(x / softcap)
__device__ __forceinline__ float softcapped(float x, float softcap) { return softcap * tanhf(x / softcap); }

// ds / dx = 1 - (s / softcap)²
__device__ __forceinline__ float softcap_slope(float s, float softcap) {
  const float ratio = s / softcap;
  return 1.f - ratio * ratio;
}

}  // namespace rows
