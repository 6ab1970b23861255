"""LayerNorm in plain torch: the truth that each backend is held to.

    y = (x - mean) / sqrt(var + eps) · weight + bias

with mean and (biased) variance over the last dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """y (…, *normalized_shape) in x's dtype; weight and bias (*normalized_shape) of any floating dtype.

    The arithmetic is in `compute_dtype`, by default at least fp32.
    """
    dtype = compute_dtype or torch.promote_types(x.dtype, torch.float32)
    dims = tuple(range(-len(normalized_shape), 0))
    centred = x.to(dtype) - x.to(dtype).mean(dims, keepdim=True)
    var = centred.square().mean(dims, keepdim=True)
    y = centred * torch.rsqrt(var + eps)
    if weight is not None:
        y = y * weight.to(dtype)
    if bias is not None:
        y = y + bias.to(dtype)
    return y.to(x.dtype)
