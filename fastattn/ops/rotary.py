"""fastattn::rotary: (q, k, cos, sin, position_ids, cu_seqlens) -> (q and k rotated); linear in q and k."""

from __future__ import annotations

import torch

from fastattn.backends import get
from fastattn.ops.define import Definition, Operator
from fastattn.spec import RotarySpec

_TABLES = ("cos", "sin", "position_ids", "cu_seqlens")


def _allocate(inputs, spec: RotarySpec):
    q, k = inputs[:2]
    if spec.inplace:
        return q, q.new_empty(0) if k is None else k
    return torch.empty_like(q), q.new_empty(0) if k is None else torch.empty_like(k)


def _launch(outputs, inputs, spec: RotarySpec, backend: str):
    q, k, *tables = inputs
    pairs = [(outputs[0], q)] if k is None else list(zip(outputs, (q, k), strict=True))
    get(backend).rotary_embedding(pairs, *tables, spec)


def _allocate_grads(saved, wanted, spec: RotarySpec):
    """Of q's and k's sizes, and laid out as they were."""
    grads = []
    for want, sizes, tokens_first in zip(wanted, spec.sizes, spec.tokens_first, strict=False):
        order = list(range(len(sizes)))
        if tokens_first != (len(sizes) == 3):
            order[-3], order[-2] = order[-2], order[-3]
        grads.append(torch.empty_permuted(sizes, order, dtype=spec.dtype, device=saved["cos"].device) if want else None)
    return (*grads, *(None for _ in range(6 - len(grads))))


def _launch_backward(grad_inputs, grads, saved, spec: RotarySpec, backend: str):
    pairs = []
    for dx, dy in zip(grad_inputs[:2], grads, strict=True):
        if dx is not None and dy is None:
            dx.zero_()
        elif dx is not None:
            pairs.append((dx, dy))
    if pairs:
        get(backend).rotary_embedding(pairs, *(saved[name] for name in _TABLES), spec, inverse=True)


def _reference(inputs, spec: RotarySpec):
    q, k, *tables = inputs
    rotated = get("reference").rotary_embedding((q,) if k is None else (q, k), *tables, spec)
    return (*rotated, q.new_empty(0)) if k is None else rotated


def _reference_backward(grads, saved, spec: RotarySpec):
    cos = saved["cos"]
    given = tuple(
        cos.new_zeros(sizes, dtype=spec.dtype) if dy is None else dy
        for dy, sizes in zip(grads, spec.sizes, strict=False)
    )
    found = get("reference").rotary_embedding(given, *(saved[name] for name in _TABLES), spec, inverse=True)
    return (*found, *(None for _ in range(6 - len(found))))


def _encode(spec: RotarySpec) -> tuple:
    q_sizes, k_sizes = (*spec.sizes, ())[:2]
    return spec.dtype, list(q_sizes), list(k_sizes), list(spec.tokens_first), spec.interleaved


def _decode(tensors, dtype, q_sizes, k_sizes, tokens_first, interleaved: bool) -> RotarySpec:
    sizes = (tuple(q_sizes), tuple(k_sizes)) if k_sizes else (tuple(q_sizes),)
    return RotarySpec(dtype, sizes, tuple(tokens_first), interleaved)


rotary = Operator(
    Definition(
        name="rotary",
        function_name="RotaryFunction",
        inputs=("q", "k?", "cos", "sin", "position_ids?", "cu_seqlens?"),
        outputs=("rotated_q", "rotated_k"),
        differentiable=("rotated_q", "rotated_k"),
        saved=_TABLES,
        scalars="ScalarType dtype, SymInt[] q_sizes, SymInt[] k_sizes, bool[] tokens_first, bool interleaved",
        encode=_encode,
        decode=_decode,
        allocate=_allocate,
        launch=_launch,
        allocate_grads=_allocate_grads,
        launch_backward=_launch_backward,
        reference=_reference,
        reference_backward=_reference_backward,
        batching="loop",
    )
)
