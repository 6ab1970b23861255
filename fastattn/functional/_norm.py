"""LayerNorm and RMSNorm, alone or behind the sum of a residual connection."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import overload

import torch
from torch import Tensor

from fastattn import _arguments as check
from fastattn import backends
from fastattn.functional._plan import cached, facts, wants_gradient
from fastattn.ops.define import Operator
from fastattn.ops.norm import layer_norm as layer_norm_op
from fastattn.ops.norm import rms_norm as rms_norm_op
from fastattn.spec import NormSpec, Work

Shape = int | Sequence[int]


@cached
def _norm_plan(
    backend, gradient, fn, x_shape, x_dtype, x_device, weight, bias, residual, eps, dropout_p, weight_offset,
    memory_efficient, out_dtype, *row,
) -> tuple[ModuleType, NormSpec]:  # fmt: skip
    spec = check.norm_spec(
        fn, (x_shape, x_dtype, x_device), row, weight, bias, residual, eps, dropout_p, weight_offset,
        memory_efficient, out_dtype,
    )  # fmt: skip
    return backends.select(spec, x_device, backend, Work(math.prod(x_shape), gradient)), spec


def check_norm_tensors(fn: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> None:
    if not isinstance(x, Tensor) or x.layout is not torch.strided:
        check.check_tensor(fn, "x", x)
    if weight is not None and not isinstance(weight, Tensor):
        check.check_tensor(fn, "weight", weight, optional=True)
    if bias is not None and not isinstance(bias, Tensor):
        check.check_tensor(fn, "bias", bias, optional=True)
    if residual is not None and (not isinstance(residual, Tensor) or residual.layout is not torch.strided):
        check.check_tensor(fn, "residual", residual, optional=True)


def norm_out_dtype(x: Tensor) -> torch.dtype | None:
    """Under CUDA autocast torch's norms give float32; nothing is cast for it, the kernels write it."""
    if x.is_cuda and torch.is_autocast_enabled("cuda") and x.dtype in (torch.float16, torch.bfloat16):
        return torch.float32
    return None


def _norm(
    fn: str,
    op: Operator,
    x: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    residual: Tensor | None,
    dropout_p: float,
    weight_offset: float,
    memory_efficient: bool,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    check_norm_tensors(fn, x, weight, bias, residual)
    if type(normalized_shape) is not tuple:
        normalized_shape = check.row_shape(fn, normalized_shape)
    run, spec = _norm_plan(
        backend, wants_gradient(x, weight), fn, x.shape, x.dtype, x.device, facts(weight), facts(bias),
        facts(residual), eps, dropout_p,
        weight_offset, memory_efficient, norm_out_dtype(x), *normalized_shape,
    )  # fmt: skip
    if residual is None:
        if run.COMPOSITE:
            return run.norm(x, weight, bias, spec)
        return op((x, weight, bias, None, None), spec, run.NAME)[0]
    seed = torch.randint(2**63 - 1, (), device=x.device) if spec.dropout_p > 0.0 else None
    if run.COMPOSITE:
        h = run.add_residual(x, residual, seed, spec)
        return run.norm(h, weight, bias, spec), h
    y, h, _ = op((x, weight, bias, residual, seed), spec, run.NAME)
    return y, h


@overload
def layer_norm(
    x: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: None = None,
    dropout_p: float = 0.0,
    memory_efficient: bool = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor,
    dropout_p: float = 0.0,
    memory_efficient: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    memory_efficient: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer normalisation over the last dimensions, of x or of a residual sum; statistics in at least float32.

        h = residual + dropout(x),   or x
        y = (h − mean) / √(var + eps) · weight + bias,   var = mean of (h − mean)²

    Args:
        x: (…, *normalized_shape), float16, bfloat16, float32 or float64, any strides.
        normalized_shape: the last dimensions of x, an integer for one.
        weight: normalized_shape, or None for 1; its dtype may differ from x's.
        bias: normalized_shape, or None for 0.
        eps: added to the variance.
        residual: the shape of x, any float dtype, which is that of h: the residual stream, to which x is added before
            it is normalised.
        dropout_p: probability with which an entry of x is dropped before it is added; keyed by (seed, row, column), the
            seed drawn from torch's generator. Needs `residual`.
        memory_efficient: kernels keep y for the backward, which the layer that follows keeps anyway, in place of x or
            h. Gradients then carry y's rounding, are NaN for an entry whose weight is 0, and have no derivatives.
        backend: "cuda", "triton", "cpu", "eager" or "reference", which then never falls back; None: the first that can.

    Returns:
        y, shape and dtype of x (float32 under CUDA autocast, as torch's). With a residual (y, h), both differentiable.

    Raises:
        ArgumentTypeError, ArgumentError: an argument of the wrong type, dtype, shape or device.
        UnsupportedError: a backend was asked for that cannot compute it.

    Bytes moved, of n entries of e bytes: 2·n·e forward, 3·n·e backward; with a residual 4·n·e and 4·n·e. Rows that fit
    no tile (longer than 8192 to 16384 entries) are read once more in each direction, and once for the weight.

    Source: Ba, Kiros, Hinton, "Layer Normalization" (2016); torch.nn.functional.layer_norm.

    Example:
        >>> layer_norm(torch.randn(4, 16), 16, torch.ones(16)).shape
        torch.Size([4, 16])
        >>> y, h = layer_norm(torch.ones(4, 16), 16, residual=torch.ones(4, 16))
        >>> h.mean().item(), y.abs().max().item()
        (2.0, 0.0)
    """
    return _norm(
        "layer_norm", layer_norm_op, x, normalized_shape, weight, bias, eps, residual, dropout_p, 0.0,
        memory_efficient, backend,
    )  # fmt: skip


@overload
def rms_norm(
    x: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: None = None,
    dropout_p: float = 0.0,
    weight_offset: float = 0.0,
    memory_efficient: bool = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor,
    dropout_p: float = 0.0,
    weight_offset: float = 0.0,
    memory_efficient: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    weight_offset: float = 0.0,
    memory_efficient: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square normalisation over the last dimensions, of x or of a residual sum.

        h = residual + dropout(x),   or x
        y = h / √(mean of h² + eps) · (weight_offset + weight)

    Args:
        x, normalized_shape, weight, residual, dropout_p, memory_efficient, backend: as of `layer_norm`.
        eps: added to the mean square; None: the machine epsilon of float32 (of float64 for a float64 x), as torch's.
        weight_offset: added to weight; 1.0 for checkpoints that store weight − 1, as Gemma's. Needs `weight`.

    Returns:
        y, shape and dtype of x (float32 under CUDA autocast, as torch's). With a residual (y, h), both differentiable.

    Raises, bytes moved: as `layer_norm`.

    Source: Zhang, Sennrich, "Root Mean Square Layer Normalization" (2019); torch.nn.functional.rms_norm.

    Example:
        >>> rms_norm(torch.full((1, 4), 3.0), 4)
        tensor([[1., 1., 1., 1.]])
    """
    return _norm(
        "rms_norm", rms_norm_op, x, normalized_shape, weight, None, eps, residual, dropout_p, weight_offset,
        memory_efficient, backend,
    )  # fmt: skip
