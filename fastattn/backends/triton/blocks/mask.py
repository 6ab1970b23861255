"""Which entries of a tile are visible, and products in which the others add nothing."""

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
def finite_or_zero(x):
    """x with NaN and ±inf replaced by 0: the operand of a product whose other factor is 0 or NaN there already."""
    return tl.where(tl.abs(x.to(tl.float32)) < INF, x, 0.0).to(x.dtype)


@triton.jit
def dot_visible(p, v, keep, acc, DOT: tl.constexpr):
    """acc + p v, in which a hidden key (p = 0) adds nothing even if its v is not finite.

    p (M, N), v (N, D), keep (M, N). A value that is not finite still reaches each row that sees its key, as inf or
    NaN: 2^100 · 2^100 overflows the accumulator, and inf - inf is NaN.
    """
    x = v.to(tl.float32)
    finite = tl.abs(x) < INF
    if tl.min(tl.min(finite.to(tl.int32), 1), 0) == 1:
        acc = dot(p, v, acc, DOT)
    else:
        huge = 1.2676506002282294e30  # 2^100, exact in bfloat16
        seen = tl.where(keep, huge, 0.0).to(tl.bfloat16)
        up = tl.where((x == INF) | (x != x), huge, 0.0).to(tl.bfloat16)
        down = tl.where((x == -INF) | (x != x), -huge, 0.0).to(tl.bfloat16)
        acc = dot(p, tl.where(finite, v, 0.0).to(v.dtype), acc, DOT)
        acc = dot(seen, up, acc, DOT)
        acc = dot(seen, down, acc, DOT)
    return acc
