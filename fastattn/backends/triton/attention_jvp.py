"""Attention in forward mode: the tangents of o and lse, in one pass over the keys that recomputes p from lse.

    a = q kᵀ · scale           ta = (tq kᵀ + q tkᵀ) · scale
    s = f(a) + bias - slope · distance           ts = ta ∘ f'(a) + tbias - tslope · distance
    mu = Σ_j p ∘ ts + p_sink · tsink = tlse
    to = dropout(p ∘ ts) v - mu o + dropout(p) tv

tx is the tangent of x and has its shape; a tangent that is None is zero and costs nothing. mu (M,) is known only after
the last key, hence its product with o, which p ∘ (ts - mu) would not need. Shapes as in the forward; to (B, H, S_q,
D_v) in o's dtype, tlse (B, H, S_q) fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

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
from fastattn.backends.triton.attention_fwd import restore_non_finite
from fastattn.backends.triton.blocks.block_range import key_spans, tile_at
from fastattn.backends.triton.blocks.dropout import dropout_factor
from fastattn.backends.triton.blocks.features import Features
from fastattn.backends.triton.blocks.mask import (
    finite_or_zero,
    has_non_finite,
    hide,
    is_finite,
    visible,
)
from fastattn.backends.triton.blocks.query_tile import query_tile
from fastattn.backends.triton.blocks.score import apply_score, distance, head_score, load_bias, logit_scale, scores_of
from fastattn.backends.triton.blocks.seqlen import head_start
from fastattn.backends.triton.blocks.softmax import load_lse, load_sink, probability
from fastattn.backends.triton.blocks.tile import inner, load_tile, matrix, outer, store_tile, zeros
from fastattn.backends.triton.configs import jvp_config
from fastattn.backends.triton.mask_tiles import mask_tiles
from fastattn.spec import AttentionInputs, AttentionSpec


@triton.jit
def score_tangent(
    q, k, tq, tk_rows, n_start, m, n, derivative, w, score, tangent,
    MASKED: tl.constexpr, D: tl.constexpr, F_T: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """ts (M, N) from the tangents of q, k, bias and slopes; `derivative` is f'(a), and m, n are index tiles."""
    ts = tl.zeros([q[0].shape[0], k[0].shape[0]], tl.float32)
    if tq is not None:
        ts += inner(tq, k, DOT)
    if tk_rows is not None:
        ts += inner(q, load_tile(tk_rows, n_start, n, w.S_k, MASKED, D), DOT)
    ts *= score.scale * derivative
    row, col = m[:, None], n[None, :]
    if F_T.BIAS:
        ts += load_bias(row, col, w, tangent, MASKED)
    if F_T.ALIBI:
        ts -= tangent.slope * distance(row, col, w)
    return ts


@triton.jit
def _tangent_span(
    acc, mu, non_finite, q, tq, lse, lse_low, k_rows, v_rows, tk_rows, tv_rows, m, i_lo, i_hi, spans, w, score,
    tangent, drop,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, SCORE: tl.constexpr,
    F: tl.constexpr, F_T: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """to + mu o and mu over the key tiles at places i_lo … i_hi - 1; SCORE: ts is not zero.

    A masked tile adds only what is finite in v and tv, and `non_finite` counts the tiles in which some tv was not.
    """
    scale = logit_scale(score, F)
    for i in range(i_lo, i_hi):
        n_start = tile_at(i, spans, F) * BLOCK_N
        n = n_start + tl.arange(0, BLOCK_N)
        row, col = m[:, None], n[None, :]
        k = load_tile(k_rows, n_start, n, w.S_k, MASKED, D)  # (N, D)
        s, derivative = apply_score(inner(q, k, DOT), row, col, w, score, MASKED, F)  # (M, N)
        keep = visible(row, col, w, F) if MASKED else None
        p = hide(probability(s, lse[:, None], lse_low[:, None], scale), keep)
        dropped = dropout_factor(row, col, drop, F)
        if SCORE:
            ts = score_tangent(q, k, tq, tk_rows, n_start, m, n, derivative, w, score, tangent, MASKED, D, F_T, DOT)
            tp = hide(p * ts, keep)
            mu += tl.sum(tp, 1)
            v = load_tile(v_rows, n_start, n, w.S_k, MASKED, D_V)  # (N, D_v)
            if MASKED:
                v = finite_or_zero(v)
            acc = outer(tp * dropped, v, acc, DOT)
        if tv_rows is not None:
            tv = load_tile(tv_rows, n_start, n, w.S_k, MASKED, D_V)  # (N, D_v)
            if MASKED:
                non_finite += has_non_finite(tv)
                tv = finite_or_zero(tv)
            acc = outer(p * dropped, tv, acc, DOT)
    return acc, mu, non_finite


@triton.jit
def attention_jvp_kernel(
    TO, TLSE, TQ, TK, TV, TBIAS, TSLOPES, TSINKS, Q, K, V, O, LSE, LSE_LOW,
    CU_SEQLENS_Q, CU_SEQLENS_K, TILES, MASK, BIAS, SLOPES, SINKS, SEED,
    stride_tob, stride_toh, stride_tom, stride_tod,
    stride_tqb, stride_tqh, stride_tqm, stride_tqd,
    stride_tkb, stride_tkh, stride_tkn, stride_tkd,
    stride_tvb, stride_tvh, stride_tvn, stride_tvd,
    stride_tbias_b, stride_tbias_h, stride_tbias_m, stride_tbias_n,
    stride_tslope_b, stride_tslope_h, stride_tsink_h,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_ob, stride_oh, stride_om, stride_od,
    n_across, stride_tiles_b, stride_tiles_h,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    stride_slope_b, stride_slope_h, stride_sink_h,
    B, H, S_q, S_k, shift, left, right, scale, softcap, dropout_threshold, dropout_scale,
    G: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    F: tl.constexpr, F_T: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    b, h, m_block, rows_q, rows_k, w, score, drop = query_tile(
        CU_SEQLENS_Q, CU_SEQLENS_K, MASK, BIAS, SLOPES, SEED, stride_mask_b, stride_mask_h, stride_mask_m,
        stride_mask_n, stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n, stride_slope_b, stride_slope_h,
        B, H, S_q, S_k, shift, left, right, scale, softcap, dropout_threshold, dropout_scale, BLOCK_M, F,
    )  # fmt: skip
    m_start = m_block * BLOCK_M
    if F.VARLEN:
        if m_start >= rows_q.length:
            return
    tangents = scores_of(
        b, B, scale, softcap, TSLOPES, stride_tslope_b, stride_tslope_h, TBIAS, stride_tbias_b, stride_tbias_h,
        stride_tbias_m, stride_tbias_n, F_T,
    )  # fmt: skip
    tangent = head_score(tangents, h, F_T)
    q_rows = matrix(Q, rows_q, h, stride_qb, stride_qh, stride_qm, stride_qd, BLOCK_M, D, F)
    k_rows = matrix(K, rows_k, h // G, stride_kb, stride_kh, stride_kn, stride_kd, BLOCK_N, D, F)
    v_rows = matrix(V, rows_k, h // G, stride_vb, stride_vh, stride_vn, stride_vd, BLOCK_N, D_V, F)
    tk_rows = None
    tv_rows = None
    if TK is not None:
        tk_rows = matrix(TK, rows_k, h // G, stride_tkb, stride_tkh, stride_tkn, stride_tkd, BLOCK_N, D, F)
    if TV is not None:
        tv_rows = matrix(TV, rows_k, h // G, stride_tvb, stride_tvh, stride_tvn, stride_tvd, BLOCK_N, D_V, F)

    m = m_start + tl.arange(0, BLOCK_M)
    start = head_start(rows_q, h, H, S_q)
    lse, lse_low = load_lse(LSE + start, LSE_LOW + start, m, w.S_q)
    acc = zeros(BLOCK_M, D_V)
    mu = tl.zeros([BLOCK_M], tl.float32)
    SCORE: tl.constexpr = TQ is not None or TK is not None or F_T.BIAS or F_T.ALIBI
    if SCORE or TV is not None:
        q = load_tile(q_rows, m_start, m, w.S_q, True, D)  # (M, D)
        tq = None
        if TQ is not None:
            tq_rows = matrix(TQ, rows_q, h, stride_tqb, stride_tqh, stride_tqm, stride_tqd, BLOCK_M, D, F)
            tq = load_tile(tq_rows, m_start, m, w.S_q, True, D)
        non_finite = 0
        spans = key_spans(
            m_block, w, TILES, n_across, stride_tiles_b, stride_tiles_h, b, h, CU_SEQLENS_Q, BLOCK_M, BLOCK_N, F
        )
        if F.LEFT or F.MASK:
            acc, mu, non_finite = _tangent_span(
                acc, mu, non_finite, q, tq, lse, lse_low, k_rows, v_rows, tk_rows, tv_rows, m, spans.min, spans.left,
                spans, w, score, tangent, drop, D, D_V, BLOCK_N, True, SCORE, F, F_T, DOT,
            )  # fmt: skip
        acc, mu, non_finite = _tangent_span(
            acc, mu, non_finite, q, tq, lse, lse_low, k_rows, v_rows, tk_rows, tv_rows, m, spans.whole, spans.right,
            spans, w, score, tangent, drop, D, D_V, BLOCK_N, False, SCORE, F, F_T, DOT,
        )  # fmt: skip
        if not F.MASK:
            acc, mu, non_finite = _tangent_span(
                acc, mu, non_finite, q, tq, lse, lse_low, k_rows, v_rows, tk_rows, tv_rows, m, spans.right, spans.max,
                spans, w, score, tangent, drop, D, D_V, BLOCK_N, True, SCORE, F, F_T, DOT,
            )  # fmt: skip
        if TV is not None:
            if non_finite > 0:
                last = spans.left if F.MASK else spans.max
                acc = restore_non_finite(acc, tv_rows, m, spans.min, last, spans, w, D_V, BLOCK_N, F, DOT)
    if TSINKS is not None:
        p_sink = probability(load_sink(SINKS, stride_sink_h, h, b, B, F), lse, lse_low, 1.0)
        mu += p_sink * tl.load(TSINKS + h * stride_tsink_h).to(tl.float32)

    tl.store(TLSE + start + m, mu, mask=m < w.S_q)
    o_rows = matrix(O, rows_q, h, stride_ob, stride_oh, stride_om, stride_od, BLOCK_M, D_V, F)
    to_rows = matrix(TO, rows_q, h, stride_tob, stride_toh, stride_tom, stride_tod, BLOCK_M, D_V, F)
    o = load_tile(o_rows, m_start, m, w.S_q, True, D_V)  # (M, D_v)
    store_tile(to_rows, m_start, _minus_mean(acc, mu, o), m, w.S_q, D_V)


@triton.jit
def _minus_mean(acc, mu, o):
    """acc - mu o; NaN where o is not finite, since masked tiles left out what made it so."""
    to = ()
    for i in tl.static_range(len(acc)):
        to = to + (tl.where(is_finite(o[i]), acc[i] - mu[:, None] * o[i].to(tl.float32), float("nan")),)
    return to


def launch(
    to: Tensor,
    tlse: Tensor,
    t: AttentionInputs,
    x: AttentionInputs,
    o: Tensor,
    lse: Tensor,
    lse_low: Tensor,
    spec: AttentionSpec,
) -> None:
    """Fill the tangents of o and lse, from those of the inputs, each with the shape and dtype of its input; None: 0."""
    if x.B == 0:
        to.zero_()
        tlse.zero_()
        return
    cfg = jvp_config(arch(x), spec.D, spec.D_v, spec.dtype)
    grid = n_tiles(x, x.q.shape[2], cfg.BLOCK_M) * spec.H
    if grid == 0:
        return
    tslopes = t.alibi_slopes[None] if t.alibi_slopes is not None and t.alibi_slopes.dim() == 1 else t.alibi_slopes
    attention_jvp_kernel[(grid,)](
        TO=to, TLSE=tlse, TQ=t.q, TK=t.k, TV=t.v, TBIAS=t.bias, TSLOPES=tslopes, TSINKS=t.sinks,
        Q=x.q, K=x.k, V=x.v, O=o, LSE=lse.contiguous(), LSE_LOW=lse_low.contiguous(), SINKS=x.sinks, **strides("sink_",
        x.sinks, "h"), H=spec.H,
        **matrix_strides(to=to, tq=t.q, tk=t.k, tv=t.v, q=x.q, k=x.k, v=x.v, o=o),
        **strides("tbias_", t.bias, "bhmn"), **strides("tslope_", tslopes, "bh"), **strides("tsink_", t.sinks, "h"),
        **sequence_arguments(x, spec), **score_arguments(x, spec), **mask_tiles(x, spec, cfg),
        **constants(x, spec, o, to, t.q, t.k, t.v), F_T=tangent_features(t), **tile_arguments(cfg),
    )  # fmt: skip


def tangent_features(t: AttentionInputs) -> Features:
    """Which tangents of the scores' own inputs there are."""
    return Features(BIAS=t.bias is not None, ALIBI=t.alibi_slopes is not None)


def inspect_cases(arch: str) -> list:
    """The variants that the ahead-of-time report compiles."""
    from fastattn.backends.triton.attention_cases import jvp_cases

    return jvp_cases(arch)
