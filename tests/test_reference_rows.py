"""The row oracles by themselves: against torch where it has the function, against closed forms where it has not."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad, gradgradcheck
from torch.func import grad as func_grad
from torch.func import vmap
from torch.testing import assert_close

from fastattn.reference.norm import add_residual
from fastattn.reference.norm import norm as layer_norm
from fastattn.reference.softmax import softmax

INF, NAN = math.inf, math.nan
HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


def assert_rounded_once(actual: torch.Tensor, exact: torch.Tensor) -> None:
    """Half an ulp from the exact result, and a little for the fp32 arithmetic before."""
    half_ulp = torch.finfo(actual.dtype).eps / 2
    assert_close(actual.double(), exact, rtol=half_ulp * 1.01, atol=torch.finfo(actual.dtype).tiny + 1e-6 * half_ulp)


def assert_same_derivatives(ours: torch.Tensor, theirs: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    dy = torch.randn_like(theirs)
    assert_close(grad(ours, inputs, dy), grad(theirs, inputs, dy), rtol=1e-11, atol=1e-12)


# LayerNorm


@dataclass(frozen=True)
class NormCase:
    name: str
    shape: tuple[int, ...]
    n_dims: int = 1
    weight: bool = True
    bias: bool = True
    eps: float = 1e-5

    def inputs(self, dtype: torch.dtype = torch.float64) -> list[torch.Tensor | None]:
        row = self.shape[len(self.shape) - self.n_dims :]
        return [
            randn(*self.shape, dtype=dtype),
            randn(*row, dtype=dtype) if self.weight else None,
            randn(*row, dtype=dtype) if self.bias else None,
        ]

    def run(self, function, x, weight, bias, **kwargs):
        return function(x, self.shape[len(self.shape) - self.n_dims :], weight, bias, self.eps, **kwargs)


NORM_CASES = [
    NormCase("one_dim", (7,)),
    NormCase("rows", (3, 7)),
    NormCase("row_of_one", (3, 1)),
    NormCase("three_dims", (2, 3, 5), n_dims=3),
    NormCase("two_of_four", (2, 2, 3, 4), n_dims=2),
    NormCase("no_weight", (3, 7), weight=False),
    NormCase("no_bias", (3, 7), bias=False),
    NormCase("neither", (3, 7), weight=False, bias=False),
    NormCase("large_eps", (3, 7), eps=1.0),
    NormCase("no_rows", (0, 7)),
]
norm_cases = pytest.mark.parametrize("case", NORM_CASES, ids=lambda case: case.name)


@norm_cases
def test_layer_norm_is_torchs(case: NormCase):
    inputs = case.inputs()
    ours, theirs = case.run(layer_norm, *inputs), case.run(F.layer_norm, *inputs)
    assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    assert_same_derivatives(ours, theirs, [t for t in inputs if t is not None])


@norm_cases
def test_layer_norm_differentiates_twice(case: NormCase):
    inputs = case.inputs()
    some = [t for t in inputs if t is not None]

    def run(*tensors):
        rest = iter(tensors)
        return case.run(layer_norm, *(None if t is None else next(rest) for t in inputs))

    assert gradgradcheck(run, some, fast_mode=True)


@pytest.mark.parametrize("dtype", HALVES)
@norm_cases
def test_layer_norm_of_halves_is_rounded_once(case: NormCase, dtype: torch.dtype):
    inputs = case.inputs(dtype)
    exact = case.run(layer_norm, *(None if t is None else t.double() for t in inputs))
    actual = case.run(layer_norm, *inputs)
    assert actual.dtype == dtype
    assert_rounded_once(actual, exact)


def test_layer_norm_takes_weights_of_another_dtype():
    x, weight, bias = randn(4, 9, dtype=torch.bfloat16), randn(9, dtype=torch.float32), randn(9, dtype=torch.float16)
    y = layer_norm(x, (9,), weight, bias)
    assert_rounded_once(y, layer_norm(x.double(), (9,), weight.double(), bias.double()))
    grads = grad(y.float().sum(), [x, weight, bias])
    assert [g.dtype for g in grads] == [x.dtype, weight.dtype, bias.dtype]


def test_layer_norm_computes_in_the_dtype_asked_for():
    x = randn(5, 64, dtype=torch.float32)
    exact = layer_norm(x.double(), (64,))
    assert torch.equal(layer_norm(x, (64,), compute_dtype=torch.float64), exact.float())
    half = x.bfloat16()
    exact = layer_norm(half.double(), (64,))
    error = (layer_norm(half, (64,), compute_dtype=torch.bfloat16).double() - exact).abs().max()
    assert error > 2 * (layer_norm(half, (64,)).double() - exact).abs().max()


@pytest.mark.parametrize(
    ("row", "eps", "expected"),
    [
        ([1.0, 3.0], 0.0, [-1.0, 1.0]),
        ([1.0, 3.0], 3.0, [-0.5, 0.5]),
        ([2.0, 2.0, 2.0], 1e-5, [0.0, 0.0, 0.0]),
        ([-3.0, 0.0, 0.0, 3.0], 0.0, [-math.sqrt(2), 0.0, 0.0, math.sqrt(2)]),
        ([0.0, NAN, 1.0], 1e-5, [NAN, NAN, NAN]),
    ],
)
def test_layer_norm_closed_forms(row, eps, expected):
    x = torch.tensor([row, [0.0] * len(row)], dtype=torch.float64)
    y = layer_norm(x, (len(row),), eps=eps or 1e-300)
    assert_close(y, torch.tensor([expected, [0.0] * len(row)], dtype=torch.float64), equal_nan=True)


def test_layer_norm_does_not_cancel():
    x = 1e4 + torch.randn(3, 1000)
    assert_close(layer_norm(x, (1000,)).double(), layer_norm(x.double(), (1000,)), rtol=1e-3, atol=1e-3)


# Softmax


@dataclass(frozen=True)
class SoftmaxCase:
    name: str
    shape: tuple[int, ...]
    dim: int = -1
    scale: float = 1.0
    mask: tuple[int, ...] | None = None  # a shape that broadcasts to `shape`
    causal: bool = False
    top_left: bool = False

    def make_mask(self) -> torch.Tensor | None:
        if self.mask is None:
            return None
        mask = torch.rand(self.mask, generator=torch.Generator().manual_seed(1)) < 0.6
        return mask.index_fill(0, torch.tensor(0), False) if self.mask[0] > 1 else mask  # some rows see nothing

    def keep(self) -> torch.Tensor:
        """Which entries are visible, entry by entry."""
        keep = torch.ones(self.shape, dtype=torch.bool)
        if self.causal:
            S_q, S_k = self.shape[-2:]
            diagonal = 0 if self.top_left else S_k - S_q
            keep = keep & torch.tensor([[j <= i + diagonal for j in range(S_k)] for i in range(S_q)])
        return keep if self.mask is None else keep & self.make_mask()

    def run(self, x: torch.Tensor, log: bool, **kwargs) -> torch.Tensor:
        kwargs |= {"scale": self.scale, "causal": self.causal, "top_left": self.top_left, "log": log}
        return softmax(x, self.dim, mask=self.make_mask(), **kwargs)

    def expected(self, x: torch.Tensor, log: bool) -> torch.Tensor:
        """Row by row with torch's function, over the visible entries alone."""
        function, hidden = (torch.log_softmax, -INF) if log else (torch.softmax, 0.0)
        lines, keep = (self.scale * x).movedim(self.dim, -1), self.keep().movedim(self.dim, -1)
        rows = [
            torch.full_like(row, hidden).masked_scatter(visible, function(row[visible], -1))
            for row, visible in zip(lines.reshape(-1, lines.shape[-1]), keep.reshape(-1, lines.shape[-1]), strict=True)
        ]
        return torch.stack(rows).reshape(lines.shape).movedim(-1, self.dim)


PLAIN_CASES = [
    SoftmaxCase("last_dim", (3, 7)),
    SoftmaxCase("first_dim", (4, 3), dim=0),
    SoftmaxCase("middle_dim", (2, 5, 3), dim=1),
    SoftmaxCase("one_dim", (6,)),
    SoftmaxCase("row_of_one", (3, 1)),
    SoftmaxCase("scaled", (3, 7), scale=0.25),
    SoftmaxCase("scaled_negatively", (3, 7), scale=-2.0),
    SoftmaxCase("scale_zero", (3, 7), scale=0.0),
]
MASKED_CASES = [
    SoftmaxCase("mask", (3, 7), mask=(3, 7)),
    SoftmaxCase("mask_of_keys", (2, 2, 3, 5), mask=(2, 1, 1, 5), scale=0.5),
    SoftmaxCase("mask_of_rows", (2, 3, 5), mask=(3, 1)),
    SoftmaxCase("mask_scaled_negatively", (4, 5), mask=(4, 5), scale=-1.5),
    SoftmaxCase("mask_first_dim", (5, 4), dim=0, mask=(5, 4)),
    SoftmaxCase("mask_middle_dim", (3, 5, 2), dim=-2, mask=(3, 5, 1)),
    SoftmaxCase("causal", (2, 4, 4), causal=True),
    SoftmaxCase("causal_wide", (2, 3, 5), causal=True),
    SoftmaxCase("causal_tall", (2, 5, 3), causal=True),  # rows 0 and 1 see nothing
    SoftmaxCase("causal_wide_top_left", (3, 5), causal=True, top_left=True),
    SoftmaxCase("causal_tall_top_left", (5, 3), causal=True, top_left=True),
    SoftmaxCase("causal_and_mask", (2, 4, 4), causal=True, mask=(2, 1, 4), scale=2.0),
]
both = pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
masked_cases = pytest.mark.parametrize("case", MASKED_CASES, ids=lambda case: case.name)
all_cases = pytest.mark.parametrize("case", PLAIN_CASES + MASKED_CASES, ids=lambda case: case.name)


@both
@all_cases
def test_softmax_is_torchs_over_what_is_visible(case: SoftmaxCase, log: bool):
    x = randn(*case.shape)
    ours, theirs = case.run(x, log), case.expected(x, log)
    assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    dy = torch.randn(case.shape, dtype=torch.float64)
    # A NaN that flows back into a hidden entry ends there.
    hidden_nan = torch.where(case.keep(), dy, NAN)
    assert_close(grad(ours, x, hidden_nan), grad(theirs, x, dy), rtol=1e-12, atol=1e-13)


@both
@all_cases
def test_softmax_differentiates_twice(case: SoftmaxCase, log: bool):
    keep = case.keep()

    def run(x):  # finite differences cannot be taken of -inf
        return torch.where(keep, case.run(x, log), 0.0)

    assert gradgradcheck(run, randn(*case.shape), fast_mode=True)


@both
@masked_cases
def test_softmax_hides_what_is_masked(case: SoftmaxCase, log: bool):
    keep, clean = case.keep(), randn(*case.shape)
    dy = torch.where(keep, torch.randn(case.shape, dtype=torch.float64), 0.0)
    results = []
    for junk in (0.0, NAN, INF, -INF):
        x = torch.where(keep, clean, junk).detach().requires_grad_()
        y = case.run(x, log)
        (dx,) = grad(y, x, dy, create_graph=True)
        (ddx,) = grad(dx.square().sum(), x)
        results.append((y, dx, ddx))
    for result in results[1:]:
        assert_close(result, results[0], rtol=0, atol=0)
    for derivative in results[0][1:]:
        assert derivative.isfinite().all()
        assert (derivative[~keep] == 0).all()
    assert (results[0][0][~keep] == (-INF if log else 0.0)).all()


@both
@pytest.mark.parametrize("dtype", HALVES)
@all_cases
def test_softmax_of_halves_is_rounded_once(case: SoftmaxCase, dtype: torch.dtype, log: bool):
    x = randn(*case.shape, dtype=dtype)
    y = case.run(x, log)
    assert y.dtype == dtype
    assert_rounded_once(y, case.run(x.double(), log))


def test_softmax_computes_in_the_dtype_asked_for():
    x = randn(5, 64, dtype=torch.float32)
    exact = softmax(x.double())
    assert torch.equal(softmax(x, compute_dtype=torch.float64), exact.float())
    half = (100 * x).bfloat16()
    exact = softmax(half.double(), scale=0.1)
    error = (softmax(half, scale=0.1, compute_dtype=torch.bfloat16).double() - exact).abs().max()
    assert error > 2 * (softmax(half, scale=0.1).double() - exact).abs().max()


LN_2 = math.log(2)


@pytest.mark.parametrize(
    ("row", "mask", "options", "expected"),
    [
        ([0.0, 0.0, 9.0], "110", {}, [0.5, 0.5, 0.0]),
        ([0.0, LN_2, NAN], "110", {}, [1 / 3, 2 / 3, 0.0]),
        ([0.0, LN_2, NAN], "110", {"scale": 2.0}, [0.2, 0.8, 0.0]),
        ([0.0, LN_2, NAN], "110", {"scale": -1.0}, [2 / 3, 1 / 3, 0.0]),
        ([0.0, LN_2, NAN], "110", {"log": True}, [-math.log(3), LN_2 - math.log(3), -INF]),
        ([NAN, -INF, INF], "000", {}, [0.0, 0.0, 0.0]),
        ([NAN, -INF, INF], "000", {"log": True}, [-INF, -INF, -INF]),
        ([1e30, 1e30, -1e30], "101", {}, [1.0, 0.0, 0.0]),
        # What is visible obeys torch's rules.
        ([0.0, -INF, 1.0], "110", {}, [1.0, 0.0, 0.0]),
        ([0.0, NAN, 1.0], "110", {}, [NAN, NAN, 0.0]),
        ([0.0, INF, 1.0], "110", {}, [NAN, NAN, 0.0]),
        ([-INF, -INF, 1.0], "110", {}, [NAN, NAN, 0.0]),
        ([-INF, -INF, 1.0], "110", {"log": True}, [NAN, NAN, -INF]),
        ([-INF, -INF, -INF], "111", {}, [NAN, NAN, NAN]),
    ],
)
def test_softmax_closed_forms(row, mask, options, expected):
    mask = torch.tensor([bit == "1" for bit in mask])
    y = softmax(torch.tensor(row, dtype=torch.float64), mask=mask, **options)
    assert_close(y, torch.tensor(expected, dtype=torch.float64), equal_nan=True)


@pytest.mark.parametrize(
    ("S_q", "S_k", "top_left", "visible"),
    [
        (3, 3, False, [1, 2, 3]),
        (3, 3, True, [1, 2, 3]),
        (2, 4, False, [3, 4]),
        (2, 4, True, [1, 2]),
        (4, 2, False, [0, 0, 1, 2]),
        (4, 2, True, [1, 2, 2, 2]),
        (1, 5, False, [5]),
        (1, 5, True, [1]),
        (5, 1, False, [0, 0, 0, 0, 1]),
    ],
)
def test_softmax_causal_alignment(S_q, S_k, top_left, visible):
    y = softmax(torch.zeros(S_q, S_k, dtype=torch.float64), causal=True, top_left=top_left)
    expected = torch.zeros(S_q, S_k, dtype=torch.float64)
    for i, n in enumerate(visible):
        expected[i, :n] = 1.0 / max(n, 1)
    assert_close(y, expected)


@both
@pytest.mark.parametrize(("shape", "causal"), [((), False), ((0, 5), False), ((5, 0), False), ((2, 5, 0), True)])
def test_softmax_of_scalars_and_of_nothing(shape: tuple[int, ...], causal: bool, log: bool):
    x = randn(*shape)
    y = softmax(x, causal=causal, log=log)
    assert_close(y, (torch.log_softmax if log else torch.softmax)(x, -1))
    assert grad(y.sum(), x)[0].shape == shape


@both
def test_softmax_maps_and_compiles(log: bool):
    x, mask = randn(4, 3, 5), torch.rand(4, 1, 5) < 0.6

    def loss(x, mask):
        y = softmax(x, mask=mask, causal=True, top_left=True, scale=0.5, log=log)
        return torch.where(y.isfinite(), y, 0.0).square().sum()

    expected = torch.stack([func_grad(loss)(*pair) for pair in zip(x, mask, strict=True)])
    assert_close(vmap(func_grad(loss))(x, mask), expected)
    assert_close(torch.compile(loss, fullgraph=True, backend="eager")(x, mask), loss(x, mask))


def test_layer_norm_maps_and_compiles():
    x, weight = randn(4, 3, 5), randn(4, 5)

    def loss(x, weight):
        return layer_norm(x, (5,), weight).pow(3).sum()

    expected = torch.stack([func_grad(loss)(*pair) for pair in zip(x, weight, strict=True)])
    assert_close(vmap(func_grad(loss))(x, weight), expected)
    assert_close(torch.compile(loss, fullgraph=True, backend="eager")(x, weight[0]), loss(x, weight[0]))


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_is_torchs(offset):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, generator=generator, dtype=torch.float64) for n in ((5, 3, 8), (3, 8)))
    y = layer_norm(x, (3, 8), weight, eps=1e-3, rms=True, weight_offset=offset)
    assert_close(y, F.rms_norm(x, (3, 8), weight + offset, 1e-3))


def test_residual_is_added_in_its_own_dtype_and_rounded_once():
    x, residual = torch.randn(4, 8).bfloat16(), torch.randn(4, 8)
    assert add_residual(x, None, None, 0.0, 1) is x
    h = add_residual(x, residual, None, 0.0, 1)
    assert torch.equal(h, x.float() + residual)
    h = add_residual(x, residual.bfloat16(), None, 0.0, 1)
    assert torch.equal(h, (x.double() + residual.bfloat16().double()).float().bfloat16())
    dropped = add_residual(x, residual, torch.tensor(3), 0.5, 1) == residual
    kept = add_residual(x, residual, torch.tensor(3), 0.5, 1)[~dropped]
    assert 0 < dropped.sum() < 32
    assert torch.equal(kept, (2.0 * x.float() + residual)[~dropped])
