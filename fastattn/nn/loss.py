"""Losses over classes as modules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _WeightedLoss

from fastattn.errors import ArgumentError, UnsupportedError
from fastattn.functional import cross_entropy, linear_cross_entropy
from fastattn.nn._tracing import Scriptable

torch.fx.wrap("cross_entropy")  # torch.fx records the call
torch.fx.wrap("linear_cross_entropy")


class CrossEntropyLoss(Scriptable, nn.CrossEntropyLoss):
    """Cross entropy of logits with classes or class probabilities; a drop-in for `torch.nn.CrossEntropyLoss`.

    ``loss = −Σ_j q_j log softmax(logits)_j + z_loss · lse²`` of each row, reduced.

    Args:
        weight, size_average, ignore_index, reduce, reduction, label_smoothing: as of torch.nn.CrossEntropyLoss.
        z_loss: factor on the squared logarithm of the softmax's denominator.
        softcap: bounds the logits to ±softcap by tanh; None: not.

    Returns of a call: ``module(input, target)``, input (V,), (N, V) or (N, V, d1, …), is what `cross_entropy` returns.

    Raises:
        ArgumentError, ArgumentTypeError: a call whose tensors do not fit.

    Source: interface of torch.nn.CrossEntropyLoss.

    >>> CrossEntropyLoss()(torch.zeros(2, 4), torch.tensor([1, 3]))
    tensor(1.3863)
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
    ):
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss = z_loss
        self.softcap = softcap

    def _beyond_torch(self) -> str | None:
        return "z_loss" if self.z_loss else None if self.softcap is None else "softcap"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # noqa: A002 - torch's name, callers pass it by keyword
        return cross_entropy(
            input, target, self.weight, self.ignore_index, self.reduction, self.label_smoothing,
            z_loss=self.z_loss, softcap=self.softcap,
        )  # fmt: skip


class LinearCrossEntropyLoss(_WeightedLoss):
    """A linear layer and the cross entropy of what it makes; a drop-in for `torch.nn.LinearCrossEntropyLoss`.

    ``loss = cross_entropy(input · weightᵀ + bias, target)`` without holding the logits.

    Args:
        in_features, num_classes: E and V; ``linear.weight`` is (V, E).
        out_features: only (); torch's losses of several dimensions are not implemented.
        bias: whether there is a ``linear.bias`` (V,).
        device, dtype: of the parameters.
        reduction, weight, ignore_index, label_smoothing: as of torch's; `ignore_index` None is −100.
        options: torch's chunking options, of which only None is accepted; see `chunk_size`.
        z_loss, softcap, chunk_size: as of `linear_cross_entropy`.

    Returns of a call: ``module(input, target)``, input (E,) or (…, E), is what `linear_cross_entropy` returns.

    Raises:
        UnsupportedError: `out_features` or `options` that are not the default.
        ArgumentError, ArgumentTypeError: a call whose tensors do not fit.

    Source: interface of torch.nn.LinearCrossEntropyLoss (2.13).

    >>> LinearCrossEntropyLoss(8, 4)(torch.zeros(2, 8), torch.tensor([1, 3])).detach()
    tensor(1.3863)
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
        chunk_size: int | None = None,
    ):
        if tuple(out_features) or options is not None:
            name, given = ("options", "given") if options is not None else ("out_features", tuple(out_features))
            raise UnsupportedError(
                f"LinearCrossEntropyLoss: `{name}` is {given}, which is not implemented; leave it at its default."
            )
        if weight is not None and tuple(weight.shape) != (num_classes,):
            raise ArgumentError(
                f"LinearCrossEntropyLoss: `weight` has shape {tuple(weight.shape)}; it must be ({num_classes},)."
            )
        if not 0.0 <= label_smoothing <= 1.0 or math.isnan(label_smoothing):
            raise ArgumentError(
                f"LinearCrossEntropyLoss: `label_smoothing` is {label_smoothing}; it must be between 0 and 1."
            )
        super().__init__(weight, None, None, reduction)
        self.num_classes = num_classes
        self.out_features = ()
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.options = None
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.z_loss = z_loss
        self.softcap = softcap
        self.chunk_size = chunk_size

    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # noqa: A002 - torch's name, callers pass it by keyword
        return linear_cross_entropy(
            input, self.linear.weight, target, self.linear.bias, class_weight=self.weight,
            ignore_index=-100 if self.ignore_index is None else self.ignore_index, reduction=self.reduction,
            label_smoothing=self.label_smoothing, z_loss=self.z_loss, softcap=self.softcap, chunk_size=self.chunk_size,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"in_features={self.linear.in_features}, num_classes={self.num_classes}, "
            f"bias={self.linear.bias is not None}, reduction={self.reduction}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}"
        )
