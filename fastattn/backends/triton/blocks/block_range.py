"""Which tiles a program visits, and which of them need a mask.

Both functions return n_min <= n_left <= n_right <= n_max: tiles in [n_left, n_right) are visible as a whole, those in
[n_min, n_left) and [n_right, n_max) in part, all others not at all and are never loaded. Numerators are clamped at 0
before a division, because integer division truncates towards zero.
"""

import triton
import triton.language as tl


@triton.jit
def key_range(m_block, w, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, F: tl.constexpr):
    """Key tiles of the rows m_lo … m_hi - 1 of query tile `m_block`."""
    m_lo = m_block * BLOCK_M
    m_hi = tl.minimum(m_lo + BLOCK_M, w.S_q)
    n_min = 0
    n_left = 0
    n_right = w.S_k // BLOCK_N
    n_max = tl.cdiv(w.S_k, BLOCK_N)
    if F.RIGHT:  # the last key a row sees is i + shift + right
        n_right = tl.minimum(n_right, tl.maximum(m_lo + w.shift + w.right + 1, 0) // BLOCK_N)
        n_max = tl.minimum(n_max, tl.cdiv(tl.maximum(m_hi + w.shift + w.right, 0), BLOCK_N))
    if F.LEFT:  # the first is i + shift - left
        n_min = tl.minimum(tl.maximum(m_lo + w.shift - w.left, 0) // BLOCK_N, n_max)
        n_left = tl.cdiv(tl.maximum(m_hi - 1 + w.shift - w.left, 0), BLOCK_N)
    n_left = tl.minimum(tl.maximum(n_left, n_min), n_max)
    n_right = tl.minimum(tl.maximum(n_right, n_left), n_max)
    return n_min, n_left, n_right, n_max


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
    return m_min, m_left, m_right, m_max
