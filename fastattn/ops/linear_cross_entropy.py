"""Two operators of one loss: (hidden, weight, target, bias, class_weight) -> loss, hidden (N, E) and weight (V, E).

`linear_cross_entropy_with_gradient` computes the gradients in its forward and saves only them; its backward multiplies.
`linear_cross_entropy` saves its inputs and computes the logits again in the backward: for reduction="none", whose rows
have a factor each, for torch.func and forward mode, and for float16 (see ops/cross_entropy.py).
"""

from __future__ import annotations

from typing import Any

import torch

from fastattn.backends import get
from fastattn.errors import UnsupportedError
from fastattn.ops.allocate import contiguous_like
from fastattn.ops.cross_entropy import scaled
from fastattn.ops.define import Definition, Operator
from fastattn.spec import CrossEntropySpec, LinearCrossEntropySpec

Spec = LinearCrossEntropySpec


def _loss(inputs, spec: Spec):
    hidden = inputs[0]
    return hidden.new_empty(hidden.shape[:1] if spec.loss.reduction == "none" else (), dtype=spec.loss.loss_dtype)


def _encode(spec: Spec) -> tuple:
    s = spec.loss
    return (
        s.loss_dtype, s.ignore_index, s.reduction, s.label_smoothing, s.z_loss, s.softcap, spec.chunk_size,
        list(spec.gradients),
    )  # fmt: skip


def _decode(tensors, loss_dtype, ignore_index, reduction, smoothing, z_loss, softcap, chunk_size, gradients) -> Spec:
    target, class_weight = tensors.get("target"), tensors.get("class_weight")
    loss = CrossEntropySpec(
        next(t.dtype for t in tensors.values() if t is not None), loss_dtype,
        torch.int64 if target is None else target.dtype, None if class_weight is None else class_weight.dtype,
        ignore_index, reduction, smoothing, z_loss, softcap,
    )  # fmt: skip
    return LinearCrossEntropySpec(loss, chunk_size, tuple(gradients))


def _only_linear(wanted) -> None:
    for name, want in (("target", wanted[2]), ("class_weight", wanted[4])):
        if want:
            raise UnsupportedError(
                f"linear_cross_entropy: its kernels have no gradient of `{name}`; backend='eager' has."
            )


_COMMON: dict[str, Any] = {
    "inputs": ("hidden", "weight", "target", "bias?", "class_weight?"),
    "differentiable": ("loss",),
    "scalars": "ScalarType loss_dtype, int ignore_index, str reduction, float label_smoothing, float z_loss, "
    "float? softcap, int? chunk_size, bool[] gradients",
    "encode": _encode,
    "decode": _decode,
    "batching": "loop",
}


def _like(tensors, wanted):
    return tuple(
        contiguous_like(t) if want and t is not None else None for t, want in zip(tensors, wanted, strict=True)
    )


def _allocate(inputs, spec: Spec):
    return _loss(inputs, spec), inputs[0].new_empty(1 if spec.loss.divides else 0, dtype=torch.float32)


def _launch(outputs, inputs, spec: Spec, backend: str):
    get(backend).linear_cross_entropy_forward(*outputs, (None, None, None), *inputs, spec)


def _allocate_grads(saved, wanted, spec: Spec):
    _only_linear(wanted)
    dhidden, dweight, dbias = _like(
        (saved["hidden"], saved["weight"], saved["bias"]), (wanted[0], wanted[1], wanted[3])
    )
    return dhidden, dweight, None, dbias, None


def _launch_backward(grad_inputs, grads, saved, spec: Spec, backend: str):
    dhidden, dweight, _, dbias, _ = grad_inputs
    get(backend).linear_cross_entropy_backward((dhidden, dweight, dbias), grads[0], *saved.values(), spec)


def _reference(inputs, spec: Spec):
    loss = get("reference").linear_cross_entropy(*inputs, spec)
    return loss, loss.new_zeros(1 if spec.loss.divides else 0, dtype=torch.float32)


def _flops(inputs, spec: Spec) -> int:
    """Count hidden weightᵀ, and as much for each gradient that the forward computes."""
    hidden, weight = inputs["hidden"], inputs["weight"]
    return 2 * hidden.numel() * weight.shape[0] * (1 + sum(spec.gradients[:2]))


def _backward_flops(saved, wanted, spec: Spec) -> int:
    """Count hidden weightᵀ again, and as much for each gradient."""
    return 2 * saved["hidden"].numel() * saved["weight"].shape[0] * (1 + sum(wanted[:2]))


linear_cross_entropy = Operator(
    Definition(
        name="linear_cross_entropy",
        function_name="LinearCrossEntropyFunction",
        outputs=("loss", "divisor"),
        saved=("hidden", "weight", "target", "bias", "class_weight", "divisor"),
        allocate=_allocate,
        launch=_launch,
        allocate_grads=_allocate_grads,
        launch_backward=_launch_backward,
        reference=_reference,
        flops=_flops,
        backward_flops=_backward_flops,
        **_COMMON,
    )
)


def _allocate_with_gradient(inputs, spec: Spec):
    hidden, weight, _, bias, _ = inputs
    gradients = _like((hidden, weight, bias), spec.gradients)
    return _loss(inputs, spec), *(hidden.new_empty(0) if g is None else g for g in gradients)


def _launch_with_gradient(outputs, inputs, spec: Spec, backend: str):
    loss, *gradients = outputs
    gradients = tuple(g if want else None for g, want in zip(gradients, spec.gradients, strict=True))
    get(backend).linear_cross_entropy_forward(loss, None, gradients, *inputs, spec)


def _allocate_scaled(saved, wanted, spec: Spec):
    _only_linear(wanted)
    dhidden, dweight, dbias = _like(saved.values(), (wanted[0], wanted[1], wanted[3]))
    return dhidden, dweight, None, dbias, None


def _launch_scaling(grad_inputs, grads, saved, spec: Spec, backend: str):
    dhidden, dweight, _, dbias, _ = grad_inputs
    get(backend).linear_cross_entropy_scale((dhidden, dweight, dbias), grads[0], tuple(saved.values()))


def _traced_scaling(grads, saved, wanted, spec: Spec):
    _only_linear(wanted)
    pairs = zip(saved.values(), (wanted[0], wanted[1], wanted[3]), strict=True)
    dhidden, dweight, dbias = (scaled(gradient, grads[0]) if want else None for gradient, want in pairs)
    return dhidden, dweight, None, dbias, None


def _reference_with_gradient(inputs, spec: Spec):
    empty = inputs[0].new_zeros(0)
    return get("reference").linear_cross_entropy(*inputs, spec), empty, empty, empty


linear_cross_entropy_with_gradient = Operator(
    Definition(
        name="linear_cross_entropy_with_gradient",
        function_name="LinearCrossEntropyWithGradientFunction",
        outputs=("loss", "dhidden", "dweight", "dbias"),
        saved=("dhidden", "dweight", "dbias"),
        allocate=_allocate_with_gradient,
        launch=_launch_with_gradient,
        allocate_grads=_allocate_scaled,
        launch_backward=_launch_scaling,
        traced_backward=_traced_scaling,
        reference=_reference_with_gradient,
        flops=_flops,
        recycled=("weight", "dweight"),
        **_COMMON,
    )
)
