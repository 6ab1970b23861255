"""The row operations of csrc/cuda: from tensors and specs to addresses, sizes and steps between rows.

Rows are numbered (i0 · R1 + i1) · R2 + i2, and their elements are neighbours: a tensor whose are not is copied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.backends.cuda.module import load, stream_of
from fastattn.backends.row_layout import lines_along, row_layout
from fastattn.spec import CrossEntropySpec, NormSpec, SoftmaxSpec

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
Rows = tuple[int, int, int, int, int]  # address, dtype, steps


def _rows(t: Tensor | None, steps: Sequence[int]) -> Rows | None:
    return None if t is None else (t.data_ptr(), _CODES[t.dtype], steps[0], steps[1], steps[2])


def _vector(t: Tensor | None) -> tuple[int, int] | None:
    return None if t is None else (t.data_ptr(), _CODES[t.dtype])


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _compact(t: Tensor | None, n_dims: int = 1) -> Tensor | None:
    """`t`, or a copy in which the elements of a row are neighbours."""
    if t is None or (t.flatten(t.dim() - n_dims).stride(-1) == 1 if t.dim() else True):
        return t
    return t.contiguous()


def norm_forward(
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
    weight, bias = (t if t is None else t.contiguous().view(-1) for t in (weight, bias))
    M = stats.shape[1]
    if x.numel() == 0:
        stats.fill_(math.nan)  # of rows without elements, where there are any
        return
    N = x.numel() // M
    inputs = [_compact(t, spec.n_dims) for t in (x, residual) if t is not None]
    (x, *rest), lines = row_layout(inputs, spec.n_dims)  # type: ignore[arg-type]
    with torch.cuda.device_of(y):
        load(y.device).norm_forward(
            y=_rows(y, lines.dense), h=_rows(h, lines.dense) if rest else None, stats=stats.data_ptr(),
            x=_rows(x, lines.steps[0]), weight=_vector(weight), bias=_vector(bias),
            residual=_rows(rest[0], lines.steps[1]) if rest else None,
            M=M, N=N, R1=lines.R1, R2=lines.M, rms=spec.rms, eps=spec.eps, weight_offset=spec.weight_offset,
            stream=stream_of(y),
        )  # fmt: skip


def norm_backward(
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dresidual: Tensor | None,
    dy: Tensor | None,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    stats: Tensor,
    spec: NormSpec,
) -> None:
    dweight, dbias, weight = (t if t is None else t.contiguous().view(-1) for t in (dweight, dbias, weight))
    sums = (dweight, dbias)
    if h.numel() == 0 or dy is None:
        for t in sums:
            if t is not None:
                t.zero_()
        for t in (dx, dresidual):  # where nothing flows back through y, 0 · inf would be NaN
            if t is not None:
                t.zero_() if dh is None else t.copy_(dh)
        return
    M, N = stats.shape[1], h.numel() // stats.shape[1]
    inputs = [_compact(t, spec.n_dims) for t in (dy, h, dh) if t is not None]
    (dy, h, *rest), lines = row_layout(inputs, spec.n_dims)  # type: ignore[arg-type]
    cuda = load(h.device)
    with torch.cuda.device_of(h):
        P = cuda.norm_backward_parts(M=M, N=N, x_dtype=_CODES[spec.dtype], h_dtype=_CODES[h.dtype])
        parts = [None if t is None else h.new_empty(P, N, dtype=torch.float32) for t in sums]
        cuda.norm_backward(
            dx=_rows(dx, lines.dense), dweight=_vector(dweight), dbias=_vector(dbias),
            dresidual=None if dresidual is dx else _rows(dresidual, lines.dense),
            dweight_parts=_address(parts[0]), dbias_parts=_address(parts[1]),
            dy=_rows(dy, lines.steps[0]), h=_rows(h, lines.steps[1]), weight=_vector(weight),
            dh=_rows(rest[0], lines.steps[2]) if rest else None, stats=stats.data_ptr(), x_dtype=_CODES[spec.dtype],
            M=M, N=N, R1=lines.R1, R2=lines.M, rms=spec.rms, weight_offset=spec.weight_offset, stream=stream_of(h),
        )  # fmt: skip


def softmax_forward(y: Tensor, x: Tensor, mask: Tensor | None, spec: SoftmaxSpec) -> None:
    _softmax("softmax_forward", ("y", "x"), y, (x,), mask, spec)


def softmax_backward(dx: Tensor | None, dy: Tensor | None, y: Tensor, mask: Tensor | None, spec: SoftmaxSpec) -> None:
    if dx is not None and dy is None:
        dx.zero_()
    elif dx is not None and dy is not None:
        _softmax("softmax_backward", ("dx", "dy", "y"), dx, (dy, y), mask, spec)


def _softmax(
    launcher: str,
    names: tuple[str, ...],
    out: Tensor,
    inputs: tuple[Tensor, ...],
    mask: Tensor | None,
    spec: SoftmaxSpec,
) -> None:
    """Fills out from inputs of its shape, which have these names for the launcher; out may be one of them."""
    if out.numel() == 0:
        return
    tensors = torch.atleast_1d(out, *(_compact(t) for t in inputs))
    mask = None if mask is None else mask.expand(tensors[0].shape)
    lines = None
    if tensors[0].stride(-1) == 1:
        lines = lines_along(-1, tensors if mask is None else (*tensors, mask), own=-2 if spec.causal else None)
    if lines is None:  # another order of dimensions than three steps reach, or out's elements apart
        dense = torch.empty_like(out, memory_format=torch.contiguous_format)
        copies = tuple(t.contiguous() for t in inputs)
        _softmax(launcher, names, dense, copies, None if mask is None else mask.contiguous(), spec)
        out.copy_(dense)
        return
    R0, R1, R2, N, steps = lines
    named = {name: _rows(t, step) for name, t, step in zip(names, tensors, steps, strict=False)}
    with torch.cuda.device_of(out):
        getattr(load(out.device), launcher)(
            **named, mask=None if mask is None else (mask.data_ptr(), *steps[-1]), M=R0 * R1 * R2, N=N, R1=R1, R2=R2,
            scale=spec.scale, log=spec.log, causal=spec.causal, diagonal=spec.shift(R2, N) if spec.causal else 0,
            stream=stream_of(out),
        )  # fmt: skip


def cross_entropy_forward(
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
    weight = weight if weight is None else weight.contiguous()
    losses = loss if spec.reduction == "none" else logits.new_empty(target.shape, dtype=torch.float32)
    with torch.cuda.device_of(logits):
        if spec.divides:
            divisor = logits.new_empty(1, dtype=torch.float32) if divisor is None else divisor
            _fill_divisor(divisor, target, weight, logits.shape[min(1, logits.dim() - 1)], spec)
        by = divisor if spec.divides else None
        if losses.numel():
            _loss_rows(losses, row_max, row_sum, by, dlogits, logits, target, weight, spec)
        if spec.reduction != "none":
            _add_up(loss, losses, by)


def _fill_divisor(divisor: Tensor, target: Tensor, weight: Tensor | None, N: int, spec: CrossEntropySpec) -> None:
    """divisor (1,): Σ of the weights of the rows that count."""
    cuda, classes = load(target.device), target.contiguous()
    partial = divisor.new_empty(cuda.sum_partials(P=classes.numel()))
    cuda.count_classes(
        out=divisor.data_ptr(), partial=partial.data_ptr(), target=classes.data_ptr(),
        target_64=classes.dtype == torch.int64, weight=_vector(weight), ignore_index=spec.ignore_index,
        P=classes.numel(), N=N, stream=stream_of(target),
    )  # fmt: skip


def _add_up(loss: Tensor, losses: Tensor, divisor: Tensor | None) -> None:
    cuda = load(loss.device)
    partial = losses.new_empty(cuda.sum_partials(P=losses.numel()))
    cuda.sum_values(
        out=_vector(loss), partial=partial.data_ptr(), values=losses.data_ptr(), divisor=_address(divisor),
        P=losses.numel(), stream=stream_of(loss),
    )  # fmt: skip


def _loss_rows(losses, row_max, row_sum, divisor, dlogits, logits, target, weight, spec: CrossEntropySpec) -> None:
    """Row losses, not reduced, and what there is of the other outputs."""
    dim = min(1, logits.dim() - 1)
    into = logits if dlogits is None else dlogits
    lines = None
    if logits.stride(dim) == 1 == into.stride(dim):
        lines = lines_along(dim, (logits, into, *(_over_classes(t, logits, dim) for t in (target, losses))))
    if lines is None:
        dense = None if dlogits is None else _classes_last(torch.empty_like(logits), dim)
        last = _classes_last(logits, dim)
        _loss_rows(losses, row_max, row_sum, divisor, dense, last, target.contiguous(), weight, spec)
        if dlogits is not None:
            dlogits.copy_(dense)
        return
    x, dx, t, row = lines.steps
    load(logits.device).cross_entropy_forward(
        loss=_rows(losses, row), row_max=_address(row_max), row_sum=_address(row_sum), divisor=_address(divisor),
        dlogits=_rows(dlogits, dx), logits=_rows(logits, x), target=_target(target, t), weight=_vector(weight),
        dloss=None, M=lines.R0 * lines.R1 * lines.M, N=lines.N, R1=lines.R1, R2=lines.M,
        **_options(spec), stream=stream_of(logits),
    )  # fmt: skip


def cross_entropy_backward(
    dlogits: Tensor,
    dloss: Tensor | None,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    row_max: Tensor,
    row_sum: Tensor,
    divisor: Tensor | None,
    spec: CrossEntropySpec,
) -> None:
    if dloss is None or logits.numel() == 0:
        dlogits.zero_()
        return
    weight = weight if weight is None else weight.contiguous()
    dim = min(1, logits.dim() - 1)
    lines = None
    if logits.stride(dim) == 1 == dlogits.stride(dim):
        columns = (_over_classes(t, logits, dim) for t in (target, row_max, dloss))
        lines = lines_along(dim, (logits, dlogits, *columns))
    if lines is None:
        dense = _classes_last(torch.empty_like(logits), dim)
        others = target.contiguous(), weight, row_max, row_sum, divisor, spec
        cross_entropy_backward(dense, dloss.contiguous(), _classes_last(logits, dim), *others)
        dlogits.copy_(dense)
        return
    x, dx, t, row, dl = lines.steps
    with torch.cuda.device_of(logits):
        load(logits.device).cross_entropy_backward(
            dlogits=_rows(dlogits, dx), dloss=_rows(dloss, dl), logits=_rows(logits, x), target=_target(target, t),
            weight=_vector(weight), row_max=_rows(row_max, row), row_sum=row_sum.data_ptr(),
            divisor=_address(divisor) if spec.divides else 0, M=lines.R0 * lines.R1 * lines.M, N=lines.N,
            R1=lines.R1, R2=lines.M, **_options(spec), stream=stream_of(logits),
        )  # fmt: skip


def cross_entropy_scale(out: Tensor, factor: Tensor | None, x: Tensor) -> None:
    """out = factor · x, factor of the shape of the rows, or of nothing; out may be x."""
    if factor is None or x.numel() == 0:
        out.zero_()
        return
    dim = min(1, x.dim() - 1)
    lines = None
    if x.stride(dim) == 1 == out.stride(dim):
        lines = lines_along(dim, (x, out, _over_classes(factor, x, dim)))
    if lines is None:
        out.copy_(x.float() * _over_classes(factor, x, dim))
        return
    at, to, row = lines.steps
    with torch.cuda.device_of(x):
        load(x.device).scale_rows(
            out=_rows(out, to), x=_rows(x, at), factor=_rows(factor, row), M=lines.R0 * lines.R1 * lines.M, N=lines.N,
            R1=lines.R1, R2=lines.M, stream=stream_of(x),
        )  # fmt: skip


def _over_classes(t: Tensor, logits: Tensor, dim: int) -> Tensor:
    """A tensor of rows (N, …), or of nothing, as one of the logits' shape."""
    return (t.unsqueeze(dim) if t.dim() else t).expand(logits.shape)


def _classes_last(t: Tensor, dim: int) -> Tensor:
    """A copy in which the classes of a row are neighbours, and rows follow in their order."""
    return t.movedim(dim, -1).contiguous().movedim(-1, dim)


def _target(target: Tensor, steps: Sequence[int]) -> tuple[int, bool, int, int, int]:
    return target.data_ptr(), target.dtype == torch.int64, steps[0], steps[1], steps[2]


def _options(spec: CrossEntropySpec) -> dict[str, Any]:
    return {
        "ignore_index": spec.ignore_index, "label_smoothing": spec.label_smoothing, "z_loss": spec.z_loss,
        "softcap": spec.softcap or 0.0,
    }  # fmt: skip
