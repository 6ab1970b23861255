"""fastattn::softmax: (x, mask) -> y, softmax or log_softmax over one dimension; the mask has x's rank."""

from __future__ import annotations

from fastattn.backends import get
from fastattn.ops.allocate import contiguous_like
from fastattn.ops.define import Definition, Operator
from fastattn.spec import SoftmaxSpec


def _allocate(inputs, spec: SoftmaxSpec):
    return (inputs[0] if spec.inplace else contiguous_like(inputs[0]),)


def _launch(outputs, inputs, spec: SoftmaxSpec, backend: str):
    get(backend).softmax_forward(*outputs, *inputs, spec)


def _allocate_grads(saved, wanted, spec: SoftmaxSpec):
    return (contiguous_like(saved["y"]) if wanted[0] else None, None)


def _launch_backward(grad_inputs, grads, saved, spec: SoftmaxSpec, backend: str):
    get(backend).softmax_backward(grad_inputs[0], grads[0], saved["y"], saved["mask"], spec)


def _reference(inputs, spec: SoftmaxSpec):
    return (get("reference").softmax(*inputs, spec),)


def _reference_backward(grads, saved, spec: SoftmaxSpec):
    return get("reference").softmax_gradient(*grads, saved["y"], saved["mask"], spec), None


def _tangents(inputs, outputs, tangents, spec: SoftmaxSpec, backend: str):
    return (get("reference").softmax_tangent(tangents[0], *outputs, inputs[1], spec),)


def _encode(spec: SoftmaxSpec) -> tuple:
    return spec.dim, spec.scale, spec.log, spec.causal, spec.top_left


def _decode(tensors, dim: int, scale: float, log: bool, causal: bool, top_left: bool) -> SoftmaxSpec:
    dtype = (tensors["x"] if "x" in tensors else tensors["y"]).dtype
    return SoftmaxSpec(dtype, dim, scale, log, tensors["mask"] is not None, causal, top_left)


softmax = Operator(
    Definition(
        name="softmax",
        function_name="SoftmaxFunction",
        inputs=("x", "mask?"),
        outputs=("y",),
        differentiable=("y",),
        saved=("y", "mask"),
        scalars="int dim, float scale, bool log, bool causal, bool top_left",
        encode=_encode,
        decode=_decode,
        allocate=_allocate,
        launch=_launch,
        allocate_grads=_allocate_grads,
        launch_backward=_launch_backward,
        reference=_reference,
        reference_backward=_reference_backward,
        tangents=_tangents,
        batching="prepend",
    )
)
