"""Attention backward, in two passes, each recomputing p from lse; every sum has one order, so its bits are repeatable.

    delta = rowsum(o ∘ do) - dlse      dp = do vᵀ      ds = p ∘ (dp - delta)
    dq = scale · ds k                  dk = scale · dsᵀ q                  dv = pᵀ do

The first pass holds a tile of queries, visits the keys it sees, and writes delta and dq. The second holds a tile of
keys and visits the queries that see it, over all heads of its group, and writes dk and dv. A gradient of lse enters
through delta alone, since ∂lse_i / ∂s_ij = p_ij. Shapes as in the forward; do (B, H, S_q, D_v), delta (B, H, S_q) fp32.
Source: Dao, "FlashAttention-2" (2023), algorithm 2.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastattn.backends.triton.attention_common import dropout_arguments, strides, window_arguments
from fastattn.backends.triton.blocks.block_range import key_range, query_range
from fastattn.backends.triton.blocks.dropout import dropout_factor
from fastattn.backends.triton.blocks.features import Dropout, Features, Score, Window
from fastattn.backends.triton.blocks.mask import finite_or_zero, visible
from fastattn.backends.triton.blocks.score import apply_score, score_factor, score_gradient
from fastattn.backends.triton.blocks.softmax import load_lse, probability
from fastattn.backends.triton.blocks.tile import dot, load_tile, offsets, store_tile
from fastattn.backends.triton.configs import arch_of, backward_config, dot_precision
from fastattn.spec import AttentionSpec


@triton.jit
def _query_span(
    dq, q, do, lse, delta, K, V, k_tile, v_tile, stride_kn, stride_vn,
    m, d, d_v, n_lo, n_hi, w, score, drop,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr, F: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dq / scale over key tiles n_lo … n_hi - 1."""
    factor = score_factor(score, F)
    for n_block in range(n_lo, n_hi):
        n_start = n_block * BLOCK_N
        n = n_start + tl.arange(0, BLOCK_N)
        row, col = m[:, None], n[None, :]
        k = load_tile(K + n_start.to(tl.int64) * stride_kn, k_tile, n, d, w.S_k, D, MASKED, D != BLOCK_D)  # (N, D)
        v = load_tile(V + n_start.to(tl.int64) * stride_vn, v_tile, n, d_v, w.S_k, D_V, MASKED, D_V != BLOCK_DV)
        zero = tl.zeros([q.shape[0], BLOCK_N], tl.float32)
        s = apply_score(dot(q, tl.trans(k), zero, DOT), row, col, w, score, F)  # (M, N)
        p = probability(s, lse[:, None], factor)
        dp = dot(do, tl.trans(v), zero, DOT) * dropout_factor(row, col, drop, F)
        ds = score_gradient(p * (dp - delta[:, None]), s, row, col, w, score, F)
        if MASKED:
            ds = tl.where(visible(row, col, w, F), ds, 0.0)
            k = finite_or_zero(k)
        dq = dot(ds.to(k.dtype), k, dq, DOT)
    return dq


@triton.jit
def attention_backward_dq_kernel(
    DQ, DELTA, Q, K, V, O, DO, LSE, DLSE, SEED,
    stride_dqb, stride_dqh, stride_dqm, stride_dqd,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_ob, stride_oh, stride_om, stride_od,
    stride_dob, stride_doh, stride_dom, stride_dod,
    stride_lb, stride_lh, stride_lm,
    H, S_q, S_k, shift, left, right, scale, dropout_threshold, dropout_scale,
    G: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    F: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    n_m_blocks = tl.cdiv(S_q, BLOCK_M)
    bh = tl.program_id(0) // n_m_blocks
    m_block = n_m_blocks - 1 - tl.program_id(0) % n_m_blocks
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    h_kv = h // G
    w = Window(S_q, S_k, shift, left, right)
    score = Score(scale)
    drop = Dropout(tl.load(SEED) if F.DROPOUT else 0, bh // H, bh % H, dropout_threshold, dropout_scale)

    m = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
    m_tile, n_tile = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    d, d_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    m_start = (m_block * BLOCK_M).to(tl.int64)
    O += b * stride_ob + h * stride_oh + m_start * stride_om
    DO += b * stride_dob + h * stride_doh + m_start * stride_dom
    o = load_tile(O, offsets(m_tile, d_v, stride_om, stride_od, F), m, d_v, S_q, D_V, True, D_V != BLOCK_DV)  # (M, D_v)
    do = load_tile(DO, offsets(m_tile, d_v, stride_dom, stride_dod, F), m, d_v, S_q, D_V, True, D_V != BLOCK_DV)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if DLSE is not None:
        delta -= tl.load(DLSE + b * stride_lb + h * stride_lh + m.to(tl.int64) * stride_lm, mask=m < S_q, other=0.0)
    tl.store(DELTA + bh.to(tl.int64) * S_q + m, delta, mask=m < S_q)

    if DQ is not None:
        lse = load_lse(LSE + bh.to(tl.int64) * S_q, m, S_q)
        Q += b * stride_qb + h * stride_qh + m_start * stride_qm
        K += b * stride_kb + h_kv * stride_kh
        V += b * stride_vb + h_kv * stride_vh
        q = load_tile(Q, offsets(m_tile, d, stride_qm, stride_qd, F), m, d, S_q, D, True, D != BLOCK_D)  # (M, D)
        k_tile = offsets(n_tile, d, stride_kn, stride_kd, F)
        v_tile = offsets(n_tile, d_v, stride_vn, stride_vd, F)
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        n_min, n_left, n_right, n_max = key_range(m_block, w, BLOCK_M, BLOCK_N, F)
        if F.LEFT:
            dq = _query_span(
                dq, q, do, lse, delta, K, V, k_tile, v_tile, stride_kn, stride_vn, m, d, d_v, n_min, n_left,
                w, score, drop, D, D_V, BLOCK_N, BLOCK_D, BLOCK_DV, True, F, DOT,
            )  # fmt: skip
        dq = _query_span(
            dq, q, do, lse, delta, K, V, k_tile, v_tile, stride_kn, stride_vn, m, d, d_v, n_left, n_right,
            w, score, drop, D, D_V, BLOCK_N, BLOCK_D, BLOCK_DV, False, F, DOT,
        )  # fmt: skip
        dq = _query_span(
            dq, q, do, lse, delta, K, V, k_tile, v_tile, stride_kn, stride_vn, m, d, d_v, n_right, n_max,
            w, score, drop, D, D_V, BLOCK_N, BLOCK_D, BLOCK_DV, True, F, DOT,
        )  # fmt: skip
        DQ += b * stride_dqb + h * stride_dqh + m_start * stride_dqm
        store_tile(DQ, offsets(m_tile, d, stride_dqm, stride_dqd, F), dq * scale, m, d, S_q, D)


@triton.jit
def _key_span(
    dk, dv, k, v, Q, DO, LSE, DELTA, SEED, q_tile, do_tile, stride_qh, stride_qm, stride_doh, stride_dom,
    n, d, d_v, m_lo, m_hi, w, score, b, h_first, dropout_threshold, dropout_scale,
    G: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr, F: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dk / scale and dv over query tiles m_lo … m_hi - 1 of the G heads from h_first on.

    s, p, dp and ds are transposed, (N, M). Heads and tiles are one loop, so that loads run ahead from head to head.
    """
    factor = score_factor(score, F)
    for i in range(G * (m_hi - m_lo)):
        g = i // (m_hi - m_lo)
        m_start = (m_lo + i - g * (m_hi - m_lo)) * BLOCK_M
        m = m_start + tl.arange(0, BLOCK_M)
        row, col = m[None, :], n[:, None]
        drop = Dropout(tl.load(SEED) if F.DROPOUT else 0, b, h_first + g, dropout_threshold, dropout_scale)
        Q_tile = Q + g.to(tl.int64) * stride_qh + m_start.to(tl.int64) * stride_qm
        DO_tile = DO + g.to(tl.int64) * stride_doh + m_start.to(tl.int64) * stride_dom
        LSE_head = LSE + g.to(tl.int64) * w.S_q
        q = load_tile(Q_tile, q_tile, m, d, w.S_q, D, True, D != BLOCK_D)  # (M, D)
        do = load_tile(DO_tile, do_tile, m, d_v, w.S_q, D_V, True, D_V != BLOCK_DV)  # (M, D_v)
        lse = load_lse(LSE_head, m, w.S_q)
        delta = tl.load(DELTA + g.to(tl.int64) * w.S_q + m, mask=m < w.S_q, other=0.0)
        zero = tl.zeros([k.shape[0], BLOCK_M], tl.float32)
        s = apply_score(dot(k, tl.trans(q), zero, DOT), row, col, w, score, F)  # (N, M)
        p = probability(s, lse[None, :], factor)
        dropped = dropout_factor(row, col, drop, F)
        dp = dot(v, tl.trans(do), zero, DOT) * dropped
        ds = score_gradient(p * (dp - delta[None, :]), s, row, col, w, score, F)
        if MASKED:
            keep = visible(row, col, w, F)
            p = tl.where(keep, p, 0.0)
            ds = tl.where(keep, ds, 0.0)
            q = finite_or_zero(q)
        dv = dot((p * dropped).to(do.dtype), do, dv, DOT)
        dk = dot(ds.to(q.dtype), q, dk, DOT)
    return dk, dv


@triton.jit
def attention_backward_dkdv_kernel(
    DK, DV, DELTA, Q, K, V, DO, LSE, SEED,
    stride_dkb, stride_dkh, stride_dkn, stride_dkd,
    stride_dvb, stride_dvh, stride_dvn, stride_dvd,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_dob, stride_doh, stride_dom, stride_dod,
    H_kv, S_q, S_k, shift, left, right, scale, dropout_threshold, dropout_scale,
    G: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    F: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    n_n_blocks = tl.cdiv(S_k, BLOCK_N)
    bh = tl.program_id(0) // n_n_blocks
    n_block = tl.program_id(0) % n_n_blocks
    b, h_kv = (bh // H_kv).to(tl.int64), (bh % H_kv).to(tl.int64)
    w = Window(S_q, S_k, shift, left, right)
    score = Score(scale)

    n = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    m_tile, n_tile = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    d, d_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    n_start = (n_block * BLOCK_N).to(tl.int64)
    K += b * stride_kb + h_kv * stride_kh + n_start * stride_kn
    V += b * stride_vb + h_kv * stride_vh + n_start * stride_vn
    k = load_tile(K, offsets(n_tile, d, stride_kn, stride_kd, F), n, d, S_k, D, True, D != BLOCK_D)  # (N, D)
    v = load_tile(V, offsets(n_tile, d_v, stride_vn, stride_vd, F), n, d_v, S_k, D_V, True, D_V != BLOCK_DV)  # (N, D_v)
    q_tile = offsets(m_tile, d, stride_qm, stride_qd, F)
    do_tile = offsets(m_tile, d_v, stride_dom, stride_dod, F)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    m_min, m_left, m_right, m_max = query_range(n_block, w, BLOCK_M, BLOCK_N, F)

    h_first = bh % H_kv * G
    Q += b * stride_qb + h_first.to(tl.int64) * stride_qh
    DO += b * stride_dob + h_first.to(tl.int64) * stride_doh
    LSE += bh.to(tl.int64) * G * S_q
    DELTA += bh.to(tl.int64) * G * S_q
    if F.RIGHT:
        dk, dv = _key_span(
            dk, dv, k, v, Q, DO, LSE, DELTA, SEED, q_tile, do_tile, stride_qh, stride_qm, stride_doh, stride_dom,
            n, d, d_v, m_min, m_left, w, score, bh // H_kv, h_first, dropout_threshold, dropout_scale,
            G, D, D_V, BLOCK_M, BLOCK_D, BLOCK_DV, True, F, DOT,
        )  # fmt: skip
    dk, dv = _key_span(
        dk, dv, k, v, Q, DO, LSE, DELTA, SEED, q_tile, do_tile, stride_qh, stride_qm, stride_doh, stride_dom,
        n, d, d_v, m_left, m_right, w, score, bh // H_kv, h_first, dropout_threshold, dropout_scale,
        G, D, D_V, BLOCK_M, BLOCK_D, BLOCK_DV, False, F, DOT,
    )  # fmt: skip
    if F.LEFT:
        dk, dv = _key_span(
            dk, dv, k, v, Q, DO, LSE, DELTA, SEED, q_tile, do_tile, stride_qh, stride_qm, stride_doh, stride_dom,
            n, d, d_v, m_right, m_max, w, score, bh // H_kv, h_first, dropout_threshold, dropout_scale,
            G, D, D_V, BLOCK_M, BLOCK_D, BLOCK_DV, True, F, DOT,
        )  # fmt: skip

    if DK is not None:
        DK += b * stride_dkb + h_kv * stride_dkh + n_start * stride_dkn
        store_tile(DK, offsets(n_tile, d, stride_dkn, stride_dkd, F), dk * scale, n, d, S_k, D)
    if DV is not None:
        DV += b * stride_dvb + h_kv * stride_dvh + n_start * stride_dvn
        store_tile(DV, offsets(n_tile, d_v, stride_dvn, stride_dvd, F), dv, n, d_v, S_k, D_V)


def launch(
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    do: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seed: Tensor | None,
    o: Tensor,
    lse: Tensor,
    spec: AttentionSpec,
) -> None:
    """Fill the gradients that are not None, from the gradients of o and lse that are not None."""
    B, H, S_q, D = q.shape
    H_kv, S_k, D_v = v.shape[1:]
    if do is None:
        do = o.new_zeros(()).expand(o.shape)
    cfg = backward_config(arch_of(q.device), D, D_v, q.dtype)
    window = window_arguments(spec, S_q, S_k)
    constants = {
        "G": spec.G,
        "D": D,
        "D_V": D_v,
        "F": Features.of(spec, q, k, v, o, do, dq, dk, dv),
        "DOT": dot_precision(q.dtype),
    }
    delta = lse.new_empty(lse.shape)
    grid = triton.cdiv(S_q, cfg.dq.BLOCK_M) * B * H
    if grid > 0:
        attention_backward_dq_kernel[(grid,)](
            dq, delta, q, k, v, o, do, lse, dlse, seed, *strides(dq), *q.stride(), *k.stride(), *v.stride(),
            *o.stride(), *do.stride(), *strides(dlse, 3), H, S_q, S_k, *window, spec.scale, *dropout_arguments(spec),
            **constants, **cfg.dq.launch_options(D, D_v),
        )  # fmt: skip
    grid = triton.cdiv(S_k, cfg.dkdv.BLOCK_N) * B * H_kv
    if grid > 0 and not (dk is None and dv is None):
        attention_backward_dkdv_kernel[(grid,)](
            dk, dv, delta, q, k, v, do, lse, seed, *strides(dk), *strides(dv), *q.stride(), *k.stride(), *v.stride(),
            *do.stride(), H_kv, S_q, S_k, *window, spec.scale, *dropout_arguments(spec),
            **constants, **cfg.dkdv.launch_options(D, D_v),
        )  # fmt: skip


def inspect_cases(arch: str) -> list:
    """The variants that the ahead-of-time report compiles."""
    from fastattn.backends.triton.attention_cases import backward_cases

    return backward_cases(arch)
