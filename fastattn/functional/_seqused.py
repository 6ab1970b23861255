"""Packed sequences with unused rows between them, for `seqused` of `varlen_attention`.

Unused rows go behind the last sequence, where every backend leaves rows alone, and the results back to where the rows
were. That costs a copy of q, k, v and o, and no look at a length.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Order(NamedTuple):
    """How rows (T, …) are taken together: row i goes from `source[i]`, and back from `place[i]`."""

    source: Tensor  # (T,) int64
    place: Tensor  # (T,) int64, its inverse
    cu_seqlens: Tensor  # (B + 1,) int32, of the rows that are used


def order_of(cu_seqlens: Tensor, seqused: Tensor, T: int) -> Order:
    """Put the used rows first, sequence after sequence, then the others."""
    B, t = seqused.shape[0], torch.arange(T, device=cu_seqlens.device)
    b = torch.searchsorted(cu_seqlens, t.to(cu_seqlens.dtype), right=True) - 1  # B for rows after the last sequence
    n = torch.cat((seqused.long(), seqused.new_zeros(1).long()))[b]  # nothing of those is used
    used = (t - cu_seqlens[b] < n) & (b < B)
    source = torch.argsort((~used).to(torch.uint8), stable=True)
    place = torch.empty_like(source).scatter_(0, source, t)
    return Order(source, place, torch.cat((seqused.new_zeros(1), seqused.cumsum(0))).int())


def taken(t: Tensor, rows: Tensor, dim: int = 0) -> Tensor:
    """Return the rows of t in this order."""
    if t.dtype.itemsize == 1:  # torch does not index 8-bit floating-point numbers
        return t.view(torch.uint8).index_select(dim, rows).view(t.dtype)
    return t.index_select(dim, rows)
