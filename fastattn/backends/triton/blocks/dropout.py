"""Dropout, keyed by the seed and an entry's place: the same in every tile size, pass and backend."""

import triton
import triton.language as tl

from fastattn.backends.triton.blocks.features import Dropout

ROUNDS: tl.constexpr = tl.constexpr(7)  # of Philox4x32; fastattn.reference.dropout says the same


@triton.jit
def dropout_factor(m, n, drop, F: tl.constexpr):
    """What a probability is multiplied by: 0 if it is dropped, else 1 / (1 - dropout_p); 1 with dropout off.

    m and n are index tiles that broadcast to the tile; an entry is kept if the first Philox word of the counter
    (n, m, h, b) is at least dropout_p · 2^32.
    """
    if F.DROPOUT:
        n, m = tl.broadcast(n, m)
        h, b = tl.zeros_like(n) + drop.h, tl.zeros_like(n) + drop.b
        word, _, _, _ = tl.philox(drop.seed, n, m, h, b, n_rounds=ROUNDS)
        return tl.where(word.to(tl.int64) >= drop.threshold, drop.scale, 0.0)
    else:
        return 1.0


@triton.jit
def row_dropout_factor(m, n, seed, threshold, scale):
    """The same (BLOCK_M, BLOCK_N) for rows m, int64, and columns n of a matrix: the counter is (n, m, m >> 32, 0).

    seed is a pointer to the int64 key; threshold = dropout_p · 2^32, rounded down; scale = 1 / (1 - dropout_p).
    """
    n, m = tl.broadcast(n[None, :], m[:, None])
    word, _, _, _ = tl.philox(
        tl.load(seed), n.to(tl.int32), m.to(tl.int32), (m >> 32).to(tl.int32), tl.zeros_like(n).to(tl.int32), ROUNDS
    )
    return tl.where(word.to(tl.int64) >= threshold, scale, 0.0)


@triton.jit
def head_dropout(drop, h):
    """The dropout of head h of the same sequence."""
    return Dropout(drop.seed, drop.b, h, drop.threshold, drop.scale)
