"""The route that a call takes is as accurate as the kernels: routes are chosen by speed among those of one accuracy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import backends
from fastattn.backends.cpu import module
from fastattn.testing import make_inputs

F16, BF16 = torch.float16, torch.bfloat16
DRAWS = 4
pytestmark = pytest.mark.skipif(module.why_not() is not None, reason="the native module is not built")


@pytest.fixture(autouse=True)
def _nothing_before_the_kernels(monkeypatch):
    """As on a machine where no interpreter stands before them."""
    monkeypatch.setattr(backends, "ORDER", ("cpu", "eager", "reference"))


WORSE = 1.25  # times the error of the kernel


# name -> (function of the tensors, shapes of what it is differentiated in)
CALLS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    **{
        f"layer_norm_{M}x{N}": (
            lambda x, w, b, **on: fastattn.layer_norm(x, x.shape[-1:], w, b, **on),
            ((M, N), (N,), (N,)),
        )
        for M, N in ((64, 128), (1024, 64), (4096, 16), (1536, 32), (2048, 128))
    },
    "rms_norm": (lambda x, w, **on: fastattn.rms_norm(x, x.shape[-1:], w, **on), ((1024, 64), (64,))),
}


def errors(name: str, dtype: torch.dtype, backend: str | None, compiled: bool = False) -> list[tuple[float, float]]:
    """Return the largest error and the root mean square of the output and of each gradient, over several draws."""
    function, shapes = CALLS[name]
    run = torch.compile(function, dynamic=False) if compiled else function
    squares: list[list[Tensor]] = [[] for _ in range(len(shapes) + 1)]
    for seed in range(DRAWS):
        tensors = make_inputs(*shapes, dtype=dtype, seed=seed)
        results = []
        for call, leaves, on in (
            (function, [t.double() for t in tensors], {"backend": "reference"}),
            (run, [t.clone() for t in tensors], {} if backend is None else {"backend": backend}),
        ):
            y = call(*(t.requires_grad_() for t in leaves), **on)
            (dy,) = make_inputs(y.shape, dtype=dtype, seed=100 + seed)
            results.append((y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))))
        for kept, exact, found in zip(squares, *results, strict=True):
            kept.append((found.double() - exact).square().flatten().detach())
    pooled = [torch.cat(kept) for kept in squares]
    return [(each.max().sqrt().item(), each.mean().sqrt().item()) for each in pooled]


def hold(name: str, dtype: torch.dtype, backend: str | None, compiled: bool = False) -> None:
    """Hold a route to the kernel's errors."""
    pairs = zip(errors(name, dtype, backend, compiled), errors(name, dtype, "cpu"), strict=True)
    for i, (found, kernel) in enumerate(pairs):
        assert found[0] <= WORSE * kernel[0], (i, "largest")
        assert found[1] <= WORSE * kernel[1], (i, "rms")


@pytest.mark.parametrize("route", [None, "eager"], ids=["default", "eager"])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_gradients_of_norms_are_summed_in_float32(name, dtype, route):
    """torch adds dweight and dbias of layer_norm up in the dtype of x: 4096 rows of 16 were 27 times as far off."""
    hold(name, dtype, route)


def test_compiled_gradients_of_norms_are_summed_in_float32():
    hold("layer_norm_4096x16", BF16, None, compiled=True)
