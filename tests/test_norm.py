"""layer_norm and rms_norm of every backend against float64, values and gradients, in each named case."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import ONCE, Contexts, on_backends
from torch import Tensor

import fastattn
from fastattn.reference.dropout import row_dropout
from fastattn.reference.norm import add_residual
from fastattn.testing import assert_close, make_inputs, simulate_rounding

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
BACKENDS = pytest.mark.parametrize("backend", ["triton", "eager"])
FUNCTIONS = pytest.mark.parametrize("function", [fastattn.layer_norm, fastattn.rms_norm], ids=lambda f: f.__name__)


@dataclass(frozen=True)
class Norm:
    name: str
    shape: tuple[int, ...]
    dims: int = 1  # how many of the last dimensions are normalised
    dtype: torch.dtype = F32
    parameter_dtype: torch.dtype | None = None  # None: x's
    weight: bool = True
    bias: bool = True
    eps: float | None = 1e-5
    offset: float = 0.0  # added to x: a mean far from 0 is where a one-pass variance fails
    layout: str = "contiguous"  # of x and residual
    parameters: str = "contiguous"  # or every second element of a vector, or one element expanded
    residual: torch.dtype | None = None  # its dtype, if there is one
    dropout_p: float = 0.0
    weight_offset: float = 0.0
    memory_efficient: bool = False
    rms: bool = False

    def __str__(self) -> str:
        return self.name


def both(name: str, shape: tuple[int, ...], **options: Any) -> list[Norm]:
    """A case of LayerNorm, and the same of RMSNorm."""
    return [
        Norm(f"layer_norm_{name}", shape, **options),
        Norm(f"rms_norm_{name}", shape, rms=True, **{**options, "bias": False}),
    ]


NORMS = [
    *(case for N in (1, 2, 7, 100, 1024, 1025) for case in both(f"N{N}", (3, N))),
    *(case for N in (20_000, 70_001) for case in both(f"N{N}_looped", (2, N))),
    Norm("one_row", (1, 48)),
    Norm("many_rows", (130, 40)),
    *both("no_rows", (0, 40)),
    *both("no_leading_dimension", (33,)),
    Norm("four_dimensions", (2, 3, 4, 24)),
    Norm("over_two_dimensions", (5, 6, 8), dims=2),
    *both("no_weight", (9, 40), weight=False),
    Norm("no_bias", (9, 40), bias=False),
    Norm("no_parameters", (9, 40), weight=False, bias=False),
    Norm("large_eps", (9, 40), eps=0.5),
    Norm("default_eps", (9, 40), eps=None, rms=True, bias=False),
    Norm("large_mean", (9, 1000), offset=300.0),
    Norm("large_mean_looped", (2, 40_000), offset=300.0),
    Norm("transposed", (9, 40), layout="transposed"),
    *both("heads", (2, 3, 10, 24), layout="packed"),  # q of a fused projection, normalised head by head
    *both("strided", (2, 3, 10, 24), layout="strided", residual=F32),
    Norm("strided_over_two_dimensions", (2, 3, 10, 24), layout="strided", dims=2),
    *(Norm(f"{name}_{N}", (17, N), dtype=dtype) for dtype, name in ((F16, "fp16"), (BF16, "bf16")) for N in (96, 2000)),
    *both("bf16_with_fp32_parameters", (17, 96), dtype=BF16, parameter_dtype=F32),
    Norm("bf16_large_mean", (17, 96), dtype=BF16, offset=50.0),
    *both("residual", (17, 96), residual=F32),
    *both("residual_looped", (2, 20_000), residual=F32),
    *both("residual_bf16", (17, 96), dtype=BF16, residual=BF16),
    *both("residual_bf16_into_fp32", (17, 96), dtype=BF16, residual=F32),
    *both("residual_dropout", (17, 96), residual=F32, dropout_p=0.3),
    *both("residual_dropout_looped", (2, 20_000), residual=F32, dropout_p=0.3),
    Norm("residual_dropout_bf16", (17, 96), dtype=BF16, residual=F32, dropout_p=0.1),
    Norm("residual_all_dropped", (17, 96), residual=F32, dropout_p=1.0),
    Norm("residual_over_two_dimensions", (5, 6, 8), dims=2, residual=F32, dropout_p=0.5),
    Norm("weight_offset", (17, 96), rms=True, bias=False, weight_offset=1.0),
    Norm("weight_offset_bf16", (17, 96), rms=True, bias=False, weight_offset=1.0, dtype=BF16),
    *both("strided_parameters", (17, 96), parameters="strided"),
    *both("strided_parameters_memory_efficient", (17, 96), parameters="strided", memory_efficient=True),
    *both("expanded_parameters", (17, 96), parameters="expanded"),
    *both("memory_efficient", (17, 96), memory_efficient=True),
    *both("memory_efficient_looped", (2, 20_000), memory_efficient=True, residual=F32),
    Norm("memory_efficient_offset", (17, 96), rms=True, bias=False, memory_efficient=True, weight_offset=3.0),
    Norm("memory_efficient_no_weight", (17, 96), weight=False, bias=False, memory_efficient=True),
]


def norm_inputs(case: Norm, device: torch.device) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """-> (x, weight, bias and residual as the case has them; dy; dh)."""
    row = case.shape[len(case.shape) - case.dims :]
    layout = "contiguous" if case.layout == "transposed" else case.layout
    x, residual = make_inputs(case.shape, case.shape, device=device, layout=layout, dtype=case.dtype)
    dy, dh = make_inputs(case.shape, case.shape, device=device, seed=2)
    x = x.mul_(2).add_(case.offset)
    if case.layout == "transposed":
        x = x.T.contiguous().T
    weight, bias = make_inputs(row, row, dtype=case.parameter_dtype or case.dtype, device=device, seed=1)
    if case.memory_efficient:
        weight = weight.sign() * (weight.abs() + 0.5)  # what is divided by
    if case.parameters == "strided":
        weight, bias = (torch.stack([t, torch.full_like(t, math.nan)], -1)[..., 0] for t in (weight, bias))
    elif case.parameters == "expanded":
        weight, bias = (t[:1].expand(row) for t in (weight, bias))
    inputs = {"x": x}
    inputs |= {"weight": weight} if case.weight else {}
    inputs |= {"bias": bias} if case.bias else {}
    if case.residual is not None:
        inputs["residual"] = residual if case.residual == case.dtype else residual.to(case.residual)
        dh = dh.to(case.residual)
    return inputs, dy.to(case.dtype), dh


def options_of(case: Norm) -> dict[str, Any]:
    options = {"eps": case.eps, "dropout_p": case.dropout_p, "memory_efficient": case.memory_efficient}
    return options | ({"weight_offset": case.weight_offset} if case.rms else {})


def ours(case: Norm, backend: str) -> Callable[..., tuple[Tensor, ...]]:
    function = fastattn.rms_norm if case.rms else fastattn.layer_norm

    def call(x: Tensor, **tensors: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(5)
        results = function(x, x.shape[x.dim() - case.dims :], **tensors, **options_of(case), backend=backend)
        return results if isinstance(results, tuple) else (results,)

    return call


def theirs(case: Norm) -> Callable[..., tuple[Tensor, ...]]:
    """The same in torch's operations, in the dtypes of the inputs."""

    def call(x, weight=None, bias=None, residual=None) -> tuple[Tensor, ...]:
        torch.manual_seed(5)
        h = x
        if residual is not None:
            if case.dropout_p:
                seed = torch.randint(2**63 - 1, (), device=x.device)
                h = row_dropout(h, seed, case.dropout_p, case.dims)
            h = (h + residual).to(residual.dtype)
        row = x.shape[x.dim() - case.dims :]
        weight, bias = (None if p is None else p.to(h.dtype) for p in (weight, bias))
        if case.rms:
            weight = None if weight is None else weight + case.weight_offset
            y = torch.nn.functional.rms_norm(h, row, weight, case.eps)
        else:
            y = torch.nn.functional.layer_norm(h, row, weight, bias, case.eps)
        return (y.to(x.dtype),) if residual is None else (y.to(x.dtype), h)

    return call


def run(function, inputs: dict[str, Tensor], dy: Tensor, dh: Tensor, convert=lambda t: t) -> dict[str, Tensor]:
    leaves = {name: convert(t).detach().requires_grad_() for name, t in inputs.items()}
    results = function(**leaves)
    cotangents = [d.to(t.dtype) for d, t in zip((dy, dh), results, strict=False)]
    grads = torch.autograd.grad(results, list(leaves.values()), cotangents)
    named = dict(zip(("y", "h"), results, strict=False))
    return named | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}


def with_rounded_sum(case: Norm, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs in float64, the residual changed so that x + residual is what the residual's dtype makes of it."""
    wide = {name: t.double() for name, t in inputs.items()}
    if case.residual is None:
        return wide
    torch.manual_seed(5)
    seed = torch.randint(2**63 - 1, (), device=inputs["x"].device) if case.dropout_p else None
    h, exact = (add_residual(t["x"], t["residual"], seed, case.dropout_p, case.dims) for t in (inputs, wide))
    return wide | {"residual": wide["residual"] + (h.double() - exact)}


def check(case: Norm, backend: str, device: torch.device, under: Contexts = ONCE) -> None:
    inputs, dy, dh = norm_inputs(case, device)
    exact = run(ours(case, "reference"), with_rounded_sum(case, inputs), dy, dh, Tensor.double)
    rounded = simulate_rounding(lambda: run(theirs(case), inputs, dy, dh))

    def largest(name: str) -> float:
        # A sum over rows or of a long row rounds at the size of its terms; the mean, in fp32, at the size of x.
        terms = [exact["y"], exact[name]]
        if case.dtype == F32 and case.offset and name in ("y", "dx"):
            terms.append(inputs["x"] / inputs["x"].std(-1, keepdim=True) * inputs.get("weight", 1.0))
        if case.memory_efficient and case.weight and name != "y":  # y was rounded, and x̂ is made from it
            terms.append(exact[name].abs().amax() * inputs["weight"].abs().amax().clamp(min=1))
        return max(g.abs().max().item() if g.numel() else 0.0 for g in terms)

    for context in under:
        with context:
            actual = run(ours(case, backend), inputs, dy, dh)
            assert actual.keys() == exact.keys()
            for name, t in actual.items():
                assert_close(t, exact[name], rounded[name], name, scale=largest(name))


def cuda_has(case: Norm) -> bool:
    return not case.dropout_p and not case.memory_efficient


@pytest.mark.parametrize(("case", "backend"), on_backends(NORMS, cuda=cuda_has), ids=str)
def test_norm(case: Norm, backend: str, device: torch.device):
    check(case, backend, device)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(data=st.data())
def test_norm_property(data):
    """Any combination of what the cases have one by one."""
    draw = data.draw
    rms = draw(st.booleans(), label="rms")
    weight = draw(st.booleans(), label="weight")
    residual = draw(st.sampled_from([None, F32, BF16]), label="residual")
    layout = draw(st.sampled_from(["contiguous", "heads_inside", "packed", "strided"]), label="layout")
    case = Norm(
        "drawn",
        (*(draw(st.integers(1, 5), label="size") for _ in range(3)), draw(st.sampled_from([1, 2, 17, 64, 130]))),
        dims=draw(st.integers(1, 2), label="dims"),
        dtype=draw(st.sampled_from([F16, BF16, F32]), label="dtype"),
        parameter_dtype=draw(st.sampled_from([None, F32]), label="parameters"),
        weight=weight,
        bias=not rms and draw(st.booleans(), label="bias"),
        eps=draw(st.sampled_from([1e-5, 0.1]), label="eps"),
        layout=layout,
        residual=residual,
        dropout_p=draw(st.sampled_from([0.0, 0.4]), label="dropout_p") if residual else 0.0,
        weight_offset=1.0 if rms and weight and draw(st.booleans(), label="offset") else 0.0,
        rms=rms,
    )
    check(case, "triton", torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("N", [40, 20_000])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_non_finite_rows_are_as_torch_has_them(name, N, value, device):
    """One row holds it, the others are not touched; forward and backward."""
    (x, dy) = make_inputs((3, N), (3, N), device=device)
    x[1, 5] = value
    results = []
    for function in (getattr(torch.nn.functional, name), getattr(fastattn, name)):
        leaf = x.clone().requires_grad_()
        y = function(leaf, (N,), **({} if function is getattr(torch.nn.functional, name) else {"backend": "triton"}))
        results.append((y, *torch.autograd.grad(y, leaf, dy)))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@FUNCTIONS
def test_repeatable_and_rows_apart(function, device):
    x, weight, residual, dy = make_inputs((200, 64), (64,), (200, 64), (200, 64), device=device)

    def run(rows):
        leaves = [t.detach().requires_grad_() for t in (x[rows], weight, residual[rows])]
        y, h = function(leaves[0], 64, leaves[1], residual=leaves[2], backend="triton")
        return y, *torch.autograd.grad((y, h), leaves, (dy[rows], dy[rows]))

    everything = slice(None)
    assert all(torch.equal(a, b) for a, b in zip(run(everything), run(everything), strict=True))
    assert torch.equal(run(everything)[0][:7], run(slice(7))[0])


@FUNCTIONS
def test_offsets_pass_2_to_the_31(function, device):
    """Rows 2^30 elements apart, in memory that is reserved and never touched between them."""
    stride = 2**30 if device.type == "cpu" else 2**29 + 16
    buffer = torch.empty(stride * 4 + 64, dtype=F16, device=device)
    far = buffer.as_strided((5, 64), (stride, 1))
    near, dy = make_inputs((5, 64), (5, 64), dtype=F16, device=device)
    far.copy_(near)
    results = []
    for x in (far, near):
        leaf = x.detach().requires_grad_()
        y, h = function(leaf, 64, residual=leaf, backend="triton")
        results.append((y, h, *torch.autograd.grad(y, leaf, dy)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@FUNCTIONS
def test_dropout_is_keyed_the_same_in_every_backend_and_tile(function, device):
    """Where x is dropped, h is the residual; the same entries in each backend, and as a part of wider rows."""
    x, residual = make_inputs((40, 300), (40, 300), device=device)
    hs = []
    for backend in ("triton", "eager", "reference"):
        torch.manual_seed(3)
        hs.append(function(x, 300, residual=residual, dropout_p=0.4, backend=backend)[1])
    dropped = [h == residual for h in hs]
    assert torch.equal(dropped[0], dropped[1])
    assert torch.equal(dropped[0], dropped[2])
    assert 0.35 < dropped[0].float().mean() < 0.45
    torch.manual_seed(3)
    part = function(x[:, :20], 20, residual=residual[:, :20], dropout_p=0.4, backend="triton")[1] == residual[:, :20]
    assert torch.equal(part, dropped[0][:, :20])
    torch.manual_seed(4)
    other = function(x, 300, residual=residual, dropout_p=0.4, backend="triton")[1]
    assert not torch.equal(other == residual, dropped[0])


@FUNCTIONS
def test_what_is_dropped_does_not_leak(function, device):
    """An infinity that is dropped is gone, forward and backward."""
    x, residual, dy = make_inputs((8, 64), (8, 64), (8, 64), device=device)
    results = []
    for garbage in (0.0, math.inf):
        torch.manual_seed(3)
        dropped = function(x, 64, residual=residual, dropout_p=0.5, backend="triton")[1] == residual
        torch.manual_seed(3)
        leaf = torch.where(dropped, garbage, x).requires_grad_()
        y, _ = function(leaf, 64, residual=residual, dropout_p=0.5, backend="triton")
        results.append((y, *torch.autograd.grad(y, leaf, dy)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert (results[1][1][dropped] == 0).all()


def saved_bytes(function, *leaves: Tensor) -> int:
    """Bytes of distinct storage that the graph of function(*leaves) keeps, beside the leaves and the results."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        results = function(*leaves)
    for t in (*leaves, *(results if isinstance(results, tuple) else (results,))):
        kept.pop(t.untyped_storage().data_ptr(), None)
    return sum(kept.values())


@FUNCTIONS
def test_saves_no_tensor_that_is_not_there_anyway(function, device):
    """Statistics apart, 8 bytes a row: h is a result. With memory_efficient a temporary x is let go."""
    x, residual, weight = (t.requires_grad_() for t in make_inputs((64, 256), (64, 256), (256,), device=device))
    statistics = 64 * (4 if function is fastattn.rms_norm else 8)
    options = {"backend": "triton"}
    assert (
        saved_bytes(lambda *t: function(t[0], 256, t[2], residual=t[1], **options), x, residual, weight) == statistics
    )
    keeps_input = saved_bytes(lambda *t: function(t[0] + t[1], 256, t[2], **options), x, residual, weight)
    assert keeps_input == statistics + x.nbytes
    options["memory_efficient"] = True
    assert saved_bytes(lambda *t: function(t[0] + t[1], 256, t[2], **options), x, residual, weight) == statistics


def test_memory_efficient_says_what_it_cannot_know(device):
    """An entry whose weight is 0 has left no trace in y: NaN, not a guess. And there is no second derivative."""
    x, weight, dy = make_inputs((4, 16), (16,), (4, 16), device=device)
    weight[3] = 0.0
    x.requires_grad_()
    y = fastattn.layer_norm(x, 16, weight, memory_efficient=True, backend="triton")
    assert torch.autograd.grad(y, x, dy)[0].isnan().any()
    y = fastattn.rms_norm(x, 16, memory_efficient=True, backend="triton")
    (dx,) = torch.autograd.grad(y, x, dy.requires_grad_(), create_graph=True)
    with pytest.raises(fastattn.errors.UnsupportedError, match="rms_norm: its gradient cannot be differentiated again"):
        torch.autograd.grad(dx.sum(), dy)


@FUNCTIONS
def test_only_the_residual_stream_is_used(function, device):
    """No gradient reaches y: that of h is all there is."""
    x, residual, dh = make_inputs((5, 32), (5, 32), (5, 32), device=device)
    x.requires_grad_(), residual.requires_grad_()
    _, h = function(x, 32, residual=residual, backend="triton")
    dx, dresidual = torch.autograd.grad(h, (x, residual), dh)
    assert torch.equal(dx, dh)
    assert torch.equal(dresidual, dh)


@FUNCTIONS
def test_gradients_of_x_and_residual_do_not_share_memory_that_changes(function, device):
    """They are the same numbers; accumulating into one must leave the other."""
    x, residual, dy = (t.requires_grad_() for t in make_inputs((5, 32), (5, 32), (5, 32), device=device))
    y, _ = function(x, 32, residual=residual, backend="triton")
    y.backward(dy.detach())
    before = residual.grad.clone()
    x.grad.zero_()
    assert torch.equal(residual.grad, before)
    assert before.abs().max() > 0


def test_autocast_needs_no_copies(device):
    """Under autocast torch's norms give float32; so do ours, from bf16 as it is."""
    x, weight = make_inputs((4, 32), (32,), dtype=BF16, device=device)
    with torch.autocast(device.type, dtype=BF16):
        for name in ("layer_norm", "rms_norm"):
            ours = getattr(fastattn, name)(x, 32, weight, backend="triton")
            assert ours.dtype == getattr(torch.nn.functional, name)(x, (32,), weight).dtype


@FUNCTIONS
def test_heads_are_not_copied(function, device, monkeypatch):
    """q of a fused projection (B, S, 3, H, D), normalised head by head: the kernels read it where it lies."""
    from fastattn.backends.triton import norm

    read = []
    layout = norm.row_layout
    monkeypatch.setattr(norm, "row_layout", lambda tensors, n: read.append(layout(tensors, n)) or read[-1])
    (projected,) = make_inputs((2, 10, 3, 4, 16), device=device)
    for q in (projected[:, :, 0], projected[:, :, 0].transpose(1, 2)):
        leaf = q.detach().requires_grad_()
        function(leaf, 16, backend="triton").sum().backward()
    memory = projected.untyped_storage().data_ptr()
    assert [rows.tensors[i].untyped_storage().data_ptr() for rows, i in zip(read, (0, 1) * 2, strict=True)] == [
        memory
    ] * 4


@FUNCTIONS
def test_what_the_norm_makes_of_no_gradient_is_not_computed(function, device):
    """Where only h is used, an infinite row has the gradient of h, with dropout and without."""
    x, residual, dh = make_inputs((4, 3, 8), (4, 3, 8), (4, 3, 8), device=device)
    x[0, 0, 0] = math.inf
    for dropout_p in (0.0, 0.5):
        results = []
        for backend in ("triton", "reference"):
            torch.manual_seed(2)
            leaves = [t.clone().requires_grad_() for t in (x, residual)]
            _, h = function(leaves[0], (3, 8), residual=leaves[1], dropout_p=dropout_p, backend=backend)
            results.append(torch.autograd.grad(h, leaves, dh))
        for ours, theirs in zip(*results, strict=True):
            assert ours.isfinite().all()
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", [None, "triton", "eager", "reference"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("rows", [5, 5000])
def test_layer_norm_of_one_column(rows, dtype, backend, device):
    """A number is its own mean: y is the bias, and neither x nor weight has a gradient, exactly."""
    x, dy, weight, bias = make_inputs((rows, 1), (rows, 1), (1,), (1,), dtype=dtype, device=device)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = fastattn.layer_norm(x, 1, weight, bias, backend=backend)
    dx, dweight, _ = torch.autograd.grad(y, leaves, dy)
    assert torch.equal(y, bias.expand_as(y))
    assert (dx == 0).all()
    assert dweight.item() == 0.0


@pytest.mark.parametrize("backend", ["cpu", "triton", "eager", "reference"])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_rows_whose_squares_overflow(name, backend):
    """docs/rows.md says so: beside torch's, a row is right as long as float32 holds Σ h², and then 0 or NaN."""
    (x,) = make_inputs((3, 64))
    for size, fits in ((1e17, True), (3e19, False), (1e30, False)):
        y = getattr(fastattn, name)(x * size, 64, backend=backend)
        if fits:
            torch.testing.assert_close(y.double(), getattr(torch.nn.functional, name)((x * size).double(), (64,)))
        else:
            assert ((y == 0.0) | y.isnan()).all()
