"""Attention together with the probabilities that torch.nn.MultiheadAttention returns.

A fused kernel never holds P = softmax(q kᵀ · D^-1/2 + bias), so that who asks for it pays for it here. The average
over heads is accumulated one head at a time: memory O(N·L·S), not O(N·H·L·S), in the backward pass too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastattn.functional import attention, softmax


def attend_with_weights(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, dropout_p: float, average: bool
) -> tuple[Tensor, Tensor]:
    """o (N, H, L, D) and P, (N, L, S) if averaged over heads, else (N, H, L, S).

    q (N, H, L, D), k and v (N, H, S, D); bias and mask (True = attend) are 4-D and broadcast to (N, H, L, S).
    P is what multiplied v: with dropout, entries are dropped and the rest scaled by 1 / (1 - dropout_p).
    """
    H = q.shape[1]
    dtype = torch.softmax(q.new_empty(0), dim=0).dtype  # q's, or what autocast makes of it: torch's weights have that
    if not average:
        o, p = _attend_plainly(q, k, v, bias, mask, dropout_p)
        return o, p.to(dtype)
    if dropout_p == 0.0:
        o = attention(q, k, v, bias=bias, mask=mask)
        total = reduce(torch.add, _head_by_head(_probabilities, q, k, bias, mask))
        return o, (total / H).to(dtype)
    # The entries that the kernel drops are its own affair: here o and P have to come from the same ones.
    outputs, total = [], torch.zeros((), device=q.device)
    for o_h, p_h in _head_by_head(partial(_attend_plainly, dropout_p=dropout_p), q, k, v, bias, mask, random=True):
        outputs.append(o_h)
        total = total + p_h
    return torch.stack(outputs, dim=1), (total / H).to(dtype)


def _probabilities(q: Tensor, k: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """P (…, L, S) of q (…, L, D) and k (…, S, D), at least in fp32; 0 in a row that sees nothing."""
    s = (q * q.shape[-1] ** -0.5) @ k.mT
    s = s.to(torch.promote_types(s.dtype, torch.float32))
    if bias is not None:
        s = s + bias
        visible = s != float("-inf")
        mask = visible if mask is None else visible & mask
    return softmax(s, mask=mask)


def _attend_plainly(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """o (…, L, D) and P (…, L, S) after dropout."""
    p = F.dropout(_probabilities(q, k, bias, mask), dropout_p)
    return p.to(v.dtype) @ v, p


def _head_by_head(f: Callable[..., Any], *tensors: Tensor | None, random: bool = False) -> Iterator[Any]:
    """f(*tensors[:, h]) for each head h; backward recomputes f, so that one head's intermediates live at a time."""
    H = next(t.shape[1] for t in tensors if t is not None)
    heads = [[None] * H if t is None else t.unbind(1) * (H // t.shape[1]) for t in tensors]
    # Saved-tensor hooks, by which checkpoint works, are refused under torch.func transforms.
    recompute = torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()
    for slices in zip(*heads, strict=True):
        if recompute:
            yield checkpoint(f, *slices, use_reentrant=False, preserve_rng_state=random)
        else:
            yield f(*slices)
