// Rows of a tensor brought into the order in which products read them. Rows are given by their addresses.
//
//   columns    (D / DEPTH, width)      elements of row m in lane m: B of a product over D
//   rows       (n, D / DEPTH)          A of a product over D
//   stacked    (n / DEPTH, ld)         elements are of rows n, n + 1, …: A or B of a product over rows
#pragma once
#include "gemm.h"

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

// Whether n rows of D numbers hold neither inf nor NaN
template <class T>
bool all_finite(const T* const* rows, int n, int64_t stride, int D);

// dst[e][m], width columns of which those from n on are 0
template <class T>
void pack_columns(const T* const* rows, int n, int64_t stride, int D, int width, int32_t* dst);

// dst[n][e], rows of ld elements, those from D / DEPTH on being 0 up to a multiple of LANES
template <class T>
void pack_rows(const T* const* rows, int n, int64_t stride, int D, int ld, int32_t* dst);

// dst[n / DEPTH][d], rows of ld elements, those from D on being 0; CLEAN: inf and NaN are replaced by 0
template <class T, bool CLEAN>
void pack_stacked(const T* const* rows, int n, int64_t stride, int D, int ld, int32_t* dst);

}  // namespace fastattn::FASTATTN_ISA
