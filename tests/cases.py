"""The named cases of attention. One body (test_attention.py) holds o, lse and every gradient to float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Score:
    """A tensor option of a case: its axes, of B, H, M (queries), N (keys) and 1; what it holds, and how it lies."""

    axes: str
    fill: str = "normal"  # or one of _FILLS
    dtype: torch.dtype | None = None  # None: float32
    layout: str = "contiguous"  # or heads_innermost, strided

    def tensor(self, case: Case, device: torch.device, seed: int = 2) -> Tensor:
        sizes = {"B": case.B, "H": case.H, "M": case.S_q, "N": case.S_k, "1": 1}
        generator = torch.Generator().manual_seed(seed)
        shape = [sizes[axis] for axis in self.axes]
        x = torch.randn(shape, generator=generator)
        t = _FILLS[self.fill](x).to(device, *([] if self.dtype is None else [self.dtype]))
        if self.layout == "heads_innermost":
            t = t.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        elif self.layout == "strided":
            t = torch.stack([t, t], -1).flatten(-2)[..., ::2]
        return t


def _documents(x: Tensor) -> Tensor:
    """True inside documents of lengths 48, 7, 33, ... on the diagonal."""
    lengths = (48, 7, 33, 20, 30, 9) * (1 + max(x.shape[-2:], default=1) // 147)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    i, j = (document[:n] for n in (1, 1, *x.shape)[-2:])
    return (i[:, None] == j).broadcast_to(1, 1, *x.shape)[0, 0]


def _blocks(x: Tensor) -> Tensor:
    """Blocks of 32 by 32, of which about a third is True, and a few entries of the others."""
    for dim in range(-1, -min(x.dim(), 2) - 1, -1):
        corner = torch.arange(x.shape[dim]) // 32 * 32
        x = torch.where(x > 2.3, x, x.index_select(dim, corner))
    return x > 0.4


_FILLS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "slopes": lambda x: x.abs() / 4,
    "minus_infinity": lambda x: torch.where(x > 0.3, -math.inf, x),
    "random_bool": lambda x: x > 0,
    "documents": _documents,
    "blocks": _blocks,
    "nothing": lambda x: torch.zeros_like(x, dtype=torch.bool),
}


@dataclass(frozen=True)
class Case:
    name: str
    S_q: int = 40
    S_k: int = 40
    B: int = 1
    H: int = 2
    H_kv: int = 0  # 0: as H
    D: int = 16
    D_v: int = 0  # 0: as D
    dtype: torch.dtype = F32
    layout: str = "contiguous"
    lengths: tuple[tuple[int, int], ...] | None = None  # of queries and keys, packed; S_q and S_k are the longest
    left_over: int = 0  # rows of q after the last sequence
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    @property
    def kv_heads(self) -> int:
        return self.H_kv or self.H


def case(name: str, S_q: int = 40, S_k: int = 40, **fields: Any) -> Case:
    """Fields of Case by name; every other keyword is an option of `attention`."""
    own = {key: fields.pop(key) for key in list(fields) if key in Case.__dataclass_fields__}
    return Case(name, S_q, S_k, **own, options=fields)


LENGTHS = [
    case("one_query_one_key", 1, 1),
    case("one_query", 1, 40),
    case("one_key", 40, 1),
    case("exact_tiles", 64, 64),
    case("one_more_than_tiles", 65, 33),
    case("one_less_than_tiles", 63, 31),
    case("no_queries", 0, 5),
    case("no_keys", 5, 0),
    case("no_batch", 5, 5, B=0),
    case("batch", 20, 37, B=3),
]
MASKS = [
    case("causal", 70, 70, causal=True),
    case("causal_bottom_right_more_keys", 35, 70, causal="bottom_right"),
    case("causal_bottom_right_more_queries", 70, 35, causal="bottom_right"),
    case("causal_top_left_more_keys", 35, 70, causal="top_left"),
    case("causal_top_left_more_queries", 70, 35, causal="top_left"),
    case("causal_decode", 1, 50, causal="bottom_right"),
    case("window_both", 70, 70, window=(13, 5)),
    case("window_left", 70, 70, window=(20, None)),
    case("window_right", 70, 70, window=(None, 9)),
    case("window_one_key", 40, 40, window=(0, 0)),
    case("window_causal", 70, 70, window=(17, 0)),
    case("window_and_causal", 70, 70, window=(17, 3), causal=True),
    case("window_more_keys", 33, 70, window=(6, 30)),
    case("window_more_queries", 70, 33, window=(6, 30)),
    case("window_top_left", 33, 70, window=(6, None), causal="top_left"),
    case("window_wider_than_everything", 40, 40, window=(2**40, 2**40)),
    case("rows_that_see_nothing_first", 60, 20, window=(4, 0)),
    case("rows_that_see_nothing_last", 60, 20, window=(4, None), causal="top_left"),
]
HEADS = [
    case("gqa", 45, 45, B=2, H=4, H_kv=2, causal=True),
    case("mqa", 33, 50, H=4, H_kv=1),
    case("gqa_of_3", 20, 20, H=6, H_kv=2, window=(7, 2)),
]
WIDTHS = [
    *(
        case(f"width_{D}", 17, 20, D=D, causal="bottom_right")
        for D in (1, 7, 8, 24, 33, 40, 64, 80, 96, 128, 160, 256, 320, 512)
    ),
    case("value_wider", 20, 20, D=16, D_v=40),
    case("value_narrower", 20, 20, D=64, D_v=8, causal=True),
    case("mla_192x128", 33, 40, D=192, D_v=128, causal="bottom_right"),
    case("mla_576x512", 20, 33, H=4, H_kv=1, D=576, D_v=512, causal="bottom_right"),
    case("mla_576x512_bf16", 20, 33, D=576, D_v=512, dtype=BF16),
]
DTYPES = [
    case(f"{name}_{dtype_name}", 50, 50, dtype=dtype, **options)
    for dtype, dtype_name in ((F16, "fp16"), (BF16, "bf16"))
    for name, options in (
        ("full", {}),
        ("causal_64", {"D": 64, "causal": True}),
        ("window_gqa", {"H": 4, "H_kv": 2, "window": (11, 3)}),
    )
]
LAYOUTS = [
    case(f"layout_{layout}", 35, 40, B=2, H=4, H_kv=2, layout=layout, causal="bottom_right")
    for layout in ("heads_inside", "packed", "strided")
]
SCALES = [
    case("scale_1", 30, 30, scale=1.0),
    case("scale_negative", 30, 30, scale=-0.5, causal=True),
    case("scale_0", 30, 30, scale=0.0),
]
DROPOUT = [
    case("dropout", 40, 50, B=2, dropout_p=0.3),
    case("dropout_causal_gqa", 50, 50, H=4, H_kv=2, dropout_p=0.1, causal=True),
    case("dropout_all", 20, 20, dropout_p=1.0),
]

BIAS = [
    *(
        case(f"bias_{shape or 'scalar'}", 33, 20, B=2, H=2, H_kv=1, bias=Score(shape))
        for shape in ("BHMN", "1HMN", "BHM1", "B1MN", "B11N", "11MN", "1H11", "1111", "HMN", "MN", "N", "")
    ),
    case("bias_heads_innermost", 40, 50, B=2, H=4, bias=Score("1HMN", layout="heads_innermost")),
    case("bias_strided", 35, 40, H=2, bias=Score("BHMN", layout="strided"), causal="top_left"),
    case("bias_gqa_window", 50, 50, B=2, H=4, H_kv=2, bias=Score("1HMN"), window=(11, 5)),
    case("bias_fp32_with_fp16", 40, 40, dtype=F16, D=32, bias=Score("BHMN", dtype=F32)),
    case("bias_bf16", 40, 40, dtype=BF16, D=32, bias=Score("1HMN", dtype=BF16), causal=True),
    case("bias_minus_infinity", 40, 40, bias=Score("B1MN", fill="minus_infinity")),
]
BOOL_MASKS = [
    *(
        case(f"mask_{shape}", 33, 40, B=2, H=2, H_kv=1, mask=Score(shape, fill="random_bool"))
        for shape in ("BHMN", "1HMN", "B1MN", "B11N", "BHM1", "1111", "MN")
    ),
    case("mask_documents", 130, 130, mask=Score("MN", fill="documents")),
    case("mask_documents_causal_gqa", 130, 130, H=4, H_kv=2, mask=Score("MN", fill="documents"), causal=True),
    case("mask_blocks", 100, 130, B=2, mask=Score("BHMN", fill="blocks")),
    case("mask_blocks_window", 130, 130, mask=Score("1HMN", fill="blocks"), window=(40, 20)),
    case("mask_hides_everything", 40, 40, mask=Score("MN", fill="nothing")),
    case("mask_strided", 50, 50, mask=Score("BHMN", fill="random_bool", layout="strided"), dtype=F16, D=32),
    case("mask_no_keys", 5, 0, mask=Score("MN", fill="random_bool")),
]
SCORES = [
    case("alibi", 40, 50, B=2, H=4, H_kv=2, alibi_slopes=Score("H", fill="slopes")),
    case("alibi_by_batch_causal", 50, 50, B=2, alibi_slopes=Score("BH", fill="slopes"), causal=True),
    case("alibi_top_left_window", 40, 60, alibi_slopes=Score("H", fill="slopes"), causal="top_left", window=(9, None)),
    case("softcap", 40, 50, B=2, softcap=2.5),
    case("softcap_causal_gqa", 50, 50, H=4, H_kv=2, softcap=1.0, causal=True, scale=1.0),
    case("softcap_50_fp16", 40, 40, D=64, dtype=F16, softcap=50.0),
    case("softcap_negative_scale", 30, 30, softcap=0.7, scale=-1.0),
    case("sinks", 40, 50, B=2, H=4, H_kv=2, sinks=Score("H")),
    case("sinks_causal_more_queries", 60, 20, sinks=Score("H"), causal="bottom_right"),
    case("sinks_minus_infinity", 40, 20, sinks=Score("H", fill="minus_infinity"), causal="bottom_right"),
    case("sinks_strided", 20, 30, H=4, H_kv=2, sinks=Score("H", layout="strided")),
    case("alibi_strided", 20, 30, B=2, H=4, H_kv=2, alibi_slopes=Score("BH", fill="slopes", layout="strided")),
    case("sinks_bf16", 40, 40, D=64, dtype=BF16, sinks=Score("H", dtype=BF16), causal=True),
    case("sinks_no_keys", 5, 0, sinks=Score("H")),
]
PAIRS = [
    case("softcap_dropout", 40, 50, B=2, softcap=1.5, dropout_p=0.2),
    case("softcap_bias", 40, 50, softcap=1.5, bias=Score("1HMN")),
    case("softcap_alibi_causal", 50, 50, softcap=1.5, alibi_slopes=Score("H", fill="slopes"), causal=True),
    case("bias_dropout", 40, 50, B=2, bias=Score("1HMN"), dropout_p=0.2),
    case("bias_mask", 40, 50, B=2, bias=Score("B11N"), mask=Score("MN", fill="random_bool")),
    case("sinks_dropout", 40, 50, B=2, sinks=Score("H"), dropout_p=0.2),
    case("sinks_window_top_left", 70, 30, sinks=Score("H"), window=(5, 3), causal="top_left"),
    case("sinks_mask", 40, 50, sinks=Score("H"), mask=Score("B1MN", fill="random_bool")),
    case("mask_dropout_gqa", 50, 50, H=4, H_kv=2, mask=Score("1HMN", fill="blocks"), dropout_p=0.3),
    case("value_wider_sinks_alibi", 30, 40, D=24, D_v=72, sinks=Score("H"), alibi_slopes=Score("H", fill="slopes")),
    case(
        "everything", 70, 70, B=2, H=4, H_kv=2, D=40, D_v=24, causal=True, window=(30, None), softcap=2.0,
        dropout_p=0.1, bias=Score("1HMN"), mask=Score("B1MN", fill="documents"),
        alibi_slopes=Score("BH", fill="slopes"), sinks=Score("H"),
    ),
]  # fmt: skip

LENGTHS_5 = ((5, 21), (0, 7), (33, 0), (16, 9), (40, 50))
SELF_4 = ((33, 33), (1, 1), (0, 0), (48, 48))


def packed(name: str, lengths: tuple[tuple[int, int], ...] = LENGTHS_5, **fields: Any) -> Case:
    """Sequences of these lengths, one after the other."""
    longest = (max((n[side] for n in lengths), default=0) for side in (0, 1))
    return case(name, *longest, **{"H": 4, "B": len(lengths), "lengths": lengths, **fields})


VARLEN = [
    packed("varlen"),
    packed("varlen_one_sequence", ((40, 40),)),
    packed("varlen_all_empty", ((0, 0), (0, 0))),
    packed("varlen_left_over", left_over=23, sinks=Score("H")),
    packed("varlen_many_short", tuple((n % 4, n % 3) for n in range(40)), H=2),
    packed("varlen_causal", SELF_4, causal="bottom_right", H_kv=2),
    packed("varlen_bottom_right", causal="bottom_right"),
    packed("varlen_top_left", causal="top_left"),
    packed("varlen_window", window=(7, 3)),
    packed("varlen_gqa_window_left", SELF_4, window=(9, 0), H_kv=1),
    packed("varlen_bias", bias=Score("BHMN"), H=2),
    packed("varlen_bias_by_head_causal", bias=Score("1HMN"), H=2, causal="bottom_right"),
    packed("varlen_bias_by_key", bias=Score("B11N"), H=2),
    packed("varlen_mask", mask=Score("B1MN", fill="random_bool"), H=2),
    packed("varlen_mask_shared_causal", SELF_4, mask=Score("MN", fill="documents"), H=2, causal="bottom_right"),
    packed("varlen_alibi_by_batch", alibi_slopes=Score("BH", fill="slopes"), H=2),
    packed("varlen_alibi", SELF_4, alibi_slopes=Score("H", fill="slopes"), H=2, causal="bottom_right"),
    packed("varlen_sinks", sinks=Score("H"), H=2, causal="bottom_right"),
    packed("varlen_softcap_dropout", softcap=1.5, dropout_p=0.2, H=2),
    packed("varlen_mla", SELF_4, D=192, D_v=128, H=2, causal="bottom_right"),
    packed("varlen_bf16", SELF_4, D=64, H=2, dtype=BF16, causal="bottom_right"),
    packed("varlen_heads_inside", layout="heads_inside", H=2, H_kv=2),
    packed(
        "varlen_everything", SELF_4, H_kv=2, D=24, D_v=40, causal="bottom_right", window=(20, None), softcap=2.0,
        dropout_p=0.1, bias=Score("1HMN"), mask=Score("B1MN", fill="documents"), left_over=9,
        alibi_slopes=Score("BH", fill="slopes"), sinks=Score("H"),
    ),
]  # fmt: skip

TRITON = [
    *LENGTHS, *MASKS, *HEADS, *WIDTHS, *DTYPES, *LAYOUTS, *SCALES, *DROPOUT, *BIAS, *BOOL_MASKS, *SCORES, *PAIRS
]  # fmt: skip
