"""Where rows and vectors lie, as the kernels take it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.backends.cpu.module import DTYPES
from fastattn.backends.row_layout import Lines, RowLayout, row_layout

Address = tuple[int, int, int, int, int]  # of a tensor: address, three steps, dtype
_DTYPES = DTYPES | {torch.bool: 0}  # no kernel asks which a mask has


def vector(t: Tensor | None) -> tuple[int, int] | None:
    """A contiguous vector, as the kernels take it."""
    return None if t is None else (t.data_ptr(), DTYPES[t.dtype])


def dense(t: Tensor | None, N: int) -> Address | None:
    """A contiguous tensor of rows of N elements, as one dimension of rows."""
    return None if t is None else (t.data_ptr(), 0, 0, N, DTYPES[t.dtype])


def address(lines: Lines, i: int, t: Tensor) -> Address:
    """Of t, the i-th of the tensors that have these lines."""
    return (t.data_ptr(), *lines.steps[i][:3], _DTYPES[t.dtype])


def ready(tensors: Sequence[Tensor], n_dims: int = 1) -> RowLayout:
    """The layout of rows that are contiguous: a tensor is copied, too, if its own are not."""
    flat = [t.flatten(t.dim() - n_dims) if t.dim() else t.view(1) for t in tensors]
    return row_layout([t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous() for t in flat], 1)


def written(lines: Lines, t: Tensor) -> Address:
    """A contiguous tensor that has these lines as its rows."""
    return (t.data_ptr(), *lines.dense, DTYPES[t.dtype])
