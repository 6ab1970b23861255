"""The oracle as a backend: every feature, on every device, holding the whole S_q × S_k matrix."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fastattn.reference.attention import attention as _attention
from fastattn.reference.attention import padded_attention
from fastattn.reference.cross_entropy import cross_entropy as _cross_entropy
from fastattn.reference.dropout import row_dropout
from fastattn.reference.gated import gated as _gated
from fastattn.reference.norm import add_residual as _add_residual
from fastattn.reference.norm import norm as _norm
from fastattn.reference.norm import statistics as _norm_statistics
from fastattn.reference.rotary import packed_positions, rotate, rows_of_tokens
from fastattn.reference.softmax import softmax as _softmax
from fastattn.reference.softmax import softmax_gradient as _softmax_gradient
from fastattn.reference.softmax import softmax_tangent as _softmax_tangent
from fastattn.spec import (
    AttentionInputs,
    AttentionSpec,
    CrossEntropySpec,
    DropoutAddSpec,
    GatedSpec,
    LinearCrossEntropySpec,
    NormSpec,
    RotarySpec,
    SoftmaxSpec,
    Spec,
)
from fastattn.tracing import is_plain

NAME = "reference"
COMPOSITE = True


def available(device: torch.device) -> str | None:
    return None


def unsupported(spec: Spec, device: torch.device) -> str | None:
    return None


def describe(spec: Spec, device: torch.device) -> str:
    return "plain torch operations, unfused"


def attention(
    x: AttentionInputs,
    spec: AttentionSpec,
    return_lse: bool = False,
    max_seqlens: Sequence[int | Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """o and lse; packed sequences are padded to what the lengths say, or to `max_seqlens` where nobody may look."""
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
    """What sequences are padded to: the longest where lengths can be read without a wait, or nobody gives a bound."""
    readable = cu_seqlens.is_cpu and is_plain(cu_seqlens)
    if isinstance(max_seqlen, (int, torch.SymInt)) and not readable:
        return max_seqlen
    return int(cu_seqlens.diff().amax()) if len(cu_seqlens) > 1 else 0


def add_residual(x: Tensor, residual: Tensor | None, seed: Tensor | None, spec: NormSpec) -> Tensor:
    return _add_residual(x, residual, seed, spec.dropout_p, spec.n_dims)


def norm(h: Tensor, weight: Tensor | None, bias: Tensor | None, spec: NormSpec) -> Tensor:
    return _norm(
        h, h.shape[-spec.n_dims :], weight, bias, spec.eps,
        rms=spec.rms, weight_offset=spec.weight_offset, out_dtype=spec.out_dtype or spec.dtype,
    )  # fmt: skip


def norm_statistics(h: Tensor, spec: NormSpec) -> Tensor:
    return _norm_statistics(h, spec.n_dims, spec.eps, spec.rms)


def dropped_gradient(dresidual: Tensor, seed: Tensor | None, spec: NormSpec) -> Tensor:
    """dx from dresidual: what `add_residual` dropped has no gradient."""
    if seed is None:
        return dresidual.to(spec.dtype)
    dtype = torch.promote_types(dresidual.dtype, torch.float32)
    return row_dropout(dresidual.to(dtype), seed, spec.dropout_p, spec.n_dims).to(spec.dtype)


def softmax(x: Tensor, mask: Tensor | None, spec: SoftmaxSpec) -> Tensor:
    return _softmax(x, mask=mask, **_options(spec))


def softmax_gradient(dy: Tensor, y: Tensor, mask: Tensor | None, spec: SoftmaxSpec) -> Tensor:
    return _softmax_gradient(dy, y, mask, **_options(spec))


def softmax_tangent(dx: Tensor, y: Tensor, mask: Tensor | None, spec: SoftmaxSpec) -> Tensor:
    return _softmax_tangent(dx, y, mask, **_options(spec))


def _options(spec: SoftmaxSpec) -> dict[str, Any]:
    names = ("dim", "scale", "causal", "top_left", "log")
    return {name: getattr(spec, name) for name in names}


def gated(gate: Tensor, up: Tensor, spec: GatedSpec) -> Tensor:
    return _gated(gate, up, spec.activation)


def rotary_embedding(
    x: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    spec: RotarySpec,
    inverse: bool = False,
) -> tuple[Tensor, ...]:
    """Each of x, (B, H, S, D) or packed (T, H, D), rotated; or back, which is the gradient."""
    packed = x[0].dim() == 3
    turned = None
    if cu_seqlens is not None:
        position_ids, turned = packed_positions(cu_seqlens, x[0].shape[0])
    if cos.dim() == 2:
        S = x[0].shape[0 if packed else 2]
        cos, sin = (rows_of_tokens(table, S, position_ids) for table in (cos, sin))
    heads = -2 if packed else -3
    cos, sin = cos.unsqueeze(heads), (-sin if inverse else sin).unsqueeze(heads)  # (…, 1, S, R/2) or (T, 1, R/2)
    rotated = tuple(rotate(t, cos, sin, spec.interleaved) for t in x)
    if turned is None:
        return rotated
    return tuple(torch.where(turned[:, None, None], y, t) for y, t in zip(rotated, x, strict=True))


def cross_entropy(logits: Tensor, target: Tensor, weight: Tensor | None, spec: CrossEntropySpec) -> Tensor:
    names = ("ignore_index", "reduction", "label_smoothing", "z_loss", "softcap", "loss_dtype")
    with torch.autocast(logits.device.type, enabled=False) if torch._C._is_any_autocast_enabled() else nullcontext():
        return _cross_entropy(logits, target, weight, **{name: getattr(spec, name) for name in names})


def dropout_add(residual: Tensor, x: Tensor, seed: Tensor | None, spec: DropoutAddSpec) -> Tensor:
    return _add_residual(x, residual, seed, spec.dropout_p, 1)


def dropout_add_gradient(dy: Tensor, seed: Tensor, spec: DropoutAddSpec) -> Tensor:
    """dx from dy: what was dropped has no gradient."""
    return row_dropout(dy.to(torch.promote_types(dy.dtype, torch.float32)), seed, spec.dropout_p).to(spec.x_dtype)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    spec: LinearCrossEntropySpec,
) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False) if torch._C._is_any_autocast_enabled() else nullcontext():
        logits = torch.nn.functional.linear(hidden, weight, bias)
    return cross_entropy(logits, target, class_weight, spec.loss)
