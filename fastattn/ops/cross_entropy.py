"""Two operators of one loss: (logits, target, weight) -> loss, the target classes or probabilities.

`cross_entropy_with_gradient` computes the gradient of the logits in its forward, where the row is at hand, and saves
no logits: -> (dlogits, loss). Its backward multiplies by what flows back, and is over at once for a factor of 1.
dlogits is an output with a derivative of its own, the second one of the loss: see `_times_second_derivative`.

`cross_entropy` saves the logits and two numbers per row: -> (loss, row_max, row_sum, divisor). It serves calls without
a gradient, rows that are not reduced, each with a factor of its own, torch.func and forward mode, to any order, and
float16, in which a gradient that has been divided by the number of rows, and not yet been multiplied by what flows
back, would be rounded to 0.
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
    row_max, row_sum = (logits.new_empty(_rows(logits), dtype=torch.float32) for _ in range(2))
    return _loss(logits, spec), row_max, row_sum, logits.new_empty(1 if spec.divides else 0, dtype=torch.float32)


def _launch(outputs, inputs, spec: CrossEntropySpec, backend: str):
    loss, row_max, row_sum, divisor = outputs
    get(backend).cross_entropy_forward(loss, row_max, row_sum, divisor, None, *inputs, spec)


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
        outputs=("loss", "row_max", "row_sum", "divisor"),
        differentiable=("loss",),
        saved=("logits", "target", "weight", "row_max", "row_sum", "divisor"),
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
    if grad_inputs[0] is None:
        return
    second = None if grads[0] is None else _times_second_derivative(grads[0], saved, spec)
    get(backend).cross_entropy_scale(grad_inputs[0], grads[1], saved["dlogits"])
    if second is not None:
        grad_inputs[0].add_(second)


def _traced_scaling(grads, saved, wanted, spec: CrossEntropySpec):
    _only_logits(wanted)
    return (_scaling_in_torch(grads, saved, spec)[0] if wanted[0] else None, None, None)


def _scaling_in_torch(grads, saved, spec: CrossEntropySpec):
    dlogits = scaled(saved["dlogits"], grads[1])
    if grads[0] is not None:
        dlogits = dlogits + _times_second_derivative(grads[0], saved, spec)
    return dlogits, None, None


def _keeps_too_little(spec: CrossEntropySpec) -> bool:
    """True if the probabilities of a row cannot be had from its gradient, a class and class weights."""
    return spec.probabilities or bool(spec.z_loss) or spec.softcap is not None or spec.inplace


def _times_second_derivative(u: Tensor, saved: dict[str, Tensor | None], spec: CrossEntropySpec) -> Tensor:
    """Return the second derivative of the loss times u, in torch operations, from what is saved.

        dlogits = c (Q p - q),   Q = Σ q_j,   c = 1 / divisor of a row that counts, else 0
        ∂dlogits · u = c Q (p ∘ u - p (p · u))

    with q as in reference/cross_entropy.py, so that Q p = dlogits / c + q needs no logits. For the class of the row,
    where that cancels, Q p is what the others leave of Q. Its error is that of dlogits: a rounding of c.
    """
    d, target, weight = saved["dlogits"], saved["target"], saved["weight"]
    assert d is not None
    assert target is not None
    dim = min(1, d.dim() - 1)
    D, u = d.movedim(dim, -1).float(), u.movedim(dim, -1).float()  # (…, V)
    V = D.shape[-1]
    target = target.long()
    counted = target != spec.ignore_index  # (…)
    t = torch.where(counted & (target >= 0) & (target < V), target, 0)[..., None]
    w = D.new_ones(V) if weight is None else weight.float()
    w_t = torch.where(counted, w[t.squeeze(-1)], 0.0)
    q = (
        (w * (spec.label_smoothing / max(V, 1)))
        .expand_as(D)
        .scatter_add(-1, t, (1.0 - spec.label_smoothing) * w_t[..., None])
    )
    c = torch.where(counted, 1.0 / w_t.sum() if spec.divides else 1.0, 0.0)[..., None]
    others = torch.where(c == 0.0, 0.0, D / torch.where(c == 0.0, 1.0, c) + q).scatter(-1, t, 0.0)
    Q = q.sum(-1, keepdim=True)
    Qp = others.scatter(-1, t, torch.where(c == 0.0, 0.0, Q - others.sum(-1, keepdim=True)))
    p_u = (Qp * u).sum(-1, keepdim=True) / torch.where(Q == 0.0, 1.0, Q)
    return (c * Qp * (u - p_u)).movedim(-1, dim).to(d.dtype)


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
        differentiable=("dlogits", "loss"),
        saved=("dlogits", "target", "weight"),
        unsaved=lambda spec: ("target", "weight") if _keeps_too_little(spec) else (),
        reference_backward=_scaling_in_torch,
        only_once=_keeps_too_little,
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
