#include "pack.h"

#include "simd_transpose.h"

namespace fastattn::FASTATTN_ISA {

// 0 · x is 0 for what is finite, and else NaN
template <class T>
bool all_finite(const T* const* rows, int n, int64_t stride, int D) {
  Vec sum{};
  for (int i = 0; i < n; ++i)
    for (int d = 0; d < D; d += LANES) sum += load_some(rows[i] + d * stride, stride, D - d) * broadcast(0.f);
  return !any(sum != sum);
}

template <class T>
void pack_columns(const T* const* rows, int n, int64_t stride, int D, int width, int32_t* dst) {
  constexpr int DEPTH = Element<T>::DEPTH;
  for (int m = 0; m < width; m += LANES)
    for (int d = 0; d < D; d += LANES * DEPTH) {
      Int block[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i)
        block[i] = m + i < n ? load_elements(rows[m + i] + d * stride, stride, D - d) : Int{};
      transpose(block);
      const int e = d / DEPTH, elements = smaller(LANES, depth_of<T>(D) - e);
      for (int i = 0; i < elements; ++i) *(UnalignedInt*)(dst + int64_t(e + i) * width + m) = block[i];
    }
}

template <class T>
void pack_rows(const T* const* rows, int n, int64_t stride, int D, int ld, int32_t* dst) {
  constexpr int DEPTH = Element<T>::DEPTH;
  for (int i = 0; i < n; ++i)
    for (int d = 0; d < D; d += LANES * DEPTH) {
      const int e = d / DEPTH;
      float* at = (float*)dst + int64_t(i) * ld + e;
      const Vec x = as_float(load_elements(rows[i] + d * stride, stride, D - d));
      ld - e >= LANES ? store(at, x) : store(at, x, ld - e);
    }
}

template <class T, bool CLEAN>
void pack_stacked(const T* const* rows, int n, int64_t stride, int D, int ld, int32_t* dst) {
#if defined(__AVX512BF16__)
  if constexpr (Element<T>::DEPTH == 2) {
    for (int i = 0; i < n; i += 2)
      for (int d = 0; d < ld; d += 2 * LANES) {
        Int a = load_pairs(rows[i] + d * stride, stride, D - d);
        Int b = i + 1 < n ? load_pairs(rows[i + 1] + d * stride, stride, D - d) : Int{};
        if (CLEAN) a = finite_or_zero(a), b = finite_or_zero(b);
        float* at = (float*)dst + int64_t(i / 2) * ld + d;
        const int left = ld - d;
        left >= LANES ? store(at, as_float(pairs_low(a, b))) : store(at, as_float(pairs_low(a, b)), left);
        if (left >= 2 * LANES)
          store(at + LANES, as_float(pairs_high(a, b)));
        else if (left > LANES)
          store(at + LANES, as_float(pairs_high(a, b)), left - LANES);
      }
    return;
  }
#endif
  for (int i = 0; i < n; ++i)
    for (int d = 0; d < ld; d += LANES) {
      Vec x = D > d ? load_some(rows[i] + d * stride, stride, D - d) : Vec{};
      if (CLEAN) x = finite_or_zero(x);
      float* at = (float*)dst + int64_t(i) * ld + d;
      ld - d >= LANES ? store(at, x) : store(at, x, ld - d);
    }
}

#define FASTATTN_INSTANTIATE(T)                                                             \
  template bool all_finite(const T* const*, int, int64_t, int);                             \
  template void pack_columns(const T* const*, int, int64_t, int, int, int32_t*);            \
  template void pack_rows(const T* const*, int, int64_t, int, int, int32_t*);               \
  template void pack_stacked<T, false>(const T* const*, int, int64_t, int, int, int32_t*);  \
  template void pack_stacked<T, true>(const T* const*, int, int64_t, int, int, int32_t*);
FASTATTN_INSTANTIATE(float)
FASTATTN_INSTANTIATE(bf16)
FASTATTN_INSTANTIATE(fp16)

}  // namespace fastattn::FASTATTN_ISA
