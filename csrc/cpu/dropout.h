// The keyed generator of dropout: Philox4x32-7 (Salmon et al., SC'11), as in fastattn/reference/dropout.py.
#pragma once
#include "simd.h"

namespace fastattn::FASTATTN_ISA {

// High and low 32 bits of each lane's product
FASTATTN_INLINE void multiply_wide(UInt a, uint32_t factor, UInt& high, UInt& low) {
#if defined(__AVX512F__)
  const __m512i f = _mm512_set1_epi32((int)factor), x = (__m512i)a;
  const __m512i even = _mm512_mul_epu32(x, f), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), f);
  high = (UInt)_mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
  low = (UInt)_mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32));
#elif defined(__AVX2__)
  const __m256i f = _mm256_set1_epi32((int)factor), x = (__m256i)a;
  const __m256i even = _mm256_mul_epu32(x, f), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), f);
  high = (UInt)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  low = (UInt)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
#else
  for (int i = 0; i < LANES; ++i) {
    const uint64_t product = uint64_t(a[i]) * factor;
    high[i] = uint32_t(product >> 32);
    low[i] = uint32_t(product);
  }
#endif
}

// The first word of the counter (c0, c1, c2, c3) under a 64-bit key
FASTATTN_INLINE UInt philox(uint64_t key, UInt c0, UInt c1, UInt c2, UInt c3) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < 7; ++round) {
    UInt high0, low0, high1, low1;
    multiply_wide(c0, 0xD2511F53u, high0, low0);
    multiply_wide(c2, 0xCD9E8D57u, high1, low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

// What an entry is multiplied by: `scale` if its word is at least `threshold` (up to 2^32), else 0
FASTATTN_INLINE Vec dropout_factor(UInt word, int64_t threshold, float scale) {
  if (threshold > 0xffffffffLL) return Vec{};
  return zero_unless((Int)(word >= (uint32_t)threshold), broadcast(scale));
}

}  // namespace fastattn::FASTATTN_ISA
