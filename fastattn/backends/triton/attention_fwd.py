"""Attention forward: one program makes one tile of o, reading the keys its rows see once, in order.

    s = f(q kᵀ) (M, N);   p = exp(s - row_max);   o = dropout(p) v / row_sum;   lse + lse_low = row_max + log row_sum

8-bit q and k are multiplied as they are; v is widened, so that p keeps the precision of bfloat16.

q (B, H, S_q, D), k (B, H_kv, S_k, D), v (B, H_kv, S_k, D_v), any strides; o (B, H, S_q, D_v); lse (B, H, S_q) fp32.
Packed sequences are (1, H, T, D) with cu_seqlens. Source: Dao, "FlashAttention-2" (2023), algorithm 1.
"""

import math

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
from fastattn.backends.triton.blocks.block_range import key_spans, tile_at
from fastattn.backends.triton.blocks.constants import NEG_INF
from fastattn.backends.triton.blocks.dropout import dropout_factor
from fastattn.backends.triton.blocks.mask import (
    add_infinity,
    finite_or_zero,
    has_non_finite,
    visible,
)
from fastattn.backends.triton.blocks.query_tile import query_tile
from fastattn.backends.triton.blocks.score import apply_score, logit_scale, scaled_score
from fastattn.backends.triton.blocks.seqlen import head_start
from fastattn.backends.triton.blocks.softmax import finish_softmax, load_sink, online_softmax
from fastattn.backends.triton.blocks.tile import inner, load_tile, matrix, outer, scaled, store_tile, widened, zeros
from fastattn.backends.triton.configs import forward_config
from fastattn.backends.triton.mask_tiles import mask_tiles
from fastattn.spec import AttentionInputs, AttentionSpec


@triton.jit
def _forward_span(
    acc, row_max, row_sum, non_finite, q, k_rows, v_rows, m, i_lo, i_hi, spans, w, score, drop,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, F: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The key tiles at places i_lo … i_hi - 1, of which all entries are visible unless MASKED.

    A masked tile adds only what is finite in v, and `non_finite` counts the tiles in which something was not.
    """
    scale = logit_scale(score, F)
    for i in range(i_lo, i_hi):
        n_start = tile_at(i, spans, F) * BLOCK_N
        n = n_start + tl.arange(0, BLOCK_N)
        row, col = m[:, None], n[None, :]
        k = load_tile(k_rows, n_start, n, w.S_k, MASKED, D)  # (N, D)
        if F.FP8 and DOT == "interpret":
            k = widened(k)
        s, _ = apply_score(inner(q, k, DOT), row, col, w, score, MASKED, F)  # (M, N)
        if MASKED:
            s = tl.where(visible(row, col, w, F), s, NEG_INF)
        p, rescale, row_max, row_sum = online_softmax(s, row_max, row_sum, scale)
        p = p * dropout_factor(row, col, drop, F)
        v = load_tile(v_rows, n_start, n, w.S_k, MASKED, D_V)  # (N, D_v)
        if F.FP8:
            v = widened(v)
        if MASKED and (F.LEFT or F.RIGHT or F.MASK):
            non_finite += has_non_finite(v)
            v = finite_or_zero(v)
        acc = outer(p, v, scaled(acc, rescale[:, None]), DOT)
    return acc, row_max, row_sum, non_finite


@triton.jit
def restore_non_finite(
    acc, v_rows, m, i_lo, i_hi, spans, w, D_V: tl.constexpr, BLOCK_N: tl.constexpr, F: tl.constexpr, DOT: tl.constexpr
):
    """Give each row the non-finite values that it sees and masked tiles left out: inf in one turn, -inf in the next.

    A NaN comes in both, and inf - inf is NaN. Twice changes nothing, so unmasked tiles may come again. Rare, hence
    small rather than fast.
    """
    for i in tl.range(0, 2 * (i_hi - i_lo), num_stages=1):
        n_start = tile_at(i_lo + i // 2, spans, F) * BLOCK_N
        n = n_start + tl.arange(0, BLOCK_N)
        v = load_tile(v_rows, n_start, n, w.S_k, True, D_V)
        acc = add_infinity(acc, v, visible(m[:, None], n[None, :], w, F), 1.0 - 2.0 * (i % 2), DOT)
    return acc


@triton.jit
def attention_forward_kernel(
    Q, K, V, O, LSE, LSE_LOW, CU_SEQLENS_Q, CU_SEQLENS_K, TILES, MASK, BIAS, SLOPES, SINKS, SEED,
    QK_SCALES, V_SCALES,
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
    F: tl.constexpr, DOT: tl.constexpr,
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
    if F.FP8:  # packed rows after the last of B sequences use none
        score = scaled_score(score, tl.load(QK_SCALES + b * H + h, mask=b < B, other=1.0))
    q_rows = matrix(Q, rows_q, h, stride_qb, stride_qh, stride_qm, stride_qd, BLOCK_M, D, F)
    k_rows = matrix(K, rows_k, h // G, stride_kb, stride_kh, stride_kn, stride_kd, BLOCK_N, D, F)
    v_rows = matrix(V, rows_k, h // G, stride_vb, stride_vh, stride_vn, stride_vd, BLOCK_N, D_V, F)

    m = m_start + tl.arange(0, BLOCK_M)
    q = load_tile(q_rows, m_start, m, w.S_q, True, D)  # (M, D)
    if F.FP8 and DOT == "interpret":
        q = widened(q)
    acc = zeros(BLOCK_M, D_V)
    row_max = tl.full([BLOCK_M], NEG_INF, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    non_finite = 0
    spans = key_spans(
        m_block, w, TILES, n_across, stride_tiles_b, stride_tiles_h, b, h, CU_SEQLENS_Q, BLOCK_M, BLOCK_N, F
    )
    if F.LEFT or F.MASK:
        acc, row_max, row_sum, non_finite = _forward_span(
            acc, row_max, row_sum, non_finite, q, k_rows, v_rows, m, spans.min, spans.left, spans, w, score, drop,
            D, D_V, BLOCK_N, True, F, DOT,
        )  # fmt: skip
    acc, row_max, row_sum, non_finite = _forward_span(
        acc, row_max, row_sum, non_finite, q, k_rows, v_rows, m, spans.whole, spans.right, spans, w, score, drop,
        D, D_V, BLOCK_N, False, F, DOT,
    )  # fmt: skip
    if not F.MASK:
        acc, row_max, row_sum, non_finite = _forward_span(
            acc, row_max, row_sum, non_finite, q, k_rows, v_rows, m, spans.right, spans.max, spans, w, score, drop,
            D, D_V, BLOCK_N, True, F, DOT,
        )  # fmt: skip
    if F.LEFT or F.RIGHT or F.MASK:
        if non_finite > 0:
            last = spans.left if F.MASK else spans.max
            acc = restore_non_finite(acc, v_rows, m, spans.min, last, spans, w, D_V, BLOCK_N, F, DOT)

    sink = load_sink(SINKS, stride_sink_h, h, b, B, F)
    o, lse, lse_low = finish_softmax(acc, row_max, row_sum, logit_scale(score, F), sink, F)
    if F.FP8:
        o = scaled(o, tl.load(V_SCALES + (b * H + h) // G, mask=b < B, other=1.0))
    o_rows = matrix(O, rows_q, h, stride_ob, stride_oh, stride_om, stride_od, BLOCK_M, D_V, F)
    store_tile(o_rows, m_start, o, m, w.S_q, D_V)
    start = head_start(rows_q, h, H, S_q)
    tl.store(LSE + start + m, lse, mask=m < w.S_q)
    tl.store(LSE_LOW + start + m, lse_low, mask=m < w.S_q)


def launch(o: Tensor, lse: Tensor, lse_low: Tensor, x: AttentionInputs, spec: AttentionSpec) -> None:
    """Fill o, lse and lse_low."""
    if x.B == 0:
        o.zero_()
        lse.fill_(-math.inf)
        lse_low.zero_()
        return
    cfg = forward_config(arch(x), spec.D, spec.D_v, spec.dtype)
    grid = n_tiles(x, x.q.shape[2], cfg.BLOCK_M) * spec.H
    if grid == 0:
        return
    attention_forward_kernel[(grid,)](
        Q=x.q, K=x.k, V=x.v, O=o, LSE=lse, LSE_LOW=lse_low, SINKS=x.sinks, QK_SCALES=x.qk_scales, V_SCALES=x.v_scales,
        H=spec.H, **matrix_strides(q=x.q, k=x.k, v=x.v, o=o), **strides("sink_", x.sinks, "h"),
        **sequence_arguments(x, spec), **score_arguments(x, spec), **mask_tiles(x, spec, cfg),
        **constants(x, spec, o), **tile_arguments(cfg),
    )  # fmt: skip


def inspect_cases(arch: str) -> list:
    """The variants that the ahead-of-time report compiles."""
    from fastattn.backends.triton.attention_cases import forward_cases

    return forward_cases(arch)
