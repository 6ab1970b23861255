"""What works on rows: norms and softmax."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastattn import _arguments as check
from fastattn import backends
from fastattn.errors import ArgumentTypeError
from fastattn.functional._plan import cached
from fastattn.ops.layer_norm import layer_norm as layer_norm_op
from fastattn.ops.softmax import softmax as softmax_op
from fastattn.spec import NormSpec, SoftmaxSpec


@cached
def _norm_plan(backend, fn, x_shape, x_dtype, x_device, weight, bias, eps, *row) -> tuple[ModuleType, NormSpec]:
    spec = check.norm_spec(fn, x_shape, x_dtype, x_device, row, (weight, bias), eps)
    return backends.select(spec, x_device, backend), spec


def facts(t: Tensor | None) -> Any:
    """What a plan depends on: (shape, dtype, device), or None for an absent tensor."""
    return None if t is None else (t.shape, t.dtype, t.device)


def layer_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Layer normalisation over the last dimensions, statistics in float32 whatever x's dtype.

        y = (x − mean) / √(var + eps) · weight + bias,   var = mean of (x − mean)²

    Args:
        x: (…, *normalized_shape), float16, bfloat16, float32 or float64, any strides.
        normalized_shape: the last dimensions of x, an integer for one.
        weight: normalized_shape, or None for 1; its dtype may differ from x's.
        bias: normalized_shape, or None for 0.
        eps: added to the variance.
        residual, dropout_p: not implemented yet; refused by name.
        backend: one of "triton", "eager", "reference", which then never falls back; None: the first that can.

    Returns:
        y, shape and dtype of x (float32 under CUDA autocast, as torch's).

    Raises:
        ArgumentTypeError, ArgumentError: an argument of the wrong type, dtype, shape or device.
        UnsupportedError: a backend was asked for that cannot compute it, or a keyword that is not implemented.

    Source: Ba, Kiros, Hinton, "Layer Normalization" (2016); torch.nn.functional.layer_norm.

    Example:
        >>> layer_norm(torch.randn(4, 16), 16, torch.ones(16)).shape
        torch.Size([4, 16])
    """
    check_norm_tensors(x, weight, bias)
    if residual is not None or not isinstance(dropout_p, (int, float)) or dropout_p != 0.0:
        check.refuse("layer_norm", residual=(residual, None), dropout_p=(dropout_p, 0.0))
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        x, weight, bias = x.float(), None if weight is None else weight.float(), None if bias is None else bias.float()
    if type(normalized_shape) is not tuple:
        normalized_shape = check.row_shape("layer_norm", normalized_shape)
    run, spec = _norm_plan(
        backend, "layer_norm", x.shape, x.dtype, x.device, facts(weight), facts(bias), eps, *normalized_shape
    )
    if run.COMPOSITE:
        return run.layer_norm(x, weight, bias, spec)
    y, _, _ = layer_norm_op((x, weight, bias), spec, run.NAME)
    return y


def check_norm_tensors(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    if not isinstance(x, Tensor) or x.layout is not torch.strided:
        check.check_tensor("layer_norm", "x", x)
    if weight is not None and not isinstance(weight, Tensor):
        check.check_tensor("layer_norm", "weight", weight, optional=True)
    if bias is not None and not isinstance(bias, Tensor):
        check.check_tensor("layer_norm", "bias", bias, optional=True)


@cached
def _softmax_plan(device, backend, *spec_args) -> tuple[ModuleType, SoftmaxSpec]:
    spec = check.softmax_spec(*spec_args)
    return backends.select(spec, device, backend), spec


def _softmax(
    fn: str, x: Tensor, dim: int, scale: float, mask: Tensor | None, causal: bool | str, backend: str | None
) -> Tensor:
    if not isinstance(x, Tensor) or x.layout is not torch.strided:
        check.check_tensor(fn, "x", x)
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        x = x.float()
    run, spec = _softmax_plan(x.device, backend, fn, x.shape, x.dtype, dim, scale, causal, mask is not None)
    if mask is not None:
        mask = check_softmax_mask(fn, x, mask)
    if run.COMPOSITE:
        return run.softmax(x, mask, spec)
    (y,) = softmax_op((x, mask), spec, run.NAME)
    return y


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
        backend: one of "triton", "eager", "reference", which then never falls back; None: the first that can.

    Returns:
        y, shape and dtype of x (float32 under CUDA autocast, as torch's). Masked entries are 0, whatever x holds there;
        a row without entries is all 0, with zero gradients.

    Raises:
        ArgumentTypeError, ArgumentError: an argument of the wrong type, dtype, shape or device.
        UnsupportedError: the backend asked for cannot compute it.

    Source: torch.nn.functional.softmax; Milakov, Gimelshein, "Online normalizer calculation for softmax" (2018).

    Example:
        >>> softmax(torch.zeros(1, 4), mask=torch.tensor([True, True, False, False]))
        tensor([[0.5000, 0.5000, 0.0000, 0.0000]])
    """
    return _softmax("softmax", x, dim, scale, mask, causal, backend)


def log_softmax(
    x: Tensor,
    dim: int = -1,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    causal: bool | str = False,
    backend: str | None = None,
) -> Tensor:
    """The natural logarithm of `softmax`, computed without taking the logarithm of a rounded probability.

        y_j = scale · x_j − log Σ_l m_l exp(scale · x_l),   −inf where m_j = 0

    Args, Raises: as `softmax`.

    Returns:
        y, shape and dtype of x; −inf for masked entries, with zero gradients.

    Source: torch.nn.functional.log_softmax.

    Example:
        >>> log_softmax(torch.zeros(1, 2))
        tensor([[-0.6931, -0.6931]])
    """
    return _softmax("log_softmax", x, dim, scale, mask, causal, backend)
