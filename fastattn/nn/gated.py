"""Gated activations as modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastattn.errors import ArgumentError
from fastattn.functional import geglu, swiglu

torch.fx.wrap("swiglu")  # torch.fx records the call
torch.fx.wrap("geglu")


def _halves(name: str, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """gate and up, where up is None the halves of the last dimension."""
    if up is not None:
        return gate, up
    if gate.dim() == 0 or gate.shape[-1] % 2:
        raise ArgumentError(f"{name}: `x` has shape {tuple(gate.shape)}; its last dimension must be even, (…, 2N).")
    first, second = gate.chunk(2, -1)
    return first, second


class SwiGLU(nn.Module):
    """``y = silu(gate) · up``, of the halves of a tensor or of two; no parameters.

    The projections before and after it are the user's: ``down(SwiGLU()(gate_up(x)))``.

    Returns of a call: ``module(x)``, x (…, 2N) with the gate in the first half, or ``module(gate, up)``, each (…, N),
    is a tensor (…, N) of their dtype.

    Raises:
        ArgumentError: a call whose x has an odd last dimension, or with gate and up of different shapes.

    Source: Shazeer 2020, "GLU Variants Improve Transformer"; Llama's feed-forward layer.

    >>> SwiGLU()(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 32])
    """

    def forward(self, x: Tensor, up: Tensor | None = None) -> Tensor:
        return swiglu(*_halves("SwiGLU", x, up))


class GEGLU(nn.Module):
    """``y = gelu(gate) · up``, of the halves of a tensor or of two; no parameters.

    Args:
        approximate: "none" for the exact gelu, "tanh" for its approximation.

    Returns of a call: ``module(x)``, x (…, 2N) with the gate in the first half, or ``module(gate, up)``, each (…, N),
    is a tensor (…, N) of their dtype.

    Raises:
        ArgumentError: a call whose x has an odd last dimension, or with gate and up of different shapes.

    Source: Shazeer 2020, "GLU Variants Improve Transformer"; the argument of torch.nn.GELU.

    >>> GEGLU(approximate="tanh")(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 32])
    """

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        if approximate not in ("none", "tanh"):
            raise ArgumentError(f'GEGLU: `approximate` is {approximate!r}; it must be "none" or "tanh".')
        self.approximate = approximate

    def forward(self, x: Tensor, up: Tensor | None = None) -> Tensor:
        return geglu(*_halves("GEGLU", x, up), approximate=self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"
