"""Softmax and log_softmax over one dimension of a tensor, with scale, bool mask and causality, forward and backward.

    y = exp(s - max s) / Σ exp(s - max s)        s = scale · x over the visible entries; hidden ones are 0
    log y = (s - max s) - log Σ exp(s - max s)   hidden ones are -inf

    dx = scale · y · (dy - Σ dy · y)             from y
    dx = scale · (dy - exp(log y) · Σ dy)        from log y; hidden entries have no part in Σ and get 0

A row is a line of x along `dim`, of N elements. An entry is visible where the mask is True and, if causal, where
j <= i + shift. What a hidden entry holds is never computed with. A row without visible entries is 0 (log: -inf); one
whose visible entries are all -inf is NaN there, as torch's is. The arithmetic is fp32.

The other dimensions are merged, for all tensors of a call at once, into at most three: (R0, R1, M). A tile is BLOCK_M
neighbours along M, which are coalesced accesses when `dim` is not the last, by BLOCK_N elements of each of these rows.

A row that fits one tile is read once. A longer one is read twice, in chunks of BLOCK_N: for its maximum and sum
(backward: its sum), kept up to date as the chunks come by, and for its result.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.backends.row_layout import lines_along
from fastattn.backends.triton.blocks.constants import NEG_INF
from fastattn.backends.triton.blocks.rows import inside, load_rows, locate_lines, store_rows, tile_offsets
from fastattn.backends.triton.blocks.softmax import online_sum
from fastattn.backends.triton.configs import arch_of
from fastattn.backends.triton.row_configs import row_config
from fastattn.spec import SoftmaxSpec

if TYPE_CHECKING:
    from fastattn.backends.triton.inspection import KernelCase

FORWARD_TILES = 2  # s, and exp(s)
BACKWARD_TILES = 3  # y, dy, and a product


@triton.jit
def _sees(m, n, N, shift):
    """Causality: n <= m + shift. The bound is brought into the range of n, and so into its type, mostly 32 bits."""
    last = tl.maximum(tl.minimum(m + shift, N), -1).to(n.dtype)
    return n[None, :] <= last[:, None]


@triton.jit
def _visible(mask, m, n, stride_m, stride_n, M, N, shift, CAUSAL: tl.constexpr):
    """Which of the entries (m, n) exist and are visible; mask may be None."""
    keep = inside(m, n, M, N)
    if mask is not None:
        keep &= tl.load(mask + tile_offsets(m, n, stride_m, stride_n), mask=keep, other=0) != 0
    if CAUSAL:
        keep &= _sees(m, n, N, shift)
    return keep


@triton.jit
def _load(ptr, m, n, stride_m, stride_n, M, N, shift, CAUSAL: tl.constexpr):
    """ptr[m, n] as fp32. Causal: not read past the diagonal, to the next 16 columns, which keep the loads wide."""
    read = inside(m, n, M, N)
    if CAUSAL:
        read &= _sees(m, n // 16 * 16, N, shift)
    return load_rows(ptr, m, n, stride_m, stride_n, read)


@triton.jit
def _columns_in_sight(first, N, shift, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr):
    """How many columns the rows from `first` on see; none if negative. A sum along the row may stop there."""
    if CAUSAL:
        return tl.minimum(N, first + BLOCK_M + shift)
    else:
        return N


@triton.jit
def _scores(x, mask, m, n, stride_xm, stride_xn, stride_maskm, stride_maskn, M, N, scale, shift, CAUSAL: tl.constexpr):
    """s = scale · x (BLOCK_M, BLOCK_N), -inf where hidden; and what is visible."""
    keep = _visible(mask, m, n, stride_maskm, stride_maskn, M, N, shift, CAUSAL)
    x_tile = _load(x, m, n, stride_xm, stride_xn, M, N, shift, CAUSAL)
    return tl.where(keep, x_tile * scale, NEG_INF), keep


@triton.jit
def _normalise(s, keep, row_max, row_sum, LOG: tl.constexpr):
    """y. In a row whose visible entries are all -inf, s - row_max is NaN."""
    centred = s - row_max[:, None]
    if LOG:
        return tl.where(keep, centred - tl.log(row_sum)[:, None], NEG_INF)
    else:
        return tl.where(keep, tl.exp(centred) / row_sum[:, None], 0.0)


@triton.jit(do_not_specialize=["R1", "shift"])
def _forward_kernel(
    y, x, mask, scale, shift, R1, M, N,
    stride_y0, stride_y1, stride_ym, stride_yn,
    stride_x0, stride_x1, stride_xm, stride_xn,
    stride_mask0, stride_mask1, stride_maskm, stride_maskn,
    LOG: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M rows of y."""
    r0, r1, first = locate_lines(R1, M, BLOCK_M)
    y += r0 * stride_y0 + r1 * stride_y1
    x += r0 * stride_x0 + r1 * stride_x1
    if mask is not None:
        mask += r0 * stride_mask0 + r1 * stride_mask1
    m = first + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    if ONE_TILE:
        s, keep = _scores(x, mask, m, n, stride_xm, stride_xn, stride_maskm, stride_maskn, M, N, scale, shift, CAUSAL)
        row_max = tl.max(s, 1)
        row_sum = tl.sum(tl.where(keep, tl.exp(s - row_max[:, None]), 0.0), 1)
        store_rows(y, _normalise(s, keep, row_max, row_sum, LOG), m, n, stride_ym, stride_yn, M, N)
    else:
        row_max = tl.full((BLOCK_M,), NEG_INF, tl.float32)
        row_sum = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, _columns_in_sight(first, N, shift, CAUSAL, BLOCK_M), BLOCK_N):
            s, keep = _scores(
                x, mask, m, start + n, stride_xm, stride_xn, stride_maskm, stride_maskn, M, N, scale, shift, CAUSAL
            )
            row_max, row_sum = online_sum(row_max, row_sum, s)
        for start in range(0, N, BLOCK_N):
            s, keep = _scores(
                x, mask, m, start + n, stride_xm, stride_xn, stride_maskm, stride_maskn, M, N, scale, shift, CAUSAL
            )
            store_rows(y, _normalise(s, keep, row_max, row_sum, LOG), m, start + n, stride_ym, stride_yn, M, N)


@triton.jit
def _load_gradient(
    dy, y, mask, m, n, stride_dym, stride_dyn, stride_ym, stride_yn, stride_maskm, stride_maskn, M, N, shift,
    LOG: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """The probabilities p = y or exp(log y), and dy, both 0 where hidden; and what is visible."""
    keep = _visible(mask, m, n, stride_maskm, stride_maskn, M, N, shift, CAUSAL)
    p = _load(y, m, n, stride_ym, stride_yn, M, N, shift, CAUSAL)
    if LOG:
        p = tl.exp(p)
    dy_tile = _load(dy, m, n, stride_dym, stride_dyn, M, N, shift, CAUSAL)
    return tl.where(keep, p, 0.0), tl.where(keep, dy_tile, 0.0), keep


@triton.jit
def _row_dot(p, dy, LOG: tl.constexpr):
    """Σ dy · y, or Σ dy from log y."""
    return tl.sum(dy if LOG else dy * p, 1)


@triton.jit
def _input_gradient(p, dy, keep, dot, scale, LOG: tl.constexpr):
    """dx. `keep` holds back a NaN that the row's own visible entries have brought into `dot`."""
    dx = dy - p * dot[:, None] if LOG else p * (dy - dot[:, None])
    return tl.where(keep, scale * dx, 0.0)


@triton.jit(do_not_specialize=["R1", "shift"])
def _backward_kernel(
    dx, dy, y, mask, scale, shift, R1, M, N,
    stride_dx0, stride_dx1, stride_dxm, stride_dxn,
    stride_dy0, stride_dy1, stride_dym, stride_dyn,
    stride_y0, stride_y1, stride_ym, stride_yn,
    stride_mask0, stride_mask1, stride_maskm, stride_maskn,
    LOG: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M rows of dx."""
    r0, r1, first = locate_lines(R1, M, BLOCK_M)
    dx += r0 * stride_dx0 + r1 * stride_dx1
    dy += r0 * stride_dy0 + r1 * stride_dy1
    y += r0 * stride_y0 + r1 * stride_y1
    if mask is not None:
        mask += r0 * stride_mask0 + r1 * stride_mask1
    m = first + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    if ONE_TILE:
        p, dy_tile, keep = _load_gradient(
            dy, y, mask, m, n, stride_dym, stride_dyn, stride_ym, stride_yn, stride_maskm, stride_maskn,
            M, N, shift, LOG, CAUSAL,
        )  # fmt: skip
        out = _input_gradient(p, dy_tile, keep, _row_dot(p, dy_tile, LOG), scale, LOG)
        store_rows(dx, out, m, n, stride_dxm, stride_dxn, M, N)
    else:
        dot = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, _columns_in_sight(first, N, shift, CAUSAL, BLOCK_M), BLOCK_N):
            p, dy_tile, keep = _load_gradient(
                dy, y, mask, m, start + n, stride_dym, stride_dyn, stride_ym, stride_yn, stride_maskm, stride_maskn,
                M, N, shift, LOG, CAUSAL,
            )  # fmt: skip
            dot += _row_dot(p, dy_tile, LOG)
        for start in range(0, N, BLOCK_N):
            p, dy_tile, keep = _load_gradient(
                dy, y, mask, m, start + n, stride_dym, stride_dyn, stride_ym, stride_yn, stride_maskm, stride_maskn,
                M, N, shift, LOG, CAUSAL,
            )  # fmt: skip
            out = _input_gradient(p, dy_tile, keep, dot, scale, LOG)
            store_rows(dx, out, m, start + n, stride_dxm, stride_dxn, M, N)


def _launch(
    kernel: triton.JITFunction,
    tensors: tuple[Tensor, ...],
    mask: Tensor | None,
    tiles: int,
    spec: SoftmaxSpec,
    dim: int,
) -> None:
    """Runs kernel(*tensors, mask, …) over every row; the first of the tensors, which have one shape, is its output."""
    out = tensors[0]
    if out.numel() == 0:
        return
    tensors = torch.atleast_1d(*tensors)
    mask = mask if mask is None else mask.expand(tensors[0].shape)
    lines = lines_along(dim, tensors if mask is None else (*tensors, mask), own=-2 if spec.causal else None)
    if lines is None:
        # Five dimensions or more, through which the tensors run in different orders: rare enough to be copied.
        dense = torch.empty_like(out, memory_format=torch.contiguous_format)
        inputs = tuple(t.contiguous() for t in tensors[1:])
        _launch(kernel, (dense, *inputs), mask if mask is None else mask.contiguous(), tiles, spec, dim)
        out.copy_(dense)
        return
    R0, R1, M, N, steps = lines
    config = row_config(N, tiles, arch_of(out.device), rows=M, contiguous_rows=lines.side_by_side)
    kernel[(R0 * R1 * triton.cdiv(M, config.rows_per_program),)](
        *tensors, mask, spec.scale, spec.shift(M, N) if spec.causal else 0, R1, M, N,
        *itertools.chain(*steps), *(() if mask is not None else (0, 0, 0, 0)),
        LOG=spec.log, CAUSAL=spec.causal,
        BLOCK_M=config.rows_per_program, BLOCK_N=config.BLOCK_N, ONE_TILE=N <= config.BLOCK_N,
        num_warps=config.num_warps,
    )  # fmt: skip


def launch_forward(y: Tensor, x: Tensor, mask: Tensor | None, spec: SoftmaxSpec, dim: int) -> None:
    """Fills y from x, of any shape and strides; mask is bool and broadcastable to them, or None."""
    _launch(_forward_kernel, (y, x), mask, FORWARD_TILES, spec, dim)


def launch_backward(dx: Tensor, dy: Tensor, y: Tensor, mask: Tensor | None, spec: SoftmaxSpec, dim: int) -> None:
    """Fills dx from dy and the forward's result y."""
    _launch(_backward_kernel, (dx, dy, y), mask, BACKWARD_TILES, spec, dim)


def inspect_cases(arch: str) -> list[KernelCase]:
    """The compilations that the ahead-of-time report shows."""
    from fastattn.backends.triton.row_cases import SHAPES, row_case

    no_mask = {"mask": None, **dict.fromkeys((f"stride_mask{d}" for d in "01mn"), 0)}
    cases = []
    for dtype, N in SHAPES:
        for name, kernel, tensors, tiles in (
            ("forward", _forward_kernel, ("y", "x"), FORWARD_TILES),
            ("backward", _backward_kernel, ("dx", "dy", "y"), BACKWARD_TILES),
        ):
            config = row_config(N, tiles, arch)
            for feature, log, causal, masked in (
                ("plain", False, False, False),
                ("log", True, False, False),
                ("causal", False, True, False),
                ("mask", False, False, True),
            ):
                pointers = dict.fromkeys(tensors, f"*{dtype}") | ({"mask": "*i1"} if masked else {})
                flags = {"LOG": log, "CAUSAL": causal, "ONE_TILE": N <= config.BLOCK_N, **({} if masked else no_mask)}
                cases.append(row_case(f"softmax/{name}/{feature}/{dtype}/{N}", kernel, config, pointers, **flags))
    return cases
