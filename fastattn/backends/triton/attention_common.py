"""From the tensors and the spec of a call to the run-time arguments that the attention kernels share, by name."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from fastattn.backends.triton.blocks.features import Features
from fastattn.backends.triton.configs import Columns, TileConfig, arch_of, dot_precision
from fastattn.spec import AttentionInputs, AttentionSpec


def arch(x: AttentionInputs) -> str:
    return arch_of(x.q.device)


def n_tiles(x: AttentionInputs, S: int, BLOCK: int) -> int:
    """Tiles of one head: of all B sequences of length S, or slots for tiles of the sequences packed into S rows."""
    return x.B * triton.cdiv(S, BLOCK) if x.cu_seqlens_q is None else S // BLOCK + x.B + 1


def strides(name: str, t: Tensor | None, axes: str) -> dict[str, int]:
    """stride_<name><axis> of each dimension: 0 for one of length 1, which broadcasts, and for an absent tensor."""
    if t is None:
        return {f"stride_{name}{axis}": 0 for axis in axes}
    return {
        f"stride_{name}{axis}": 0 if n == 1 else stride
        for axis, n, stride in zip(axes, t.shape, t.stride(), strict=True)
    }


def matrix_strides(**tensors: Tensor | None) -> dict[str, int]:
    """Strides of tensors that are not broadcast; the rows of k, v and their gradients are called n, all others m."""
    named = {}
    for name, t in tensors.items():
        row = "n" if name[-1] in "kv" else "m"
        for axis, stride in zip(("b", "h", row, "d"), (0, 0, 0, 0) if t is None else t.stride(), strict=True):
            named[f"stride_{name}{axis}"] = stride
    return named


def window_arguments(spec: AttentionSpec, S_q: int, S_k: int) -> dict[str, int]:
    """shift, left, right; an unbounded side is 0 and never read, a far one is cut to what 32 bits hold.

    Packed, every sequence has its own shift, and the argument says whether there is one.
    """
    farthest = S_q + S_k
    left, right = (0 if side is None else min(side, farthest) for side in (spec.left, spec.right))
    shift = int(not spec.top_left) if spec.varlen else spec.shift(S_q, S_k)
    return {"shift": shift, "left": left, "right": right}


def sequence_arguments(x: AttentionInputs, spec: AttentionSpec) -> dict[str, Any]:
    """What a kernel needs to know which rows and which mask entries it works on."""
    S_q, S_k = x.q.shape[2], x.k.shape[2]
    return {
        "CU_SEQLENS_Q": x.cu_seqlens_q,
        "CU_SEQLENS_K": x.cu_seqlens_k,
        "MASK": None if x.mask is None else x.mask.view(dtype=torch.uint8),
        **strides("mask_", x.mask, "bhmn"),
        "B": x.B,
        "S_q": S_q,
        "S_k": S_k,
        **window_arguments(spec, S_q, S_k),
    }


def score_arguments(x: AttentionInputs, spec: AttentionSpec) -> dict[str, Any]:
    """What turns q kᵀ into probabilities."""
    slopes = x.alibi_slopes
    if slopes is not None and slopes.dim() == 1:
        slopes = slopes[None]
    return {
        "BIAS": x.bias,
        **strides("bias_", x.bias, "bhmn"),
        "SLOPES": slopes,
        **strides("slope_", slopes, "bh"),
        "SEED": x.seed,
        "scale": spec.scale,
        "softcap": spec.softcap or 0.0,
        # a probability is kept where a 32-bit word is at least the threshold, and then scaled
        "dropout_threshold": int(spec.dropout_p * 2**32),
        "dropout_scale": 0.0 if spec.dropout_p == 1.0 else 1.0 / (1.0 - spec.dropout_p),
    }


def constants(x: AttentionInputs, spec: AttentionSpec, *others: Tensor | None) -> dict[str, Any]:
    """The constexprs, tile sizes apart; `others`: all tensors that are read or written beside q, k and v."""
    return {
        "G": spec.G,
        "D": Columns.of(spec.D, spec.dtype.itemsize),
        "D_V": Columns.of(spec.D_v, spec.dtype.itemsize),
        "F": Features.of(spec, x.q, x.k, x.v, *others),
        "DOT": dot_precision(spec.dtype),
    }


def tile_arguments(cfg: TileConfig) -> dict[str, int]:
    return {"BLOCK_M": cfg.BLOCK_M, "BLOCK_N": cfg.BLOCK_N, "num_warps": cfg.num_warps, "num_stages": cfg.num_stages}
