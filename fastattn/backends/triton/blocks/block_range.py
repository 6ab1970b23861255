"""Which tiles a program visits, and which of them need a mask.

`key_range` and `query_range` return n_min <= n_left <= n_right <= n_max: tiles in [n_left, n_right) are visible as a
whole, those in [n_min, n_left) and [n_right, n_max) in part, all others not at all and are never loaded. Numerators are
clamped at 0 before a division, because integer division truncates towards zero.

With a bool mask, the kernel of mask_tiles.py has listed both kinds before: the numbers are then places in a list.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Spans(NamedTuple):
    """The tiles of one program: [min, left) and [right, max) in part, [whole, right) as a whole."""

    min: tl.tensor
    left: tl.tensor
    whole: tl.tensor
    right: tl.tensor
    max: tl.tensor
    tiles: tl.tensor  # list of tile indices, or 0: the numbers are the indices


@triton.jit
def key_range(m_block, w, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, F: tl.constexpr):
    """Key tiles of the rows m_lo … m_hi - 1 of query tile `m_block`."""
    m_lo = m_block * BLOCK_M
    m_hi = tl.minimum(m_lo + BLOCK_M, w.S_q)
    n_min = 0
    n_left = 0
    n_right = w.S_k // BLOCK_N
    n_max = tl.cdiv(w.S_k, BLOCK_N)
    if F.VARLEN:  # a slot that is left over has no rows, and reads nothing
        n_max = tl.where(m_lo < w.S_q, n_max, 0)
    if F.RIGHT:  # the last key a row sees is i + shift + right
        n_right = tl.minimum(n_right, tl.maximum(m_lo + w.shift + w.right + 1, 0) // BLOCK_N)
        n_max = tl.minimum(n_max, tl.cdiv(tl.maximum(m_hi + w.shift + w.right, 0), BLOCK_N))
    if F.LEFT:  # the first is i + shift - left
        n_min = tl.minimum(tl.maximum(m_lo + w.shift - w.left, 0) // BLOCK_N, n_max)
        n_left = tl.cdiv(tl.maximum(m_hi - 1 + w.shift - w.left, 0), BLOCK_N)
    n_left = tl.minimum(tl.maximum(n_left, n_min), n_max)
    n_right = tl.minimum(tl.maximum(n_right, n_left), n_max)
    return Spans(n_min, n_left, n_left, n_right, n_max, 0)


@triton.jit
def query_range(n_block, w, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, F: tl.constexpr):
    """Query tiles that see the keys n_lo … n_hi - 1 of key tile `n_block`.

    Rows from S_q on need no mask here: their lse reads as +inf, which makes every probability 0.
    """
    n_lo = n_block * BLOCK_N
    n_hi = tl.minimum(n_lo + BLOCK_N, w.S_k)
    m_min = 0
    m_left = 0
    m_max = tl.cdiv(w.S_q, BLOCK_M)
    m_right = m_max
    if F.LEFT:  # the last row that sees key j is j - shift + left
        m_right = tl.minimum(m_right, tl.maximum(n_lo - w.shift + w.left + 1, 0) // BLOCK_M)
        m_max = tl.minimum(m_max, tl.cdiv(tl.maximum(n_hi - w.shift + w.left, 0), BLOCK_M))
    if F.RIGHT:  # the first is j - shift - right
        m_min = tl.minimum(tl.maximum(n_lo - w.shift - w.right, 0) // BLOCK_M, m_max)
        m_left = tl.cdiv(tl.maximum(n_hi - 1 - w.shift - w.right, 0), BLOCK_M)
    m_left = tl.minimum(tl.maximum(m_left, m_min), m_max)
    m_right = tl.minimum(tl.maximum(m_right, m_left), m_max)
    return Spans(m_min, m_left, m_left, m_right, m_max, 0)


@triton.jit
def listed(TILES, n_across, stride_tiles_b, stride_tiles_h, b, h, block, CU, BLOCK: tl.constexpr, F: tl.constexpr):
    """The spans of one strip of `mask_tiles_kernel`: n_partial, n_whole, then tiles, those in part from the front and
    whole ones from the back."""
    if F.VARLEN:
        block += tl.load(CU + b) // BLOCK + b
    tiles = TILES + (b * stride_tiles_b + h * stride_tiles_h + block).to(tl.int64) * (2 + n_across)
    n_partial = tl.load(tiles)
    n_whole = tl.load(tiles + 1)
    return Spans(0, n_partial, n_across - n_whole, n_across, n_across, tiles + 2)


@triton.jit
def key_spans(
    m_block, w, TILES, n_across, stride_tiles_b, stride_tiles_h, b, h, CU_SEQLENS_Q,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """The key tiles of query tile m_block, from the list of the mask or from the window alone."""
    if F.MASK:
        return listed(TILES, n_across, stride_tiles_b, stride_tiles_h, b, h, m_block, CU_SEQLENS_Q, BLOCK_M, F)
    else:
        return key_range(m_block, w, BLOCK_M, BLOCK_N, F)


@triton.jit
def tile_at(i, spans, F: tl.constexpr):
    """The tile at place i of a span."""
    if F.MASK:
        return tl.load(spans.tiles + i)
    else:
        return i
