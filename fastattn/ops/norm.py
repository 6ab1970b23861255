"""fastattn::layer_norm, fastattn::rms_norm: (x, weight, bias, residual, seed) -> (y, h, stats), differentiable in y, h.

h = residual + dropout(x), an empty tensor where there is no residual; stats (2, M) fp32 are mean and rstd of each row
of h, or of x; of RMSNorm (1, M), rstd alone. seed keys the dropout, if any.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastattn.backends import get
from fastattn.errors import UnsupportedError
from fastattn.ops.allocate import contiguous_like
from fastattn.ops.define import Definition, Operator
from fastattn.ops.differentiate import vjp
from fastattn.spec import NormSpec

INPUTS = ("x", "weight", "bias", "residual", "seed")


def _allocate(inputs, spec: NormSpec):
    x = inputs[0]
    M = math.prod(x.shape[: x.dim() - spec.n_dims])
    h = contiguous_like(x, spec.residual_dtype) if spec.residual else x.new_empty(0, dtype=spec.residual_dtype)
    return contiguous_like(x, spec.out_dtype), h, x.new_empty(1 if spec.rms else 2, M, dtype=torch.float32)


def _launch(outputs, inputs, spec: NormSpec, backend: str):
    get(backend).norm_forward(*outputs, *inputs, spec)


def _base(saved: dict[str, Any], spec: NormSpec) -> Tensor:
    """What the backward reads, of the shape of a row's output."""
    return saved["y" if spec.memory_efficient else "h" if spec.residual else "x"]


def _allocate_grads(saved, wanted, spec: NormSpec):
    base = _base(saved, spec)
    dx, dweight, dbias, dresidual, _ = wanted
    parameters = (
        contiguous_like(t) if want else None for t, want in ((saved["weight"], dweight), (saved["bias"], dbias))
    )
    into_x = contiguous_like(base, spec.dtype) if dx else None
    if not dresidual:
        into_residual = None
    elif into_x is not None and spec.dropout_p == 0.0 and spec.residual_dtype == spec.dtype:
        into_residual = into_x
    else:
        into_residual = contiguous_like(base, spec.residual_dtype)
    return into_x, *parameters, into_residual, None


def _launch_backward(grad_inputs, grads, saved, spec: NormSpec, backend: str):
    dx, dweight, dbias, dresidual, _ = grad_inputs
    parameters = saved["weight"], saved["bias"], saved["seed"]
    dy, dh, _ = grads
    get(backend).norm_backward(
        dx, dweight, dbias, dresidual, dy, dh if spec.residual else None,
        _base(saved, spec), *parameters, saved["stats"], spec,
    )  # fmt: skip


def _unsaved(spec: NormSpec) -> tuple[str, ...]:
    if spec.memory_efficient:
        return ("x", "h")
    return ("x", "y") if spec.residual else ("y", "h")


def _reference(inputs, spec: NormSpec):
    x, weight, bias, residual, seed = inputs
    backend = get("reference")
    h = backend.add_residual(x, residual, seed, spec)
    y = backend.norm(h, weight, bias, spec)
    return y, h if spec.residual else x.new_empty(0), backend.norm_statistics(h, spec)


def _reference_backward(grads, saved, spec: NormSpec):
    """By the chain rule through h, which is differentiable as a function of x and residual."""
    if spec.memory_efficient:
        raise UnsupportedError(
            f"{spec.op}: its gradient cannot be differentiated again with memory_efficient=True, which keeps y alone."
        )
    backend = get("reference")
    dy, dh, _ = grads
    base, weight, bias, seed = _base(saved, spec), saved["weight"], saved["bias"], saved["seed"]
    if dy is None:
        dy = torch.zeros_like(base, dtype=spec.out_dtype or spec.dtype)

    def y(tensors):
        return (backend.norm(tensors[0], *tensors[1:], spec),)

    dbase, dweight, dbias = vjp(y, (base, weight, bias), (True, weight is not None, bias is not None), (dy,))
    if not spec.residual:
        return dbase, dweight, dbias, None, None
    dresidual = dbase if dh is None else dbase + dh
    return backend.dropped_gradient(dresidual, seed, spec), dweight, dbias, dresidual, None


def _encode(spec: NormSpec) -> tuple:
    names = ("dtype", "residual_dtype", "out_dtype", "eps", "n_dims", "weight_offset", "dropout_p", "memory_efficient")
    return tuple(getattr(spec, name) for name in names)


def _operator(name: str, function_name: str, rms: bool) -> Operator:
    def decode(
        tensors, dtype, residual_dtype, out_dtype, eps, n_dims, weight_offset, dropout_p, memory_efficient
    ) -> NormSpec:
        weight, bias = (None if tensors[name] is None else tensors[name].dtype for name in ("weight", "bias"))
        return NormSpec(
            dtype, weight, bias, eps, n_dims, rms, weight_offset, residual_dtype, dropout_p, memory_efficient, out_dtype
        )

    return Operator(
        Definition(
            name=name,
            function_name=function_name,
            inputs=(INPUTS[0], *(f"{name}?" for name in INPUTS[1:])),
            outputs=("y", "h", "stats"),
            differentiable=("y", "h"),
            saved=("x", "weight", "bias", "seed", "y", "h", "stats"),
            unsaved=_unsaved,
            scalars=(
                "ScalarType dtype, ScalarType? residual_dtype, ScalarType? out_dtype, float eps, int n_dims, "
                "float weight_offset, float dropout_p, bool memory_efficient"
            ),
            encode=_encode,
            decode=decode,
            allocate=_allocate,
            launch=_launch,
            allocate_grads=_allocate_grads,
            launch_backward=_launch_backward,
            reference=_reference,
            reference_backward=_reference_backward,
            batching="loop",
        )
    )


layer_norm = _operator("layer_norm", "LayerNormFunction", rms=False)
rms_norm = _operator("rms_norm", "RMSNormFunction", rms=True)
