"""Attention with every feature, in plain torch: the truth that each backend is held to.

    s = q kᵀ · scale → softcap → + bias + ALiBi → mask;   p = softmax([s, sink]);   o = dropout(p) v
    lse = log Σ_j exp s_j (+ exp sink)

It holds the whole S_q × S_k matrix, and differentiates through autograd to any order. An entry that is masked adds
nothing, whatever its q, k, v or bias hold: what is not finite is replaced before a product and put back as NaN
afterwards, only where it can be seen.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.reference.dropout import dropout_keep
from fastattn.reference.softcap import softcapped
from fastattn.spec import AttentionSpec


def visible_keys(
    spec: AttentionSpec,
    S_q: int,
    S_k: int,
    mask: Tensor | None,
    device: torch.device,
    lengths: tuple[Tensor, Tensor] | None = None,
) -> Tensor | None:
    """Which key each row sees: bool, broadcastable to (B, H, S_q, S_k) and full in its last two dims; None: all.

    `lengths`: of queries and keys, each (B, 1, 1, 1), where sequences are padded to S_q and S_k.
    """
    if not spec.windowed and mask is None and lengths is None:
        return None
    n_q, n_k = lengths or (S_q, S_k)
    i = torch.arange(S_q, device=device)[:, None]
    j = torch.arange(S_k, device=device)[None, :]
    keep = (i < n_q) & (j < n_k)
    i = i + spec.shift(n_q, n_k)
    if spec.left is not None:
        keep = keep & (j >= i - spec.left)
    if spec.right is not None:
        keep = keep & (j <= i + spec.right)
    return keep if mask is None else keep & mask


def _scores(q: Tensor, k: Tensor, keep: Tensor | None) -> Tensor:
    """q kᵀ (B, H, S_q, S_k). With a mask, rows of q and k that are not finite give NaN without entering the product."""
    if keep is None:
        return q @ k.transpose(-2, -1)
    q_finite, k_finite = q.isfinite().all(-1, keepdim=True), k.isfinite().all(-1, keepdim=True)
    s = torch.where(q_finite, q, 0.0) @ torch.where(k_finite, k, 0.0).transpose(-2, -1)
    unknown = torch.where((q_finite & k_finite.transpose(-2, -1)) | ~keep, 1.0, math.nan).to(s.dtype)
    return s * unknown  # a factor, so that the gradient is NaN too


def _weighted_values(p: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
    """p v (B, H, S_q, D_v). With a mask, a v that is not finite reaches the rows that see its key, no other."""
    if keep is None:
        return p @ v
    finite = v.isfinite()
    o = p @ torch.where(finite, v, 0.0)
    seen = keep.to(p.dtype) @ (~finite).to(p.dtype)  # how many visible keys have a non-finite entry in this column
    unknown = torch.where(seen > 0, math.nan, 0.0).to(o.dtype)
    return o + unknown * p.sum(-1, keepdim=True)  # times Σp, so that the gradient is NaN too


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    seed: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    first_b: int = 0,
    lengths: tuple[Tensor, Tensor] | None = None,
    qk_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o (B, H, S_q, D_v) in q's dtype and lse (B, H, S_q) in fp32 (float64 for float64 inputs).

    q (B, H, S_q, D), k (B, H_kv, S_k, D), v (B, H_kv, S_k, D_v); bias and mask broadcastable to (B, H, S_q, S_k);
    alibi_slopes (H,) or (B, H); sinks (H,); seed: 0-d int64, the key of dropout. The arithmetic is in `compute_dtype`,
    by default at least fp32. `first_b` is the batch index of the first row, for the dropout of packed sequences;
    `lengths` are as in `visible_keys`. qk_scales (B, H) and v_scales (B, H_kv) multiply q kᵀ and v of 8-bit inputs.
    """
    B, H, S_q, _ = q.shape
    S_k = k.shape[2]
    dtype = compute_dtype or torch.promote_types(spec.out_dtype, torch.float32)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if qk_scales is not None:
        q = q * qk_scales.to(dtype)[..., None, None]
    if v_scales is not None:
        v = v * v_scales.to(dtype)[..., None, None]
    if spec.G > 1:
        k, v = k.repeat_interleave(spec.G, dim=1), v.repeat_interleave(spec.G, dim=1)
    keep = visible_keys(spec, S_q, S_k, mask, q.device, lengths)

    s = softcapped(_scores(q, k, keep) * spec.scale, spec.softcap)
    if bias is not None:
        s = s + bias.to(dtype)
    if alibi_slopes is not None:
        i, j = torch.arange(S_q, device=q.device)[:, None], torch.arange(S_k, device=q.device)[None, :]
        n_q, n_k = lengths or (S_q, S_k)
        s = s - alibi_slopes.to(dtype)[..., None, None] * (i + n_k - n_q - j).abs().to(dtype)
    if keep is not None:
        s = torch.where(keep, s, -math.inf)

    # One more column, without a value: the sink, or nothing.
    column = s.new_full((), -math.inf) if sinks is None else sinks.to(dtype)[:, None, None]
    s = torch.cat([s, column.expand(B, H, S_q, 1)], dim=-1)
    row_max = s.detach().amax(-1, keepdim=True)
    row_max = torch.where(row_max == -math.inf, 0.0, row_max)
    p = torch.exp(s - row_max)
    row_sum = p.sum(-1, keepdim=True)
    empty = row_sum == 0
    safe_sum = torch.where(empty, 1.0, row_sum)
    lse = torch.where(empty, -math.inf, row_max + safe_sum.log())[..., 0]
    p = (p / safe_sum)[..., :-1]
    if keep is not None:
        p = torch.where(keep, p, 0.0)  # also in a row that sees a NaN

    if spec.dropout_p > 0.0:
        assert seed is not None
        dropped = ~dropout_keep(seed, spec.dropout_p, B, H, S_q, S_k, first_b)
        p = torch.where(dropped, 0.0, p / max(1.0 - spec.dropout_p, torch.finfo(dtype).tiny))
    o = _weighted_values(p, v, keep)
    return o.to(spec.out_dtype), lse.to(torch.promote_types(spec.out_dtype, torch.float32))


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    spec: AttentionSpec,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    seed: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Over packed sequences: q (T_q, H, D), k (T_k, H_kv, D), v (T_k, H_kv, D_v) -> o (T_q, H, D_v), lse (H, T_q).

    Sequence b is rows cu_seqlens[b] … cu_seqlens[b + 1] of each; bias and mask are broadcastable to
    (B, H, max S_q, max S_k) and are cut to each sequence's lengths.
    """
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outputs = []
    for b in range(len(bounds_q) - 1):
        rows, keys = slice(bounds_q[b], bounds_q[b + 1]), slice(bounds_k[b], bounds_k[b + 1])
        S_q, S_k = rows.stop - rows.start, keys.stop - keys.start

        def cut(t: Tensor | None, b: int = b, S_q: int = S_q, S_k: int = S_k) -> Tensor | None:
            if t is None:
                return None
            t = t[(None,) * (4 - t.dim())]
            t = t[b : b + 1] if t.shape[0] > 1 else t
            return t[:, :, : S_q if t.shape[2] > 1 else 1, : S_k if t.shape[3] > 1 else 1]

        slopes = alibi_slopes[b] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        q_b, k_b, v_b = (t.transpose(0, 1)[None] for t in (q[rows], k[keys], v[keys]))
        outputs.append(
            attention(
                q_b, k_b, v_b, spec, bias=cut(bias), mask=cut(mask), alibi_slopes=slopes, sinks=sinks, seed=seed,
                compute_dtype=compute_dtype, first_b=b,
            )
        )  # fmt: skip
    H, D_v = q.shape[1], v.shape[2]
    no_rows = q.new_empty(1, H, 0, D_v), q.new_empty(1, H, 0, dtype=torch.promote_types(q.dtype, torch.float32))
    o = torch.cat([o[0].transpose(0, 1) for o, _ in (no_rows, *outputs)])
    lse = torch.cat([lse[0] for _, lse in (no_rows, *outputs)], dim=-1)
    return o, lse


def padded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    longest: tuple[int, int],
    spec: AttentionSpec,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    **features,
) -> tuple[Tensor, Tensor]:
    """`varlen_attention` without a loop and without a look at a length, for compilers and transforms.

    q (1, H, T_q, D), k (1, H_kv, T_k, D), v (1, H_kv, T_k, D_v) -> o (1, H, T_q, D_v), lse (1, H, T_q): every sequence
    is padded to `longest`, of queries and of keys, at a cost of B · longest_q · longest_k scores for each head.
    """
    B, device = cu_seqlens_q.shape[0] - 1, q.device
    max_seqlen_q, max_seqlen_k = longest

    def padded(t: Tensor, cu_seqlens: Tensor, S: int) -> Tensor:
        """(1, H, T, D) -> (B, H, S, D); what lies beyond a sequence's end is hidden later, so may be anything."""
        if t.shape[2] == 0:
            return t.new_zeros(B, t.shape[1], S, t.shape[3])
        if t.dtype.itemsize == 1:
            t = t.to(torch.bfloat16)  # exact; torch has no indexing of 8-bit numbers
        row = cu_seqlens[:-1, None].long() + torch.arange(S, device=device)
        return t[0][:, row.clamp(max=t.shape[2] - 1)].transpose(0, 1)

    lengths = cu_seqlens_q.diff().long()[:, None, None, None], cu_seqlens_k.diff().long()[:, None, None, None]
    if mask is not None:
        mask = mask[..., :max_seqlen_q, :max_seqlen_k]
    if bias is not None:
        bias = bias[..., :max_seqlen_q, :max_seqlen_k]
    o, lse = attention(
        padded(q, cu_seqlens_q, max_seqlen_q),
        padded(k, cu_seqlens_k, max_seqlen_k),
        padded(v, cu_seqlens_k, max_seqlen_k),
        spec, bias=bias, mask=mask, lengths=lengths, **features,
    )  # fmt: skip

    T = q.shape[2]
    if B == 0 or max_seqlen_q == 0:
        tensors = (q, k, v, bias, *features.values())
        nothing = sum(
            t.flatten()[:0].sum() for t in tensors if t is not None and t.is_floating_point()
        )  # 0, yet of each
        o = o.new_zeros(1, spec.H, T, spec.D_v) + nothing
        lse = lse.new_full((1, spec.H, T), -math.inf) + nothing
        return o.to(spec.out_dtype), lse.to(torch.promote_types(spec.out_dtype, torch.float32))
    t = torch.arange(T, device=device, dtype=cu_seqlens_q.dtype)
    b = torch.searchsorted(cu_seqlens_q, t, right=True) - 1
    packed = b < B
    b = b.clamp(max=B - 1)
    i = (t - cu_seqlens_q[b]).clamp(max=max_seqlen_q - 1)
    o = torch.where(packed[:, None, None], o[b, :, i], 0.0)  # (T, H, D_v)
    lse = torch.where(packed[:, None], lse[b, :, i], -math.inf)  # (T, H)
    return o.transpose(0, 1)[None], lse.T[None]
