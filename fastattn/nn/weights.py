"""Attention together with the probabilities that torch.nn.MultiheadAttention returns.

A fused kernel never holds P = softmax(q kᵀ · D^-1/2 + bias); a call that asks for P pays for it here. A small P is held
of all heads at once. The average of a large one is accumulated one head at a time: memory O(N·L·S), not O(N·H·L·S), in
the backward pass too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastattn.functional import attention, softmax
from fastattn.functional._plan import is_plain

LARGE = 2**26  # numbers of P of all heads
SMALL = 2**21  # numbers of P, up to which a step with a gradient is as fast in torch


def as_fast_in_torch(numbers: int, *tensors: Tensor) -> bool:
    """True if torch's own module, which holds P too, takes no longer over P of so many numbers without a mask.

    Its evaluation is one fused call. In less than float32 it rounds P, which is then not as exact as here.
    """
    if not is_plain(*tensors) or torch._C._is_any_autocast_enabled():
        return False
    return numbers < (SMALL if torch.is_grad_enabled() else LARGE) and all(t.dtype.itemsize >= 4 for t in tensors)


def attend_with_weights(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, dropout_p: float, average: bool
) -> tuple[Tensor, Tensor]:
    """o (N, H, L, D) and P, (N, L, S) if averaged over heads, else (N, H, L, S).

    q (N, H, L, D), k and v (N, H, S, D); bias and mask (True = attend) are 4-D and broadcast to (N, H, L, S).
    P is what multiplied v: with dropout, entries are dropped and the rest scaled by 1 / (1 - dropout_p).
    """
    H = q.shape[1]
    dtype = q.dtype
    if torch._C._is_any_autocast_enabled():
        dtype = torch.softmax(q.new_empty(0), dim=0).dtype  # what autocast makes of it: torch's weights have that
    N, H, L, _ = q.shape
    if not average or torch.compiler.is_compiling() or N * H * L * k.shape[2] < LARGE:
        o, p = _attend_plainly(q, k, v, bias, mask, dropout_p)
        return o, (p.mean(1) if average else p).to(dtype)
    total = torch.zeros((), device=q.device)
    if dropout_p == 0.0:
        o = attention(q, k, v, bias=bias, mask=mask)
        for slices in _heads(q, k, bias, mask):
            total = total + _computed_again(_probabilities, slices)
        return o, (total / H).to(dtype)
    # The entries that the kernel drops are its own affair: here o and P have to come from the same ones.
    outputs = []
    for slices in _heads(q, k, v, bias, mask):
        o_h, p_h = _computed_again(partial(_attend_plainly, dropout_p=dropout_p), slices, random=True)
        outputs.append(o_h)
        total = total + p_h
    return torch.stack(outputs, dim=1), (total / H).to(dtype)


def _probabilities(q: Tensor, k: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """P (…, L, S) of q (…, L, D) and k (…, S, D), at least in fp32; 0 in a row that sees nothing."""
    s = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
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


def _heads(*tensors: Tensor | None) -> list[tuple[Tensor | None, ...]]:
    """The tensors of each head; one that broadcasts over heads is in all."""
    H = max(t.shape[1] for t in tensors if t is not None)
    return list(zip(*([None] * H if t is None else t.unbind(1) * (H // t.shape[1]) for t in tensors), strict=True))


def _computed_again(f: Callable[..., Any], tensors: tuple[Tensor | None, ...], random: bool = False) -> Any:
    """f(*tensors); the backward computes it again, so that one head's intermediates live at a time."""
    # Saved-tensor hooks, by which checkpoint works, are refused under torch.func transforms.
    if torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
        return checkpoint(f, *tensors, use_reentrant=False, preserve_rng_state=random)
    return f(*tensors)
