"""From q kᵀ to the logits, and the derivative of that, in one place.

The logits are kept in base 2 up to `factor`: exp(logit) = exp2(factor · s). With nothing but a positive scale, s is
q kᵀ itself and factor = scale · log2 e, so that scaling costs no instruction of its own.
"""

import triton
import triton.language as tl

from fastattn.backends.triton.blocks.constants import LOG2_E


@triton.jit
def score_factor(score, F: tl.constexpr):
    """factor, such that exp(logit) = exp2(factor · s)."""
    if F.PRESCALED:
        return 1.0
    else:
        return score.scale * LOG2_E


@triton.jit
def apply_score(s, m, n, w, score, F: tl.constexpr):
    """s = f(q kᵀ); m and n are index tiles that broadcast to s."""
    if F.PRESCALED:
        s = s * (score.scale * LOG2_E)
    return s


@triton.jit
def score_gradient(ds, s, m, n, w, score, F: tl.constexpr):
    """d loss / d (q kᵀ · scale) from ds = d loss / d logit; the kernels multiply by scale once, at the end."""
    return ds
