"""Attention of every backend against float64: o, lse and each gradient, in each named case."""

from __future__ import annotations

import math
from typing import Any

import cases
import pytest
import torch
from parity import check, inputs_of, options_of, run

import fastattn
from fastattn.testing import make_inputs


@pytest.mark.parametrize("case", cases.TRITON, ids=str)
def test_triton(case: cases.Case, device: torch.device):
    check("triton", *inputs_of(case, device), *options_of(case, device))


@pytest.mark.parametrize("case", [*cases.LENGTHS, *cases.MASKS, *cases.HEADS, *cases.LAYOUTS, *cases.SCALES], ids=str)
def test_eager(case: cases.Case, device: torch.device):
    inputs, do, dlse = inputs_of(case, device)
    check("eager", inputs, do, dlse, case.options)
    check("eager", inputs, do, None, case.options)  # without lse, torch's own kernels serve where they can


HIDDEN = [  # (options, S_q, S_k, queries that see nothing, keys that nobody sees)
    ({"causal": "top_left"}, 20, 50, [], [20, 37, 49]),
    ({"causal": "bottom_right"}, 50, 20, [0, 13, 29], []),
    ({"window": (3, 0)}, 60, 20, [0, 39], []),
    ({"window": (None, None), "causal": "top_left"}, 10, 11, [], [10]),
]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize(("options", "S_q", "S_k", "queries", "keys"), HIDDEN)
@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_hidden_entries_never_leak(backend, options, S_q, S_k, queries, keys, value, device):
    """What no query sees may hold anything: every result is that of zeros there, to the bit."""
    results = []
    for garbage in (0.0, value):
        (q, do), (k, v) = (make_inputs((1, 2, S, 16), (1, 2, S, 16), device=device, seed=S) for S in (S_q, S_k))
        q[:, :, queries], k[:, :, keys], v[:, :, keys] = garbage, garbage, garbage
        leaves = [t.requires_grad_() for t in (q, k, v)]
        o, lse = fastattn.attention(*leaves, return_lse=True, backend=backend, **options)
        results.append((o, lse, *torch.autograd.grad(o, leaves, do)))
    for name, clean, dirty in zip(("o", "lse", "dq", "dk", "dv"), *results, strict=True):
        assert torch.equal(clean, dirty), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_visible_non_finite_values_are_not_hidden(dtype, device):
    """In tiles masked in part: inf, -inf and NaN in v reach exactly the rows and columns that IEEE sends them to."""
    q, k, v = make_inputs(*[(1, 1, 50, 16)] * 3, dtype=dtype, device=device)
    v[0, 0, 9, 3], v[0, 0, 20, 4], v[0, 0, 30, 5], v[0, 0, 33, 4] = math.nan, math.inf, -math.inf, -math.inf
    o = fastattn.attention(q, k, v, causal=True, backend="triton")[0, 0]
    expected = torch.zeros(50, 16)
    expected[9:, 3], expected[20:, 4], expected[30:, 5], expected[33:, 4] = math.nan, math.inf, -math.inf, math.nan
    assert torch.equal(o.isnan().cpu(), expected.isnan())
    assert torch.equal((o == math.inf).cpu(), expected == math.inf)
    assert torch.equal((o == -math.inf).cpu(), expected == -math.inf)


def test_rows_that_see_nothing(device):
    q, k, v = (t.requires_grad_() for t in make_inputs((1, 2, 30, 16), *[(1, 2, 10, 16)] * 2, device=device))
    o, lse = fastattn.attention(q, k, v, causal="bottom_right", return_lse=True, backend="triton")
    dq, _, _ = torch.autograd.grad((o.sum() + lse[:, :, 20:].sum()), (q, k, v))
    assert (o[:, :, :20] == 0).all()
    assert (lse[:, :, :20] == -math.inf).all()
    assert (dq[:, :, :20] == 0).all()
    assert (dq[:, :, 20:] != 0).any()


def test_very_negative_lse(device):
    """Padding after the last key must not overflow: exp(0 - lse) is inf where every score is far below 0."""
    q, k, v = make_inputs((1, 1, 64, 16), (1, 1, 50, 16), (1, 1, 50, 16), device=device)
    q, k = q.abs() + 5.0, -k.abs() - 5.0
    check("triton", [q, k, v], torch.ones_like(q), torch.zeros(1, 1, 64, device=device), {"scale": 1.0})


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qk", "kv", "qv"])
def test_only_the_gradients_that_are_wanted(wanted, device):
    inputs, do, dlse = inputs_of(cases.case("", causal=True), device)
    leaves = {name: t.requires_grad_(name in wanted) for name, t in zip("qkv", inputs, strict=True)}
    o, lse = fastattn.attention(*leaves.values(), causal=True, return_lse=True, backend="triton")
    actual = torch.autograd.grad((o, lse), [leaves[name] for name in wanted], (do, dlse))
    full = run(
        lambda *x: fastattn.attention(*x, causal=True, return_lse=True, backend="triton"),
        inputs,
        do,
        dlse,
        torch.float32,
    )
    for name, grad in zip(wanted, actual, strict=True):
        assert torch.equal(grad, full[f"d{name}"])


def test_gradient_of_lse_alone(device):
    inputs, do, dlse = inputs_of(cases.case("", window=(9, 2)), device)
    check("triton", inputs, torch.zeros_like(do), dlse, {"window": (9, 2)})
    q, k, v = (t.requires_grad_() for t in inputs)
    _, lse = fastattn.attention(q, k, v, return_lse=True, backend="triton")
    assert (torch.autograd.grad(lse.sum(), v)[0] == 0).all()


def test_one_tensor_as_query_key_and_value(device):
    (x,) = make_inputs((2, 2, 20, 16), device=device)
    results = []
    for backend, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        leaf = x.to(dtype).requires_grad_()
        o = fastattn.attention(leaf, leaf, leaf, causal=True, backend=backend)
        results.append((o, torch.autograd.grad(o.sum(), leaf)[0]))
    for exact, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-5)


def test_bitwise_repeatable(device):
    inputs, do, dlse = inputs_of(cases.case("", 70, 70, B=2, H=4, H_kv=2), device)
    first, second = (
        run(
            lambda *x: fastattn.attention(*x, causal=True, return_lse=True, backend="triton"),
            inputs,
            do,
            dlse,
            torch.float32,
        )
        for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_row_does_not_depend_on_its_batch(device):
    q, k, v = make_inputs(*[(3, 2, 40, 16)] * 3, device=device)
    whole = fastattn.attention(q, k, v, causal=True, backend="triton")
    alone = fastattn.attention(q[1:2], k[1:2], v[1:2], causal=True, backend="triton")
    assert torch.equal(whole[1:2], alone)


def test_inputs_are_not_copied(device, monkeypatch):
    """Any strides are read where they lie."""
    q, k, v = make_inputs(*[(1, 2, 20, 16)] * 3, device=device, layout="strided")

    def copied(*args, **kwargs):
        raise AssertionError("an input was copied")

    for name in ("contiguous", "clone", "reshape", "copy_", "to"):
        monkeypatch.setattr(torch.Tensor, name, copied)
    fastattn.attention(q, k, v, causal=True, backend="triton")


def test_output_takes_the_layout_of_q(device):
    q, k, v = make_inputs(*[(2, 3, 20, 16)] * 3, device=device, layout="heads_inside")
    o = fastattn.attention(q, k, v, backend="triton")
    assert o.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("stride", [2**29, 2**31 + 8])
def test_offsets_pass_2_to_the_31(stride, device):
    """Rows so far apart that offsets need 64 bits, in memory that is reserved and never touched between them."""
    if device.type == "cuda":
        stride //= 8
    rows = 5
    buffer = torch.empty(stride * (rows - 1) + 16, dtype=torch.float16, device=device)
    far = buffer.as_strided((1, 1, rows, 16), (0, 0, stride, 1))
    near = make_inputs((1, 1, rows, 16), dtype=torch.float16, device=device)[0]
    far.copy_(near)
    expected = fastattn.attention(near, near, near, backend="triton")
    assert torch.equal(fastattn.attention(far, far, far, backend="triton"), expected)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_what_it_says(p, device):
    q = torch.zeros(2, 4, 64, 16, device=device)
    v = torch.eye(64, device=device).expand(2, 4, 64, 64)
    torch.manual_seed(0)
    weights = fastattn.attention(q, q, v, dropout_p=p, backend="triton") * 64  # p · (kept / (1 - p))
    kept = weights > 0.5
    assert abs(kept.float().mean().item() - (1 - p)) < 4 * math.sqrt(p * (1 - p) / kept.numel())
    torch.testing.assert_close(weights[kept], torch.full_like(weights[kept], 1 / (1 - p)))
    torch.manual_seed(0)
    assert torch.equal(fastattn.attention(q, q, v, dropout_p=p, backend="triton") * 64, weights)
    assert not torch.equal(fastattn.attention(q, q, v, dropout_p=p, backend="triton") * 64, weights)


@pytest.mark.parametrize(
    ("leading", "gqa"), [((), False), ((3,), False), ((2, 3), False), ((2, 2, 4), False), ((2, 4), True)], ids=str
)
@pytest.mark.parametrize("masking", ["none", "causal", "bool", "float"])
def test_scaled_dot_product_attention(leading, gqa, masking, device):
    """torch's function, for any number of leading dimensions."""
    key_leading = (*leading[:-1], 2) if gqa else leading
    q, k, v = make_inputs(
        (*leading, 9, 16), (*key_leading, 12, 16), (*key_leading, 12, 8), dtype=torch.float64, device=device
    )
    options: dict[str, Any] = {"enable_gqa": gqa, "scale": 0.3}
    if masking == "causal":
        options["is_causal"] = True
    elif masking != "none":
        options["attn_mask"] = torch.arange(108, device=device).view(9, 12) % 5 != 0
        if masking == "float":
            options["attn_mask"] = options["attn_mask"].double()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(fastattn.scaled_dot_product_attention(q, k, v, **options), expected)
