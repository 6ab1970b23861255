// Rows of a tensor brought into the order in which products read them. Rows are given by their addresses.
//
//   columns    (D / DEPTH, width)      elements of row m in lane m: B of a product over D
//   rows       (n, D / DEPTH)          A of a product over D
//   stacked    (n / DEPTH, ld)         elements are of rows n, n + 1, …: A or B of a product over rows
#pragma once
#include "gemm.h"
#include "simd_transpose.h"

namespace fastattn::FASTATTN_ISA {

constexpr int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

#if defined(__AVX512BF16__)
template <class T>
struct ElementOf {
  using Type = Single;
};
template <>
struct ElementOf<bf16> {
  using Type = Pair;
};
#else
template <class T>
struct ElementOf {
  using Type = Single;
};
#endif
template <class T>
using Element = typename ElementOf<T>::Type;

// Elements that a row of D numbers makes
template <class T>
constexpr int depth_of(int D) { return (D + Element<T>::DEPTH - 1) / Element<T>::DEPTH; }

template <class T>
FASTATTN_INLINE Vec load_some(const T* p, int64_t stride, int n) {
  return n >= LANES && stride == 1 ? load(p) : load_strided(p, stride, smaller(n, LANES));
}

FASTATTN_INLINE Vec finite_or_zero(Vec x) { return zero_unless(is_finite(x), x); }

// Whether n rows of D numbers hold neither inf nor NaN: then 0 · x is 0 for each, and their sum is 0
template <class T>
static bool all_finite(const T* const* rows, int n, int64_t stride, int D) {
  Vec sum{};
  for (int i = 0; i < n; ++i)
    for (int d = 0; d < D; d += LANES) sum += load_some(rows[i] + d * stride, stride, D - d) * broadcast(0.f);
  return !any(sum != sum);
}

#if defined(__AVX512BF16__)
typedef uint16_t Halves __attribute__((vector_size(64)));

// 16 elements of two neighbours each, from one row
FASTATTN_INLINE Int load_pairs(const bf16* p, int64_t stride, int n) {
  if (stride == 1 && n >= 2 * LANES) return *(const UnalignedInt*)p;
  uint16_t t[2 * LANES] = {};
  for (int i = 0; i < smaller(n, 2 * LANES); ++i) t[i] = p[i * stride].bits;
  return *(const UnalignedInt*)t;
}
// Elements (a_i, b_i): of the first 16 numbers of both, and of the others
FASTATTN_INLINE Int pairs_low(Int a, Int b) {
  return (Int)__builtin_shufflevector((Halves)a, (Halves)b, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8,
                                      40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47);
}
FASTATTN_INLINE Int pairs_high(Int a, Int b) {
  return (Int)__builtin_shufflevector((Halves)a, (Halves)b, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23,
                                      55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63);
}
// (a_i, b_i), rounded to bf16
FASTATTN_INLINE Int pairs(Vec a, Vec b) {
  const Halves both = (Halves)_mm512_cvtne2ps_pbh(b, a);
  return (Int)__builtin_shufflevector(both, both, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25,
                                      10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
// bf16 with an exponent of ones are inf or NaN
FASTATTN_INLINE Int finite_or_zero(Int pair) {
  const Halves x = (Halves)pair;
  return (Int)(x & (Halves)((x & 0x7f80) != 0x7f80));
}
#endif

template <class T>
FASTATTN_INLINE Int load_elements(const T* row, int64_t stride, int n) {
#if defined(__AVX512BF16__)
  if constexpr (Element<T>::DEPTH == 2) return load_pairs(row, stride, n);
#endif
  return as_int(load_some(row, stride, n));
}

// dst[e][m], width columns of which those from n on are 0
template <class T>
static void pack_columns(const T* const* rows, int n, int64_t stride, int D, int width, int32_t* dst) {
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

// dst[n][e]
template <class T>
static void pack_rows(const T* const* rows, int n, int64_t stride, int D, int32_t* dst) {
  constexpr int DEPTH = Element<T>::DEPTH;
  const int elements = depth_of<T>(D);
  for (int i = 0; i < n; ++i)
    for (int d = 0; d < D; d += LANES * DEPTH) {
      const int e = d / DEPTH;
      float* at = (float*)dst + int64_t(i) * elements + e;
      const Vec x = as_float(load_elements(rows[i] + d * stride, stride, D - d));
      elements - e >= LANES ? store(at, x) : store(at, x, elements - e);
    }
}

// dst[n / DEPTH][d], rows of ld elements, those from D on being 0; CLEAN: inf and NaN are replaced by 0
template <class T, bool CLEAN>
static void pack_stacked(const T* const* rows, int n, int64_t stride, int D, int ld, int32_t* dst) {
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

}  // namespace fastattn::FASTATTN_ISA
