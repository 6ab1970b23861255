"""The activations of gated layers and their slopes, in fp32. Each is x · p(x), with p rising from 0 to 1."""

import triton
import triton.language as tl

ROOT_HALF: tl.constexpr = tl.constexpr(0.7071067811865476)
ROOT_TAU_INVERSE: tl.constexpr = tl.constexpr(0.3989422804014327)  # 1 / √(2π)
TWO_ROOT: tl.constexpr = tl.constexpr(1.5957691216057308)  # 2 √(2/π)
CUBIC: tl.constexpr = tl.constexpr(0.044715 * 1.5957691216057308)


@triton.jit
def _times_sigmoid(x, z):
    """x σ(z), σ(z) and σ(-z) = 1 - σ(z) without the cancellation; nothing overflows."""
    e = tl.exp(-tl.abs(z))
    near_1, near_0 = 1.0 / (1.0 + e), e / (1.0 + e)
    below = z < 0.0
    return tl.where(below, x * e, x) / (1.0 + e), tl.where(below, near_0, near_1), tl.where(below, near_1, near_0)


@triton.jit
def _normal_cdf(x):
    return 0.5 + 0.5 * tl.erf(x * ROOT_HALF)


@triton.jit
def _tanh_argument(x):
    """z = 2 √(2/π) (x + 0.044715 x³): ½ (1 + tanh ½z) is σ(z)."""
    return x * (TWO_ROOT + CUBIC * x * x)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """a(x): silu x σ(x); gelu x Φ(x); gelu_tanh x σ(z), with the z of `_tanh_argument`."""
    if ACTIVATION == "gelu":
        return x * _normal_cdf(x)
    else:
        a, _, _ = _times_sigmoid(x, x if ACTIVATION == "silu" else _tanh_argument(x))
        return a


@triton.jit
def activate_with_slope(x, ACTIVATION: tl.constexpr):
    """a(x) and a'(x): with a = x σ(z), a' = σ(z) + x σ(z) σ(-z) z'; with a = x Φ(x), a' = Φ(x) + x exp(-½x²) / √(2π).

    At ±inf the slope is NaN, as torch's is; at any finite x it is finite.
    """
    if ACTIVATION == "gelu":
        p = _normal_cdf(x)
        a, slope = x * p, p + x * (tl.exp(-0.5 * x * x) * ROOT_TAU_INVERSE)
    elif ACTIVATION == "silu":
        a, p, q = _times_sigmoid(x, x)
        slope = p + a * q
    else:
        a, p, q = _times_sigmoid(x, _tanh_argument(x))
        near = tl.minimum(tl.maximum(x, -16.0), 16.0)  # beyond, p · q is 0 in fp32, and x² might overflow
        slope = p + a * q * (TWO_ROOT + 3.0 * CUBIC * near * near)
    return a, slope
