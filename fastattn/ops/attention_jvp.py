"""fastattn::attention_jvp: the tangents of attention's o and lse from those of its inputs, without an S_q × S_k matrix.

An operator of its own, so that it works under every transform. It is differentiated through the reference, which does
hold S_q × S_k matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.backends import serving
from fastattn.ops.allocate import without_heads
from fastattn.ops.define import Definition, Operator
from fastattn.ops.differentiate import Tensors, vjp
from fastattn.spec import DIFFERENTIABLE_INPUTS, AttentionInputs, AttentionSpec


def fused_tangents(attention: Definition) -> Callable[[Tensors, Tensors, Tensors, AttentionSpec, str], Tensors]:
    """`Definition.tangents` of attention."""
    operator = Operator(_definition(attention))
    index = [operator.input_names.index(name) for name in DIFFERENTIABLE_INPUTS]

    def tangents(inputs: Tensors, outputs: Tensors, tangents: Tensors, spec: AttentionSpec, backend: str) -> Tensors:
        # Outputs are only there to be read: the operator's derivative is that of a function of the inputs.
        outputs = tuple(None if t is None else t.detach() for t in outputs)
        return operator((*inputs, *outputs, *(_stored(tangents[i]) for i in index)), spec, backend)

    return tangents


def _stored(tangent: Tensor | None) -> Tensor | None:
    """A tangent that a kernel can read: PyTorch has tensors of zeros without memory."""
    return None if tangent is None or tangent._is_zerotensor() else tangent


def _definition(attention: Definition) -> Definition:
    """(inputs, outputs, tangents of inputs) -> (to, tlse), a function of the inputs and their tangents."""
    n, n_outputs, n_results = len(attention.inputs), len(attention.outputs), len(attention.differentiable)
    index = [[name.rstrip("?") for name in attention.inputs].index(name) for name in DIFFERENTIABLE_INPUTS]

    def split(tensors: Tensors) -> tuple[Tensors, Tensors, Tensors]:
        return tensors[:n], tensors[n : n + n_outputs], tensors[n + n_outputs :]

    def allocate(tensors: Tensors, spec: AttentionSpec) -> Tensors:
        return attention.allocate(tensors[:n], spec)[:n_results]

    def launch(results: Tensors, tensors: Tensors, spec: AttentionSpec, backend: str) -> None:
        inputs, outputs, tangents = split(tensors)
        named: dict[str, Any] = dict(zip(DIFFERENTIABLE_INPUTS, tangents, strict=True))
        x = AttentionInputs._make(inputs)
        if without_heads(x.q):
            return
        run = serving("attention_tangents", backend, spec, x.q.device)
        run.attention_tangents(*results, AttentionInputs(**named), x, *outputs, spec)

    def reference(tensors: Tensors, spec: AttentionSpec) -> Tensors:
        """J t as the gradient by u of <Jᵀ u, t>, which is reverse mode alone and so nests in every transform."""
        inputs, outputs, tangents = split(tensors)
        wanted = [False] * n
        directions: list[Tensor | None] = [None] * n
        for i, tangent in zip(index, tangents, strict=True):
            wanted[i], directions[i] = tangent is not None, tangent
        zeros = tuple(None if t is None else torch.zeros_like(t) for t in outputs[:n_results])

        def pulled_back(u: Tensors) -> Tensors:
            return vjp(lambda inputs: attention.reference(inputs, spec)[:n_results], inputs, wanted, u)

        return vjp(pulled_back, zeros, (True, True), tuple(directions))

    def allocate_grads(saved: dict[str, Tensor | None], wanted, spec: AttentionSpec) -> Tensors:
        pairs = zip(saved.values(), wanted, strict=True)
        return tuple(torch.empty_like(t) if t is not None and want else None for t, want in pairs)

    def launch_backward(grad_tensors: Tensors, grads: Tensors, saved, spec: AttentionSpec, backend: str) -> None:
        wanted = [grad is not None for grad in grad_tensors]
        found = vjp(lambda tensors: reference(tensors, spec), tuple(saved.values()), wanted, grads)
        for grad, value in zip(grad_tensors, found, strict=True):
            if grad is not None and value is not None:
                grad.copy_(value)

    def flops(inputs: dict[str, Tensor | None], spec: AttentionSpec) -> int:
        """Count q kᵀ, tq kᵀ, q tkᵀ, tp v and p tv: as deep and as many as the products of the backward."""
        assert attention.backward_flops is not None
        return attention.backward_flops(inputs, (), spec)

    inputs = (*attention.inputs, *attention.outputs, *(f"t{name}?" for name in DIFFERENTIABLE_INPUTS))
    return Definition(
        name="attention_jvp",
        function_name="AttentionJVPFunction",
        inputs=inputs,
        outputs=tuple(f"t{name}" for name in attention.differentiable),
        differentiable=tuple(f"t{name}" for name in attention.outputs),
        saved=tuple(name.rstrip("?") for name in inputs),
        scalars=attention.scalars,
        encode=attention.encode,
        decode=attention.decode,
        allocate=allocate,
        launch=launch,
        allocate_grads=allocate_grads,
        launch_backward=launch_backward,
        reference=reference,
        batching=attention.batching,
        flops=flops,
    )
