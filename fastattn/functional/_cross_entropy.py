"""Losses over classes: of logits, and of what a linear layer makes them of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastattn import _arguments as check
from fastattn import backends
from fastattn.errors import ArgumentError, ArgumentIndexError, ArgumentTypeError, kind
from fastattn.functional._overwrite import may_share, overlaps_itself, same_places
from fastattn.functional._plan import autocast, cached, facts, wants_gradient
from fastattn.ops.cross_entropy import cross_entropy as cross_entropy_op
from fastattn.ops.cross_entropy import cross_entropy_with_gradient
from fastattn.ops.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy_op
from fastattn.ops.linear_cross_entropy import linear_cross_entropy_with_gradient
from fastattn.spec import CrossEntropySpec, LinearCrossEntropySpec, Work
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
            leaf that requires a gradient, under transforms and compilers. Torch operations do without. The memory is
            that of the gradient from then on, whoever still holds the logits.
        backend: "cuda", "triton", "cpu", "eager" or "reference", which then never falls back; None: the first that can.

    Returns:
        the loss, () or, for "none", logits' shape without V. Its dtype is that of the logits, for probabilities
        promoted with them and weight, under autocast float32, as torch's. The arithmetic is in at least float32.

        A class that is neither in [0, V) nor ignore_index raises for a CPU tensor. On a GPU, where a look would stop
        the stream, the loss and the row's gradient are NaN; with TRITON_DEBUG=1 the kernel asserts.

        The kernels read N · V logits and, where a gradient is wanted, write as many: 2 N V times the bytes of an
        element in all, while a row (up to 256 KB) stays in the L2 cache. The backward moves nothing if what flows back
        is 1, as from `loss.backward()`. For "none" and float16 the backward computes the gradient, from the logits:
        it moves 3 N V elements in all, and rounds once, after the factor of the row.

        The gradient can be differentiated again. With softcap, z_loss, probabilities or inplace_backward, in a mean or
        a sum that is not float16, only torch.func and backend="eager" do so. backend="eager" alone has gradients of
        probabilities and weights.

    Raises:
        ArgumentTypeError, ArgumentError: an argument of the wrong type, dtype, shape or device.
        UnsupportedError: the backend asked for cannot compute it.

    Source: torch.nn.functional.cross_entropy; z_loss: Chowdhery et al., "PaLM" (2022); softcap: Gemma 2 (2024).

    Example:
        >>> cross_entropy(torch.zeros(2, 4), torch.tensor([1, 3]))
        tensor(1.3863)
    """
    arguments = cross_entropy_arguments(
        logits, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap, inplace_backward
    )
    run, spec = _plan(backend, wants_gradient(logits), *arguments)
    check_classes("cross_entropy", target, spec, logits)
    if run.COMPOSITE:
        return run.cross_entropy(*at_least(spec.loss_dtype, logits, target, weight), spec)
    # Rows that are not reduced have a factor each: a gradient that was rounded before it would be rounded twice.
    at_once = (reduction != "none" or inplace_backward) and forward_has_gradient(logits)
    if torch.is_grad_enabled() and logits.requires_grad and at_once:
        spec = replace(spec, gradient=True, inplace=inplace_backward)
        return cross_entropy_with_gradient((logits, target, weight), spec, run.NAME)[1]
    return cross_entropy_op((logits, target, weight), spec, run.NAME)[0]


def cross_entropy_arguments(
    logits, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap, inplace_backward
) -> tuple:
    """What `cross_entropy_spec` takes, of arguments that are checked to be tensors."""
    fn = "cross_entropy"
    check.check_tensor(fn, "logits", logits)
    check.check_tensor(fn, "target", target)
    check.check_tensor(fn, "weight", weight, optional=True)
    check.check_bool(fn, "inplace_backward", inplace_backward)
    if inplace_backward:
        check_overwritten(fn, logits, target, weight)
    return (
        facts(logits), facts(target), facts(weight), is_autocast(logits.device),
        differentiated(target=target, weight=weight),
        ignore_index, reduction, label_smoothing, z_loss, softcap,
    )  # fmt: skip


def forward_has_gradient(x: Tensor) -> bool:
    """Whether a loss may compute its gradient with its value. Transforms ask for other derivatives too; and a float16
    gradient, divided by the rows before it is multiplied by a scaled loss, would be rounded to 0."""
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return not transformed and x.dtype != torch.float16


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
    if overlaps_itself(logits):
        raise ArgumentError(
            f"{fn}: `logits` has strides {tuple(logits.stride())} and overlaps itself; it cannot be written over, "
            "leave `inplace_backward` at False."
        )
    for name, t in (("target", target), ("weight", weight)):
        if t is not None and may_share(logits, t) and not same_places(logits, t):
            raise ArgumentError(
                f"{fn}: `{name}` lies in the memory of `logits`, which cannot be written over; leave "
                "`inplace_backward` at False."
            )


@cached
def _plan(backend, gradient, logits, *rest) -> tuple[ModuleType, CrossEntropySpec]:
    spec = cross_entropy_spec(logits, *rest)
    return backends.select(spec, logits[2], backend, Work(math.prod(logits[0]), gradient)), spec


def cross_entropy_spec(logits, target, weight, under_autocast, differentiates, *options) -> CrossEntropySpec:
    """Tensors as (shape, dtype, device)."""
    return loss_spec("cross_entropy", logits, target, weight, options, under_autocast, differentiates)


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
    ignore_index, reduction, label_smoothing, z_loss, softcap = checked_options(fn, probabilities, *options)
    if not probabilities and target[1] not in CLASS_DTYPES:
        raise ArgumentTypeError(
            f"{fn}: `target` has dtype {check.dtype_name(target[1])}; it must be an integer one, for classes, "
            "or floating-point, for probabilities."
        )
    check_target_shape(fn, target, rows, tuple(shape))
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
    if V == 0 and not probabilities and 0 not in rows:
        raise ArgumentError(f"{fn}: `logits` has no classes, shape {tuple(shape)}; it must have at least one.")
    return CrossEntropySpec(
        dtype, loss_dtype, target[1], None if weight is None else weight[1], ignore_index, reduction, label_smoothing,
        z_loss, softcap, differentiates=differentiates, inner=len(shape) > 2,
    )  # fmt: skip


def check_target_shape(fn: str, target: tuple, classes: tuple, probabilities: tuple) -> None:
    """Refuse a target of another shape; one of the other kind's shape may have the wrong dtype instead."""
    shape, dtype = tuple(target[0]), target[1]
    if dtype.is_floating_point:
        expected, other, what = probabilities, classes, "that of the logits, for probabilities"
        instead = "; classes, which have that shape, must be integers"
    else:
        expected, other, what = classes, probabilities, "one class per row"
        instead = "; probabilities, which have that shape, must be floating-point"
    if shape != expected:
        hint = f"{instead}, and it has dtype {check.dtype_name(dtype)}" if shape == other else ""
        raise ArgumentError(f"{fn}: `target` has shape {shape}; it must be {expected}, {what}{hint}.")


def checked_options(fn: str, probabilities: bool, ignore_index, reduction, label_smoothing, z_loss, softcap) -> tuple:
    if (index := check.integer(ignore_index)) is None:
        raise ArgumentTypeError(f"{fn}: `ignore_index` is {kind(ignore_index)}; it must be an int.")
    ignore_index = index
    if not -(2**63) <= ignore_index < 2**63:
        raise ArgumentError(f"{fn}: `ignore_index` is {ignore_index}; it must fit into 64 bits, as classes do.")
    if probabilities and ignore_index >= 0:
        raise ArgumentError(
            f"{fn}: `ignore_index` is {ignore_index}; with probabilities as target it must be negative."
        )
    if not isinstance(reduction, str):
        raise ArgumentTypeError(f'{fn}: `reduction` is {kind(reduction)}; it must be "none", "mean" or "sum".')
    if reduction not in REDUCTIONS:
        raise ArgumentError(f'{fn}: `reduction` is {reduction!r}; it must be "none", "mean" or "sum".')
    check.check_real(fn, "label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ArgumentError(
            f"{fn}: `label_smoothing` is {label_smoothing}; label_smoothing must be between 0.0 and 1.0."
        )
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


def check_classes(fn: str, target: Tensor, spec: CrossEntropySpec, x: Tensor, V: int | None = None) -> None:
    """Raise for a class that does not exist, where a look costs nothing: CPU tensors in ordinary eager mode.

    x: logits of V classes, their dimension 1; or what they are made of.
    """
    if spec.probabilities or not target.is_cpu or not is_plain(x, target) or target.numel() == 0:
        return
    V = x.shape[min(1, x.dim() - 1)] if V is None else V
    lowest, highest = target.aminmax()
    if lowest.item() >= 0 and highest.item() < V:
        return
    target = target.long()  # in a narrower type V might not be a number
    wrong = ((target < 0) | (target >= V)) & (target != spec.ignore_index)
    if wrong.any():
        raise ArgumentIndexError(
            f"{fn}: `target` holds {target[wrong][0].item()}; it must hold classes from 0 to {V - 1}, "
            f"or ignore_index = {spec.ignore_index}."
        )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """`cross_entropy` of hidden · weightᵀ + bias, without ever holding the N × V logits.

    Args:
        hidden: (E,) or (…, E), N rows in all, float16, bfloat16, float32 or float64.
        weight: (V, E), of hidden's dtype.
        target: (…) classes, or (…, V) probabilities.
        bias: (V,), of hidden's dtype, or None.
        class_weight: (V,), what cross_entropy calls weight.
        ignore_index, reduction, label_smoothing, z_loss, softcap: as of `cross_entropy`.
        chunk_size: rows of a chunk. None: as many as have logits of the larger of 64 MiB and half of weight's bytes, at
            least 256.
        backend: "triton", "cpu", "eager" or "reference", which then never falls back; None: the first that can. The
            latter two hold all logits.

    Returns:
        the loss, () or, for "none", target's shape; hidden's dtype, float32 under autocast, which casts hidden, weight
        and bias as it does for torch.nn.functional.linear.

        Beyond inputs, loss and gradients it takes memory for the logits of one chunk and a copy of its rows of hidden,
        4 V (E + 1) bytes in which half-precision gradients of weight and bias are accumulated if there are several
        chunks, and 4 N bytes. The logits held at once take at most the larger of 64 MiB and half of weight's
        bytes (or chunk_size · 16 elements): a chunk that has more of them goes through V in slices, each of
        whose logits are computed twice, once for the statistics of the rows and once for the gradient; it takes
        another 4 (E + 3) bytes for each of its rows.

        For "mean" and "sum" the forward computes the gradients, which are kept in place of hidden and logits; for
        "none" and float16 the backward computes the logits again. Bytes moved, per chunk: hidden, weight once per
        product (three with gradients, four with slices), the logits four times, the sum of dweight twice.

    Raises:
        ArgumentTypeError, ArgumentError: an argument of the wrong type, dtype, shape or device.
        UnsupportedError: the backend asked for cannot compute it.

    Source: torch.nn.functional.linear_cross_entropy; Hsu et al., "Liger Kernel" (2024).

    Example:
        >>> linear_cross_entropy(torch.zeros(2, 8), torch.ones(4, 8), torch.tensor([1, 3]))
        tensor(1.3863)
    """
    arguments, (hidden, weight, bias) = linear_cross_entropy_arguments(
        hidden,
        weight,
        target,
        bias,
        class_weight,
        ignore_index,
        reduction,
        label_smoothing,
        z_loss,
        softcap,
        chunk_size,
    )
    run, spec = _linear_plan(backend, *arguments)
    rows = hidden.reshape(hidden.shape[:-1].numel(), hidden.shape[-1])
    target = target.reshape(rows.shape[0], weight.shape[0]) if spec.loss.probabilities else target.reshape(-1)
    check_classes("linear_cross_entropy", target, spec.loss, rows, weight.shape[0])
    tensors = (rows, weight, target, bias, class_weight)
    wanted = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias))
    if run.COMPOSITE:
        loss = run.linear_cross_entropy(*tensors, spec)
    elif any(wanted) and reduction != "none" and forward_has_gradient(hidden):
        loss = linear_cross_entropy_with_gradient(tensors, replace(spec, gradients=wanted), run.NAME)[0]
    else:
        loss = linear_cross_entropy_op(tensors, spec, run.NAME)[0]
    return loss.reshape(hidden.shape[:-1]) if reduction == "none" else loss


def linear_cross_entropy_arguments(
    hidden, weight, target, bias, class_weight, ignore_index, reduction, label_smoothing, z_loss, softcap, chunk_size
) -> tuple[tuple, tuple[Tensor, Tensor, Tensor | None]]:
    """What `linear_cross_entropy_spec` takes; and hidden, weight and bias in autocast's dtypes."""
    fn = "linear_cross_entropy"
    named = {"hidden": hidden, "weight": weight, "target": target, "bias": bias, "class_weight": class_weight}
    for name, t in named.items():
        check.check_tensor(fn, name, t, optional=name in ("bias", "class_weight"))
    check.check_float_dtype(fn, "hidden", hidden.dtype)
    check.check_float_dtype(fn, "weight", weight.dtype)
    under_autocast = is_autocast(hidden.device)
    hidden, weight = autocast(hidden, weight)
    bias = None if bias is None else autocast(bias)[0]
    arguments = (
        facts(hidden), facts(weight), facts(target), facts(bias), facts(class_weight), chunk_size, under_autocast,
        differentiated(target=target, class_weight=class_weight),
        ignore_index, reduction, label_smoothing, z_loss, softcap,
    )  # fmt: skip
    return arguments, (hidden, weight, bias)


@cached
def _linear_plan(backend, hidden, *rest) -> tuple[ModuleType, LinearCrossEntropySpec]:
    spec = linear_cross_entropy_spec(hidden, *rest)
    return backends.select(spec, hidden[2], backend), spec


def linear_cross_entropy_spec(
    hidden, weight, target, bias, class_weight, chunk_size, under_autocast, differentiates, *options
) -> LinearCrossEntropySpec:
    """Tensors as (shape, dtype, device)."""
    fn = "linear_cross_entropy"
    if len(hidden[0]) == 0 or len(weight[0]) != 2 or hidden[0][-1] != weight[0][1]:
        raise ArgumentError(
            f"{fn}: `hidden` has shape {tuple(hidden[0])} and `weight` {tuple(weight[0])}; "
            "they must be (…, E) and (V, E)."
        )
    V = weight[0][0]
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            check.check_same_device(fn, name, t[2], "hidden", hidden[2])
            if t[1] != hidden[1]:
                raise ArgumentTypeError(
                    f"{fn}: `{name}` has dtype {check.dtype_name(t[1])} and `hidden` has {check.dtype_name(hidden[1])}"
                    "; they must be equal."
                )
    if bias is not None and tuple(bias[0]) != (V,):
        raise ArgumentError(f"{fn}: `bias` has shape {tuple(bias[0])}; it must be (V,) = ({V},).")
    if chunk_size is not None:
        if (size := check.integer(chunk_size)) is None:
            raise ArgumentTypeError(f"{fn}: `chunk_size` is {kind(chunk_size)}; it must be an int or None.")
        chunk_size = size
        if chunk_size < 1:
            raise ArgumentError(f"{fn}: `chunk_size` is {chunk_size}; it must be 1 or more, or None.")
    # Rows may have any number of dimensions; with the classes last they are those of `loss_spec` as (N, V).
    lead, N = tuple(hidden[0][:-1]), hidden[0][:-1].numel()
    probabilities = target[1].is_floating_point
    check_target_shape(fn, target, lead, (*lead, V))
    flat = (torch.Size((N, V) if probabilities else (N,)), *target[1:])
    logits = (torch.Size((N, V)), *hidden[1:])
    loss = loss_spec(fn, logits, flat, class_weight, options, under_autocast, differentiates, "class_weight")
    return LinearCrossEntropySpec(loss, chunk_size)
