"""The soft cap on logits that attention and cross entropy share."""

from __future__ import annotations

import torch
from torch import Tensor


def softcapped(s: Tensor, softcap: float | None) -> Tensor:
    """softcap · tanh(s / softcap); None: s. In s's dtype, which may have the softcap as inf or as 0."""
    if softcap is None or softcap > torch.finfo(s.dtype).max:
        return s
    if softcap < torch.finfo(s.dtype).smallest_normal * torch.finfo(s.dtype).eps:
        return torch.where(s.isnan(), s, 0.0)
    return softcap * torch.tanh(s / softcap)
