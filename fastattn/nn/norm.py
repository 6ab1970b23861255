"""Layer and root-mean-square normalisation as modules, alone or behind a residual sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor, nn

from fastattn.functional import layer_norm, rms_norm
from fastattn.nn._tracing import Scriptable

torch.fx.wrap("layer_norm")  # torch.fx records the call
torch.fx.wrap("rms_norm")


class LayerNorm(Scriptable, nn.LayerNorm):
    """Normalise the last dimensions of a tensor; a drop-in for `torch.nn.LayerNorm`.

    ``y = (h − mean(h)) / sqrt(var(h) + eps) · weight + bias``, mean and (biased) variance taken over
    ``normalized_shape``, in fp32 for half-precision h; ``h = residual + dropout(x)``, or x.

    Args:
        normalized_shape: int or ints, the sizes of the dimensions normalised over, which are the last ones of x.
        eps: added to the variance.
        elementwise_affine: whether there are a weight and a bias, both of shape ``normalized_shape``.
        bias: False leaves only the weight.
        device, dtype: of the parameters.

    Returns of a call: ``module(x)``, x of shape (…, *normalized_shape), is a tensor of x's shape;
    ``module(x, residual=residual, dropout_p=0.0)`` is (y, h), the sum fused with the norm. dropout_p acts in
    evaluation too: pass 0.0 there.

    Raises:
        ArgumentError: a call whose x does not end in ``normalized_shape``, or a residual of another shape.

    Source: Ba, Kiros, Hinton 2016, "Layer Normalization"; interface of torch.nn.LayerNorm.

    >>> norm = LayerNorm(64)
    >>> norm(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])
    >>> y, h = norm(torch.randn(2, 10, 64), residual=torch.randn(2, 10, 64))
    """

    @overload
    def forward(self, input: Tensor, *, residual: None = None, dropout_p: float = 0.0) -> Tensor: ...
    @overload
    def forward(self, input: Tensor, *, residual: Tensor, dropout_p: float = 0.0) -> tuple[Tensor, Tensor]: ...
    def forward(self, input, *, residual=None, dropout_p=0.0):  # noqa: A002 - torch's name, callers pass it by keyword
        if isinstance(input, Tensor) and input.is_nested and residual is None:
            return super().forward(input)
        return layer_norm(
            input, self.normalized_shape, self.weight, self.bias, self.eps, residual=residual, dropout_p=dropout_p
        )


class RMSNorm(Scriptable, nn.RMSNorm):
    """Divide the last dimensions of a tensor by their root mean square; a drop-in for `torch.nn.RMSNorm`.

    ``y = h / sqrt(mean(h²) + eps) · (weight_offset + weight)``, the mean taken over ``normalized_shape``, in fp32 for
    half-precision h; ``h = residual + dropout(x)``, or x.

    Args:
        normalized_shape: int or ints, the sizes of the dimensions normalised over, which are the last ones of x.
        eps: added to the mean square; None: machine epsilon, of float32 for half-precision x.
        elementwise_affine: whether there is a weight, of shape ``normalized_shape``.
        device, dtype: of the weight.
        weight_offset: added to the weight; 1.0 for checkpoints that store weight − 1, as Gemma's. The weight begins as
            1 − weight_offset.

    Returns of a call: ``module(x)``, x of shape (…, *normalized_shape), is a tensor of x's shape;
    ``module(x, residual=residual, dropout_p=0.0)`` is (y, h), the sum fused with the norm. dropout_p acts in
    evaluation too: pass 0.0 there.

    Raises:
        ArgumentError: a call whose x does not end in ``normalized_shape``, or a residual of another shape.

    Source: Zhang, Sennrich 2019, "Root Mean Square Layer Normalization"; interface of torch.nn.RMSNorm.

    >>> norm = RMSNorm(64)
    >>> norm(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        weight_offset: float = 0.0,
    ) -> None:
        self.weight_offset = weight_offset  # before torch's constructor, which sets the weight
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)

    def _beyond_torch(self) -> str | None:
        return "weight_offset" if self.weight_offset else None

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.elementwise_affine and self.weight_offset:
            nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    @overload
    def forward(self, x: Tensor, *, residual: None = None, dropout_p: float = 0.0) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, *, residual: Tensor, dropout_p: float = 0.0) -> tuple[Tensor, Tensor]: ...
    def forward(self, x, *, residual=None, dropout_p=0.0):
        offset = 0.0 if self.weight is None else self.weight_offset
        if isinstance(x, Tensor) and x.is_nested and residual is None:
            weight = self.weight + offset if offset else self.weight
            return nn.functional.rms_norm(x, self.normalized_shape, weight, self.eps)
        return rms_norm(
            x, self.normalized_shape, self.weight, self.eps,
            residual=residual, dropout_p=dropout_p, weight_offset=offset,
        )  # fmt: skip
