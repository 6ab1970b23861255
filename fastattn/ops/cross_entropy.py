"""Two operators of one loss: (logits, target, weight) -> loss, the target classes or probabilities.

`cross_entropy_with_gradient` computes the gradient of the logits in its forward, where the row is at hand, and saves
nothing else: -> (dlogits, loss). Its backward multiplies by what flows back, and is over at once for a factor of 1.

`cross_entropy` saves the logits and two numbers per row: -> (loss, row_max, log_sum, divisor). It serves calls without
a gradient, torch.func and forward mode, to any order, and float16, in which a gradient that has been divided by the
number of rows, and not yet been multiplied by what flows back, would be rounded to 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastattn.backends import get
from fastattn.errors import UnsupportedError
from fastattn.ops.define import Definition, Operator
from fastattn.spec import CrossEntropySpec


def _rows(logits: Tensor) -> tuple[int, ...]:
    """The shape of the logits without that of the classes."""
    return (*logits.shape[:1], *logits.shape[2:]) if logits.dim() > 1 else ()


def _loss(logits: Tensor, spec: CrossEntropySpec) -> Tensor:
    return logits.new_empty(_rows(logits) if spec.reduction == "none" else (), dtype=spec.loss_dtype)


def _encode(spec: CrossEntropySpec) -> tuple:
    return (
        spec.loss_dtype, spec.ignore_index, spec.reduction, spec.label_smoothing, spec.z_loss, spec.softcap,
        spec.gradient,
    )  # fmt: skip


def _decode(
    tensors, loss_dtype, ignore_index, reduction, label_smoothing, z_loss, softcap, gradient
) -> CrossEntropySpec:
    logits = tensors["logits"] if "logits" in tensors else tensors["dlogits"]
    target, weight = tensors.get("target"), tensors.get("weight")
    return CrossEntropySpec(
        dtype=logits.dtype, loss_dtype=loss_dtype, target_dtype=torch.int64 if target is None else target.dtype,
        weight_dtype=None if weight is None else weight.dtype, ignore_index=ignore_index, reduction=reduction,
        label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap, inner=logits.dim() > 2, gradient=gradient,
    )  # fmt: skip


_COMMON: dict[str, Any] = {
    "inputs": ("logits", "target", "weight?"),
    "differentiable": ("loss",),
    "scalars": "ScalarType loss_dtype, int ignore_index, str reduction, float label_smoothing, float z_loss, "
    "float? softcap, bool gradient",
    "encode": _encode,
    "decode": _decode,
    "batching": "loop",
}


def _only_logits(wanted) -> None:
    for name, want in zip(("target", "weight"), wanted[1:], strict=True):
        if want:
            raise UnsupportedError(f"cross_entropy: its kernels have no gradient of `{name}`; backend='eager' has.")


def _allocate(inputs, spec: CrossEntropySpec):
    logits = inputs[0]
    row_max, log_sum = (logits.new_empty(_rows(logits), dtype=torch.float32) for _ in range(2))
    return _loss(logits, spec), row_max, log_sum, logits.new_empty(1 if spec.divides else 0, dtype=torch.float32)


def _launch(outputs, inputs, spec: CrossEntropySpec, backend: str):
    loss, row_max, log_sum, divisor = outputs
    get(backend).cross_entropy_forward(loss, row_max, log_sum, divisor, None, *inputs, spec)


def _allocate_grads(saved, wanted, spec: CrossEntropySpec):
    _only_logits(wanted)
    return (torch.empty_like(saved["logits"]) if wanted[0] else None, None, None)


def _launch_backward(grad_inputs, grads, saved, spec: CrossEntropySpec, backend: str):
    if grad_inputs[0] is not None:
        get(backend).cross_entropy_backward(grad_inputs[0], grads[0], *saved.values(), spec)


def _reference(inputs, spec: CrossEntropySpec):
    logits = inputs[0]
    statistics = (logits.new_zeros(_rows(logits), dtype=torch.float32) for _ in range(2))
    divisor = logits.new_zeros(1 if spec.divides else 0, dtype=torch.float32)
    return get("reference").cross_entropy(*inputs, spec), *statistics, divisor


cross_entropy = Operator(
    Definition(
        name="cross_entropy",
        function_name="CrossEntropyFunction",
        outputs=("loss", "row_max", "log_sum", "divisor"),
        saved=("logits", "target", "weight", "row_max", "log_sum", "divisor"),
        allocate=_allocate,
        launch=_launch,
        allocate_grads=_allocate_grads,
        launch_backward=_launch_backward,
        reference=_reference,
        **_COMMON,
    )
)


def _allocate_with_gradient(inputs, spec: CrossEntropySpec):
    logits = inputs[0]
    # In place it is an alias of the logits: autograd takes no view that a Function with two outputs changes.
    return logits.detach() if spec.inplace else torch.empty_like(logits), _loss(logits, spec)


def _launch_with_gradient(outputs, inputs, spec: CrossEntropySpec, backend: str):
    dlogits, loss = outputs
    get(backend).cross_entropy_forward(loss, None, None, None, dlogits, *inputs, spec)
    if spec.inplace:
        increment_version(dlogits)  # which is that of the logits, and of every view


def _allocate_scaled(saved, wanted, spec: CrossEntropySpec):
    _only_logits(wanted)
    return (torch.empty_like(saved["dlogits"]) if wanted[0] else None, None, None)


def _launch_scaling(grad_inputs, grads, saved, spec: CrossEntropySpec, backend: str):
    if grad_inputs[0] is not None:
        get(backend).cross_entropy_scale(grad_inputs[0], grads[1], saved["dlogits"])


def _traced_scaling(grads, saved, wanted, spec: CrossEntropySpec):
    _only_logits(wanted)
    return (scaled(saved["dlogits"], grads[1]) if wanted[0] else None, None, None)


def scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    """factor · x, classes in dimension 1 of x, in torch operations; the factor has the shape of the rows or of none."""
    if factor is None:
        return torch.zeros_like(x)
    if factor.dim() > 0:
        factor = factor.unsqueeze(1)
    return (x.float() * factor.float()).to(x.dtype)


def _reference_with_gradient(inputs, spec: CrossEntropySpec):
    return torch.zeros_like(inputs[0]), get("reference").cross_entropy(*inputs, spec)


cross_entropy_with_gradient = Operator(
    Definition(
        name="cross_entropy_with_gradient",
        function_name="CrossEntropyWithGradientFunction",
        outputs=("dlogits", "loss"),
        saved=("dlogits",),
        allocate=_allocate_with_gradient,
        launch=_launch_with_gradient,
        allocate_grads=_allocate_scaled,
        launch_backward=_launch_scaling,
        traced_backward=_traced_scaling,
        reference=_reference_with_gradient,
        recycled=("logits", "dlogits"),
        **_COMMON,
    )
)
