"""The rows of tensors of one shape and any strides, as few dimensions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

Dimension = tuple[int, tuple[int, ...]]  # size, step of each tensor


def merge_dimensions(dims: Iterable[int], shape: Sequence[int], strides: Sequence[Sequence[int]]) -> list[Dimension]:
    """`dims` in their order, outermost first; those merged that every tensor runs through in one step."""
    merged: list[Dimension] = []
    for d in dims:
        if shape[d] == 1:
            continue
        size, steps = shape[d], tuple(s[d] for s in strides)
        if merged and all(outer == inner * size for outer, inner in zip(merged[-1][1], steps, strict=True)):
            merged[-1] = (merged[-1][0] * size, steps)
        else:
            merged.append((size, steps))
    return merged


def padded(merged: list[Dimension], count: int, tensors: int) -> list[Dimension]:
    """`count` dimensions, the first of them of size 1 where there are fewer."""
    return [(1, (0,) * tensors)] * (count - len(merged)) + merged


class Lines(NamedTuple):
    """Lines of N elements along one dimension of several tensors of one shape, and R0 · R1 · M of them."""

    R0: int
    R1: int
    M: int
    N: int
    steps: tuple[tuple[int, int, int, int], ...]  # of each tensor along R0, R1, M and N

    @property
    def rows(self) -> tuple[int, int, int]:
        return self.R0, self.R1, self.M

    @property
    def dims(self) -> int:
        """How many of the three there are: with one, line i is m."""
        return 3 if self.R0 != 1 else 2 if self.R1 != 1 else 1

    @property
    def along(self) -> tuple[int, ...]:
        """Of each tensor, from one element of a line to the next."""
        return tuple(steps[3] for steps in self.steps)

    @property
    def dense(self) -> tuple[int, int, int]:
        """Steps along R0, R1 and M of a contiguous tensor that has these lines as its rows."""
        return self.R1 * self.M * self.N, self.M * self.N, self.N

    @property
    def side_by_side(self) -> bool:
        """Whether an element's neighbour in memory, in the first tensor, is in the next line."""
        *_, stride_m, stride_n = self.steps[0]
        return stride_m == 1 and stride_n != 1


def lines_along(dim: int, tensors: Sequence[Tensor], own: int | None = None, in_order: bool = False) -> Lines | None:
    """The other dimensions, merged where every tensor runs through them in one step; None: they make more than three.

    They are taken in the order of the first tensor's strides, or `in_order` in their own; but M is the dimension `own`,
    if there is one, alone.
    """
    shape, strides = tensors[0].shape, [t.stride() for t in tensors]
    alone = {d % len(shape) for d in (dim, own) if d is not None}
    order = [d for d in range(len(shape)) if d not in alone]
    if not in_order:
        order.sort(key=lambda d: strides[0][d], reverse=True)
    merged = merge_dimensions(order, shape, strides)
    if own is not None:
        merged.append((shape[own], tuple(s[own] for s in strides)))
    if len(merged) > 3:
        return None
    (R0, outer), (R1, middle), (M, inner) = padded(merged, 3, len(tensors))
    along = tuple(s[dim] for s in strides)
    return Lines(R0, R1, M, shape[dim], tuple(zip(outer, middle, inner, along, strict=True)))


class RowLayout(NamedTuple):
    """Row i of each tensor begins at i0 · steps[0] + i1 · steps[1] + m · steps[2], i = (i0 · R1 + i1) · M + m."""

    tensors: tuple[Tensor, ...]  # (…, N)
    lines: Lines


def row_layout(tensors: Sequence[Tensor], n_dims: int) -> RowLayout:
    """Rows are the last n_dims dimensions of tensors (…, *row) of one shape, numbered in the order of the others.

    A tensor is copied if its rows cannot be walked through in one step; so are all, if their leading dimensions make
    more than three.
    """
    lead = tensors[0].dim() - n_dims
    rows = tuple(t.flatten(lead) for t in tensors)
    lines = lines_along(-1, rows, in_order=True)
    if lines is None:
        rows = tuple(t.contiguous() for t in rows)
        lines = lines_along(-1, rows, in_order=True)
        assert lines is not None  # contiguous tensors have one dimension of rows
    return RowLayout(rows, lines)
