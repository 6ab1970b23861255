"""swiglu and geglu of every backend against float64, values and gradients, in each named case, and under transforms."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from parity import ONCE, Contexts
from torch import Tensor
from torch.func import hessian, jvp, vmap

import fastattn
from fastattn.errors import ArgumentError, ArgumentTypeError, FastattnError, UnsupportedError
from fastattn.testing import assert_close, make_inputs, simulate_rounding

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
BACKENDS = pytest.mark.parametrize("backend", ["triton", "eager"])
FUNCTIONS = {
    "swiglu": (fastattn.swiglu, F.silu),
    "geglu": (fastattn.geglu, F.gelu),
    "geglu_tanh": (
        lambda *x, **options: fastattn.geglu(*x, approximate="tanh", **options),
        lambda x: F.gelu(x, approximate="tanh"),
    ),
}
EVERY = pytest.mark.parametrize("name", FUNCTIONS)


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, ...]  # of gate, up and y
    layout: str = "contiguous"  # or halves, transposed, strided, mixed, expanded
    dtype: torch.dtype = F32

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("one_element", (1,)),
    Case("no_dimension", ()),
    Case("no_rows", (0, 8)),
    Case("no_columns", (3, 0)),
    Case("one_column", (70, 1)),
    Case("several_programs", (5, 1000)),
    Case("halves", (2, 7, 300), "halves"),
    Case("halves_of_wide_rows", (2, 4100), "halves"),
    Case("halves_of_odd_rows", (9, 33), "halves"),
    Case("transposed", (30, 70), "transposed"),
    Case("strided", (3, 5, 20), "strided"),
    Case("mixed", (40, 50), "mixed"),
    Case("expanded", (6, 40), "expanded"),
    Case("five_dimensions_mixed", (2, 3, 2, 3, 4), "mixed"),
    *(Case(f"{n}_halves", (6, 200), "halves", d) for d, n in ((F16, "fp16"), (BF16, "bf16"))),
]


def inputs_of(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """gate, up and dy."""
    gate, up, dy = (3 * t for t in make_inputs(*[case.shape] * 3, dtype=case.dtype, device=device))
    if case.layout == "halves":
        gate, up = torch.cat([gate, up], -1).chunk(2, -1)
    elif case.layout == "transposed":
        gate, up, dy = (t.T.contiguous().T for t in (gate, up, dy))
    elif case.layout == "strided":
        gate, up, dy = make_inputs(*[case.shape] * 3, dtype=case.dtype, device=device, layout="strided")
    elif case.layout == "mixed":
        gate, dy = (
            t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim()))) for t in (gate, dy)
        )
    elif case.layout == "expanded":
        up, dy = up[:1].expand(case.shape), dy[:, :1].expand(case.shape)
    return gate, up, dy


def run(function, inputs, dtype) -> dict[str, Tensor]:
    gate, up, dy = (t.detach().to(dtype) for t in inputs)
    gate, up = gate.requires_grad_(), up.requires_grad_()
    y = function(gate, up)
    return dict(zip(("y", "dgate", "dup"), (y, *torch.autograd.grad(y, (gate, up), dy)), strict=True))


def check(case: Case, name: str, backend: str, device: torch.device, under: Contexts = ONCE) -> None:
    ours, activation = FUNCTIONS[name]
    inputs = inputs_of(case, device)
    exact = run(lambda g, u: ours(g, u, backend="reference"), inputs, torch.float64)
    rounded = simulate_rounding(lambda: run(lambda g, u: activation(g) * u, inputs, case.dtype))
    for context in under:
        with context:
            for key, t in run(lambda g, u: ours(g, u, backend=backend), inputs, case.dtype).items():
                assert_close(t, exact[key], rounded[key], key)


@EVERY
@BACKENDS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gated(case: Case, backend: str, name: str, device: torch.device):
    check(case, name, backend, device)


def test_any_call(device: torch.device):
    @seed(0)
    @settings(max_examples=50, database=None, deadline=None)
    @given(
        st.lists(st.integers(0, 9), max_size=4),
        st.sampled_from(["contiguous", "halves", "mixed", "strided"]),
        st.sampled_from([F32, F16, BF16]),
        st.sampled_from(sorted(FUNCTIONS)),
    )
    def draw(shape, layout, dtype, name):
        check(Case("drawn", tuple(shape), layout if shape else "contiguous", dtype), name, "triton", device)

    draw()


@EVERY
# On a CPU, torch's gelu has NaN at inf, or inf, by dtype and strides: eager is held to the dtype that it computes in.
@pytest.mark.parametrize(("backend", "dtype"), [("triton", F32), ("triton", F16), ("triton", BF16), ("eager", F32)])
def test_inf_and_nan_are_where_torch_has_them(name, backend, dtype, device):
    ours, activation = FUNCTIONS[name]
    large = 1e4 if dtype == F32 else 4.0  # of larger halves, overflow and underflow between torch's operations differ
    values = [math.inf, -math.inf, math.nan, 0.0, -0.0, large, -large, 1.0]
    edges = torch.tensor(values, dtype=dtype, device=device)
    inputs = torch.meshgrid(edges, edges, edges, indexing="ij")
    actual = run(lambda g, u: ours(g, u, backend=backend), inputs, dtype)
    expected = run(lambda g, u: activation(g) * u, inputs, dtype)
    for key, t in actual.items():
        assert torch.equal(t.isnan(), expected[key].isnan()), key
        assert torch.equal(t.isinf(), expected[key].isinf()), key


@EVERY
def test_slope_of_huge_gates_is_finite(name, device):
    gate = torch.tensor([3e38, -3e38, 1e30, -1e30, 1e19, -1e19], device=device, requires_grad=True)
    y = FUNCTIONS[name][0](gate, torch.ones_like(gate), backend="triton")
    (slope,) = torch.autograd.grad(y.sum(), gate)
    assert torch.equal(slope, (gate > 0).float())


@EVERY
def test_higher_derivatives(name, device):
    ours = FUNCTIONS[name][0]
    gate, up = make_inputs((2, 3), (2, 3), device=device)
    results = []
    for backend, dtype in (("triton", F32), ("reference", torch.float64)):
        g, u = gate.to(dtype), up.to(dtype)

        def loss(g, u, backend=backend):
            return ours(g, u, backend=backend).sin().sum()

        results.append((*hessian(loss, (0, 1))(g, u)[0], jvp(loss, (g, u), (u, g))[1]))
    for actual, exact in zip(*results, strict=True):
        torch.testing.assert_close(actual, exact.float(), rtol=1e-4, atol=1e-5)


@EVERY
def test_vmap_and_compile(name, device):
    ours = FUNCTIONS[name][0]
    gate, up = make_inputs((3, 4, 10), (3, 4, 10), device=device)

    def function(g, u):
        return ours(g, u, backend="triton")

    expected = function(gate, up)
    assert torch.equal(vmap(function, in_dims=1)(gate, up), expected.transpose(0, 1))
    leaves = [gate.requires_grad_(), up.requires_grad_()]
    y = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(y, expected)
    grads = [torch.autograd.grad(t.square().sum(), leaves) for t in (y, function(*leaves))]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_opcheck(activation, device):
    gate, up = (t.requires_grad_() for t in make_inputs((3, 10), (3, 10), device=device))
    torch.library.opcheck(torch.ops.fastattn.gated.default, (gate, up, activation, "triton"))


@EVERY
def test_autocast_leaves_dtypes_as_torch_does(name, device):
    ours, activation = FUNCTIONS[name]
    for dtype in (F32, BF16):
        gate, up = make_inputs((3, 8), (3, 8), dtype=dtype, device=device)
        with torch.autocast(device.type, dtype=BF16):
            assert ours(gate, up, backend="triton").dtype == (activation(gate) * up).dtype


def test_offsets_pass_2_to_the_31(device):
    stride = 2**30 if device.type == "cpu" else 2**29 + 16
    far = torch.empty(stride * 4 + 64, dtype=F16, device=device).as_strided((5, 64), (stride, 1))
    (near,) = make_inputs((5, 64), dtype=F16, device=device)
    far.copy_(near)
    assert torch.equal(fastattn.swiglu(far, far, backend="triton"), fastattn.swiglu(near, near, backend="triton"))


X = torch.ones(2, 4)
WRONG = [
    (lambda: fastattn.swiglu([1.0], X), ArgumentTypeError, "swiglu: `gate` is a list"),
    (lambda: fastattn.swiglu(X, None), ArgumentTypeError, "`up` is None"),
    (lambda: fastattn.swiglu(X, X.half()), ArgumentTypeError, "`up` has dtype float16 and `gate` has float32"),
    (lambda: fastattn.geglu(X.long(), X.long()), ArgumentTypeError, "geglu: `gate` has dtype int64"),
    (lambda: fastattn.geglu(X, X[:1]), ArgumentError, "`up` has shape (1, 4) and `gate` has (2, 4)"),
    (lambda: fastattn.geglu(X, X, approximate="erf"), ArgumentError, "`approximate` is 'erf'"),
    (lambda: fastattn.geglu(X, X, approximate=None), ArgumentTypeError, "`approximate` is None"),
    (lambda: fastattn.swiglu(X, X.to("meta")), ArgumentError, "`up` is on meta"),
    (lambda: fastattn.swiglu(X.double(), X.double(), backend="triton"), UnsupportedError, "dtype float64"),
    (lambda: fastattn.nn.SwiGLU()(X[:, :3]), ArgumentError, "last dimension must be even"),
    (lambda: fastattn.nn.GEGLU("erf"), ArgumentError, "`approximate` is 'erf'"),
]


@pytest.mark.parametrize(("call", "error", "says"), WRONG, ids=[says for _, _, says in WRONG])
def test_wrong_call_raises_one_sentence(call, error: type[FastattnError], says: str):
    with pytest.raises(error) as caught:
        call()
    assert says in str(caught.value)


def test_modules_split_or_take_two(device):
    (x,) = make_inputs((2, 5, 16), device=device)
    gate, up = x.chunk(2, -1)
    for module, function in (
        (fastattn.nn.SwiGLU(), fastattn.swiglu),
        (fastattn.nn.GEGLU(), fastattn.geglu),
        (fastattn.nn.GEGLU("tanh"), FUNCTIONS["geglu_tanh"][0]),
    ):
        assert torch.equal(module(x), function(gate, up))
        assert torch.equal(module(gate, up), function(gate, up))
        assert not list(module.parameters())
