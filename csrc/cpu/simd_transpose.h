// Transposition of LANES × LANES elements of 32 bits.
#pragma once
#include "simd.h"

namespace fastattn::FASTATTN_ISA {

#if defined(__AVX512F__)
FASTATTN_INLINE Int interleave_low(Int a, Int b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
FASTATTN_INLINE Int interleave_high(Int a, Int b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#elif defined(__AVX2__)
FASTATTN_INLINE Int interleave_low(Int a, Int b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
FASTATTN_INLINE Int interleave_high(Int a, Int b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
#else
FASTATTN_INLINE Int interleave_low(Int a, Int b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
FASTATTN_INLINE Int interleave_high(Int a, Int b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
#endif

// r[i][j] <-> r[j][i]: log2(LANES) perfect shuffles of the whole
FASTATTN_INLINE void transpose(Int (&r)[LANES]) {
#pragma GCC unroll 4
  for (int step = 1; step < LANES; step *= 2) {
    Int t[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES / 2; ++i) {
      t[2 * i] = interleave_low(r[i], r[i + LANES / 2]);
      t[2 * i + 1] = interleave_high(r[i], r[i + LANES / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) r[i] = t[i];
  }
}

// Lane i: the sum over lanes of x[i]. Each step halves the vectors: lanes of two alternate in one, each the sum of two.
FASTATTN_INLINE Vec sums_over_lanes(Vec (&x)[LANES]) {
#pragma GCC unroll 4
  for (int half = LANES / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      const Int a = as_int(x[i]), b = as_int(x[i + half]);
      x[i] = as_float(interleave_low(a, b)) + as_float(interleave_high(a, b));
    }
  return x[0];
}

}  // namespace fastattn::FASTATTN_ISA
