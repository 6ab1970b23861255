// The activations of gated layers and their slopes. Each is x · p(x), with p rising from 0 to 1.
#pragma once
#include "exponential.h"
#include "gated.h"

namespace fastattn::FASTATTN_ISA {

constexpr float ROOT_HALF = 0.7071067811865476f;
constexpr float ROOT_TAU_INVERSE = 0.3989422804014327f;  // 1 / √(2π)
constexpr float TWO_ROOT = 1.5957691216057308f;          // 2 √(2/π)
constexpr float CUBIC = float(0.044715 * 1.5957691216057308);

// σ(z)
template <class T>
FASTATTN_INLINE Vec sigmoid(Vec z) { return broadcast(1.f) / (broadcast(1.f) + exp_of(-z, T{})); }

// Φ(x), and exp(-½x²) for whom it is of use
FASTATTN_INLINE Vec normal_cdf(Vec x, Vec& bell, float) {
  bell = exp(broadcast(-0.5f) * x * x);
  return fma(broadcast(0.5f), erf(x * broadcast(ROOT_HALF)), broadcast(0.5f));
}
// Φ(-|x|) = exp(-½x²) r(|x|), r a polynomial within 1.6e-4 up to 5
FASTATTN_INLINE Vec normal_cdf(Vec x, Vec& bell, bf16) {
  const Vec size = min(broadcast(5.f), abs(x));
  const Vec r = polynomial(size, 5.79043035e-6f, -1.453153824e-4f, 1.5831056517e-3f, -9.9215628579e-3f,
                           4.02588695288e-2f, -1.141683906317e-1f, 2.412919402122e-1f, -3.972645103931e-1f,
                           4.99941647053e-1f);
  bell = exp2_roughly(broadcast(-0.5f * LOG2_E) * x * x);
  const Vec below = bell * r;
  return select(x < Vec{}, below, broadcast(1.f) - below);
}
FASTATTN_INLINE Vec normal_cdf(Vec x, Vec& bell, fp16) { return normal_cdf(x, bell, float{}); }

// z = 2 √(2/π) (x + 0.044715 x³): ½ (1 + tanh ½z) is σ(z)
FASTATTN_INLINE Vec tanh_argument(Vec x) { return x * fma(broadcast(CUBIC), x * x, broadcast(TWO_ROOT)); }

// a(x): silu x σ(x); gelu x Φ(x); gelu_tanh x σ(z). T: what is stored of the result
template <Activation ACTIVATION, class T>
FASTATTN_INLINE Vec activate(Vec x) {
  if constexpr (ACTIVATION == Activation::gelu) {
    Vec bell;
    return x * normal_cdf(x, bell, T{});
  } else {
    return x * sigmoid<T>(ACTIVATION == Activation::silu ? x : tanh_argument(x));
  }
}

// a(x) and a'(x): with a = x σ(z), a' = σ(z) + x σ(z) σ(-z) z'; with a = x Φ(x), a' = Φ(x) + x exp(-½x²) / √(2π)
template <Activation ACTIVATION, class T>
FASTATTN_INLINE Vec activate_with_slope(Vec x, Vec& slope) {
  if constexpr (ACTIVATION == Activation::gelu) {
    Vec bell;
    const Vec p = normal_cdf(x, bell, T{});
    slope = fma(x, bell * broadcast(ROOT_TAU_INVERSE), p);
    return x * p;
  } else if constexpr (ACTIVATION == Activation::silu) {
    const Vec p = sigmoid<T>(x), a = x * p;
    slope = fma(a, broadcast(1.f) - p, p);
    return a;
  } else {
    // σ(z) and σ(-z) without the cancellation of 1 - σ(z), which z' would make large
    const Vec z = tanh_argument(x), e = exp_for(-abs(z), T{}), larger = broadcast(1.f) / (broadcast(1.f) + e);
    const Int below = z < Vec{};
    const Vec p = select(below, e * larger, larger), q = select(below, larger, e * larger), a = x * p;
    const Vec near = min(broadcast(16.f), max(broadcast(-16.f), x));  // beyond, p q is 0, and x² might overflow
    const Vec turn = fma(broadcast(3.f * CUBIC), near * near, broadcast(TWO_ROOT));
    slope = fma(a * q, turn, p);
    return a;
  }
}

}  // namespace fastattn::FASTATTN_ISA
