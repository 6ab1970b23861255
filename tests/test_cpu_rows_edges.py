"""Row kernels of the CPU backend at the edges: very long rows, many sequences, numbers that float32 hardly holds."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import fastattn
from fastattn.backends.cpu import module
from fastattn.testing import make_inputs

pytestmark = pytest.mark.skipif(module.why_not() is not None, reason="the native module is not built")
ISAS = () if module.why_not() else tuple(module.load().available_isas())
EVERY_ISA = pytest.mark.parametrize("isa", ISAS, indirect=True)
EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def isa(request):
    module.load().set_isa(request.param)
    yield request.param
    module.load().set_isa("")


def gradients(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dy: Tensor) -> tuple[Tensor, ...]:
    """The result and the gradient of each input."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = function(*leaves)
    return (y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype)))


def seconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


@EVERY_ISA
def test_time_of_rotary_is_linear_in_the_number_of_sequences(isa):
    """Ranges of one token, of which two elements are read: what a position costs is all there is. Walking to each from
    the first sequence costs 20,000 steps on average, a hundred times as much."""
    n, D = 20_000, 16_384
    x, cos, sin = torch.ones(2), torch.ones(2), torch.zeros(2)
    positions = torch.arange(2).repeat(n)
    cu_seqlens = torch.arange(0, 2 * n + 1, 2, dtype=torch.int32)
    heads = ((x.data_ptr(), x.data_ptr(), 1, 0, 0, 0, 0, 0, 0),)
    by_positions, by_sequences = (
        seconds(
            lambda at=at: module.load().rotary(
                heads, 0, (1, 2 * n, D, 1), (cos.data_ptr(), sin.data_ptr(), 2, 0), at, False, False, 1
            )
        )
        for at in ((positions.data_ptr(), 2 * n, 0, 0), (0, 0, cu_seqlens.data_ptr(), n))
    )
    assert by_sequences < 10 * by_positions


@EVERY_ISA
@pytest.mark.parametrize("per_token", [4, 40])
def test_rotary_of_many_sequences(isa, per_token):
    """Ranges begin inside of sequences, and beside empty ones; the last tokens are in none."""
    lengths = torch.tensor([0, 1, 3, 700, 0, 2, 1200, 0, 0, 5, 1, 90], dtype=torch.int32)
    cu_seqlens = functional.pad(lengths.cumsum(0), (1, 0)).int()
    T = int(cu_seqlens[-1]) + 50
    x, angles = make_inputs((T, per_token, 32), (1200, 16))
    positions = torch.cat([torch.arange(int(n)) for n in lengths])
    y = fastattn.rotary_embedding(x, angles.cos(), angles.sin(), cu_seqlens=cu_seqlens, backend="cpu")
    expected = fastattn.rotary_embedding(
        x[:-50], angles.cos(), angles.sin(), position_ids=positions, backend="reference"
    )
    torch.testing.assert_close(y[:-50], expected)
    assert torch.equal(y[-50:], x[-50:])


LONG = 1 << 21


@functools.cache
def _long_inputs() -> tuple[Tensor, ...]:
    """x, weight and dy; x · weight has no rounding, which would be one of e^x in what is held to it."""
    x, dy = make_inputs((2, LONG), (2, LONG))
    weight = torch.rand(LONG, generator=torch.Generator().manual_seed(0)) + 0.5
    return (x * 1024).round() / 1024 + 3.0, (weight * 16).round() / 16, dy + 0.3


# Of rows as long as that: our function of x and weight, which takes the backend, and torch's
LONG_ROWS = {
    "layer_norm": (
        lambda x, w, **on: fastattn.layer_norm(x, LONG, w, **on),
        lambda x, w: functional.layer_norm(x, (LONG,), w),
    ),
    "rms_norm": (
        lambda x, w, **on: fastattn.rms_norm(x, LONG, w, **on),
        lambda x, w: functional.rms_norm(x, (LONG,), w),
    ),
    "softmax": (
        lambda x, w, **on: fastattn.softmax(x * w, **on) * LONG,
        lambda x, w: torch.softmax(x * w, -1) * LONG,
    ),
    "log_softmax of columns": (
        lambda x, w, **on: fastattn.log_softmax((x * w).T, 0, **on).T,
        lambda x, w: torch.log_softmax(x * w, -1),
    ),
    "cross_entropy": (
        lambda x, w, **on: fastattn.cross_entropy(x * w, _classes(), label_smoothing=0.1, reduction="none", **on),
        lambda x, w: functional.cross_entropy(x * w, _classes(), label_smoothing=0.1, reduction="none"),
    ),
}


def _classes() -> Tensor:
    return torch.tensor([5, LONG - 1])


@functools.cache
def _exact(name: str) -> tuple[Tensor, ...]:
    x, weight, dy = _long_inputs()
    theirs = LONG_ROWS[name][1]
    return gradients(theirs, (x.double(), weight.double()), dy[:, 0] if name == "cross_entropy" else dy)


@EVERY_ISA
@pytest.mark.parametrize("name", LONG_ROWS)
def test_errors_of_long_rows(name, isa):
    """A few units in the last place of the largest entry: they do not grow with the row.

    The gradient of log_softmax takes p = e^y of the y that float32 holds, of size 8 to 16: half an ulp of that is
    2^-21, or 4 EPS, of p.
    """
    bound = 5 * EPS if name == "log_softmax of columns" else 3 * EPS
    x, weight, dy = _long_inputs()
    ours = functools.partial(LONG_ROWS[name][0], backend="cpu")
    actual = gradients(ours, (x, weight), dy[:, 0] if name == "cross_entropy" else dy)
    for a, e in zip(actual, _exact(name), strict=True):
        assert (a - e).abs().max() <= bound * e.abs().max()


@EVERY_ISA
def test_squares_that_overflow(isa):
    """The variance is inf, whatever the first pass centred on, and x̂ is 0, as torch's."""
    torch.manual_seed(0)
    scattered = torch.randn(64, 100) * 1e19
    step = torch.full((1, 4000), -9e18)
    step[:, :64] = 9e18
    for x in (scattered, step, -step):
        N = x.shape[-1]
        assert torch.equal(fastattn.layer_norm(x, N, backend="cpu"), functional.layer_norm(x, (N,)))
    assert fastattn.rms_norm(scattered, 100, backend="cpu").eq(0.0).all()


@EVERY_ISA
def test_gradient_of_a_softcap(isa):
    """Where tanh is close to 1 the slope 1 - tanh² is small beside the rounding of what it is taken from."""
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0)) * 30
    target = torch.arange(256) % 64

    def dx(dtype: torch.dtype, backend: str) -> Tensor:
        def loss(x: Tensor) -> Tensor:
            return fastattn.cross_entropy(x, target, softcap=5.0, reduction="sum", backend=backend)

        return gradients(loss, (x.to(dtype),), torch.ones(()))[1]

    exact = dx(torch.float64, "reference")
    assert (dx(torch.float32, "cpu") - exact).norm() <= 1.5 * (dx(torch.float32, "eager") - exact).norm()


X, TARGET = torch.tensor([[1.0, 0.0, -2.0], [0.5, 3.0, 1.0]]), torch.tensor([0, 2])
BEYOND_FLOAT32 = {
    "softcap of 1e-40": lambda **on: fastattn.cross_entropy(X, TARGET, softcap=1e-40, **on),
    "softcap of 1e-60": lambda **on: fastattn.cross_entropy(X, TARGET, softcap=1e-60, **on),
    "softcap of 1e+300": lambda **on: fastattn.cross_entropy(X, TARGET, softcap=1e300, **on),
    "z_loss of 1e+300": lambda **on: fastattn.cross_entropy(X, TARGET, z_loss=1e300, **on),
    "z_loss of 1e-60": lambda **on: fastattn.linear_cross_entropy(X, X, TARGET % 2, z_loss=1e-60, **on),
    "label_smoothing of 1e-60": lambda **on: fastattn.cross_entropy(X, TARGET, label_smoothing=1e-60, **on),
    "eps of 1e-60": lambda **on: fastattn.layer_norm(X, 3, eps=1e-60, **on),
    "weight_offset of 1e+40": lambda **on: fastattn.rms_norm(X, 3, torch.ones(3), weight_offset=1e40, **on),
    "scale of -1e+40": lambda **on: fastattn.softmax(X, scale=-1e40, **on),
}


@pytest.mark.parametrize("says", BEYOND_FLOAT32)
def test_numbers_that_float32_does_not_hold_are_refused(says):
    """And served by torch's operations where no backend is asked for."""
    call = BEYOND_FLOAT32[says]
    with pytest.raises(fastattn.errors.UnsupportedError, match=says.replace("e+", "e[+]")):
        call(backend="cpu")
    torch.testing.assert_close(call(), call(backend="eager"), equal_nan=True)


def test_an_instruction_set_is_refused_by_whoever_was_asked_for_it(monkeypatch):
    cpu = module.load()
    with pytest.raises(ValueError, match=r"^set_isa: `name` is 'sse9'; it must be one of baseline"):
        cpu.set_isa("sse9")
    monkeypatch.setenv("FASTATTN_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match=r"^FASTATTN_CPU_ISA is 'sse9'; it must be one of baseline"):
        cpu.set_isa("")
