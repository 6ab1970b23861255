"""Softmax and its logarithm."""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from fastattn import _arguments as check
from fastattn import backends
from fastattn.errors import ArgumentError, ArgumentTypeError, kind
from fastattn.functional._overwrite import check_overwritten, overwritable
from fastattn.functional._plan import cached, wants_gradient
from fastattn.ops.softmax import softmax as softmax_op
from fastattn.spec import SoftmaxSpec, Work


@cached
def _softmax_plan(device, backend, gradient, *spec_args) -> tuple[ModuleType, SoftmaxSpec]:
    spec = check.softmax_spec(*spec_args)
    return backends.select(spec, device, backend, Work(math.prod(spec_args[1]), gradient)), spec


def _softmax(
    fn: str,
    x: Tensor,
    dim: int,
    scale: float,
    mask: Tensor | None,
    causal: bool | str,
    inplace: bool,
    dtype: torch.dtype | None,
    backend: str | None,
) -> Tensor:
    if not isinstance(x, Tensor) or x.layout is not torch.strided:
        check.check_tensor(fn, "x", x)
    if dtype is not None:
        x = softmax_input(fn, x, dtype, inplace)
    elif not inplace and x.is_cuda and torch.is_autocast_enabled("cuda"):
        x = x.float()
    overwrites = softmax_overwrites(fn, x, mask, inplace)
    run, spec = _softmax_plan(
        x.device, backend, wants_gradient(x), fn, x.shape, x.dtype, dim, scale, causal, mask is not None, overwrites
    )
    if mask is not None:
        mask = check_softmax_mask(fn, x, mask)
    if run.COMPOSITE:
        y = run.softmax(x, mask, spec)
    else:
        (y,) = softmax_op((x, mask), spec, run.NAME)
    return x.copy_(y) if inplace and (run.COMPOSITE or not overwrites) else y


def softmax_input(fn: str, x: Tensor, dtype: torch.dtype, inplace: bool) -> Tensor:
    """x in the dtype that was asked for."""
    if not isinstance(dtype, torch.dtype):
        raise ArgumentTypeError(f"{fn}: `dtype` is {kind(dtype)}; it must be a torch.dtype or None.")
    check.check_float_dtype(fn, "dtype", dtype)
    if inplace and dtype != x.dtype:
        given, asked = check.dtype_name(x.dtype), check.dtype_name(dtype)
        raise ArgumentError(f"{fn}: `inplace` writes over x, which is {given}; `dtype` is {asked}.")
    return x.to(dtype)


def softmax_overwrites(fn: str, x: Tensor, mask: Tensor | None, inplace: bool) -> bool:
    """Whether a kernel writes y over x itself, where that is asked for."""
    if inplace is False:
        return False
    check.check_bool(fn, "inplace", inplace)
    check_overwritten(fn, {"x": x})
    return overwritable((x,), mask)


def check_softmax_mask(fn: str, x: Tensor, mask: Tensor) -> Tensor:
    """The mask, checked, with as many dimensions as x."""
    check.check_tensor(fn, "mask", mask, optional=True)
    if mask.dtype != torch.bool:
        raise ArgumentTypeError(
            f"{fn}: `mask` has dtype {check.dtype_name(mask.dtype)}; it must be bool, True for an entry that counts."
        )
    check.check_same_device(fn, "mask", mask.device, "x", x.device)
    check.check_broadcast(fn, "mask", mask.shape, x.shape, "the shape of x")
    return mask[(None,) * (x.dim() - mask.dim())]


def softmax(
    x: Tensor,
    dim: int = -1,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    causal: bool | str = False,
    inplace: bool = False,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax of scale · x over one dimension, of the entries that a mask lets through.

        y_j = m_j exp(scale · x_j) / Σ_l m_l exp(scale · x_l)

    Args:
        x: any shape and strides, float16, bfloat16, float32 or float64; the arithmetic is in at least float32.
        dim: the dimension that sums to 1.
        scale: factor on x.
        mask: bool, broadcastable to x, True for an entry that counts.
        causal: for x (…, S_q, S_k) and dim=-1: False; True (S_q == S_k); "top_left" (row i counts j ≤ i) or
            "bottom_right" (j ≤ i + S_k − S_q).
        inplace: write y over x, which is returned, its dtype kept under autocast too. x must not overlap itself. Where
            gradients are wanted, a view is written over by a copy, as any x is under transforms and compilers.
        dtype: cast x to it first, so y has it; x may then hold integers. None: x's own.
        backend: "cuda", "triton", "cpu", "eager" or "reference", which then never falls back; None: the first that can.

    Returns:
        y, shape of x and its dtype, or `dtype` (float32 under CUDA autocast, as torch's). Masked entries are 0,
        whatever x holds there; a row without entries is all 0, with zero gradients.

    Raises:
        ArgumentTypeError, ArgumentError: an argument of the wrong type, dtype, shape or device.
        UnsupportedError: the backend asked for cannot compute it.

    Bytes moved, of n entries of e bytes: 2·n·e forward, 3·n·e backward. Rows that fit no tile (longer than 16384
    entries) are read once more in each direction. What is hidden by causality is not read.

    Source: torch.nn.functional.softmax; Milakov, Gimelshein, "Online normalizer calculation for softmax" (2018).

    Example:
        >>> softmax(torch.zeros(1, 4), mask=torch.tensor([True, True, False, False]))
        tensor([[0.5000, 0.5000, 0.0000, 0.0000]])
    """
    return _softmax("softmax", x, dim, scale, mask, causal, inplace, dtype, backend)


def log_softmax(
    x: Tensor,
    dim: int = -1,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    causal: bool | str = False,
    inplace: bool = False,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """The natural logarithm of `softmax`, computed without taking the logarithm of a rounded probability.

        y_j = scale · x_j − log Σ_l m_l exp(scale · x_l),   −inf where m_j = 0

    Args, Raises: as `softmax`.

    Returns:
        y, shape of x and its dtype, or `dtype`; −inf for masked entries, with zero gradients.

    Source: torch.nn.functional.log_softmax.

    Example:
        >>> log_softmax(torch.zeros(1, 2))
        tensor([[-0.6931, -0.6931]])
    """
    return _softmax("log_softmax", x, dim, scale, mask, causal, inplace, dtype, backend)
