"""Losses over classes: of logits, and of what a linear layer makes them of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastattn import _arguments as check
from fastattn import backends
from fastattn.errors import ArgumentError, ArgumentTypeError, kind
from fastattn.functional._plan import cached, facts
from fastattn.ops.cross_entropy import cross_entropy as cross_entropy_op
from fastattn.ops.cross_entropy import cross_entropy_with_gradient
from fastattn.spec import CrossEntropySpec
from fastattn.tracing import is_plain

REDUCTIONS = ("none", "mean", "sum")
CLASS_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Cross entropy of logits with classes or class probabilities; the forward computes the gradient in the same pass.

        s = softcap · tanh(logits / softcap),   log p_j = s_j − lse,   lse = log Σ exp s_l
        loss of a row = −Σ_j q_j log p_j + z_loss · lse²
        q_j = (1 − ε) w_t [j = t] + ε / V · w_j   for a class t of V,   w_j ((1 − ε) y_j + ε / V)   for probabilities y

    Args:
        logits: (V,), (N, V) or (N, V, d1, …), float16, bfloat16, float32 or float64, any strides.
        target: classes, integers of logits' shape without V; or probabilities, floating-point of logits' shape.
        weight: (V,), the w of each class; None for 1.
        ignore_index: a row of this class has loss 0 and gradient 0, whatever its logits hold, and does not count.
        reduction: "none", "sum", or "mean": the sum divided by Σ w_t over the rows that count (for probabilities by the
            number of rows); of nothing NaN, as torch's.
        label_smoothing: ε, between 0 and 1.
        z_loss: factor on lse² of each row that counts. It is not weighted; a mean divides it as it does the rest.
        softcap: bounds the logits to ±softcap; None: not.
        inplace_backward: the gradient may be written over logits, which autograd is told have changed; refused for a
            leaf that requires a gradient, under transforms and compilers. Torch operations do without.
        backend: one of "triton", "eager", "reference", which then never falls back; None: the first that can.

    Returns:
        the loss, () or, for "none", logits' shape without V. Its dtype is that of the logits, for probabilities
        promoted with them and weight, under autocast float32, as torch's. The arithmetic is in at least float32.

        A class that is neither in [0, V) nor ignore_index raises for a CPU tensor. On a GPU, where a look would stop
        the stream, the loss and the row's gradient are NaN; with TRITON_DEBUG=1 the kernel asserts.

        The kernels read N · V logits and, where a gradient is wanted, write as many: 2 N V times the bytes of an
        element in all, while a row (up to 256 KB) stays in the L2 cache. The backward moves nothing if what flows back
        is 1, as from `loss.backward()`. The gradient cannot be differentiated again; torch.func can, and
        backend="eager". Gradients of probabilities and weights are eager's.

    Raises:
        ArgumentTypeError, ArgumentError: an argument of the wrong type, dtype, shape or device.
        UnsupportedError: the backend asked for cannot compute it.

    Source: torch.nn.functional.cross_entropy; z_loss: Chowdhery et al., "PaLM" (2022); softcap: Gemma 2 (2024).

    Example:
        >>> cross_entropy(torch.zeros(2, 4), torch.tensor([1, 3]))
        tensor(1.3863)
    """
    plain = is_plain(logits, target, weight) if isinstance(logits, Tensor) else True
    run, spec = cross_entropy_plan(
        logits, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap, inplace_backward, backend
    )
    check_classes("cross_entropy", target, spec, logits.shape[min(1, logits.dim() - 1)], plain)
    if run.COMPOSITE:
        return run.cross_entropy(*at_least(spec.loss_dtype, logits, target, weight), spec)
    if spec.gradient:
        return cross_entropy_with_gradient((logits, target, weight), spec, run.NAME)[1]
    return cross_entropy_op((logits, target, weight), spec, run.NAME)[0]


def cross_entropy_plan(
    logits, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap, inplace_backward, backend
) -> tuple[ModuleType, CrossEntropySpec]:
    fn = "cross_entropy"
    check.check_tensor(fn, "logits", logits)
    check.check_tensor(fn, "target", target)
    check.check_tensor(fn, "weight", weight, optional=True)
    check.check_bool(fn, "inplace_backward", inplace_backward)
    wanted = torch.is_grad_enabled() and logits.requires_grad
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if inplace_backward:
        check_overwritten(fn, logits, target, weight)
    options = (ignore_index, reduction, label_smoothing, z_loss, softcap)
    run, spec = _plan(
        backend, facts(logits), facts(target), facts(weight), options, is_autocast(logits.device),
        differentiated(target=target, weight=weight),
    )  # fmt: skip
    # A float16 gradient divided by the rows before it is multiplied by a scaled loss would be rounded to 0.
    if wanted and not transformed and logits.dtype != torch.float16 and not run.COMPOSITE:
        spec = replace(spec, gradient=True, inplace=inplace_backward)
    return run, spec


def check_overwritten(fn: str, logits: Tensor, target: Tensor, weight: Tensor | None) -> None:
    """Refuses `inplace_backward` where autograd could not be told, and for memory that is met twice."""
    if not is_plain(logits, target, weight):
        raise ArgumentError(
            f"{fn}: `inplace_backward` is True; under compilers, transforms and dispatch modes it must be False."
        )
    if logits.requires_grad and logits.is_leaf and torch.is_grad_enabled():
        raise ArgumentError(
            f"{fn}: `logits` is a leaf that requires a gradient, and cannot be written over; leave `inplace_backward` "
            "at False."
        )
    if any(step == 0 and size > 1 for size, step in zip(logits.shape, logits.stride(), strict=True)):
        raise ArgumentError(
            f"{fn}: `logits` has strides {tuple(logits.stride())} and overlaps itself; it cannot be written over, leave "
            "`inplace_backward` at False."
        )


@cached
def _plan(backend, logits, target, weight, options, under_autocast, differentiates) -> tuple[ModuleType, CrossEntropySpec]:
    spec = loss_spec("cross_entropy", logits, target, weight, options, under_autocast, differentiates)
    return backends.select(spec, logits[2], backend), spec


def loss_spec(
    fn: str,
    logits: tuple,
    target: tuple,
    weight: tuple | None,
    options: Sequence[Any],
    under_autocast: bool,
    differentiates: str | None,
    weight_name: str = "weight",
) -> CrossEntropySpec:
    """Tensors as (shape, dtype, device)."""
    shape, dtype, device = logits
    check.check_float_dtype(fn, "logits", dtype)
    if len(shape) == 0:
        raise ArgumentError(f"{fn}: `logits` has shape (); it must be (V,), (N, V) or (N, V, d1, …).")
    dim = min(1, len(shape) - 1)
    rows, V = (*shape[:dim], *shape[dim + 1 :]), shape[dim]
    check.check_same_device(fn, "target", target[2], "logits", device)
    probabilities = target[1].is_floating_point
    if not probabilities and target[1] not in CLASS_DTYPES:
        raise ArgumentTypeError(
            f"{fn}: `target` has dtype {check.dtype_name(target[1])}; it must be int64 or another integer, for classes, "
            "or floating-point, for probabilities."
        )
    expected, what = (tuple(shape), "that of the logits") if probabilities else (rows, "one class per row")
    if tuple(target[0]) != expected:
        raise ArgumentError(f"{fn}: `target` has shape {tuple(target[0])}; it must be {expected}, {what}.")
    loss_dtype = torch.promote_types(dtype, target[1]) if probabilities else dtype
    if weight is not None:
        check.check_float_dtype(fn, weight_name, weight[1])
        check.check_same_device(fn, weight_name, weight[2], "logits", device)
        if tuple(weight[0]) != (V,):
            raise ArgumentError(f"{fn}: `{weight_name}` has shape {tuple(weight[0])}; it must be (V,) = ({V},).")
        if probabilities:
            loss_dtype = torch.promote_types(loss_dtype, weight[1])
    if under_autocast:
        loss_dtype = torch.promote_types(loss_dtype, torch.float32)
    if V == 0 and any(rows) and not probabilities and rows.count(0) == 0:
        raise ArgumentError(f"{fn}: `logits` has no classes, shape {tuple(shape)}; it must have at least one.")
    return CrossEntropySpec(dtype, loss_dtype, target[1], None if weight is None else weight[1],
                            *checked_options(fn, probabilities, *options), differentiates=differentiates)


def checked_options(fn: str, probabilities: bool, ignore_index, reduction, label_smoothing, z_loss, softcap) -> tuple:
    if not isinstance(ignore_index, (int, torch.SymInt)) or isinstance(ignore_index, bool):
        raise ArgumentTypeError(f"{fn}: `ignore_index` is {kind(ignore_index)}; it must be an int.")
    if probabilities and ignore_index >= 0:
        raise ArgumentError(f"{fn}: `ignore_index` is {ignore_index}; with probabilities as target it must be negative.")
    if not isinstance(reduction, str):
        raise ArgumentTypeError(f'{fn}: `reduction` is {kind(reduction)}; it must be "none", "mean" or "sum".')
    if reduction not in REDUCTIONS:
        raise ArgumentError(f'{fn}: `reduction` is {reduction!r}; it must be "none", "mean" or "sum".')
    check.check_real(fn, "label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ArgumentError(f"{fn}: `label_smoothing` is {label_smoothing}; it must be between 0 and 1.")
    check.check_real(fn, "z_loss", z_loss)
    if z_loss < 0.0:
        raise ArgumentError(f"{fn}: `z_loss` is {z_loss}; it must be 0 or more.")
    check.check_real(fn, "softcap", softcap, optional=True)
    if softcap is not None and softcap <= 0.0:
        raise ArgumentError(f"{fn}: `softcap` is {softcap}; it must be above 0, or None.")
    cap = None if softcap is None else float(softcap)
    return ignore_index, reduction, float(label_smoothing), float(z_loss), cap


def is_autocast(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def differentiated(**tensors: Tensor | None) -> str | None:
    """The first of these of which a gradient is wanted."""
    if not torch.is_grad_enabled():
        return None
    return next((name for name, t in tensors.items() if t is not None and t.requires_grad), None)


def at_least(loss_dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Half-precision tensors in fp32 if the loss is, as under autocast."""
    if loss_dtype not in (torch.float32, torch.float64):
        return tensors
    half = (torch.float16, torch.bfloat16)
    return tuple(t.float() if t is not None and t.dtype in half else t for t in tensors)


def check_classes(fn: str, target: Tensor, spec: CrossEntropySpec, V: int, plain: bool) -> None:
    """Raise for a class that does not exist, where a look costs nothing: CPU tensors in ordinary eager mode."""
    if not plain or spec.probabilities or not target.is_cpu or target.numel() == 0:
        return
    wrong = ((target < 0) | (target >= V)) & (target != spec.ignore_index)
    if wrong.any():
        raise ArgumentError(
            f"{fn}: `target` holds {target[wrong][0].item()}; it must hold classes from 0 to {V - 1}, "
            f"or ignore_index = {spec.ignore_index}."
        )
