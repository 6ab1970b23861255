"""Cross entropy of logits with classes or class probabilities, in plain torch: the truth each backend is held to.

    s = softcap · tanh(x / softcap)   or x           log p_j = s_j - lse,  lse = log Σ exp s_l
    loss of a row = -Σ_j q_j log p_j + z_loss · lse²

    q_j = (1 - ε) w_t [j = t] + ε / V · w_j          for a class t of V, w = 1 without class weights
    q_j = w_j ((1 - ε) y_j + ε / V)                  for probabilities y

A row whose class is `ignore_index` has loss 0 and no gradient, whatever its logits hold; one whose class does not exist
has a loss and a gradient of NaN. The mean divides by Σ w_t over the rows that count, for
probabilities by their number.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.reference.softcap import softcapped


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    loss_dtype: torch.dtype | None = None,
) -> Tensor:
    """The loss; logits (V,), (N, V) or (N, V, d1, …); target the same without V, or floating-point and of that shape.

    The arithmetic is in at least fp32. The loss has the dtype of the logits unless `loss_dtype` says otherwise.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    x = logits.movedim(min(1, logits.dim() - 1), -1).to(dtype)  # (…, V)
    V = x.shape[-1]
    w = None if weight is None else weight.to(dtype)  # (V,)
    counted = None
    if not target.is_floating_point():
        target = target.long()
        counted = target != ignore_index  # (…)
        x = torch.where(counted[..., None], x, 0.0)
    s = softcapped(x, softcap)
    log_p = torch.log_softmax(s, -1)

    if counted is None:
        q = target.movedim(min(1, target.dim() - 1), -1).to(dtype) * (1.0 - label_smoothing) + label_smoothing / max(
            V, 1
        )
        losses = -((q if w is None else q * w) * log_p).sum(-1)
        divisor: Tensor | float = math.nan if logits.numel() == 0 else logits.numel() // V
    else:
        exists = (target >= 0) & (target < V)
        t = torch.where(exists & counted, target, 0)
        w_t = torch.ones_like(losses_of(log_p, t)) if w is None else w[t]
        losses = (1.0 - label_smoothing) * w_t * losses_of(log_p, t)
        if label_smoothing:
            losses = losses - label_smoothing / V * (log_p if w is None else log_p * w).sum(-1)
        divisor = torch.where(counted, w_t, 0.0).sum()
    if z_loss:
        losses = losses + z_loss * torch.logsumexp(s, -1).square()
    if counted is not None:
        losses = torch.where(counted, losses * torch.where(exists, 1.0, math.nan), 0.0)

    if reduction == "mean":
        losses = losses.sum() / divisor
    elif reduction == "sum":
        losses = losses.sum()
    return losses.to(loss_dtype or logits.dtype)


def losses_of(log_p: Tensor, t: Tensor) -> Tensor:
    """-log p_t; log_p (…, V), t (…)."""
    return -log_p.gather(-1, t[..., None]).squeeze(-1)
