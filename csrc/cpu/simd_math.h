// Elementary functions on vectors, within 2 units in the last place of fp32.
#pragma once
#include "simd.h"

namespace fastattn::FASTATTN_ISA {

// Σ_k c_k x^k, the highest power first
template <class... C>
FASTATTN_INLINE Vec polynomial(Vec x, float highest, C... c) {
  Vec p = broadcast(highest);
  ((p = fma(p, x, broadcast((float)c))), ...);
  return p;
}

// 2^f for |f| ≤ ½; minimax in the relative error: 2e-9 before rounding
FASTATTN_INLINE Vec exp2_fraction(Vec f) {
  return polynomial(f, 1.535335509e-4f, 1.339887536e-3f, 9.618437385e-3f, 5.550332469e-2f, 2.402264791e-1f,
                    6.931472029e-1f, 1.f);
}

// 2^x for x ≤ 0, as in a softmax: exactly 0 for -inf, NaN for NaN. COARSE: of a relative error of 1e-4, less than a
// rounding to bf16. Without AVX-512, what is below 2^-126 is 0.
template <bool COARSE>
FASTATTN_INLINE Vec exp2_softmax(Vec x) {
#if defined(__AVX512F__)
  x = max(broadcast(-200.f), x);
  const Vec n = round_even(x), f = x - n;
#else
  const Int tiny = x < broadcast(-126.f);
  x = max(broadcast(-126.f), x);
  const Vec shifted = x + broadcast(12582912.f), f = x - (shifted - broadcast(12582912.f));
  const Vec power = as_float((as_int(shifted) << 23) + as_int(broadcast(1.f)));
#endif
  const Vec p = COARSE ? polynomial(f, 5.500874572e-2f, 2.422107565e-1f, 6.932829248e-1f, 1.f) : exp2_fraction(f);
#if defined(__AVX512F__)
  return scale_by_power(p, n);
#else
  return zero_unless(~tiny, p * power);
#endif
}

// e^x = 2^n e^r, with r = x - n ln 2 in two parts
FASTATTN_INLINE Vec exp(Vec x) {
  x = max(broadcast(-150.f), min(broadcast(150.f), x));
  const Vec n = round_even(x * broadcast(LOG2_E));
  Vec r = fma(n, broadcast(-0.693145751953125f), x);
  r = fma(n, broadcast(-1.428606765330187e-6f), r);
  // e^r = 1 + r + r² p(r)
  const Vec p = polynomial(r, 1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                           5.0000001201e-1f);
  return scale_by_power(fma(p, r * r, r) + broadcast(1.f), n);
}

// ln x; -inf for 0, NaN below. x = 2^e m with m in [√½, √2), ln m as in Cephes' logf
FASTATTN_INLINE Vec log(Vec x) {
  const Int tiny = x < broadcast(0x1p-126f);
  const Vec scaled = select(tiny, x * broadcast(0x1p23f), x);
  Int e = ((as_int(scaled) >> 23) - 126);
  Vec m = as_float((as_int(scaled) & 0x007fffff) | 0x3f000000);  // [½, 1)
  const Int low = m < broadcast(0.7071067811865476f);
  e = e + low - (tiny & 23);  // a true comparison is -1
  m = m + zero_unless(low, m) - broadcast(1.f);
  const Vec n = to_float(e), z = m * m;
  Vec y = polynomial(m, 7.0376836292e-2f, -1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
                     -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f);
  y = y * m * z;
  y = fma(n, broadcast(-2.12194440e-4f), y);
  y = fma(z, broadcast(-0.5f), y);
  y = fma(n, broadcast(0.693359375f), m + y);
  y = select(x == broadcast(__builtin_inff()), x, y);
  y = select(x == broadcast(0.f), broadcast(-__builtin_inff()), y);
  return select(x >= broadcast(0.f), y, broadcast(__builtin_nanf("")));
}

// tanh x: Cephes' polynomial near 0, where 1 - 2 / (e^2x + 1) cancels
FASTATTN_INLINE Vec tanh(Vec x) {
  const Vec size = abs(x), z = x * x;
  const Vec p = polynomial(z, -5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f,
                           -3.33332819422e-1f);
  const Vec large = broadcast(1.f) - broadcast(2.f) / (exp(size + size) + broadcast(1.f));
  const Int sign = as_int(x) & (int32_t)0x80000000;
  return select(size < broadcast(0.625f), fma(p * z, x, x), as_float(as_int(large) | sign));
}

// erf x; source: N. Juffa, "erff() with maximum error 1 ulp" (2018), NVIDIA developer forums
FASTATTN_INLINE Vec erf(Vec x) {
  const Vec t = abs(x), s = x * x;
  Vec r = polynomial(t, -1.72853470e-5f, 3.83197126e-4f);
  const Vec u = polynomial(t, -3.88396438e-3f, 2.42546219e-2f);
  r = fma(r, s, u);
  r = fma(r, t, broadcast(-1.06777877e-1f));
  r = fma(r, t, broadcast(-6.34846687e-1f));
  r = fma(r, t, broadcast(-1.28717512e-1f));
  r = fma(r, t, -t);
  const Vec large = broadcast(1.f) - exp(r);
  const Vec small = polynomial(s, -5.96761703e-4f, 4.99119423e-3f, -2.67681349e-2f, 1.12819925e-1f, -3.76125336e-1f,
                               1.28379166e-1f);
  const Int sign = as_int(x) & (int32_t)0x80000000;
  const Vec y = select(t > broadcast(0.927734375f), as_float(as_int(large) | sign), fma(small, x, x));
  return select(x == x, y, x);
}

}  // namespace fastattn::FASTATTN_ISA
