"""Rotary position embedding in plain torch: the truth that each backend is held to.

    y1 = x1 cos − x2 sin        y2 = x2 cos + x1 sin

for each pair (x1, x2) of the first R elements of a head, an angle for each token and pair; the rest passes through.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, *, compute_dtype: torch.dtype | None = None
) -> Tensor:
    """y like x (…, D), of its dtype; cos and sin broadcast to (…, R/2). Pairs are (2i, 2i + 1), or (i, i + R/2).

    The arithmetic is in `compute_dtype`, by default at least fp32.
    """
    dtype = compute_dtype or torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(dtype), sin.to(dtype)
    half = cos.shape[-1]
    turned = x[..., : 2 * half].to(dtype)
    x1, x2 = turned.unflatten(-1, (half, 2)).unbind(-1) if interleaved else turned.unflatten(-1, (2, half)).unbind(-2)
    y = torch.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1 if interleaved else -2).flatten(-2)
    return torch.cat([y.to(x.dtype), x[..., 2 * half :]], -1)


def rows_of_tokens(table: Tensor, S: int, position_ids: Tensor | None) -> Tensor:
    """The rows (S, R/2) or (B, S, R/2) of cos or sin (S_max, R/2); NaN for a position outside of the table."""
    if position_ids is None:
        return table[:S]
    last = table.shape[0] - 1
    rows = table[position_ids.clamp(0, last)]
    inside = (position_ids >= 0) & (position_ids <= last)
    return torch.where(inside[..., None], rows, math.nan)


def packed_positions(cu_seqlens: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """-> (T,) the position of each token within its sequence, and whether it is in one: rows may follow the last."""
    t = torch.arange(T, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens.long(), t, right=True) - 1
    return t - cu_seqlens[sequence.clamp(min=0)], sequence < cu_seqlens.shape[0] - 1
