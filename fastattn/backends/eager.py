"""torch's own fused functions, where they compute exactly what the spec says; the reference elsewhere.

torch's attention multiplies a masked probability 0 with whatever v holds, so a NaN or inf behind a mask leaks
(0 · NaN = NaN), in the backward also from k and q. With a mask it therefore serves only when the inputs can be
looked at and are finite: CPU tensors in ordinary eager mode. On a GPU a look would stop the stream.

The backward of its CPU kernel computes p = exp(s - lse) with lse = max + log Σ in float32, which loses log Σ where the
scores are large. The kernel therefore serves a call with a gradient only while lse is small.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastattn.backends import reference
from fastattn.reference.attention import visible_keys
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
from fastattn.tracing import is_plain, known_true

NAME = "eager"
COMPOSITE = True

# torch's layer_norm adds up the gradients of weight and bias in the dtype of x: in these it is given float32.
HALF = (torch.float16, torch.bfloat16)
# torch's layer_norm computes dx = a dy + b x + c. In a row of few numbers the three cancel: over one column dweight,
# which is 0, is off by roundings of Σ dy.
SHORT_ROW = 8

# The largest |lse| for this backward: p is then off by half an ulp of lse, which is 4 roundings to float32
# and 1/32 of a rounding to 16 bits.
LARGEST_LSE = {torch.float32: 16.0, torch.float16: 1024.0, torch.bfloat16: 8192.0}
# Scores of the longest packed sequence above which torch's function, called for each, is sooner done than reference
# operations on all, padded: without a gradient, and with one.
SCORES_OF_A_CALL = 1_024, 16_384
_FLASH = int(torch.nn.attention.SDPBackend.FLASH_ATTENTION.value)

_layer_norm = torch.layer_norm  # what F.layer_norm calls, without its Python wrapper
_rms_norm = torch.rms_norm
_sdpa = torch._C._nn.scaled_dot_product_attention


def available(device: torch.device) -> str | None:
    return None


def unsupported(spec: Spec, device: torch.device) -> str | None:
    return None


def describe(spec: Spec, device: torch.device) -> str:
    if isinstance(spec, ElementwiseSpec):
        return "reference operations: torch has no such fused function"
    if isinstance(spec, AttentionSpec):
        if spec.varlen and _serves_each_sequence(spec, device):
            return (
                "torch scaled_dot_product_attention, one sequence after the other, where their lengths can be read "
                "and are not tiny, else reference operations"
            )
        if feature := _beyond_sdpa(spec, device):
            return f"reference operations: torch's scaled_dot_product_attention has no {feature}"
        small = ", or too large for its gradient" if device.type == "cpu" and spec.dtype in LARGEST_LSE else ""
        if spec.windowed or spec.mask:
            return (
                "torch scaled_dot_product_attention where q, k and v are seen to be finite and lse is not wanted"
                f"{small}, else reference operations"
                if device.type == "cpu"
                else "reference operations: torch's scaled_dot_product_attention leaks what a mask hides"
            )
        condition = f"bias has q's dtype and lse is not wanted{small}" if spec.bias else f"lse is not wanted{small}"
        return f"torch scaled_dot_product_attention where {condition}, else reference operations"
    if isinstance(spec, LinearCrossEntropySpec):
        return f"torch linear, then {describe(spec.loss, device)}, with all logits in memory"
    if isinstance(spec, CrossEntropySpec):
        return (
            "torch cross_entropy"
            if _plain_cross_entropy(spec)
            else "reference operations: torch's cross_entropy has no z_loss, no softcap, one dtype and sums in it"
        )
    if isinstance(spec, SoftmaxSpec):
        return (
            "torch softmax"
            if _plain_softmax(spec)
            else "reference operations: torch's softmax has no mask and no scale"
        )
    feature = _beyond_torch(spec)
    if feature:
        return f"reference operations: {feature}"
    if spec.rms:
        return f"torch {spec.op}"
    in_float32 = " (in float32 where a gradient may be wanted)" if spec.dtype in HALF else ""
    return f"torch {spec.op}{in_float32}; reference operations for rows of fewer than {SHORT_ROW}"


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
    if spec.varlen:
        return "packed sequences"
    if spec.fp8:
        return "8-bit inputs"
    if spec.bias and (spec.windowed or spec.mask):
        return "bias and mask together"
    if spec.scale <= 0.0:  # its CPU kernel scales after a causal mask has put -inf, and -inf · -1 is +inf
        return "scale that is not positive"
    if spec.deterministic and device.type != "cpu":
        return "deterministic backward"
    return None


def _finite(t: Tensor) -> bool:
    return math.isfinite(t.sum(dtype=torch.float32 if t.dtype.itemsize < 4 else None).item())


def _gradient_may_be_wanted(*inputs: Tensor | None) -> bool:
    """True if autograd records a call on these, or a transform or a compiler may differentiate it."""
    if not torch.is_grad_enabled():
        return False
    return not is_plain(*inputs) or any(t is not None and t.requires_grad for t in inputs)


def _nothing_can_leak(*inputs: Tensor) -> bool:
    """Whether the inputs can be looked at, and are finite."""
    return is_plain(*inputs) and inputs[0].is_cpu and all(map(_finite, inputs))


def attention(
    x: AttentionInputs,
    spec: AttentionSpec,
    return_lse: bool = False,
    max_seqlens: Sequence[int | Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    q, k, v, bias, mask = x[:5]
    if spec.varlen and _one_by_one(x, spec):
        return _each_sequence(x, spec, return_lse)
    o = None
    tangents = forward_ad._current_level >= 0  # of which torch's kernels have none
    some = all(known_true(t.shape[2] > 0) and not known_true(t.numel() == 0) for t in (q, k, v))
    if some and not (return_lse or tangents):
        if spec.plain:
            o = _fused(q, k, v, spec)
        elif _beyond_sdpa(spec, q.device) is None:
            S_q, S_k = q.shape[2], k.shape[2]
            if bias is not None:
                if bias.dtype == q.dtype:
                    o = _fused(q, k, v, spec, bias)
            elif _nothing_can_leak(q, k, v):
                if spec.left is None and spec.right == 0 and not spec.mask and S_q == S_k:
                    o = _fused(q, k, v, spec, causal=True)
                else:
                    o = _fused(q, k, v, spec, visible_keys(spec, S_q, S_k, mask, q.device))
    return (o, None) if o is not None else reference.attention(x, spec, return_lse, max_seqlens)


def _serves_each_sequence(spec: AttentionSpec, device: torch.device) -> bool:
    """True if torch's attention has all that packed sequences need, each taken alone."""
    return not (spec.bias or spec.mask) and _beyond_sdpa(replace(spec, varlen=False), device) is None


def _one_by_one(x: AttentionInputs, spec: AttentionSpec) -> bool:
    """True if torch's attention serves each packed sequence and lengths can be read, where padding would cost more."""
    if not _serves_each_sequence(spec, x.q.device):
        return False
    assert x.cu_seqlens_q is not None
    assert x.cu_seqlens_k is not None
    if not (x.cu_seqlens_q.is_cpu and is_plain(*x[:3], x.cu_seqlens_q, x.cu_seqlens_k)) or x.B == 0:
        return False
    longest_q, longest_k = (int(t.diff().amax()) for t in (x.cu_seqlens_q, x.cu_seqlens_k))
    return spec.H * longest_q * longest_k > SCORES_OF_A_CALL[_gradient_may_be_wanted(*x[:3])]


def _each_sequence(x: AttentionInputs, spec: AttentionSpec, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """o (1, H, T_q, D_v) and lse (1, H, T_q), one sequence after the other; rows after the last see nothing."""
    assert x.cu_seqlens_q is not None
    assert x.cu_seqlens_k is not None
    dense = replace(spec, varlen=False)
    left_over = x.q.shape[2] - int(x.cu_seqlens_q[-1])
    o, lse = [], []
    for rows, keys in zip(_slices(x.cu_seqlens_q), _slices(x.cu_seqlens_k), strict=True):
        one = x._replace(q=x.q[:, :, rows], k=x.k[:, :, keys], v=x.v[:, :, keys], cu_seqlens_q=None, cu_seqlens_k=None)
        o_b, lse_b = attention(one, dense, return_lse)
        o.append(o_b)
        if lse_b is not None:
            lse.append(lse_b)
    o.append(x.q.new_zeros(1, spec.H, left_over, spec.D_v))
    if not return_lse:
        return torch.cat(o, 2), None
    lse.append(lse[0].new_full((1, spec.H, left_over), -math.inf))
    return torch.cat(o, 2), torch.cat(lse, 2)


def _slices(cu_seqlens: Tensor) -> list[slice]:
    bounds = cu_seqlens.tolist()
    return [slice(begin, end) for begin, end in itertools.pairwise(bounds)]


def _fused(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, attn_mask: Tensor | None = None, causal: bool = False
) -> Tensor | None:
    """torch's attention; None where the scores are seen to be too large for its gradient."""
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*q.shape[:3], k.shape[2])
    grouped = True if spec.G > 1 else False  # noqa: SIM210 (with dynamic shapes the comparison is symbolic)
    if q.is_cpu and torch.is_grad_enabled() and q.dtype in LARGEST_LSE:
        if not is_plain(q, k, v, attn_mask):
            attn_mask = _without_large_rows(attn_mask)
        elif q.requires_grad or k.requires_grad or v.requires_grad:
            call = q, k, v, attn_mask, 0.0, causal
            if torch._fused_sdp_choice(*call, scale=spec.scale, enable_gqa=grouped) == _FLASH:
                return _flash(q, k, v, attn_mask, causal, spec)
    return _sdpa(q, k, v, attn_mask, 0.0, causal, scale=spec.scale, enable_gqa=grouped)


def _flash(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, causal: bool, spec: AttentionSpec
) -> Tensor | None:
    """What torch's function would call on a CPU, for its lse; None where that is too large."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, q.new_zeros(()), -math.inf)
    o, lse = torch._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=attn_mask, scale=spec.scale
    )
    largest = torch.linalg.vector_norm(lse.detach(), math.inf).item()
    return o if largest <= LARGEST_LSE[q.dtype] else None


def _without_large_rows(attn_mask: Tensor | None) -> Tensor | None:
    """A bias, less the maximum of each row where that is large: the softmax is the same, and its lse is small.

    For tensors whose numbers cannot be looked at. Scores that q and k make large remain so.
    """
    if attn_mask is None or attn_mask.dtype == torch.bool or attn_mask.requires_grad:
        return attn_mask  # with a gradient of its own, torch's kernel is not used
    highest = attn_mask.detach().amax(-1, keepdim=True)
    return attn_mask - torch.where((highest.abs() > LARGEST_LSE[torch.float32]) & highest.isfinite(), highest, 0.0)


def add_residual(x: Tensor, residual: Tensor | None, seed: Tensor | None, spec: NormSpec) -> Tensor:
    if residual is not None and seed is None and spec.dtype == spec.residual_dtype:
        return x + residual
    return reference.add_residual(x, residual, seed, spec)


def _beyond_torch(spec: NormSpec) -> str | None:
    """What torch's layer_norm and rms_norm do not have, or do not compute in float32."""
    if spec.weight_dtype not in (None, spec.dtype) or spec.bias_dtype not in (None, spec.dtype):
        return "weight dtype differs from x's"
    if spec.residual_dtype not in (None, spec.dtype) or spec.out_dtype not in (None, spec.dtype):
        return "residual or result has another dtype than x"
    return "torch's rms_norm has no weight_offset" if spec.weight_offset else None


def norm(h: Tensor, weight: Tensor | None, bias: Tensor | None, spec: NormSpec) -> Tensor:
    if _beyond_torch(spec):
        return reference.norm(h, weight, bias, spec)
    if spec.rms:
        return _rms_norm(h, h.shape[-spec.n_dims :], weight, spec.eps)
    shape = h.shape[-spec.n_dims :]
    if math.prod(shape) < SHORT_ROW:
        return reference.norm(h, weight, bias, spec)
    if h.dtype in HALF and _gradient_may_be_wanted(h, weight, bias):
        w, b = (None if t is None else t.float() for t in (weight, bias))
        return _layer_norm(h.float(), shape, w, b, spec.eps).to(h.dtype)
    return _layer_norm(h, shape, weight, bias, spec.eps)


def _plain_softmax(spec: SoftmaxSpec) -> bool:
    return not spec.mask and not spec.causal and spec.scale == 1.0


def softmax(x: Tensor, mask: Tensor | None, spec: SoftmaxSpec) -> Tensor:
    if not _plain_softmax(spec):
        return reference.softmax(x, mask, spec)
    return torch.log_softmax(x, spec.dim) if spec.log else torch.softmax(x, spec.dim)


def gated(gate: Tensor, up: Tensor, spec: GatedSpec) -> Tensor:
    return reference.gated(gate, up, spec)


def rotary_embedding(
    x: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    spec: RotarySpec,
) -> tuple[Tensor, ...]:
    return reference.rotary_embedding(x, cos, sin, position_ids, cu_seqlens, spec)


def _plain_cross_entropy(spec: CrossEntropySpec) -> bool:
    weighted = spec.weight_dtype in (None, spec.dtype) or spec.probabilities
    # On CPUs torch adds float16 losses up in float16, where a mean of 20 000 rows, or 3000 classes smoothed, is inf.
    overflows = spec.dtype == torch.float16 and (spec.reduction != "none" or spec.label_smoothing > 0.0)
    return spec.z_loss == 0.0 and spec.softcap is None and weighted and not overflows


def cross_entropy(logits: Tensor, target: Tensor, weight: Tensor | None, spec: CrossEntropySpec) -> Tensor:
    if not _plain_cross_entropy(spec):
        return reference.cross_entropy(logits, target, weight, spec)
    if not spec.probabilities:
        target = target.long()
        ignored = target == spec.ignore_index
        if not (is_plain(logits, target) and logits.is_cpu) or ignored.any():
            # torch multiplies the gradient of an ignored row by 0, which leaves NaN where its logits are not finite.
            logits = torch.where(ignored.unsqueeze(min(1, logits.dim() - 1)), 0.0, logits)
    loss = torch.nn.functional.cross_entropy(
        logits, target, weight, ignore_index=spec.ignore_index,
        reduction=spec.reduction, label_smoothing=spec.label_smoothing,
    )  # fmt: skip
    return loss.to(spec.loss_dtype)


def dropout_add(residual: Tensor, x: Tensor, seed: Tensor | None, spec: DropoutAddSpec) -> Tensor:
    return reference.dropout_add(residual, x, seed, spec)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    spec: LinearCrossEntropySpec,
) -> Tensor:
    if not spec.loss.probabilities:
        ignored = target.long() == spec.loss.ignore_index
        if not (is_plain(hidden, target) and hidden.is_cpu) or ignored.any():
            hidden = torch.where(ignored[:, None], 0.0, hidden)  # or weight's gradient has 0 · NaN
    return cross_entropy(torch.nn.functional.linear(hidden, weight, bias), target, class_weight, spec.loss)
