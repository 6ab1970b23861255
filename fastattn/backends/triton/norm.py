"""LayerNorm and RMSNorm over rows, behind a residual sum with dropout, forward and backward.

    h = residual + dropout(x), rounded to h's type;   x where there is no residual
    LayerNorm   x̂ = (h - mean) · rstd      rstd = 1 / sqrt(var + eps)             y = x̂ · weight + bias
    RMSNorm     x̂ = h · rstd               rstd = 1 / sqrt(mean_n(h²) + eps)      y = x̂ · (weight_offset + weight)

    g = dy · weight
    dh += rstd · (g - mean_n(g) - x̂ · mean_n(g · x̂))    RMSNorm: without mean_n(g);   on top of the gradient of h
    dresidual = dh       dx = dropout(dh)
    dweight = Σ_m dy · x̂           dbias = Σ_m dy

x, residual, dy and the gradient of h are (…, N) with any strides, M rows in all; y, h, dx and dresidual (M, N) are
contiguous; stats (2, M) fp32 holds mean and rstd, of RMSNorm (1, M) rstd alone; weight, bias, dweight, dbias (N,). The
arithmetic is fp32.

The variance is a sum of squares about the corrected mean, never E[x²] - E[x]². A row that fits one tile is read once; a
longer one in chunks, whose means and sums of squares are merged by Chan's formula, and once more to be normalised.

The backward reads h; or y where that is what was kept, as x̂ = (y - bias) / weight.

dweight and dbias are summed in two stages without atomics, so they are the same bits on every run: P programs each
write one fp32 row of partial sums, and a second kernel adds these up in order.

Passes over an (M, N) matrix:    one tile                        longer rows
    forward                      read x; write y                 read x twice; write y
      with residual              read x, residual; write h, y    read x, residual, h; write h, y
    dx                           read h, dy; write dx            read h, dy twice; write dx
    dweight, dbias               none: P rows of fp32            read h, dy once more, in a kernel of their own
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.backends.row_layout import RowLayout, row_layout
from fastattn.backends.triton.blocks.cast import cast
from fastattn.backends.triton.blocks.dropout import row_dropout_factor
from fastattn.backends.triton.blocks.rows import inside, load_rows, row_offsets, store_rows
from fastattn.backends.triton.configs import arch_of
from fastattn.backends.triton.row_configs import (
    RowConfig,
    column_config,
    dropout_arguments,
    multiprocessors,
    reduce_config,
    row_config,
)
from fastattn.spec import NormSpec

if TYPE_CHECKING:
    from fastattn.backends.triton.inspection import KernelCase

FORWARD_TILES = 2  # h, and its square or product
DX_TILES = 3  # x̂, dy, and a product
FUSED_TILES = 5  # and the sums of dweight and dbias
DROPOUT_TILES = 3  # the words of the generator


@triton.jit
def _drop(x, m, n, seed, threshold, scale):
    """dropout(x), or x where seed is None. What is dropped is 0, whatever it was."""
    if seed is None:
        return x
    else:
        factor = row_dropout_factor(m, n, seed, threshold, scale)
        return tl.where(factor == 0.0, 0.0, x * factor)


@triton.jit
def _load_sum(
    h, x, residual, x_rows, residual_rows, m, n, stride_xn, stride_residualn, M, N, seed, threshold, scale
):  # fmt: skip
    """h = residual + dropout(x) (BLOCK_M, BLOCK_N), which is also stored; or x. 0 outside of the matrix."""
    read = inside(m, n, M, N)
    x_tile = load_rows(x, x_rows, n, 1, stride_xn, read)
    if residual is None:
        return x_tile
    else:
        total = load_rows(residual, residual_rows, n, 1, stride_residualn, read)
        total = cast(total + _drop(x_tile, m, n, seed, threshold, scale), h.dtype.element_ty)
        store_rows(h, total.to(tl.float32), m, n, N, 1, M, N)
        return tl.where(read, total.to(tl.float32), 0.0)


@triton.jit
def _moments(h, n, N, count, RMS: tl.constexpr):
    """Mean and Σ (h - mean)² of each row of h, of which `count` columns are inside of the matrix. RMSNorm: 0, Σ h²."""
    if RMS:
        return tl.zeros((h.shape[0],), tl.float32), tl.sum(h * h, 1)
    else:
        mean = tl.sum(h, 1) / count
        centred = tl.where(n[None, :] < N, h - mean[:, None], 0.0)
        # The mean was rounded at the size of Σ h, which may dwarf the spread of h; this is what it is off by.
        error = tl.sum(centred, 1) / count
        return mean + error, tl.sum(centred * centred, 1) - error * error * count


@triton.jit
def _load_weight(weight, n, N, OFFSET: tl.constexpr):
    """What x̂ is multiplied with (1, BLOCK_N): OFFSET + weight."""
    factor = tl.load(weight + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    return factor if OFFSET == 0.0 else factor + OFFSET


@triton.jit
def _affine(x_hat, weight, bias, n, N, OFFSET: tl.constexpr):
    """x̂ · (OFFSET + weight) + bias, either of which may be None."""
    y = x_hat
    if weight is not None:
        y = y * _load_weight(weight, n, N, OFFSET)
    if bias is not None:
        y = y + tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def _load_statistics(stats, m, M, RMS: tl.constexpr):
    """mean and rstd (BLOCK_M,) of rows m; a mean of 0 for RMSNorm."""
    if RMS:
        rstd = tl.load(stats + m, mask=m < M, other=0.0)
        return tl.zeros_like(rstd), rstd
    else:
        return tl.load(stats + m, mask=m < M, other=0.0), tl.load(stats + M + m, mask=m < M, other=0.0)


@triton.jit(do_not_specialize=["M", "R1", "R2"])
def _forward_kernel(
    y, h, stats, x, weight, bias, residual, seed, eps, threshold, scale, M, N, R1, R2,
    stride_x0, stride_x1, stride_xm, stride_xn,
    stride_residual0, stride_residual1, stride_residualm, stride_residualn,
    DIMS: tl.constexpr, RMS: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    """One program normalises BLOCK_M rows."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    x_rows = row_offsets(m, R1, R2, stride_x0, stride_x1, stride_xm, DIMS)
    residual_rows = row_offsets(m, R1, R2, stride_residual0, stride_residual1, stride_residualm, DIMS)
    if ONE_TILE:
        tile = _load_sum(
            h, x, residual, x_rows, residual_rows, m, n, stride_xn, stride_residualn, M, N, seed, threshold, scale
        )
        mu, squares = _moments(tile, n, N, N, RMS)
    else:
        # Chan: of parts a, b with counts c_a, c_b and δ = mean_b - mean_a, the whole has
        # mean = mean_a + δ · c_b / (c_a + c_b),  squares = squares_a + squares_b + δ² · c_a · c_b / (c_a + c_b)
        mu = tl.zeros((BLOCK_M,), tl.float32)
        squares = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, N, BLOCK_N):
            count = tl.minimum(N - start, BLOCK_N)
            tile = _load_sum(
                h, x, residual, x_rows, residual_rows, m, start + n, stride_xn, stride_residualn, M, N,
                seed, threshold, scale,
            )  # fmt: skip
            mu_b, squares_b = _moments(tile, start + n, N, count, RMS)
            delta = mu_b - mu
            part = count / (start + count).to(tl.float32)
            mu += delta * part
            squares += squares_b + delta * delta * (start * part)
    rstd = tl.rsqrt(squares / N + eps)
    if RMS:
        tl.store(stats + m, rstd, mask=m < M)
    else:
        tl.store(stats + m, mu, mask=m < M)
        tl.store(stats + M + m, rstd, mask=m < M)
    if ONE_TILE:
        out = _affine((tile - mu[:, None]) * rstd[:, None], weight, bias, n, N, OFFSET)
        store_rows(y, out, m, n, N, 1, M, N)
    else:
        if residual is not None:
            tl.debug_barrier()  # h has been written by every thread
        for start in range(0, N, BLOCK_N):
            if residual is None:
                tile = load_rows(x, x_rows, start + n, 1, stride_xn, inside(m, start + n, M, N))
            else:
                tile = load_rows(h, m, start + n, N, 1, inside(m, start + n, M, N))
            out = _affine((tile - mu[:, None]) * rstd[:, None], weight, bias, start + n, N, OFFSET)
            store_rows(y, out, m, start + n, N, 1, M, N)


@triton.jit
def _load_x_hat(
    base, weight, bias, mu, rstd, rows, m, n, stride_basen, M, N, FROM_Y: tl.constexpr, OFFSET: tl.constexpr
):  # fmt: skip
    """x̂ (BLOCK_M, BLOCK_N) from h, or from y; finite but arbitrary outside of the matrix."""
    tile = load_rows(base, rows, n, 1, stride_basen, inside(m, n, M, N))
    if FROM_Y:
        if bias is not None:
            tile -= tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        if weight is not None:
            tile = tl.where(n[None, :] < N, tile / _load_weight(weight, n, N, OFFSET), 0.0)
        return tile
    else:
        return (tile - mu[:, None]) * rstd[:, None]


@triton.jit
def _row_sums(g, x_hat, RMS: tl.constexpr):
    """Σ_n g, where it is needed, and Σ_n g · x̂."""
    dot = tl.sum(g * x_hat, 1)
    if RMS:
        return tl.zeros_like(dot), dot
    else:
        return tl.sum(g, 1), dot


@triton.jit
def _store_gradients(
    dx, dresidual, dh, g, x_hat, g_mean, dot_mean, rstd, dh_rows, m, n, stride_dhn, M, N, seed, threshold, scale
):  # fmt: skip
    """dresidual = dh + rstd · (g - mean_n(g) - x̂ · mean_n(g · x̂)), and dx; each where it is wanted."""
    total = (g - g_mean[:, None] - x_hat * dot_mean[:, None]) * rstd[:, None]
    if dh is not None:
        total += load_rows(dh, dh_rows, n, 1, stride_dhn, inside(m, n, M, N))
    if dresidual is not None:
        store_rows(dresidual, total, m, n, N, 1, M, N)
    if dx is not None:
        store_rows(dx, _drop(total, m, n, seed, threshold, scale), m, n, N, 1, M, N)


@triton.jit(do_not_specialize=["M", "R1", "R2"])
def _dx_kernel(
    dx, dresidual, dweight_parts, dbias_parts, dy, dh, base, weight, bias, stats, seed,
    threshold, scale, M, N, R1, R2,
    stride_dy0, stride_dy1, stride_dym, stride_dyn,
    stride_dh0, stride_dh1, stride_dhm, stride_dhn,
    stride_base0, stride_base1, stride_basem, stride_basen,
    DIMS: tl.constexpr, RMS: tl.constexpr, OFFSET: tl.constexpr, FROM_Y: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ONE_TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx by blocks of BLOCK_M rows, P programs taking turns; in one tile also their parts (P, N) of dweight, dbias."""
    n = tl.arange(0, BLOCK_N)
    dweight_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    for start_m in tl.range(first, M, tl.num_programs(0) * BLOCK_M, num_stages=STAGES):
        m = start_m + tl.arange(0, BLOCK_M)
        mu, rstd = _load_statistics(stats, m, M, RMS)
        dy_rows = row_offsets(m, R1, R2, stride_dy0, stride_dy1, stride_dym, DIMS)
        rows = row_offsets(m, R1, R2, stride_base0, stride_base1, stride_basem, DIMS)
        dh_rows = row_offsets(m, R1, R2, stride_dh0, stride_dh1, stride_dhm, DIMS)
        if ONE_TILE:
            dy_tile = load_rows(dy, dy_rows, n, 1, stride_dyn, inside(m, n, M, N))
            x_hat = _load_x_hat(base, weight, bias, mu, rstd, rows, m, n, stride_basen, M, N, FROM_Y, OFFSET)
            if dweight_parts is not None:
                dweight_sum += dy_tile * x_hat
            if dbias_parts is not None:
                dbias_sum += dy_tile
            g = _affine(dy_tile, weight, None, n, N, OFFSET)
            g_sum, dot = _row_sums(g, x_hat, RMS)
            _store_gradients(
                dx, dresidual, dh, g, x_hat, g_sum / N, dot / N, rstd, dh_rows, m, n, stride_dhn, M, N,
                seed, threshold, scale,
            )  # fmt: skip
        else:
            g_sum = tl.zeros((BLOCK_M,), tl.float32)
            dot = tl.zeros((BLOCK_M,), tl.float32)
            for start in range(0, N, BLOCK_N):
                chunk = start + n
                dy_tile = load_rows(dy, dy_rows, chunk, 1, stride_dyn, inside(m, chunk, M, N))
                x_hat = _load_x_hat(base, weight, bias, mu, rstd, rows, m, chunk, stride_basen, M, N, FROM_Y, OFFSET)
                g_part, dot_part = _row_sums(_affine(dy_tile, weight, None, chunk, N, OFFSET), x_hat, RMS)
                g_sum += g_part
                dot += dot_part
            for start in range(0, N, BLOCK_N):
                chunk = start + n
                dy_tile = load_rows(dy, dy_rows, chunk, 1, stride_dyn, inside(m, chunk, M, N))
                x_hat = _load_x_hat(base, weight, bias, mu, rstd, rows, m, chunk, stride_basen, M, N, FROM_Y, OFFSET)
                g = _affine(dy_tile, weight, None, chunk, N, OFFSET)
                _store_gradients(
                    dx, dresidual, dh, g, x_hat, g_sum / N, dot / N, rstd, dh_rows, m, chunk, stride_dhn, M, N,
                    seed, threshold, scale,
                )  # fmt: skip
    parts = tl.program_id(0).to(tl.int64) * N + n
    if dweight_parts is not None:
        tl.store(dweight_parts + parts, tl.sum(dweight_sum, 0), mask=n < N)
    if dbias_parts is not None:
        tl.store(dbias_parts + parts, tl.sum(dbias_sum, 0), mask=n < N)


@triton.jit(do_not_specialize=["M", "R1", "R2"])
def _column_kernel(
    dweight_parts, dbias_parts, dy, base, weight, bias, stats, M, N, R1, R2,
    stride_dy0, stride_dy1, stride_dym, stride_dyn,
    stride_base0, stride_base1, stride_basem, stride_basen,
    DIMS: tl.constexpr, RMS: tl.constexpr, OFFSET: tl.constexpr, FROM_Y: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Parts (P, N) of dweight and dbias alone: program (c, p) sums BLOCK_N columns over every P-th block of rows."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dweight_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = tl.program_id(1).to(tl.int64) * BLOCK_M
    for start_m in tl.range(first, M, tl.num_programs(1) * BLOCK_M, num_stages=STAGES):
        m = start_m + tl.arange(0, BLOCK_M)
        dy_rows = row_offsets(m, R1, R2, stride_dy0, stride_dy1, stride_dym, DIMS)
        dy_tile = load_rows(dy, dy_rows, n, 1, stride_dyn, inside(m, n, M, N))
        if dweight_parts is not None:
            mu, rstd = _load_statistics(stats, m, M, RMS)
            rows = row_offsets(m, R1, R2, stride_base0, stride_base1, stride_basem, DIMS)
            dweight_sum += dy_tile * _load_x_hat(
                base, weight, bias, mu, rstd, rows, m, n, stride_basen, M, N, FROM_Y, OFFSET
            )
        dbias_sum += dy_tile
    parts = tl.program_id(1).to(tl.int64) * N + n
    if dweight_parts is not None:
        tl.store(dweight_parts + parts, tl.sum(dweight_sum, 0), mask=n < N)
    if dbias_parts is not None:
        tl.store(dbias_parts + parts, tl.sum(dbias_sum, 0), mask=n < N)


@triton.jit
def _sum_parts(out, parts, n, P, N, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """out[n] = Σ_p parts[p, n]."""
    total = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        total += load_rows(parts, p, n, N, 1, inside(p, n, P, N))
    tl.store(out + n, cast(tl.sum(total, 0), out.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["P"])
def _reduce_kernel(
    dweight, dbias, dweight_parts, dbias_parts, P, N, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """dweight, dbias (N,), each or None, from their parts (P, N)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if dweight is not None:
        _sum_parts(dweight, dweight_parts, n, P, N, BLOCK_P, BLOCK_N)
    if dbias is not None:
        _sum_parts(dbias, dbias_parts, n, P, N, BLOCK_P, BLOCK_N)


def _more_tiles(residual: bool, dropout: bool) -> int:
    """The tiles of what is added: the residual, or its gradient, and the words of the generator of dropout."""
    return residual + DROPOUT_TILES * dropout


_NO_STEPS = (0, 0, 0, 0)


def _config(tiles: int, N: int, rows: RowLayout) -> RowConfig:
    """For rows of N elements, the first of the tensors that are read being the one to go by."""
    return row_config(N, tiles, arch_of(rows.tensors[0].device), contiguous_rows=rows.lines.side_by_side)


def launch_forward(
    y: Tensor,
    h: Tensor,
    stats: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    spec: NormSpec,
) -> None:
    """Fills y and h (…, *row), contiguous, and stats from x and residual; weight and bias (N,) are contiguous."""
    M = stats.shape[1]
    if x.numel() == 0:
        stats.fill_(math.nan)  # of rows without elements, where there are any
        return
    N = x.numel() // M
    rows = row_layout((x,) if residual is None else (x, residual), spec.n_dims)
    x, *rest = rows.tensors
    config = _config(FORWARD_TILES + _more_tiles(residual is not None, seed is not None), N, rows)
    _forward_kernel[(triton.cdiv(M, config.rows_per_program),)](
        y, h, stats, x, weight, bias, rest[0] if rest else None, seed,
        spec.eps, *dropout_arguments(spec.dropout_p), M, N, rows.lines.R1, rows.lines.M,
        *rows.lines.steps[0], *(rows.lines.steps[1] if rest else _NO_STEPS),
        DIMS=rows.lines.dims, RMS=spec.rms, OFFSET=spec.weight_offset,
        BLOCK_M=config.rows_per_program, BLOCK_N=config.BLOCK_N, ONE_TILE=N <= config.BLOCK_N,
        num_warps=config.num_warps,
    )  # fmt: skip


def launch_backward(
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dresidual: Tensor | None,
    dy: Tensor,
    dh: Tensor | None,
    base: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    stats: Tensor,
    spec: NormSpec,
) -> None:
    """Fills those of dx and dresidual (…, *row), contiguous, and dweight and dbias (N,) that are not None.

    base is what h was, or y; dh the gradient that h has beside that through y. Every vector is contiguous.
    """
    sums = tuple(t for t in (dweight, dbias) if t is not None)
    if base.numel() == 0:
        for t in sums:
            t.zero_()
        return
    if dresidual is dx:
        dresidual = None
    rows = row_layout((dy, base) if dh is None else (dy, base, dh), spec.n_dims)
    M, N = stats.shape[1], base.numel() // stats.shape[1]
    more = _more_tiles(dh is not None, seed is not None)
    fused = _config(FUSED_TILES + more, N, rows)
    if dx is None and dresidual is None:
        parts = _column_parts(dweight, dbias, rows, weight, bias, stats, spec)
    elif sums and N <= fused.BLOCK_N:
        parts = _new_parts(dweight, dbias, _programs(M, fused, base.device))
        _launch_dx(dx, dresidual, *parts, rows, weight, bias, seed, stats, fused, spec)
    else:
        _launch_dx(dx, dresidual, None, None, rows, weight, bias, seed, stats, _config(DX_TILES + more, N, rows), spec)
        if not sums:
            return
        parts = _column_parts(dweight, dbias, rows, weight, bias, stats, spec)
    _launch_reduce(dweight, dbias, *parts)


def _programs(M: int, config: RowConfig, device: torch.device, columns: int = 1) -> int:
    """How many programs share M rows: as many as run at once, `columns` of them side by side."""
    at_once = multiprocessors(device) * config.programs_per_sm
    return min(triton.cdiv(M, config.rows_per_program), triton.cdiv(at_once, columns))


def _new_parts(dweight: Tensor | None, dbias: Tensor | None, P: int) -> tuple[Tensor | None, Tensor | None]:
    """Uninitialised partial sums (P, N), fp32, for each gradient that is wanted."""
    dweight_parts, dbias_parts = (
        None if t is None else t.new_empty(P, t.shape[0], dtype=torch.float32) for t in (dweight, dbias)
    )
    return dweight_parts, dbias_parts


def _launch_dx(
    dx, dresidual, dweight_parts, dbias_parts, rows: RowLayout, weight, bias, seed, stats, config, spec: NormSpec
) -> None:
    """With parts (P, N), P programs stay and take turns; without, each block of rows has its own."""
    dy, base, *rest = rows.tensors
    M, N = stats.shape[1], base.numel() // stats.shape[1]
    parts = dbias_parts if dweight_parts is None else dweight_parts
    programs = triton.cdiv(M, config.rows_per_program) if parts is None else parts.shape[0]
    _dx_kernel[(programs,)](
        dx, dresidual, dweight_parts, dbias_parts, dy, rest[0] if rest else None, base, weight, bias, stats, seed,
        *dropout_arguments(spec.dropout_p), M, N, rows.lines.R1, rows.lines.M,
        *rows.lines.steps[0], *(rows.lines.steps[2] if rest else _NO_STEPS), *rows.lines.steps[1],
        DIMS=rows.lines.dims, RMS=spec.rms, OFFSET=spec.weight_offset, FROM_Y=spec.memory_efficient,
        BLOCK_M=config.rows_per_program, BLOCK_N=config.BLOCK_N, ONE_TILE=N <= config.BLOCK_N,
        STAGES=1 if parts is None else config.num_stages, num_warps=config.num_warps,
    )  # fmt: skip


def _column_parts(
    dweight, dbias, rows: RowLayout, weight, bias, stats, spec: NormSpec
) -> tuple[Tensor | None, Tensor | None]:
    """The parts of dweight and dbias, by a kernel of their own."""
    dy, base, *_ = rows.tensors
    M, N = stats.shape[1], base.numel() // stats.shape[1]
    config = column_config(N, arch_of(base.device))
    columns = triton.cdiv(N, config.BLOCK_N)
    P = _programs(M, config, base.device, columns)
    parts = _new_parts(dweight, dbias, P)
    _column_kernel[(columns, P)](
        *parts, dy, base, weight, bias, stats, M, N, rows.lines.R1, rows.lines.M,
        *rows.lines.steps[0], *rows.lines.steps[1],
        DIMS=rows.lines.dims, RMS=spec.rms, OFFSET=spec.weight_offset, FROM_Y=spec.memory_efficient,
        BLOCK_M=config.rows_per_program, BLOCK_N=config.BLOCK_N, STAGES=config.num_stages, num_warps=config.num_warps,
    )  # fmt: skip
    return parts


def _launch_reduce(dweight, dbias, dweight_parts, dbias_parts) -> None:
    P, N = (dbias_parts if dweight_parts is None else dweight_parts).shape
    config = reduce_config(N, arch_of((dbias if dweight is None else dweight).device))
    _reduce_kernel[(triton.cdiv(N, config.BLOCK_N),)](
        dweight, dbias, dweight_parts, dbias_parts, P, N,
        BLOCK_P=config.rows_per_program, BLOCK_N=config.BLOCK_N, num_warps=config.num_warps,
    )  # fmt: skip


# What a variant of the report has of residual and dropout: absent pointers and their steps are constants.
_PLAIN: dict[str, object] = {"residual": None, "seed": None, "h": None, "dh": None, "dresidual": None}
_PLAIN |= {f"stride_{name}{d}": 0 for name in ("residual", "dh") for d in "01mn"}


def inspect_cases(arch: str) -> list[KernelCase]:
    """The compilations that the ahead-of-time report shows."""
    from fastattn.backends.triton.row_cases import SHAPES

    few = tuple((dtype, N) for dtype, N in SHAPES if N in (4096, 65536))
    variants: tuple[tuple[tuple[tuple[str, int], ...], str, bool, dict[str, object]], ...] = (
        (SHAPES, "layer_norm", False, _PLAIN),
        (SHAPES, "rms_norm", True, {**_PLAIN, "bias": None, "dbias": None, "dbias_parts": None}),
        (few, "layer_norm/residual", False, {"seed": None, "dresidual": None}),
        (few, "layer_norm/residual_dropout", False, {}),
    )
    return [
        case
        for shapes, name, rms, absent in variants
        for dtype, N in shapes
        for case in _inspect_variant(name, rms, absent, dtype, N, arch)
    ]


def _inspect_variant(
    name: str, rms: bool, absent: dict[str, object], dtype: str, N: int, arch: str
) -> Iterator[KernelCase]:
    from fastattn.backends.triton.row_cases import row_case

    residual, dropout = "dh" not in absent, "seed" not in absent
    more = _more_tiles(residual, dropout)
    forward = row_config(N, FORWARD_TILES + more, arch)
    dx, fused = (row_config(N, tiles + more, arch) for tiles in (DX_TILES, FUSED_TILES))
    columns = column_config(N, arch)
    flags: dict[str, object] = {"DIMS": 1, "RMS": rms, "OFFSET": 0.0}
    gradient = flags | {"FROM_Y": False}
    no_parts: dict[str, object] = {"dweight_parts": None, "dbias_parts": None, "ONE_TILE": N <= dx.BLOCK_N, "STAGES": 1}
    kernels: list[tuple[str, triton.JITFunction, RowConfig, dict[str, object]]] = [
        ("forward", _forward_kernel, forward, flags | {"ONE_TILE": N <= forward.BLOCK_N}),
        ("dx", _dx_kernel, dx, gradient | no_parts),
    ]
    if N <= fused.BLOCK_N:
        kernels.append(("backward", _dx_kernel, fused, gradient | {"ONE_TILE": True, "STAGES": fused.num_stages}))
    if not residual:
        kernels.append(("reduce", _reduce_kernel, reduce_config(N, arch), {}))
        kernels.append(("columns", _column_kernel, columns, gradient | {"STAGES": columns.num_stages}))
    rows = ("y", "x", "h", "residual", "dx", "dy", "dh", "dresidual", "base", "weight", "bias", "dweight", "dbias")
    pointers = dict.fromkeys(rows, f"*{dtype}") | {"seed": "*i64"}
    pointers |= dict.fromkeys(("stats", "dweight_parts", "dbias_parts"), "*fp32")
    for kernel_name, kernel, config, constexprs in kernels:
        chosen = {argument: value for argument, value in absent.items() if argument in kernel.arg_names} | constexprs
        yield row_case(f"{name}/{kernel_name}/{dtype}/{N}", kernel, config, pointers, **chosen)
