"""Gated activations, forward and backward: swiglu with silu, geglu with gelu.

    y = a(gate) · up
    dgate = dy · up · a'(gate)     dup = dy · a(gate)

All tensors have one shape and any strides: halves of one projection are read where they lie. The arithmetic is fp32.
The backward computes a(gate) again. Passes: forward, read gate, up and write y; backward, read dy, gate, up and write
dgate, dup.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.backends.triton.blocks.activation import activate, activate_with_slope
from fastattn.backends.triton.blocks.rows import inside, load_rows, store_rows
from fastattn.backends.triton.configs import arch_of
from fastattn.backends.triton.elementwise import locate, merge, tile_config
from fastattn.spec import GatedSpec

if TYPE_CHECKING:
    from fastattn.backends.triton.inspection import KernelCase


@triton.jit(do_not_specialize=["R1", "M"])
def _forward_kernel(
    y, gate, up, R1, M, N,
    stride_y0, stride_y1, stride_ym, stride_yn,
    stride_gate0, stride_gate1, stride_gatem, stride_gaten,
    stride_up0, stride_up1, stride_upm, stride_upn,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes a tile (BLOCK_M, BLOCK_N) of y."""
    r0, r1, m, n = locate(R1, M, N, BLOCK_M, BLOCK_N)
    m += tl.arange(0, BLOCK_M)
    n += tl.arange(0, BLOCK_N)
    read = inside(m, n, M, N)
    g = load_rows(gate + r0 * stride_gate0 + r1 * stride_gate1, m, n, stride_gatem, stride_gaten, read)
    u = load_rows(up + r0 * stride_up0 + r1 * stride_up1, m, n, stride_upm, stride_upn, read)
    store_rows(
        y + r0 * stride_y0 + r1 * stride_y1, activate(g, ACTIVATION) * u, m, n, stride_ym, stride_yn, M, N
    )  # fmt: skip


@triton.jit(do_not_specialize=["R1", "M"])
def _backward_kernel(
    dgate, dup, dy, gate, up, R1, M, N,
    stride_dgate0, stride_dgate1, stride_dgatem, stride_dgaten,
    stride_dup0, stride_dup1, stride_dupm, stride_dupn,
    stride_dy0, stride_dy1, stride_dym, stride_dyn,
    stride_gate0, stride_gate1, stride_gatem, stride_gaten,
    stride_up0, stride_up1, stride_upm, stride_upn,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes a tile (BLOCK_M, BLOCK_N) of dgate and of dup, either of which may be None."""
    r0, r1, m, n = locate(R1, M, N, BLOCK_M, BLOCK_N)
    m += tl.arange(0, BLOCK_M)
    n += tl.arange(0, BLOCK_N)
    read = inside(m, n, M, N)
    d = load_rows(dy + r0 * stride_dy0 + r1 * stride_dy1, m, n, stride_dym, stride_dyn, read)
    g = load_rows(gate + r0 * stride_gate0 + r1 * stride_gate1, m, n, stride_gatem, stride_gaten, read)
    a, slope = activate_with_slope(g, ACTIVATION)
    if dgate is not None:
        u = load_rows(up + r0 * stride_up0 + r1 * stride_up1, m, n, stride_upm, stride_upn, read)
        dgate += r0 * stride_dgate0 + r1 * stride_dgate1
        store_rows(dgate, d * u * slope, m, n, stride_dgatem, stride_dgaten, M, N)
    if dup is not None:
        dup += r0 * stride_dup0 + r1 * stride_dup1
        store_rows(dup, d * a, m, n, stride_dupm, stride_dupn, M, N)


def _launch(kernel: triton.JITFunction, tensors: tuple[Tensor | None, ...], n_outputs: int, spec: GatedSpec) -> None:
    """Runs kernel(*tensors, …) over every element; the first tensors are outputs, of which one may be None."""
    present = tuple(t for t in tensors if t is not None)
    if present[0].numel() == 0:
        return
    grid = merge(torch.atleast_1d(*present))
    if grid is None:
        # Five dimensions or more, through which the tensors run in different orders: rare enough to be copied.
        dense = tuple(None if t is None else t.contiguous() for t in tensors)
        _launch(kernel, dense, n_outputs, spec)
        for out, filled in zip(tensors[:n_outputs], dense[:n_outputs], strict=True):
            if out is not None and filled is not None and filled is not out:
                out.copy_(filled)
        return
    _, R1, M, N = grid.sizes
    config = tile_config(M, N, arch_of(present[0].device))
    strides = iter(grid.strides)
    kernel[(grid.programs(config),)](
        *tensors, R1, M, N,
        *(step for t in tensors for step in ((0, 0, 0, 0) if t is None else next(strides))),
        ACTIVATION=spec.activation, BLOCK_M=config.rows_per_program, BLOCK_N=config.BLOCK_N,
        num_warps=config.num_warps,
    )  # fmt: skip


def launch_forward(y: Tensor, gate: Tensor, up: Tensor, spec: GatedSpec) -> None:
    """Fills y from gate and up, all of one shape and any strides."""
    _launch(_forward_kernel, (y, gate, up), 1, spec)


def launch_backward(
    dgate: Tensor | None, dup: Tensor | None, dy: Tensor, gate: Tensor, up: Tensor, spec: GatedSpec
) -> None:
    """Fills those of dgate and dup that are not None."""
    if dgate is not None or dup is not None:
        _launch(_backward_kernel, (dgate, dup, dy, gate, up), 2, spec)


def inspect_cases(arch: str) -> list[KernelCase]:
    """The compilations that the ahead-of-time report shows: halves of one projection."""
    from fastattn.backends.triton.row_cases import SHAPES, row_case

    cases = []
    for dtype, N in SHAPES:
        config = tile_config(1 << 20, N, arch)
        for name, kernel, tensors in (
            ("forward", _forward_kernel, ("y", "gate", "up")),
            ("backward", _backward_kernel, ("dgate", "dup", "dy", "gate", "up")),
        ):
            pointers = dict.fromkeys(tensors, f"*{dtype}")
            for activation in ("silu", "gelu", "gelu_tanh"):
                case = f"gated/{name}/{activation}/{dtype}/{N}"
                cases.append(row_case(case, kernel, config, pointers, ACTIVATION=activation))
    return cases
