"""fastattn::layer_norm: (x, weight, bias) -> (y, mean, rstd), differentiable in y."""

from __future__ import annotations

import math

import torch

from fastattn.backends import get
from fastattn.ops.define import Definition, Operator
from fastattn.spec import NormSpec


def _allocate(inputs, spec: NormSpec):
    x = inputs[0]
    M = math.prod(x.shape[: x.dim() - spec.n_dims])
    mean, rstd = (x.new_empty(M, dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


def _launch(outputs, inputs, spec: NormSpec, backend: str):
    get(backend).layer_norm_forward(*outputs, *inputs, spec)


def _allocate_grads(saved, wanted, spec: NormSpec):
    inputs = (saved["x"], saved["weight"], saved["bias"])
    return tuple(t.new_empty(t.shape) if want else None for t, want in zip(inputs, wanted, strict=True))


def _launch_backward(grad_inputs, grads, saved, spec: NormSpec, backend: str):
    get(backend).layer_norm_backward(
        *grad_inputs, grads[0], saved["x"], saved["weight"], saved["mean"], saved["rstd"], spec
    )


def _reference(inputs, spec: NormSpec):
    x = inputs[0]
    rows = x.flatten(x.dim() - spec.n_dims).float()
    var, mean = torch.var_mean(rows, -1, correction=0)
    return get("reference").layer_norm(*inputs, spec), mean.flatten(), torch.rsqrt(var + spec.eps).flatten()


def _decode(tensors, eps: float, n_dims: int) -> NormSpec:
    weight, bias = (None if tensors[name] is None else tensors[name].dtype for name in ("weight", "bias"))
    return NormSpec(tensors["x"].dtype, weight, bias, eps, n_dims)


layer_norm = Operator(
    Definition(
        name="layer_norm",
        function_name="LayerNormFunction",
        inputs=("x", "weight?", "bias?"),
        outputs=("y", "mean", "rstd"),
        differentiable=("y",),
        saved=("x", "weight", "bias", "mean", "rstd"),
        scalars="float eps, int n_dims",
        encode=lambda spec: (spec.eps, spec.n_dims),
        decode=_decode,
        allocate=_allocate,
        launch=_launch,
        allocate_grads=_allocate_grads,
        launch_backward=_launch_backward,
        reference=_reference,
        batching="loop",
    )
)
