"""Which rows a program works on: a batch of equal lengths, or sequences packed one after the other.

Packed tensors are (1, H, T, D), and sequence b is their rows cu_seqlens[b] … cu_seqlens[b + 1] - 1. Rows after the last
sequence count as one more, which has no partner on the other side: its outputs are those of rows that see nothing.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Rows(NamedTuple):
    """One sequence's rows in a tensor (B, H, S, D)."""

    batch: tl.tensor  # index into dimension 0, 64 bits
    start: tl.tensor  # first row, 64 bits
    length: tl.tensor


@triton.jit
def locate(pid, CU, B, H, S, BLOCK: tl.constexpr, REVERSED: tl.constexpr, F: tl.constexpr):
    """Program -> (b, h, tile of sequence b); neighbours share a head.

    Packed, tile slot cu_seqlens[b] // BLOCK + b is the first of sequence b, which has at least as many slots as it has
    tiles; so no program needs to know the lengths before it, and the grid depends on T and B alone.
    """
    if F.VARLEN:
        n_slots = S // BLOCK + B + 1
        slot = pid % n_slots
        if REVERSED:
            slot = n_slots - 1 - slot
        b = 0
        last = B
        while b < last:  # the last sequence that starts at or before the slot
            middle = (b + last + 1) // 2
            starts_before = tl.load(CU + middle) // BLOCK + middle <= slot
            b = tl.where(starts_before, middle, b)
            last = tl.where(starts_before, last, middle - 1)
        return b, pid // n_slots, slot - (tl.load(CU + b) // BLOCK + b)
    else:
        n_tiles = tl.cdiv(S, BLOCK)
        bh = pid // n_tiles
        tile = pid % n_tiles
        if REVERSED:
            tile = n_tiles - 1 - tile
        return bh // H, bh % H, tile


@triton.jit
def sequence(b, CU, S, F: tl.constexpr):
    """The rows of sequence b."""
    if F.VARLEN:
        start = tl.load(CU + b)
        return Rows(tl.zeros([], tl.int64), start.to(tl.int64), tl.load(CU + b + 1) - start)
    else:
        return Rows(b.to(tl.int64), tl.zeros([], tl.int64), S)


@triton.jit
def own_rows(b, CU, B, S, F: tl.constexpr):
    """The same on the side that `locate` ran over, where what is left of T is sequence B."""
    if F.VARLEN:
        start = tl.load(CU + b)
        stop = tl.load(CU + b + 1, mask=b < B, other=S)
        return Rows(tl.zeros([], tl.int64), start.to(tl.int64), stop - start)
    else:
        return sequence(b, CU, S, F)


@triton.jit
def other_rows(b, CU, B, S, F: tl.constexpr):
    """The same on the other side, where sequence B has no rows."""
    if F.VARLEN:
        start = tl.load(CU + b)
        stop = tl.load(CU + b + 1, mask=b < B, other=0)
        return Rows(tl.zeros([], tl.int64), start.to(tl.int64), tl.where(b < B, stop - start, 0))
    else:
        return sequence(b, CU, S, F)


@triton.jit
def head_start(rows, h, H, S):
    """Where head h of the sequence at `rows` begins in a contiguous (B, H, S)."""
    return (rows.batch.to(tl.int32) * H + h).to(tl.int64) * S + rows.start
