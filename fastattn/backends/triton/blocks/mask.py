"""Which entries of a tile are visible, and how products keep what the others hold out of their sums."""

import triton
import triton.language as tl

from fastattn.backends.triton.blocks.constants import INF
from fastattn.backends.triton.blocks.tile import dot


@triton.jit
def visible(m, n, w, F: tl.constexpr):
    """Whether row m sees key n, for index tiles that broadcast: (M, 1) and (1, N), or (1, M) and (N, 1)."""
    keep = (n < w.S_k) & (m < w.S_q)
    if F.RIGHT:
        keep = keep & (n <= m + w.shift + w.right)
    if F.LEFT:
        keep = keep & (n >= m + w.shift - w.left)
    return keep


@triton.jit
def is_finite(x):
    return tl.abs(x.to(tl.float32)) < INF


@triton.jit
def finite_or_zero(x):
    """x with NaN and ±inf replaced by 0: for a product in which a hidden entry has the factor 0, and 0 · NaN is NaN."""
    return tl.where(is_finite(x), x, 0.0).to(x.dtype)


@triton.jit
def has_non_finite(x):
    """1 if a tile holds NaN or ±inf anywhere, else 0."""
    return 1 - tl.min(tl.min(is_finite(x).to(tl.int32), 1), 0)


@triton.jit
def add_infinity(acc, v, keep, sign, DOT: tl.constexpr):
    """acc (M, D), plus sign · inf in each row that sees, keep (M, N), a sign · inf or a NaN in v (N, D).

    A product of 2^100 and 2^100 overflows the accumulator, and that of a hidden entry is 0.
    """
    HUGE: tl.constexpr = 1.2676506002282294e30  # 2^100, exact in bfloat16
    x = v.to(tl.float32)
    hit = (x == sign * INF) | (x != x)
    return dot(tl.where(keep, HUGE, 0.0).to(tl.bfloat16), tl.where(hit, sign * HUGE, 0.0).to(tl.bfloat16), acc, DOT)
