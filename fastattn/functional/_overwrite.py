"""Working in place: what may be written over, and by whom."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastattn.errors import ArgumentError
from fastattn.tracing import is_plain


def check_overwritten(fn: str, tensors: dict[str, Tensor]) -> None:
    """Refuses to write over leaves that want a gradient, and over memory that is met twice."""
    for name, t in tensors.items():
        if t.requires_grad and t.is_leaf and torch.is_grad_enabled():
            raise ArgumentError(
                f"{fn}: `{name}` is a leaf that requires a gradient, and cannot be written over; leave out `inplace`."
            )
        if any(step == 0 and size > 1 for size, step in zip(t.shape, t.stride(), strict=True)):
            raise ArgumentError(
                f"{fn}: `{name}` has strides {tuple(t.stride())} and overlaps itself; it cannot be written over."
            )


def overwritable(written: Iterable[Tensor], *others: Tensor | None) -> bool:
    """Whether a kernel may write over these tensors itself: autograd cannot be told of it where one is a view."""
    written = tuple(written)
    if not is_plain(*written, *others):
        return False
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in written)
    return not (differentiated and any(t._is_view() for t in written))
