"""Attention forward: one program makes one tile of o, reading the keys its rows see once, in order.

    s = f(q kᵀ) (M, N);   p = exp(s - row_max);   o = p v / row_sum;   lse = row_max + log row_sum

q (B, H, S_q, D), k (B, H_kv, S_k, D), v (B, H_kv, S_k, D_v), any strides; o (B, H, S_q, D_v); lse (B, H, S_q) fp32.
Source: Dao, "FlashAttention-2" (2023), algorithm 1.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastattn.backends.triton.attention_common import dropout_arguments, window_arguments
from fastattn.backends.triton.blocks.block_range import key_range
from fastattn.backends.triton.blocks.constants import NEG_INF
from fastattn.backends.triton.blocks.dropout import dropout_factor
from fastattn.backends.triton.blocks.features import Dropout, Features, Score, Window
from fastattn.backends.triton.blocks.mask import add_infinity, finite_or_zero, has_non_finite, visible
from fastattn.backends.triton.blocks.score import apply_score, score_factor
from fastattn.backends.triton.blocks.softmax import finish_softmax, online_softmax
from fastattn.backends.triton.blocks.tile import dot, load_tile, offsets, store_tile
from fastattn.backends.triton.configs import arch_of, dot_precision, forward_config
from fastattn.spec import AttentionSpec


@triton.jit
def _forward_span(
    acc, row_max, row_sum, non_finite, q, K, V, k_tile, v_tile, stride_kn, stride_vn,
    m, d, d_v, n_lo, n_hi, w, score, drop,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr, F: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Key tiles n_lo … n_hi - 1, of which all entries are visible unless MASKED.

    A masked tile adds only what is finite in v, and `non_finite` counts the tiles in which something was not.
    """
    factor = score_factor(score, F)
    for n_block in range(n_lo, n_hi):
        n_start = n_block * BLOCK_N
        n = n_start + tl.arange(0, BLOCK_N)
        row, col = m[:, None], n[None, :]
        k = load_tile(K + n_start.to(tl.int64) * stride_kn, k_tile, n, d, w.S_k, D, MASKED, D != BLOCK_D)  # (N, D)
        s = dot(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_N], tl.float32), DOT)  # (M, N)
        s = apply_score(s, row, col, w, score, F)
        if MASKED:
            s = tl.where(visible(row, col, w, F), s, NEG_INF)
        p, rescale, row_max, row_sum = online_softmax(s, row_max, row_sum, factor)
        p = p * dropout_factor(row, col, drop, F)
        v = load_tile(V + n_start.to(tl.int64) * stride_vn, v_tile, n, d_v, w.S_k, D_V, MASKED, D_V != BLOCK_DV)
        if MASKED and (F.LEFT or F.RIGHT):
            non_finite += has_non_finite(v)
            v = finite_or_zero(v)
        acc = dot(p.to(v.dtype), v, acc * rescale[:, None], DOT)
    return acc, row_max, row_sum, non_finite


@triton.jit
def _restore_non_finite(
    acc, V, v_tile, stride_vn, m, d_v, n_min, n_max, w,
    D_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DV: tl.constexpr, F: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Give each row the non-finite values that it sees and masked tiles left out: inf in one turn, -inf in the next.

    A NaN comes in both, and inf - inf is NaN. Twice changes nothing, so unmasked tiles may come again. Rare, hence
    small rather than fast.
    """
    for i in tl.range(0, 2 * (n_max - n_min), num_stages=1):
        n_start = (n_min + i // 2) * BLOCK_N
        n = n_start + tl.arange(0, BLOCK_N)
        v = load_tile(V + n_start.to(tl.int64) * stride_vn, v_tile, n, d_v, w.S_k, D_V, True, D_V != BLOCK_DV)
        acc = add_infinity(acc, v, visible(m[:, None], n[None, :], w, F), 1.0 - 2.0 * (i % 2), DOT)
    return acc


@triton.jit
def attention_forward_kernel(
    Q, K, V, O, LSE, SEED,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_ob, stride_oh, stride_om, stride_od,
    H, S_q, S_k, shift, left, right, scale, dropout_threshold, dropout_scale,
    G: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    F: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs share a head, and with it K and V in L2; the longest causal rows start first.
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
    Q += b * stride_qb + h * stride_qh + m_start * stride_qm
    K += b * stride_kb + h_kv * stride_kh
    V += b * stride_vb + h_kv * stride_vh
    q = load_tile(Q, offsets(m_tile, d, stride_qm, stride_qd, F), m, d, S_q, D, True, D != BLOCK_D)  # (M, D)
    k_tile = offsets(n_tile, d, stride_kn, stride_kd, F)
    v_tile = offsets(n_tile, d_v, stride_vn, stride_vd, F)

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_max = tl.full([BLOCK_M], NEG_INF, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    non_finite = 0
    n_min, n_left, n_right, n_max = key_range(m_block, w, BLOCK_M, BLOCK_N, F)
    if F.LEFT:
        acc, row_max, row_sum, non_finite = _forward_span(
            acc, row_max, row_sum, non_finite, q, K, V, k_tile, v_tile, stride_kn, stride_vn, m, d, d_v, n_min,
            n_left, w, score, drop, D, D_V, BLOCK_N, BLOCK_D, BLOCK_DV, True, F, DOT,
        )  # fmt: skip
    acc, row_max, row_sum, non_finite = _forward_span(
        acc, row_max, row_sum, non_finite, q, K, V, k_tile, v_tile, stride_kn, stride_vn, m, d, d_v, n_left,
        n_right, w, score, drop, D, D_V, BLOCK_N, BLOCK_D, BLOCK_DV, False, F, DOT,
    )  # fmt: skip
    acc, row_max, row_sum, non_finite = _forward_span(
        acc, row_max, row_sum, non_finite, q, K, V, k_tile, v_tile, stride_kn, stride_vn, m, d, d_v, n_right,
        n_max, w, score, drop, D, D_V, BLOCK_N, BLOCK_D, BLOCK_DV, True, F, DOT,
    )  # fmt: skip
    if F.LEFT or F.RIGHT:
        if non_finite > 0:
            acc = _restore_non_finite(
                acc, V, v_tile, stride_vn, m, d_v, n_min, n_max, w, D_V, BLOCK_N, BLOCK_DV, F, DOT
            )

    o, lse = finish_softmax(acc, row_max, row_sum, score_factor(score, F))
    O += b * stride_ob + h * stride_oh + m_start * stride_om
    store_tile(O, offsets(m_tile, d_v, stride_om, stride_od, F), o, m, d_v, S_q, D_V)
    tl.store(LSE + bh.to(tl.int64) * S_q + m, lse, mask=m < S_q)


def launch(o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, seed: Tensor | None, spec: AttentionSpec) -> None:
    """Fill o and lse."""
    B, H, S_q, D = q.shape
    S_k, D_v = v.shape[2:]
    cfg = forward_config(arch_of(q.device), D, D_v, q.dtype)
    grid = (triton.cdiv(S_q, cfg.BLOCK_M) * B * H,)
    if grid[0] == 0:
        return
    attention_forward_kernel[grid](
        q, k, v, o, lse, seed, *q.stride(), *k.stride(), *v.stride(), *o.stride(), H, S_q, S_k,
        *window_arguments(spec, S_q, S_k), spec.scale, *dropout_arguments(spec),
        G=spec.G, D=D, D_V=D_v, F=Features.of(spec, q, k, v, o), DOT=dot_precision(q.dtype),
        **cfg.launch_options(D, D_v),
    )  # fmt: skip


def inspect_cases(arch: str) -> list:
    """The variants that the ahead-of-time report compiles."""
    from fastattn.backends.triton.attention_cases import forward_cases

    return forward_cases(arch)
