"""From the tensors and specs of the losses to the kernels of csrc/cpu/cross_entropy.cpp."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, get_num_threads

from fastattn.backends.cpu.layout import Address, address, dense, ready, vector
from fastattn.backends.cpu.module import load
from fastattn.spec import CrossEntropySpec, LinearCrossEntropySpec

REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}
CHUNK_BYTES = 64 << 20  # of logits that linear_cross_entropy holds at once, or half of weight's if that is more


def _options(spec: CrossEntropySpec) -> tuple[int, float, float, float]:
    return spec.ignore_index, spec.label_smoothing, spec.z_loss, spec.softcap or 0.0


class _Facts:
    """Target and class weights as the kernels take them: int64 classes, fp32 weights, both contiguous."""

    __slots__ = ("target", "weight")

    def __init__(self, target: Tensor, weight: Tensor | None, spec: CrossEntropySpec):
        self.target = None if spec.probabilities else _as(torch.int64, target)
        self.weight = None if weight is None else _as(torch.float32, weight)

    @property
    def addresses(self) -> tuple[int, int]:
        return _address(self.target), _address(self.weight)


def _as(dtype: torch.dtype, t: Tensor) -> Tensor:
    return t if t.dtype == dtype and t.is_contiguous() else t.to(dtype).contiguous()


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _classes_last(t: Tensor) -> Tensor:
    """(N, V, d1, …) as (N, d1, …, V)."""
    return t.movedim(1, -1) if t.dim() > 2 else t


def _rows(tensors: Sequence[Tensor], V: int) -> tuple[Sequence[Tensor], tuple[int, int, int], list[Address]]:
    """Tensors of the logits' shape, classes last, copied where these are not contiguous; rows; where each lies."""
    if all(t.is_contiguous() for t in tensors):
        at = [dense(t, V) for t in tensors]
        return tensors, (1, 1, tensors[0].numel() // V), at  # type: ignore[return-value]
    tensors, found = ready(tensors)
    return tensors, found.rows, [address(found, i, t) for i, t in enumerate(tensors)]


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
    """Fills loss and what there is of the others from logits, classes in dimension 1 of several or the only one."""
    V = logits.shape[min(1, logits.dim() - 1)]
    if logits.numel() == 0:
        for t in (loss, row_max, row_sum):
            if t is not None:
                t.zero_()
        if spec.divides:
            loss.fill_(math.nan)
            if divisor is not None:
                divisor.zero_()
        return
    facts = _Facts(target, weight, spec)
    statistics = (_address(row_max), _address(row_sum))
    divisor_at = _address(divisor) if spec.divides else 0
    _run_forward(loss, statistics, divisor_at, dlogits, logits, target, facts, 0, None, V, spec, spec.reduction)


def _run_forward(
    loss: Tensor,
    statistics: tuple[int, int],
    divisor_out: int,
    dlogits: Tensor | None,
    logits: Tensor,
    target: Tensor,
    facts: _Facts,
    divisor: int,
    factor: Tensor | None,
    V: int,
    spec: CrossEntropySpec,
    reduction: str,
) -> None:
    x = _classes_last(logits)
    into = None if dlogits is None else x if dlogits is logits else _classes_last(dlogits)
    shaped = [x] if into is None else [x, into]
    if spec.probabilities:
        shaped.append(_classes_last(target))
    used, sizes, at = _rows(shaped, V)
    load().cross_entropy_forward(
        sizes, V, vector(loss), REDUCTIONS[reduction], statistics, divisor_out, None if into is None else at[1], at[0],
        facts.addresses[0], at[-1] if spec.probabilities else None, facts.addresses[1], divisor, vector(factor),
        _options(spec), get_num_threads(),
    )  # fmt: skip
    if into is not None and used[1].data_ptr() != into.data_ptr():
        into.copy_(used[1].view(into.shape))


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
    """Fills dlogits from what `cross_entropy_forward` filled; dloss has the shape of the rows, or none."""
    if dloss is None or logits.numel() == 0:
        dlogits.zero_()
        return
    V = logits.shape[min(1, logits.dim() - 1)]
    facts = _Facts(target, weight, spec)
    x, into = _classes_last(logits), _classes_last(dlogits)
    used, sizes, at = _rows([x, into, _classes_last(target)] if spec.probabilities else [x, into], V)
    dloss = dloss.contiguous()
    load().cross_entropy_backward(
        sizes, V, at[1], at[0], facts.addresses[0], at[2] if spec.probabilities else None, facts.addresses[1],
        divisor.data_ptr() if spec.divides and divisor is not None else 0, vector(dloss), int(dloss.dim() > 0),
        (row_max.data_ptr(), row_sum.data_ptr()), _options(spec), get_num_threads(),
    )  # fmt: skip
    if used[1].data_ptr() != into.data_ptr():
        into.copy_(used[1].view(into.shape))


def cross_entropy_scale(out: Tensor, factor: Tensor | None, dlogits: Tensor) -> None:
    """out = factor · dlogits, factor of the shape of the rows or of none; out may be dlogits."""
    if factor is None:
        out.zero_()
        return
    scale(_classes_last(out), factor, _classes_last(dlogits))


def scale(out: Tensor, factor: Tensor, x: Tensor) -> None:
    """out = factor · x, factor of the shape of the rows of x or of none; out may be x."""
    if x.numel() == 0:
        return
    single = factor.dim() == 0
    factor = factor.contiguous()
    if out.is_contiguous() and x.is_contiguous():
        N = x.numel() if single else x.shape[-1]
        sizes, at, to, used = (1, 1, x.numel() // N), dense(x, N), dense(out, N), out
    else:
        (x, used), found = ready((x, out))
        sizes, N, at, to = found.rows, found.N, address(found, 0, x), address(found, 1, used)
    load().scale_rows(sizes, N, to, at, vector(factor), int(not single), get_num_threads())
    if used.data_ptr() != out.data_ptr():
        out.copy_(used.view(out.shape))


def chunk_of(N: int, V: int, E: int, element_size: int, chunk_size: int | None) -> int:
    """How many of N rows of logits are held at once: as many as have room, whatever chunk_size says, and at least one.

    A sum over many chunks reads and writes all of dweight for each, so that chunks grow with weight: in half of its
    bytes there is room for E / 2 rows.
    """
    room = max(CHUNK_BYTES, V * E * element_size // 2) // element_size // max(V, 1)
    return max(min(chunk_size or room, room, N), 1)


def linear_cross_entropy_forward(
    loss: Tensor, divisor: Tensor | None, gradients, hidden, weight, target, bias, class_weight, spec
) -> None:
    """Fills loss, divisor (1,), and gradients unless they are None."""
    s: CrossEntropySpec = spec.loss
    facts = _Facts(target, class_weight, s)
    losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    by = None
    if s.divides:
        by = hidden.new_empty(1, dtype=torch.float32) if divisor is None else divisor
        by.fill_(_weight_of_rows(target, facts, weight.shape[0], s))
    _by_chunks(losses, gradients, hidden, weight, target, bias, facts, by, None, spec)
    if s.reduction == "none":
        loss.copy_(losses)
        return
    total = losses.sum(dtype=torch.float64)
    loss.copy_(total if by is None else total / by[0])


def _weight_of_rows(target: Tensor, facts: _Facts, V: int, spec: CrossEntropySpec) -> float | Tensor:
    """Σ w_t over the rows that count; the number of rows if targets are probabilities."""
    if facts.target is None:
        return target.shape[0] if V else 0.0
    t = facts.target
    counts = (t != spec.ignore_index) & (t >= 0) & (t < V)
    if facts.weight is None:
        return counts.sum()
    return torch.where(counts, facts.weight[torch.where(counts, t, 0)], 0.0).sum(dtype=torch.float64)


def linear_cross_entropy_backward(
    gradients, dloss: Tensor, hidden, weight, target, bias, class_weight, divisor, spec
) -> None:
    """The gradients from the inputs: logits and losses are computed again."""
    losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    dloss = dloss.float().expand(losses.shape).contiguous()
    divisor = divisor if spec.loss.divides else None
    facts = _Facts(target, class_weight, spec.loss)
    _by_chunks(losses, gradients, hidden, weight, target, bias, facts, divisor, dloss, spec)


def linear_cross_entropy_scale(outs, factor: Tensor, gradients: Sequence[Tensor]) -> None:
    """outs = factor · gradients, those that there are."""
    for out, gradient in zip(outs, gradients, strict=True):
        if out is not None:
            scale(out, factor, gradient)


def _by_chunks(
    losses: Tensor,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    facts: _Facts,
    divisor: Tensor | None,
    dloss: Tensor | None,
    spec: LinearCrossEntropySpec,
) -> None:
    """Row losses (N,) fp32, and the gradients of hidden, weight and bias, those that there are.

    hidden (N, E), weight (V, E); target (N,) or (N, V); dloss (N,) fp32 is a factor on what comes of each row.

        x = hidden · weightᵀ + bias          (rows, V), into a buffer that every chunk uses again
        losses, x ← loss and dx of x         by the kernel, in place
        dhidden = dx · weight,   dweight += dxᵀ · hidden,   dbias += Σ dx

    The products are torch's. Where dweight and dbias are sums over several chunks they are accumulated in fp32.
    """
    N, (V, E) = hidden.shape[0], weight.shape
    dhidden, dweight, dbias = gradients
    rows = chunk_of(N, V, E, hidden.element_size(), spec.chunk_size)
    several = rows < N and hidden.element_size() < 4
    wide = [None if g is None else torch.zeros_like(g, dtype=torch.float32) if several else g for g in (dweight, dbias)]
    buffer = hidden.new_empty(min(rows, N), V)
    wanted = any(g is not None for g in gradients)
    for start in range(0, N, rows):
        chunk = slice(start, min(start + rows, N))
        h, x, t = hidden[chunk], buffer[: min(rows, N - start)], target[chunk]
        torch.mm(h, weight.t(), out=x) if bias is None else torch.addmm(bias, h, weight.t(), out=x)
        of_chunk = _chunk_of_facts(facts, chunk)
        factor = None if dloss is None else dloss[chunk]
        _run_forward(
            losses[chunk], (0, 0), 0, x if wanted else None, x, t, of_chunk, _address(divisor), factor, V, spec.loss,
            "none",
        )  # fmt: skip
        if dhidden is not None:
            torch.mm(x, weight, out=dhidden[chunk])
        if wide[0] is not None:
            if of_chunk.target is not None:
                # The dx of an ignored row is 0, and so should be its share of dweight, whatever hidden holds there.
                ignored = of_chunk.target == spec.loss.ignore_index
                h = h.masked_fill(ignored[:, None], 0.0) if ignored.any() else h
            _add_product(wide[0], x.t(), h, start == 0 and not several)
        if wide[1] is not None:
            sums = x.sum(0, dtype=torch.float32)
            wide[1].copy_(sums) if start == 0 else wide[1].add_(sums)
    for gradient, total in zip((dweight, dbias), wide, strict=True):
        if gradient is None or total is None:
            continue
        if N == 0:
            gradient.zero_()
        elif total is not gradient:
            gradient.copy_(total)


def _chunk_of_facts(facts: _Facts, chunk: slice) -> _Facts:
    part = object.__new__(_Facts)
    part.target, part.weight = None if facts.target is None else facts.target[chunk], facts.weight
    return part


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a · b, in the precision of total; or the product alone, if it is the first."""
    if first:
        torch.mm(a, b, out=total)
    elif total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
