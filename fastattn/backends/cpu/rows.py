"""From the tensors and specs of the row operators to the kernels of csrc/cpu."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, get_num_threads

from fastattn.backends.cpu.layout import address, dense, ready, vector, written
from fastattn.backends.cpu.module import DTYPES, load, other_dtype
from fastattn.backends.row_layout import Lines, lines_along, merge_dimensions, padded
from fastattn.spec import (
    CrossEntropySpec,
    DropoutAddSpec,
    GatedSpec,
    LinearCrossEntropySpec,
    NormSpec,
    RotarySpec,
    SoftmaxSpec,
    Spec,
)


def unsupported(spec: Spec) -> str | None:
    """Why the row kernels do not compute `spec`, whose own dtype is one of theirs."""
    if isinstance(spec, NormSpec):
        named = (("weight", spec.weight_dtype), ("bias", spec.bias_dtype), ("residual", spec.residual_dtype))
        for argument, dtype in named:
            if dtype is not None and dtype not in DTYPES:
                return f"{argument} of {other_dtype(dtype)}"
    if isinstance(spec, LinearCrossEntropySpec):
        return unsupported(spec.loss)
    if isinstance(spec, CrossEntropySpec):
        if spec.differentiates is not None:
            return f"a gradient of {spec.differentiates} (its kernels have that of the logits)"
        for argument, dtype in (("target", spec.target_dtype), ("weight", spec.weight_dtype)):
            if dtype is not None and dtype.is_floating_point and dtype not in DTYPES:
                return f"{argument} of {other_dtype(dtype)}"
    return None


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
    weight = weight if weight is None or weight.is_contiguous() else weight.contiguous()
    bias = bias if bias is None or bias.is_contiguous() else bias.contiguous()
    if x.is_contiguous() and (residual is None or residual.is_contiguous()):
        sizes, x_at, residual_at = (1, 1, M), dense(x, N), dense(residual, N)
        y_at, h_at = dense(y, N), dense(h, N)
    else:
        (x, *rest), found = ready((x,) if residual is None else (x, residual), spec.n_dims)
        sizes, x_at, residual_at = found.rows, address(found, 0, x), address(found, 1, rest[0]) if rest else None
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
    weight = weight if weight is None or weight.is_contiguous() else weight.contiguous()
    bias = bias if bias is None or bias.is_contiguous() else bias.contiguous()
    if dy.dtype != base.dtype and not spec.memory_efficient and base.dtype != torch.float32:
        dy, base = dy.float(), base.float()
    if dy.is_contiguous() and base.is_contiguous() and (dh is None or dh.is_contiguous()):
        sizes, dy_at, base_at, dh_at = (1, 1, M), dense(dy, N), dense(base, N), dense(dh, N)
        dx_at, dresidual_at = dense(dx, N), dense(dresidual, N)
    else:
        (dy, base, *rest), found = ready((dy, base) if dh is None else (dy, base, dh), spec.n_dims)
        sizes, dy_at, base_at = found.rows, address(found, 0, dy), address(found, 1, base)
        dh_at = address(found, 2, rest[0]) if rest else None
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


def softmax_forward(y: Tensor, x: Tensor, mask: Tensor | None, spec: SoftmaxSpec) -> None:
    """Fills y, which may be x."""
    if x.numel() == 0:
        return
    if mask is None and not spec.causal and spec.dim == -1 and x.is_contiguous():
        N = x.shape[-1] if x.dim() else 1
        sizes, y_at, x_at = (1, 1, x.numel() // N, N), dense(y, N), dense(x, N)
        load().softmax_forward(
            sizes, y_at, x_at, None, (1, 1, 0), False, spec.scale, spec.log, False, 0, get_num_threads()
        )  # fmt: skip
        return
    out, x = torch.atleast_1d(y, x)
    tensors = (out, x) if mask is None else (out, x, mask.expand(x.shape))
    found, columns, (out, *inputs) = _softmax_lines(tensors, 2, spec)
    x_at, mask_at = (*(address(found, i + 1, t) for i, t in enumerate(inputs)), None)[:2]
    load().softmax_forward(
        (*found.rows, found.N), address(found, 0, out), x_at, mask_at, (*found.along, 0)[:3], columns,
        spec.scale, spec.log, spec.causal, spec.shift(found.M, found.N) if spec.causal else 0, get_num_threads(),
    )  # fmt: skip
    if out.data_ptr() != y.data_ptr():
        y.copy_(out.view(y.shape))


def softmax_backward(dx: Tensor | None, dy: Tensor | None, y: Tensor, mask: Tensor | None, spec: SoftmaxSpec) -> None:
    """Fills dx, if there is one, from dy and the forward's result y."""
    if dx is None or y.numel() == 0:
        return
    if dy is None:
        dx.zero_()
        return
    if mask is None and not spec.causal and spec.dim == -1 and y.is_contiguous() and dy.is_contiguous():
        N = y.shape[-1] if y.dim() else 1
        load().softmax_backward(
            (1, 1, y.numel() // N, N), dense(dx, N), dense(dy, N), dense(y, N), None, (1, 1, 1, 0), False,
            spec.scale, spec.log, False, 0, get_num_threads(),
        )  # fmt: skip
        return
    out, dy, y = torch.atleast_1d(dx, dy, y)
    tensors = (out, dy, y) if mask is None else (out, dy, y, mask.expand(y.shape))
    found, columns, (out, *inputs) = _softmax_lines(tensors, 3, spec)
    dy_at, y_at, mask_at = (*(address(found, i + 1, t) for i, t in enumerate(inputs)), None)[:3]
    load().softmax_backward(
        (*found.rows, found.N), address(found, 0, out), dy_at, y_at, mask_at, (*found.along, 0)[:4], columns,
        spec.scale, spec.log, spec.causal, spec.shift(found.M, found.N) if spec.causal else 0, get_num_threads(),
    )  # fmt: skip
    if out.data_ptr() != dx.data_ptr():
        dx.copy_(out.view(dx.shape))


def _softmax_lines(tensors: tuple[Tensor, ...], n: int, spec: SoftmaxSpec) -> tuple[Lines, bool, tuple[Tensor, ...]]:
    """Of n tensors and perhaps a mask: lines of contiguous elements; or, True, of neighbours side by side. Tensors that
    have neither are copied, the first of them, which is the result, too."""
    own = -2 if spec.causal else None
    found = lines_along(spec.dim, tensors, own)
    if found is not None:
        if found.N == 1 or (all(step == 1 for step in found.along[:n]) and all(s in (0, 1) for s in found.along[n:])):
            return found, False, tensors
        if not spec.causal and all(steps[2] == 1 for steps in found.steps[:n]):
            return found, True, tensors
    copies = [t.movedim(spec.dim, -1).contiguous() for t in tensors]
    found = lines_along(-1, copies, own)
    assert found is not None  # contiguous tensors have one dimension of rows, or two
    return found, False, (copies[0].movedim(-1, spec.dim), *copies[1:])


_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


def _pieces(
    tensors: tuple[Tensor | None, ...],
) -> tuple[tuple[int, int, int], int, list, tuple[Tensor | None, ...]]:
    """For an elementwise kernel: rows, their length, what it takes of each tensor, and the tensors, which are copied if
    there is no dimension along which all are contiguous."""
    first = next(t for t in tensors if t is not None)
    if all(t is None or t.is_contiguous() for t in tensors):
        return (1, 1, 1), first.numel(), [dense(t, 0) for t in tensors], tensors
    present = [t for t in tensors if t is not None]
    order = sorted(range(first.dim()), key=lambda d: first.stride(d), reverse=True)
    permuted = [t.permute(order) for t in present]
    folded = merge_dimensions(range(first.dim()), permuted[0].shape, [t.stride() for t in permuted])
    if 1 <= len(folded) <= 4 and all(step == 1 for step in folded[-1][1]):
        sizes, steps = zip(*padded(folded, 4, len(present)), strict=True)
        at = iter((t.data_ptr(), *(step[i] for step in steps[:3]), DTYPES[t.dtype]) for i, t in enumerate(present))
        return sizes[:3], sizes[3], [None if t is None else next(at) for t in tensors], tensors
    copies = tuple(t if t is None else t.contiguous() for t in tensors)
    return (1, 1, 1), first.numel(), [dense(t, 0) for t in copies], copies


def _put_back(tensors: Sequence[Tensor | None], used: Sequence[Tensor | None]) -> None:
    """Results that were computed in a copy."""
    for t, copy in zip(tensors, used, strict=False):
        if t is not None and copy is not None and copy is not t:
            t.copy_(copy)


def gated_forward(y: Tensor, gate: Tensor, up: Tensor, spec: GatedSpec) -> None:
    if y.numel() == 0:
        return
    sizes, N, at, used = _pieces((y, gate, up))
    load().gated_forward(sizes, N, *at, _ACTIVATIONS[spec.activation], get_num_threads())
    _put_back((y,), used)


def gated_backward(
    dgate: Tensor | None, dup: Tensor | None, dy: Tensor, gate: Tensor, up: Tensor, spec: GatedSpec
) -> None:
    if gate.numel() == 0:
        return
    sizes, N, at, used = _pieces((dgate, dup, dy, gate, up))
    load().gated_backward(sizes, N, *at, _ACTIVATIONS[spec.activation], get_num_threads())
    _put_back((dgate, dup), used)


def rotary_embedding(
    pairs: Sequence[tuple[Tensor, Tensor]],
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    spec: RotarySpec,
    inverse: bool = False,
) -> None:
    """For each pair (y, x), of which there are one or two: y is x rotated, or rotated back."""
    packed = pairs[0][0].dim() == 3
    heads: list[tuple[int, ...]] = []
    kept, results = [], []
    for y, x in pairs:
        out = y
        if y.stride(-1) != 1 and y.shape[-1] > 1:
            out = torch.empty_like(y, memory_format=torch.contiguous_format)
            results.append((y, out))
        if x is y:
            source = x if out is y else out.copy_(x)
        else:
            source = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
        kept += [out, source]
        if packed:
            (s1, h1, _), (s2, h2, _) = out.stride(), source.stride()
            heads.append((out.data_ptr(), source.data_ptr(), x.shape[1], 0, h1, s1, 0, h2, s2))
        else:
            heads.append((out.data_ptr(), source.data_ptr(), x.shape[1], *out.stride()[:3], *source.stride()[:3]))
    x = pairs[0][1]
    B, S = (1, x.shape[0]) if packed else (x.shape[0], x.shape[2])
    if B * S == 0:
        return
    if cos.dtype != torch.float32 or not cos.is_contiguous():
        cos = cos.float().contiguous()
    if sin.dtype != torch.float32 or not sin.is_contiguous():
        sin = sin.float().contiguous()
    rows, half = cos.shape[-2:]
    table = (cos.data_ptr(), sin.data_ptr(), rows, rows * half if cos.dim() == 3 and cos.shape[0] > 1 else 0)
    places = (0, 0, 0, 0)
    if position_ids is not None:
        position_ids = position_ids.long().expand(B, S).contiguous()
        places = (position_ids.data_ptr(), S, 0, 0)
    elif cu_seqlens is not None:
        cu_seqlens = cu_seqlens.int().contiguous()
        places = (0, 0, cu_seqlens.data_ptr(), cu_seqlens.shape[0] - 1)
    load().rotary(
        tuple(heads), DTYPES[x.dtype], (B, S, x.shape[-1], half), table, places, spec.interleaved, inverse,
        get_num_threads(),
    )  # fmt: skip
    for y, out in results:
        y.copy_(out)


def dropout_add_forward(y: Tensor, residual: Tensor, x: Tensor, seed: Tensor, spec: DropoutAddSpec) -> None:
    drop_and_add(y, residual, x, seed, spec.dropout_p)


def dropout_add_backward(dx: Tensor, dy: Tensor, seed: Tensor, spec: DropoutAddSpec) -> None:
    drop_and_add(dx, None, dy, seed, spec.dropout_p)


def drop_and_add(y: Tensor, residual: Tensor | None, x: Tensor, seed: Tensor, dropout_p: float) -> None:
    """y = residual + dropout(x), by rows of the last dimension; y may be residual."""
    if y.numel() == 0:
        return
    tensors = (y, x) if residual is None else (y, x, residual)
    if all(t.is_contiguous() for t in tensors):
        N = y.shape[-1] if y.dim() else 1
        load().dropout_add(
            (1, 1, y.numel() // N), N, dense(y, N), dense(residual, N), dense(x, N), seed.data_ptr(), dropout_p,
            get_num_threads(),
        )  # fmt: skip
        return
    found = lines_along(-1, tensors, in_order=True)
    if found is None or (found.N > 1 and any(step != 1 for step in found.along)):
        # y itself may be residual, whose memory is then kept.
        dense_y = torch.empty_like(y, memory_format=torch.contiguous_format)
        residual = None if residual is None else residual.contiguous()
        drop_and_add(dense_y, residual, x.contiguous(), seed, dropout_p)
        y.copy_(dense_y)
        return
    residual_at = None if residual is None else address(found, 2, residual)
    load().dropout_add(
        found.rows, found.N, address(found, 0, y), residual_at, address(found, 1, x), seed.data_ptr(), dropout_p,
        get_num_threads(),
    )  # fmt: skip
