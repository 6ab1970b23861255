"""LayerNorm, softmax and log_softmax of every backend against float64, values and gradients, in each named case."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.testing import assert_close, make_inputs

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
BACKENDS = pytest.mark.parametrize("backend", ["triton", "eager"])


@dataclass(frozen=True)
class Norm:
    name: str
    shape: tuple[int, ...]
    dims: int = 1  # how many of the last dimensions are normalised
    dtype: torch.dtype = F32
    parameter_dtype: torch.dtype | None = None  # None: x's
    weight: bool = True
    bias: bool = True
    eps: float = 1e-5
    offset: float = 0.0  # added to x: a mean far from 0 is where a one-pass variance fails
    transposed: bool = False

    def __str__(self) -> str:
        return self.name


NORMS = [
    *(Norm(f"N{N}", (3, N)) for N in (1, 2, 7, 64, 100, 1024, 1025)),
    *(Norm(f"N{N}_looped", (2, N)) for N in (20_000, 65_536, 70_001)),
    Norm("one_row", (1, 48)),
    Norm("many_rows", (130, 40)),
    Norm("no_rows", (0, 40)),
    Norm("no_leading_dimension", (33,)),
    Norm("four_dimensions", (2, 3, 4, 24)),
    Norm("over_two_dimensions", (5, 6, 8), dims=2),
    Norm("no_weight", (9, 40), weight=False),
    Norm("no_bias", (9, 40), bias=False),
    Norm("no_parameters", (9, 40), weight=False, bias=False),
    Norm("large_eps", (9, 40), eps=0.5),
    Norm("large_mean", (9, 1000), offset=300.0),
    Norm("large_mean_looped", (2, 40_000), offset=300.0),
    Norm("transposed", (9, 40), transposed=True),
    *(Norm(f"{name}_{N}", (17, N), dtype=dtype) for dtype, name in ((F16, "fp16"), (BF16, "bf16")) for N in (96, 2000)),
    Norm("bf16_with_fp32_parameters", (17, 96), dtype=BF16, parameter_dtype=F32),
    Norm("bf16_large_mean", (17, 96), dtype=BF16, offset=50.0),
]


def norm_inputs(case: Norm, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """-> ([x, weight, bias as the case has them], dy)."""
    row = case.shape[-case.dims :]
    x, dy = make_inputs(case.shape, case.shape, device=device)
    x = (x * 2 + case.offset).to(case.dtype)
    if case.transposed:
        x = x.T.contiguous().T
    weight, bias = make_inputs(row, row, dtype=case.parameter_dtype or case.dtype, device=device, seed=1)
    return [x, *([weight] if case.weight else []), *([bias] if case.bias else [])], dy.to(case.dtype)


@BACKENDS
@pytest.mark.parametrize("case", NORMS, ids=str)
def test_layer_norm(case: Norm, backend: str, device: torch.device):
    inputs, dy = norm_inputs(case, device)
    names = ["x", *(["weight"] if case.weight else []), *(["bias"] if case.bias else [])]
    row = case.shape[-case.dims :]

    def ours(backend):
        return lambda **t: fastattn.layer_norm(t["x"], row, t.get("weight"), t.get("bias"), case.eps, backend=backend)

    def theirs(**t):
        parameters = (None if p is None else p.to(t["x"].dtype) for p in (t.get("weight"), t.get("bias")))
        return torch.nn.functional.layer_norm(t["x"], row, *parameters, case.eps)

    def run(function, convert) -> dict[str, Tensor]:
        leaves = {name: convert(t).detach().requires_grad_() for name, t in zip(names, inputs, strict=True)}
        y = function(**leaves)
        grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
        return {"y": y, **{f"d{name}": g for name, g in zip(names, grads, strict=True)}}

    exact = run(ours("reference"), Tensor.double)
    eager, actual = run(theirs, lambda t: t), run(ours(backend), lambda t: t)
    for name, t in actual.items():
        # A sum over rows or of a long row rounds at the size of its terms; the mean, in fp32, at the size of x.
        terms = [exact["y"], exact[name]]
        if case.dtype == F32 and case.offset and name in ("y", "dx"):
            terms.append(inputs[0] / inputs[0].std(-1, keepdim=True) * (inputs[1] if case.weight else 1.0))
        scale = max(g.abs().max().item() if g.numel() else 0.0 for g in terms)
        assert_close(t, exact[name], eager[name], name, scale=scale)


@dataclass(frozen=True)
class Soft:
    name: str
    shape: tuple[int, ...]
    dim: int = -1
    dtype: torch.dtype = F32
    layout: str = "contiguous"
    mask: tuple[int, ...] = ()  # its shape, if there is one
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


SOFTS = [
    *(Soft(f"N{N}", (3, N)) for N in (1, 2, 7, 64, 1000, 1025)),
    *(Soft(f"N{N}_looped", (2, N)) for N in (70_001, 262_144)),
    Soft("no_rows", (0, 9)),
    Soft("no_columns", (3, 0)),
    Soft("no_dimension", ()),
    Soft("one_dimension", (33,)),
    Soft("many_rows", (130, 20)),
    Soft("first_dimension", (12, 5, 7), dim=0),
    Soft("middle_dimension", (2, 3, 20, 5), dim=2),
    Soft("five_dimensions", (2, 3, 2, 3, 11), dim=-2),
    Soft("strided", (2, 3, 10, 12), layout="strided"),
    Soft("heads_inside", (2, 3, 10, 12), layout="heads_inside"),
    Soft("scale", (5, 40), options={"scale": -0.3}),
    Soft("mask", (2, 3, 10, 12), mask=(2, 3, 10, 12)),
    Soft("mask_of_keys", (2, 3, 10, 12), mask=(2, 1, 1, 12)),
    Soft("mask_of_fewer_dimensions", (2, 3, 10, 12), mask=(10, 12)),
    Soft("mask_other_dimension", (2, 3, 10, 12), dim=1, mask=(3, 1, 12)),
    Soft("mask_looped", (2, 70_000), mask=(70_000,)),
    Soft("causal", (2, 3, 12, 12), options={"causal": True}),
    Soft("causal_bottom_right", (2, 20, 12), options={"causal": "bottom_right"}),
    Soft("causal_top_left", (2, 12, 20), options={"causal": "top_left"}),
    Soft("causal_mask_scale", (2, 3, 12, 12), mask=(3, 1, 12), options={"causal": True, "scale": 0.5}),
    Soft("causal_strided", (2, 3, 12, 15), layout="strided", options={"causal": "bottom_right"}),
    *(Soft(f"{name}_{N}", (9, N), dtype=dtype) for dtype, name in ((F16, "fp16"), (BF16, "bf16")) for N in (50, 3000)),
    Soft("bf16_mask_causal", (2, 30, 30), dtype=BF16, mask=(30,), options={"causal": True, "scale": 2.0}),
]


@BACKENDS
@pytest.mark.parametrize("function", [fastattn.softmax, fastattn.log_softmax], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", SOFTS, ids=str)
def test_softmax(case: Soft, function, backend: str, device: torch.device):
    x, dy = make_inputs(case.shape, case.shape, dtype=case.dtype, device=device, layout=case.layout)
    mask = torch.rand(case.mask, generator=torch.Generator().manual_seed(2)).to(device) > 0.4 if case.mask else None

    def run(backend, dtype) -> tuple[Tensor, Tensor]:
        leaf = x.to(dtype).detach().requires_grad_()
        y = function(leaf, case.dim, mask=mask, backend=backend, **case.options)
        return y, torch.autograd.grad(y, leaf, dy.to(dtype))[0]

    def plain(dtype) -> tuple[Tensor, Tensor]:
        """The same by eager torch in one dtype: scale, fill, softmax."""
        leaf = x.to(dtype).detach().requires_grad_()
        s = leaf * case.options.get("scale", 1.0)
        keep = torch.ones_like(s, dtype=torch.bool) if mask is None else mask.expand(s.shape)
        if causal := case.options.get("causal", False):
            keep = keep.tril(0 if causal == "top_left" else s.shape[-1] - s.shape[-2])
        empty = ~keep.any(case.dim, keepdim=True) if s.dim() else ~keep
        s = s.masked_fill(~keep & ~empty, -math.inf)
        y = (torch.log_softmax if function is fastattn.log_softmax else torch.softmax)(s, case.dim)
        y = y.masked_fill(~keep, -math.inf if function is fastattn.log_softmax else 0.0)
        return y, torch.autograd.grad(y, leaf, dy.to(dtype))[0]

    exact, eager, actual = run("reference", torch.float64), plain(case.dtype), run(backend, case.dtype)
    for name, ours, truth, same_dtype in zip(("y", "dx"), actual, exact, eager, strict=True):
        assert_close(
            ours, truth, same_dtype, name, scale=1.0 if name == "y" else dy.abs().max().item() if dy.numel() else 0.0
        )


@BACKENDS
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("function", [fastattn.softmax, fastattn.log_softmax], ids=lambda f: f.__name__)
def test_masked_entries_never_leak(function, garbage, backend, device):
    """Whatever x, and the gradient of y, hold at a masked entry: results are those of zeros there, to the bit."""
    x, dy = make_inputs((6, 40), (6, 40), device=device)
    mask = torch.rand(6, 40, generator=torch.Generator().manual_seed(0)).to(device) > 0.5
    mask[2] = False
    results = []
    for value in (0.0, garbage):
        leaf = torch.where(mask, x, value).requires_grad_()
        y = function(leaf, mask=mask, backend=backend)
        results.append((y, torch.autograd.grad(y, leaf, torch.where(mask, dy, value))[0]))
    for name, clean, dirty in zip(("y", "dx"), *results, strict=True):
        assert torch.equal(clean, dirty), name
    y, dx = results[1]
    assert (y[2] == (0.0 if function is fastattn.softmax else -math.inf)).all()
    assert (dx[~mask] == 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("N", [40, 70_000])
def test_non_finite_rows_are_as_torch_has_them(value, N, device):
    """One row holds it, the others are not touched."""
    (x,) = make_inputs((3, N), device=device)
    x[1, 5] = value
    for ours, theirs in (
        (lambda t: fastattn.layer_norm(t, N, backend="triton"), lambda t: torch.nn.functional.layer_norm(t, (N,))),
        (lambda t: fastattn.softmax(t, backend="triton"), lambda t: torch.softmax(t, -1)),
        (lambda t: fastattn.log_softmax(t, backend="triton"), lambda t: torch.log_softmax(t, -1)),
    ):
        torch.testing.assert_close(ours(x), theirs(x), equal_nan=True)


def test_layer_norm_is_repeatable_and_keeps_rows_apart(device):
    x, weight, bias, dy = make_inputs((200, 64), (64,), (64,), (200, 64), device=device)

    def run(rows):
        leaves = [t.detach().requires_grad_() for t in (x[rows], weight, bias)]
        y = fastattn.layer_norm(leaves[0], 64, *leaves[1:], backend="triton")
        return y, *torch.autograd.grad(y, leaves, dy[rows])

    everything = slice(None)
    assert all(torch.equal(a, b) for a, b in zip(run(everything), run(everything), strict=True))
    assert torch.equal(run(everything)[0][:7], run(slice(7))[0])


def test_offsets_pass_2_to_the_31(device):
    """Rows 2^30 elements apart, in memory that is reserved and never touched between them."""
    stride = 2**30 if device.type == "cpu" else 2**29 + 16
    buffer = torch.empty(stride * 4 + 64, dtype=F16, device=device)
    far = buffer.as_strided((5, 64), (stride, 1))
    near = make_inputs((5, 64), dtype=F16, device=device)[0]
    far.copy_(near)
    for function in (
        lambda t: fastattn.layer_norm(t, 64, backend="triton"),
        lambda t: fastattn.softmax(t, backend="triton"),
    ):
        assert torch.equal(function(far), function(near))
