"""Dropout and the addition of a residual, forward and backward.

    y = residual + dropout(x)      dx = dropout(dy)      dropout(x) = x / (1 - dropout_p) where kept, else 0

An entry is kept or dropped by (seed, row, column), the row being the leading dimensions flattened: the same in every
tile size, pass and backend. All tensors have one shape and any strides; x may be narrower than y. Arithmetic is fp32.
Passes: forward, read x, residual and write y; backward, read dy and write dx. No mask is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.backends.triton.blocks.dropout import row_dropout_factor
from fastattn.backends.triton.blocks.rows import inside, load_rows, store_rows
from fastattn.backends.triton.configs import arch_of
from fastattn.backends.triton.elementwise import locate, merge, tile_config
from fastattn.backends.triton.row_configs import dropout_arguments

if TYPE_CHECKING:
    from fastattn.backends.triton.inspection import KernelCase


@triton.jit(do_not_specialize=["R1", "M", "threshold"])
def _dropout_add_kernel(
    y, residual, x, seed, threshold, scale, R1, M, N,
    stride_y0, stride_y1, stride_ym, stride_yn,
    stride_residual0, stride_residual1, stride_residualm, stride_residualn,
    stride_x0, stride_x1, stride_xm, stride_xn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes a tile (BLOCK_M, BLOCK_N) of y; residual may be None, and may be y."""
    r0, r1, m, n = locate(R1, M, N, BLOCK_M, BLOCK_N)
    m += tl.arange(0, BLOCK_M)
    n += tl.arange(0, BLOCK_N)
    read = inside(m, n, M, N)
    factor = row_dropout_factor((r0 * R1 + r1) * M + m, n, seed, threshold, scale)
    out = load_rows(x + r0 * stride_x0 + r1 * stride_x1, m, n, stride_xm, stride_xn, read)
    out = tl.where(factor == 0.0, 0.0, out * factor)  # what is dropped is 0, whatever it was
    if residual is not None:
        residual += r0 * stride_residual0 + r1 * stride_residual1
        out += load_rows(residual, m, n, stride_residualm, stride_residualn, read)
    store_rows(y + r0 * stride_y0 + r1 * stride_y1, out, m, n, stride_ym, stride_yn, M, N)


def launch(y: Tensor, residual: Tensor | None, x: Tensor, seed: Tensor, dropout_p: float) -> None:
    """Fills y from x and, if there is one, residual, all of one shape and any strides; y may be residual."""
    if y.numel() == 0:
        return
    present = torch.atleast_1d(y, x) if residual is None else torch.atleast_1d(y, residual, x)
    grid = merge(present, keep_rows=True)
    if grid is None:
        # Five dimensions or more that do not merge: rare enough to be copied.
        dense = torch.empty_like(y, memory_format=torch.contiguous_format)
        launch(dense, None if residual is None else residual.contiguous(), x.contiguous(), seed, dropout_p)
        y.copy_(dense)
        return
    _, R1, M, N = grid.sizes
    config = tile_config(M, N, arch_of(y.device))
    strides = grid.strides if residual is not None else (grid.strides[0], (0, 0, 0, 0), grid.strides[1])
    _dropout_add_kernel[(grid.programs(config),)](
        y, residual, x, seed, *dropout_arguments(dropout_p), R1, M, N,
        *(step for steps in strides for step in steps),
        BLOCK_M=config.rows_per_program, BLOCK_N=config.BLOCK_N, num_warps=config.num_warps,
    )  # fmt: skip


def inspect_cases(arch: str) -> list[KernelCase]:
    """The compilations that the ahead-of-time report shows; a residual in x's dtype, and one in fp32."""
    from fastattn.backends.triton.row_cases import SHAPES, row_case

    cases = []
    for dtype, N in SHAPES:
        config = tile_config(1 << 20, N, arch)
        pointers = {"x": f"*{dtype}", "y": f"*{dtype}", "residual": f"*{dtype}", "seed": "*i64"}
        name = f"{dtype}/{N}"
        no_residual = {"residual": None, **{f"stride_residual{d}": 0 for d in "01mn"}}
        cases.append(row_case(f"dropout_add/forward/{name}", _dropout_add_kernel, config, pointers))
        cases.append(row_case(f"dropout_add/backward/{name}", _dropout_add_kernel, config, pointers, **no_residual))
        if dtype != "fp32":
            wide = pointers | {"y": "*fp32", "residual": "*fp32"}
            cases.append(row_case(f"dropout_add/forward_fp32/{name}", _dropout_add_kernel, config, wide))
    return cases
