"""A tile of a matrix with any two strides: some of its rows by some of its columns."""

import triton
import triton.language as tl

from fastattn.backends.triton.blocks.cast import cast


@triton.jit
def tile_offsets(m, n, stride_m, stride_n):
    """Element offsets (BLOCK_M, BLOCK_N) of rows m and columns n, in 64 bits."""
    return m.to(tl.int64)[:, None] * stride_m + n.to(tl.int64)[None, :] * stride_n


@triton.jit
def row_offsets(m, R1, R2, step0, step1, step2, DIMS: tl.constexpr):
    """Where rows m, int64, of a tensor begin whose rows are numbered through DIMS <= 3 dimensions (…, R1, R2)."""
    if DIMS == 1:
        return m * step2
    elif DIMS == 2:
        return m // R2 * step1 + m % R2 * step2
    else:
        return m // R2 // R1 * step0 + m // R2 % R1 * step1 + m % R2 * step2


@triton.jit
def locate_lines(R1, M, BLOCK_M: tl.constexpr):
    """This program's place in the two outer dimensions of `Lines`, and its first line in the inner one; all int64."""
    blocks = tl.cdiv(M, BLOCK_M)
    outer = (tl.program_id(0) // blocks).to(tl.int64)
    return outer // R1, outer % R1, (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_M


@triton.jit
def inside(m, n, M, N):
    """Which entries (BLOCK_M, BLOCK_N) of a tile lie in the M × N matrix."""
    return (m < M)[:, None] & (n < N)[None, :]


@triton.jit
def load_rows(ptr, m, n, stride_m, stride_n, read):
    """The entries of ptr that `read` selects, as fp32; 0 elsewhere."""
    return tl.load(ptr + tile_offsets(m, n, stride_m, stride_n), mask=read, other=0.0).to(tl.float32)


@triton.jit
def store_rows(ptr, value, m, n, stride_m, stride_n, M, N):
    """ptr[m, n] = value, rounded to ptr's type, inside of the M × N matrix."""
    tl.store(ptr + tile_offsets(m, n, stride_m, stride_n), cast(value, ptr.dtype.element_ty), mask=inside(m, n, M, N))
