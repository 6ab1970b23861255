"""torch's own fused functions, where they compute exactly what the spec says; the reference elsewhere.

torch's attention multiplies a masked probability 0 with whatever v holds, so a NaN or inf behind a mask leaks
(0 · NaN = NaN), in the backward also from k and q. With a mask it therefore serves only when the inputs can be looked at
and are finite: CPU tensors in ordinary eager mode. On a GPU a look would stop the stream.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.backends import reference
from fastattn.reference.attention import visible_keys
from fastattn.spec import AttentionSpec, NormSpec, SoftmaxSpec
from fastattn.tracing import is_plain

NAME = "eager"
COMPOSITE = True

_layer_norm = torch.layer_norm  # what F.layer_norm calls, without its Python wrapper
_sdpa = torch._C._nn.scaled_dot_product_attention


def available(device: torch.device) -> str | None:
    return None


def unsupported(spec: AttentionSpec | NormSpec | SoftmaxSpec, device: torch.device) -> str | None:
    return None


def describe(spec: AttentionSpec | NormSpec | SoftmaxSpec, device: torch.device) -> str:
    if isinstance(spec, AttentionSpec):
        if feature := _beyond_sdpa(spec, device):
            return f"reference operations: torch's scaled_dot_product_attention has no {feature}"
        if spec.windowed or spec.mask:
            return (
                "torch scaled_dot_product_attention where q, k and v are seen to be finite, else reference operations"
                if device.type == "cpu"
                else "reference operations: torch's scaled_dot_product_attention leaks what a mask hides"
            )
        return "torch scaled_dot_product_attention"
    if isinstance(spec, SoftmaxSpec):
        return "torch softmax" if _plain_softmax(spec) else "reference operations: torch's softmax has no mask and no scale"
    return "torch layer_norm" if _plain_layer_norm(spec) else "reference operations: weight dtype differs from x's"


def _beyond_sdpa(spec: AttentionSpec, device: torch.device) -> str | None:
    """The first feature that torch's function does not have, or does not compute by our definition."""
    if spec.softcap is not None:
        return "softcap"
    if spec.alibi:
        return "alibi_slopes"
    if spec.sinks:
        return "sinks"
    if spec.dropout_p > 0.0:
        return "keyed dropout"
    if spec.bias and (spec.windowed or spec.mask):
        return "bias and mask together"
    if spec.deterministic and device.type != "cpu":
        return "deterministic backward"
    return None


def _all_finite(*tensors: Tensor) -> bool:
    return all(math.isfinite(t.sum(dtype=torch.promote_types(t.dtype, torch.float32)).item()) for t in tensors)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    want_lse: bool = False,
    **features: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    masked = spec.windowed or spec.mask
    if not (
        want_lse
        or _beyond_sdpa(spec, q.device)
        or (masked and not (q.device.type == "cpu" and is_plain(q, k, v) and _all_finite(q, k, v)))
        or (bias is not None and bias.dtype != q.dtype)
        or q.numel() == 0
        or k.numel() == 0
        or v.numel() == 0
    ):
        S_q, S_k = q.shape[2], k.shape[2]
        causal = spec.left is None and spec.right == 0 and not spec.mask and spec.shift(S_q, S_k) == 0
        attn_mask = visible_keys(spec, S_q, S_k, mask, q.device) if masked and not causal else bias
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*q.shape[:2], S_q, S_k)
        return _sdpa(q, k, v, attn_mask, 0.0, causal, scale=spec.scale, enable_gqa=spec.G > 1), None
    return reference.attention(q, k, v, spec, bias=bias, mask=mask, **features)


def _plain_layer_norm(spec: NormSpec) -> bool:
    return spec.weight_dtype in (None, spec.dtype) and spec.bias_dtype in (None, spec.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: NormSpec) -> Tensor:
    if _plain_layer_norm(spec):
        return _layer_norm(x, x.shape[-spec.n_dims :], weight, bias, spec.eps)
    return reference.layer_norm(x, weight, bias, spec)


def _plain_softmax(spec: SoftmaxSpec) -> bool:
    return not spec.mask and not spec.causal and spec.scale == 1.0


def softmax(x: Tensor, mask: Tensor | None, spec: SoftmaxSpec) -> Tensor:
    if not _plain_softmax(spec):
        return reference.softmax(x, mask, spec)
    return torch.log_softmax(x, spec.dim) if spec.log else torch.softmax(x, spec.dim)
