// e^x as the row kernels need it.
#pragma once
#include "simd_math.h"

namespace fastattn::FASTATTN_ISA {

// 2^x for x <= 0, or little above; exactly 0 for -inf, NaN for NaN
FASTATTN_INLINE Vec exp2_below(Vec x) {
  x = max(broadcast(-200.f), x);
  const Vec n = round_even(x);
  return scale_by_power(exp2_fraction(x - n), n);
}

// The same within 1e-4, less than a rounding to bf16
FASTATTN_INLINE Vec exp2_roughly(Vec x) {
  x = max(broadcast(-200.f), x);
  const Vec n = round_even(x);
  return scale_by_power(polynomial(x - n, 5.500874572e-2f, 2.422107565e-1f, 6.932829248e-1f, 1.f), n);
}

// e^d of the difference d to a maximum, as accurate as what is stored as T needs: within 2 ulp for fp32, d · 2^-24 for
// fp16, 1e-4 for bf16
FASTATTN_INLINE Vec exp_for(Vec d, float) { return exp(d); }
FASTATTN_INLINE Vec exp_for(Vec d, fp16) { return exp2_below(d * broadcast(LOG2_E)); }
FASTATTN_INLINE Vec exp_for(Vec d, bf16) { return exp2_roughly(d * broadcast(LOG2_E)); }

// The same for any d; inf where it overflows
FASTATTN_INLINE Vec exp_of(Vec d, float) { return exp(d); }
template <class T>
FASTATTN_INLINE Vec exp_of(Vec d, T) { return exp_for(min(broadcast(150.f), d), T{}); }

}  // namespace fastattn::FASTATTN_ISA
