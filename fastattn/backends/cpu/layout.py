"""Where the rows of tensors of one shape lie: three merged dimensions of rows, and the steps of each tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.backends.cpu.module import DTYPES
from fastattn.backends.row_layout import merge_dimensions, padded

Sizes = tuple[int, int, int]
Address = tuple[int, int, int, int, int]  # of a tensor: address, three steps, dtype
_DTYPES = DTYPES | {torch.bool: 0}  # no kernel asks which a mask has


def vector(t: Tensor | None) -> tuple[int, int] | None:
    """A contiguous vector, as the kernels take it."""
    return None if t is None else (t.data_ptr(), DTYPES[t.dtype])


def dense(t: Tensor | None, N: int) -> Address | None:
    """A contiguous tensor of rows of N elements, as one dimension of rows."""
    return None if t is None else (t.data_ptr(), 0, 0, N, DTYPES[t.dtype])


class Lines(NamedTuple):
    """Lines of N elements along one dimension of several tensors of one shape, and R0 · R1 · R2 of them."""

    sizes: Sizes
    N: int
    steps: tuple[tuple[int, ...], ...]  # of each tensor along R0, R1, R2
    along: tuple[int, ...]  # of each tensor, from one element of a line to the next

    def address(self, i: int, t: Tensor) -> Address:
        """Of the i-th tensor."""
        return (t.data_ptr(), *self.steps[i], _DTYPES[t.dtype])  # type: ignore[return-value]


def lines(tensors: Sequence[Tensor], dim: int, own: int | None = None, in_order: bool = False) -> Lines | None:
    """The other dimensions, merged where every tensor runs through them in one step; None: they make more than three.

    They are taken in the order of the first tensor's strides, or `in_order` in their own; R2 is the dimension `own`, if
    there is one, alone.
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
    sizes, steps = zip(*padded(merged, 3, len(tensors)), strict=True)
    return Lines(sizes, shape[dim], tuple(zip(*steps, strict=True)), tuple(s[dim] for s in strides))


def ready(tensors: Sequence[Tensor], n_dims: int = 1) -> tuple[list[Tensor], Lines]:
    """Rows are the last n_dims dimensions of tensors (…, *row) of one shape, numbered in the order of the others.

    A tensor is copied if its rows are not contiguous; so are all, if their leading dimensions make more than three.
    """
    flat = [t.flatten(t.dim() - n_dims) if t.dim() else t.view(1) for t in tensors]
    flat = [t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous() for t in flat]
    found = lines(flat, -1, in_order=True)
    if found is None:
        flat = [t.contiguous() for t in flat]
        found = lines(flat, -1, in_order=True)
        assert found is not None  # contiguous tensors have one dimension of rows
    return flat, found


def written(found: Lines, t: Tensor) -> Address:
    """A contiguous tensor that has these rows."""
    _, R1, R2 = found.sizes
    N = found.N
    return t.data_ptr(), R1 * R2 * N, R2 * N, N, DTYPES[t.dtype]
