// The activations of gated layers and their slopes. Each is x · p(x), with p rising from 0 to 1.
#pragma once
#include "exponential.h"
#include "gated.h"

namespace fastattn::FASTATTN_ISA {

constexpr float ROOT_HALF = 0.7071067811865476f;
constexpr float ROOT_TAU_INVERSE = 0.3989422804014327f;  // 1 / √(2π)
constexpr float TWO_ROOT = 1.5957691216057308f;          // 2 √(2/π)
constexpr float CUBIC = float(0.044715 * 1.5957691216057308);

struct Sigmoid {
  Vec times_x, near_z, near_minus_z;  // x σ(z), σ(z) and σ(-z) = 1 - σ(z) without the cancellation
};

// Nothing overflows. T: what is stored of the result
template <class T>
FASTATTN_INLINE Sigmoid times_sigmoid(Vec x, Vec z) {
  const Vec e = exp_for(-abs(z), T{}), near_1 = broadcast(1.f) / (broadcast(1.f) + e), near_0 = e * near_1;
  const Int below = z < Vec{};
  const Vec p = select(below, near_0, near_1), q = select(below, near_1, near_0);
  return {select(below, x * e, x) * near_1, select(z == z, p, z), select(z == z, q, z)};
}

FASTATTN_INLINE Vec normal_cdf(Vec x) { return fma(broadcast(0.5f), erf(x * broadcast(ROOT_HALF)), broadcast(0.5f)); }

// z = 2 √(2/π) (x + 0.044715 x³): ½ (1 + tanh ½z) is σ(z)
FASTATTN_INLINE Vec tanh_argument(Vec x) { return x * fma(broadcast(CUBIC), x * x, broadcast(TWO_ROOT)); }

// a(x): silu x σ(x); gelu x Φ(x); gelu_tanh x σ(z)
template <Activation ACTIVATION, class T>
FASTATTN_INLINE Vec activate(Vec x) {
  if constexpr (ACTIVATION == Activation::gelu) {
    return x * normal_cdf(x);
  } else {
    return times_sigmoid<T>(x, ACTIVATION == Activation::silu ? x : tanh_argument(x)).times_x;
  }
}

// a(x) and a'(x): with a = x σ(z), a' = σ(z) + x σ(z) σ(-z) z'; with a = x Φ(x), a' = Φ(x) + x exp(-½x²) / √(2π)
template <Activation ACTIVATION, class T>
FASTATTN_INLINE Vec activate_with_slope(Vec x, Vec& slope) {
  if constexpr (ACTIVATION == Activation::gelu) {
    const Vec p = normal_cdf(x), density = exp_for(broadcast(-0.5f) * x * x, T{}) * broadcast(ROOT_TAU_INVERSE);
    slope = fma(x, density, p);
    return x * p;
  } else if constexpr (ACTIVATION == Activation::silu) {
    const Sigmoid s = times_sigmoid<T>(x, x);
    slope = fma(s.times_x, s.near_minus_z, s.near_z);
    return s.times_x;
  } else {
    const Sigmoid s = times_sigmoid<T>(x, tanh_argument(x));
    const Vec near = min(broadcast(16.f), max(broadcast(-16.f), x));  // beyond, p · q is 0, and x² might overflow
    const Vec turn = fma(broadcast(3.f * CUBIC), near * near, broadcast(TWO_ROOT));
    slope = fma(s.times_x * s.near_minus_z, turn, s.near_z);
    return s.times_x;
  }
}

}  // namespace fastattn::FASTATTN_ISA
