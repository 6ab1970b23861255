"""Two-dimensional tiles: loading, storing, and the two products that attention takes of them.

A tile of rows of width D is a tuple of one or two column blocks, D.first and D.second wide: powers of two that hold
widths such as 192 = 128 + 64 and 576 = 512 + 64 with little padding. D is a `configs.Columns`.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fastattn.backends.triton.blocks.cast import INTERPRET, cast


class Matrix(NamedTuple):
    """One head of one sequence: rows of D entries, read or written a tile of rows at a time."""

    ptr: tl.tensor  # to entry (0, 0)
    stride: tl.tensor  # from row to row
    tile: tl.tuple  # offsets of a tile's entries from its first row, one tensor for each column block


@triton.jit
def matrix(
    X, rows, h, stride_b, stride_h, stride_row, stride_col, BLOCK: tl.constexpr, D: tl.constexpr, F: tl.constexpr
):
    """Head h of the sequence at `rows` of X (B, H, S, D), in tiles of BLOCK rows; F.WIDE: a tile may pass 2^31."""
    X += rows.batch * stride_b + h.to(tl.int64) * stride_h + rows.start * stride_row
    row, first, second = tl.arange(0, BLOCK), tl.arange(0, D.first), D.first + tl.arange(0, max(D.second, 1))
    if F.WIDE:
        row, first, second = row.to(tl.int64), first.to(tl.int64), second.to(tl.int64)
    tile = (row[:, None] * stride_row + first[None, :] * stride_col,)
    if D.second != 0:
        tile = tile + (row[:, None] * stride_row + second[None, :] * stride_col,)
    return Matrix(X, stride_row, tile)


@triton.jit
def next_head(x, g, stride_h):
    """The matrix g heads further on."""
    return Matrix(x.ptr + g.to(tl.int64) * stride_h, x.stride, x.tile)


@triton.jit
def _load(ptr, tile, keep, MASK_ROWS: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr):
    """One column block, from column START on, of which columns below N exist."""
    if START + WIDTH > N:
        exists = (START + tl.arange(0, WIDTH) < N)[None, :]
        if MASK_ROWS:
            return tl.load(ptr + tile, mask=keep & exists, other=0.0)
        else:
            return tl.load(ptr + tile, mask=exists, other=0.0)
    elif MASK_ROWS:
        return tl.load(ptr + tile, mask=keep, other=0.0)
    else:
        return tl.load(ptr + tile)


@triton.jit
def load_tile(x, start, rows, n_rows, MASK_ROWS: tl.constexpr, D: tl.constexpr):
    """The tile (R, D) from row `start` on, 0 from row n_rows on; a mask that is not asked for costs nothing."""
    ptr = x.ptr + start.to(tl.int64) * x.stride
    keep = (rows < n_rows)[:, None]
    value = (_load(ptr, x.tile[0], keep, MASK_ROWS, 0, D.first, D.n),)
    if D.second != 0:
        value = value + (_load(ptr, x.tile[1], keep, MASK_ROWS, D.first, D.second, D.n),)
    return value


@triton.jit
def store_tile(x, start, value, rows, n_rows, D: tl.constexpr):
    """Write a tile (R, D) from row `start` on, as far as there are rows and columns."""
    ptr = x.ptr + start.to(tl.int64) * x.stride
    dtype = x.ptr.dtype.element_ty
    keep = (rows < n_rows)[:, None]
    tl.store(ptr + x.tile[0], cast(value[0], dtype), mask=keep & (tl.arange(0, D.first) < D.n)[None, :])
    if D.second != 0:
        exists = (D.first + tl.arange(0, D.second) < D.n)[None, :]
        tl.store(ptr + x.tile[1], cast(value[1], dtype), mask=keep & exists)


@triton.jit
def zeros(R: tl.constexpr, D: tl.constexpr):
    """An accumulator (R, D)."""
    x = (tl.full([R, D.first], 0.0, tl.float32),)
    if D.second != 0:
        x = x + (tl.full([R, D.second], 0.0, tl.float32),)
    return x


@triton.jit
def scaled(x, factor):
    """x · factor, which broadcasts to a column block: a number, or (R, 1)."""
    y = ()
    for i in tl.static_range(len(x)):
        y = y + (x[i] * factor,)
    return y


@triton.jit
def widened(x):
    """8-bit numbers as bfloat16, which holds them exactly."""
    y = ()
    for i in tl.static_range(len(x)):
        value = x[i]
        if INTERPRET:  # which reads the code of NaN as 480, beyond the largest number, 448
            value = value.to(tl.float32)
            value = tl.where(tl.abs(value) < 480.0, value, float("nan"))
        y = y + (value.to(tl.bfloat16),)
    return y


@triton.jit
def row_dot(x, y):
    """rowsum(x ∘ y) (R,) in fp32."""
    total = tl.sum(x[0].to(tl.float32) * y[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(x)):
        total += tl.sum(x[i].to(tl.float32) * y[i].to(tl.float32), 1)
    return total


@triton.jit
def dot(a, b, acc, DOT: tl.constexpr):
    """acc + a b, accumulated in fp32. DOT is the precision of an fp32 product, "ieee" or "tf32".

    "interpret": the interpreter's bfloat16 product is wrong, so there both operands are widened first, which is exact.
    """
    if DOT == "interpret":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=DOT)


@triton.jit
def inner(x, y, DOT: tl.constexpr):
    """x yᵀ: (R, D) by (C, D) -> (R, C)."""
    acc = tl.zeros([x[0].shape[0], y[0].shape[0]], tl.float32)
    for i in tl.static_range(len(x)):
        acc = dot(x[i], tl.trans(y[i]), acc, DOT)
    return acc


@triton.jit
def outer(p, y, acc, DOT: tl.constexpr):
    """acc + p y: (R, C) by (C, D) -> (R, D); p is rounded to y's type."""
    out = ()
    for i in tl.static_range(len(y)):
        out = out + (dot(cast(p, y[i].dtype), y[i], acc[i], DOT),)
    return out
