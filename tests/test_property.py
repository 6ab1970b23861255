"""Any combination of features, shapes, strides and dtypes: o, lse and every gradient are held to float64."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from parity import check, inputs_of, options_of, packed_of

SETTINGS = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
    "print_blob": True,
}

LAYOUTS = ("contiguous", "heads_inside", "packed", "strided")
VECTOR_LAYOUTS = ("contiguous", "strided")
LENGTH = st.integers(0, 40)  # interpreted tiles are 32 by 16 and 16 by 32, so there are tiles of every kind
SHORT = st.integers(0, 34)


@st.composite
def scores(draw, axes: str, fills: tuple[str, ...] = ("normal",)) -> cases.Score:
    """A tensor option: each axis kept or of length 1, leading ones perhaps left out."""
    shape = "".join(draw(st.sampled_from([axis, "1"])) for axis in axes)
    left_out = draw(st.integers(0, len(axes)))
    layout = draw(st.sampled_from(["contiguous", "strided", "heads_innermost"] if not left_out else ["contiguous"]))
    return cases.Score(shape[left_out:], draw(st.sampled_from(fills)), layout=layout)


@st.composite
def options(draw, causal: tuple[Any, ...]) -> dict[str, Any]:
    """The keywords of `attention`, each present or not."""
    present: dict[str, st.SearchStrategy] = {
        "causal": st.sampled_from(causal),
        "window": st.tuples(*[st.none() | st.integers(0, 50)] * 2),
        "scale": st.sampled_from([1.0, 0.3, -0.5, 0.0]),
        "softcap": st.sampled_from([0.5, 2.0, 30.0]),
        "bias": scores("BHMN", ("normal", "minus_infinity")),
        "mask": scores("BHMN", ("random_bool", "documents", "blocks", "nothing")),
        "alibi_slopes": st.builds(
            cases.Score, st.sampled_from(["H", "BH"]), st.just("slopes"), layout=st.sampled_from(VECTOR_LAYOUTS)
        ),
        "sinks": st.builds(
            cases.Score,
            st.just("H"),
            st.sampled_from(["normal", "minus_infinity"]),
            layout=st.sampled_from(VECTOR_LAYOUTS),
        ),
        "dropout_p": st.sampled_from([0.1, 0.5]),
    }
    chosen = draw(st.sets(st.sampled_from(sorted(present)), max_size=4))
    return {name: draw(present[name]) for name in sorted(chosen)}


@st.composite
def calls(draw) -> cases.Case:
    """Any call."""
    H, H_kv = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1)]))
    D = draw(st.sampled_from([16, 8, 24, 5, 40]))
    fields: dict[str, Any] = {
        "H": H,
        "H_kv": H_kv,
        "D": D,
        "D_v": draw(st.sampled_from([D, 16, 7, 40])),
        "dtype": draw(st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16])),
        "layout": draw(st.sampled_from(LAYOUTS)),
    }
    if draw(st.booleans()):
        lengths = tuple(draw(st.lists(st.tuples(SHORT, SHORT), min_size=1, max_size=3)))
        fields |= draw(options((False, "top_left", "bottom_right")))
        return cases.packed("varlen", lengths, left_over=draw(st.sampled_from([0, 0, 7])), **fields)
    S_q, S_k = draw(LENGTH), draw(LENGTH)
    aligned = (True,) if S_q == S_k else ()
    fields |= draw(options((False, "top_left", "bottom_right", *aligned)))
    return cases.case("dense", S_q, S_k, B=draw(st.integers(1, 2)), **fields)


def check_call(case: cases.Case) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check("triton", *inputs_of(case, device), *options_of(case, device), packed_of(case, device))


# A minute of the interpreter's time each
PARTS = [
    0,
    *(pytest.param(part, marks=pytest.mark.thorough) for part in (1, 2)),
    *(pytest.param(part, marks=pytest.mark.slow) for part in range(3, 6)),
]


@pytest.mark.parametrize("part", PARTS)
def test_any_call(part: int):
    """50 draws a part, and parts run side by side; the first failure is reported as it is drawn."""

    @seed(part)
    @settings(max_examples=50, database=None, phases=[Phase.generate], **SETTINGS)
    @given(calls())
    def draw(case):
        check_call(case)

    draw()


@pytest.mark.slow
@settings(max_examples=3000, **SETTINGS)
@given(calls())
def test_any_call_at_length(case: cases.Case):
    check_call(case)
