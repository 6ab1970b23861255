"""Which backend would serve a call, and why."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from fastattn import _arguments as check
from fastattn import backends
from fastattn.backends import Explanation
from fastattn.errors import ArgumentTypeError, FastattnError, kind
from fastattn.functional._attention import attention, varlen_attention
from fastattn.functional._plan import autocast
from fastattn.functional._rows import check_norm_tensors, check_softmax_mask, facts, layer_norm, log_softmax, softmax
from fastattn.functional._sdpa import in_sdpa_names, scaled_dot_product_attention, sdpa_arguments


def explain(fn: Callable, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend would serve `fn(*args, **kwargs)`, with which configuration, and why each other was passed over.

    Args:
        fn: a public function of fastattn (`attention`, `varlen_attention`, `scaled_dot_product_attention`,
            `layer_norm`, `softmax`, `log_softmax`).
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
    spec, device = specs(**bound.arguments)
    return backends.explain(spec, device, bound.arguments.get("backend"))


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
    return spec, q.device


def _varlen_spec(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, causal, **options):
    sequences = check.sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if causal is True:
        causal = check.packed_alignment(cu_seqlens_q, cu_seqlens_k)
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


def _layer_norm_spec(x, normalized_shape, weight, bias, eps, residual, dropout_p, backend):
    check_norm_tensors(x, weight, bias)
    check.refuse("layer_norm", residual=(residual, None), dropout_p=(dropout_p, 0.0))
    row = check.row_shape("layer_norm", normalized_shape)
    return check.norm_spec("layer_norm", x.shape, x.dtype, x.device, row, (facts(weight), facts(bias)), eps), x.device


def _softmax_spec(fn):
    def spec(x, dim, scale, mask, causal, backend):
        check.check_tensor(fn, "x", x)
        if mask is not None:
            check_softmax_mask(fn, x, mask)
        return check.softmax_spec(fn, x.shape, x.dtype, dim, scale, causal, mask is not None), x.device

    return spec


_SPEC_OF: dict[Callable, Callable] = {
    attention: _attention_spec,
    varlen_attention: _varlen_spec,
    scaled_dot_product_attention: _sdpa_spec,
    layer_norm: _layer_norm_spec,
    softmax: _softmax_spec("softmax"),
    log_softmax: _softmax_spec("log_softmax"),
}
