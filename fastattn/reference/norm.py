"""LayerNorm and RMSNorm in plain torch: the truth that each backend is held to.

    h = residual + dropout(x), rounded to residual's dtype;   h = x without a residual
    LayerNorm: y = (h - mean) / sqrt(var + eps) · weight + bias
    RMSNorm:   y = h / sqrt(mean of h² + eps) · (weight_offset + weight)

with mean and (biased) variance over the last dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.reference.dropout import row_dropout


def add_residual(x: Tensor, residual: Tensor | None, seed: Tensor | None, dropout_p: float, n_dims: int) -> Tensor:
    """h, of residual's dtype. The sum is rounded once; seed keys the dropout, if any."""
    if residual is None:
        return x
    dtype = torch.promote_types(torch.promote_types(x.dtype, residual.dtype), torch.float32)
    branch = x.to(dtype)
    if seed is not None:
        branch = row_dropout(branch, seed, dropout_p, n_dims)
    return (branch + residual.to(dtype)).to(residual.dtype)


def _statistics(
    h: Tensor, dims: tuple[int, ...], eps: float, rms: bool, compute_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """h - mean (RMSNorm: h), mean (RMSNorm: 0) and 1 / sqrt(…), in `compute_dtype`, by default at least fp32."""
    h = h.to(compute_dtype or torch.promote_types(h.dtype, torch.float32))
    mean = torch.zeros_like(h.sum(dims, keepdim=True)) if rms else h.mean(dims, keepdim=True)
    centred = h if rms else h - mean
    return centred, mean, torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)


def norm(
    h: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    rms: bool = False,
    weight_offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """y (…, *normalized_shape), by default of h's dtype; weight and bias (*normalized_shape) of any floating dtype."""
    centred, _, rstd = _statistics(h, tuple(range(-len(normalized_shape), 0)), eps, rms, compute_dtype)
    y = centred * rstd
    if weight is not None:
        y = y * (weight.to(y.dtype) + weight_offset)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(out_dtype or h.dtype)


def statistics(h: Tensor, n_dims: int, eps: float, rms: bool) -> Tensor:
    """(2, M): mean and 1 / sqrt(var + eps) of each row; of RMSNorm (1, M), the latter alone. At least fp32."""
    _, mean, rstd = _statistics(h, tuple(range(-n_dims, 0)), eps, rms, None)
    return torch.stack([rstd.flatten()] if rms else [mean.flatten(), rstd.flatten()])
