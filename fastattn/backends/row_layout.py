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
    def side_by_side(self) -> bool:
        """Whether an element's neighbour in memory, in the first tensor, is in the next line."""
        *_, stride_m, stride_n = self.steps[0]
        return stride_m == 1 and stride_n != 1


def lines_along(dim: int, tensors: Sequence[Tensor], own: int | None = None) -> Lines | None:
    """The other dimensions, merged where every tensor runs through them in one step; None: they make more than three.

    They are taken in the order of the first tensor's strides; but M is the dimension `own`, if there is one, alone.
    """
    shape, strides = tensors[0].shape, [t.stride() for t in tensors]
    alone = {d % len(shape) for d in (dim, own) if d is not None}
    order = sorted((d for d in range(len(shape)) if d not in alone), key=lambda d: strides[0][d], reverse=True)
    merged = merge_dimensions(order, shape, strides)
    if own is not None:
        merged.append((shape[own], tuple(s[own] for s in strides)))
    if len(merged) > 3:
        return None
    (R0, outer), (R1, middle), (M, inner) = padded(merged, 3, len(tensors))
    along = tuple(s[dim] for s in strides)
    return Lines(R0, R1, M, shape[dim], tuple(zip(outer, middle, inner, along, strict=True)))


class RowLayout(NamedTuple):
    """Row i of each tensor begins at i0 · steps[0] + i1 · steps[1] + i2 · steps[2], i = (i0 · R1 + i1) · R2 + i2."""

    tensors: tuple[Tensor, ...]
    dims: int  # how many of the three there are: with one, i is i2
    R1: int
    R2: int
    steps: tuple[tuple[int, int, int, int], ...]  # of each tensor, the last one along a row


def row_layout(tensors: Sequence[Tensor], n_dims: int) -> RowLayout:
    """Rows are the last n_dims dimensions of tensors (…, *row) of one shape, numbered in the order of the others.

    A tensor is copied if its rows cannot be walked through in one step; so are all, if their leading dimensions make
    more than three.
    """
    lead = tensors[0].dim() - n_dims
    rows = tuple(t.flatten(lead) for t in tensors)
    merged = merge_dimensions(range(lead), rows[0].shape, [t.stride() for t in rows])
    if len(merged) > 3:
        rows = tuple(t.contiguous() for t in rows)
        merged = merge_dimensions(range(lead), rows[0].shape, [t.stride() for t in rows])
    dims = max(len(merged), 1)
    (_, outer), (R1, middle), (R2, inner) = padded(merged, 3, len(rows))
    steps = tuple((*step, t.stride(-1)) for step, t in zip(zip(outer, middle, inner, strict=True), rows, strict=True))
    return RowLayout(rows, dims, R1, R2, steps)
