"""Loading and storing two-dimensional tiles, and the matrix product of two of them."""

import triton
import triton.language as tl


@triton.jit
def offsets(rows, cols, stride_row, stride_col, F: tl.constexpr):
    """Element offsets (R, C) of one tile from its first row; F.WIDE: they may pass 2^31."""
    if F.WIDE:
        rows, cols = rows.to(tl.int64), cols.to(tl.int64)
    return rows[:, None] * stride_row + cols[None, :] * stride_col


@triton.jit
def load_tile(X, tile, rows, cols, n_rows, n_cols, MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr):
    """X[tile], 0 outside the first n_rows × n_cols; a mask that is not asked for costs nothing."""
    if MASK_ROWS and MASK_COLS:
        return tl.load(X + tile, mask=(rows < n_rows)[:, None] & (cols < n_cols)[None, :], other=0.0)
    elif MASK_ROWS:
        return tl.load(X + tile, mask=(rows < n_rows)[:, None], other=0.0)
    elif MASK_COLS:
        return tl.load(X + tile, mask=(cols < n_cols)[None, :], other=0.0)
    else:
        return tl.load(X + tile)


@triton.jit
def store_tile(X, tile, x, rows, cols, n_rows, n_cols):
    """X[tile] = x inside the first n_rows × n_cols."""
    tl.store(X + tile, x.to(X.dtype.element_ty), mask=(rows < n_rows)[:, None] & (cols < n_cols)[None, :])


@triton.jit
def dot(a, b, acc, DOT: tl.constexpr):
    """acc + a b, accumulated in fp32. DOT is the precision of an fp32 product, "ieee" or "tf32".

    "interpret": the interpreter's bfloat16 product is wrong, so there both operands are widened first, which is exact.
    """
    if DOT == "interpret":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=DOT)
