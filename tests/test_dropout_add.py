"""dropout_add of every backend against the keyed mask, values and gradients, in place and under transforms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from parity import ONCE, Contexts
from torch import Tensor
from torch.func import jvp, vmap

import fastattn
from fastattn.errors import ArgumentError, ArgumentTypeError, FastattnError, UnsupportedError
from fastattn.reference.dropout import row_dropout
from fastattn.testing import assert_close, make_inputs, simulate_rounding

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
BACKENDS = pytest.mark.parametrize("backend", ["triton", "eager"])
CASES = {  # shape, dtype of x, of residual, transposed
    "no_dimension": ((), F32, F32, False),
    "one_dimension": ((40,), F32, F32, False),
    "no_rows": ((0, 8), F32, F32, False),
    "no_columns": ((3, 0), F32, F32, False),
    "one_column": ((70, 1), F32, F32, False),
    "several_programs": ((3, 4, 500), F32, F32, False),
    "wide_rows": ((2, 4100), F32, F32, False),
    "transposed": ((30, 70), F32, F32, True),
    "five_dimensions": ((2, 3, 2, 3, 5), F32, F32, True),
    "bf16": ((9, 100), BF16, BF16, False),
    "fp16": ((9, 100), F16, F16, False),
    "bf16_into_fp32": ((9, 100), BF16, F32, False),
}


def run(backend: str, x: Tensor, residual: Tensor, dy: Tensor, p: float) -> dict[str, Tensor]:
    """By one seed in each backend and dtype."""
    torch.manual_seed(3)
    x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
    y = fastattn.dropout_add(x, residual, p, backend=backend)
    return dict(zip(("y", "dx", "dresidual"), (y, *torch.autograd.grad(y, (x, residual), dy.to(y.dtype))), strict=True))


def by_torch(x: Tensor, residual: Tensor, dy: Tensor, p: float) -> dict[str, Tensor]:
    """The same mask, by eager torch in the dtypes given."""
    torch.manual_seed(3)
    key = torch.randint(2**63 - 1, (), device=x.device)
    factor = row_dropout(torch.ones(x.shape, device=x.device), key, p).to(x.dtype)
    x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
    y = residual + x * factor
    return dict(zip(("y", "dx", "dresidual"), (y, *torch.autograd.grad(y, (x, residual), dy.to(y.dtype))), strict=True))


def check(
    shape, x_dtype, dtype, transposed: bool, p: float, backend: str, device: torch.device, under: Contexts = ONCE
) -> None:
    x, residual, dy = make_inputs(shape, shape, shape, device=device)
    if transposed and shape:
        x, dy = (t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim()))) for t in (x, dy))
    x, residual, dy = x.to(x_dtype), residual.to(dtype), dy.to(dtype)
    exact = run("reference", x.double(), residual.double(), dy.double(), p)
    rounded = simulate_rounding(lambda: by_torch(x, residual, dy, p))
    for context in under:
        with context:
            for key, t in run(backend, x, residual, dy, p).items():
                assert_close(t, exact[key], rounded[key], key)


@BACKENDS
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_dropout_add(name: str, p: float, backend: str, device: torch.device):
    check(*CASES[name], p, backend, device)


def test_any_call(device: torch.device):
    @seed(0)
    @settings(max_examples=50, database=None, deadline=None)
    @given(
        st.lists(st.integers(0, 9), max_size=5),
        st.sampled_from([(F32, F32), (F16, F16), (BF16, BF16), (BF16, F32)]),
        st.booleans(),
        st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    )
    def draw(shape, dtypes, transposed, p):
        check(tuple(shape), *dtypes, transposed, p, "triton", device)

    draw()


def test_mask_is_fresh_reproducible_and_of_the_right_rate(device):
    x, zero = torch.ones(50, 200, device=device), torch.zeros(50, 200, device=device)
    torch.manual_seed(1)
    first, second = (fastattn.dropout_add(x, zero, 0.25, backend="triton") for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(first, fastattn.dropout_add(x, zero, 0.25, backend="eager"))
    assert not torch.equal(first, second)
    assert 0.23 < (first == 0).float().mean().item() < 0.27
    assert torch.equal(first[first != 0], torch.full_like(first[first != 0], 1 / 0.75))


def test_no_dropout_draws_no_random_number(device):
    state = torch.get_rng_state()
    fastattn.dropout_add(torch.ones(3), torch.ones(3))
    assert torch.equal(torch.get_rng_state(), state)


@BACKENDS
def test_what_is_dropped_counts_nothing(backend, device):
    x = torch.tensor([math.inf, math.nan, -math.inf] * 20, device=device)
    residual = torch.arange(60.0, device=device)
    y = fastattn.dropout_add(x, residual, 0.5, backend=backend)
    assert ((y == residual) | torch.isclose(y, x, equal_nan=True)).all()
    assert (y == residual).any()
    assert torch.equal(fastattn.dropout_add(x, residual, 1.0, backend=backend), residual)


@BACKENDS
def test_in_place(backend, device):
    x, residual, dy = make_inputs((6, 50), (6, 50), (6, 50), device=device)
    expected = run(backend, x, residual, dy, 0.4)
    for view in (False, True):
        leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
        stream = leaves[1] * 1
        stream = stream.view(6, 50) if view else stream
        version = stream._version
        torch.manual_seed(3)
        y = fastattn.dropout_add(leaves[0], stream, 0.4, inplace=True, backend=backend)
        assert y.data_ptr() == stream.data_ptr()
        assert stream._version > version
        actual = (y, *torch.autograd.grad(y, leaves, dy))
        assert all(torch.equal(a, b) for a, b in zip(actual, expected.values(), strict=True))


def test_derivatives_compile_and_vmap(device):
    x, residual, dy = make_inputs((4, 30), (4, 30), (4, 30), device=device)

    def function(x, residual):
        return fastattn.dropout_add(x, residual, 0.5, backend="triton")

    torch.manual_seed(0)
    y = function(x, residual)
    torch.manual_seed(0)
    value, tangent = jvp(function, (x, residual), (2 * x, 0 * residual))
    assert torch.equal(value, y)
    kept = y != residual
    assert torch.equal(tangent, 4 * x * kept)
    leaves = [x.requires_grad_(), residual.requires_grad_(), dy.requires_grad_()]
    torch.manual_seed(0)
    grads = torch.autograd.grad(function(*leaves[:2]), leaves[:2], leaves[2], create_graph=True)
    (again,) = torch.autograd.grad(grads[0].sum() + 2 * grads[1].sum(), leaves[2])
    assert torch.equal(again, 2.0 + 2.0 * kept)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    z = compiled(*leaves[:2])
    kept = z != residual
    torch.testing.assert_close(z, torch.where(kept, residual + 2 * x, residual))
    assert torch.equal(torch.autograd.grad(z.sum(), x)[0], 2.0 * kept)
    same = vmap(function, randomness="same")(x.detach().expand(2, 4, 30), residual.detach().expand(2, 4, 30))
    assert torch.equal(same[0], same[1])


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_opcheck(p, device):
    residual, x = (t.requires_grad_() for t in make_inputs((3, 10), (3, 10), device=device))
    key = torch.tensor(2**40 + 3, device=device)
    torch.library.opcheck(torch.ops.fastattn.dropout_add.default, (residual, x, key, F32, F32, [3, 10], p, "triton"))


def test_offsets_pass_2_to_the_31(device):
    stride = 2**30 if device.type == "cpu" else 2**29 + 16
    far = torch.empty(stride * 4 + 64, dtype=F16, device=device).as_strided((5, 64), (stride, 1))
    (near,) = make_inputs((5, 64), dtype=F16, device=device)
    far.copy_(near)
    results = []
    for t in (far, near):
        torch.manual_seed(0)
        results.append(fastattn.dropout_add(t, t, 0.5, backend="triton"))
    assert torch.equal(*results)


X = torch.ones(2, 4)
LEAF = torch.ones(2, 4, requires_grad=True)
WRONG = [
    (lambda: fastattn.dropout_add(None, X), ArgumentTypeError, "dropout_add: `x` is None"),
    (lambda: fastattn.dropout_add(X, 1.0), ArgumentTypeError, "`residual` is a float"),
    (lambda: fastattn.dropout_add(X, X[:1]), ArgumentError, "`residual` has shape (1, 4) and `x` has (2, 4)"),
    (lambda: fastattn.dropout_add(X, X.half()), ArgumentTypeError, "residual must have x's or a wider one"),
    (lambda: fastattn.dropout_add(X.half(), X.bfloat16()), ArgumentTypeError, "`residual` has dtype bfloat16"),
    (lambda: fastattn.dropout_add(X, X, 1.5), ArgumentError, "`dropout_p` is 1.5"),
    (lambda: fastattn.dropout_add(X, X, "a"), ArgumentTypeError, "`dropout_p` is a str"),
    (lambda: fastattn.dropout_add(X, X, inplace=1), ArgumentTypeError, "`inplace` is an int"),
    (lambda: fastattn.dropout_add(X, LEAF, inplace=True), ArgumentError, "leaf that requires a gradient"),
    (lambda: fastattn.dropout_add(X, X[:1].expand(2, 4), inplace=True), ArgumentError, "overlaps itself"),
    (lambda: fastattn.dropout_add(X.double(), X.double(), backend="triton"), UnsupportedError, "dtype float64"),
]


@pytest.mark.parametrize(("call", "error", "says"), WRONG, ids=[says for _, _, says in WRONG])
def test_wrong_call_raises_one_sentence(call, error: type[FastattnError], says: str):
    with pytest.raises(error) as caught:
        call()
    assert says in str(caught.value)
