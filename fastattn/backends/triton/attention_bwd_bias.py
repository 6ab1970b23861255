"""The gradient of an additive bias, summed over the dimensions that it was broadcast over; the third backward pass.

    dbias[b', h', m', n'] = Σ ds over the (b, h, i, j) that read this entry,    ds = p ∘ (dp - delta)

One program owns a tile of the bias and walks, in order, over the batch elements, heads, rows and keys that share it, or
over one part of them; nothing is added atomically and no S_q × S_k matrix is held unless the bias is one.
Shapes as in attention_bwd.py; it needs delta from there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.backends.triton.attention_common import (
    constants,
    matrix_strides,
    score_arguments,
    sequence_arguments,
    tile_arguments,
)
from fastattn.backends.triton.blocks.block_range import key_range
from fastattn.backends.triton.blocks.cast import cast
from fastattn.backends.triton.blocks.dropout import dropout_factor
from fastattn.backends.triton.blocks.features import Dropout
from fastattn.backends.triton.blocks.mask import head_window, visible, window_of
from fastattn.backends.triton.blocks.score import apply_score, head_score, logit_scale, scores_of
from fastattn.backends.triton.blocks.seqlen import head_start, sequence
from fastattn.backends.triton.blocks.softmax import load_lse, probability
from fastattn.backends.triton.blocks.tile import inner, load_tile, matrix
from fastattn.backends.triton.configs import TileConfig
from fastattn.spec import AttentionInputs, AttentionSpec

_PROGRAMS = 512  # a bias of few tiles is cut into parts, so that there are about so many programs


@triton.jit
def attention_backward_dbias_kernel(
    DBIAS, DELTA, Q, K, V, DO, LSE, LSE_LOW, CU_SEQLENS_Q, CU_SEQLENS_K, MASK, BIAS, SLOPES, SEED,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_dob, stride_doh, stride_dom, stride_dod,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    stride_slope_b, stride_slope_h,
    n_parts, B_bias, H_bias, M_bias, N_bias,
    B, H, S_q, S_k, shift, left, right, scale, softcap, dropout_threshold, dropout_scale,
    REDUCE_M: tl.constexpr, REDUCE_N: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    F: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    # Program -> (part, b', h', m', n'), tiles of the bias; and how many of each the reduction runs over.
    tiles_m, tiles_n = tl.cdiv(M_bias, BLOCK_M), tl.cdiv(N_bias, BLOCK_N)
    pid = tl.program_id(0)
    n_own, rest = pid % tiles_n, pid // tiles_n
    m_own, rest = rest % tiles_m, rest // tiles_m
    h_own, rest = rest % H_bias, rest // H_bias
    b_own, part = rest % B_bias, rest // B_bias
    over_b, over_h = tl.where(B_bias == 1, B, 1), tl.where(H_bias == 1, H, 1)
    over_m = tl.cdiv(S_q, BLOCK_M) if REDUCE_M else 1
    over_n = tl.cdiv(S_k, BLOCK_N) if REDUCE_N else 1
    total = over_b.to(tl.int64) * over_h * over_m * over_n

    seed = tl.load(SEED) if F.DROPOUT else 0
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(total * part // n_parts, total * (part + 1) // n_parts):
        n_block, outer = n_own + (step % over_n).to(tl.int32), step // over_n
        m_block, outer = m_own + (outer % over_m).to(tl.int32), outer // over_m
        h, b = h_own + (outer % over_h).to(tl.int32), b_own + (outer // over_h).to(tl.int32)
        rows_q, rows_k = sequence(b, CU_SEQLENS_Q, S_q, F), sequence(b, CU_SEQLENS_K, S_k, F)
        w = window_of(
            b, rows_q.length, rows_k.length, shift, left, right, MASK, stride_mask_b, stride_mask_h, stride_mask_m,
            stride_mask_n, F,
        )  # fmt: skip
        w = head_window(w, h, F)
        spans = key_range(m_block, w, BLOCK_M, BLOCK_N, F)
        if (m_block * BLOCK_M < w.S_q) & (n_block >= spans.min) & (n_block < spans.max):
            scores = scores_of(
                b, B, scale, softcap, SLOPES, stride_slope_b, stride_slope_h, BIAS, stride_bias_b, stride_bias_h,
                stride_bias_m, stride_bias_n, F,
            )  # fmt: skip
            score = head_score(scores, h, F)
            drop = Dropout(seed, b, h, dropout_threshold, dropout_scale)
            m_start, n_start = m_block * BLOCK_M, n_block * BLOCK_N
            m, n = m_start + tl.arange(0, BLOCK_M), n_start + tl.arange(0, BLOCK_N)
            row, col = m[:, None], n[None, :]
            q_rows = matrix(Q, rows_q, h, stride_qb, stride_qh, stride_qm, stride_qd, BLOCK_M, D, F)
            do_rows = matrix(DO, rows_q, h, stride_dob, stride_doh, stride_dom, stride_dod, BLOCK_M, D_V, F)
            k_rows = matrix(K, rows_k, h // G, stride_kb, stride_kh, stride_kn, stride_kd, BLOCK_N, D, F)
            v_rows = matrix(V, rows_k, h // G, stride_vb, stride_vh, stride_vn, stride_vd, BLOCK_N, D_V, F)
            start = head_start(rows_q, h, H, S_q)
            q = load_tile(q_rows, m_start, m, w.S_q, True, D)  # (M, D)
            k = load_tile(k_rows, n_start, n, w.S_k, True, D)  # (N, D)
            v = load_tile(v_rows, n_start, n, w.S_k, True, D_V)  # (N, D_v)
            do = load_tile(do_rows, m_start, m, w.S_q, True, D_V)  # (M, D_v)
            lse, lse_low = load_lse(LSE + start, LSE_LOW + start, m, w.S_q)
            delta = tl.load(DELTA + start + m, mask=m < w.S_q, other=0.0)
            s, _ = apply_score(inner(q, k, DOT), row, col, w, score, True, F)  # (M, N)
            p = probability(s, lse[:, None], lse_low[:, None], logit_scale(score, F))
            dp = inner(do, v, DOT) * dropout_factor(row, col, drop, F)
            acc += tl.where(visible(row, col, w, F), p * (dp - delta[:, None]), 0.0)

    # (part, b', h', m', n'), contiguous
    m = m_own * BLOCK_M + tl.arange(0, BLOCK_M)
    n = n_own * BLOCK_N + tl.arange(0, BLOCK_N)
    DBIAS += ((part * B_bias + b_own).to(tl.int64) * H_bias + h_own) * M_bias * N_bias
    dtype = DBIAS.dtype.element_ty
    if REDUCE_M and REDUCE_N:
        tl.store(DBIAS, cast(tl.sum(tl.sum(acc, 1), 0), dtype))
    elif REDUCE_M:
        tl.store(DBIAS + n, cast(tl.sum(acc, 0), dtype), mask=n < N_bias)
    elif REDUCE_N:
        tl.store(DBIAS + m, cast(tl.sum(acc, 1), dtype), mask=m < M_bias)
    else:
        entry = m.to(tl.int64)[:, None] * N_bias + n[None, :]
        tl.store(DBIAS + entry, cast(acc, dtype), mask=(m < M_bias)[:, None] & (n < N_bias)[None, :])


def run_dbias(
    dbias: Tensor,
    delta: Tensor,
    do: Tensor,
    x: AttentionInputs,
    lse: Tensor,
    lse_low: Tensor,
    spec: AttentionSpec,
    cfg: TileConfig,
) -> None:
    """Fill dbias, contiguous."""
    B, H, M, N = dbias.shape
    tiles = B * H * triton.cdiv(M, cfg.BLOCK_M) * triton.cdiv(N, cfg.BLOCK_N)
    if tiles == 0:
        return
    shared = (x.B if B == 1 else 1) * (spec.H if H == 1 else 1)
    shared *= (triton.cdiv(x.q.shape[2], cfg.BLOCK_M) if M == 1 else 1) * (
        triton.cdiv(x.k.shape[2], cfg.BLOCK_N) if N == 1 else 1
    )
    n_parts = max(1, min(shared, _PROGRAMS // tiles))
    parts = dbias[None] if n_parts == 1 else torch.empty(n_parts, *dbias.shape, dtype=lse.dtype, device=lse.device)
    attention_backward_dbias_kernel[(n_parts * tiles,)](
        DBIAS=parts, DELTA=delta, Q=x.q, K=x.k, V=x.v, DO=do, LSE=lse, LSE_LOW=lse_low, H=spec.H,
        n_parts=n_parts, B_bias=B, H_bias=H, M_bias=M, N_bias=N, REDUCE_M=M == 1, REDUCE_N=N == 1,
        **matrix_strides(q=x.q, k=x.k, v=x.v, do=do), **sequence_arguments(x, spec), **score_arguments(x, spec),
        **constants(x, spec, do), **tile_arguments(cfg),
    )  # fmt: skip
    if n_parts > 1:
        dbias.copy_(parts.sum(0))
