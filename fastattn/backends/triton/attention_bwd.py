"""Attention backward, in two passes, each recomputing p from lse; every sum has one order, so its bits are repeatable.

    a = scale · q kᵀ                s = f(a)                   delta = rowsum(o ∘ do) - dlse
                                    p = exp(s - lse - lse_low)
    dp = dropout(do vᵀ)             ds = p ∘ (dp - delta)      da = ds ∘ f'(a)
    dq = scale · da k               dk = scale · daᵀ q         dv = dropout(p)ᵀ do
    dslope = -Σ ds ∘ distance       dsink = -Σ exp(sink - lse - lse_low) delta

The first pass holds a tile of queries, visits the keys it sees, and writes delta, dq and its part of the gradients of
slopes and sinks. The second holds a tile of keys and visits the queries that see it, over all heads of its group, and
writes dk and dv. A gradient of lse enters through delta alone, since ∂lse_i / ∂s_ij = p_ij. The gradient of a bias is
attention_bwd_bias.py. Shapes as in the forward; do (B, H, S_q, D_v), delta (B, H, S_q) fp32.
Source: Dao, "FlashAttention-2" (2023), algorithm 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.backends.triton.attention_bwd_bias import run_dbias
from fastattn.backends.triton.attention_common import (
    arch,
    constants,
    matrix_strides,
    n_tiles,
    score_arguments,
    sequence_arguments,
    strides,
    tile_arguments,
)
from fastattn.backends.triton.blocks.block_range import key_spans, listed, query_range, tile_at
from fastattn.backends.triton.blocks.dropout import dropout_factor, head_dropout
from fastattn.backends.triton.blocks.features import Dropout
from fastattn.backends.triton.blocks.mask import finite_or_zero, head_window, hide, visible, window_of
from fastattn.backends.triton.blocks.query_tile import query_tile
from fastattn.backends.triton.blocks.score import apply_score, distance, head_score, logit_scale, scores_of
from fastattn.backends.triton.blocks.seqlen import head_start, locate, other_rows, own_rows
from fastattn.backends.triton.blocks.softmax import load_lse, load_sink, probability
from fastattn.backends.triton.blocks.tile import (
    inner,
    load_tile,
    matrix,
    next_head,
    outer,
    row_dot,
    scaled,
    store_tile,
    zeros,
)
from fastattn.backends.triton.configs import TileConfig, backward_config
from fastattn.backends.triton.mask_tiles import mask_tiles
from fastattn.spec import AttentionInputs, AttentionSpec


@triton.jit
def _query_span(
    dq, dslope, q, do, lse, lse_low, delta, k_rows, v_rows, m, i_lo, i_hi, spans, w, score, drop,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, SLOPE: tl.constexpr,
    F: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dq / scale, and with SLOPE -dslope by row, over the key tiles at places i_lo … i_hi - 1."""
    scale = logit_scale(score, F)
    for i in range(i_lo, i_hi):
        n_start = tile_at(i, spans, F) * BLOCK_N
        n = n_start + tl.arange(0, BLOCK_N)
        row, col = m[:, None], n[None, :]
        k = load_tile(k_rows, n_start, n, w.S_k, MASKED, D)  # (N, D)
        v = load_tile(v_rows, n_start, n, w.S_k, MASKED, D_V)  # (N, D_v)
        s, derivative = apply_score(inner(q, k, DOT), row, col, w, score, MASKED, F)  # (M, N)
        p = probability(s, lse[:, None], lse_low[:, None], scale)
        dp = inner(do, v, DOT) * dropout_factor(row, col, drop, F)
        ds = p * (dp - delta[:, None])
        keep = visible(row, col, w, F) if MASKED else None
        if SLOPE:
            dslope += tl.sum(hide(ds, keep) * distance(row, col, w), 1)
        if MASKED:
            k = finite_or_zero(k)
        dq = outer(hide(ds * derivative, keep), k, dq, DOT)
    return dq, dslope


@triton.jit
def attention_backward_dq_kernel(
    DQ, DELTA, DSLOPES, DSINKS, Q, K, V, O, DO, LSE, LSE_LOW, DLSE,
    CU_SEQLENS_Q, CU_SEQLENS_K, TILES, MASK, BIAS, SLOPES, SINKS, SEED,
    stride_dqb, stride_dqh, stride_dqm, stride_dqd,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_ob, stride_oh, stride_om, stride_od,
    stride_dob, stride_doh, stride_dom, stride_dod,
    stride_dlse_b, stride_dlse_h, stride_dlse_m,
    n_across, stride_tiles_b, stride_tiles_h,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    stride_slope_b, stride_slope_h, stride_sink_h,
    B, H, S_q, S_k, shift, left, right, scale, softcap, dropout_threshold, dropout_scale,
    G: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    F: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    b, h, m_block, rows_q, rows_k, w, score, drop = query_tile(
        CU_SEQLENS_Q, CU_SEQLENS_K, MASK, BIAS, SLOPES, SEED, stride_mask_b, stride_mask_h, stride_mask_m,
        stride_mask_n, stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n, stride_slope_b, stride_slope_h,
        B, H, S_q, S_k, shift, left, right, scale, softcap, dropout_threshold, dropout_scale, BLOCK_M, F,
    )  # fmt: skip

    m_start = m_block * BLOCK_M
    m = m_start + tl.arange(0, BLOCK_M)
    o_rows = matrix(O, rows_q, h, stride_ob, stride_oh, stride_om, stride_od, BLOCK_M, D_V, F)
    do_rows = matrix(DO, rows_q, h, stride_dob, stride_doh, stride_dom, stride_dod, BLOCK_M, D_V, F)
    o = load_tile(o_rows, m_start, m, w.S_q, True, D_V)  # (M, D_v)
    do = load_tile(do_rows, m_start, m, w.S_q, True, D_V)
    delta = row_dot(o, do)
    if DLSE is not None:
        DLSE += rows_q.batch * stride_dlse_b + h.to(tl.int64) * stride_dlse_h + rows_q.start * stride_dlse_m
        delta -= tl.load(DLSE + m.to(tl.int64) * stride_dlse_m, mask=m < w.S_q, other=0.0)
    start = head_start(rows_q, h, H, S_q)
    tl.store(DELTA + start + m, delta, mask=m < w.S_q)
    lse, lse_low = load_lse(LSE + start, LSE_LOW + start, m, w.S_q)
    if DSINKS is not None:
        p_sink = probability(load_sink(SINKS, stride_sink_h, h, b, B, F), lse, lse_low, 1.0)
        tl.store(DSINKS + tl.program_id(0), -tl.sum(p_sink * delta, 0))

    if DQ is not None or DSLOPES is not None:
        SLOPE: tl.constexpr = DSLOPES is not None
        q_rows = matrix(Q, rows_q, h, stride_qb, stride_qh, stride_qm, stride_qd, BLOCK_M, D, F)
        k_rows = matrix(K, rows_k, h // G, stride_kb, stride_kh, stride_kn, stride_kd, BLOCK_N, D, F)
        v_rows = matrix(V, rows_k, h // G, stride_vb, stride_vh, stride_vn, stride_vd, BLOCK_N, D_V, F)
        q = load_tile(q_rows, m_start, m, w.S_q, True, D)  # (M, D)
        dq = zeros(BLOCK_M, D)
        dslope = tl.zeros([BLOCK_M], tl.float32)
        spans = key_spans(
            m_block, w, TILES, n_across, stride_tiles_b, stride_tiles_h, b, h, CU_SEQLENS_Q, BLOCK_M, BLOCK_N, F
        )
        if F.LEFT or F.MASK:
            dq, dslope = _query_span(
                dq, dslope, q, do, lse, lse_low, delta, k_rows, v_rows, m, spans.min, spans.left, spans, w, score, drop,
                D, D_V, BLOCK_N, True, SLOPE, F, DOT,
            )  # fmt: skip
        dq, dslope = _query_span(
            dq, dslope, q, do, lse, lse_low, delta, k_rows, v_rows, m, spans.whole, spans.right, spans, w, score, drop,
            D, D_V, BLOCK_N, False, SLOPE, F, DOT,
        )  # fmt: skip
        if not F.MASK:
            dq, dslope = _query_span(
                dq, dslope, q, do, lse, lse_low, delta, k_rows, v_rows, m, spans.right, spans.max, spans, w, score,
                drop, D, D_V, BLOCK_N, True, SLOPE, F, DOT,
            )  # fmt: skip
        if DQ is not None:
            dq_rows = matrix(DQ, rows_q, h, stride_dqb, stride_dqh, stride_dqm, stride_dqd, BLOCK_M, D, F)
            store_tile(dq_rows, m_start, scaled(dq, scale), m, w.S_q, D)
        if DSLOPES is not None:
            tl.store(DSLOPES + tl.program_id(0), -tl.sum(tl.where(m < w.S_q, dslope, 0.0), 0))


@triton.jit
def _key_span(
    dk, dv, k, v, q_heads, do_heads, stride_qh, stride_doh, LSE, LSE_LOW, DELTA, S_q,
    n, g_lo, n_heads, h_first, i_lo, i_hi, spans, w, scores, drop,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr, F: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dk / scale and dv over the query tiles at places i_lo … i_hi - 1 of heads g_lo … g_lo + n_heads - 1 of a group.

    s, p, dp and ds are transposed, (N, M). Heads and tiles are one loop, so that loads run ahead from head to head.
    """
    for i in range(n_heads * (i_hi - i_lo)):
        g = i // (i_hi - i_lo)
        m_start = tile_at(i_lo + i - g * (i_hi - i_lo), spans, F) * BLOCK_M
        g += g_lo
        m = m_start + tl.arange(0, BLOCK_M)
        row, col = m[None, :], n[:, None]
        score = head_score(scores, h_first + g, F)
        q = load_tile(next_head(q_heads, g, stride_qh), m_start, m, w.S_q, True, D)  # (M, D)
        do = load_tile(next_head(do_heads, g, stride_doh), m_start, m, w.S_q, True, D_V)  # (M, D_v)
        start = g.to(tl.int64) * S_q
        lse, lse_low = load_lse(LSE + start, LSE_LOW + start, m, w.S_q)
        delta = tl.load(DELTA + start + m, mask=m < w.S_q, other=0.0)
        # (N, M); a bias is always read under a mask here, because every tile may hold keys beyond S_k
        s, derivative = apply_score(inner(k, q, DOT), row, col, w, score, True, F)
        p = probability(s, lse[None, :], lse_low[None, :], logit_scale(score, F))
        dropped = dropout_factor(row, col, head_dropout(drop, h_first + g), F)
        dp = inner(v, do, DOT) * dropped
        ds = p * (dp - delta[None, :]) * derivative
        if MASKED:
            keep = visible(row, col, w, F)
            p = tl.where(keep, p, 0.0)
            ds = tl.where(keep, ds, 0.0)
            q = finite_or_zero(q)
        dv = outer(p * dropped, do, dv, DOT)
        dk = outer(ds, q, dk, DOT)
    return dk, dv


@triton.jit
def attention_backward_dkdv_kernel(
    DK, DV, DELTA, Q, K, V, DO, LSE, LSE_LOW, CU_SEQLENS_Q, CU_SEQLENS_K, TILES, MASK, BIAS, SLOPES, SEED,
    stride_dkb, stride_dkh, stride_dkn, stride_dkd,
    stride_dvb, stride_dvh, stride_dvn, stride_dvd,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_dob, stride_doh, stride_dom, stride_dod,
    n_across, stride_tiles_b, stride_tiles_h,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    stride_slope_b, stride_slope_h,
    B, H_kv, S_q, S_k, shift, left, right, scale, softcap, dropout_threshold, dropout_scale,
    G: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    F: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    b, h_kv, n_block = locate(tl.program_id(0), CU_SEQLENS_K, B, H_kv, S_k, BLOCK_N, False, F)
    rows_q, rows_k = other_rows(b, CU_SEQLENS_Q, B, S_q, F), own_rows(b, CU_SEQLENS_K, B, S_k, F)
    n_start = n_block * BLOCK_N
    if F.VARLEN:
        if n_start >= rows_k.length:
            return
    w = window_of(
        b, rows_q.length, rows_k.length, shift, left, right, MASK, stride_mask_b, stride_mask_h, stride_mask_m,
        stride_mask_n, F,
    )  # fmt: skip
    scores = scores_of(
        b, B, scale, softcap, SLOPES, stride_slope_b, stride_slope_h, BIAS, stride_bias_b, stride_bias_h, stride_bias_m,
        stride_bias_n, F,
    )  # fmt: skip
    h_first = h_kv * G
    drop = Dropout(tl.load(SEED) if F.DROPOUT else 0, b, h_first, dropout_threshold, dropout_scale)
    k_rows = matrix(K, rows_k, h_kv, stride_kb, stride_kh, stride_kn, stride_kd, BLOCK_N, D, F)
    v_rows = matrix(V, rows_k, h_kv, stride_vb, stride_vh, stride_vn, stride_vd, BLOCK_N, D_V, F)
    q_heads = matrix(Q, rows_q, h_first, stride_qb, stride_qh, stride_qm, stride_qd, BLOCK_M, D, F)
    do_heads = matrix(DO, rows_q, h_first, stride_dob, stride_doh, stride_dom, stride_dod, BLOCK_M, D_V, F)
    start = head_start(rows_q, h_first, H_kv * G, S_q)
    LSE += start
    LSE_LOW += start
    DELTA += start

    n = n_start + tl.arange(0, BLOCK_N)
    k = load_tile(k_rows, n_start, n, w.S_k, True, D)  # (N, D)
    v = load_tile(v_rows, n_start, n, w.S_k, True, D_V)  # (N, D_v)
    dk = zeros(BLOCK_N, D)
    dv = zeros(BLOCK_N, D_V)
    if F.MASK:  # each head has a list of its own
        for g in range(G):
            spans = listed(
                TILES, n_across, stride_tiles_b, stride_tiles_h, b, h_first + g, n_block, CU_SEQLENS_K, BLOCK_N, F
            )
            dk, dv = _key_span(
                dk, dv, k, v, q_heads, do_heads, stride_qh, stride_doh, LSE, LSE_LOW, DELTA, S_q, n, g, 1, h_first,
                spans.min, spans.left, spans, head_window(w, h_first + g, F), scores, drop,
                D, D_V, BLOCK_M, True, F, DOT,
            )  # fmt: skip
            dk, dv = _key_span(
                dk, dv, k, v, q_heads, do_heads, stride_qh, stride_doh, LSE, LSE_LOW, DELTA, S_q, n, g, 1, h_first,
                spans.whole, spans.right, spans, w, scores, drop, D, D_V, BLOCK_M, False, F, DOT,
            )  # fmt: skip
    else:
        spans = query_range(n_block, w, BLOCK_M, BLOCK_N, F)
        if F.RIGHT:
            dk, dv = _key_span(
                dk, dv, k, v, q_heads, do_heads, stride_qh, stride_doh, LSE, LSE_LOW, DELTA, S_q, n, 0, G, h_first,
                spans.min, spans.left, spans, w, scores, drop, D, D_V, BLOCK_M, True, F, DOT,
            )  # fmt: skip
        dk, dv = _key_span(
            dk, dv, k, v, q_heads, do_heads, stride_qh, stride_doh, LSE, LSE_LOW, DELTA, S_q, n, 0, G, h_first,
            spans.whole, spans.right, spans, w, scores, drop, D, D_V, BLOCK_M, False, F, DOT,
        )  # fmt: skip
        if F.LEFT:
            dk, dv = _key_span(
                dk, dv, k, v, q_heads, do_heads, stride_qh, stride_doh, LSE, LSE_LOW, DELTA, S_q, n, 0, G, h_first,
                spans.right, spans.max, spans, w, scores, drop, D, D_V, BLOCK_M, True, F, DOT,
            )  # fmt: skip

    if DK is not None:
        dk_rows = matrix(DK, rows_k, h_kv, stride_dkb, stride_dkh, stride_dkn, stride_dkd, BLOCK_N, D, F)
        store_tile(dk_rows, n_start, scaled(dk, scale), n, w.S_k, D)
    if DV is not None:
        dv_rows = matrix(DV, rows_k, h_kv, stride_dvb, stride_dvh, stride_dvn, stride_dvd, BLOCK_N, D_V, F)
        store_tile(dv_rows, n_start, dv, n, w.S_k, D_V)


def launch(
    grads: AttentionInputs,
    do: Tensor | None,
    dlse: Tensor | None,
    x: AttentionInputs,
    o: Tensor,
    lse: Tensor,
    lse_low: Tensor,
    spec: AttentionSpec,
) -> None:
    """Fill the gradients that are not None, from the gradients of o and lse that are not None."""
    if x.B == 0:
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return
    if do is None:
        do = o.new_zeros(()).expand(o.shape)
    lse, lse_low = lse.contiguous(), lse_low.contiguous()  # vmap hands out expanded ones
    cfg = backward_config(arch(x), spec.D, spec.D_v, spec.dtype)
    delta = torch.empty_like(lse)
    run_dq(grads, delta, do, dlse, x, o, lse, lse_low, spec, cfg.dq)
    if grads.k is not None or grads.v is not None:
        run_dkdv(grads, delta, do, x, lse, lse_low, spec, cfg.dkdv)
    if grads.bias is not None:
        run_dbias(grads.bias, delta, do, x, lse, lse_low, spec, cfg.dbias)


def run_dq(grads, delta, do, dlse, x: AttentionInputs, o, lse, lse_low, spec: AttentionSpec, cfg: TileConfig) -> None:
    """delta, dq, and the gradients of slopes and sinks."""
    grid = n_tiles(x, x.q.shape[2], cfg.BLOCK_M) * spec.H
    dslopes, dsinks = (None if g is None else lse.new_empty(grid) for g in (grads.alibi_slopes, grads.sinks))
    if grid > 0:
        attention_backward_dq_kernel[(grid,)](
            DQ=grads.q, DELTA=delta, DSLOPES=dslopes, DSINKS=dsinks, Q=x.q, K=x.k, V=x.v, O=o, DO=do, LSE=lse,
            LSE_LOW=lse_low, DLSE=dlse, SINKS=x.sinks, H=spec.H,
            **matrix_strides(dq=grads.q, q=x.q, k=x.k, v=x.v, o=o, do=do), **strides("dlse_", dlse, "bhm"),
            **strides("sink_", x.sinks, "h"), **sequence_arguments(x, spec), **score_arguments(x, spec),
            **mask_tiles(x, spec, cfg), **constants(x, spec, o, do, grads.q), **tile_arguments(cfg),
        )  # fmt: skip
    for grad, parts in ((grads.alibi_slopes, dslopes), (grads.sinks, dsinks)):
        if grad is not None and parts is not None:
            grad.copy_(sum_of_parts(parts, grad.dim() == 2, x, spec, cfg.BLOCK_M))


def run_dkdv(grads, delta, do, x: AttentionInputs, lse, lse_low, spec: AttentionSpec, cfg: TileConfig) -> None:
    """dk and dv."""
    grid = n_tiles(x, x.k.shape[2], cfg.BLOCK_N) * spec.H_kv
    if grid == 0:
        return
    attention_backward_dkdv_kernel[(grid,)](
        DK=grads.k, DV=grads.v, DELTA=delta, Q=x.q, K=x.k, V=x.v, DO=do, LSE=lse, LSE_LOW=lse_low, H_kv=spec.H_kv,
        **matrix_strides(dk=grads.k, dv=grads.v, q=x.q, k=x.k, v=x.v, do=do), **sequence_arguments(x, spec),
        **score_arguments(x, spec), **mask_tiles(x, spec, cfg, by_key=True),
        **constants(x, spec, do, grads.k, grads.v), **tile_arguments(cfg),
    )  # fmt: skip


def sum_of_parts(parts: Tensor, by_sequence: bool, x: AttentionInputs, spec: AttentionSpec, BLOCK_M: int) -> Tensor:
    """The sums by head, (H,) or (B, H), of what the programs of the first pass left, one number each."""
    if x.cu_seqlens_q is None:
        by_batch = parts.view(x.B, spec.H, -1).sum(2)
        return by_batch if by_sequence else by_batch.sum(0)
    slots = parts.view(spec.H, -1)
    if not by_sequence:
        return slots.sum(1)
    first = x.cu_seqlens_q // BLOCK_M + torch.arange(x.B + 1, device=parts.device)  # as in blocks/seqlen.py
    slot = torch.arange(slots.shape[1], device=parts.device).flip(0)  # the last slot comes first
    own = (slot >= first[:-1, None]) & (slot < first[1:, None])  # (B, slots)
    return torch.where(own[:, None], slots, 0.0).sum(2)


def inspect_cases(arch: str) -> list:
    """The variants that the ahead-of-time report compiles."""
    from fastattn.backends.triton.attention_cases import backward_cases

    return backward_cases(arch)
