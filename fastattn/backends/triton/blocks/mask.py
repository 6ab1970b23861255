"""Which entries of a tile are visible, and how products keep what the others hold out of their sums."""

import triton
import triton.language as tl

from fastattn.backends.triton.blocks.constants import INF
from fastattn.backends.triton.blocks.features import Window
from fastattn.backends.triton.blocks.tile import dot


@triton.jit
def window_of(
    b, S_q, S_k, shift, left, right, MASK, stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, F: tl.constexpr
):
    """The window of sequence b. Packed, `shift` says whether the diagonal ends at the last key, 1, or not, 0."""
    if F.VARLEN:
        shift = shift * (S_k - S_q)
    mask = 0
    if F.MASK:
        mask = MASK + b.to(tl.int64) * stride_mask_b
    return Window(S_q, S_k, shift, left, right, mask, stride_mask_h, stride_mask_m, stride_mask_n)


@triton.jit
def head_window(w, h, F: tl.constexpr):
    """The window with the mask of head h."""
    mask = w.mask
    if F.MASK:
        mask += h.to(tl.int64) * w.stride_h
    return Window(w.S_q, w.S_k, w.shift, w.left, w.right, mask, w.stride_h, w.stride_m, w.stride_n)


@triton.jit
def visible(m, n, w, F: tl.constexpr):
    """Whether row m sees key n, for index tiles that broadcast: (M, 1) and (1, N), or (1, M) and (N, 1)."""
    keep = (n < w.S_k) & (m < w.S_q)
    if F.RIGHT:
        keep = keep & (n <= m + w.shift + w.right)
    if F.LEFT:
        keep = keep & (n >= m + w.shift - w.left)
    if F.MASK:
        entry = w.mask + (m.to(tl.int64) * w.stride_m + n.to(tl.int64) * w.stride_n)
        keep = keep & (tl.load(entry, mask=keep, other=0) != 0)
    return keep


@triton.jit
def hide(x, keep):
    """x with 0 where it is not visible; keep None: all is."""
    if keep is None:
        return x
    else:
        return tl.where(keep, x, 0.0)


@triton.jit
def is_finite(x):
    return tl.abs(x.to(tl.float32)) < INF


@triton.jit
def finite_or_zero(x):
    """x with NaN and ±inf replaced by 0: for a product in which a hidden entry has the factor 0, and 0 · NaN is NaN."""
    y = ()
    for i in tl.static_range(len(x)):
        y = y + (tl.where(is_finite(x[i]), x[i], 0.0).to(x[i].dtype),)
    return y


@triton.jit
def has_non_finite(x):
    """1 if a tile holds NaN or ±inf anywhere, else 0."""
    finite = tl.min(tl.min(is_finite(x[0]).to(tl.int32), 1), 0)
    for i in tl.static_range(1, len(x)):
        finite = tl.minimum(finite, tl.min(tl.min(is_finite(x[i]).to(tl.int32), 1), 0))
    return 1 - finite


@triton.jit
def add_infinity(acc, v, keep, sign, DOT: tl.constexpr):
    """acc (M, D), plus sign · inf in each row that sees, keep (M, N), a sign · inf or a NaN in v (N, D).

    A product of 2^100 and 2^100 overflows the accumulator, and that of a hidden entry is 0.
    """
    HUGE: tl.constexpr = 1.2676506002282294e30  # 2^100, exact in bfloat16
    weight = tl.where(keep, HUGE, 0.0).to(tl.bfloat16)
    out = ()
    for i in tl.static_range(len(v)):
        x = v[i].to(tl.float32)
        hit = (x == sign * INF) | (x != x)
        out = out + (dot(weight, tl.where(hit, sign * HUGE, 0.0).to(tl.bfloat16), acc[i], DOT),)
    return out
