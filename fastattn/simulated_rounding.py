"""Simulated arithmetic: what a formula costs in accuracy when each operation rounds its result to the dtype.

The error that torch makes on one machine is a poor yardstick. It depends on the instruction set, on the number of
threads and on torch's version, and over a few numbers it is small by chance. `SimulatedRounding` computes each
operation in float64 and rounds the result to the dtype that torch would return, up or down at random. Another draw of
the same computation makes other errors of the same size, and every machine draws the same.

A sum of n float32 numbers is rounded n - 1 times. As in fast implementations, 64 numbers are added one by one, and then
the partial sums in pairs. With m numbers in each of b blocks, and terms x of sum S, the error has the variance

    eps² (S² (m / 36b + [b > 1] / 6) + Σ x² (m / 24 + log₂ b / 12))

Source of the method: Parker, Monte Carlo Arithmetic (1997).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only

ROUNDED = (torch.float32, torch.bfloat16, torch.float16)
EXPONENT = 0x7FF0_0000_0000_0000  # the bits of a float64's exponent
IN_SEQUENCE = 64  # numbers that are added one by one

aten = torch.ops.aten

# operation -> the same sum over squares, and the number of terms
SUMS: dict[Any, Callable[..., tuple[Tensor, int]]] = {
    aten.mm.default: lambda a, b: ((a * a) @ (b * b), a.shape[-1]),
    aten.bmm.default: lambda a, b: ((a * a) @ (b * b), a.shape[-1]),
    aten.addmm.default: lambda c, a, b, **scales: ((a * a) @ (b * b) + c * c, a.shape[-1] + 1),
    aten.baddbmm.default: lambda c, a, b, **scales: ((a * a) @ (b * b) + c * c, a.shape[-1] + 1),
    aten.sum.default: lambda x, **options: ((x * x).sum(), x.numel()),
    aten.sum.dim_IntList: lambda x, dim=None, keepdim=False, **options: _squares(torch.sum, x, dim, keepdim),
    aten.mean.default: lambda x, **options: ((x * x).sum() / x.numel() ** 2, x.numel()),
    aten.mean.dim: lambda x, dim=None, keepdim=False, **options: _squares(torch.mean, x, dim, keepdim),
}


class SimulatedRounding(TorchDispatchMode):
    """Round every operation of torch that is called inside at random; `draw` is the seed. Backward passes too."""

    def __init__(self, draw: int = 0):
        super().__init__()
        self.generator = torch.Generator().manual_seed(draw)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if not _computes(func, (args, kwargs)):
            return func(*args, **kwargs)
        formula = _formulas().get(func)
        if formula is not None and (args[0].dim() > 0 or func.overloadpacket not in _OF_ROWS):
            with self:
                return formula(*args, **kwargs)
        plain = func(*args, **kwargs)
        wide_args, wide_kwargs = tree_map(_widen, (args, kwargs))
        wide = func(*wide_args, **wide_kwargs)
        if func in SUMS and isinstance(plain, Tensor) and plain.dtype == torch.float32:
            wide = wide + self._noise_of_sum(wide, *SUMS[func](*wide_args, **wide_kwargs))
        return tree_map(lambda p, w: self._rounded(w, p) if isinstance(p, Tensor) else p, plain, wide)

    def _noise_of_sum(self, total: Tensor, squares: Tensor, terms: int) -> Tensor:
        m, b = min(terms, IN_SEQUENCE), max(1.0, terms / IN_SEQUENCE)
        variance = total.square() * (m / (36 * b) + (b > 1) / 6) + squares * (m / 24 + math.log2(b) / 12)
        if terms < 2:
            return torch.zeros_like(total)
        return torch.finfo(torch.float32).eps * variance.sqrt() * self._uniform(total) * math.sqrt(12)

    def _rounded(self, wide: Tensor, plain: Tensor) -> Tensor:
        """`wide` at one of its two neighbours in the dtype of `plain`, the nearer one more often: right on average."""
        if plain.dtype not in ROUNDED or wide.dtype != torch.float64:
            return plain
        number = torch.finfo(plain.dtype)
        nearest = torch.empty_like(plain).copy_(wide)
        # at most |wide|; inf for inf and NaN
        power_of_2 = (wide.contiguous().view(torch.int64) & EXPONENT).view(torch.float64)
        spacing = (power_of_2 * number.eps).clamp_min_(number.smallest_normal * number.eps)
        moved = torch.where(power_of_2.isfinite() & (nearest != wide), wide + spacing * self._uniform(wide), wide)
        return nearest.copy_(moved)

    def _uniform(self, like: Tensor) -> Tensor:
        """Random numbers in [-1/2, 1/2)."""
        return torch.rand(like.shape, generator=self.generator, dtype=torch.float64).to(like.device) - 0.5


def _squares(function: Callable[..., Tensor], x: Tensor, dim: Any, keepdim: bool) -> tuple[Tensor, int]:
    dims = tuple(range(x.dim())) if not dim else dim if isinstance(dim, (tuple, list)) else (dim,)
    terms = math.prod(x.shape[d] for d in dims)
    squares = (x * x).sum(dims, keepdim)
    return (squares if function is torch.sum else squares / max(terms, 1) ** 2), terms


def _computes(func: Any, given: Any) -> bool:
    """True if the operation takes numbers of a rounded dtype, and neither is a view, nor writes, nor only converts."""
    if func.is_view or func._schema.is_mutable or func in _EXACT or torch.Tag.nondeterministic_seeded in func.tags:
        return False
    found = []
    tree_map_only(Tensor, lambda t: found.append(t.dtype in ROUNDED), given)
    return any(found)


_EXACT = {
    aten._to_copy.default,
    aten.clone.default,
    aten.cat.default,
    aten.where.self,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.neg.default,
    aten.amax.default,
    aten.max.dim,
    aten.gather.default,
    aten.index_select.default,
    aten.repeat.default,
    aten.empty_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.new_zeros.default,
    aten.new_empty.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten._new_zeros_with_same_feature_meta.default,
    aten._has_same_storage_numel.default,
    aten._local_scalar_dense.default,
}


def _widen(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype in ROUNDED:
        return value.double()
    return torch.float64 if value in ROUNDED and isinstance(value, torch.dtype) else value


_OF_ROWS = (aten._softmax, aten._softmax_backward_data, aten._log_softmax, aten._log_softmax_backward_data)


@functools.cache
def _formulas() -> dict[Any, Callable]:
    """Return fused operations of torch, written with elementary ones by torch itself."""
    from torch._decomp import get_decompositions

    fused = [
        *_OF_ROWS, aten.logsumexp,
        aten.native_layer_norm, aten.native_layer_norm_backward,
        aten.nll_loss_forward, aten.nll_loss2d_forward,
        aten.gelu, aten.gelu_backward, aten.silu, aten.silu_backward,
    ]  # fmt: skip
    return dict(get_decompositions(fused))
