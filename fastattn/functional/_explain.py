"""Which backend would serve a call, and why."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from fastattn import _arguments as check
from fastattn import backends
from fastattn.backends import Explanation
from fastattn.errors import ArgumentTypeError, FastattnError, kind
from fastattn.functional._attention import attention, attention_work, varlen_attention
from fastattn.functional._cross_entropy import (
    check_classes,
    cross_entropy,
    cross_entropy_arguments,
    cross_entropy_spec,
    linear_cross_entropy,
    linear_cross_entropy_arguments,
    linear_cross_entropy_spec,
)
from fastattn.functional._dropout_add import dropout_add, dropout_add_arguments, dropout_add_spec
from fastattn.functional._gated import gated_spec, geglu, swiglu
from fastattn.functional._norm import check_norm_tensors, layer_norm, norm_out_dtype, rms_norm
from fastattn.functional._plan import autocast, facts, held_number, wants_gradient
from fastattn.functional._rotary import check_rotary_values, rotary_arguments, rotary_embedding, rotary_spec
from fastattn.functional._sdpa import in_sdpa_names, scaled_dot_product_attention, sdpa_arguments
from fastattn.functional._softmax import check_softmax_mask, log_softmax, softmax, softmax_input, softmax_overwrites
from fastattn.spec import Work


def explain(fn: Callable, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend would serve `fn(*args, **kwargs)`, with which configuration, and why each other was passed over.

    Args:
        fn: a public function of fastattn (`attention`, `varlen_attention`, `scaled_dot_product_attention`,
            `layer_norm`, `rms_norm`, `softmax`, `log_softmax`, `rotary_embedding`,
            `swiglu`, `geglu`, `dropout_add`, `cross_entropy`, `linear_cross_entropy`).
        args, kwargs: what it would be called with.

    Returns:
        an Explanation: `.backend`, `.config`, `.reasons`, `.spec`; its str() is a table.

    Raises:
        ArgumentTypeError: `fn` is not one of these. What `fn` itself would raise for wrong arguments.

    Example:
        >>> q = torch.randn(1, 2, 8, 16)
        >>> explain(attention, q, q, q).backend in ("triton", "eager")
        True
    """
    specs = _SPEC_OF.get(fn) if callable(fn) else None
    if specs is None:
        names, given = ", ".join(f.__name__ for f in _SPEC_OF), getattr(fn, "__name__", kind(fn))
        raise ArgumentTypeError(f"explain: `fn` is {given}; it must be one of {names}.")
    bound = inspect.signature(fn).bind(*args, **kwargs)
    bound.apply_defaults()
    try:
        spec, device, *work = specs(**bound.arguments)
    except ArgumentTypeError:
        lengths = ("max_seqlen_q", "max_seqlen_k")  # which stay tensors in the call too
        numbers = {name: a if name in lengths else held_number(a) for name, a in bound.arguments.items()}
        if all(numbers[name] is value for name, value in bound.arguments.items()):
            raise
        spec, device, *work = specs(**numbers)
    return backends.explain(spec, device, bound.arguments.get("backend"), *work)


def _attention_spec(
    q, k, v, *, causal, window, scale, bias, mask, alibi_slopes, softcap, sinks, dropout_p, return_lse, deterministic,
    backend, q_scale, k_scale, v_scale, fn="attention", sequences=None,
):  # fmt: skip
    for name, t in (("q", q), ("k", k), ("v", v)):
        check.check_tensor(fn, name, t)
    tensors = autocast(q, k, v)
    features = (bias, mask, alibi_slopes, sinks)
    spec = check.attention_spec(
        fn, tuple(t.shape for t in tensors), tuple(t.dtype for t in tensors), tuple(t.device for t in tensors),
        causal, window, scale, softcap, dropout_p, deterministic,
        tuple(t is not None for t in (*features, sequences)),
    )  # fmt: skip
    check.check_attention_features(fn, q, k, *features, sequences)
    B = q.shape[0] if sequences is None else sequences.B
    scales = {"q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale}
    check.fp8_scales(fn, spec, B, (*tensors, bias, alibi_slopes, sinks), scales)
    return spec, q.device, attention_work(tensors[0].shape, tensors[1].shape, wants_gradient(q, k, v), return_lse)


def _varlen_spec(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, seqused_q, seqused_k, causal, **options
):
    sequences = check.sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    check.check_seqused(sequences, seqused_q, seqused_k, (cu_seqlens_q, cu_seqlens_k))
    if causal is True:
        causal = check.packed_alignment(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    return _attention_spec(q, k, v, causal=causal, fn="varlen_attention", sequences=sequences, **options)


def _sdpa_spec(**arguments):
    arguments, _ = sdpa_arguments(**arguments)
    bound = inspect.signature(attention).bind(**arguments)
    bound.apply_defaults()
    try:
        return _attention_spec(**bound.arguments)
    except FastattnError as error:
        raise in_sdpa_names(error) from None


def _norm_spec(fn):
    def spec(
        x, normalized_shape, weight, eps, residual, dropout_p, memory_efficient, backend, bias=None, weight_offset=0.0
    ):
        check_norm_tensors(fn, x, weight, bias, residual)
        row = check.row_shape(fn, normalized_shape)
        tensors = facts(weight), facts(bias), facts(residual)
        options = eps, dropout_p, weight_offset, memory_efficient, norm_out_dtype(x)
        spec = check.norm_spec(fn, facts(x), row, *tensors, *options)
        return spec, x.device, Work(x.numel(), wants_gradient(x, weight))

    return spec


def _softmax_spec(fn):
    def spec(x, dim, scale, mask, causal, inplace, dtype, backend):
        check.check_tensor(fn, "x", x)
        if dtype is not None:
            x = softmax_input(fn, x, dtype, inplace)
        if mask is not None:
            check_softmax_mask(fn, x, mask)
        overwrites = softmax_overwrites(fn, x, mask, inplace)
        spec = check.softmax_spec(fn, x.shape, x.dtype, dim, scale, causal, mask is not None, overwrites)
        return spec, x.device, Work(x.numel(), wants_gradient(x))

    return spec


def _gated_spec(fn):
    def spec(gate, up, backend, approximate="none"):
        check.check_tensor(fn, "gate", gate)
        check.check_tensor(fn, "up", up)
        shapes, dtypes, devices = zip(facts(gate), facts(up), strict=True)
        spec = gated_spec(fn, shapes, dtypes, devices, approximate)
        return spec, gate.device, Work(gate.numel(), wants_gradient(gate, up))

    return spec


def _dropout_add_spec(x, residual, dropout_p, inplace, backend):
    return dropout_add_spec(*dropout_add_arguments(x, residual, dropout_p, inplace)), x.device


def _rotary_spec(x, cos, sin, interleaved, position_ids, cu_seqlens, inplace, backend):
    arguments, q, _ = rotary_arguments(x, cos, sin, interleaved, position_ids, cu_seqlens, inplace)
    spec = rotary_spec(*arguments)
    check_rotary_values(q, cos, position_ids, cu_seqlens)
    return spec, q.device


def _cross_entropy_spec(logits, target, *, backend, **options):
    spec = cross_entropy_spec(*cross_entropy_arguments(logits, target, **options))
    check_classes("cross_entropy", target, spec, logits)
    return spec, logits.device, Work(logits.numel(), wants_gradient(logits))


def _linear_cross_entropy_spec(hidden, weight, target, *, backend, **options):
    arguments, _ = linear_cross_entropy_arguments(hidden, weight, target, **options)
    spec = linear_cross_entropy_spec(*arguments)
    check_classes("linear_cross_entropy", target, spec.loss, hidden, weight.shape[0])
    return spec, hidden.device


_SPEC_OF: dict[Callable, Callable] = {
    attention: _attention_spec,
    varlen_attention: _varlen_spec,
    scaled_dot_product_attention: _sdpa_spec,
    layer_norm: _norm_spec("layer_norm"),
    rms_norm: _norm_spec("rms_norm"),
    softmax: _softmax_spec("softmax"),
    log_softmax: _softmax_spec("log_softmax"),
    swiglu: _gated_spec("swiglu"),
    geglu: _gated_spec("geglu"),
    dropout_add: _dropout_add_spec,
    rotary_embedding: _rotary_spec,
    cross_entropy: _cross_entropy_spec,
    linear_cross_entropy: _linear_cross_entropy_spec,
}
