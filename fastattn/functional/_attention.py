"""Attention over a batch, and over packed sequences."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from fastattn import _arguments as check
from fastattn import backends
from fastattn.functional._plan import autocast, cached, wants_gradient
from fastattn.functional._seqused import order_of, taken
from fastattn.ops.attention import attention as attention_op
from fastattn.spec import AttentionInputs, AttentionSpec, Work


@cached
def _attention_plan(
    fn, backend, gradient, return_lse, q_shape, k_shape, v_shape, q_dtype, k_dtype, v_dtype,
    q_device, k_device, v_device, causal, left, right, scale, softcap, dropout_p, deterministic, *present,
) -> tuple[ModuleType, AttentionSpec]:  # fmt: skip
    spec = check.attention_spec(
        fn, (q_shape, k_shape, v_shape), (q_dtype, k_dtype, v_dtype), (q_device, k_device, v_device),
        causal, (left, right), scale, softcap, dropout_p, deterministic, present,
    )  # fmt: skip
    return backends.select(spec, q_device, backend, attention_work(q_shape, k_shape, gradient, return_lse)), spec


def attention_work(q_shape, k_shape, gradient: bool, return_lse: bool) -> Work | None:
    """None with an lse: torch's function has none."""
    return None if return_lse else Work(math.prod(q_shape) * k_shape[2], gradient, q_shape[2], k_shape[2])


def _attend(
    fn, q, k, v, causal, window, scale, bias, mask, alibi_slopes, softcap, sinks, dropout_p, return_lse, deterministic,
    backend, scales, sequences=None,
):  # fmt: skip
    """o, or (o, lse), of checked tensors q, k and v; `sequences`: of packed ones, see `check.Sequences`."""
    if torch._C._is_any_autocast_enabled():
        q, k, v = autocast(q, k, v)
    left, right = (None, None) if window is None else check.window_sides(fn, window)
    run, spec = _attention_plan(
        fn, backend, wants_gradient(q, k, v), return_lse, q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype,
        q.device, k.device, v.device,
        causal, left, right, scale, softcap, dropout_p, deterministic,
        bias is not None, mask is not None, alibi_slopes is not None, sinks is not None, sequences is not None,
    )  # fmt: skip
    if q.shape[3] != spec.D:
        q, k = check.widened(q), check.widened(k)
    cu_seqlens_q = cu_seqlens_k = max_seqlens = None
    if sequences is not None:
        cu_seqlens_q, cu_seqlens_k, *max_seqlens = sequences
    if spec.bias or spec.mask or spec.alibi or spec.sinks:
        check.check_attention_features(fn, q, k, bias, mask, alibi_slopes, sinks, sequences)
        if bias is not None and bias.dim() < 4:
            bias = bias[(None,) * (4 - bias.dim())]
        if mask is not None and mask.dim() < 4:
            mask = mask[(None,) * (4 - mask.dim())]
    seed = torch.randint(2**63 - 1, (), device=q.device) if spec.dropout_p > 0.0 else None
    qk_scales = v_scales = None
    if spec.fp8 or not (scales[0] is scales[1] is scales[2] is None):
        B = q.shape[0] if sequences is None else sequences.B
        named = dict(zip(("q_scale", "k_scale", "v_scale"), scales, strict=True))
        qk_scales, v_scales = check.fp8_scales(fn, spec, B, (q, k, v, bias, alibi_slopes, sinks), named)
    inputs = AttentionInputs(
        q, k, v, bias, mask, alibi_slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k, qk_scales, v_scales
    )
    if run.COMPOSITE:
        o, lse = run.attention(inputs, spec, return_lse, max_seqlens)
    else:
        o, lse, _ = attention_op(inputs, spec, run.NAME)
    return (o, lse) if return_lse else o


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
    q_scale: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None


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
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention, fused: the S_q × S_k matrix is never held.

        s = q kᵀ · scale → softcap → + bias + ALiBi → mask;   p = softmax(s, with sinks);   o = dropout(p) v

    Args:
        q: (B, H, S_q, D), float16, bfloat16, float32, float64 or, forward only, float8_e4m3fn; any strides.
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
        backend: "cuda", "triton", "cpu", "eager" or "reference", which then never falls back; None: the first that can.
        q_scale: of float8_e4m3fn inputs, what q stands for is q · q_scale: (H,) or (B, H), float32; 1 if None.
        k_scale, v_scale: the same of k and v: (H_kv,) or (B, H_kv).

    Returns:
        o (B, H, S_q, D_v) in q's dtype, bfloat16 for float8_e4m3fn; with `return_lse` also lse (B, H, S_q) in float32
        (float64 for float64 inputs), the natural log of Σ_j exp s_j. A row that sees no key has o = 0, lse = −inf and
        zero gradients.

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
    return _attend(
        "attention", q, k, v, causal, window, scale, bias, mask, alibi_slopes, softcap, sinks, dropout_p, return_lse,
        deterministic, backend, (q_scale, k_scale, v_scale),
    )  # fmt: skip


@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    *,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    return_lse: Literal[False] = False,
    **options: Unpack[AttentionOptions],
) -> Tensor: ...
@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    *,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    return_lse: Literal[True],
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, Tensor]: ...
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    *,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
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
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` over sequences of unequal lengths, packed one after the other without padding.

        for each sequence b, with rows q_b of q and k_b, v_b of k and v:   o_b = attention(q_b, k_b, v_b, …)

    Args:
        q: (T_q, H, D), any strides. T_q is the sum of the lengths, or more: rows after the last sequence give 0.
        k: (T_k, H_kv, D).
        v: (T_k, H_kv, D_v).
        cu_seqlens_q: (B + 1,) int32 or int64, q's device, rising from 0: sequence b is rows cu_seqlens_q[b] to
            cu_seqlens_q[b + 1] of q. Lengths may be 0. Its values are checked on a CPU only.
        cu_seqlens_k: (B + 1,) int32 or int64, the same of k and v.
        max_seqlen_q: the longest sequence of q, or a bound of it: an int, or an integer tensor of one element, which is
            read on the host only where it lies there. The kernels need neither; bias and mask are sized by it.
        max_seqlen_k: the same of k.
        seqused_q: (B,) int32 or int64: how many rows of each sequence of q count, from its first; None: all. The others
            are padding: they give o = 0, lse = −inf and have zero gradients. To take the sequences together costs a
            copy of q, k, v and o.
        seqused_k: (B,), the same of k and v, whose other rows are never seen.
        causal: True needs cu_seqlens_k and seqused_k to be the same tensors as cu_seqlens_q and seqused_q; otherwise
            "top_left" or "bottom_right". The diagonal is each sequence's own, of the rows that count.
        bias, mask: broadcastable to (B, H, max_seqlen_q, max_seqlen_k), indexed by positions within a sequence.
        alibi_slopes: (H,) or (B, H).
        window, scale, softcap, sinks, dropout_p, return_lse, deterministic, backend, q_scale, k_scale, v_scale: as in
            `attention`.

    Returns:
        o (T_q, H, D_v); with `return_lse` also lse (H, T_q) in float32 (float64 for float64 inputs).

    Raises:
        ArgumentTypeError, ArgumentError, UnsupportedError: as `attention`.

    Source: flash_attn_varlen_func of Dao-AILab/flash-attention; torch.nn.attention.varlen.

    Example:
        >>> q = torch.randn(7, 4, 16)
        >>> cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)
        >>> varlen_attention(q, q, q, cu_seqlens, cu_seqlens, 4, 4, causal=True).shape
        torch.Size([7, 4, 16])
    """
    fn = "varlen_attention"
    sequences = check.sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    check.check_seqused(sequences, seqused_q, seqused_k, (cu_seqlens_q, cu_seqlens_k))
    if causal is True:
        causal = check.packed_alignment(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    place = None
    if seqused_q is not None:
        source, place, cu = order_of(sequences.cu_seqlens_q, seqused_q, q.shape[0])
        q, sequences = taken(q, source), sequences._replace(cu_seqlens_q=cu)
    if seqused_k is not None:
        source, _, cu = order_of(sequences.cu_seqlens_k, seqused_k, k.shape[0])
        k, v, sequences = taken(k, source), taken(v, source), sequences._replace(cu_seqlens_k=cu)
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))  # (1, H, T, D)
    result = _attend(
        fn, q, k, v, causal, window, scale, bias, mask, alibi_slopes, softcap, sinks, dropout_p, return_lse,
        deterministic, backend, (q_scale, k_scale, v_scale), sequences,
    )  # fmt: skip
    o, lse = (result[0][0].transpose(0, 1), result[1][0]) if return_lse else (result[0].transpose(0, 1), None)
    if place is not None:
        o, lse = taken(o, place), None if lse is None else taken(lse, place, 1)
    return o if lse is None else (o, lse)
