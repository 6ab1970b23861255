"""What every public function begins with: a checked plan, remembered; autocast."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastattn.backends import has_kernels as has_kernels
from fastattn.errors import ArgumentTypeError
from fastattn.tracing import is_plain as is_plain

_PLANS = 4096  # checked calls that are remembered, by shapes, dtypes and options


def cached(plan: Callable) -> Callable:
    """Remember the answers of `plan` in eager mode; a compiler traces it afresh and guards on what it reads."""
    remembered = lru_cache(_PLANS, typed=True)(plan)  # typed: 1 is not True

    def lookup(*args):
        if torch.compiler.is_compiling():
            return plan(*args)
        try:
            return remembered(*args)
        except ArgumentTypeError:
            numbers = tuple(held_number(a) for a in args)
            if all(a is b for a, b in zip(numbers, args, strict=True)):
                raise
            return plan(*numbers)
        except TypeError:  # an argument that cannot be hashed is a wrong one; the plan says which
            return plan(*args)

    return lookup


def held_number(value: Any) -> Any:
    """Return what a tensor of one number holds, which torch takes where it takes a number; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(map(held_number, value)) if any(isinstance(v, Tensor) for v in value) else value
    held = isinstance(value, Tensor) and value.dim() == 0 and not value.requires_grad and value.dtype != torch.bool
    return value.item() if held else value


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is computed of these."""
    if not torch.is_grad_enabled():
        return False
    for t in tensors:
        if t is not None and t.requires_grad:
            return True
    return False


def facts(t: Tensor | None) -> Any:
    """What a plan depends on: (shape, dtype, device), or None for an absent tensor."""
    return None if t is None else (t.shape, t.dtype, t.device)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to the ambient autocast dtype, as torch does for scaled_dot_product_attention."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    casts = (torch.float16, torch.bfloat16, torch.float32)  # float64 stays, and 8-bit numbers mean nothing alone
    return tuple(t.to(dtype) if t.dtype in casts else t for t in tensors)
