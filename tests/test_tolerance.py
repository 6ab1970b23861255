"""The tolerance of every other test: it depends on no machine, passes honest arithmetic and catches small faults."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastattn.testing import assert_close, make_inputs, max_error, rms_error, simulate_rounding

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
LOG2_E = math.log2(math.e)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v


def layer_norm(x: Tensor, weight: Tensor) -> Tensor:
    return torch.layer_norm(x, x.shape[-1:], weight)


def softmax(x: Tensor) -> Tensor:
    return torch.softmax(x, -1)


SHAPES: dict[Callable[..., Tensor], tuple[tuple[int, ...], ...]] = {
    attention: ((2, 3, 40, 32), (2, 3, 100, 32), (2, 3, 100, 32)),
    layer_norm: ((20, 300), (300,)),
    softmax: ((8, 500),),
}


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q.float() @ k.float().mT * q.shape[-1] ** -0.5


def fused(q: Tensor, k: Tensor, v: Tensor, p_dtype: torch.dtype | None = None, keys: slice = slice(None)) -> Tensor:
    """Attention as a kernel computes it: blocks of keys, powers of 2, float32 sums, P in the dtype of v."""
    s = scores(q, k[:, :, keys])
    highest, total, o = s.new_full(s.shape[:-1], -math.inf), s.new_zeros(s.shape[:-1]), s.new_zeros(())
    for block, values in zip(s.split(16, -1), v[:, :, keys].split(16, -2), strict=True):
        higher = torch.maximum(highest, block.amax(-1))
        p = torch.exp2(block * LOG2_E - higher[..., None] * LOG2_E)
        shrink = torch.exp2((highest - higher) * LOG2_E)
        p, total, highest = p.to(p_dtype or v.dtype), total * shrink + p.sum(-1), higher
        o = o * shrink[..., None] + p.float() @ values.float()
    return (o / total[..., None]).to(q.dtype)


def normalised(x: Tensor, weight: Tensor, unbiased: bool = False, mean_dtype: torch.dtype = F32) -> Tensor:
    """LayerNorm with sums over chunks, in float32."""
    wide = x.float()
    mean = torch.stack([c.sum(-1) for c in wide.split(7, -1)]).sum(0)[:, None] / x.shape[-1]
    centred = wide - mean.to(mean_dtype).float()
    variance = centred.square().sum(-1, keepdim=True) / (x.shape[-1] - unbiased)
    return (centred * torch.rsqrt(variance + 1e-5) * weight.float()).to(x.dtype)


def by_powers_of_2(x: Tensor, denominator: Callable[[Tensor], Tensor] = lambda p: p.flip(-1).sum(-1, keepdim=True)):
    p = torch.exp2((x.float() - x.float().amax(-1, keepdim=True)) * LOG2_E)
    return (p / denominator(p)).to(x.dtype)


HONEST = [(attention, fused), (layer_norm, normalised), (softmax, by_powers_of_2)]


def with_one_wrong(function: Callable[..., Tensor], roundings: float) -> Callable[..., Tensor]:
    """The function with the largest of its results off by so many roundings."""

    def call(*inputs: Tensor) -> Tensor:
        y = function(*inputs).clone()
        flat = y.view(-1)
        flat[flat.abs().argmax()] *= 1 + roundings * torch.finfo(y.dtype).eps
        return y

    return call


FAULTS = {
    "attention without the last key": (attention, lambda q, k, v: fused(q, k, v, keys=slice(0, 99)), None),
    "attention with P in bfloat16": (attention, lambda q, k, v: fused(q, k, v, p_dtype=BF16), (F32,)),
    "attention with scores in float16": (
        attention,
        lambda q, k, v: (torch.softmax(scores(q, k).half().float(), -1) @ v.float()).to(q.dtype),
        (F32,),
    ),
    "one wrong entry of attention": (attention, with_one_wrong(fused, 24), None),
    "layer_norm with the unbiased variance": (layer_norm, lambda x, w: normalised(x, w, unbiased=True), (F32, F16)),
    "layer_norm with the mean in bfloat16": (layer_norm, lambda x, w: normalised(x, w, mean_dtype=BF16), (F32,)),
    "one wrong entry of layer_norm": (layer_norm, with_one_wrong(normalised, 12), None),
    "softmax without its last term": (
        softmax, lambda x: by_powers_of_2(x, lambda p: p[..., :-1].sum(-1, keepdim=True)), (F32, F16),
    ),
    "softmax whose sum is in bfloat16": (
        softmax, lambda x: by_powers_of_2(x, lambda p: p.bfloat16().sum(-1, keepdim=True).float()), (F32, F16),
    ),
    "one wrong entry of softmax": (softmax, with_one_wrong(by_powers_of_2, 12), None),
}  # fmt: skip


def error_of(formula: Callable[..., Tensor], candidate: Callable[..., Tensor], dtype: torch.dtype, seed: int) -> float:
    inputs = make_inputs(*SHAPES[formula], dtype=dtype, seed=seed)
    exact = formula(*(t.double() for t in inputs))
    return assert_close(candidate(*inputs), exact, simulate_rounding(lambda: formula(*inputs)))


@DTYPES
@pytest.mark.parametrize(("formula", "candidate"), HONEST, ids=lambda f: f.__name__)
def test_honest_arithmetic_passes(formula, candidate, dtype):
    """Sums in another order and powers of 2, on eight draws; no result is beyond 1.5 times the simulated error."""
    assert max(error_of(formula, candidate, dtype, seed) for seed in range(8)) <= 1.5


@pytest.mark.parametrize(
    ("fault", "dtype"),
    [(name, dtype) for name, (_, _, dtypes) in FAULTS.items() for dtype in dtypes or (F32, BF16, F16)],
    ids=str,
)
def test_small_faults_are_caught(fault, dtype):
    """On each of three draws."""
    formula, candidate, _ = FAULTS[fault]
    for seed in range(3):
        with pytest.raises(AssertionError, match="from float64"):
            error_of(formula, candidate, dtype, seed)


@pytest.mark.parametrize("formula", list(SHAPES), ids=lambda f: f.__name__)
def test_an_error_everywhere_is_caught_by_the_root_mean_square(formula):
    """An error of 2 roundings of each number is within the largest that is allowed, and is refused all the same."""
    inputs = make_inputs(*SHAPES[formula])
    exact = formula(*(t.double() for t in inputs))
    rounded = simulate_rounding(lambda: formula(*inputs))
    typical = exact.square().mean().sqrt()
    error = 2 * max(rms_error(draw, exact) for draw in rounded) + 0.8 * torch.finfo(F32).eps * typical
    with pytest.raises(AssertionError, match="the root mean square of result"):
        assert_close((exact + error).float(), exact, rounded)


# (largest error, root mean square) of the first draw, in units of 1e-9 for float32 and 1e-6 for bfloat16.
STORED = {
    (attention, F32): (619.191, 68.0895),
    (attention, BF16): (10251.19, 1201.110),
    (layer_norm, F32): (893.974, 75.1157),
    (layer_norm, BF16): (15231.99, 1696.711),
    (softmax, F32): (2.79795, 0.305676),
    (softmax, BF16): (59.6571, 5.39727),
}


@pytest.mark.parametrize(("formula", "dtype"), STORED, ids=lambda x: getattr(x, "__name__", str(x)))
def test_simulated_errors_are_those_of_every_machine(formula, dtype, threads, monkeypatch):
    monkeypatch.delenv("FASTATTN_TEST_SEED", raising=False)
    inputs = make_inputs(*SHAPES[formula], dtype=dtype)
    exact = formula(*(t.double() for t in inputs))
    unit = 1e-9 if dtype == F32 else 1e-6
    for n in (1, 2):
        threads(n)
        rounded = simulate_rounding(lambda: formula(*inputs), draws=1)[0]
        found = max_error(rounded, exact) / unit, rms_error(rounded, exact) / unit
        assert found == pytest.approx(STORED[formula, dtype], rel=1e-3)


@DTYPES
def test_simulated_errors_are_about_those_of_torch(dtype):
    """Over many numbers, the root mean square: neither a tenth of torch's, nor ten times it."""
    inputs = make_inputs((4, 4, 128, 64), (4, 4, 128, 64), (4, 4, 128, 64), dtype=dtype)
    exact = attention(*(t.double() for t in inputs))
    torch_error = rms_error(attention(*inputs), exact)
    for draw in simulate_rounding(lambda: attention(*inputs)):
        assert 0.4 <= rms_error(draw, exact) / torch_error <= 2.5


def test_what_rounds_nothing_stays_exact():
    """Views, copies, comparisons, differences of whole numbers and writes in place."""
    x = torch.arange(12.0).view(3, 4)

    def function() -> Tensor:
        y = x.clone().mT.contiguous()
        y[0] = 5.0
        return (torch.where(y > 3, y, -y) - 1.0) * 2.0

    assert torch.equal(simulate_rounding(function)[1], function())


def test_backward_passes_are_rounded_too():
    x, dy = make_inputs((20, 50), (20, 50))

    def gradient() -> Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(torch.softmax(leaf, -1), leaf, dy)[0]

    first, second = simulate_rounding(gradient)
    assert not torch.equal(first, second)
    torch.testing.assert_close(first, second)
