"""Positions added to embeddings: fixed sinusoids, or a learned table."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.errors import ArgumentError


class SinusoidalPositionalEncoding(nn.Module):
    """Add fixed sines and cosines of the position to each embedding, then apply dropout.

    ``PE[t, 2i] = sin(t / 10000^(2i/d_model))``, ``PE[t, 2i+1] = cos(t / 10000^(2i/d_model))``. An odd d_model ends
    in a sine. The table is fp32 whatever the module's dtype, is cast to x's dtype when added, and is not in the
    state dict.

    Args:
        d_model: width of an embedding.
        max_len: positions in the table.
        dropout: probability of zeroing an element of the sum, in training.
        batch_first: x is (N, S, d_model) if True, (S, N, d_model) if False. An unbatched (S, d_model) is fine too.
        device: of the table.

    Returns of a call: ``module(x, offset=0)`` is x with positions offset … offset + S - 1 added, in x's shape and
    dtype; in decoding, ``offset`` is the number of tokens already in the cache.

    Raises:
        ArgumentError: d_model or max_len is below 1, or a call whose x is no such tensor or needs a position outside
            the table.

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.5.

    >>> encode = SinusoidalPositionalEncoding(d_model=64)
    >>> encode(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])
    """

    table: Tensor

    def __init__(
        self,
        d_model: int,
        max_len: int = 5000,
        dropout: float = 0.0,
        batch_first: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        _check_table(max_len, d_model)
        self.d_model, self.max_len, self.dropout, self.batch_first = d_model, max_len, dropout, batch_first
        self.register_buffer("table", _sinusoids(max_len, d_model, device), persistent=False)

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        return F.dropout(x + _rows(self.table, x, offset, self.batch_first), self.dropout, self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SinusoidalPositionalEncoding:
        """Keep the table exact: .to(dtype) would round it, and to_empty() from the meta device would not fill it."""
        before = self.table
        super()._apply(fn, recurse)
        if before.is_meta or self.table.dtype != before.dtype:
            self.table = _sinusoids(self.max_len, self.d_model, self.table.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.d_model}, max_len={self.max_len}, dropout={self.dropout}, batch_first={self.batch_first}"


class LearnedPositionalEncoding(nn.Module):
    """Add a learned vector per position to each embedding, then apply dropout.

    ``y[t] = x[t] + weight[t]``, weight (max_len, d_model), drawn from N(0, 0.02²).

    Args:
        max_len: positions that can be encoded.
        d_model: width of an embedding.
        dropout: probability of zeroing an element of the sum, in training.
        batch_first: x is (N, S, d_model) if True, (S, N, d_model) if False. An unbatched (S, d_model) is fine too.
        device, dtype: of the weight.

    Returns of a call: ``module(x, offset=0)`` is x with positions offset … offset + S - 1 added, in x's shape and
    dtype; in decoding, ``offset`` is the number of tokens already in the cache.

    Raises:
        ArgumentError: d_model or max_len is below 1, or a call whose x is no such tensor or needs a position outside
            the table.

    Source: GPT-2 and BERT. The one key of the state dict is ``weight``, as of the `torch.nn.Embedding` they use.

    >>> encode = LearnedPositionalEncoding(max_len=512, d_model=64)
    >>> encode(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        max_len: int,
        d_model: int,
        dropout: float = 0.0,
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_table(max_len, d_model)
        self.d_model, self.max_len, self.dropout, self.batch_first = d_model, max_len, dropout, batch_first
        self.weight = nn.Parameter(torch.empty(max_len, d_model, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        return F.dropout(x + _rows(self.weight, x, offset, self.batch_first), self.dropout, self.training)

    def extra_repr(self) -> str:
        return f"{self.max_len}, {self.d_model}, dropout={self.dropout}, batch_first={self.batch_first}"


def _sinusoids(max_len: int, d_model: int, device: torch.device | str | None = None) -> Tensor:
    """PE (max_len, d_model) in fp32, rounded once from float64."""
    t = torch.arange(max_len, dtype=torch.float64, device="cpu")[:, None]
    i = torch.arange(0, d_model, 2, dtype=torch.float64, device="cpu")
    angle = t / 10000 ** (i / d_model)  # (max_len, ⌈d_model / 2⌉)
    table = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :d_model]
    return table.to(device or torch.get_default_device(), torch.float32)


def _check_table(max_len: int, d_model: int) -> None:
    for name, size in (("max_len", max_len), ("d_model", d_model)):
        if size < 1:
            raise ArgumentError(f"{name} must be at least 1, but is {size}.")


def _rows(table: Tensor, x: Tensor, offset: int, batch_first: bool) -> Tensor:
    """Rows offset … offset + S - 1 of the table in x's dtype, (S, d_model) or (S, 1, d_model), to be added to x."""
    max_len, d_model = table.shape
    if x.dim() not in (2, 3) or x.shape[-1] != d_model or not x.is_floating_point():
        raise ArgumentError(
            f"x must be a floating-point tensor (…, S, {d_model}) of 2 or 3 dimensions, "
            f"but is {x.dtype} of shape {tuple(x.shape)}."
        )
    S = x.shape[0] if x.dim() == 3 and not batch_first else x.shape[-2]
    if offset < 0 or offset + S > max_len:
        raise ArgumentError(
            f"x of {S} positions at offset {offset} needs positions {offset} to {offset + S - 1}, "
            f"but the table holds 0 to {max_len - 1} (max_len={max_len})."
        )
    rows = table[offset : offset + S].to(x.dtype)
    return rows.unsqueeze(1) if x.dim() == 3 and not batch_first else rows
