"""Attention in forward mode: the tangents of o and lse, in one pass over the keys that recomputes p from lse.

    a = q kᵀ · scale           ta = (tq kᵀ + q tkᵀ) · scale
    s = f(a) + bias - slope · distance           ts = ta ∘ f'(a) + tbias - tslope · distance
    mu = Σ_j p ∘ ts + p_sink · tsink = tlse
    to = dropout(p ∘ ts) v - mu o + dropout(p) tv

tx is the tangent of x and has its shape; a tangent that is None is zero and costs nothing. mu (M,) is known only after
the last key, hence its product with o, which p ∘ (ts - mu) would not need. Shapes as in the forward; to (B, H, S_q, D_v)
in o's dtype, tlse (B, H, S_q) fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastattn.backends.triton.attention_common import (
    Inputs,
    constants,
    matrix_strides,
    score_arguments,
    sequence_arguments,
    strides,
    tile_arguments,
)
from fastattn.backends.triton.attention_fwd import restore_non_finite
from fastattn.backends.triton.blocks.block_range import key_range, listed, tile_at
from fastattn.backends.triton.blocks.dropout import dropout_factor
from fastattn.backends.triton.blocks.features import Dropout
from fastattn.backends.triton.blocks.mask import (
    finite_or_zero,
    has_non_finite,
    head_window,
    hide,
    is_finite,
    visible,
    window_of,
)
from fastattn.backends.triton.blocks.score import apply_score, distance, head_score, load_bias, score_factor, scores_of
from fastattn.backends.triton.blocks.seqlen import head_start, locate, other_rows, own_rows
from fastattn.backends.triton.blocks.softmax import load_lse, load_sink, probability
from fastattn.backends.triton.blocks.tile import inner, load_tile, matrix, outer, store_tile, zeros
from fastattn.backends.triton.configs import backward_config
from fastattn.backends.triton.mask_tiles import mask_tiles
from fastattn.spec import AttentionSpec
