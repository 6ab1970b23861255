"""A bool mask at the speed of a window: one pass over it lists, for every strip of tiles, which of them to visit.

For each tile of queries (or, for the second backward pass, of keys) the list holds the tiles of the other side that are
visible in part, and those that are visible as a whole; a tile that is hidden altogether is in neither and is never
loaded by the attention kernels. The window and the ends of the sequences are taken into account.

mask (B | 1, H | 1, S_q, S_k) bool -> int32 (strips, 2 + n_across): n_partial, n_whole, tiles in part from the front,
whole tiles from the back. A broadcast batch or head dimension is listed once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastattn.backends.triton.attention_common import n_tiles, sequence_arguments
from fastattn.backends.triton.blocks.block_range import key_range, query_range
from fastattn.backends.triton.blocks.features import Features
from fastattn.backends.triton.blocks.mask import head_window, visible, window_of
from fastattn.backends.triton.blocks.seqlen import locate, other_rows, own_rows
from fastattn.backends.triton.configs import TileConfig
from fastattn.spec import AttentionInputs, AttentionSpec


@triton.jit
def mask_tiles_kernel(
    TILES, MASK, CU_SEQLENS_Q, CU_SEQLENS_K,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    B, H, S_q, S_k, shift, left, right, n_across,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BY_KEY: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if BY_KEY:
        b, h, block = locate(pid, CU_SEQLENS_K, B, H, S_k, BLOCK_N, False, F)
        rows_q, rows_k = other_rows(b, CU_SEQLENS_Q, B, S_q, F), own_rows(b, CU_SEQLENS_K, B, S_k, F)
    else:
        b, h, block = locate(pid, CU_SEQLENS_Q, B, H, S_q, BLOCK_M, False, F)
        rows_q, rows_k = own_rows(b, CU_SEQLENS_Q, B, S_q, F), other_rows(b, CU_SEQLENS_K, B, S_k, F)
    w = window_of(
        b, rows_q.length, rows_k.length, shift, left, right, MASK, stride_mask_b, stride_mask_h, stride_mask_m,
        stride_mask_n, F,
    )  # fmt: skip
    w = head_window(w, h, F)
    tiles = TILES + pid.to(tl.int64) * (2 + n_across)
    if BY_KEY:
        spans = query_range(block, w, BLOCK_M, BLOCK_N, F)
    else:
        spans = key_range(block, w, BLOCK_M, BLOCK_N, F)
    n_partial = 0
    n_whole = 0
    for other in range(spans.min, spans.max):
        m_block, n_block = other if BY_KEY else block, block if BY_KEY else other
        m = (m_block * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
        n = (n_block * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
        seen = visible(m, n, w, F)
        some = tl.max(tl.max(seen.to(tl.int32), 1), 0)
        whole = tl.min(tl.min((seen | (m >= w.S_q)).to(tl.int32), 1), 0)  # rows beyond S_q are never used
        place = tl.where(whole > 0, n_across - 1 - n_whole, n_partial)
        tl.store(tiles + 2 + place, other, mask=some > 0)
        n_partial += some * (1 - whole)
        n_whole += some * whole
    tl.store(tiles, n_partial)
    tl.store(tiles + 1, n_whole)


def mask_tiles(x: AttentionInputs, spec: AttentionSpec, cfg: TileConfig, by_key: bool = False) -> dict[str, Any]:
    """The lists for a kernel with these tiles, by the names of its arguments; nothing without a mask."""
    if x.mask is None:
        return {"TILES": None, "n_across": 0, "stride_tiles_b": 0, "stride_tiles_h": 0}
    S_q, S_k = x.q.shape[2], x.k.shape[2]
    own, block = (S_k, cfg.BLOCK_N) if by_key else (S_q, cfg.BLOCK_M)
    n_across = triton.cdiv(S_q, cfg.BLOCK_M) if by_key else triton.cdiv(S_k, cfg.BLOCK_N)
    B, H = x.mask.shape[:2]
    strips = n_tiles(x, own, block) if spec.varlen else B * triton.cdiv(own, block)
    tiles = torch.empty(H * strips, 2 + n_across, dtype=torch.int32, device=x.q.device)
    if strips > 0:
        mask_tiles_kernel[(H * strips,)](
            TILES=tiles, H=H, n_across=n_across, **sequence_arguments(x, spec),
            BLOCK_M=cfg.BLOCK_M, BLOCK_N=cfg.BLOCK_N, BY_KEY=by_key, F=Features.of(spec, x.mask),
        )  # fmt: skip
    per_head = strips if spec.varlen else triton.cdiv(own, block)
    return {
        "TILES": tiles,
        "n_across": n_across,
        "stride_tiles_b": 0 if spec.varlen or B == 1 else H * per_head,
        "stride_tiles_h": 0 if H == 1 else per_head,
    }
