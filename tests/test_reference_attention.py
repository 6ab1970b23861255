"""The oracle of attention by itself, in float64: against torch where they overlap, against its definition elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from fastattn.reference.attention import attention, varlen_attention
from fastattn.reference.dropout import dropout_keep
from fastattn.spec import AttentionSpec

F64 = torch.float64
CLOSE = {"rtol": 1e3 * torch.finfo(F64).eps, "atol": 1e3 * torch.finfo(F64).eps}
INF, NAN = math.inf, math.nan


def make_spec(q: Tensor, k: Tensor, v: Tensor, *, scale: float = 0.7, **options: Any) -> AttentionSpec:
    """The spec of tensors with heads in their third dimension from the end, or, packed, in their second."""
    heads = -3 if q.dim() == 4 else -2
    return AttentionSpec(q.shape[heads], k.shape[heads], q.shape[-1], v.shape[-1], q.dtype, scale, **options)


def reference(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], **tensors: Tensor) -> tuple[Tensor, Tensor]:
    return attention(q, k, v, make_spec(q, k, v, **options), **tensors)


def named(arguments: str, rows: list[tuple]) -> pytest.MarkDecorator:
    """Parametrise by rows whose first element is a name."""
    return pytest.mark.parametrize(arguments.split(", "), [row[1:] for row in rows], ids=[row[0] for row in rows])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def some(*shape: int, seed: int = 0) -> Tensor:
    """Bools, two thirds of them True."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 2 / 3


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.clone().requires_grad_(t.is_floating_point()) for t in tensors]


@dataclass(frozen=True)
class Case:
    """Options of the spec, and which of the optional tensors there are."""

    name: str
    tensors: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def inputs(self, B: int, H: int, H_kv: int, S_q: int, S_k: int) -> dict[str, Tensor]:
        optional = {
            "bias": randn(H, S_q, S_k, seed=4),
            "mask": some(B, 1, S_q, S_k, seed=5),
            "alibi_slopes": randn(B, H, seed=6).abs(),
            "sinks": randn(H, seed=7),
            "seed": torch.tensor(1234),
        }
        return {
            "q": randn(B, H, S_q, 2, seed=1),
            "k": randn(B, H_kv, S_k, 2, seed=2),
            "v": randn(B, H_kv, S_k, 3, seed=3),
            **{name: optional[name] for name in self.tensors},
        }


CASES = [
    Case("plain"),
    Case("causal_bottom_right", options={"right": 0}),
    Case("causal_top_left", options={"right": 0, "top_left": True}),
    Case("window", options={"left": 2, "right": 1}),
    Case("window_top_left", options={"left": 1, "right": 1, "top_left": True}),
    Case("window_left", options={"left": 1}),
    Case("softcap", options={"softcap": 0.8}),
    Case("bias", ("bias",)),
    Case("mask", ("mask",)),
    Case("alibi", ("alibi_slopes",)),
    Case("alibi_top_left", ("alibi_slopes",), {"right": 0, "top_left": True}),
    Case("sinks", ("sinks",)),
    Case("sinks_mask_window", ("sinks", "mask"), {"left": 1, "right": 0}),
    Case(
        "everything", ("bias", "mask", "alibi_slopes", "sinks"), {"left": 3, "right": 2, "softcap": 1.5, "scale": -1.1}
    ),
]
DROPOUT_CASES = [
    Case("dropout", ("seed",), {"dropout_p": 0.4}),
    Case("dropout_mask_sinks", ("seed", "mask", "sinks"), {"dropout_p": 0.2, "right": 1}),
]
LENGTHS = [(4, 4), (3, 5), (5, 3), (1, 4), (4, 1)]


def by_definition(q, k, v, spec: AttentionSpec, bias=None, mask=None, alibi_slopes=None, sinks=None):
    """o and lse, number by number, in Python's floats."""
    (B, H, S_q, _), S_k = q.shape, k.shape[2]
    full = (B, H, S_q, S_k)
    bias, mask = (t if t is None else t.expand(full).tolist() for t in (bias, mask))
    slopes = None if alibi_slopes is None else alibi_slopes.expand(B, H).tolist()
    o, lse = torch.zeros(B, H, S_q, v.shape[3], dtype=F64), torch.zeros(B, H, S_q, dtype=F64)
    queries, keys = q.tolist(), k.tolist()
    for b in range(B):
        for h in range(H):
            h_kv = h // (H // k.shape[1])
            for i in range(S_q):
                diagonal = i if spec.top_left else i + S_k - S_q
                scores = {}
                for j in range(S_k):
                    if spec.left is not None and j < diagonal - spec.left:
                        continue
                    if spec.right is not None and j > diagonal + spec.right:
                        continue
                    if mask is not None and not mask[b][h][i][j]:
                        continue
                    s = spec.scale * sum(x * y for x, y in zip(queries[b][h][i], keys[b][h_kv][j], strict=True))
                    if spec.softcap is not None:
                        s = spec.softcap * math.tanh(s / spec.softcap)
                    if bias is not None:
                        s += bias[b][h][i][j]
                    if slopes is not None:
                        s -= slopes[b][h] * abs(i + S_k - S_q - j)
                    scores[j] = s
                total = math.fsum(map(math.exp, [*scores.values(), *([] if sinks is None else [sinks[h].item()])]))
                lse[b, h, i] = math.log(total) if total > 0 else -INF
                for j, s in scores.items():
                    o[b, h, i] += math.exp(s) / total * v[b, h_kv, j]
    return o, lse


@pytest.mark.parametrize(("S_q", "S_k"), LENGTHS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_what_the_definition_says(case: Case, S_q: int, S_k: int):
    inputs = case.inputs(2, 4, 2, S_q, S_k)
    expected = by_definition(**inputs, spec=make_spec(inputs["q"], inputs["k"], inputs["v"], **case.options))
    torch.testing.assert_close(reference(**inputs, options=case.options), expected, **CLOSE)


# Each row's visible keys, written by hand. With q = 0 and v = 1, o shows them, and lse counts them.
VISIBLE = [
    ("causal_bottom_right_more_keys", 3, 5, {"right": 0}, ["01 2", "0123", "01234"]),
    ("causal_bottom_right_more_queries", 4, 2, {"right": 0}, ["", "", "0", "01"]),
    ("causal_top_left_more_keys", 3, 5, {"right": 0, "top_left": True}, ["0", "01", "012"]),
    ("causal_top_left_more_queries", 4, 2, {"right": 0, "top_left": True}, ["0", "01", "01", "01"]),
    ("window", 4, 4, {"left": 1, "right": 1}, ["01", "012", "123", "23"]),
    ("window_more_keys", 3, 5, {"left": 1, "right": 0}, ["12", "23", "34"]),
    ("window_top_left_more_keys", 3, 5, {"left": 1, "right": 0, "top_left": True}, ["0", "01", "12"]),
    ("window_top_left_more_queries", 5, 2, {"left": 1, "right": 0, "top_left": True}, ["0", "01", "1", "", ""]),
    ("window_left", 3, 3, {"left": 0}, ["012", "12", "2"]),
    ("window_right", 3, 4, {"right": 1}, ["012", "0123", "0123"]),
    ("window_of_one", 2, 2, {"left": 0, "right": 0}, ["0", "1"]),
    ("one_query", 1, 4, {"left": 2, "right": 0}, ["123"]),
]


@named("S_q, S_k, options, keys", VISIBLE)
def test_rows_see_the_keys_that_they_should(S_q: int, S_k: int, options, keys: list[str]):
    seen = torch.tensor([[str(j) in row for j in range(S_k)] for row in keys], dtype=F64)
    count = seen.sum(-1)
    q, k, v = torch.zeros(1, 1, S_q, 2, dtype=F64), randn(1, 1, S_k, 2), torch.eye(S_k, dtype=F64)[None, None]
    o, lse = reference(q, k, v, options)
    torch.testing.assert_close(o[0, 0], seen / count.clamp(min=1)[:, None], **CLOSE)
    torch.testing.assert_close(lse[0, 0], count.log(), **CLOSE)


# One query and two keys; logits worked out by hand, the last one of a sink.
LOGITS = [
    ("plain", {"scale": 0.5}, {}, [1.5, -0.5]),
    ("softcap", {"scale": 0.5, "softcap": 2.0}, {}, [2.0 * math.tanh(0.75), 2.0 * math.tanh(-0.25)]),
    ("softcap_before_bias", {"scale": 0.5, "softcap": 1e-6}, {"bias": [[4.0, -3.0]]}, [4.0 + 1e-6, -3.0 - 1e-6]),
    ("alibi", {"scale": 0.5}, {"alibi_slopes": [0.25]}, [1.5 - 0.25, -0.5]),
    ("alibi_top_left", {"scale": 0.5, "top_left": True}, {"alibi_slopes": [0.25]}, [1.5 - 0.25, -0.5]),
    ("sink_not_scaled", {"scale": 0.5}, {"sinks": [2.0]}, [1.5, -0.5, 2.0]),
    ("sink_not_capped", {"scale": 0.5, "softcap": 1e-6}, {"sinks": [2.0]}, [1e-6, -1e-6, 2.0]),
    ("sink_alone", {"scale": 0.5}, {"sinks": [2.0], "mask": [[False, False]]}, [-INF, -INF, 2.0]),
    ("masked", {"scale": 0.5}, {"mask": [[True, False]]}, [1.5, -INF]),
]


@named("options, lists, logits", LOGITS)
def test_closed_form(options, lists, logits: list[float]):
    tensors = {name: torch.tensor(x, dtype=torch.bool if name == "mask" else F64) for name, x in lists.items()}
    q, k = torch.tensor([[[[3.0]]]], dtype=F64), torch.tensor([[[[1.0], [-1 / 3]]]], dtype=F64)
    o, lse = reference(q, k, torch.eye(2, dtype=F64)[None, None], options, **tensors)
    expected = torch.tensor(logits, dtype=F64)
    torch.testing.assert_close(o.flatten(), expected.softmax(0)[:2], **CLOSE)
    torch.testing.assert_close(lse.flatten(), expected.logsumexp(0)[None], **CLOSE)


SDPA = [
    ("full", (2, 4, 5, 3), (2, 4, 7, 3), 3, {}),
    ("value_width", (2, 4, 5, 3), (2, 4, 7, 3), 6, {}),
    ("scale", (2, 4, 5, 3), (2, 4, 7, 3), 3, {"scale": -1.3}),
    ("gqa", (2, 6, 5, 3), (2, 2, 7, 3), 3, {"enable_gqa": True}),
    ("causal", (2, 4, 6, 3), (2, 4, 6, 3), 3, {"is_causal": True}),
    ("causal_more_keys", (2, 4, 5, 3), (2, 4, 7, 3), 3, {"is_causal": True}),
    ("causal_more_queries", (2, 4, 7, 3), (2, 4, 5, 3), 3, {"is_causal": True}),
    ("mask", (2, 4, 5, 3), (2, 4, 7, 3), 3, {"attn_mask": some(2, 4, 5, 7)}),
    ("mask_broadcast", (2, 4, 5, 3), (2, 4, 7, 3), 3, {"attn_mask": some(4, 1, 7)}),
    ("mask_gqa_empty_rows", (2, 4, 5, 3), (2, 2, 7, 3), 3, {"attn_mask": some(5, 1).expand(5, 7), "enable_gqa": True}),
    ("bias", (2, 4, 5, 3), (2, 4, 7, 3), 3, {"attn_mask": randn(2, 4, 5, 7)}),
    ("bias_broadcast", (2, 4, 5, 3), (2, 4, 7, 3), 3, {"attn_mask": randn(2, 1, 5, 1)}),
    ("bias_inf", (2, 4, 5, 3), (2, 4, 7, 3), 3, {"attn_mask": torch.where(some(5, 7), 0.0, -INF).to(F64)}),
]


@named("q, k, D_v, options", SDPA)
def test_agrees_with_torch(q, k, D_v: int, options: dict[str, Any]):
    """Values and the gradients of q, k, v and a bias."""
    attn_mask = options.get("attn_mask")
    wanted = leaves(randn(*q, seed=1), randn(*k, seed=2), randn(*k[:3], D_v, seed=3))
    kind = None
    if attn_mask is not None:
        kind = "mask" if attn_mask.dtype == torch.bool else "bias"
        options = {**options, "attn_mask": leaves(attn_mask)[0]}
        wanted += [options["attn_mask"]] if kind == "bias" else []
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(*wanted[:3], **options)
    ours: dict[str, Any] = {"scale": options.get("scale", 3**-0.5)}
    if "is_causal" in options:
        ours |= {"right": 0, "top_left": True}
    o, _ = reference(*wanted[:3], ours, **({} if kind is None else {kind: options["attn_mask"]}))
    torch.testing.assert_close(o, expected, **CLOSE)
    do = randn(*o.shape, seed=9)
    torch.testing.assert_close(grad(o, wanted, do), grad(expected, wanted, do), **CLOSE)


def differentiable(case: Case, S_q: int = 3, S_k: int = 4):
    """(f, inputs): f gives o and lse, 0 in place of the -inf of a row that sees nothing, of what has a gradient."""
    inputs = case.inputs(1, 2, 1, S_q, S_k)
    names = [name for name, t in inputs.items() if t.is_floating_point()]

    def f(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        o, lse = reference(**{**inputs, **dict(zip(names, tensors, strict=True))}, options=case.options)
        return o, torch.where(lse == -INF, 0.0, lse)

    return f, leaves(*(inputs[name] for name in names))


@pytest.mark.parametrize("case", [*CASES, *DROPOUT_CASES], ids=str)
def test_gradients_are_those_of_finite_differences(case: Case):
    f, inputs = differentiable(case)
    assert gradcheck(f, inputs)


@pytest.mark.parametrize("case", [CASES[3], CASES[-1], DROPOUT_CASES[-1]], ids=str)
def test_second_gradients_are_those_of_finite_differences(case: Case):
    f, inputs = differentiable(case, 2, 3)
    assert gradgradcheck(f, inputs)


def test_gradient_of_lse_is_the_probabilities():
    q, k = leaves(randn(1, 1, 3, 2), randn(1, 1, 5, 2, seed=1))
    p, lse = reference(q, k, torch.eye(5, dtype=F64)[None, None], {"right": 0})
    dq, dk = grad(lse.sum(), (q, k))
    torch.testing.assert_close(dq, 0.7 * p @ k, **CLOSE)
    torch.testing.assert_close(dk, 0.7 * p.mT @ q, **CLOSE)


EMPTY = [
    ("window", 5, 2, {"left": 0, "right": 0}, {}, 3),
    ("causal", 5, 2, {"right": 0}, {}, 3),
    ("mask_of_all", 3, 4, {}, {"mask": torch.zeros(1, 1, dtype=torch.bool)}, 3),
    ("mask_of_two_rows", 3, 4, {}, {"mask": torch.tensor([[False], [False], [True]])}, 2),
    ("bias_of_two_rows", 3, 4, {}, {"bias": torch.tensor([[-INF], [-INF], [0.0]], dtype=F64)}, 2),
    ("no_keys", 3, 0, {}, {}, 3),
]


@named("S_q, S_k, options, tensors, n_empty", EMPTY)
def test_row_that_sees_nothing(S_q: int, S_k: int, options, tensors, n_empty: int):
    """o = 0, lse = -inf; gradients, and theirs, are 0 where they come from such rows: the first n_empty."""
    q, k, v = leaves(randn(1, 2, S_q, 3, seed=1), randn(1, 2, S_k, 3, seed=2), randn(1, 2, S_k, 3, seed=3))
    o, lse = reference(q, k, v, options, **tensors)
    assert (o[:, :, :n_empty] == 0).all()
    assert (lse[:, :, :n_empty] == -INF).all()
    assert lse[:, :, n_empty:].isfinite().all()

    weight = randn(*o.shape, seed=4)
    loss = (o * weight)[:, :, :n_empty].sum() + lse[:, :, :n_empty].sum()
    first = grad(loss, (q, k, v), create_graph=True)
    dots = sum((g * randn(*g.shape, seed=5)).sum() for g in first)
    second = grad(dots, (q, k, v), allow_unused=True, retain_graph=True)
    for g in (*first, *second):
        assert g is None or (g == 0).all()

    everywhere = grad((o * weight).sum(), (q, k, v), create_graph=True)
    assert (everywhere[0][:, :, :n_empty] == 0).all()
    for g in (*everywhere, *grad(sum(g.square().sum() for g in everywhere), (q, k, v), allow_unused=True)):
        assert g is None or g.isfinite().all()


def test_row_that_sees_only_a_sink():
    q, k, v, sinks = leaves(randn(1, 2, 3, 4), randn(1, 2, 5, 4), randn(1, 2, 5, 4), randn(2, seed=8))
    o, lse = reference(q, k, v, {}, sinks=sinks, mask=torch.zeros(1, dtype=torch.bool))
    assert (o == 0).all()
    torch.testing.assert_close(lse, sinks[None, :, None].expand(1, 2, 3), **CLOSE)
    dq, dk, dv, dsinks = grad(o.sum() + lse.sum(), (q, k, v, sinks))
    for g in (dq, dk, dv):
        assert not g.any()
    torch.testing.assert_close(dsinks, torch.full((2,), 3.0, dtype=F64), **CLOSE)


HIDDEN = [  # keys 4 and 5 of 6 are hidden from each of 4 rows
    ("mask", {}, {"mask": torch.tensor([True] * 4 + [False] * 2)}),
    ("causal_top_left", {"right": 0, "top_left": True}, {}),
    ("window_and_sinks", {"left": 3, "right": -2}, {"sinks": randn(2)}),
    ("softcap_and_bias", {"softcap": 1.5}, {"mask": torch.tensor([True] * 4 + [False] * 2), "bias": randn(4, 6)}),
]


def results(inputs: dict[str, Tensor], options: dict[str, Any]) -> list[Tensor]:
    """o, lse, their gradients and one of second order."""
    inputs = dict(zip(inputs, leaves(*inputs.values()), strict=True))
    wanted = [t for t in inputs.values() if t.requires_grad]
    o, lse = reference(**inputs, options=options)
    first = grad((o * randn(*o.shape, seed=9)).sum() + lse.sum(), wanted, create_graph=True)
    second = grad(sum(g.square().sum() for g in first), inputs["q"])
    return [o, lse, *first, *second]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["k", "v", "bias"])
@named("options, tensors", HIDDEN)
def test_what_no_row_sees_does_not_leak(options, tensors, where: str, bad: float):
    inputs = {"q": randn(1, 2, 4, 3, seed=1), "k": randn(1, 2, 6, 3, seed=2), "v": randn(1, 2, 6, 3, seed=3)}
    inputs |= {"bias": torch.zeros(4, 6, dtype=F64), **tensors}
    keys = (..., slice(4, 6)) if where == "bias" else (..., slice(4, 6), slice(None))
    poisoned, clean = inputs[where].clone(), inputs[where].clone()
    poisoned[keys], clean[keys] = bad, 0.0
    for got, expected in zip(
        results({**inputs, where: poisoned}, options), results({**inputs, where: clean}, options), strict=True
    ):
        assert torch.equal(got, expected)
        assert got.isfinite().all()


@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_what_some_rows_see_reaches_only_them(where: str):
    """Causal, NaN in position 2 of 4: rows 0 and 1 have the o, lse and dq that they had without it."""
    clean = {"q": randn(1, 2, 4, 3, seed=1), "k": randn(1, 2, 4, 3, seed=2), "v": randn(1, 2, 4, 3, seed=3)}
    poisoned = {name: t.clone() for name, t in clean.items()}
    poisoned[where][:, :, 2] = NAN
    o, lse, dq, *_ = results(poisoned, {"right": 0})
    for actual, expected in zip((o, lse, dq), results(clean, {"right": 0}), strict=False):
        assert torch.equal(actual[:, :, :2], expected[:, :, :2])
    assert o[:, :, 2].isnan().all()
    assert o[:, :, 3].isnan().all() == (where != "q")
    assert dq[:, :, 3].isnan().all() == (where != "q")


def test_row_of_nan_reaches_only_the_keys_that_it_sees():
    """Causal, q is NaN in row 2 of 4: key 3 has the gradients that it had without it."""
    q, k, v = (randn(1, 2, 4, 3, seed=i) for i in range(3))
    poisoned = q.clone()
    poisoned[:, :, 2] = NAN
    _, _, _, dk, dv, _ = results({"q": poisoned, "k": k, "v": v}, {"right": 0})
    _, _, _, dk_clean, dv_clean, _ = results({"q": q, "k": k, "v": v}, {"right": 0})
    assert torch.equal(dk[:, :, 3], dk_clean[:, :, 3])
    assert torch.equal(dv[:, :, 3], dv_clean[:, :, 3])
    assert dv[:, :, :3].isnan().all()


def test_large_scores_neither_overflow_nor_vanish():
    q, k, v = randn(1, 2, 3, 4), 1e6 * randn(1, 2, 5, 4, seed=1), randn(1, 2, 5, 4, seed=2)
    o, lse = reference(q, k, v, {})
    scores = 0.7 * q @ k.mT
    torch.testing.assert_close(lse, scores.logsumexp(-1), **CLOSE)
    torch.testing.assert_close(o, scores.softmax(-1) @ v, **CLOSE)
    shifted, shifted_lse = reference(q, k, v, {}, bias=torch.tensor([-1e6], dtype=F64))
    torch.testing.assert_close(shifted, o, rtol=1e-9, atol=1e-9)  # 1e-9: one rounding of a score of 1e6
    torch.testing.assert_close(shifted_lse, lse - 1e6, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_computes_in_float32_or_as_told(dtype: torch.dtype):
    q, k, v = (randn(1, 2, 6, 8, seed=i).to(dtype) for i in range(3))
    exact = reference(q.double(), k.double(), v.double(), {})
    o, lse = reference(q, k, v, {})
    assert (o.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(lse.double(), exact[1], rtol=1e-6, atol=1e-6)
    o, lse = attention(q, k, v, make_spec(q, k, v), compute_dtype=F64)
    assert torch.equal(o, exact[0].to(dtype))
    assert torch.equal(lse, exact[1].float())


@pytest.mark.parametrize("dropout_p", [0.0, 0.3, 1.0])
def test_dropout_drops_and_rescales_probabilities(dropout_p: float):
    q, k, v = leaves(randn(2, 2, 5, 3, seed=1), randn(2, 2, 6, 3, seed=2), torch.eye(6, dtype=F64).expand(2, 2, 6, 6))
    seed = torch.tensor(99)
    p, lse = reference(q, k, v, {"right": 1})
    o, lse_dropout = reference(q, k, v, {"right": 1, "dropout_p": dropout_p}, seed=seed)
    keep = dropout_keep(seed, dropout_p, 2, 2, 5, 6)
    assert keep.all() if dropout_p == 0.0 else keep.any() == (dropout_p < 1.0)
    torch.testing.assert_close(o, torch.where(keep, p / max(1 - dropout_p, 1e-300), 0.0), **CLOSE)
    assert torch.equal(lse, lse_dropout)
    for g in grad(o.square().sum(), (q, k, v)):
        assert g.isfinite().all()
        assert g.any() == (dropout_p < 1.0)


def test_dropout_leaves_the_mean():
    """Over 400 seeds, within five standard deviations of it."""
    q, k, v = (randn(1, 1, 3, 4, seed=i) for i in range(3))
    o, _ = reference(q, k, v, {})
    samples = torch.stack([reference(q, k, v, {"dropout_p": 0.5}, seed=torch.tensor(s))[0] for s in range(400)])
    assert ((samples.mean(0) - o).abs() < 5 * samples.std(0) / math.sqrt(400)).all()


PACKED = [
    ((3, 0, 5, 1, 4), (3, 2, 5, 6, 0)),  # an empty sequence, more keys, one query, no keys
    ((0,), (0,)),
    ((2, 2), (7, 1)),
]


def packed(case: Case, S_q: tuple[int, ...], S_k: tuple[int, ...]):
    """(q, k, v packed, cu_seqlens_q, cu_seqlens_k, optional tensors for the longest lengths)"""
    T_q, T_k = sum(S_q), sum(S_k)
    inputs = case.inputs(len(S_q), 4, 2, max(S_q), max(S_k))
    q, k, v = randn(T_q, 4, 2, seed=1), randn(T_k, 2, 2, seed=2), randn(T_k, 2, 3, seed=3)
    cu_q, cu_k = (torch.tensor([0, *S], dtype=torch.int32).cumsum(0) for S in (S_q, S_k))
    return q, k, v, cu_q, cu_k, {name: inputs[name] for name in case.tensors}


@pytest.mark.parametrize(("S_q", "S_k"), PACKED, ids=str)
@pytest.mark.parametrize("case", [*CASES, *DROPOUT_CASES], ids=str)
def test_packed_sequences_are_a_loop(case: Case, S_q, S_k):
    q, k, v, cu_q, cu_k, tensors = packed(case, S_q, S_k)
    spec = make_spec(q, k, v, **case.options)
    o, lse = varlen_attention(q, k, v, cu_q, cu_k, spec, **tensors)
    assert (o.shape, lse.shape) == ((sum(S_q), 4, 3), (4, sum(S_q)))
    bounds = zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True)
    for b, ((q0, q1), (k0, k1)) in enumerate(bounds):
        own = dict(tensors)
        if "bias" in own:
            own["bias"] = own["bias"][:, : q1 - q0, : k1 - k0]
        if "mask" in own:
            own["mask"] = own["mask"][b : b + 1, :, : q1 - q0, : k1 - k0]
        if "alibi_slopes" in own:
            own["alibi_slopes"] = own["alibi_slopes"][b]
        one = (t.transpose(0, 1)[None] for t in (q[q0:q1], k[k0:k1], v[k0:k1]))
        o_b, lse_b = attention(*one, spec, **own, first_b=b)
        assert torch.equal(o[q0:q1], o_b[0].transpose(0, 1))
        assert torch.equal(lse[:, q0:q1], lse_b[0])


@pytest.mark.parametrize("case", [*CASES, *DROPOUT_CASES], ids=str)
def test_packed_sequences_of_one_length_are_a_batch(case: Case):
    inputs = case.inputs(3, 4, 2, 4, 5)
    expected, expected_lse = reference(**inputs, options=case.options)
    spec = make_spec(inputs["q"], inputs["k"], inputs["v"], **case.options)
    for name in "qkv":
        inputs[name] = inputs[name].transpose(1, 2).flatten(0, 1)
    o, lse = varlen_attention(**inputs, cu_seqlens_q=torch.arange(4) * 4, cu_seqlens_k=torch.arange(4) * 5, spec=spec)
    torch.testing.assert_close(o.unflatten(0, (3, 4)).transpose(1, 2), expected, **CLOSE)
    torch.testing.assert_close(lse.unflatten(1, (3, 4)).transpose(0, 1), expected_lse, **CLOSE)


@pytest.mark.parametrize("case", [*CASES, *DROPOUT_CASES], ids=str)
def test_vmap_is_a_loop(case: Case):
    """Over one more dimension of q, k and v, with the gradient of the queries."""
    inputs = case.inputs(2, 4, 2, 3, 5)
    mapped = {
        name: torch.stack([inputs.pop(name), randn(*shape, seed=11)])
        for name, shape in (("q", (2, 4, 3, 2)), ("k", (2, 2, 5, 2)), ("v", (2, 2, 5, 3)))
    }

    def loss(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        o, lse = reference(q, k, v, case.options, **inputs)
        return o.sin().sum(), (o, lse)

    step = torch.func.grad_and_value(loss, has_aux=True)
    together = torch.vmap(step)(*mapped.values())
    for i in range(2):
        one = step(*(t[i] for t in mapped.values()))
        torch.testing.assert_close(torch.utils._pytree.tree_map(lambda t, i=i: t[i], together), one, **CLOSE)


@pytest.mark.parametrize("case", [CASES[-1], DROPOUT_CASES[-1]], ids=str)
def test_compiles_whole(case: Case):
    """Values and gradients, in one graph."""
    inputs = case.inputs(1, 2, 1, 3, 4)
    spec = make_spec(inputs["q"], inputs["k"], inputs["v"], **case.options)

    def run(f):
        own = dict(zip(inputs, leaves(*inputs.values()), strict=True))
        o, lse = f(**own, spec=spec)
        wanted = [t for t in own.values() if t.requires_grad]
        return o, lse, *grad(o.square().sum() + lse[lse.isfinite()].sum(), wanted)

    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(compiled), run(attention), **CLOSE)


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_a_softcap_that_the_dtype_does_not_hold(backend):
    """In float32 1e300 is inf, and caps nothing; 1e-60 is 0, and leaves no score but 0."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
    target = torch.arange(10) % 8

    def results(softcap, scores=1.0):
        o = fastattn.attention(q * scores, k, v, softcap=softcap, backend=backend)
        loss = fastattn.cross_entropy(q.view(10, 8) * scores, target, softcap=softcap, backend=backend)
        return o, loss, *torch.autograd.grad(o.sum() + loss, (q, k, v))

    torch.testing.assert_close(results(1e300), results(None))
    torch.testing.assert_close(results(1e-60), results(None, scores=0.0))
