"""Derivatives of plain torch functions of tensors, some of them None, under whatever already differentiates the caller.

`f` takes and returns a tuple of tensors or None. What comes back is itself differentiable to any order: by autograd, by
torch.func and in forward mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

Tensors = tuple[Tensor | None, ...]
Function = Callable[[Tensors], Tensors]


def no_autocast(tensors: Sequence[Tensor | None]) -> torch.autocast:
    """The caller's casts are done; nothing inside an operator is cast again."""
    device = next(t.device.type for t in tensors if t is not None)
    return torch.autocast(device, enabled=False)


def vjp(f: Function, primals: Tensors, wanted: Sequence[bool], cotangents: Tensors) -> Tensors:
    """The gradient of each wanted primal, None for the others; a cotangent may be None, for zero."""
    counted = [i for i, cotangent in enumerate(cotangents) if cotangent is not None]
    if not counted or not any(wanted):
        return tuple(torch.zeros_like(t) if t is not None and want else None for t, want in zip(primals, wanted))

    def counted_outputs(*varied: Tensor) -> Tensors:
        values = iter(varied)
        outputs = f(tuple(next(values) if want else t for t, want in zip(primals, wanted, strict=True)))
        return tuple(outputs[i] for i in counted)

    with no_autocast(primals):
        _, pull_back = torch.func.vjp(counted_outputs, *(t for t, want in zip(primals, wanted, strict=True) if want))
        grads = iter(pull_back(tuple(cotangents[i] for i in counted)))
    return tuple(next(grads) if want else None for want in wanted)


def jvp(f: Function, duals: Tensors) -> Tensors:
    """The tangent of each output, None for None. `duals` carry their tangents, as in an autograd.Function's jvp."""
    with no_autocast(duals), forward_ad._set_fwd_grad_enabled(True):  # off there, lest the tangents get tangents
        return tuple(None if t is None else _tangent(t) for t in f(duals))


def _tangent(dual: Tensor) -> Tensor:
    tangent = forward_ad.unpack_dual(dual).tangent
    return torch.zeros_like(dual) if tangent is None else tangent
