"""Rotary position embedding of q and k in one launch; its gradient is the inverse rotation.

    y1 = x1 cos − x2 sin        y2 = x2 cos + x1 sin        inverse: with −sin

x, y (B, H, S, D) with any strides, H of q and of k each its own; pairs of the first R = 2 · HALF elements are
(i, i + HALF), or interleaved (2i, 2i + 1); the other D − R are copied. y may be x. cos, sin (S_max, HALF), of which a
token takes the row of its position, or (B, S, HALF). The arithmetic is fp32.

A position is the token's index, or what position_ids (B, S) says; of packed sequences, (1, H, T, D), the index less
where the token's sequence begins in cu_seqlens. A position outside of the table gives NaN and reads nothing; tokens
after the last sequence are not rotated.

A program takes BLOCK_S tokens and HEADS heads, of q or of k, and reads cos and sin once for them. Passes: read x, write
y; in place with R < D only the first R elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from fastattn.backends.triton.blocks.rows import load_rows, store_rows
from fastattn.backends.triton.configs import arch_of, next_power_of_2
from fastattn.backends.triton.row_configs import MIN_THREADS, RowConfig, warp_size
from fastattn.spec import RotarySpec

if TYPE_CHECKING:
    from fastattn.backends.triton.inspection import KernelCase

HEADS = 4
PAIRS = 8  # per thread: two vectors of 8 halves


@triton.jit
def _packed_position(t, cu_seqlens, sequences, steps):
    """Each token's position in its sequence, and whether it is in one: b is the last one with cu_seqlens[b] <= t."""
    low = tl.zeros_like(t)
    high = low + sequences
    for _ in range(steps):
        middle = (low + high + 1) // 2
        begun = tl.load(cu_seqlens + middle) <= t
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle - 1)
    return t - tl.load(cu_seqlens + low), low < sequences


@triton.jit
def _load_angles(table, position, r, stride_s, stride_r, S_max, HALF: tl.constexpr):
    """cos or sin (BLOCK_S, BLOCK_R) in fp32, NaN for positions outside of the table."""
    known = (position >= 0) & (position < S_max)
    read = known[:, None] & (r < HALF)[None, :]
    rows = tl.load(
        table + position[:, None] * stride_s + r[None, :] * stride_r, mask=read, other=float("nan")
    )  # fmt: skip
    return rows.to(tl.float32)


@triton.jit
def _rotate_heads(
    y, x, cos, sin, turned, first, H, s, S, D: tl.constexpr,
    stride_yh, stride_ys, stride_yd, stride_xh, stride_xs, stride_xd,
    INTERLEAVED: tl.constexpr, COPY: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Heads first … first + HEADS − 1 of tokens s by the angles (BLOCK_S, BLOCK_R); where not `turned`, y is x."""
    r = tl.arange(0, BLOCK_R)
    keep = (s < S)[:, None]
    x += first.to(tl.int64) * stride_xh
    y += first.to(tl.int64) * stride_yh
    for _ in range(first, tl.minimum(first + HEADS, H)):
        if INTERLEAVED:
            d = tl.arange(0, 2 * BLOCK_R)
            both = load_rows(x, s, d, stride_xs, stride_xd, keep & (d < 2 * HALF)[None, :])
            x1, x2 = tl.split(tl.reshape(both, (BLOCK_S, BLOCK_R, 2)))
        else:
            x1 = load_rows(x, s, r, stride_xs, stride_xd, keep & (r < HALF)[None, :])
            x2 = load_rows(x, s, HALF + r, stride_xs, stride_xd, keep & (r < HALF)[None, :])
        y1 = tl.where(turned[:, None], x1 * cos - x2 * sin, x1)
        y2 = tl.where(turned[:, None], x2 * cos + x1 * sin, x2)
        if INTERLEAVED:
            both = tl.reshape(tl.join(y1, y2), (BLOCK_S, 2 * BLOCK_R))
            store_rows(y, both, s, d, stride_ys, stride_yd, S, 2 * HALF)
        else:
            store_rows(y, y1, s, r, stride_ys, stride_yd, S, HALF)
            store_rows(y + HALF * stride_yd, y2, s, r, stride_ys, stride_yd, S, HALF)
        if COPY:
            d = 2 * HALF + tl.arange(0, BLOCK_REST)
            rest = load_rows(x, s, d, stride_xs, stride_xd, keep & (d < D)[None, :])
            store_rows(y, rest, s, d, stride_ys, stride_yd, S, D)
        x += stride_xh
        y += stride_yh


@triton.jit(do_not_specialize=["S", "S_max", "H_q", "H_k", "sequences", "steps"])
def _rotary_kernel(
    y_q, x_q, y_k, x_k, cos, sin, position_ids, cu_seqlens, H_q, H_k, S, S_max, sequences, steps,
    stride_yqb, stride_yqh, stride_yqs, stride_yqd, stride_xqb, stride_xqh, stride_xqs, stride_xqd,
    stride_ykb, stride_ykh, stride_yks, stride_ykd, stride_xkb, stride_xkh, stride_xks, stride_xkd,
    stride_cosb, stride_coss, stride_cosd, stride_sinb, stride_sins, stride_sind, stride_posb, stride_poss,
    D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, COPY: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_S tokens of sequence b, HEADS heads of x_q or, if there is one, of x_k."""
    groups_q = tl.cdiv(H_q, HEADS)
    groups = groups_q
    if x_k is not None:
        groups += tl.cdiv(H_k, HEADS)
    group, block = tl.program_id(0) % groups, tl.program_id(0) // groups
    blocks = tl.cdiv(S, BLOCK_S)
    b = (block // blocks).to(tl.int64)
    s = (block % blocks).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    r = tl.arange(0, BLOCK_R).to(tl.int64)

    position, turned = s, s >= 0
    if position_ids is not None:
        position = tl.load(position_ids + b * stride_posb + s * stride_poss, mask=s < S, other=0).to(tl.int64)
    if cu_seqlens is not None:
        position, turned = _packed_position(s, cu_seqlens, sequences, steps)
    c = _load_angles(cos + b * stride_cosb, position, r, stride_coss, stride_cosd, S_max, HALF)
    z = _load_angles(sin + b * stride_sinb, position, r, stride_sins, stride_sind, S_max, HALF)
    if INVERSE:
        z = -z

    if group < groups_q:
        _rotate_heads(
            y_q + b * stride_yqb, x_q + b * stride_xqb, c, z, turned, group * HEADS, H_q, s, S, D,
            stride_yqh, stride_yqs, stride_yqd, stride_xqh, stride_xqs, stride_xqd,
            INTERLEAVED, COPY, HALF, HEADS, BLOCK_S, BLOCK_R, BLOCK_REST,
        )  # fmt: skip
    elif x_k is not None:
        _rotate_heads(
            y_k + b * stride_ykb, x_k + b * stride_xkb, c, z, turned, (group - groups_q) * HEADS, H_k, s, S, D,
            stride_ykh, stride_yks, stride_ykd, stride_xkh, stride_xks, stride_xkd,
            INTERLEAVED, COPY, HALF, HEADS, BLOCK_S, BLOCK_R, BLOCK_REST,
        )  # fmt: skip


def tile_config(S: int, half: int, arch: str) -> RowConfig:
    """PAIRS for each of MIN_THREADS threads: BLOCK_N pairs of some tokens, of one where its head is wider."""
    BLOCK_R = next_power_of_2(half)
    BLOCK_S = max(min(next_power_of_2(S), MIN_THREADS * PAIRS // BLOCK_R), 1)
    return RowConfig(BLOCK_R, BLOCK_S, MIN_THREADS // warp_size(arch))


def launch(
    pairs: Sequence[tuple[Tensor, Tensor]],
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    spec: RotarySpec,
    inverse: bool,
) -> None:
    """For one or two pairs (y, x): y is x rotated, and may be x itself. Shapes as of the spec."""
    tensors = [t.transpose(0, 1)[None] if t.dim() == 3 else t for pair in pairs for t in pair]  # (B, H, S, D)
    B, H_q, S, D = tensors[0].shape
    H_k = tensors[2].shape[1] if len(tensors) == 4 else 0
    if B * (H_q + H_k) * S == 0:
        return
    S_max, half = cos.shape[-2:]
    (y_q, x_q), (y_k, x_k) = tensors[:2], tensors[2:] or (None, None)
    config = tile_config(S, half, arch_of(x_q.device))
    if position_ids is not None:
        position_ids = position_ids.expand(B, S)
    cos, sin = cos.expand(B, *cos.shape[-2:]), sin.expand(B, *sin.shape[-2:])
    sequences = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    groups = triton.cdiv(H_q, HEADS) + triton.cdiv(H_k, HEADS)
    _rotary_kernel[(B * triton.cdiv(S, config.rows_per_program) * groups,)](
        y_q, x_q, y_k, x_k, cos, sin, position_ids, cu_seqlens, H_q, H_k, S, S_max, sequences, sequences.bit_length(),
        *(step for t in (y_q, x_q, y_k, x_k) for step in ((0, 0, 0, 0) if t is None else t.stride())),
        *cos.stride(), *sin.stride(), *((0, 0) if position_ids is None else position_ids.stride()),
        D=D, HALF=half, INTERLEAVED=spec.interleaved, INVERSE=inverse, COPY=2 * half < D and y_q is not x_q,
        HEADS=HEADS, BLOCK_S=config.rows_per_program, BLOCK_R=config.BLOCK_N,
        BLOCK_REST=next_power_of_2(max(D - 2 * half, 1)), num_warps=config.num_warps,
    )  # fmt: skip


def inspect_cases(arch: str) -> list[KernelCase]:
    """The compilations that the ahead-of-time report shows: q and k, transposed views of (B, S, H, D)."""
    from fastattn.backends.triton.inspection import KernelCase

    cases = []
    for dtype, D, half in (("bf16", 64, 32), ("bf16", 128, 64), ("fp32", 128, 64), ("bf16", 80, 16)):
        config = tile_config(1 << 20, half, arch)
        constexprs: dict[str, object] = {"D": D, "HALF": half, "HEADS": HEADS, "COPY": 2 * half < D, "INVERSE": False}
        constexprs |= {"BLOCK_S": config.rows_per_program, "BLOCK_R": config.BLOCK_N}
        constexprs |= {"BLOCK_REST": next_power_of_2(max(D - 2 * half, 1))}
        constexprs |= {
            step: 1 for step in _rotary_kernel.arg_names if step.startswith("stride_") and step.endswith("d")
        }
        for feature, interleaved, absent in (
            ("half_split", False, ("position_ids", "cu_seqlens")),
            ("interleaved", True, ("position_ids", "cu_seqlens")),
            ("positions", False, ("cu_seqlens",)),
            ("packed", False, ("position_ids",)),
        ):
            values = {**constexprs, "INTERLEAVED": interleaved, **dict.fromkeys(absent)}
            pointers = dict.fromkeys(("y_q", "x_q", "y_k", "x_k"), f"*{dtype}")
            pointers |= {"cos": "*fp32", "sin": "*fp32", "position_ids": "*i64", "cu_seqlens": "*i32"}
            pointers = {name: pointer for name, pointer in pointers.items() if name not in values}
            scalars = [name for name in _rotary_kernel.arg_names if name not in values and name not in pointers]
            aligned = (*pointers, *(name for name in scalars if name.startswith("stride_")))
            signature = pointers | dict.fromkeys(scalars, "i32")
            name = f"rotary/{feature}/{dtype}/D{D}_R{2 * half}"
            cases.append(KernelCase(name, _rotary_kernel, signature, values, config.num_warps, 1, aligned))
    return cases
