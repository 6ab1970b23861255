"""How an elementwise kernel walks through tensors of one shape and any strides.

The dimensions are merged, for all tensors of a call at once, into at most four: (R0, R1, M, N). A program works on a
tile of BLOCK_M × BLOCK_N in the two inner ones. Contiguous tensors are one row; halves of one projection are M rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastattn.backends.row_layout import merge_dimensions, padded
from fastattn.backends.triton.configs import next_power_of_2
from fastattn.backends.triton.row_configs import ELEMENTS, MIN_THREADS, RowConfig, warp_size


@triton.jit
def locate(R1, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's place in the two outer dimensions, its first row and its first column; all int64."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    blocks = tl.cdiv(M, BLOCK_M) * blocks_n
    outer, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    first_m, first_n = block // blocks_n, block % blocks_n
    return (
        (outer // R1).to(tl.int64),
        (outer % R1).to(tl.int64),
        first_m.to(tl.int64) * BLOCK_M,
        first_n.to(tl.int64) * BLOCK_N,
    )


class Grid(NamedTuple):
    """The merged dimensions of several tensors of one shape."""

    sizes: tuple[int, int, int, int]  # R0, R1, M, N
    strides: tuple[tuple[int, ...], ...]  # of each tensor along these

    def programs(self, config: RowConfig) -> int:
        R0, R1, M, N = self.sizes
        return R0 * R1 * triton.cdiv(M, config.rows_per_program) * triton.cdiv(N, config.BLOCK_N)


def merge(tensors: Sequence[Tensor], keep_rows: bool = False) -> Grid | None:
    """The dimensions, those merged that every tensor runs through in one step; None: more than four.

    They are taken in the order of the first tensor's strides. `keep_rows`: in their own order, with N the last one.
    """
    shape, strides = tensors[0].shape, [t.stride() for t in tensors]
    order = list(range(len(shape) - keep_rows))
    if not keep_rows:
        order.sort(key=lambda d: strides[0][d], reverse=True)
    merged = merge_dimensions(order, shape, strides)
    if keep_rows:
        merged.append((shape[-1], tuple(s[-1] for s in strides)))
    if len(merged) > 4:
        return None
    sizes, steps = zip(*padded(merged, 4, len(tensors)), strict=True)
    return Grid(sizes, tuple(zip(*steps, strict=True)))


def tile_config(M: int, N: int, arch: str) -> RowConfig:
    """ELEMENTS for each of MIN_THREADS threads: of one row, or of several short ones."""
    BLOCK_N = min(next_power_of_2(N), MIN_THREADS * ELEMENTS)
    BLOCK_M = min(next_power_of_2(M), MIN_THREADS * ELEMENTS // BLOCK_N)
    return RowConfig(BLOCK_N, BLOCK_M, MIN_THREADS // warp_size(arch))
