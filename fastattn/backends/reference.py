"""The oracle as a backend: every feature, on every device, holding the whole S_q × S_k matrix."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fastattn.reference.attention import attention as _attention
from fastattn.reference.attention import padded_attention
from fastattn.reference.layer_norm import layer_norm as _layer_norm
from fastattn.reference.softmax import softmax as _softmax
from fastattn.reference.softmax import softmax_gradient as _softmax_gradient
from fastattn.reference.softmax import softmax_tangent as _softmax_tangent
from fastattn.spec import AttentionInputs, AttentionSpec, NormSpec, SoftmaxSpec

NAME = "reference"
COMPOSITE = True


def available(device: torch.device) -> str | None:
    return None


def unsupported(spec: AttentionSpec | NormSpec | SoftmaxSpec, device: torch.device) -> str | None:
    return None


def describe(spec: AttentionSpec | NormSpec | SoftmaxSpec, device: torch.device) -> str:
    return "plain torch operations, unfused"


def attention(
    x: AttentionInputs,
    spec: AttentionSpec,
    return_lse: bool = False,
    max_seqlens: Sequence[int | Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """o and lse; packed sequences are padded to `max_seqlens`, or where these are not ints to what the lengths say."""
    q, k, v, bias, mask, alibi_slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k, qk_scales, v_scales = x
    call: dict[str, Any] = {"bias": bias, "mask": mask, "alibi_slopes": alibi_slopes, "sinks": sinks, "seed": seed}
    call |= {"qk_scales": qk_scales, "v_scales": v_scales}
    with torch.autocast(q.device.type, enabled=False) if torch._C._is_any_autocast_enabled() else nullcontext():
        if cu_seqlens_q is None or cu_seqlens_k is None:
            return _attention(q, k, v, spec, **call)
        max_q, max_k = max_seqlens or (None, None)
        longest = _longest(cu_seqlens_q, max_q), _longest(cu_seqlens_k, max_k)
        return padded_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, longest, spec, **call)


def _longest(cu_seqlens: Tensor, max_seqlen: int | Tensor | None) -> int:
    """What sequences are padded to; without an int it is read from the lengths, on the host."""
    if isinstance(max_seqlen, (int, torch.SymInt)):
        return max_seqlen
    return int(cu_seqlens.diff().amax()) if len(cu_seqlens) > 1 else 0


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: NormSpec) -> Tensor:
    return _layer_norm(x, x.shape[-spec.n_dims :], weight, bias, spec.eps)


def softmax(x: Tensor, mask: Tensor | None, spec: SoftmaxSpec) -> Tensor:
    return _softmax(x, mask=mask, **_options(spec))


def softmax_gradient(dy: Tensor, y: Tensor, mask: Tensor | None, spec: SoftmaxSpec) -> Tensor:
    return _softmax_gradient(dy, y, mask, **_options(spec))


def softmax_tangent(dx: Tensor, y: Tensor, mask: Tensor | None, spec: SoftmaxSpec) -> Tensor:
    return _softmax_tangent(dx, y, mask, **_options(spec))


def _options(spec: SoftmaxSpec) -> dict[str, Any]:
    names = ("dim", "scale", "causal", "top_left", "log")
    return {name: getattr(spec, name) for name in names}
