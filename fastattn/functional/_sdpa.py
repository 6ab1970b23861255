"""torch's scaled_dot_product_attention, in its own names."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from fastattn import _arguments as check
from fastattn.errors import FastattnError
from fastattn.functional._attention import attention


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
        attn_mask: broadcastable to (…, S_q, S_k): bool, True = attend, or floating, added to the scores; or what
            torch.nn.attention.bias's causal_upper_left and causal_lower_right return.
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
    arguments, lead = sdpa_arguments(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    try:
        o = attention(**arguments)
    except FastattnError as error:
        raise in_sdpa_names(error) from None
    return o if lead is None else o.reshape(*lead, *o.shape[-2:])


def in_sdpa_names(error: FastattnError) -> FastattnError:
    """The same error, in the names that the caller of scaled_dot_product_attention knows."""
    names = {"q": "query", "k": "key", "v": "value", "mask": "attn_mask", "bias": "attn_mask"}
    message = re.sub(r"`(\w+)`", lambda match: f"`{names.get(match[1], match[1])}`", str(error))
    return type(error)(f"scaled_dot_product_{message}")


def sdpa_arguments(
    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
) -> tuple[dict[str, Any], tuple | None]:
    """-> (keywords of `attention`, leading dimensions of the result, None when they are (B, H))."""
    fn = "scaled_dot_product_attention"
    for name, t in (("query", query), ("key", key), ("value", value)):
        if not isinstance(t, Tensor) or t.layout is not torch.strided:
            check.check_tensor(fn, name, t)
    is_causal = check.check_bool(fn, "is_causal", is_causal)
    enable_gqa = check.check_bool(fn, "enable_gqa", enable_gqa)
    causal: Any = "top_left" if is_causal else False
    if attn_mask is not None:
        if check.is_causal_bias(attn_mask):
            causal, attn_mask = causal_of(fn, attn_mask, query, key, is_causal), None
        else:
            check.check_tensor(fn, "attn_mask", attn_mask, optional=True)
            check.check_float_dtype(fn, "attn_mask", attn_mask.dtype, also=(torch.bool,))
    lead = None
    if not query.dim() == key.dim() == value.dim() == 4 or not query.shape[0] == key.shape[0] == value.shape[0]:
        query, key, value, attn_mask, lead = _four_dims(fn, query, key, value, attn_mask, enable_gqa)
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise check.ArgumentError(
            f"{fn}: `query` has {query.shape[1]} heads and `key` has {key.shape[1]}; "
            "they must be equal unless enable_gqa=True."
        )
    arguments: dict[str, Any] = {"q": query, "k": key, "v": value, "dropout_p": dropout_p, "scale": scale}
    if attn_mask is not None:
        arguments["mask" if attn_mask.dtype == torch.bool else "bias"] = attn_mask
    if causal:
        arguments["causal"] = causal
    return arguments, lead


def causal_of(fn: str, bias: Any, query: Tensor, key: Tensor, is_causal: bool) -> str:
    """Return the alignment that a torch.nn.attention.bias.CausalBias stands for; it holds no numbers."""
    if is_causal:
        raise check.ArgumentError(
            f"{fn}: CausalBias should not be used with causal=True: `attn_mask` is one, so `is_causal` must be False."
        )
    if (bias.seq_len_q, bias.seq_len_kv) != (query.shape[-2], key.shape[-2]):
        raise check.ArgumentError(
            f"{fn}: `attn_mask` is a CausalBias for {bias.seq_len_q} queries and {bias.seq_len_kv} keys; `query` has "
            f"{query.shape[-2]} and `key` has {key.shape[-2]}."
        )
    return "top_left" if bias.variant.name == "UPPER_LEFT" else "bottom_right"


def _four_dims(fn: str, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool):
    """Any leading dimensions, broadcast against each other, as (B, H)."""
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() < 2:
            raise check.ArgumentError(
                f"{fn}: `{name}` has shape {tuple(t.shape)}; it must have at least two dimensions."
            )
    longest = max(query.dim(), key.dim(), value.dim())
    has_heads = longest > 3 or (longest == 3 and enable_gqa)
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
