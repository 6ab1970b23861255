"""The public functions: what each computes, what it accepts, and the way to the backend that serves it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from fastattn import _arguments as check
from fastattn import backends
from fastattn.backends import Explanation
from fastattn.errors import ArgumentTypeError, FastattnError, kind
from fastattn.ops.attention import attention as attention_op
from fastattn.ops.layer_norm import layer_norm as layer_norm_op
from fastattn.ops.softmax import softmax as softmax_op
from fastattn.spec import AttentionSpec, NormSpec, SoftmaxSpec

_PLANS = 4096  # checked calls that are remembered, by shapes, dtypes and options


def _cached(plan: Callable) -> Callable:
    """Remember the answers of `plan` in eager mode; a compiler traces it afresh and guards on what it reads."""
    cached = lru_cache(_PLANS, typed=True)(plan)  # typed: 1 is not True

    def lookup(*args):
        if torch.compiler.is_compiling():
            return plan(*args)
        try:
            return cached(*args)
        except ArgumentTypeError:
            raise
        except TypeError:  # an argument that cannot be hashed is a wrong one; the plan says which
            return plan(*args)

    return lookup


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to the ambient autocast dtype, as torch does for scaled_dot_product_attention."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


@_cached
def _attention_plan(
    backend, q_shape, k_shape, v_shape, q_dtype, k_dtype, v_dtype, q_device, k_device, v_device,
    causal, left, right, scale, softcap, dropout_p, deterministic, *present,
) -> tuple[ModuleType, AttentionSpec]:  # fmt: skip
    spec = check.attention_spec(
        (q_shape, k_shape, v_shape), (q_dtype, k_dtype, v_dtype), (q_device, k_device, v_device),
        causal, (left, right), scale, softcap, dropout_p, deterministic, present,
    )  # fmt: skip
    return backends.select(spec, q_device, backend), spec


class AttentionOptions(TypedDict, total=False):
    """The keywords of `attention` other than `return_lse`, which decides its type."""

    causal: bool | str
    window: tuple[int | None, int | None] | None
    scale: float | None
    bias: Tensor | None
    mask: Tensor | None
    alibi_slopes: Tensor | None
    softcap: float | None
    sinks: Tensor | None
    dropout_p: float
    deterministic: bool
    backend: str | None


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = False, **options: Unpack[AttentionOptions]
) -> Tensor: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Unpack[AttentionOptions]
) -> tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention, fused: the S_q × S_k matrix is never held.

        s = q kᵀ · scale → softcap → + bias + ALiBi → mask;   p = softmax(s, with sinks);   o = dropout(p) v

    Args:
        q: (B, H, S_q, D), float16, bfloat16, float32 or float64, any strides.
        k: (B, H_kv, S_k, D), dtype and device of q. H must be a multiple of H_kv: head h reads head h // (H / H_kv).
        v: (B, H_kv, S_k, D_v). D_v may differ from D.
        causal: False; True (S_q == S_k); "top_left" (row i sees keys j ≤ i) or "bottom_right" (j ≤ i + S_k − S_q).
        window: (left, right), None for unbounded: row i also sees only diag − left ≤ j ≤ diag + right, with
            diag = i + S_k − S_q, or i if causal="top_left".
        scale: factor on q kᵀ; D^-½ if None.
        bias: floating, broadcastable to (B, H, S_q, S_k), added to the scaled score; differentiable.
        mask: bool, broadcastable to (B, H, S_q, S_k), True = attend.
        alibi_slopes: (H,) or (B, H): adds −slope · |i + S_k − S_q − j|; differentiable.
        softcap: c > 0: the scaled score becomes c · tanh(s / c).
        sinks: (H,): one more logit per head in the denominator, not scaled, without a value; differentiable.
        dropout_p: probability with which an entry of p is dropped; keyed by (seed, b, h, row, column), the seed drawn
            from torch's default generator.
        return_lse: also return lse; it is differentiable too.
        deterministic: the same bits on every run, backward included.
        backend: one of "triton", "eager", "reference", which then never falls back; None: the first that can.

    Returns:
        o (B, H, S_q, D_v) in q's dtype; with `return_lse` also lse (B, H, S_q) in float32 (float64 for float64
        inputs), the natural log of Σ_j exp s_j. A row that sees no key has o = 0, lse = −inf and zero gradients.

    Raises:
        ArgumentTypeError, ArgumentError: an argument of the wrong type, dtype, shape or device.
        UnsupportedError: the backend asked for cannot compute this combination; the message names what is missing.

    Source: Vaswani et al., "Attention Is All You Need" (2017); Dao et al., "FlashAttention" (2022).

    Example:
        >>> q, k, v = (torch.randn(2, 4, 16, 32) for _ in range(3))
        >>> attention(q, k, v, causal=True).shape
        torch.Size([2, 4, 16, 32])
    """
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor) or t.layout is not torch.strided:
            check.check_tensor("attention", name, t)
    if torch._C._is_any_autocast_enabled():
        q, k, v = _autocast(q, k, v)
    left, right = (None, None) if window is None else check.window_sides("attention", window)
    run, spec = _attention_plan(
        backend, q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device,
        causal, left, right, scale, softcap, dropout_p, deterministic,
        bias is not None, mask is not None, alibi_slopes is not None, sinks is not None,
    )  # fmt: skip
    if spec.bias or spec.mask or spec.alibi or spec.sinks:
        check.check_attention_features(q, k, bias, mask, alibi_slopes, sinks)
    seed = torch.randint(2**63 - 1, (), device=q.device) if spec.dropout_p > 0.0 else None
    if run.COMPOSITE:
        o, lse = run.attention(q, k, v, spec, return_lse, bias, mask, alibi_slopes, sinks, seed)
    else:
        if bias is not None and bias.dim() < 4:
            bias = bias[(None,) * (4 - bias.dim())]
        if mask is not None and mask.dim() < 4:
            mask = mask[(None,) * (4 - mask.dim())]
        o, lse = attention_op((q, k, v, bias, mask, alibi_slopes, sinks, seed, None, None), spec, run.NAME)
    return (o, lse) if return_lse else o


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, with the same arguments, served by `attention`.

        o = dropout(softmax(query keyᵀ · scale + mask)) value

    Args:
        query: (…, S_q, D); with `enable_gqa` (…, H, S_q, D).
        key: (…, S_k, D); with `enable_gqa` (…, H_kv, S_k, D), H a multiple of H_kv.
        value: (…, S_k, D_v).
        attn_mask: broadcastable to (…, S_q, S_k): bool, True = attend, or floating, added to the scores.
        dropout_p: dropout on the attention weights; applied whenever it is not 0.
        is_causal: row i sees keys j ≤ i, also for S_q ≠ S_k (torch aligns top-left). Unlike torch's function, it may
            be combined with `attn_mask`.
        scale: factor on the scores; D^-½ if None.
        enable_gqa: without it, query and key must have the same number of heads.

    Returns:
        o (…, S_q, D_v). Rows that see no key are 0.

    Raises:
        ArgumentTypeError, ArgumentError: as `attention`.

    Source: torch.nn.functional.scaled_dot_product_attention.

    Example:
        >>> q = torch.randn(2, 4, 16, 32)
        >>> scaled_dot_product_attention(q, q, q, is_causal=True).shape
        torch.Size([2, 4, 16, 32])
    """
    arguments, lead = _sdpa_arguments(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    try:
        o = attention(**arguments)
    except FastattnError as error:
        raise _in_sdpa_names(error) from None
    return o if lead is None else o.reshape(*lead, *o.shape[-2:])


def _in_sdpa_names(error: FastattnError) -> FastattnError:
    """The same error, in the names that the caller of scaled_dot_product_attention knows."""
    names = {"q": "query", "k": "key", "v": "value", "mask": "attn_mask", "bias": "attn_mask"}
    message = re.sub(r"`(\w+)`", lambda match: f"`{names.get(match[1], match[1])}`", str(error))
    return type(error)(f"scaled_dot_product_{message}")


def _sdpa_arguments(
    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
) -> tuple[dict[str, Any], tuple | None]:
    """-> (keywords of `attention`, leading dimensions of the result, None when they are (B, H))."""
    fn = "scaled_dot_product_attention"
    for name, t in (("query", query), ("key", key), ("value", value)):
        if not isinstance(t, Tensor) or t.layout is not torch.strided:
            check.check_tensor(fn, name, t)
    if attn_mask is not None:
        check.check_tensor(fn, "attn_mask", attn_mask, optional=True)
        check.check_float_dtype(fn, "attn_mask", attn_mask.dtype, also=(torch.bool,))
    check.check_bool(fn, "is_causal", is_causal)
    check.check_bool(fn, "enable_gqa", enable_gqa)
    lead = None
    if not query.dim() == key.dim() == value.dim() == 4 or query.shape[0] != key.shape[0]:
        query, key, value, attn_mask, lead = _four_dims(fn, query, key, value, attn_mask)
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise check.ArgumentError(
            f"{fn}: `query` has {query.shape[1]} heads and `key` has {key.shape[1]}; "
            "they must be equal unless enable_gqa=True."
        )
    arguments: dict[str, Any] = {"q": query, "k": key, "v": value, "dropout_p": dropout_p, "scale": scale}
    if attn_mask is not None:
        arguments["mask" if attn_mask.dtype == torch.bool else "bias"] = attn_mask
    if is_causal:
        arguments["causal"] = "top_left"
    return arguments, lead


def _four_dims(fn: str, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None):
    """Any leading dimensions, broadcast against each other, as (B, H)."""
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() < 2:
            raise check.ArgumentError(
                f"{fn}: `{name}` has shape {tuple(t.shape)}; it must have at least two dimensions."
            )
    has_heads = max(query.dim(), key.dim(), value.dim()) > 3
    n_last = 3 if has_heads else 2
    try:
        lead = torch.broadcast_shapes(query.shape[:-n_last], key.shape[:-n_last], value.shape[:-n_last])
    except RuntimeError:
        shapes = ", ".join(str(tuple(t.shape)) for t in (query, key, value))
        raise check.ArgumentError(
            f"{fn}: the leading dimensions of `query`, `key` and `value` do not broadcast: {shapes}."
        ) from None

    def shaped(t: Tensor) -> Tensor:
        t = t.expand(*lead, *t.shape[-n_last:])
        return t.reshape(-1, *t.shape[-n_last:]) if has_heads else t.reshape(-1, 1, *t.shape[-2:])

    full = (*lead, query.shape[-3]) if has_heads else lead
    if attn_mask is not None:
        target = (*full, query.shape[-2], key.shape[-2])
        check.check_broadcast(fn, "attn_mask", attn_mask.shape, target, "(…, S_q, S_k)")
        attn_mask = attn_mask.expand(target)
        attn_mask = attn_mask.reshape(-1, full[-1] if has_heads else 1, *attn_mask.shape[-2:])
    return shaped(query), shaped(key), shaped(value), attn_mask, full


@_cached
def _norm_plan(backend, fn, x_shape, x_dtype, x_device, weight, bias, eps, *row) -> tuple[ModuleType, NormSpec]:
    spec = check.norm_spec(fn, x_shape, x_dtype, x_device, row, (weight, bias), eps)
    return backends.select(spec, x_device, backend), spec


def _facts(t: Tensor | None) -> Any:
    """What a plan depends on: (shape, dtype, device), or None for an absent tensor."""
    return None if t is None else (t.shape, t.dtype, t.device)


def layer_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Layer normalisation over the last dimensions, statistics in float32 whatever x's dtype.

        y = (x − mean) / √(var + eps) · weight + bias,   var = mean of (x − mean)²

    Args:
        x: (…, *normalized_shape), float16, bfloat16, float32 or float64, any strides.
        normalized_shape: the last dimensions of x, an integer for one.
        weight: normalized_shape, or None for 1; its dtype may differ from x's.
        bias: normalized_shape, or None for 0.
        eps: added to the variance.
        residual, dropout_p: not implemented yet; refused by name.
        backend: one of "triton", "eager", "reference", which then never falls back; None: the first that can.

    Returns:
        y, shape and dtype of x (float32 under CUDA autocast, as torch's).

    Raises:
        ArgumentTypeError, ArgumentError: an argument of the wrong type, dtype, shape or device.
        UnsupportedError: a backend was asked for that cannot compute it, or a keyword that is not implemented.

    Source: Ba, Kiros, Hinton, "Layer Normalization" (2016); torch.nn.functional.layer_norm.

    Example:
        >>> layer_norm(torch.randn(4, 16), 16, torch.ones(16)).shape
        torch.Size([4, 16])
    """
    _check_norm_tensors(x, weight, bias)
    if residual is not None or not isinstance(dropout_p, (int, float)) or dropout_p != 0.0:
        check.refuse("layer_norm", residual=(residual, None), dropout_p=(dropout_p, 0.0))
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        x, weight, bias = x.float(), None if weight is None else weight.float(), None if bias is None else bias.float()
    if type(normalized_shape) is not tuple:
        normalized_shape = check.row_shape("layer_norm", normalized_shape)
    run, spec = _norm_plan(
        backend, "layer_norm", x.shape, x.dtype, x.device, _facts(weight), _facts(bias), eps, *normalized_shape
    )
    if run.COMPOSITE:
        return run.layer_norm(x, weight, bias, spec)
    y, _, _ = layer_norm_op((x, weight, bias), spec, run.NAME)
    return y


def _check_norm_tensors(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    if not isinstance(x, Tensor) or x.layout is not torch.strided:
        check.check_tensor("layer_norm", "x", x)
    if weight is not None and not isinstance(weight, Tensor):
        check.check_tensor("layer_norm", "weight", weight, optional=True)
    if bias is not None and not isinstance(bias, Tensor):
        check.check_tensor("layer_norm", "bias", bias, optional=True)


@_cached
def _softmax_plan(device, backend, *spec_args) -> tuple[ModuleType, SoftmaxSpec]:
    spec = check.softmax_spec(*spec_args)
    return backends.select(spec, device, backend), spec


def _softmax(
    fn: str, x: Tensor, dim: int, scale: float, mask: Tensor | None, causal: bool | str, backend: str | None
) -> Tensor:
    if not isinstance(x, Tensor) or x.layout is not torch.strided:
        check.check_tensor(fn, "x", x)
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        x = x.float()
    run, spec = _softmax_plan(x.device, backend, fn, x.shape, x.dtype, dim, scale, causal, mask is not None)
    if mask is not None:
        mask = _softmax_mask(fn, x, mask)
    if run.COMPOSITE:
        return run.softmax(x, mask, spec)
    (y,) = softmax_op((x, mask), spec, run.NAME)
    return y


def _softmax_mask(fn: str, x: Tensor, mask: Tensor) -> Tensor:
    """The mask, checked, with as many dimensions as x."""
    check.check_tensor(fn, "mask", mask, optional=True)
    if mask.dtype != torch.bool:
        raise ArgumentTypeError(
            f"{fn}: `mask` has dtype {check.dtype_name(mask.dtype)}; it must be bool, True for an entry that counts."
        )
    check.check_same_device(fn, "mask", mask.device, "x", x.device)
    check.check_broadcast(fn, "mask", mask.shape, x.shape, "the shape of x")
    return mask[(None,) * (x.dim() - mask.dim())]


def softmax(
    x: Tensor,
    dim: int = -1,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    causal: bool | str = False,
    backend: str | None = None,
) -> Tensor:
    """Softmax of scale · x over one dimension, of the entries that a mask lets through.

        y_j = m_j exp(scale · x_j) / Σ_l m_l exp(scale · x_l)

    Args:
        x: any shape and strides, float16, bfloat16, float32 or float64; the arithmetic is in at least float32.
        dim: the dimension that sums to 1.
        scale: factor on x.
        mask: bool, broadcastable to x, True for an entry that counts.
        causal: for x (…, S_q, S_k) and dim=-1: False; True (S_q == S_k); "top_left" (row i counts j ≤ i) or
            "bottom_right" (j ≤ i + S_k − S_q).
        backend: one of "triton", "eager", "reference", which then never falls back; None: the first that can.

    Returns:
        y, shape and dtype of x (float32 under CUDA autocast, as torch's). Masked entries are 0, whatever x holds there;
        a row without entries is all 0, with zero gradients.

    Raises:
        ArgumentTypeError, ArgumentError: an argument of the wrong type, dtype, shape or device.
        UnsupportedError: the backend asked for cannot compute it.

    Source: torch.nn.functional.softmax; Milakov, Gimelshein, "Online normalizer calculation for softmax" (2018).

    Example:
        >>> softmax(torch.zeros(1, 4), mask=torch.tensor([True, True, False, False]))
        tensor([[0.5000, 0.5000, 0.0000, 0.0000]])
    """
    return _softmax("softmax", x, dim, scale, mask, causal, backend)


def log_softmax(
    x: Tensor,
    dim: int = -1,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    causal: bool | str = False,
    backend: str | None = None,
) -> Tensor:
    """The natural logarithm of `softmax`, computed without taking the logarithm of a rounded probability.

        y_j = scale · x_j − log Σ_l m_l exp(scale · x_l),   −inf where m_j = 0

    Args, Raises: as `softmax`.

    Returns:
        y, shape and dtype of x; −inf for masked entries, with zero gradients.

    Source: torch.nn.functional.log_softmax.

    Example:
        >>> log_softmax(torch.zeros(1, 2))
        tensor([[-0.6931, -0.6931]])
    """
    return _softmax("log_softmax", x, dim, scale, mask, causal, backend)


def explain(fn: Callable, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend would serve `fn(*args, **kwargs)`, with which configuration, and why each other was passed over.

    Args:
        fn: a public function of fastattn (`attention`, `scaled_dot_product_attention`, `layer_norm`, `softmax`,
            `log_softmax`).
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
    backend,
):  # fmt: skip
    for name, t in (("q", q), ("k", k), ("v", v)):
        check.check_tensor("attention", name, t)
    tensors = _autocast(q, k, v)
    features = (bias, mask, alibi_slopes, sinks)
    spec = check.attention_spec(
        tuple(t.shape for t in tensors), tuple(t.dtype for t in tensors), tuple(t.device for t in tensors),
        causal, window, scale, softcap, dropout_p, deterministic,
        tuple(t is not None for t in features),
    )  # fmt: skip
    check.check_attention_features(q, k, *features)
    return spec, q.device


def _sdpa_spec(**arguments):
    arguments, _ = _sdpa_arguments(**arguments)
    bound = inspect.signature(attention).bind(**arguments)
    bound.apply_defaults()
    try:
        return _attention_spec(**bound.arguments)
    except FastattnError as error:
        raise _in_sdpa_names(error) from None


def _layer_norm_spec(x, normalized_shape, weight, bias, eps, residual, dropout_p, backend):
    _check_norm_tensors(x, weight, bias)
    check.refuse("layer_norm", residual=(residual, None), dropout_p=(dropout_p, 0.0))
    row = check.row_shape("layer_norm", normalized_shape)
    return check.norm_spec("layer_norm", x.shape, x.dtype, x.device, row, (_facts(weight), _facts(bias)), eps), x.device


def _softmax_spec(fn):
    def spec(x, dim, scale, mask, causal, backend):
        check.check_tensor(fn, "x", x)
        if mask is not None:
            _softmax_mask(fn, x, mask)
        return check.softmax_spec(fn, x.shape, x.dtype, dim, scale, causal, mask is not None), x.device

    return spec


_SPEC_OF: dict[Callable, Callable] = {
    attention: _attention_spec,
    scaled_dot_product_attention: _sdpa_spec,
    layer_norm: _layer_norm_spec,
    softmax: _softmax_spec("softmax"),
    log_softmax: _softmax_spec("log_softmax"),
}
