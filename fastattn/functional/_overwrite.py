"""Working in place: what may be written over, and by whom."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

import torch
from torch import Tensor

from fastattn.errors import ArgumentError
from fastattn.tracing import is_plain


def check_overwritten(fn: str, tensors: dict[str, Tensor]) -> None:
    """Refuses to write over leaves that want a gradient, and over memory that is met twice."""
    for name, t in tensors.items():
        if is_plain(t) and t.is_inference() and not torch.is_inference_mode_enabled():
            raise ArgumentError(
                f"{fn}: `{name}` is an inference tensor, which is written over inside torch.inference_mode() alone; "
                "leave out `inplace`, or clone it."
            )
        if t.requires_grad and t.is_leaf and torch.is_grad_enabled():
            raise ArgumentError(
                f"{fn}: `{name}` is a leaf that requires a gradient, and cannot be written over; leave out `inplace`."
            )
        if overlaps_itself(t):
            raise ArgumentError(
                f"{fn}: `{name}` has strides {tuple(t.stride())} and overlaps itself; it cannot be written over."
            )
    for (a, first), (b, second) in combinations(tensors.items(), 2):
        if is_plain(first, second) and may_share(first, second):
            raise ArgumentError(f"{fn}: `{a}` and `{b}` share memory, which cannot be written over twice.")


def overwritable(written: Iterable[Tensor], *others: Tensor | None) -> bool:
    """Whether a kernel may write over these tensors itself: autograd cannot be told of it where one is a view, and no
    other may be read in what is written, but in the same places."""
    written = tuple(written)
    if not is_plain(*written, *others):
        return False
    if any(t is not None and may_share(w, t) and not same_places(w, t) for w in written for t in others):
        return False
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in written)
    return not (differentiated and any(t._is_view() for t in written))


def overlaps_itself(t: Tensor) -> bool:
    """Whether two indices may lead to one element: each step should be longer than all that shorter steps reach."""
    reach = 0
    for step, size in sorted((step, size) for size, step in zip(t.shape, t.stride(), strict=True) if size > 1):
        if t.numel() and step <= reach:
            return True
        reach += step * (size - 1)
    return False


def may_share(a: Tensor, b: Tensor) -> bool:
    """Whether an element of plain tensors a and b may lie in one place; sure of it where their strides are equal."""
    if not a.numel() or not b.numel() or a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    distance = b.data_ptr() - a.data_ptr()
    if distance >= _extent(a) or -distance >= _extent(b):
        return False
    if a.dtype != b.dtype or a.stride() != b.stride() or distance % a.itemsize:
        return True
    steps = sorted(zip(a.stride(), a.shape, b.shape, strict=True), reverse=True)
    return _reaches(distance // a.itemsize, steps)


def _extent(t: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    return t.itemsize * (1 + sum(step * (size - 1) for size, step in zip(t.shape, t.stride(), strict=True)))


def _reaches(distance: int, steps: list[tuple[int, int, int]]) -> bool:
    """Whether distance = Σ (i - j) · step with 0 <= i < size of a and 0 <= j < size of b along each; steps descend."""
    if not steps:
        return distance == 0
    (step, size_a, size_b), *rest = steps
    if step == 0:
        return _reaches(distance, rest)
    up, down = (sum(s * (sizes[i] - 1) for s, *sizes in rest) for i in (0, 1))  # how far the rest goes
    first, last = max(-((up - distance) // step), 1 - size_b), min((distance + down) // step, size_a - 1)
    return any(_reaches(distance - d * step, rest) for d in range(first, last + 1))


def same_places(a: Tensor, b: Tensor) -> bool:
    """Whether each element of a is that of b at the same index."""
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)
