"""Softmax and its logarithm with scale and mask, in plain torch: the truth that each backend is held to.

    y = softmax(scale · x) over the visible entries of a row;   0 (log: -inf) at each other entry

A hidden entry adds nothing to a value or a gradient, whatever x holds there, and gets gradient 0. A row with no visible
entry is 0 (log: -inf) throughout. A row whose visible entries are all -inf is NaN there, as torch's is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def visible_entries(x: Tensor, mask: Tensor | None, causal: bool, top_left: bool) -> Tensor | None:
    """Which entries are visible: bool, broadcastable to x; None: all. Causal: j <= i, or i + S_k - S_q."""
    if not causal:
        return mask
    S_q, S_k = x.shape[-2:]
    shift = 0 if top_left else S_k - S_q
    i = torch.arange(S_q, device=x.device)[:, None]
    j = torch.arange(S_k, device=x.device)[None, :]
    keep = j <= i + shift
    return keep if mask is None else keep & mask


def softmax(
    x: Tensor,
    dim: int = -1,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    causal: bool = False,
    top_left: bool = False,
    log: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """y, of x's shape and dtype; mask bool, broadcastable to x, True where visible; causal is over the last two dims.

    The arithmetic is in `compute_dtype`, by default at least fp32.
    """
    dtype = compute_dtype or torch.promote_types(x.dtype, torch.float32)
    normalise = torch.log_softmax if log else torch.softmax
    s = x.to(dtype)
    keep = visible_entries(x, mask, causal, top_left)
    if keep is None:
        return normalise(s * scale, dim).to(x.dtype)
    keep = keep.expand(x.shape)
    empty = ~keep.any(dim, keepdim=True)
    # What is hidden is replaced before any arithmetic; an empty row stays finite until its result is replaced.
    s = torch.where(keep, s, 0.0) * scale
    s = torch.where(keep | empty, s, -math.inf)
    y = torch.where(keep, normalise(s, dim), -math.inf if log else 0.0)
    return y.to(x.dtype)


def softmax_gradient(
    dy: Tensor, y: Tensor, mask: Tensor | None, dim: int, *, scale: float, causal: bool, top_left: bool, log: bool
) -> Tensor:
    """dx from dy and y, and differentiable in both; arguments as of `softmax`.

    dx = scale · y · (dy − Σ dy · y),   from log y: scale · (dy − y · Σ dy); hidden entries have no part in Σ and get 0
    """
    dy, p = _visible_part(dy, y, mask, causal, top_left, log)
    dx = dy - p * dy.sum(dim, keepdim=True) if log else p * (dy - (p * dy).sum(dim, keepdim=True))
    return (scale * dx).to(y.dtype)


def softmax_tangent(
    dx: Tensor, y: Tensor, mask: Tensor | None, dim: int, *, scale: float, causal: bool, top_left: bool, log: bool
) -> Tensor:
    """The change dy of y with a change dx of x, and differentiable in dx and y; arguments as of `softmax`.

    dy = scale · y · (dx − Σ dx · y),   of log y: scale · (dx − Σ dx · y); hidden entries have no part in Σ and get 0
    """
    dx, p = _visible_part(dx, y, mask, causal, top_left, log)
    dy = dx - (p * dx).sum(dim, keepdim=True)
    if log:
        keep = visible_entries(y, mask, causal, top_left)
        dy = dy if keep is None else torch.where(keep, dy, 0.0)
    else:
        dy = p * dy
    return (scale * dy).to(y.dtype)


def _visible_part(
    d: Tensor, y: Tensor, mask: Tensor | None, causal: bool, top_left: bool, log: bool
) -> tuple[Tensor, Tensor]:
    """A derivative with 0 at hidden entries, and the probabilities, both in at least fp32."""
    dtype = torch.promote_types(y.dtype, torch.float32)
    keep = visible_entries(y, mask, causal, top_left)
    d = d.to(dtype) if keep is None else torch.where(keep, d.to(dtype), 0.0)
    return d, y.to(dtype).exp() if log else y.to(dtype)
