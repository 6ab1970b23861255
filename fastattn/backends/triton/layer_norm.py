"""LayerNorm over the rows of a matrix, forward and backward.

    x̂ = (x - mean) · rstd          rstd = 1 / sqrt(var + eps)
    y = x̂ · weight + bias

    g = dy · weight
    dx = rstd · (g - mean_n(g) - x̂ · mean_n(g · x̂))
    dweight = Σ_m dy · x̂           dbias = Σ_m dy

x, y, dy, dx (M, N) with any strides; mean, rstd (M,) fp32; weight, bias, dweight, dbias (N,). The arithmetic is fp32.

The variance is a sum of squares about the corrected mean, never E[x²] - E[x]². A row that fits one tile is read once; a
longer one in chunks, whose means and sums of squares are merged by Chan's formula, and once more to be normalised.

dweight and dbias are summed in two stages without atomics, so they are the same bits on every run: P programs each
write one fp32 row of partial sums, and a second kernel adds these up in order.

Passes over an (M, N) matrix:    one tile                 longer rows
    forward                      read x; write y          read x twice; write y
    dx                           read x, dy; write dx     read x, dy twice; write dx
    dweight, dbias               none: P rows of fp32     read x, dy once more, in a kernel of their own
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.backends.triton.blocks.cast import cast
from fastattn.backends.triton.blocks.rows import inside, load_rows, store_rows
from fastattn.backends.triton.configs import arch_of
from fastattn.backends.triton.row_configs import (
    RowConfig,
    column_config,
    multiprocessors,
    reduce_config,
    row_config,
)

if TYPE_CHECKING:
    from fastattn.backends.triton.inspection import KernelCase

FORWARD_TILES = 2  # x, and its square or product
DX_TILES = 3  # x, dy, and a product
FUSED_TILES = 5  # and the sums of dweight and dbias


@triton.jit
def _load(ptr, m, n, stride_m, stride_n, M, N):
    """ptr[m, n] as fp32 (BLOCK_M, BLOCK_N), 0 outside of the matrix."""
    return load_rows(ptr, m, n, stride_m, stride_n, inside(m, n, M, N))


@triton.jit
def _moments(x, n, N, count):
    """Mean and Σ (x - mean)² of each row of x, of which `count` columns are inside of the matrix."""
    mean = tl.sum(x, 1) / count
    centred = tl.where(n[None, :] < N, x - mean[:, None], 0.0)
    # The mean was rounded at the size of Σ x, which may dwarf the spread of x; this is what it is off by.
    error = tl.sum(centred, 1) / count
    return mean + error, tl.sum(centred * centred, 1) - error * error * count


@triton.jit
def _affine(x_hat, weight, bias, n, N):
    """x̂ · weight + bias, either of which may be None."""
    y = x_hat
    if weight is not None:
        y = y * tl.load(weight + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        y = y + tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit(do_not_specialize=["M"])
def _forward_kernel(
    y, mean, rstd, x, weight, bias, eps, M, N,
    stride_ym, stride_yn, stride_xm, stride_xn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    """One program normalises BLOCK_M rows."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    tile = _load(x, m, n, stride_xm, stride_xn, M, N)
    mu, squares = _moments(tile, n, N, tl.minimum(N, BLOCK_N))
    if not ONE_TILE:
        # Chan: of parts a, b with counts c_a, c_b and δ = mean_b - mean_a, the whole has
        # mean = mean_a + δ · c_b / (c_a + c_b),  squares = squares_a + squares_b + δ² · c_a · c_b / (c_a + c_b)
        for start in range(BLOCK_N, N, BLOCK_N):
            count = tl.minimum(N - start, BLOCK_N)
            mu_b, squares_b = _moments(_load(x, m, start + n, stride_xm, stride_xn, M, N), start + n, N, count)
            delta = mu_b - mu
            part = count / (start + count).to(tl.float32)
            mu += delta * part
            squares += squares_b + delta * delta * (start * part)
    r = tl.rsqrt(squares / N + eps)
    tl.store(mean + m, mu, mask=m < M)
    tl.store(rstd + m, r, mask=m < M)
    if ONE_TILE:
        out = _affine((tile - mu[:, None]) * r[:, None], weight, bias, n, N)
        store_rows(y, out, m, n, stride_ym, stride_yn, M, N)
    else:
        for start in range(0, N, BLOCK_N):
            tile = _load(x, m, start + n, stride_xm, stride_xn, M, N)
            out = _affine((tile - mu[:, None]) * r[:, None], weight, bias, start + n, N)
            store_rows(y, out, m, start + n, stride_ym, stride_yn, M, N)


@triton.jit
def _load_gradient(dy, x, weight, mu, r, m, n, stride_dym, stride_dyn, stride_xm, stride_xn, M, N):
    """dy, g = dy · weight, and x̂, which is finite but arbitrary outside of the matrix, where dy and g are 0."""
    dy_tile = _load(dy, m, n, stride_dym, stride_dyn, M, N)
    x_hat = (_load(x, m, n, stride_xm, stride_xn, M, N) - mu[:, None]) * r[:, None]
    return dy_tile, _affine(dy_tile, weight, None, n, N), x_hat


@triton.jit(do_not_specialize=["M"])
def _dx_kernel(
    dx, dweight_parts, dbias_parts, dy, x, weight, mean, rstd, M, N,
    stride_dxm, stride_dxn, stride_dym, stride_dyn, stride_xm, stride_xn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ONE_TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx by blocks of BLOCK_M rows, P programs taking turns; in one tile also their parts (P, N) of dweight, dbias."""
    n = tl.arange(0, BLOCK_N)
    dweight_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    for start_m in tl.range(first, M, tl.num_programs(0) * BLOCK_M, num_stages=STAGES):
        m = start_m + tl.arange(0, BLOCK_M)
        mu = tl.load(mean + m, mask=m < M, other=0.0)
        r = tl.load(rstd + m, mask=m < M, other=0.0)
        dy_tile, g, x_hat = _load_gradient(
            dy, x, weight, mu, r, m, n, stride_dym, stride_dyn, stride_xm, stride_xn, M, N
        )
        if dweight_parts is not None:
            dweight_sum += dy_tile * x_hat
        if dbias_parts is not None:
            dbias_sum += dy_tile
        g_sum = tl.sum(g, 1)
        dot = tl.sum(g * x_hat, 1)
        if ONE_TILE:
            out = r[:, None] * (g - (g_sum / N)[:, None] - x_hat * (dot / N)[:, None])
            store_rows(dx, out, m, n, stride_dxm, stride_dxn, M, N)
        else:
            for start in range(BLOCK_N, N, BLOCK_N):
                _, g, x_hat = _load_gradient(
                    dy, x, weight, mu, r, m, start + n, stride_dym, stride_dyn, stride_xm, stride_xn, M, N
                )
                g_sum += tl.sum(g, 1)
                dot += tl.sum(g * x_hat, 1)
            for start in range(0, N, BLOCK_N):
                _, g, x_hat = _load_gradient(
                    dy, x, weight, mu, r, m, start + n, stride_dym, stride_dyn, stride_xm, stride_xn, M, N
                )
                out = r[:, None] * (g - (g_sum / N)[:, None] - x_hat * (dot / N)[:, None])
                store_rows(dx, out, m, start + n, stride_dxm, stride_dxn, M, N)
    parts = tl.program_id(0).to(tl.int64) * N + n
    if dweight_parts is not None:
        tl.store(dweight_parts + parts, tl.sum(dweight_sum, 0), mask=n < N)
    if dbias_parts is not None:
        tl.store(dbias_parts + parts, tl.sum(dbias_sum, 0), mask=n < N)


@triton.jit(do_not_specialize=["M"])
def _column_kernel(
    dweight_parts, dbias_parts, dy, x, mean, rstd, M, N,
    stride_dym, stride_dyn, stride_xm, stride_xn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Parts (P, N) of dweight and dbias alone: program (c, p) sums BLOCK_N columns over every P-th block of rows."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dweight_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = tl.program_id(1).to(tl.int64) * BLOCK_M
    for start_m in tl.range(first, M, tl.num_programs(1) * BLOCK_M, num_stages=STAGES):
        m = start_m + tl.arange(0, BLOCK_M)
        dy_tile = _load(dy, m, n, stride_dym, stride_dyn, M, N)
        if dweight_parts is not None:
            mu = tl.load(mean + m, mask=m < M, other=0.0)
            r = tl.load(rstd + m, mask=m < M, other=0.0)
            dweight_sum += dy_tile * (_load(x, m, n, stride_xm, stride_xn, M, N) - mu[:, None]) * r[:, None]
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
        total += _load(parts, start + tl.arange(0, BLOCK_P), n, N, 1, P, N)
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


def _config(tiles: int, x: Tensor) -> RowConfig:
    contiguous_rows = x.stride(0) == 1 and x.stride(1) != 1
    return row_config(x.shape[1], tiles, arch_of(x.device), contiguous_rows=contiguous_rows)


def launch_forward(
    y: Tensor, mean: Tensor, rstd: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> None:
    """Fills y (M, N), mean and rstd (M,) fp32 from x (M, N); weight and bias (N,) are contiguous."""
    M, N = x.shape
    if x.numel() == 0:
        mean.fill_(torch.nan)  # of rows without elements, where there are any
        rstd.fill_(torch.nan)
        return
    config = _config(FORWARD_TILES, x)
    _forward_kernel[(triton.cdiv(M, config.rows_per_program),)](
        y, mean, rstd, x, weight, bias, eps, M, N,
        *y.stride(), *x.stride(),
        BLOCK_M=config.rows_per_program, BLOCK_N=config.BLOCK_N, ONE_TILE=N <= config.BLOCK_N,
        num_warps=config.num_warps,
    )  # fmt: skip


def launch_backward(
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    """Fills those of dx (M, N), dweight and dbias (N,) that are not None; every vector is contiguous."""
    sums = tuple(t for t in (dweight, dbias) if t is not None)
    if x.numel() == 0:
        for t in sums:
            t.zero_()
        return
    fused = _config(FUSED_TILES, x)
    if dx is not None and sums and x.shape[1] <= fused.BLOCK_N:
        parts = _new_parts(dweight, dbias, _programs(x, fused))
        _launch_dx(dx, *parts, dy, x, weight, mean, rstd, fused)
    else:
        if dx is not None:
            _launch_dx(dx, None, None, dy, x, weight, mean, rstd, _config(DX_TILES, x))
        if not sums:
            return
        columns = column_config(x.shape[1], arch_of(x.device))
        parts = _new_parts(dweight, dbias, _programs(x, columns, triton.cdiv(x.shape[1], columns.BLOCK_N)))
        _launch_columns(*parts, dy, x, mean, rstd, columns)
    _launch_reduce(dweight, dbias, *parts)


def _programs(x: Tensor, config: RowConfig, columns: int = 1) -> int:
    """How many programs share the rows of x: as many as run at once, `columns` of them side by side."""
    at_once = multiprocessors(x.device) * config.programs_per_sm
    return min(triton.cdiv(x.shape[0], config.rows_per_program), triton.cdiv(at_once, columns))


def _new_parts(dweight: Tensor | None, dbias: Tensor | None, P: int) -> tuple[Tensor | None, Tensor | None]:
    """Uninitialised partial sums (P, N), fp32, for each gradient that is wanted."""
    dweight_parts, dbias_parts = (
        None if t is None else t.new_empty(P, t.shape[0], dtype=torch.float32) for t in (dweight, dbias)
    )
    return dweight_parts, dbias_parts


def _launch_dx(dx, dweight_parts, dbias_parts, dy, x, weight, mean, rstd, config: RowConfig) -> None:
    """With parts (P, N), P programs stay and take turns; without, each block of rows has its own."""
    M, N = x.shape
    parts = dbias_parts if dweight_parts is None else dweight_parts
    programs = triton.cdiv(M, config.rows_per_program) if parts is None else parts.shape[0]
    _dx_kernel[(programs,)](
        dx, dweight_parts, dbias_parts, dy, x, weight, mean, rstd, M, N,
        *dx.stride(), *dy.stride(), *x.stride(),
        BLOCK_M=config.rows_per_program, BLOCK_N=config.BLOCK_N, ONE_TILE=N <= config.BLOCK_N,
        STAGES=1 if parts is None else config.num_stages, num_warps=config.num_warps,
    )  # fmt: skip


def _launch_columns(dweight_parts, dbias_parts, dy, x, mean, rstd, config: RowConfig) -> None:
    M, N = x.shape
    P = (dbias_parts if dweight_parts is None else dweight_parts).shape[0]
    _column_kernel[(triton.cdiv(N, config.BLOCK_N), P)](
        dweight_parts, dbias_parts, dy, x, mean, rstd, M, N,
        *dy.stride(), *x.stride(),
        BLOCK_M=config.rows_per_program, BLOCK_N=config.BLOCK_N, STAGES=config.num_stages, num_warps=config.num_warps,
    )  # fmt: skip


def _launch_reduce(dweight, dbias, dweight_parts, dbias_parts) -> None:
    P, N = (dbias_parts if dweight_parts is None else dweight_parts).shape
    config = reduce_config(N, arch_of((dbias if dweight is None else dweight).device))
    _reduce_kernel[(triton.cdiv(N, config.BLOCK_N),)](
        dweight, dbias, dweight_parts, dbias_parts, P, N,
        BLOCK_P=config.rows_per_program, BLOCK_N=config.BLOCK_N, num_warps=config.num_warps,
    )  # fmt: skip


def inspect_cases(arch: str) -> list[KernelCase]:
    """The compilations that the ahead-of-time report shows."""
    from fastattn.backends.triton.row_cases import SHAPES, row_case

    no_parts = {"dweight_parts": None, "dbias_parts": None}
    cases = []
    for dtype, N in SHAPES:
        forward, dx, fused = (row_config(N, tiles, arch) for tiles in (FORWARD_TILES, DX_TILES, FUSED_TILES))
        kernels: list[tuple[str, triton.JITFunction, RowConfig, dict[str, object]]] = [
            ("forward", _forward_kernel, forward, {"ONE_TILE": N <= forward.BLOCK_N}),
            ("dx", _dx_kernel, dx, {**no_parts, "ONE_TILE": N <= dx.BLOCK_N, "STAGES": 1}),
            ("reduce", _reduce_kernel, reduce_config(N, arch), {}),
        ]
        if N <= fused.BLOCK_N:
            kernels.append(("backward", _dx_kernel, fused, {"ONE_TILE": True, "STAGES": fused.num_stages}))
        else:
            columns = column_config(N, arch)
            kernels.append(("columns", _column_kernel, columns, {"STAGES": columns.num_stages}))
        pointers = dict.fromkeys(("y", "x", "dx", "dy", "weight", "bias", "dweight", "dbias"), f"*{dtype}")
        pointers |= dict.fromkeys(("mean", "rstd", "dweight_parts", "dbias_parts"), "*fp32")
        for name, kernel, config, constexprs in kernels:
            cases.append(row_case(f"layer_norm/{name}/{dtype}/{N}", kernel, config, pointers, **constexprs))
    return cases
