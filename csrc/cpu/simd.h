// Vectors of floats as wide as the instruction set's, on the vector extensions of gcc and clang.
//
// A kernel source is compiled once for each instruction set, with -DFASTATTN_ISA=<name> and that set's flags, and puts
// everything into namespace fastattn::FASTATTN_ISA. It uses no std:: template or inline function that might be emitted
// out of line: the linker keeps one copy of such a function, perhaps one with instructions that this CPU lacks. For the
// same reason headers that kernels share are inside that namespace, and everything small is always inlined.
//
//   Vec                      LANES floats; + - * / and comparisons work elementwise
//   Int                      LANES int32; a comparison gives one, -1 where true
//   load(p), load(p, n)      from float, bf16, fp16 or bool (as uint8_t); of n lanes only, the others being 0
//   store(p, x[, n])         to float, bf16 or fp16, rounded to nearest even
//   fma(a, b, c)             a · b + c, fused where the set has it
//   max, min                 the second argument where one is NaN: max(bound, x) keeps a NaN in x
//   select(m, a, b)          a where m, else b
//   reduce_max, reduce_sum   over lanes
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "numeric.h"

namespace fastattn::FASTATTN_ISA {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Int __attribute__((vector_size(4 * LANES)));
typedef uint32_t UInt __attribute__((vector_size(4 * LANES)));
typedef uint16_t Half __attribute__((vector_size(2 * LANES)));
typedef uint8_t Byte __attribute__((vector_size(LANES)));
typedef Vec UnalignedVec __attribute__((aligned(4), may_alias));
typedef Int UnalignedInt __attribute__((aligned(1), may_alias));  // also of pairs of bf16

template <class T>
FASTATTN_INLINE T smaller(T a, T b) { return b < a ? b : a; }
template <class T>
FASTATTN_INLINE T larger(T a, T b) { return a < b ? b : a; }

FASTATTN_INLINE Vec broadcast(float x) { return x - Vec{}; }
FASTATTN_INLINE Int broadcast(int32_t x) { return x - Int{}; }
FASTATTN_INLINE Vec as_float(Int x) { return (Vec)x; }
FASTATTN_INLINE Int as_int(Vec x) { return (Int)x; }
FASTATTN_INLINE Vec to_float(Int x) { return __builtin_convertvector(x, Vec); }

// 0, 1, 2, …
FASTATTN_INLINE Int lane_index() {
  Int x;
  for (int i = 0; i < LANES; ++i) x[i] = i;
  return x;
}
FASTATTN_INLINE Int first_lanes(int n) { return lane_index() < n; }

FASTATTN_INLINE Vec select(Int m, Vec a, Vec b) { return m ? a : b; }
FASTATTN_INLINE Vec zero_unless(Int m, Vec a) { return (Vec)((Int)a & m); }

// ---- float

FASTATTN_INLINE Vec load(const float* p) { return *(const UnalignedVec*)p; }
FASTATTN_INLINE void store(float* p, Vec x) { *(UnalignedVec*)p = x; }

#if defined(__AVX512F__)

FASTATTN_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
FASTATTN_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
FASTATTN_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
FASTATTN_INLINE Vec round_even(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT); }
FASTATTN_INLINE Vec sqrt(Vec x) { return _mm512_sqrt_ps(x); }
// x · 2^n for integral n of any size: 0 and inf where that is what the result is
FASTATTN_INLINE Vec scale_by_power(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }

FASTATTN_INLINE __mmask16 lane_mask(int n) { return (__mmask16)((1u << n) - 1); }
FASTATTN_INLINE Vec load(const float* p, int n) { return _mm512_maskz_loadu_ps(lane_mask(n), p); }
FASTATTN_INLINE void store(float* p, Vec x, int n) { _mm512_mask_storeu_ps(p, lane_mask(n), x); }

FASTATTN_INLINE Half load_half(const uint16_t* p) { return (Half)_mm256_loadu_si256((const __m256i*)p); }
FASTATTN_INLINE Half load_half(const uint16_t* p, int n) { return (Half)_mm256_maskz_loadu_epi16(lane_mask(n), p); }
FASTATTN_INLINE void store_half(uint16_t* p, Half x) { _mm256_storeu_si256((__m256i*)p, (__m256i)x); }
FASTATTN_INLINE void store_half(uint16_t* p, Half x, int n) { _mm256_mask_storeu_epi16(p, lane_mask(n), (__m256i)x); }
FASTATTN_INLINE Byte load_byte(const uint8_t* p) { return (Byte)_mm_loadu_si128((const __m128i*)p); }
FASTATTN_INLINE Byte load_byte(const uint8_t* p, int n) { return (Byte)_mm_maskz_loadu_epi8(lane_mask(n), p); }

#else

#if defined(__AVX2__)
FASTATTN_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
FASTATTN_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
FASTATTN_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
FASTATTN_INLINE Vec round_even(Vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
FASTATTN_INLINE Vec sqrt(Vec x) { return _mm256_sqrt_ps(x); }
#else
#if defined(__aarch64__)
FASTATTN_INLINE Vec fma(Vec a, Vec b, Vec c) { return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
FASTATTN_INLINE Vec sqrt(Vec x) { return (Vec)vsqrtq_f32((float32x4_t)x); }
#elif defined(__x86_64__)
FASTATTN_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
FASTATTN_INLINE Vec sqrt(Vec x) { return _mm_sqrt_ps(x); }
#else
FASTATTN_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
FASTATTN_INLINE Vec sqrt(Vec x) {
  for (int i = 0; i < LANES; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}
#endif
FASTATTN_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
FASTATTN_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
// Adding 1.5 · 2^23 rounds what is smaller than 2^22; anything larger stays as it is.
FASTATTN_INLINE Vec round_even(Vec x) {
  const Vec shift = broadcast(12582912.f), size = as_float(as_int(x) & 0x7fffffff);
  return size < broadcast(4194304.f) ? x + shift - shift : x;
}
#endif

// x · 2^n for integral n, in two steps since an exponent field holds -126 … 127
FASTATTN_INLINE Vec scale_by_power(Vec x, Vec n) {
  const Int e = __builtin_convertvector(max(broadcast(-252.f), min(broadcast(254.f), n)), Int);
  const Int half = e >> 1;
  return x * as_float((half + 127) << 23) * as_float((e - half + 127) << 23);
}

// Tails go through the stack.
FASTATTN_INLINE Vec load(const float* p, int n) {
  float t[LANES] = {};
  for (int i = 0; i < n; ++i) t[i] = p[i];
  return load(t);
}
FASTATTN_INLINE void store(float* p, Vec x, int n) {
  for (int i = 0; i < n; ++i) p[i] = x[i];
}
FASTATTN_INLINE Half load_half(const uint16_t* p) {
  Half x;
  memcpy(&x, p, sizeof x);
  return x;
}
FASTATTN_INLINE Half load_half(const uint16_t* p, int n) {
  Half x{};
  for (int i = 0; i < n; ++i) x[i] = p[i];
  return x;
}
FASTATTN_INLINE void store_half(uint16_t* p, Half x) { memcpy(p, &x, sizeof x); }
FASTATTN_INLINE void store_half(uint16_t* p, Half x, int n) {
  for (int i = 0; i < n; ++i) p[i] = x[i];
}
FASTATTN_INLINE Byte load_byte(const uint8_t* p) {
  Byte x;
  memcpy(&x, p, sizeof x);
  return x;
}
FASTATTN_INLINE Byte load_byte(const uint8_t* p, int n) {
  Byte x{};
  for (int i = 0; i < n; ++i) x[i] = p[i];
  return x;
}

#endif

// ---- bf16 and fp16

FASTATTN_INLINE Int widened(Half x) {
#if defined(__AVX512F__)
  return (Int)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
  return (Int)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return (Int)__builtin_convertvector(x, UInt);
#endif
}
// The low halves of each lane
FASTATTN_INLINE Half narrowed(UInt x) {
#if defined(__AVX512F__)
  return (Half)_mm512_cvtepi32_epi16((__m512i)x);
#else
  return __builtin_convertvector(x, Half);
#endif
}

FASTATTN_INLINE Vec from_bits(Half x, bf16) { return as_float(widened(x) << 16); }
FASTATTN_INLINE Half to_bits(Vec x, bf16) {
#if defined(__AVX512BF16__)
  return (Half)_mm512_cvtneps_pbh(x);
#else
  const UInt bits = (UInt)x;
  const UInt rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return narrowed((UInt)(x == x ? (Int)rounded : (Int)((bits >> 16) | 0x40)));
#endif
}

FASTATTN_INLINE Vec from_bits(Half x, fp16) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps((__m256i)x);
#elif defined(__AVX2__)
  return _mm256_cvtph_ps((__m128i)x);
#else
  // The fields of a half, read as a float, are 2^112 too small; inf and NaN have all exponent bits.
  const Int h = widened(x), magnitude = (h & 0x7fff) << 13;
  const Vec value = as_float(magnitude) * broadcast(0x1p112f);
  const Int beyond = as_int(value) >= as_int(broadcast(65536.f));
  return as_float(as_int(value) | (beyond & 0x7f800000) | ((h & 0x8000) << 16));
#endif
}
FASTATTN_INLINE Half to_bits(Vec x, fp16) {
#if defined(__AVX512F__)
  return (Half)_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (Half)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
#else
  const Int bits = as_int(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  const Int subnormal = as_int(as_float(size) + broadcast(0.5f)) - as_int(broadcast(0.5f));  // rounds to 2^-24
  const Int odd = size >> 13 & 1;
  const Int normal = (size - (112 << 23) + 0xfff + odd) >> 13;
  Int h = size < as_int(broadcast(0x1p-14f)) ? subnormal : normal;
  h = size >= as_int(broadcast(65520.f)) ? broadcast(0x7c00) : h;  // rounds to 65536, which is inf
  h = size > 0x7f800000 ? broadcast(0x7e00) : h;
  return narrowed((UInt)(h | sign));
#endif
}

template <class T>
FASTATTN_INLINE Vec load(const T* p) { return from_bits(load_half(&p->bits), T{}); }
template <class T>
FASTATTN_INLINE Vec load(const T* p, int n) { return from_bits(load_half(&p->bits, n), T{}); }
template <class T>
FASTATTN_INLINE void store(T* p, Vec x) { store_half(&p->bits, to_bits(x, T{})); }
template <class T>
FASTATTN_INLINE void store(T* p, Vec x, int n) { store_half(&p->bits, to_bits(x, T{}), n); }

// A bool tensor, 1 where true
FASTATTN_INLINE Vec from_bytes(Byte x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32((__m128i)x));
#else
  return to_float((Int)__builtin_convertvector(x, UInt));
#endif
}
FASTATTN_INLINE Vec load(const uint8_t* p) { return from_bytes(load_byte(p)); }
FASTATTN_INLINE Vec load(const uint8_t* p, int n) { return from_bytes(load_byte(p, n)); }

// One element
FASTATTN_INLINE float load_one(const float* p) { return *p; }
FASTATTN_INLINE float load_one(const uint8_t* p) { return *p; }
FASTATTN_INLINE float load_one(const bf16* p) { return load(p, 1)[0]; }
FASTATTN_INLINE float load_one(const fp16* p) { return load(p, 1)[0]; }
FASTATTN_INLINE void store_one(float* p, float x) { *p = x; }
FASTATTN_INLINE void store_one(bf16* p, float x) { p->bits = to_bits(broadcast(x), bf16{})[0]; }
FASTATTN_INLINE void store_one(fp16* p, float x) { p->bits = to_bits(broadcast(x), fp16{})[0]; }

// n ≤ LANES elements that are `stride` apart; the other lanes are 0
template <class T>
FASTATTN_INLINE Vec load_strided(const T* p, int64_t stride, int n) {
  if (stride == 1) return n == LANES ? load(p) : load(p, n);
  float t[LANES] = {};
  for (int i = 0; i < n; ++i) t[i] = load_one(p + i * stride);
  return load(t);
}
template <class T>
FASTATTN_INLINE void store_strided(T* p, int64_t stride, Vec x, int n) {
  if (stride == 1) return n == LANES ? store(p, x) : store(p, x, n);
  for (int i = 0; i < n; ++i) store_one(p + i * stride, x[i]);
}

// ---- over lanes; a tree of fixed order

// Lane i + n in lane i, for i < n; the other lanes are of no interest
template <int n>
FASTATTN_INLINE Vec lowered(Vec x) {
#if defined(__AVX512F__)
  if (n == 8) return __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15);
  if (n == 4) return __builtin_shufflevector(x, x, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7);
  if (n == 2) return __builtin_shufflevector(x, x, 2, 3, 2, 3, 6, 7, 6, 7, 10, 11, 10, 11, 14, 15, 14, 15);
  return __builtin_shufflevector(x, x, 1, 1, 3, 3, 5, 5, 7, 7, 9, 9, 11, 11, 13, 13, 15, 15);
#elif defined(__AVX2__)
  if (n == 4) return __builtin_shufflevector(x, x, 4, 5, 6, 7, 4, 5, 6, 7);
  if (n == 2) return __builtin_shufflevector(x, x, 2, 3, 2, 3, 6, 7, 6, 7);
  return __builtin_shufflevector(x, x, 1, 1, 3, 3, 5, 5, 7, 7);
#else
  if (n == 2) return __builtin_shufflevector(x, x, 2, 3, 2, 3);
  return __builtin_shufflevector(x, x, 1, 1, 3, 3);
#endif
}

FASTATTN_INLINE float reduce_sum(Vec x) {
  if constexpr (LANES == 16) x += lowered<8>(x);
  if constexpr (LANES >= 8) x += lowered<4>(x);
  x += lowered<2>(x);
  x += lowered<1>(x);
  return x[0];
}
// NaN if a lane is NaN
FASTATTN_INLINE Vec larger_or_nan(Vec a, Vec b) { return select((a > b) | (a != a), a, b); }
FASTATTN_INLINE float reduce_max(Vec x) {
  if constexpr (LANES == 16) x = larger_or_nan(x, lowered<8>(x));
  if constexpr (LANES >= 8) x = larger_or_nan(x, lowered<4>(x));
  x = larger_or_nan(x, lowered<2>(x));
  x = larger_or_nan(x, lowered<1>(x));
  return x[0];
}
FASTATTN_INLINE bool any(Int m) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)m, (__m512i)m) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)m, (__m256i)m);
#else
  int32_t x = 0;
  for (int i = 0; i < LANES; ++i) x |= m[i];
  return x != 0;
#endif
}
FASTATTN_INLINE Vec abs(Vec x) { return as_float(as_int(x) & 0x7fffffff); }
FASTATTN_INLINE Int is_finite(Vec x) { return abs(x) < broadcast(__builtin_inff()); }

}  // namespace fastattn::FASTATTN_ISA
