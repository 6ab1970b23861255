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

// The sums over lanes of four vectors
FASTATTN_INLINE void reduce_four(const Vec (&x)[4], float* sums) {
  // Lanes of a and b alternate, each the sum of two that were half a vector apart.
  const auto folded = [](Vec a, Vec b) {
    return as_float(interleave_low(as_int(a), as_int(b))) + as_float(interleave_high(as_int(a), as_int(b)));
  };
  Vec y = folded(folded(x[0], x[2]), folded(x[1], x[3]));  // x_0, x_1, x_2, x_3 over and over
#if defined(__AVX512F__)
  y += (Vec)__builtin_shufflevector(y, y, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  y += (Vec)__builtin_shufflevector(y, y, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
#elif defined(__AVX2__)
  y += (Vec)__builtin_shufflevector(y, y, 4, 5, 6, 7, 0, 1, 2, 3);
#endif
  memcpy(sums, &y, 4 * sizeof(float));
}

}  // namespace fastattn::FASTATTN_ISA
