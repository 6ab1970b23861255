"""softmax and log_softmax of every backend against float64, values and gradients, in each named case."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from parity import ONCE, Contexts, on_backends
from torch import Tensor

import fastattn
from fastattn.errors import ArgumentError
from fastattn.testing import assert_close, make_inputs, simulate_rounding

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
BACKENDS = pytest.mark.parametrize("backend", ["triton", "eager"])


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
    Soft("a_million", (1, 1_000_003), options={"scale": 0.5}),
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


IN_PLACE = ("N1000", "N70001_looped", "middle_dimension", "strided", "mask_of_keys", "causal_mask_scale", "bf16_3000")


def cuda_has(case: Soft) -> bool:
    return case.dim == -1


@pytest.mark.parametrize("function", [fastattn.softmax, fastattn.log_softmax], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("case", "backend"), on_backends(SOFTS, cuda=cuda_has), ids=str)
def test_softmax(case: Soft, function, backend: str, device: torch.device):
    check(case, function, backend, device)


def check(case: Soft, function, backend: str, device: torch.device, under: Contexts = ONCE) -> None:
    """Values and gradient of one backend, held to float64."""
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

    exact, rounded = run("reference", torch.float64), simulate_rounding(lambda: plain(case.dtype))
    scales = 1.0, dy.abs().max().item() if dy.numel() else 0.0
    for context in under:
        with context:
            for name, ours, truth, same_dtype, scale in zip(
                ("y", "dx"), run(backend, case.dtype), exact, rounded, scales, strict=True
            ):
                assert_close(ours, truth, same_dtype, name, scale=scale)


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
        (lambda t: fastattn.softmax(t, backend="triton"), lambda t: torch.softmax(t, -1)),
        (lambda t: fastattn.log_softmax(t, backend="triton"), lambda t: torch.log_softmax(t, -1)),
    ):
        torch.testing.assert_close(ours(x), theirs(x), equal_nan=True)


def test_offsets_pass_2_to_the_31(device):
    """Rows 2^30 elements apart, in memory that is reserved and never touched between them."""
    stride = 2**30 if device.type == "cpu" else 2**29 + 16
    buffer = torch.empty(stride * 4 + 64, dtype=F16, device=device)
    far = buffer.as_strided((5, 64), (stride, 1))
    near = make_inputs((5, 64), dtype=F16, device=device)[0]
    far.copy_(near)
    assert torch.equal(fastattn.softmax(far, backend="triton"), fastattn.softmax(near, backend="triton"))


@pytest.mark.parametrize(
    ("case", "backend"), on_backends([c for c in SOFTS if c.name in IN_PLACE], cuda=cuda_has), ids=str
)
@pytest.mark.parametrize("function", [fastattn.softmax, fastattn.log_softmax], ids=lambda f: f.__name__)
def test_in_place(function, case, backend, device):
    """x itself is returned, with the bits of the result out of place, and so is its gradient."""
    x, dy = make_inputs(case.shape, case.shape, dtype=case.dtype, device=device, layout=case.layout)
    mask = torch.rand(case.mask, generator=torch.Generator().manual_seed(2)).to(device) > 0.4 if case.mask else None
    options = {**case.options, "mask": mask, "backend": backend}
    expected = function(x, case.dim, **options)
    given = x.clone()
    version = given._version
    assert function(given, case.dim, inplace=True, **options) is given
    assert torch.equal(given, expected)
    assert given._version > version
    results = []
    for inplace in (False, True):
        leaf = x.detach().requires_grad_()
        y = function(leaf * 1.0, case.dim, inplace=inplace, **options)
        results.append((y, *torch.autograd.grad(y, leaf, dy)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_in_place_is_noticed_by_who_kept_x(device):
    """exp keeps its result, which the softmax overwrites; that is found out, with kernels as with torch."""
    (leaf,) = make_inputs((4, 40), device=device)
    for grad_mode in (torch.enable_grad, torch.no_grad):
        y = leaf.detach().requires_grad_().exp()
        with grad_mode():
            fastattn.softmax(y.detach() if grad_mode is torch.no_grad else y, inplace=True, backend="triton")
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_in_place_refuses_what_it_cannot_write_over(device):
    (x,) = make_inputs((4, 40), device=device)
    with pytest.raises(ArgumentError, match=r"softmax: `x` has strides \(0, 1\) and overlaps itself"):
        fastattn.softmax(x[:1].expand(4, 40), inplace=True)
    with pytest.raises(ArgumentError, match="log_softmax: `x` is a leaf that requires a gradient"):
        fastattn.log_softmax(x.requires_grad_(), inplace=True)


def test_in_place_on_views_and_under_transforms(device):
    """Half of a tensor; in compiled code; under vmap and grad: x is overwritten all the same, gradients are right."""
    (x, dy) = make_inputs((6, 40), (3, 40), device=device)

    def first_half(x, inplace):
        x = x * 1.0
        y = fastattn.softmax(x[:3], inplace=inplace, backend="triton")
        return (x[:3] if inplace else y), y

    leaf = x.detach().requires_grad_()
    expected, _ = first_half(leaf, False)
    (gradient,) = torch.autograd.grad(expected, leaf, dy)
    compiled = torch.compile(first_half, fullgraph=True, backend="aot_eager")
    for function in (first_half, compiled):
        seen, y = function(leaf, True)
        assert torch.equal(seen, expected)
        torch.testing.assert_close(torch.autograd.grad(y, leaf, dy)[0], gradient)
    assert torch.equal(torch.func.vmap(lambda row: first_half(row[None].expand(6, -1), True)[0][0])(x[:3]), expected)
    pulled = torch.func.grad(lambda x: (first_half(x, True)[0] * dy).sum())(x)
    torch.testing.assert_close(pulled, gradient)
