"""Derivatives of plain torch functions of tensors, some of them None, under whatever already differentiates the caller.

`f` takes and returns a tuple of tensors or None. What comes back is itself differentiable to any order: by autograd, by
torch.func and in forward mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

Tensors = tuple[Tensor | None, ...]
Function = Callable[[Tensors], Tensors]


def no_autocast(tensors: Sequence[Tensor | None]) -> AbstractContextManager[object]:
    """The caller's casts are done; nothing inside an operator is cast again."""
    device = next(t.device.type for t in tensors if t is not None)
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()  # to turn off what is off takes 7 µs


def vjp(f: Function, primals: Tensors, wanted: Sequence[bool], cotangents: Tensors) -> Tensors:
    """The gradient of each wanted primal, None for the others; a cotangent may be None, for zero."""
    counted = [i for i, cotangent in enumerate(cotangents) if cotangent is not None]
    if not counted or not any(wanted):
        pairs = zip(primals, wanted, strict=True)
        return tuple(torch.zeros_like(t) if t is not None and want else None for t, want in pairs)

    def counted_outputs(*varied: Tensor) -> Tensors:
        values = iter(varied)
        outputs = f(tuple(next(values) if want else t for t, want in zip(primals, wanted, strict=True)))
        return tuple(outputs[i] for i in counted)

    with no_autocast(primals):
        varied = (t for t, want in zip(primals, wanted, strict=True) if want)
        pull_back = torch.func.vjp(counted_outputs, *varied)[1]
        grads = iter(pull_back(tuple(cotangents[i] for i in counted)))
    return tuple(next(grads) if want else None for want in wanted)


@contextmanager
def forward_mode(tensors: Sequence[Tensor | None]) -> Iterator[None]:
    """For the body of an autograd.Function's jvp: there PyTorch has forward mode off, for outer levels too."""
    with no_autocast(tensors), forward_ad._set_fwd_grad_enabled(True):
        yield


def jvp(f: Function, duals: Tensors) -> Tensors:
    """The tangent of each output, None for None. `duals` carry their tangents, as what a Function saved does."""
    with forward_mode(duals):
        return tuple(None if t is None else _tangent(t) for t in f(duals))


def without_tangents(duals: Tensors) -> Tensors:
    """The same tensors, without the tangents of the current level."""
    return tuple(None if t is None else forward_ad.unpack_dual(t).primal for t in duals)


def _tangent(dual: Tensor) -> Tensor:
    tangent = forward_ad.unpack_dual(dual).tangent
    return torch.zeros_like(dual) if tangent is None else tangent
