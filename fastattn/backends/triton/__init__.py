"""Fused Triton kernels: on GPUs, and on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1).

Triton is imported with the first kernel that runs, not with fastattn.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.errors import UnsupportedError
from fastattn.spec import (
    AttentionInputs,
    AttentionSpec,
    CrossEntropySpec,
    DropoutAddSpec,
    ElementwiseSpec,
    GatedSpec,
    LinearCrossEntropySpec,
    NormSpec,
    RotarySpec,
    SoftmaxSpec,
    Spec,
)

NAME = "triton"
COMPOSITE = False

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"  # read once: triton.jit decides at decoration
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 576


def available(device: torch.device) -> str | None:
    return _available(device)


# What torch.compiler.assume_constant_result does; calling that would import Dynamo, a second and a half, with fastattn.
available._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _available(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if INTERPRET and device.type in ("cpu", "cuda"):
        return None
    if device.type == "cpu":
        return "Triton compiles for GPUs (TRITON_INTERPRET=1 interprets its kernels on a CPU, slowly)"
    if device.type != "cuda":
        return f"it has no kernels for device {device.type!r}"
    if not torch.cuda.is_available():
        return "no GPU is visible to torch"
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and major < 8:
        return f"it needs compute capability 8.0 or newer, this GPU has {major}.{minor}"
    return None


def unsupported(spec: Spec, device: torch.device) -> str | None:
    if isinstance(spec, AttentionSpec) and spec.fp8:
        if why := _no_fp8(device):
            return why
    elif spec.dtype not in _DTYPES:
        return f"dtype {_name(spec.dtype)} (it has float16, bfloat16 and float32)"
    if isinstance(spec, AttentionSpec):
        return _unsupported_attention(spec, device)
    if isinstance(spec, LinearCrossEntropySpec):
        return unsupported(spec.loss, device)
    if isinstance(spec, CrossEntropySpec):
        if spec.differentiates is not None:
            return f"a gradient of {spec.differentiates} (its kernels have that of the logits)"
        for argument, dtype in (("target", spec.target_dtype), ("weight", spec.weight_dtype)):
            if dtype is not None and dtype.is_floating_point and dtype not in _DTYPES:
                return f"{argument} of dtype {_name(dtype)} (it has float16, bfloat16 and float32)"
    if isinstance(spec, NormSpec):
        named = (("weight", spec.weight_dtype), ("bias", spec.bias_dtype), ("residual", spec.residual_dtype))
        for argument, dtype in named:
            if dtype is not None and dtype not in _DTYPES:
                return f"{argument} of dtype {_name(dtype)} (it has float16, bfloat16 and float32)"
    return None


def _no_fp8(device: torch.device) -> str | None:
    if INTERPRET:
        return None
    if torch.version.hip is not None:
        return "dtype float8_e4m3fn on ROCm, whose matrix cores take another 8-bit format"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        return f"dtype float8_e4m3fn needs compute capability 8.9 or newer, this GPU has {major}.{minor}"
    return None


_no_fp8._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _unsupported_attention(spec: AttentionSpec, device: torch.device) -> str | None:
    widest = max_head_dim(device, spec.dtype)
    for name, width in (("head dimension of q and k", spec.D), ("head dimension of v", spec.D_v)):
        if not 1 <= width <= widest:
            return f"{name} is {width} (in {_name(spec.dtype)} it has tiles for 1 to {widest} on this device)"
    return None


def max_head_dim(device: torch.device, dtype: torch.dtype) -> int:
    """The widest head that shared memory has room for."""
    from fastattn.backends.triton.configs import arch_of, widest_head

    return widest_head(arch_of(device), dtype)


max_head_dim._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe(spec: Spec, device: torch.device) -> str:
    how = "interpreted" if INTERPRET else "compiled"
    if isinstance(spec, LinearCrossEntropySpec):
        rows = spec.chunk_size or "as fit 64 MiB of logits, or half of weight's bytes"
        return f"{how}; torch's products and one fused kernel, in chunks of rows, and slices of large ones: {rows}"
    if isinstance(spec, CrossEntropySpec):
        return f"{how}; one fused kernel, forward with the gradient"
    if isinstance(spec, ElementwiseSpec):
        return f"{how}; one fused kernel forward, one backward"
    if isinstance(spec, AttentionSpec):
        from fastattn.backends.triton.configs import arch_of, backward_config, forward_config

        arch = arch_of(device)
        forward, backward = (
            forward_config(arch, spec.D, spec.D_v, spec.dtype),
            backward_config(arch, spec.D, spec.D_v, spec.dtype),
        )
        if spec.fp8:
            return f"{how}; forward {forward}"
        dbias = f"; dbias {backward.dbias}" if spec.bias else ""
        return f"{how}; forward {forward}; backward {backward}{dbias}"
    return f"{how}; one fused kernel forward, rows looped over where they do not fit a block"


def _on(t: Tensor):
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device_of(t)


def attention_forward(o: Tensor, lse: Tensor, lse_low: Tensor, x: AttentionInputs, spec: AttentionSpec) -> None:
    from fastattn.backends.triton.attention_fwd import launch

    with _on(o):
        launch(o, lse, lse_low, x, spec)


def attention_backward(
    grads: AttentionInputs,
    do: Tensor | None,
    dlse: Tensor | None,
    x: AttentionInputs,
    o: Tensor,
    lse: Tensor,
    lse_low: Tensor,
    spec: AttentionSpec,
) -> None:
    from fastattn.backends.triton.attention_bwd import launch

    _has_derivatives(spec)
    with _on(o):
        launch(grads, do, dlse, x, o, lse, lse_low, spec)


def attention_tangents(
    to: Tensor,
    tlse: Tensor,
    tangents: AttentionInputs,
    x: AttentionInputs,
    o: Tensor,
    lse: Tensor,
    lse_low: Tensor,
    spec: AttentionSpec,
) -> None:
    from fastattn.backends.triton.attention_jvp import launch

    _has_derivatives(spec)
    with _on(o):
        launch(to, tlse, tangents, x, o, lse, lse_low, spec)


def _has_derivatives(spec: AttentionSpec) -> None:
    if spec.fp8:
        raise UnsupportedError("attention: 8-bit inputs have a forward only.")


def norm_forward(
    y: Tensor,
    h: Tensor,
    stats: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    spec: NormSpec,
) -> None:
    from fastattn.backends.triton.norm import launch_forward

    weight, bias = (t if t is None else t.contiguous().view(-1) for t in (weight, bias))
    with _on(x):
        launch_forward(y, h, stats, x, weight, bias, residual, seed, spec)


def norm_backward(
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dresidual: Tensor | None,
    dy: Tensor | None,
    dh: Tensor | None,
    base: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    stats: Tensor,
    spec: NormSpec,
) -> None:
    from fastattn.backends.triton.norm import launch_backward

    if dy is None:
        dh = torch.zeros((), dtype=base.dtype, device=base.device).expand(base.shape) if dh is None else dh
        _norm_backward_of_sum(dx, dweight, dbias, dresidual, dh, seed, spec)
        return
    dweight, dbias = (t if t is None else t.view(-1) for t in (dweight, dbias))
    weight, bias = (t if t is None else t.contiguous().view(-1) for t in (weight, bias))
    with _on(base):
        launch_backward(dx, dweight, dbias, dresidual, dy, dh, base, weight, bias, seed, stats, spec)


def _norm_backward_of_sum(dx, dweight, dbias, dresidual, dh: Tensor, seed: Tensor | None, spec: NormSpec) -> None:
    """Of h alone: what the norm would make of no gradient is not computed, as 0 · inf would be NaN."""
    from fastattn.backends.triton.dropout_add import launch

    for parameter in (dweight, dbias):
        if parameter is not None:
            parameter.zero_()
    if dresidual is not None:
        dresidual.copy_(dh)
    if seed is None and dx is not None and dx is not dresidual:
        dx.copy_(dh)
    elif seed is not None and dx is not None:
        rows = dh.dim() - spec.n_dims
        with _on(dx):
            launch(dx.view(dh.shape).flatten(rows), None, dh.flatten(rows), seed, spec.dropout_p)


def softmax_forward(y: Tensor, x: Tensor, mask: Tensor | None, spec: SoftmaxSpec) -> None:
    from fastattn.backends.triton.softmax import launch_forward

    with _on(x):
        launch_forward(y, x, mask, spec, spec.dim)


def softmax_backward(dx: Tensor | None, dy: Tensor | None, y: Tensor, mask: Tensor | None, spec: SoftmaxSpec) -> None:
    from fastattn.backends.triton.softmax import launch_backward

    if dx is None:
        return
    with _on(y):
        dx.zero_() if dy is None else launch_backward(dx, dy, y, mask, spec, spec.dim)


def gated_forward(y: Tensor, gate: Tensor, up: Tensor, spec: GatedSpec) -> None:
    from fastattn.backends.triton.gated import launch_forward

    with _on(y):
        launch_forward(y, gate, up, spec)


def gated_backward(
    dgate: Tensor | None, dup: Tensor | None, dy: Tensor, gate: Tensor, up: Tensor, spec: GatedSpec
) -> None:
    from fastattn.backends.triton.gated import launch_backward

    with _on(gate):
        launch_backward(dgate, dup, dy, gate, up, spec)


def rotary_embedding(
    pairs: Sequence[tuple[Tensor, Tensor]],
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    spec: RotarySpec,
    inverse: bool = False,
) -> None:
    """For each pair (y, x), of which there are one or two: y is x rotated, or rotated back."""
    from fastattn.backends.triton.rotary import launch

    with _on(cos):
        launch(pairs, cos, sin, position_ids, cu_seqlens, spec, inverse)


def cross_entropy_forward(
    loss: Tensor,
    row_max: Tensor | None,
    row_sum: Tensor | None,
    divisor: Tensor | None,
    dlogits: Tensor | None,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    spec: CrossEntropySpec,
) -> None:
    from fastattn.backends.triton.cross_entropy import launch_forward

    with _on(logits):
        launch_forward(loss, row_max, row_sum, divisor, dlogits, logits, target, weight, spec)


def cross_entropy_backward(dlogits: Tensor, dloss: Tensor | None, logits: Tensor, *saved) -> None:
    from fastattn.backends.triton.cross_entropy import launch_backward

    with _on(logits):
        dlogits.zero_() if dloss is None else launch_backward(dlogits, dloss, logits, *saved)


def cross_entropy_scale(out: Tensor, factor: Tensor | None, dlogits: Tensor) -> None:
    from fastattn.backends.triton.cross_entropy import launch_scale

    with _on(out):
        out.zero_() if factor is None else launch_scale(out, dlogits, factor, min(1, out.dim() - 1))


def dropout_add_forward(y: Tensor, residual: Tensor, x: Tensor, seed: Tensor, spec: DropoutAddSpec) -> None:
    from fastattn.backends.triton.dropout_add import launch

    with _on(y):
        launch(y, residual, x, seed, spec.dropout_p)


def dropout_add_backward(dx: Tensor, dy: Tensor, seed: Tensor, spec: DropoutAddSpec) -> None:
    from fastattn.backends.triton.dropout_add import launch

    with _on(dx):
        launch(dx, None, dy, seed, spec.dropout_p)


def linear_cross_entropy_forward(loss: Tensor, *arguments) -> None:
    from fastattn.backends.triton.linear_cross_entropy import launch_forward

    with _on(loss):
        launch_forward(loss, *arguments)


def linear_cross_entropy_backward(gradients, dloss: Tensor, hidden: Tensor, *saved) -> None:
    from fastattn.backends.triton.linear_cross_entropy import launch_backward

    with _on(hidden):
        launch_backward(gradients, dloss, hidden, *saved)


def linear_cross_entropy_scale(outs, factor: Tensor, gradients: Sequence[Tensor]) -> None:
    from fastattn.backends.triton.linear_cross_entropy import launch_scaling

    with _on(factor):
        launch_scaling(outs, factor, gradients)
