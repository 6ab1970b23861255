"""From the tensors and specs of the row operators to the kernels of csrc/cpu."""

from __future__ import annotations

import math

import torch
from torch import Tensor, get_num_threads

from fastattn.backends.cpu.layout import dense, ready, vector, written
from fastattn.backends.cpu.module import DTYPES, load
from fastattn.spec import NormSpec, Spec


def unsupported(spec: Spec) -> str | None:
    """Why the row kernels do not compute `spec`, whose own dtype is one of theirs."""
    if isinstance(spec, NormSpec):
        named = (("weight", spec.weight_dtype), ("bias", spec.bias_dtype), ("residual", spec.residual_dtype))
        for argument, dtype in named:
            if dtype is not None and dtype not in DTYPES:
                return f"{argument} of dtype {_name(dtype)} (it has float16, bfloat16 and float32)"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
    """Fills y and h (…, *row), contiguous, and stats (2 | 1, M)."""
    n = x.numel()
    if n == 0:
        stats.fill_(math.nan)  # of rows without elements, where there are any
        return
    M = stats.shape[1]
    N = n // M
    weight, bias = (t if t is None or t.is_contiguous() else t.contiguous() for t in (weight, bias))
    if x.is_contiguous() and (residual is None or residual.is_contiguous()):
        sizes, x_at, residual_at = (1, 1, M), dense(x, N), dense(residual, N)
        y_at, h_at = dense(y, N), dense(h, N)
    else:
        (x, *rest), found = ready((x,) if residual is None else (x, residual), spec.n_dims)
        sizes, x_at, residual_at = found.sizes, found.address(0, x), found.address(1, rest[0]) if rest else None
        y_at, h_at = written(found, y), written(found, h)
    load().norm_forward(
        sizes, N, y_at, h_at, stats.data_ptr(), x_at, vector(weight), vector(bias), residual_at, spec.eps,
        spec.weight_offset, spec.rms, 0 if seed is None else seed.data_ptr(), spec.dropout_p, get_num_threads(),
    )  # fmt: skip


def norm_backward(
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dresidual: Tensor | None,
    dy: Tensor | None,
    dh: Tensor | None,
    base: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    stats: Tensor,
    spec: NormSpec,
) -> None:
    """Fills those of dx and dresidual (…, *row), contiguous, and dweight and dbias that are not None."""
    if dy is None:
        _norm_backward_of_sum(dx, dweight, dbias, dresidual, dh, seed, spec)
        return
    n = base.numel()
    if n == 0:
        for parameter in (dweight, dbias):
            if parameter is not None:
                parameter.zero_()
        return
    M = stats.shape[1]
    N = n // M
    if dresidual is dx:
        dresidual = None
    weight, bias = (t if t is None or t.is_contiguous() else t.contiguous() for t in (weight, bias))
    if dy.dtype != base.dtype and not spec.memory_efficient and base.dtype != torch.float32:
        dy, base = dy.float(), base.float()
    if dy.is_contiguous() and base.is_contiguous() and (dh is None or dh.is_contiguous()):
        sizes, dy_at, base_at, dh_at = (1, 1, M), dense(dy, N), dense(base, N), dense(dh, N)
        dx_at, dresidual_at = dense(dx, N), dense(dresidual, N)
    else:
        (dy, base, *rest), found = ready((dy, base) if dh is None else (dy, base, dh), spec.n_dims)
        sizes, dy_at, base_at = found.sizes, found.address(0, dy), found.address(1, base)
        dh_at = found.address(2, rest[0]) if rest else None
        dx_at, dresidual_at = (None if t is None else written(found, t) for t in (dx, dresidual))
    load().norm_backward(
        sizes, N, dx_at, vector(dweight), vector(dbias), dresidual_at, dy_at, dh_at, base_at, vector(weight),
        vector(bias), stats.data_ptr(), spec.weight_offset, spec.rms, spec.memory_efficient,
        0 if seed is None else seed.data_ptr(), spec.dropout_p, get_num_threads(),
    )  # fmt: skip


def _norm_backward_of_sum(
    dx, dweight, dbias, dresidual, dh: Tensor | None, seed: Tensor | None, spec: NormSpec
) -> None:
    """Of h alone: what the norm would make of no gradient is not computed, as 0 · inf would be NaN."""
    for parameter in (dweight, dbias):
        if parameter is not None:
            parameter.zero_()
    if dresidual is not None:
        dresidual.zero_() if dh is None else dresidual.copy_(dh)
    if dx is None or dx is dresidual:
        return
    if dh is None or seed is None:
        dx.zero_() if dh is None else dx.copy_(dh)
    else:
        lead = dh.dim() - spec.n_dims
        drop_and_add(dx.view(dh.shape).flatten(lead), None, dh.flatten(lead), seed, spec.dropout_p)


def drop_and_add(y: Tensor, residual: Tensor | None, x: Tensor, seed: Tensor, dropout_p: float) -> None:
    raise NotImplementedError
