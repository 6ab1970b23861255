"""Attention of the CUDA backend through the public functions: on a GPU, or its kernels in the emulator."""

from __future__ import annotations

import math
from dataclasses import replace

import cases
import pytest
import torch
from parity import check, inputs_of, options_of, packed_of, spec_of

import fastattn
from fastattn import backends
from fastattn.errors import UnsupportedError
from fastattn.reference.attention import attention as reference
from fastattn.testing import assert_close, make_inputs, simulate_rounding


def at_width(case: cases.Case, dtype: torch.dtype, D: int = 64, D_v: int = 0) -> cases.Case:
    return replace(case, name=f"{case.name}_{D}", dtype=dtype, D=D, D_v=D_v)


NAMED = {
    case.name: case
    for case in (*cases.TRITON, *cases.VARLEN)
    if not {"bias", "mask", "alibi_slopes", "sinks", "dropout_p"} & set(case.options)  # left to other backends
}
# The kernel's own tests are in test_cuda_attention_kernel.py; these are of the way to it, and of the gradient.
CHOSEN = """
    no_queries no_keys no_batch causal causal_bottom_right_more_keys causal_top_left_more_queries causal_decode
    window_both window_right window_top_left window_wider_than_everything rows_that_see_nothing_first gqa mqa
    layout_heads_inside layout_packed layout_strided scale_negative scale_0 softcap_causal_gqa varlen_all_empty
    varlen_one_sequence varlen_causal varlen_top_left varlen_window
"""
CASES = [
    *(at_width(NAMED[name], (torch.bfloat16, torch.float16)[i % 2]) for i, name in enumerate(CHOSEN.split())),
    *(at_width(NAMED["causal"], torch.bfloat16, D) for D in (96, 128, 192, 256)),
    at_width(cases.case("mla", 33, 130, causal="bottom_right"), torch.float16, 192, 128),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case: cases.Case, cuda: torch.device):
    check("cuda", *inputs_of(case, cuda), *options_of(case, cuda), packed_of(case, cuda))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_hidden_entries_never_leak(value: float, cuda: torch.device):
    """What no query sees may hold anything: the results are those of the keys that some query sees."""
    (q,), (k, v) = (make_inputs(*[(1, 2, S, 64)] * n, dtype=torch.bfloat16, device=cuda) for S, n in ((20, 1), (50, 2)))
    exact = reference(*(t.double() for t in (q, k, v)), spec_of(q, k, v, causal="top_left"))
    spec = spec_of(q, k, v, causal="top_left")
    visible = [t.clone() for t in (q, k, v)]
    rounded = simulate_rounding(lambda: reference(*visible, spec, compute_dtype=torch.bfloat16))
    k[:, :, 20:], v[:, :, 20:] = value, value
    found = fastattn.attention(q, k, v, causal="top_left", return_lse=True, backend="cuda")
    for name, a, b, c in zip(("o", "lse"), found, exact, rounded, strict=True):
        assert_close(a, b, c.to(a.dtype), name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_visible_non_finite_values_are_not_hidden(dtype: torch.dtype, cuda: torch.device):
    q, k, v = make_inputs(*[(1, 1, 50, 64)] * 3, dtype=dtype, device=cuda)
    v[0, 0, 9, 3], v[0, 0, 20, 4], v[0, 0, 30, 5], v[0, 0, 33, 4] = math.nan, math.inf, -math.inf, -math.inf
    o = fastattn.attention(q, k, v, causal=True, backend="cuda")[0, 0].float().cpu()
    expected = torch.zeros(50, 64)
    expected[9:, 3], expected[20:, 4], expected[30:, 5], expected[33:, 4] = math.nan, math.inf, -math.inf, math.nan
    assert torch.equal(o.isnan(), expected.isnan())
    assert torch.equal(o == math.inf, expected == math.inf)
    assert torch.equal(o == -math.inf, expected == -math.inf)


@pytest.mark.parametrize("at", [1, 4], ids=["address", "stride"])
def test_what_tma_cannot_read_is_copied(at: int, cuda: torch.device):
    """Rows that begin 2 or 8 bytes off 16."""
    q, k, v = make_inputs(*[(1, 2, 30, 64)] * 3, dtype=torch.bfloat16, device=cuda)
    odd = torch.zeros(1, 2, 30, 64 + at, dtype=torch.bfloat16, device=cuda)[..., at:]
    odd.copy_(k)
    expected = fastattn.attention(q, k, v, causal=True, backend="cuda")
    assert torch.equal(fastattn.attention(q, odd, v, causal=True, backend="cuda"), expected)


def test_expanded_heads_are_read(cuda: torch.device):
    q, k, v = make_inputs((2, 4, 30, 64), *[(2, 1, 30, 64)] * 2, dtype=torch.float16, device=cuda)
    expected = fastattn.attention(q, k, v, backend="cuda")
    assert torch.equal(fastattn.attention(q, k.expand_as(q), v.expand_as(q), backend="cuda"), expected)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dtype": torch.float32}, "dtype float32"),
        ({"D": 80}, "head dimensions 80 of q and k, 80 of v"),
        ({"options": {"dropout_p": 0.5}}, "dropout"),
        ({"options": {"bias": cases.Score("MN")}}, "bias"),
        ({"options": {"mask": cases.Score("MN", fill="random_bool")}}, "mask"),
        ({"options": {"alibi_slopes": cases.Score("H")}}, "alibi_slopes"),
        ({"options": {"sinks": cases.Score("H")}}, "sinks"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_rest_is_refused_by_name(change: dict, why: str, cuda: torch.device):
    case = replace(cases.case("refused", dtype=torch.bfloat16, D=64), **change)
    (q, k, v), *_ = inputs_of(case, cuda)
    options, _ = options_of(case, cuda)
    with pytest.raises(UnsupportedError, match=why):
        fastattn.attention(q, k, v, backend="cuda", **options)


def test_explain_gives_the_configuration(cuda: torch.device):
    q, k, v = make_inputs(*[(1, 2, 30, 64)] * 3, dtype=torch.bfloat16, device=cuda)
    explanation = fastattn.explain(fastattn.attention, q, k, v, causal=True, backend="cuda")
    assert explanation.backend == "cuda"
    assert "BLOCK_M" in explanation.config
    assert "backward by triton" in explanation.config
    assert backends.select(spec_of(q, k, v), cuda).NAME == "triton"  # until a GPU has run it, only on request
