"""The named cases of attention. One body (test_attention.py) holds o, lse and every gradient to float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Case:
    name: str
    S_q: int = 40
    S_k: int = 40
    B: int = 1
    H: int = 2
    H_kv: int = 2
    D: int = 16
    D_v: int = 0  # 0: as D
    dtype: torch.dtype = F32
    layout: str = "contiguous"
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


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
    *(case(f"width_{D}", 17, 20, D=D, causal="bottom_right") for D in (8, 24, 40, 64, 80, 96, 128, 160, 256)),
    case("value_wider", 20, 20, D=16, D_v=40),
    case("value_narrower", 20, 20, D=64, D_v=8, causal=True),
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

TRITON = [*LENGTHS, *MASKS, *HEADS, *WIDTHS, *DTYPES, *LAYOUTS, *SCALES, *DROPOUT]
