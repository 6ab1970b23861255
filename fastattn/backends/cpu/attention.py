"""From the tensors and the spec of a call of attention to the kernels of csrc/cpu/attention_*.cpp."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from fastattn.backends.cpu import module
from fastattn.backends.cpu.module import DTYPES, entries, matrix
from fastattn.errors import UnsupportedError
from fastattn.spec import AttentionInputs, AttentionSpec

LONGEST = 2**28  # of rows; the kernels add a few such numbers up in 32 bits


def attention_forward(o: Tensor, lse: Tensor, lse_low: Tensor, x: AttentionInputs, spec: AttentionSpec) -> None:
    """Fill o, lse and lse_low."""
    if x.cu_seqlens_q is not None:
        packed = int(x.cu_seqlens_q[-1])
        o[:, :, packed:].zero_()
        lse[:, :, packed:].fill_(-math.inf)
        lse_low[:, :, packed:].zero_()
    if o.shape[2] == 0 or x.B == 0:
        return
    if o.shape[3] == 0:
        o = o.new_empty(*o.shape[:3], 1)
    call, _kept = _call(o, lse, lse_low, x, spec)
    call.forward(module.threads())


def _call(
    o: Tensor, lse: Tensor, lse_low: Tensor, x: AttentionInputs, spec: AttentionSpec
) -> tuple[Any, tuple[Tensor | None, ...]]:
    """The native description of a call, and the tensors that it needs to stay alive."""
    if x.cu_seqlens_q is None:
        _check_lengths(x, spec)
    sizes = (x.B, spec.H, spec.H_kv, x.q.shape[2], x.k.shape[2], spec.D, spec.D_v)
    tensors = matrix(x.q), matrix(x.k), matrix(x.v), matrix(o)
    call = module.load().Attention(DTYPES[spec.dtype], sizes, *tensors, lse.data_ptr(), lse_low.data_ptr())
    if spec.windowed:
        call.window(*(-1 if side is None else min(side, 2**31) for side in (spec.left, spec.right)), spec.top_left)
    bias = x.bias if x.bias is None or x.bias.dtype in DTYPES else x.bias.float()
    slopes: list[float] = []
    if x.alibi_slopes is not None:
        slopes = x.alibi_slopes.float().expand(x.B, spec.H).flatten().tolist()
    sinks = [] if x.sinks is None else x.sinks.tolist()
    call.score(spec.scale, spec.softcap or 0.0, entries(bias), entries(x.mask), slopes, sinks)
    if spec.dropout_p > 0.0:
        assert x.seed is not None
        scale = 0.0 if spec.dropout_p == 1.0 else 1.0 / (1.0 - spec.dropout_p)
        call.dropout(x.seed.item(), int(spec.dropout_p * 2**32), scale)
    if x.cu_seqlens_q is not None and x.cu_seqlens_k is not None:
        call.packed(x.cu_seqlens_q.tolist(), x.cu_seqlens_k.tolist(), *_longest(x, spec))
    return call, (bias,)


def _longest(x: AttentionInputs, spec: AttentionSpec) -> tuple[int, int]:
    """Queries and keys of one sequence that the kernels count, and that bias and mask have entries for."""
    limits = [LONGEST // spec.G, LONGEST]
    for t in (x.bias, x.mask):
        if t is not None:
            limits = [min(limit, n) if n > 1 else limit for limit, n in zip(limits, t.shape[2:], strict=True)]
    return limits[0], limits[1]


def _check_lengths(x: AttentionInputs, spec: AttentionSpec) -> None:
    for name, length, longest in (("q", x.q.shape[2], LONGEST // spec.G), ("k", x.k.shape[2], LONGEST)):
        if length > longest:
            raise UnsupportedError(
                f"{spec.op}: `{name}` has {length} rows; the kernels for CPU tensors count {longest}, "
                "backend='eager' has no such limit."
            )


def attention_backward(
    grads: AttentionInputs,
    do: Tensor | None,
    dlse: Tensor | None,
    x: AttentionInputs,
    o: Tensor,
    lse: Tensor,
    lse_low: Tensor,
    spec: AttentionSpec,
) -> None:
    """Fill the gradients that are not None, from the gradients of o and lse that are not None."""
    if x.B == 0 or x.q.shape[2] == 0:
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return
    if x.cu_seqlens_q is not None and x.cu_seqlens_k is not None:
        for grad, cu_seqlens in ((grads.q, x.cu_seqlens_q), (grads.k, x.cu_seqlens_k), (grads.v, x.cu_seqlens_k)):
            if grad is not None:
                grad[:, :, int(cu_seqlens[-1]) :].zero_()
    if do is None:
        do = o.new_zeros(()).expand(o.shape)
    lse, lse_low = lse.contiguous(), lse_low.contiguous()  # vmap hands out expanded ones
    call, kept = _call(o, lse, lse_low, x, spec)
    dslopes, dsinks, dbias = (
        None if grad is None else lse.new_empty(shape)
        for grad, shape in (
            (grads.alibi_slopes, (x.B, spec.H)),
            (grads.sinks, (spec.H,)),
            (grads.bias, () if grads.bias is None else grads.bias.shape),
        )
    )
    call.backward(
        matrix(do), matrix(dlse), matrix(grads.q), matrix(grads.k), matrix(grads.v),
        _address(dbias), [] if dbias is None else dbias.shape, _address(dslopes), _address(dsinks), module.threads(),
    )  # fmt: skip
    del kept
    if grads.alibi_slopes is not None and dslopes is not None:
        grads.alibi_slopes.copy_(dslopes if grads.alibi_slopes.dim() == 2 else dslopes.sum(0))
    for grad, value in ((grads.sinks, dsinks), (grads.bias, dbias)):
        if grad is not None and value is not None:
            grad.copy_(value)


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
