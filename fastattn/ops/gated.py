"""fastattn::gated: (gate, up) -> y, swiglu or geglu; the backward computes the activation again."""

from __future__ import annotations

import torch

from fastattn.backends import get
from fastattn.ops.define import Definition, Operator
from fastattn.spec import GatedSpec


def _allocate(inputs, spec: GatedSpec):
    return (torch.empty_like(inputs[0]),)


def _launch(outputs, inputs, spec: GatedSpec, backend: str):
    get(backend).gated_forward(*outputs, *inputs, spec)


def _allocate_grads(saved, wanted, spec: GatedSpec):
    inputs = (saved["gate"], saved["up"])
    return tuple(torch.empty_like(t) if want else None for t, want in zip(inputs, wanted, strict=True))


def _launch_backward(grad_inputs, grads, saved, spec: GatedSpec, backend: str):
    get(backend).gated_backward(*grad_inputs, grads[0], saved["gate"], saved["up"], spec)


def _reference(inputs, spec: GatedSpec):
    return (get("reference").gated(*inputs, spec),)


gated = Operator(
    Definition(
        name="gated",
        function_name="GatedFunction",
        inputs=("gate", "up"),
        outputs=("y",),
        differentiable=("y",),
        saved=("gate", "up"),
        scalars="str activation",
        encode=lambda spec: (spec.activation,),
        decode=lambda tensors, activation: GatedSpec(tensors["gate"].dtype, activation),
        allocate=_allocate,
        launch=_launch,
        allocate_grads=_allocate_grads,
        launch_backward=_launch_backward,
        reference=_reference,
        batching="prepend",
    )
)
