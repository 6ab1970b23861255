"""What a program that owns a tile of queries works on: which rows, which keys they see, and how scores are made."""

from typing import NamedTuple

import triton
import triton.language as tl

from fastattn.backends.triton.blocks.features import Dropout, Score, Window
from fastattn.backends.triton.blocks.mask import head_window, window_of
from fastattn.backends.triton.blocks.score import head_score, scores_of
from fastattn.backends.triton.blocks.seqlen import Rows, locate, other_rows, own_rows


class QueryTile(NamedTuple):
    """Tile m_block of head h of sequence b."""

    b: tl.tensor
    h: tl.tensor
    m_block: tl.tensor
    rows_q: Rows
    rows_k: Rows
    w: Window
    score: Score
    drop: Dropout


@triton.jit
def query_tile(
    CU_SEQLENS_Q, CU_SEQLENS_K, MASK, BIAS, SLOPES, SEED,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    stride_slope_b, stride_slope_h,
    B, H, S_q, S_k, shift, left, right, scale, softcap, dropout_threshold, dropout_scale,
    BLOCK_M: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """This program's. Neighbours share a head, and with it K and V in L2; the longest causal rows start first."""
    b, h, m_block = locate(tl.program_id(0), CU_SEQLENS_Q, B, H, S_q, BLOCK_M, True, F)
    rows_q, rows_k = own_rows(b, CU_SEQLENS_Q, B, S_q, F), other_rows(b, CU_SEQLENS_K, B, S_k, F)
    w = window_of(
        b, rows_q.length, rows_k.length, shift, left, right, MASK, stride_mask_b, stride_mask_h, stride_mask_m,
        stride_mask_n, F,
    )  # fmt: skip
    scores = scores_of(
        b, B, scale, softcap, SLOPES, stride_slope_b, stride_slope_h, BIAS, stride_bias_b, stride_bias_h, stride_bias_m,
        stride_bias_n, F,
    )  # fmt: skip
    drop = Dropout(tl.load(SEED) if F.DROPOUT else 0, b, h, dropout_threshold, dropout_scale)
    return QueryTile(b, h, m_block, rows_q, rows_k, head_window(w, h, F), head_score(scores, h, F), drop)
