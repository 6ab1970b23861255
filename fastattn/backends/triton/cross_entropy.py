"""Cross entropy of logits with classes or class probabilities, forward with its gradient, and backward.

    s = softcap · tanh(x / softcap)   or x          log p_j = (s_j - max s) - log Σ exp(s_l - max s)
    loss of a row = -Σ_j q_j log p_j + z_loss · lse²          lse = max s + log Σ exp(s_l - max s)
    dx_j = (Σ q p_j - q_j + 2 z_loss lse p_j) · ds_j / dx_j   p_j = exp(s_j - max s) / Σ exp(s_l - max s)
                                                              ds / dx = 1 - (s / softcap)²  or 1

    q_j = (1 - ε) w_t [j = t] + ε / N · w_j         for a class t of N, w = 1 without class weights
    q_j = w_j ((1 - ε) y_j + ε / N)                 for probabilities y

A row is a line of x along the classes, of N elements; the other dimensions are merged into at most three, (R0, R1, M),
and a tile is BLOCK_M neighbours along M by BLOCK_N classes, as in softmax.py. The arithmetic is fp32.

A row that fits one tile is read once. A longer one is read twice, in chunks of BLOCK_N: for its maximum and sum, kept
up to date as the chunks come by, and for its gradient; the second time it comes from the L2 cache, because few enough
rows are in flight. A row to be ignored is not read at all. The gradient may be written over x: an element is read for
the last time by the thread that writes it, before it does.

Row losses are added up in fp32 and in one order. A mean needs its divisor before the first gradient is written: a small
kernel computes it, from the targets alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.backends.row_layout import Lines, lines_along
from fastattn.backends.triton.blocks.cast import cast
from fastattn.backends.triton.blocks.constants import NEG_INF
from fastattn.backends.triton.blocks.cross_entropy import (
    class_in_slice,
    entry_of_class,
    load_class,
    load_q,
    load_scores,
    loss_beside,
    score_gradient,
    score_of_class,
    sum_beside,
    weight_of_class,
)
from fastattn.backends.triton.blocks.rows import inside, load_rows, locate_lines, store_rows
from fastattn.backends.triton.blocks.softmax import online_sum
from fastattn.backends.triton.configs import arch_of
from fastattn.backends.triton.row_configs import RowConfig, row_config, warp_size
from fastattn.spec import CrossEntropySpec

if TYPE_CHECKING:
    from fastattn.backends.triton.inspection import KernelCase

TILES = 3  # s, p, and q
SUM_BLOCK, SUM_ROUNDS, MOST_SUMS = 2048, 16, 1024


@triton.jit(do_not_specialize=["ignore_index", "R1"])
def _forward_kernel(
    loss, row_max_out, row_sum_out, dx, x, target, weight, divisor, dloss,
    ignore_index, smoothing, z_loss, softcap, R1, M, N,
    stride_l0, stride_l1, stride_lm,
    stride_dx0, stride_dx1, stride_dxm, stride_dxn,
    stride_x0, stride_x1, stride_xm, stride_xn,
    stride_t0, stride_t1, stride_tm, stride_tn, stride_w,
    PROBABILITIES: tl.constexpr, SMOOTHED: tl.constexpr, Z_LOSS: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M rows: loss, and dx or what the backward needs to compute it."""
    r0, r1, first = locate_lines(R1, M, BLOCK_M)
    x += r0 * stride_x0 + r1 * stride_x1
    target += r0 * stride_t0 + r1 * stride_t1
    m = first + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    t, read, poison = load_class(target, m, stride_tm, M, N, ignore_index, PROBABILITIES)
    w_t = weight_of_class(weight, t, stride_w)
    SPREAD: tl.constexpr = PROBABILITIES or SMOOTHED  # q is more than one class

    # Pass 1: maximum, sum, and Σ q
    row_max = tl.full((BLOCK_M,), NEG_INF, tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if ONE_TILE:
        s = load_scores(x, m, n, stride_xm, stride_xn, N, read, softcap, SOFTCAP)
        row_max = tl.max(s, 1)
        e = tl.exp(s - row_max[:, None])
        row_sum = tl.sum(e, 1)
        q = load_q(
            target, weight, m, n, t, w_t, stride_tm, stride_tn, stride_w, N, N, read, smoothing,
            PROBABILITIES, SMOOTHED,
        )  # fmt: skip
        if SPREAD:
            total = sum_beside(q, n, t)
    else:
        for start in range(0, N, BLOCK_N):
            s = load_scores(x, m, start + n, stride_xm, stride_xn, N, read, softcap, SOFTCAP)
            row_max, row_sum = online_sum(row_max, row_sum, s)
            if SPREAD:
                q = load_q(
                    target, weight, m, start + n, t, w_t, stride_tm, stride_tn, stride_w, N, N, read, smoothing,
                    PROBABILITIES, SMOOTHED,
                )  # fmt: skip
                total += sum_beside(q, start + n, t)
    log_sum = tl.log(row_sum)
    lse = row_max + log_sum
    row_loss = poison
    if not PROBABILITIES:
        q_t = entry_of_class(w_t, N, smoothing, SMOOTHED)
        loss_of_class = -q_t * ((score_of_class(x, m, t, stride_xm, stride_xn, softcap, SOFTCAP) - row_max) - log_sum)
        total += q_t

    # Pass 2: dx, and the loss against many classes
    if dx is not None:
        tl.debug_barrier()  # x, which dx may overwrite, has been read by every thread
        dx += r0 * stride_dx0 + r1 * stride_dx1
        share, pull = total / row_sum, 2.0 * z_loss * lse / row_sum
        factor = 1.0 + poison
        if divisor is not None:
            factor /= tl.load(divisor)
        if dloss is not None:
            factor *= tl.load(dloss + r0 * stride_l0 + r1 * stride_l1 + m * stride_lm, mask=m < M, other=0.0)
    if ONE_TILE:
        if SPREAD:
            log_p = (s - row_max[:, None]) - log_sum[:, None]
            row_loss += loss_beside(q, log_p, n, t, N)
        if dx is not None:
            ds = score_gradient(s, e, q, share, pull, factor, softcap, Z_LOSS, SOFTCAP)
            store_rows(dx, tl.where(read[:, None], ds, 0.0), m, n, stride_dxm, stride_dxn, M, N)
    elif SPREAD or dx is not None:
        for start in range(0, N, BLOCK_N):
            s = load_scores(x, m, start + n, stride_xm, stride_xn, N, read, softcap, SOFTCAP)
            q = load_q(
                target, weight, m, start + n, t, w_t, stride_tm, stride_tn, stride_w, N, N, read, smoothing,
                PROBABILITIES, SMOOTHED,
            )  # fmt: skip
            if SPREAD:
                log_p = (s - row_max[:, None]) - log_sum[:, None]
                row_loss += loss_beside(q, log_p, start + n, t, N)
            if dx is not None:
                e = tl.exp(s - row_max[:, None])
                ds = score_gradient(s, e, q, share, pull, factor, softcap, Z_LOSS, SOFTCAP)
                store_rows(dx, tl.where(read[:, None], ds, 0.0), m, start + n, stride_dxm, stride_dxn, M, N)

    if not PROBABILITIES:
        row_loss += loss_of_class
    if Z_LOSS:
        row_loss += z_loss * lse * lse
    rows = r0 * stride_l0 + r1 * stride_l1 + m * stride_lm
    tl.store(loss + rows, cast(tl.where(read, row_loss, 0.0), loss.dtype.element_ty), mask=m < M)
    if row_max_out is not None:
        tl.store(row_max_out + rows, row_max, mask=m < M)
        tl.store(row_sum_out + rows, row_sum, mask=m < M)


@triton.jit(do_not_specialize=["ignore_index", "R1", "first_class"])
def backward_kernel(
    dx, dloss, row_max, row_sum, totals, x, target, weight, divisor,
    ignore_index, smoothing, z_loss, softcap, R1, M, N, first_class, V,
    stride_l0, stride_l1, stride_lm,
    stride_dl0, stride_dl1, stride_dlm,
    stride_dx0, stride_dx1, stride_dxm, stride_dxn,
    stride_x0, stride_x1, stride_xm, stride_xn,
    stride_t0, stride_t1, stride_tm, stride_tn, stride_w,
    PROBABILITIES: tl.constexpr, SMOOTHED: tl.constexpr, Z_LOSS: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M rows of dx from x and the forward's maximum and sum.

    With `totals`, which then holds Σ q of each row, x is N of V classes, from first_class on.
    """
    r0, r1, first = locate_lines(R1, M, BLOCK_M)
    dx += r0 * stride_dx0 + r1 * stride_dx1
    x += r0 * stride_x0 + r1 * stride_x1
    target += r0 * stride_t0 + r1 * stride_t1
    m = first + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    t, read, poison = load_class(target, m, stride_tm, M, V, ignore_index, PROBABILITIES)
    if first_class is not None:
        t = class_in_slice(t, first_class, N)
    w_t = weight_of_class(weight, t, stride_w)
    rows = r0 * stride_l0 + r1 * stride_l1 + m * stride_lm
    highest = tl.load(row_max + rows, mask=read, other=0.0)
    sum_of_row = tl.load(row_sum + rows, mask=read, other=1.0)
    factor = tl.load(dloss + r0 * stride_dl0 + r1 * stride_dl1 + m * stride_dlm, mask=read, other=0.0).to(tl.float32)
    factor += poison
    if divisor is not None:
        factor /= tl.load(divisor)

    if totals is not None:
        total = tl.load(totals + rows, mask=read, other=0.0)
    else:
        total = tl.zeros((BLOCK_M,), tl.float32)
        if PROBABILITIES or SMOOTHED:
            for start in range(0, N, BLOCK_N):
                q = load_q(
                    target, weight, m, start + n, t, w_t, stride_tm, stride_tn, stride_w, N, V, read, smoothing,
                    PROBABILITIES, SMOOTHED,
                )  # fmt: skip
                total += sum_beside(q, start + n, t)
        if not PROBABILITIES:
            total += entry_of_class(w_t, V, smoothing, SMOOTHED)
    pull = 2.0 * z_loss * (highest + tl.log(sum_of_row)) / sum_of_row
    share = total / sum_of_row
    for start in range(0, N, BLOCK_N):
        s = load_scores(x, m, start + n, stride_xm, stride_xn, N, read, softcap, SOFTCAP)
        e = tl.exp(s - highest[:, None])
        q = load_q(
            target, weight, m, start + n, t, w_t, stride_tm, stride_tn, stride_w, N, V, read, smoothing,
            PROBABILITIES, SMOOTHED,
        )  # fmt: skip
        ds = score_gradient(s, e, q, share, pull, factor, softcap, Z_LOSS, SOFTCAP)
        store_rows(dx, tl.where(read[:, None], ds, 0.0), m, start + n, stride_dxm, stride_dxn, M, N)


@triton.jit
def _sum_kernel(out, values, divisor, P, rounds, BLOCK: tl.constexpr):
    """out[i] = Σ of the i-th `rounds` blocks of P values, divided by *divisor if there is one."""
    first = tl.program_id(0).to(tl.int64) * rounds * BLOCK
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(rounds):
        p = first + i * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(values + p, mask=p < P, other=0.0)
    result = tl.sum(total, 0)
    if divisor is not None:
        result /= tl.load(divisor)
    tl.store(out + tl.program_id(0), cast(result, out.dtype.element_ty))


@triton.jit(do_not_specialize=["ignore_index"])
def _count_kernel(out, target, weight, ignore_index, P, N, rounds, stride_w, BLOCK: tl.constexpr):
    """out[i] = Σ w_t over those of the i-th `rounds` blocks of P classes that count."""
    first = tl.program_id(0).to(tl.int64) * rounds * BLOCK
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(rounds):
        p = first + i * BLOCK + tl.arange(0, BLOCK)
        t, _, _ = load_class(target, p, 1, P, N, ignore_index, False)
        total += weight_of_class(weight, t, stride_w)
    tl.store(out + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def _scale_kernel(
    out, x, factor, R1, M, N,
    stride_f0, stride_f1, stride_fm,
    stride_out0, stride_out1, stride_outm, stride_outn,
    stride_x0, stride_x1, stride_xm, stride_xn,
    IN_PLACE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out = factor · x, one program for BLOCK_M rows; over at once where that is nothing to do."""
    r0, r1, first = locate_lines(R1, M, BLOCK_M)
    m = first + tl.arange(0, BLOCK_M)
    f = tl.load(factor + r0 * stride_f0 + r1 * stride_f1 + m * stride_fm, mask=m < M, other=1.0).to(tl.float32)
    columns = N
    if IN_PLACE:
        columns = tl.where(tl.min((f == 1.0).to(tl.int32), 0) == 1, 0, N)
    out += r0 * stride_out0 + r1 * stride_out1
    x += r0 * stride_x0 + r1 * stride_x1
    for start in range(0, columns, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        value = load_rows(x, m, n, stride_xm, stride_xn, inside(m, n, M, N)) * f[:, None]
        store_rows(out, value, m, n, stride_outm, stride_outn, M, N)


def config_of(N: int, M: int, class_inside: bool, arch: str) -> RowConfig:
    """As for softmax; a row of many tiles has a program of 1024 threads for itself, so that one is in flight per SM."""
    config = row_config(N, TILES, arch, rows=M, contiguous_rows=class_inside)
    if N > config.BLOCK_N and config.rows_per_program == 1:
        return RowConfig(config.BLOCK_N, 1, 1024 // warp_size(arch))
    return config


def tile_of(lines: Lines, device: torch.device) -> tuple[tuple[int], dict[str, int]]:
    """Grid and tile of a kernel that runs over lines of classes."""
    config = config_of(lines.N, lines.M, lines.side_by_side, arch_of(device))
    tile = {"BLOCK_M": config.rows_per_program, "BLOCK_N": config.BLOCK_N, "num_warps": config.num_warps}
    return (lines.R0 * lines.R1 * triton.cdiv(lines.M, config.rows_per_program),), tile


def over_classes(t: Tensor, logits: Tensor, dim: int) -> Tensor:
    """A tensor of rows (N, …), or of nothing, as one of the logits' shape."""
    return (t.unsqueeze(dim) if t.dim() else t).expand(logits.shape)


def flags_of(spec: CrossEntropySpec) -> dict[str, Any]:
    return {
        "PROBABILITIES": spec.probabilities, "SMOOTHED": spec.label_smoothing > 0.0, "Z_LOSS": spec.z_loss != 0.0,
        "SOFTCAP": spec.softcap is not None,
    }  # fmt: skip


def options_of(spec: CrossEntropySpec) -> tuple:
    return spec.ignore_index, spec.label_smoothing, spec.z_loss, 1.0 if spec.softcap is None else spec.softcap


def _programs(P: int) -> tuple[int, int]:
    """How many programs add up P values, and how many blocks each."""
    blocks = triton.cdiv(P, SUM_BLOCK)
    rounds = max(SUM_ROUNDS, triton.cdiv(blocks, MOST_SUMS))
    return triton.cdiv(blocks, rounds), min(rounds, max(blocks, 1))


def add_up(out: Tensor, values: Tensor, divisor: Tensor | None = None) -> None:
    """out = Σ values, fp32 and contiguous, in fixed order."""
    programs, rounds = _programs(values.numel())
    if programs > 1:
        partial = values.new_empty(programs)
        _sum_kernel[(programs,)](partial, values, None, values.numel(), rounds, SUM_BLOCK)
        add_up(out, partial, divisor)
        return
    _sum_kernel[(1,)](out, values, divisor, values.numel(), rounds, SUM_BLOCK)


def fill_divisor(divisor: Tensor, target: Tensor, weight: Tensor | None, N: int, spec: CrossEntropySpec) -> None:
    """divisor (1,): Σ w_t over the rows that count; the number of rows if targets are probabilities."""
    if spec.probabilities:
        divisor.fill_(target.numel() // max(N, 1))
        return
    target = target.contiguous()
    programs, rounds = _programs(target.numel())
    out = divisor if programs <= 1 else divisor.new_empty(programs)
    _count_kernel[(max(programs, 1),)](
        out, target, weight, spec.ignore_index, target.numel(), N, rounds, stride_of(weight), SUM_BLOCK
    )
    if programs > 1:
        add_up(divisor, out)


def stride_of(weight: Tensor | None) -> int:
    return 0 if weight is None else weight.stride(0)


def launch_forward(
    loss: Tensor,
    row_max: Tensor | None,
    row_sum: Tensor | None,
    divisor: Tensor | None,
    dlogits: Tensor | None,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    spec: CrossEntropySpec,
) -> None:
    """Fills loss and what there is of the others from logits, classes in dimension 1 of several or the only one."""
    dim = min(1, logits.dim() - 1)
    N = logits.shape[dim]
    rows = (*logits.shape[:dim], *logits.shape[dim + 1 :])
    if spec.divides:
        divisor = logits.new_empty(1, dtype=torch.float32) if divisor is None else divisor
        fill_divisor(divisor, target, weight, N, spec)
    losses = loss if spec.reduction == "none" else logits.new_empty(rows, dtype=torch.float32)
    if losses.numel():
        by = divisor if spec.divides else None
        launch_rows(losses, row_max, row_sum, by, dlogits, logits, target, weight, spec)
    if spec.reduction != "none":
        add_up(loss, losses, divisor if spec.divides else None)


def launch_rows(
    losses: Tensor,
    row_max: Tensor | None,
    row_sum: Tensor | None,
    divisor: Tensor | None,
    dlogits: Tensor | None,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    spec: CrossEntropySpec,
    dloss: Tensor | None = None,
) -> None:
    """Row losses, not reduced, and what there is of the others; dloss, fp32 like losses, is a factor on dlogits."""
    dim = min(1, logits.dim() - 1)
    classes = target if spec.probabilities else over_classes(target, logits, dim)
    into = logits if dlogits is None else dlogits
    lines = lines_along(dim, (logits, into, classes, over_classes(losses, logits, dim)))
    if lines is None:
        # Five dimensions or more, through which the tensors run in different orders: rare enough to be copied.
        dense = None if dlogits is None else torch.empty_like(logits, memory_format=torch.contiguous_format)
        target = target.contiguous()
        launch_rows(losses, row_max, row_sum, divisor, dense, logits.contiguous(), target, weight, spec, dloss)
        if dlogits is not None and dense is not None:
            dlogits.copy_(dense)
        return
    x, dx, t, row = lines.steps
    grid, tile = tile_of(lines, logits.device)
    _forward_kernel[grid](
        losses, row_max, row_sum, dlogits, logits, target, weight, divisor, dloss,
        *options_of(spec), lines.R1, lines.M, lines.N, *row[:3], *dx, *x, *t, stride_of(weight),
        **flags_of(spec), **tile, ONE_TILE=tile["BLOCK_N"] >= lines.N,
    )  # fmt: skip


def launch_backward(
    dlogits: Tensor,
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    row_max: Tensor,
    row_sum: Tensor,
    divisor: Tensor | None,
    spec: CrossEntropySpec,
    totals: Tensor | None = None,
    first_class: int | None = None,
    V: int | None = None,
) -> None:
    """Fills dlogits, which may be logits, from what `launch_forward` filled; dloss has the shape of the rows, or none.

    With the last three, logits, dlogits, weight and probabilities are a slice of V classes.
    """
    if logits.numel() == 0:
        return
    dim = min(1, logits.dim() - 1)
    classes = target if spec.probabilities else over_classes(target, logits, dim)
    expanded = (over_classes(t, logits, dim) for t in (row_max, dloss))
    lines = lines_along(dim, (logits, dlogits, classes, *expanded))
    if lines is None:
        dense = torch.empty_like(logits, memory_format=torch.contiguous_format)
        dloss, target = dloss.contiguous(), target.contiguous()
        launch_backward(dense, dloss, logits.contiguous(), target, weight, row_max, row_sum, divisor, spec)
        dlogits.copy_(dense)
        return
    x, dx, t, row, dl = lines.steps
    grid, tile = tile_of(lines, logits.device)
    backward_kernel[grid](
        dlogits, dloss, row_max, row_sum, totals, logits, target, weight, divisor if spec.divides else None,
        *options_of(spec), lines.R1, lines.M, lines.N, first_class, lines.N if V is None else V,
        *row[:3], *dl[:3], *dx, *x, *t, stride_of(weight),
        **flags_of(spec), **tile,
    )  # fmt: skip


def launch_scale(out: Tensor, x: Tensor, factor: Tensor, dim: int) -> None:
    """out = factor · x, factor of the shape of x without `dim`, or of none; out may be x."""
    if x.numel() == 0:
        return
    lines = lines_along(dim, (x, out, over_classes(factor, x, dim)))
    if lines is None:
        out.copy_(x.float() * over_classes(factor, x, dim))
        return
    at, to, row = lines.steps
    grid, tile = tile_of(lines, x.device)
    _scale_kernel[grid](out, x, factor, lines.R1, lines.M, lines.N, *row[:3], *to, *at, IN_PLACE=out is x, **tile)


def inspect_cases(arch: str) -> list[KernelCase]:
    """The compilations that the ahead-of-time report shows."""
    from fastattn.backends.triton.row_cases import SHAPES, row_case

    cases = []
    for dtype, N in SHAPES:
        config = config_of(N, 1 << 30, False, arch)
        outputs = {
            "loss": "*fp32", "dloss": "*fp32", "divisor": "*fp32", "dx": f"*{dtype}", "x": f"*{dtype}",
            "row_max": "*fp32", "row_sum": "*fp32",
        }  # fmt: skip
        for feature, target, weighted, smoothed, extras, gradient in (
            ("plain", "i64", False, False, False, True),
            ("loss_only", "i64", False, False, False, False),
            ("everything", "i64", True, True, True, True),
            ("probabilities", dtype, True, True, True, True),
        ):
            flags = {
                "PROBABILITIES": target == dtype, "SMOOTHED": smoothed, "Z_LOSS": extras, "SOFTCAP": extras,
                "ONE_TILE": N <= config.BLOCK_N, "stride_w": int(weighted),
            }  # fmt: skip
            absent = {} if weighted else {"weight": None}
            pointers = outputs | {"target": f"*{target}", "weight": "*fp32"}
            into = {"dloss": None, "row_max_out": None, "row_sum_out": None} | ({} if gradient else {"dx": None})
            whole = {"totals": None, "first_class": None}
            name = f"{feature}/{dtype}/{N}"
            cases.append(row_case(
                f"cross_entropy/forward/{name}", _forward_kernel, config, pointers, **flags, **absent, **into
            ))  # fmt: skip
            if gradient:
                del flags["ONE_TILE"]
                cases.append(row_case(
                    f"cross_entropy/backward/{name}", backward_kernel, config, pointers, **flags, **absent, **whole
                ))  # fmt: skip
    return cases
