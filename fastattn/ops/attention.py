"""fastattn::attention: (q, k, v, seed) -> (o, lse), differentiable in both outputs; seed keys the dropout, if any."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.backends import get
from fastattn.ops.define import Definition, Operator
from fastattn.spec import AttentionSpec


def output_like(q: Tensor, D_v: int) -> Tensor:
    """An o (B, H, S_q, D_v) in the layout of q: heads inside rows (a transposed (B, S, H, D)) stay inside rows."""
    B, H, S_q, _ = q.shape
    if q.stride(1) < q.stride(2):
        return q.new_empty(B, S_q, H, D_v).transpose(1, 2)
    return q.new_empty(B, H, S_q, D_v)


def _allocate(inputs, spec: AttentionSpec):
    q = inputs[0]
    return output_like(q, spec.D_v), q.new_empty(q.shape[:3], dtype=torch.float32)


def _launch(outputs, inputs, spec: AttentionSpec, backend: str):
    get(backend).attention_forward(*outputs, *inputs, spec)


def _allocate_grads(saved, wanted, spec: AttentionSpec):
    return *(
        output_like(saved[x], saved[x].shape[3]) if want else None for x, want in zip("qkv", wanted, strict=False)
    ), None


def _launch_backward(grad_inputs, grads, saved, spec: AttentionSpec, backend: str):
    get(backend).attention_backward(*grad_inputs[:3], *grads, **saved, spec=spec)


def _encode(spec: AttentionSpec) -> tuple:
    return spec.scale, spec.left, spec.right, spec.top_left, spec.dropout_p


def _decode(
    tensors, scale: float, left: int | None, right: int | None, top_left: bool, dropout_p: float
) -> AttentionSpec:
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    H, D, H_kv, D_v = q.shape[1], q.shape[3], k.shape[1], v.shape[3]
    return AttentionSpec(H, H_kv, D, D_v, q.dtype, scale, left, right, top_left, dropout_p=dropout_p)


attention = Operator(
    Definition(
        name="attention",
        function_name="AttentionFunction",
        inputs=("q", "k", "v", "seed?"),
        outputs=("o", "lse"),
        differentiable=("o", "lse"),
        saved=("q", "k", "v", "seed", "o", "lse"),
        scalars="float scale, int? left, int? right, bool top_left, float dropout_p",
        encode=_encode,
        decode=_decode,
        allocate=_allocate,
        launch=_launch,
        allocate_grads=_allocate_grads,
        launch_backward=_launch_backward,
        batching="fold",
    )
)
