"""fastattn::dropout_add: (residual, x, seed) -> y; linear in residual and x, the backward drops by the seed again."""

from __future__ import annotations

import torch

from fastattn.backends import get
from fastattn.ops.allocate import contiguous_like
from fastattn.ops.define import Definition, Operator
from fastattn.spec import DropoutAddSpec


def _allocate(inputs, spec: DropoutAddSpec):
    residual = inputs[0]
    return (residual if spec.inplace else contiguous_like(residual),)


def _launch(outputs, inputs, spec: DropoutAddSpec, backend: str):
    get(backend).dropout_add_forward(*outputs, *inputs, spec)


def _allocate_grads(saved, wanted, spec: DropoutAddSpec):
    seed = saved["seed"]
    residual, x, _ = wanted
    dresidual = torch.empty(spec.sizes, dtype=spec.dtype, device=seed.device) if residual else None
    return dresidual, torch.empty(spec.sizes, dtype=spec.x_dtype, device=seed.device) if x else None, None


def _launch_backward(grad_inputs, grads, saved, spec: DropoutAddSpec, backend: str):
    dresidual, dx, _ = grad_inputs
    if dresidual is not None:
        dresidual.copy_(grads[0])
    if dx is not None:
        get(backend).dropout_add_backward(dx, grads[0], saved["seed"], spec)


def _reference(inputs, spec: DropoutAddSpec):
    return (get("reference").dropout_add(*inputs, spec),)


def _reference_backward(grads, saved, spec: DropoutAddSpec):
    (dy,) = grads
    return dy, get("reference").dropout_add_gradient(dy, saved["seed"], spec), None


dropout_add = Operator(
    Definition(
        name="dropout_add",
        function_name="DropoutAddFunction",
        inputs=("residual", "x", "seed"),
        outputs=("y",),
        differentiable=("y",),
        saved=("seed",),
        passed=("residual", "y"),
        scalars="ScalarType dtype, ScalarType x_dtype, SymInt[] sizes, float dropout_p",
        encode=lambda spec: (spec.dtype, spec.x_dtype, list(spec.sizes), spec.dropout_p),
        decode=lambda tensors, dtype, x_dtype, sizes, dropout_p: DropoutAddSpec(
            dtype, x_dtype, tuple(sizes), dropout_p
        ),
        allocate=_allocate,
        launch=_launch,
        allocate_grads=_allocate_grads,
        launch_backward=_launch_backward,
        reference=_reference,
        reference_backward=_reference_backward,
        batching="loop",
    )
)
