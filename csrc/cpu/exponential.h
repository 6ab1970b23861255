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

// e^d of the difference d to a maximum: within 2 ulp for what is stored as fp32, within d · 2^-24 otherwise
FASTATTN_INLINE Vec exp_for(Vec d, float) { return exp(d); }
template <class T>
FASTATTN_INLINE Vec exp_for(Vec d, T) { return exp2_below(d * broadcast(LOG2_E)); }

}  // namespace fastattn::FASTATTN_ISA
