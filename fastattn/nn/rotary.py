"""Rotary position embedding as a module."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastattn.errors import ArgumentError
from fastattn.functional import rotary_embedding

torch.fx.wrap("rotary_embedding")  # torch.fx records the call


class RotaryEmbedding(nn.Module):
    """Rotate q and k by their positions, in one launch; cosines and sines are kept in a table.

    Pair i of a head at position t is turned by ``t · base^(−2i/dim)``.

    Args:
        dim: how many of the first elements of a head are rotated, even; the others pass through.
        max_positions: positions in the table at first. A call of known length that needs more makes it twice as long,
            or what it takes; not under torch.compile, and not for ``position_ids``, which are never read for it.
        base: of the angles; 10000 in RoFormer and Llama, 500000 in Llama 3.
        interleaved: pairs are (2i, 2i + 1), as in GPT-J; False: (i, i + dim/2), as in GPT-NeoX and Llama.
        scaling: positions are divided by it (linear interpolation).
        device: of the table, which is fp32 whatever the module's dtype, and not in the state dict.

    Returns of a call: ``module(q, k=None, *, position_ids=None, offset=0, cu_seqlens=None)``: q (B, H, S, D) rotated,
    or with k, of the same shape but for its heads, the pair of both. Tokens have positions offset … offset + S − 1, or
    ``position_ids`` (S,) or (B, S); of packed q (T, H, D) they count from 0 where ``cu_seqlens`` has a sequence begin.
    In decoding, ``offset`` is the number of tokens already in the cache.

    Raises:
        ArgumentError: dim, max_positions, base or scaling that make no table; a negative offset, or one beside
            ``position_ids`` or ``cu_seqlens``; under torch.compile, more positions than the table has; what
            `rotary_embedding` raises.

    Source: Su et al. 2021, "RoFormer"; Chen et al. 2023, "Extending Context Window … via Position Interpolation".

    >>> rotate = RotaryEmbedding(32)
    >>> q, k = rotate(torch.randn(2, 8, 10, 64), torch.randn(2, 2, 10, 64))
    >>> q.shape, k.shape
    (torch.Size([2, 8, 10, 64]), torch.Size([2, 2, 10, 64]))
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        dim: int,
        max_positions: int = 2048,
        base: float = 10000.0,
        *,
        interleaved: bool = False,
        scaling: float = 1.0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ArgumentError(f"RotaryEmbedding: `dim` is {dim}; it must be even, and 2 or more.")
        if max_positions < 1:
            raise ArgumentError(f"RotaryEmbedding: `max_positions` is {max_positions}; it must be 1 or more.")
        for name, value in (("base", base), ("scaling", scaling)):
            if not value > 0:
                raise ArgumentError(f"RotaryEmbedding: `{name}` is {value}; it must be positive.")
        self.dim, self.max_positions, self.base = dim, max_positions, base
        self.interleaved, self.scaling = interleaved, scaling
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)
        self._fill(torch.device(device) if device is not None else torch.get_default_device())

    def forward(
        self,
        q: Tensor,
        k: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        offset: int = 0,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        cos, sin = self._rows(q, position_ids, offset, cu_seqlens)
        x = q if k is None else (q, k)
        return rotary_embedding(
            x, cos, sin, interleaved=self.interleaved, position_ids=position_ids, cu_seqlens=cu_seqlens
        )

    def _rows(self, q: Tensor, position_ids, offset: int, cu_seqlens) -> tuple[Tensor, Tensor]:
        """Of the table, grown where it has to be, the rows from `offset` on."""
        if offset and (position_ids is not None or cu_seqlens is not None):
            raise ArgumentError(
                f"RotaryEmbedding: `offset` is {offset} beside `position_ids` or `cu_seqlens`; positions are said once."
            )
        if offset < 0:
            raise ArgumentError(f"RotaryEmbedding: `offset` is {offset}; it must be 0 or more.")
        # The longest packed sequence is not read from the device: T is a bound of it.
        needed = 0 if position_ids is not None else q.shape[0] if cu_seqlens is not None else offset + q.shape[-2]
        if needed > self.max_positions and not (cu_seqlens is not None and torch.compiler.is_compiling()):
            if torch.compiler.is_compiling():
                raise ArgumentError(
                    f"RotaryEmbedding: positions up to {needed - 1} are needed and the table has {self.max_positions}, "
                    "which cannot grow under torch.compile; give a larger `max_positions`."
                )
            self.max_positions = max(needed, 2 * self.max_positions)
            self._fill(self.cos.device)
        if position_ids is not None or cu_seqlens is not None:
            return self.cos, self.sin
        return self.cos[offset:], self.sin[offset:]

    def _fill(self, device: torch.device) -> None:
        """cos, sin (max_positions, dim / 2) in fp32, rounded once from float64."""
        with torch.inference_mode(False):  # a table that is made in evaluation serves in training too
            t = torch.arange(self.max_positions, dtype=torch.float64, device="cpu")[:, None] / self.scaling
            i = torch.arange(0, self.dim, 2, dtype=torch.float64, device="cpu")
            angle = t * self.base ** (-i / self.dim)
            self.cos, self.sin = (table.to(device, torch.float32) for table in (angle.cos(), angle.sin()))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        """Keep the table exact: .to(dtype) would round it, and to_empty() from the meta device would not fill it."""
        before = self.cos
        super()._apply(fn, recurse)
        if before.is_meta or self.cos.dtype != before.dtype:
            self._fill(self.cos.device)
        return self

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, max_positions={self.max_positions}, base={self.base}, interleaved={self.interleaved}, "
            f"scaling={self.scaling}"
        )
