"""From q kᵀ to the logits, and the derivative of that, in one place.

    qkᵀ · scale → softcap · tanh(· / softcap) → + bias → - slope · |i + S_k - S_q - j|

With nothing but a positive scale, s is q kᵀ itself and logit = scale · s, which costs no instruction of its own; else s
is the logit. A maximum or lse is subtracted before a multiplication by log2 e, which would overflow for large logits.
"""

import triton
import triton.language as tl

from fastattn.backends.triton.blocks.constants import LOG2_E
from fastattn.backends.triton.blocks.features import Score, Scores


@triton.jit
def scores_of(
    b, B, scale, softcap, SLOPES, stride_slope_b, stride_slope_h,
    BIAS, stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n, F: tl.constexpr,
):  # fmt: skip
    """The score functions of sequence b; packed rows after the last of B sequences use none."""
    slopes = 0
    bias = 0
    if F.ALIBI:
        slopes = SLOPES + tl.minimum(b, B - 1) * stride_slope_b
    if F.BIAS:
        bias = BIAS + b.to(tl.int64) * stride_bias_b
    return Scores(scale, softcap, slopes, stride_slope_h, bias, stride_bias_h, stride_bias_m, stride_bias_n)


@triton.jit
def head_score(scores, h, F: tl.constexpr):
    """The score function of head h."""
    slope = 0.0
    bias = scores.bias
    if F.ALIBI:
        slope = tl.load(scores.slopes + h * scores.stride_slope).to(tl.float32)
    if F.BIAS:
        bias += h.to(tl.int64) * scores.stride_h
    return Score(scores.scale, scores.softcap, slope, bias, scores.stride_m, scores.stride_n)


@triton.jit
def scaled_score(score, factor):
    """The score function of q kᵀ that is still to be multiplied by a factor."""
    return Score(score.scale * factor, score.softcap, score.slope, score.bias, score.stride_m, score.stride_n)


@triton.jit
def logit_scale(score, F: tl.constexpr):
    """logit / s."""
    if F.PRESCALED:
        return 1.0
    else:
        return score.scale


@triton.jit
def tanh(x):
    """To the last bits for small x too, where 1 - 2 / (exp 2x + 1) cancels; the polynomial is Cephes' tanhf."""
    z = x * x
    small = z * -5.70498872745e-3 + 2.06390887954e-2
    small = small * z - 5.37397155531e-2
    small = small * z + 1.33314422036e-1
    small = small * z - 3.33332819422e-1
    large = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * (2.0 * LOG2_E)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, x + x * z * small, tl.where(x < 0.0, -large, large))


@triton.jit
def distance(m, n, w):
    """|i + S_k - S_q - j|, what ALiBi multiplies by the slope, as fp32."""
    return tl.abs(m + (w.S_k - w.S_q) - n).to(tl.float32)


@triton.jit
def load_bias(m, n, w, score, MASKED: tl.constexpr):
    """The bias of rows m and keys n; rows beyond S_q repeat the last one, keys beyond S_k read 0."""
    row = tl.minimum(m, w.S_q - 1).to(tl.int64) * score.stride_m
    ptr = score.bias + (row + n.to(tl.int64) * score.stride_n)
    if MASKED:
        return tl.load(ptr, mask=(n < w.S_k) & (m < w.S_q), other=0.0).to(tl.float32)
    else:
        return tl.load(ptr).to(tl.float32)


@triton.jit
def apply_score(s, m, n, w, score, MASKED: tl.constexpr, F: tl.constexpr):
    """q kᵀ -> (s, its derivative by q kᵀ · scale); m and n are index tiles that broadcast to s.

    The derivative is 1 but for softcap: of c · tanh(x / c) it is 1 - tanh²(x / c).
    """
    derivative = 1.0
    if F.SOFTCAP:
        t = tanh(s * (score.scale / score.softcap))
        derivative = 1.0 - t * t
        s = t * score.softcap
    elif F.PRESCALED:
        s = s * score.scale
    if F.BIAS:
        s += load_bias(m, n, w, score, MASKED)
    if F.ALIBI:
        s -= score.slope * distance(m, n, w)
    return s, derivative
