"""Dropout and the addition of a residual."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastattn import _arguments as check
from fastattn import backends
from fastattn.errors import ArgumentError, ArgumentTypeError
from fastattn.functional._overwrite import check_overwritten, overwritable
from fastattn.functional._plan import cached
from fastattn.ops.dropout_add import dropout_add as dropout_add_op
from fastattn.spec import DropoutAddSpec

FN = "dropout_add"


def dropout_add(
    x: Tensor, residual: Tensor, dropout_p: float = 0.0, *, inplace: bool = False, backend: str | None = None
) -> Tensor:
    """Add a residual to what dropout leaves of x, in one pass and without a mask in memory.

        y = residual + dropout(x),   dropout(x) = x / (1 − dropout_p) where kept, else 0

    Args:
        x: any shape and strides, float16, bfloat16, float32 or float64; the arithmetic is in at least float32.
        residual: shape and device of x; dtype of x or a wider one, as of a float32 residual stream.
        dropout_p: probability with which an entry of x is dropped, here always: a module passes 0 outside of training.
            Keyed by (seed, row, column), with the leading dimensions flattened to rows, and the seed drawn from torch's
            default generator; no result depends on the backend or its tiles.
        inplace: write over residual, which is returned and must not overlap itself. One that is a view and gets a
            gradient, and under transforms and compilers any, is written over by a copy of the result.
        backend: "cuda", "triton", "cpu", "eager" or "reference", which then never falls back; None: the first that can.

    Returns:
        y, shape and dtype of residual, under autocast too. A dropped entry counts 0, whatever x holds there.

    Memory moved, in tensors of y's size: 3 (x and residual are read, y is written); backward 2 for x's gradient, that
    of residual being y's own. The backward draws the mask again: the seed alone is kept for it.

    Raises:
        ArgumentTypeError, ArgumentError: an argument of the wrong type, dtype, shape, device or value.
        UnsupportedError: the backend asked for cannot compute it.

    Source: Srivastava et al., "Dropout" (2014); Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).

    Example:
        >>> dropout_add(torch.ones(2), torch.tensor([1.0, 2.0]))
        tensor([2., 3.])
    """
    arguments = dropout_add_arguments(x, residual, dropout_p, inplace)
    run, spec = _plan(backend, *arguments)
    if spec.dropout_p:
        seed = torch.randint(2**63 - 1, (), device=x.device)
    else:
        seed = torch.zeros((), dtype=torch.int64, device=x.device)  # no random number is drawn
    if run.COMPOSITE:
        y = run.dropout_add(residual, x, seed if spec.dropout_p else None, spec)
    else:
        (y,) = dropout_add_op((residual, x, seed), spec, run.NAME)
    if inplace and (run.COMPOSITE or not spec.inplace):
        y = residual.copy_(y)
    return y


def dropout_add_arguments(x: Any, residual: Any, dropout_p: Any, inplace: Any) -> tuple:
    """What `dropout_add_spec` takes, of arguments that are checked to be tensors."""
    check.check_tensor(FN, "x", x)
    check.check_tensor(FN, "residual", residual)
    check.check_bool(FN, "inplace", inplace)
    if inplace:
        check_overwritten(FN, {"residual": residual})
        inplace = overwritable((residual,), x)
    return x.shape, residual.shape, x.dtype, residual.dtype, x.device, residual.device, dropout_p, inplace


@cached
def _plan(backend, *arguments) -> tuple[ModuleType, DropoutAddSpec]:
    spec = dropout_add_spec(*arguments)
    return backends.select(spec, arguments[4], backend), spec


def dropout_add_spec(
    x_shape, shape, x_dtype, dtype, x_device, device, dropout_p: float, inplace: bool
) -> DropoutAddSpec:
    """The others are those of residual."""
    check.check_float_dtype(FN, "x", x_dtype)
    check.check_float_dtype(FN, "residual", dtype)
    check.check_same_device(FN, "residual", device, "x", x_device)
    if tuple(x_shape) != tuple(shape):
        raise ArgumentError(
            f"{FN}: `residual` has shape {tuple(shape)} and `x` has {tuple(x_shape)}; they must be equal."
        )
    if torch.promote_types(x_dtype, dtype) != dtype:
        raise ArgumentTypeError(
            f"{FN}: `residual` has dtype {check.dtype_name(dtype)} and `x` has {check.dtype_name(x_dtype)}; "
            "residual must have x's or a wider one."
        )
    check.check_dropout_p(FN, dropout_p)
    return DropoutAddSpec(dtype, x_dtype, tuple(shape), float(dropout_p), inplace)
