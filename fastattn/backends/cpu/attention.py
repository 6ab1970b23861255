"""From the tensors and the spec of a call of attention to the kernels of csrc/cpu/attention_*.cpp."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from fastattn.backends.cpu import module
from fastattn.backends.cpu.module import DTYPES, entries, matrix
from fastattn.spec import AttentionInputs, AttentionSpec


def attention_forward(o: Tensor, lse: Tensor, x: AttentionInputs, spec: AttentionSpec) -> None:
    """Fill o and lse."""
    if x.cu_seqlens_q is not None:
        packed = int(x.cu_seqlens_q[-1])
        o[:, :, packed:].zero_()
        lse[:, :, packed:].fill_(-math.inf)
    if o.shape[2] == 0 or x.B == 0:
        return
    if o.shape[3] == 0:
        o = o.new_empty(*o.shape[:3], 1)
    call, _kept = _call(o, lse, x, spec)
    call.forward(module.threads())


def _call(o: Tensor, lse: Tensor, x: AttentionInputs, spec: AttentionSpec) -> tuple[Any, tuple[Tensor | None, ...]]:
    """The native description of a call, and the tensors that it needs to stay alive."""
    sizes = (x.B, spec.H, spec.H_kv, x.q.shape[2], x.k.shape[2], spec.D, spec.D_v)
    tensors = matrix(x.q), matrix(x.k), matrix(x.v), matrix(o)
    call = module.load().Attention(DTYPES[spec.dtype], sizes, *tensors, lse.data_ptr())
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
        call.packed(x.cu_seqlens_q.tolist(), x.cu_seqlens_k.tolist())
    return call, (bias,)
