"""The row kernels of the CPU backend: the named cases of every operator, on each instruction set that this CPU has."""

from __future__ import annotations

import math

import pytest
import test_cross_entropy
import test_dropout_add
import test_gated
import test_linear_cross_entropy
import test_norm
import test_rotary
import test_softmax
import torch
from cpu_isas import EVERY_ISA, NEEDS_MODULE
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

import fastattn
from fastattn.backends import cpu
from fastattn.backends.cpu import loss as cpu_loss
from fastattn.spec import CrossEntropySpec, LinearCrossEntropySpec
from fastattn.testing import assert_close, make_inputs, simulate_rounding

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
CPU = torch.device("cpu")
pytestmark = NEEDS_MODULE


@pytest.fixture(params=EVERY_ISA, ids=str)
def isa(request):
    with request.param:
        yield request.param


@pytest.mark.parametrize("case", test_norm.NORMS, ids=str)
def test_norm_case(case):
    test_norm.check(case, "cpu", CPU, EVERY_ISA)


@pytest.mark.parametrize("function", [fastattn.softmax, fastattn.log_softmax], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", test_softmax.SOFTS, ids=str)
def test_softmax_case(case, function):
    test_softmax.check(case, function, "cpu", CPU, EVERY_ISA)


@pytest.mark.parametrize("function", [fastattn.softmax, fastattn.log_softmax], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", [c for c in test_softmax.SOFTS if c.name in test_softmax.IN_PLACE], ids=str)
def test_softmax_in_place(case, function, isa):
    test_softmax.test_in_place(function, case, "cpu", CPU)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("function", [fastattn.softmax, fastattn.log_softmax], ids=lambda f: f.__name__)
def test_masked_entries_never_leak(function, garbage, isa):
    test_softmax.test_masked_entries_never_leak(function, garbage, "cpu", CPU)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("case", test_cross_entropy.CASES, ids=str)
def test_cross_entropy_case(case, reduction):
    test_cross_entropy.check(case, reduction, "cpu", CPU, EVERY_ISA)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("case", test_linear_cross_entropy.CASES)
def test_linear_cross_entropy_case(case, reduction):
    test_linear_cross_entropy.check(*test_linear_cross_entropy.CASES[case], reduction, "cpu", CPU, EVERY_ISA)


@pytest.mark.parametrize("case", test_rotary.CASES, ids=str)
def test_rotary_case(case):
    test_rotary.check(case, "cpu", CPU, EVERY_ISA)


@pytest.mark.parametrize("case", [test_rotary.CASES[i] for i in (0, 5, 16)], ids=str)
def test_rotary_in_place(case, isa):
    test_rotary.test_in_place(case, "cpu", CPU)


@pytest.mark.parametrize("name", test_gated.FUNCTIONS)
@pytest.mark.parametrize("case", test_gated.CASES, ids=str)
def test_gated_case(case, name):
    test_gated.check(case, name, "cpu", CPU, EVERY_ISA)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("name", test_gated.FUNCTIONS)
def test_gated_non_finite(name, dtype, isa):
    test_gated.test_inf_and_nan_are_where_torch_has_them(name, "cpu", dtype, CPU)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", test_dropout_add.CASES)
def test_dropout_add_case(name, p):
    test_dropout_add.check(*test_dropout_add.CASES[name], p, "cpu", CPU, EVERY_ISA)


@pytest.mark.parametrize("operator", ["norm", "softmax", "cross_entropy", "rotary", "gated", "dropout_add"])
def test_what_is_asked_of_every_backend(operator, isa):
    """In place, non-finite, dropped, ignored, empty: what the operators' own tests ask, of this backend."""
    non_finite = (math.nan, math.inf, -math.inf)
    functional = torch.nn.functional
    if operator == "norm":
        for value in non_finite:
            _one_bad_row(lambda x: fastattn.layer_norm(x, x.shape[-1], backend="cpu"),
                         lambda x: functional.layer_norm(x, x.shape[-1:]), value)  # fmt: skip
            _one_bad_row(lambda x: fastattn.rms_norm(x, x.shape[-1], backend="cpu"),
                         lambda x: functional.rms_norm(x, x.shape[-1:]), value)  # fmt: skip
    elif operator == "softmax":
        for value in non_finite:
            _one_bad_row(lambda x: fastattn.softmax(x, backend="cpu"), lambda x: torch.softmax(x, -1), value)
            _one_bad_row(lambda x: fastattn.log_softmax(x, backend="cpu"), lambda x: torch.log_softmax(x, -1), value)
            _one_bad_row(lambda x: fastattn.softmax(x, 0, backend="cpu"), lambda x: torch.softmax(x, 0), value)
    elif operator == "cross_entropy":
        test_cross_entropy.test_ignored_everywhere_and_empty_are_nan_in_the_mean("cpu", CPU)
        for value in non_finite:
            for target in ([1, 5, 2], [1, 6, 2]):
                t = torch.tensor(target)
                _one_bad_row(lambda x, t=t: fastattn.cross_entropy(x, t, reduction="none", backend="cpu"),
                             lambda x, t=t: functional.cross_entropy(x, t, reduction="none"), value)  # fmt: skip
    elif operator == "rotary":
        _positions_outside_of_the_table()
    elif operator == "gated":
        gate, up = make_inputs((3, 0), (3, 0))
        assert fastattn.swiglu(gate, up, backend="cpu").shape == (3, 0)
    else:
        test_dropout_add.test_what_is_dropped_counts_nothing("cpu", CPU)
        test_dropout_add.test_in_place("cpu", CPU)


def _one_bad_row(ours, theirs, value: float) -> None:
    """One row holds `value`: results and gradients are torch's."""
    for N in (40, 5000):
        x = make_inputs((3, N))[0]
        x[1, 5] = value
        results = []
        for function in (theirs, ours):
            leaf = x.clone().requires_grad_()
            y = function(leaf)
            results.append((y, torch.autograd.grad(y, leaf, torch.ones_like(y))[0]))
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, equal_nan=True)


def _positions_outside_of_the_table() -> None:
    from fastattn.ops.rotary import rotary
    from fastattn.spec import RotarySpec

    (x,) = make_inputs((1, 2, 4, 6))
    cos, sin = torch.ones(5, 2), torch.zeros(5, 2)
    ids = torch.tensor([0, -1, 5, 4])
    outside = torch.tensor([False, True, True, False])
    for interleaved in (False, True):
        spec = RotarySpec(F32, ((1, 2, 4, 6),), (False,), interleaved)
        y, _ = rotary((x, None, cos, sin, ids, None), spec, "cpu")
        assert y[:, :, outside, :4].isnan().all()
        assert torch.equal(y[:, :, ~outside], x[:, :, ~outside])
        assert torch.equal(y[..., 4:], x[..., 4:])


@pytest.mark.parametrize("bad", [50, -1, 1 << 40])
def test_class_that_does_not_exist_is_never_a_loss_of_zero(bad):
    from fastattn.ops.cross_entropy import cross_entropy_with_gradient

    x, t = torch.randn(3, 50), torch.tensor([1, bad, 2])
    spec = CrossEntropySpec(F32, F32, torch.int64, reduction="none", gradient=True)
    dx, losses = cross_entropy_with_gradient((x, t, None), spec, "cpu")
    assert losses.isnan().tolist() == [False, True, False]
    assert dx.isnan().all(1).tolist() == [False, True, False]


def _everything() -> list[Tensor]:
    """Results and gradients of every row operator, large enough for several threads."""
    x, residual, dy = make_inputs((300, 700), (300, 700), (300, 700))
    weight, bias = make_inputs((700,), (700,), seed=1)
    mask = torch.rand(300, 700, generator=torch.Generator().manual_seed(0)) > 0.3
    target = torch.arange(300) % 700
    q = x.view(1, 10, 30, 700)
    angles = torch.rand(30, 100, generator=torch.Generator().manual_seed(0))

    def dropped(function):
        torch.manual_seed(7)
        return function()

    results: list[Tensor] = []
    for function, inputs in (
        (lambda *t: fastattn.layer_norm(t[0], 700, t[1], t[2], backend="cpu"), (x, weight, bias)),
        (lambda *t: fastattn.rms_norm(t[0], 700, t[1], backend="cpu"), (x, weight)),
        (
            lambda *t: dropped(lambda: fastattn.layer_norm(t[0], 700, residual=t[1], dropout_p=0.2, backend="cpu"))[0],
            (x, residual),
        ),
        (lambda t: fastattn.softmax(t, mask=mask, backend="cpu"), (x,)),
        (lambda t: fastattn.log_softmax(t, 0, backend="cpu"), (x,)),
        (lambda t: fastattn.cross_entropy(t, target, backend="cpu"), (x,)),
        (lambda t: fastattn.cross_entropy(t, target, reduction="none", softcap=3.0, backend="cpu"), (x,)),
        (lambda *t: fastattn.swiglu(*t, backend="cpu"), (x, residual)),
        (lambda t: fastattn.rotary_embedding(t, angles.cos(), angles.sin(), backend="cpu"), (q,)),
        (lambda *t: dropped(lambda: fastattn.dropout_add(*t, 0.3, backend="cpu")), (x, residual)),
    ):
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        y = function(*leaves)
        gradient = dy.view(y.shape) if y.numel() == dy.numel() else torch.ones_like(y)
        results += [y, *torch.autograd.grad(y, leaves, gradient)]
    return results


def test_threads_agree(isa, threads):
    """To the bit: blocks of rows depend on sizes alone, and their sums are added in order."""
    results = []
    for n in (1, 2, 4):
        threads(n)
        results.append(_everything())
    for one, *others in zip(*results, strict=True):
        assert all(torch.equal(one, other) for other in others)


def test_one_dropout_mask_in_every_instruction_set():
    """And in every backend: x is dropped where h is the residual."""
    x, residual = make_inputs((40, 301), (40, 301))
    masks = []
    for isa in EVERY_ISA:
        with isa:
            torch.manual_seed(3)
            masks.append(fastattn.rms_norm(x, 301, residual=residual, dropout_p=0.4, backend="cpu")[1] == residual)
            torch.manual_seed(3)
            masks.append(fastattn.dropout_add(x, residual, 0.4, backend="cpu") == residual)
    torch.manual_seed(3)
    expected = fastattn.rms_norm(x, 301, residual=residual, dropout_p=0.4, backend="reference")[1] == residual
    assert all(torch.equal(mask, expected) for mask in masks)


def test_heads_are_not_copied(monkeypatch):
    """q of a fused projection (B, S, 3, H, D), normalised head by head: the kernel reads it where it lies."""
    from fastattn.backends.cpu import rows

    read = []
    ready = rows.ready
    monkeypatch.setattr(rows, "ready", lambda tensors, n: read.append(ready(tensors, n)) or read[-1])
    (projected,) = make_inputs((2, 10, 3, 4, 16))
    for q in (projected[:, :, 0], projected[:, :, 0].transpose(1, 2)):
        fastattn.layer_norm(q, 16, backend="cpu")
    memory = projected.untyped_storage().data_ptr()
    assert [tensors[0].untyped_storage().data_ptr() for tensors, _ in read] == [memory] * 2


@pytest.mark.parametrize("offset", [0.0, 300.0, -1e4])
def test_variance_of_rows_whose_beginning_is_far_from_their_mean(offset):
    """The first pass sums squares about the mean of the row's beginning: an outlier there is found out."""
    (x,) = make_inputs((6, 2000))
    x = x + offset
    x[0, :64] += 1e4
    x[1] += torch.linspace(0, 1e4, 2000)
    x[2, 1500:] += 1e4
    weight, bias = make_inputs((2000,), (2000,), seed=1)
    exact = torch.nn.functional.layer_norm(x.double(), (2000,), weight.double(), bias.double())
    rounded = simulate_rounding(lambda: torch.nn.functional.layer_norm(x, (2000,), weight, bias))
    # The mean is held in fp32: y is off by its rounding over the spread of the row.
    spread = (x.abs().amax(-1) / x.std(-1)).max().item() * weight.abs().max().item()
    assert_close(fastattn.layer_norm(x, 2000, weight, bias, backend="cpu"), exact, rounded, "y", scale=spread)


def test_logits_are_never_held(monkeypatch):
    """Whatever chunk_size asks for: not more than CHUNK_BYTES, or a row."""
    N, E, V = 96, 2, 200
    hidden, weight = make_inputs((N, E), (V, E))
    target = torch.arange(N) % V
    for budget in (1, 5 * V * 4, 1 << 20):
        monkeypatch.setattr(cpu_loss, "CHUNK_BYTES", budget)
        spec = LinearCrossEntropySpec(CrossEntropySpec(F32, F32, torch.int64), 50)
        loss = torch.empty(())
        gradients = torch.empty_like(hidden), torch.empty_like(weight), None
        with test_linear_cross_entropy.Largest() as largest:
            cpu.linear_cross_entropy_forward(loss, None, gradients, hidden, weight, target, None, None, spec)
        assert largest.numel == max(min(budget // 4 // V, 50), 1) * V or largest.numel == weight.numel()
        exact = torch.nn.functional.cross_entropy(hidden.double() @ weight.double().T, target)
        torch.testing.assert_close(loss.double(), exact)


def test_any_norm():
    @seed(0)
    @settings(max_examples=40, database=None, deadline=None)
    @given(st.data())
    def draw(data):
        pick = data.draw
        rms, weight = pick(st.booleans()), pick(st.booleans())
        residual = pick(st.sampled_from([None, F32, BF16, F16]))
        case = test_norm.Norm(
            "drawn",
            (*(pick(st.integers(1, 5)) for _ in range(3)), pick(st.sampled_from([1, 2, 17, 64, 130]))),
            dims=pick(st.integers(1, 2)),
            dtype=pick(st.sampled_from([F16, BF16, F32])),
            parameter_dtype=pick(st.sampled_from([None, F32])),
            weight=weight,
            bias=not rms and pick(st.booleans()),
            eps=pick(st.sampled_from([1e-5, 0.1])),
            layout=pick(st.sampled_from(["contiguous", "heads_inside", "packed", "strided"])),
            residual=residual,
            dropout_p=pick(st.sampled_from([0.0, 0.4])) if residual else 0.0,
            weight_offset=1.0 if rms and weight and pick(st.booleans()) else 0.0,
            rms=rms,
        )
        test_norm.check(case, "cpu", CPU, EVERY_ISA)

    draw()


def test_any_softmax():
    @seed(0)
    @settings(max_examples=60, database=None, deadline=None)
    @given(st.data())
    def draw(data):
        pick = data.draw
        shape = tuple(pick(st.lists(st.sampled_from([1, 2, 3, 17, 33]), min_size=2, max_size=4)))
        causal = pick(st.sampled_from([False, "top_left", "bottom_right"]))
        dim = -1 if causal else pick(st.integers(-len(shape), -1))
        mask = tuple(pick(st.sampled_from([1, n])) for n in shape)
        case = test_softmax.Soft(
            "drawn", shape, dim, pick(st.sampled_from([F32, F16, BF16])),
            pick(st.sampled_from(["contiguous", "strided"])), mask if pick(st.booleans()) else (),
            {"causal": causal, "scale": pick(st.sampled_from([1.0, -0.5]))},
        )  # fmt: skip
        function = pick(st.sampled_from([fastattn.softmax, fastattn.log_softmax]))
        test_softmax.check(case, function, "cpu", CPU, EVERY_ISA)

    draw()


def test_any_cross_entropy():
    @seed(0)
    @settings(max_examples=60, database=None, deadline=None)
    @given(test_cross_entropy.calls())
    def draw(call):
        test_cross_entropy.check(*call, "cpu", CPU, EVERY_ISA)

    draw()


def test_any_gated():
    @seed(0)
    @settings(max_examples=40, database=None, deadline=None)
    @given(
        st.lists(st.integers(0, 19), max_size=4),
        st.sampled_from(["contiguous", "halves", "mixed", "strided"]),
        st.sampled_from([F32, F16, BF16]),
        st.sampled_from(sorted(test_gated.FUNCTIONS)),
    )
    def draw(shape, layout, dtype, name):
        case = test_gated.Case("drawn", tuple(shape), layout if shape else "contiguous", dtype)
        test_gated.check(case, name, "cpu", CPU, EVERY_ISA)

    draw()


def test_operators_say_what_they_cannot_do():
    x = torch.randn(2, 4)
    for call, says in (
        (lambda: fastattn.softmax(x.double(), backend="cpu"), "dtype float64"),
        (lambda: fastattn.layer_norm(x, 4, torch.ones(4).double(), backend="cpu"), "weight of dtype float64"),
        (
            lambda: fastattn.cross_entropy(x, torch.rand(2, 4, requires_grad=True), backend="cpu"),
            "a gradient of target",
        ),
    ):
        with pytest.raises(fastattn.errors.UnsupportedError, match=says):
            call()
