"""Softmax and its logarithm as modules."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from fastattn.functional import log_softmax, softmax
from fastattn.nn._tracing import Scriptable

torch.fx.wrap("softmax")  # torch.fx records the call
torch.fx.wrap("log_softmax")


class Softmax(Scriptable, nn.Softmax):
    """Rescale a tensor so that its slices along one dimension are probabilities; a drop-in for `torch.nn.Softmax`.

    ``y_i = exp(x_i) / Σ_j exp(x_j)`` along ``dim``.

    Args:
        dim: the dimension that sums to 1. None picks torch's implicit one (0 for 0-, 1- and 3-D tensors, else 1)
            and warns as torch does.

    Returns of a call: ``module(x)``, x floating-point of any shape, is a tensor of x's shape and dtype.

    Raises:
        ArgumentError: a call whose x has no dimension ``dim``.

    Source: torch.nn.Softmax.

    >>> Softmax(dim=-1)(torch.zeros(2, 4))
    tensor([[0.2500, 0.2500, 0.2500, 0.2500],
            [0.2500, 0.2500, 0.2500, 0.2500]])
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name, callers pass it by keyword
        if isinstance(input, Tensor) and input.is_nested:
            return super().forward(input)
        return softmax(input, _dim(self, input))


class LogSoftmax(Scriptable, nn.LogSoftmax):
    """The logarithm of `Softmax`; a drop-in for `torch.nn.LogSoftmax`.

    ``y_i = x_i − log Σ_j exp(x_j)`` along ``dim``.

    Args:
        dim: as of `Softmax`.

    Returns of a call: ``module(x)``, x floating-point of any shape, is a tensor of x's shape and dtype.

    Raises:
        ArgumentError: a call whose x has no dimension ``dim``.

    Source: torch.nn.LogSoftmax.

    >>> LogSoftmax(dim=-1)(torch.zeros(1, 2))
    tensor([[-0.6931, -0.6931]])
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name, callers pass it by keyword
        if isinstance(input, Tensor) and input.is_nested:
            return super().forward(input)
        return log_softmax(input, _dim(self, input))


def _dim(module: Softmax | LogSoftmax, x: Tensor) -> int:
    """The module's dim, or the one that torch picks for x."""
    if module.dim is not None:
        return module.dim
    dim = 0 if x.dim() in (0, 1, 3) else 1
    warnings.warn(
        f"{type(module).__name__} was built without dim, and dim={dim} was chosen for a {x.dim()}-D input; "
        "pass dim, the choice is deprecated in torch.",
        stacklevel=5,  # past Module.__call__, to the caller's line
    )
    return dim
