"""Gated activations in plain torch: the truth that each backend is held to.

y = a(gate) · up       a(x) = x σ(x)                                       silu
                       a(x) = x Φ(x), Φ the normal distribution function   gelu
                       a(x) = x σ(2 √(2/π) (x + 0.044715 x³))              gelu_tanh
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def gated(gate: Tensor, up: Tensor, activation: str, *, compute_dtype: torch.dtype | None = None) -> Tensor:
    """y of gate's dtype; the arithmetic is in `compute_dtype`, by default at least fp32."""
    dtype = compute_dtype or torch.promote_types(gate.dtype, torch.float32)
    return (ACTIVATIONS[activation](gate.to(dtype)) * up.to(dtype)).to(gate.dtype)
