"""fastattn::attention: q, k, v and what acts on their scores -> (o, lse, lse_low), differentiable in o and lse.

lse_low is what float32 rounds off lse: exp(s - lse) would lose log Σ where the scores are large, exp(s - lse - lse_low)
is the probability.

Packed sequences are (1, H, T, D) with cu_seqlens. bias and mask have four dimensions, of length 1 where they broadcast;
seed keys the dropout, if any; qk_scales (B, H) and v_scales (B, H_kv) belong to 8-bit q, k and v.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastattn.backends import get, serving
from fastattn.ops.allocate import contiguous_like, without_heads
from fastattn.ops.attention_jvp import fused_tangents
from fastattn.ops.define import Definition, Operator
from fastattn.spec import DIFFERENTIABLE_INPUTS, AttentionInputs, AttentionSpec
from fastattn.tracing import without_numbers

INPUTS = AttentionInputs._fields


def output_like(q: Tensor, D_v: int, dtype: torch.dtype | None = None) -> Tensor:
    """An o (B, H, S_q, D_v) in the layout of q: heads inside rows (a transposed (B, S, H, D)) stay inside rows."""
    B, H, S_q, _ = q.shape
    if q.stride(1) < q.stride(2):
        return q.new_empty(B, S_q, H, D_v, dtype=dtype).transpose(1, 2)
    return q.new_empty(B, H, S_q, D_v, dtype=dtype)


def _allocate(inputs, spec: AttentionSpec):
    q = inputs[0]
    B, H, S_q, _ = q.shape
    lse, lse_low = (q.new_empty(B, H, S_q, dtype=torch.float32) for _ in range(2))
    return output_like(q, spec.D_v, spec.out_dtype), lse, lse_low


def _launch(outputs, inputs, spec: AttentionSpec, backend: str):
    if not without_heads(inputs[0]):
        get(backend).attention_forward(*outputs, AttentionInputs(*inputs), spec)


def _allocate_grads(saved, wanted, spec: AttentionSpec):
    def grad_of(name: str) -> Tensor:
        t = saved[name]
        return output_like(t, t.shape[3]) if name in ("q", "k", "v") else contiguous_like(t)

    pairs = zip(INPUTS, wanted, strict=True)
    return tuple(grad_of(name) if want and name in DIFFERENTIABLE_INPUTS else None for name, want in pairs)


def _launch_backward(grad_inputs, grads, saved, spec: AttentionSpec, backend: str):
    inputs = AttentionInputs(*(saved[name] for name in INPUTS))
    if without_heads(inputs.q):
        for grad in grad_inputs:
            if grad is not None:
                grad.zero_()
        return
    run = serving("attention_backward", backend, spec, inputs.q.device)
    do, dlse, _ = grads
    outputs = saved["o"], saved["lse"], saved["lse_low"]
    run.attention_backward(AttentionInputs(*grad_inputs), do, dlse, inputs, *outputs, spec)


def _reference(inputs, spec: AttentionSpec):
    o, lse = get("reference").attention(AttentionInputs(*inputs), spec, return_lse=True)
    return o, lse, torch.zeros_like(lse)  # its derivatives read none of them


def _encode(spec: AttentionSpec) -> tuple:
    return spec.scale, spec.left, spec.right, spec.top_left, spec.softcap, spec.dropout_p


def _decode(tensors, scale, left, right, top_left, softcap, dropout_p) -> AttentionSpec:
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    return AttentionSpec(
        H=q.shape[1],
        H_kv=k.shape[1],
        D=q.shape[3],
        D_v=v.shape[3],
        dtype=q.dtype,
        scale=scale,
        left=left,
        right=right,
        top_left=top_left,
        softcap=softcap,
        dropout_p=dropout_p,
        bias=tensors["bias"] is not None,
        mask=tensors["mask"] is not None,
        alibi=tensors["alibi_slopes"] is not None,
        sinks=tensors["sinks"] is not None,
        varlen=tensors["cu_seqlens_q"] is not None,
    )


def _scores(x: dict[str, Tensor | None]) -> int:
    """Count the entries of q kᵀ, masked ones too; packed sequences whose lengths cannot be read count as equal ones."""
    q, k, cu_q, cu_k = (x[name] for name in ("q", "k", "cu_seqlens_q", "cu_seqlens_k"))
    assert q is not None
    assert k is not None
    B, H, S_q, _ = q.shape
    if cu_q is None or cu_k is None:
        return B * H * S_q * k.shape[2]
    if without_numbers(cu_q) or without_numbers(cu_k):
        return H * S_q * k.shape[2] // max(len(cu_q) - 1, 1)
    return H * int((cu_q.diff().long() * cu_k.diff()).sum())


def _flops(inputs, spec: AttentionSpec) -> int:
    return 2 * _scores(inputs) * (spec.D + spec.D_v)  # q kᵀ, p v


def _backward_flops(saved, wanted, spec: AttentionSpec) -> int:
    return 2 * _scores(saved) * (3 * spec.D + 2 * spec.D_v)  # q kᵀ, ds k, dsᵀ q; do vᵀ, pᵀ do


_attention = Definition(
    name="attention",
    function_name="AttentionFunction",
    inputs=(*INPUTS[:3], *(f"{name}?" for name in INPUTS[3:])),
    outputs=("o", "lse", "lse_low"),
    differentiable=("o", "lse"),
    saved=(*INPUTS, "o", "lse", "lse_low"),
    scalars="float scale, int? left, int? right, bool top_left, float? softcap, float dropout_p",
    encode=_encode,
    decode=_decode,
    allocate=_allocate,
    launch=_launch,
    allocate_grads=_allocate_grads,
    launch_backward=_launch_backward,
    reference=_reference,
    batching="fold",
    flops=_flops,
    backward_flops=_backward_flops,
)
attention = Operator(replace(_attention, tangents=fused_tangents(_attention)))
