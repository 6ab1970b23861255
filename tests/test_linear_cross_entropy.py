"""linear_cross_entropy of every backend against float64, values, gradients and memory."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, jvp
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn import nn
from fastattn.errors import ArgumentError, ArgumentTypeError, FastattnError, UnsupportedError
from fastattn.testing import assert_close, make_inputs

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
N, E, V = 13, 16, 37
ALL = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 2.0}
CASES = {  # name -> (dtype, bias, class weight, probabilities, chunk_size, options)
    "plain": (F32, False, False, False, None, {}),
    "chunks": (F32, False, False, False, 4, {}),
    "chunks_of_one": (F32, True, True, False, 1, {}),
    "everything": (F32, True, True, False, 5, ALL),
    "probabilities": (F32, True, True, True, 5, ALL),
    "bf16": (BF16, True, False, False, None, {}),
    "bf16_chunks": (BF16, True, True, False, 4, ALL),
    "fp16_chunks": (F16, True, True, False, 4, {}),
}


@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("case", CASES)
def test_linear_cross_entropy(case, reduction, backend, device):
    dtype, with_bias, weighted, probabilities, chunk_size, options = CASES[case]
    tensors = make_inputs((N, E), (V, E), (V,), dtype=dtype, device=device)
    leaves = tensors if with_bias else tensors[:2]
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(0, V, (N,), generator=generator)
    target[3] = -100
    if probabilities:
        target = torch.rand(N, V, generator=generator).softmax(-1)
    target = target.to(device)
    class_weight = (torch.rand(V, generator=generator) + 0.5).to(device, dtype) if weighted else None

    def run(function, dtype):
        inputs = [t.detach().to(dtype).requires_grad_() for t in leaves]
        t = target.to(dtype) if probabilities else target
        loss = function(*inputs[:2], t, *inputs[2:], None if class_weight is None else class_weight.to(dtype))
        factor = torch.linspace(0.5, 2, loss.numel(), device=device).view(loss.shape).to(loss.dtype)
        return loss, *torch.autograd.grad(loss, inputs, factor)

    def with_backend(name, chunk=None):
        def function(hidden, weight, target, *rest):
            bias, class_weight = rest if len(rest) == 2 else (None, rest[0])
            return fastattn.linear_cross_entropy(
                hidden, weight, target, bias, class_weight=class_weight, reduction=reduction, chunk_size=chunk,
                backend=name, **options,
            )  # fmt: skip

        return function

    exact = run(with_backend("reference"), torch.float64)
    eager, actual = run(with_backend("eager"), dtype), run(with_backend(backend, chunk_size), dtype)
    for name, ours, truth, theirs in zip(("loss", "dhidden", "dweight", "dbias"), actual, exact, eager, strict=False):
        assert_close(ours, truth, theirs, name)


class Largest(TorchDispatchMode):
    """The most elements of a floating-point tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.is_floating_point():  # the interpreter copies storages, as bytes
                self.numel = max(self.numel, t.numel())
        return out


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_logits_are_never_held(reduction, dtype, device):
    """Below the operator nothing has N × V elements, nor more than a chunk of logits or weight."""
    from fastattn.backends.triton.linear_cross_entropy import launch
    from fastattn.spec import CrossEntropySpec, LinearCrossEntropySpec

    N, E, V, chunk = 96, 8, 64, 8
    hidden, weight = make_inputs((N, E), (V, E), dtype=dtype, device=device)
    target = torch.arange(N, device=device) % V
    spec = LinearCrossEntropySpec(CrossEntropySpec(dtype, dtype, torch.int64, reduction=reduction), chunk)
    losses = torch.empty(N, device=device)
    gradients = torch.empty_like(hidden), torch.empty_like(weight), None
    with Largest() as largest:
        launch(losses, gradients, hidden, weight, target, None, None, None, None, spec)
    assert largest.numel <= max(chunk * V, V * E, N * E)
    assert losses.isfinite().all()


def test_default_chunk_keeps_its_bound():
    from fastattn.backends.triton.linear_cross_entropy import CHUNK_BYTES, LEAST_ROWS, rows_of_chunk

    for V in (1, 1000, 32_000, 131_072, 262_144):
        for E in (1, 512, 4096):
            for size in (2, 4):
                rows = rows_of_chunk(1 << 20, V, E, size)
                assert rows == LEAST_ROWS or rows * V * size <= max(CHUNK_BYTES, V * E * size // 2)
                assert rows >= LEAST_ROWS


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_empty_and_one_row(backend, device):
    weight = torch.randn(V, E, device=device, requires_grad=True)
    nothing = torch.empty(0, E, device=device)
    target = torch.empty(0, dtype=torch.int64, device=device)
    loss = fastattn.linear_cross_entropy(nothing, weight, target, backend=backend)
    assert loss.isnan()
    total = fastattn.linear_cross_entropy(nothing, weight, target, reduction="sum", backend=backend)
    assert total == 0
    assert (torch.autograd.grad(total, weight)[0] == 0).all()
    one = torch.randn(E, device=device)
    loss = fastattn.linear_cross_entropy(one, weight, torch.tensor(3, device=device), reduction="none", backend=backend)
    expected = torch.nn.functional.cross_entropy(weight @ one, torch.tensor(3, device=device))
    torch.testing.assert_close(loss, expected)


def test_leading_dimensions(device):
    hidden, weight = make_inputs((2, 3, E), (V, E), device=device)
    target = torch.arange(6, device=device).view(2, 3)
    for reduction in ("none", "mean"):
        ours = fastattn.linear_cross_entropy(hidden, weight, target, reduction=reduction)
        logits = (hidden @ weight.T).flatten(0, 1)
        theirs = torch.nn.functional.cross_entropy(logits, target.flatten(), reduction=reduction)
        torch.testing.assert_close(ours, theirs.view(ours.shape))


def loss_of(backend):
    def function(hidden, weight, bias):
        target = torch.arange(5, device=hidden.device)
        options = {"z_loss": 0.01, "softcap": 3.0, "chunk_size": 2}
        return fastattn.linear_cross_entropy(hidden, weight, target, bias, backend=backend, **options)

    return function


def test_transforms_and_compile(device):
    inputs = make_inputs((5, 8), (9, 8), (9,), device=device)
    for f in (lambda f: grad(f, (0, 1, 2))(*inputs), lambda f: jvp(f, tuple(inputs), tuple(t.cos() for t in inputs))):
        torch.testing.assert_close(f(loss_of("triton")), f(loss_of("reference")))
    leaves = [t.requires_grad_() for t in inputs]
    compiled = torch.compile(loss_of("triton"), fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss_of("triton"))]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["linear_cross_entropy", "linear_cross_entropy_with_gradient"])
def test_opcheck(name, device):
    tensors = [t.requires_grad_() for t in make_inputs((5, 8), (9, 8), (9,), device=device)]
    target = torch.arange(5, device=device)
    wanted = [name.endswith("gradient")] * 3
    args = (*tensors[:2], target, tensors[2], None, F32, -100, "mean", 0.1, 0.0, None, 2, wanted, "triton")
    torch.library.opcheck(getattr(torch.ops.fastattn, name).default, args)


def test_double_backward_is_refused_by_name(device):
    leaves = [t.requires_grad_() for t in make_inputs((5, 8), (9, 8), (9,), device=device)]
    grads = torch.autograd.grad(loss_of("triton")(*leaves), leaves, create_graph=True)
    with pytest.raises(UnsupportedError, match="linear_cross_entropy: its gradient cannot be differentiated again"):
        sum(g.square().sum() for g in grads).backward()


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_autocast_gives_torchs_dtypes(backend, device):
    hidden, weight = make_inputs((5, 8), (9, 8), device=device)
    leaves = [t.requires_grad_() for t in (hidden, weight)]
    target = torch.arange(5, device=device)
    results = []
    for f in (
        lambda h, w: torch.nn.functional.cross_entropy(torch.nn.functional.linear(h, w), target),
        lambda h, w: fastattn.linear_cross_entropy(h, w, target, backend=backend),
    ):
        with torch.autocast(device.type, dtype=BF16):
            loss = f(*leaves)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    assert [t.dtype for t in results[0]] == [t.dtype for t in results[1]]
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


H, W, T = torch.zeros(3, 8), torch.zeros(5, 8), torch.tensor([0, 1, 2])
WRONG = {
    "width": ((H, W[:, :4], T), {}, ArgumentError, "`weight` (5, 4)"),
    "weight_dtype": ((H, W.double(), T), {}, ArgumentTypeError, "`weight` has dtype float64"),
    "bias_shape": ((H, W, T, torch.zeros(4)), {}, ArgumentError, "`bias` has shape (4,)"),
    "target_shape": ((H, W, T[:2]), {}, ArgumentError, "`target` has shape (2,)"),
    "target_class": ((H, W, T + 3), {}, ArgumentError, "`target` holds 5"),
    "class_weight": ((H, W, T), {"class_weight": torch.zeros(4)}, ArgumentError, "`class_weight` has shape (4,)"),
    "chunk_zero": ((H, W, T), {"chunk_size": 0}, ArgumentError, "`chunk_size` is 0"),
    "chunk_float": ((H, W, T), {"chunk_size": 2.0}, ArgumentTypeError, "`chunk_size` is a float"),
    "float64": ((H.double(), W.double(), T), {"backend": "triton"}, UnsupportedError, "dtype float64"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_call_raises_one_sentence(name):
    args, kwargs, error, says = WRONG[name]
    with pytest.raises(FastattnError) as caught:
        fastattn.linear_cross_entropy(*args, **kwargs)
    assert type(caught.value) is error
    assert says in str(caught.value)
    assert str(caught.value).endswith(".")


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyLoss"), reason="torch's is in 2.13 and later")
def test_module_is_torchs(device):
    theirs = torch.nn.LinearCrossEntropyLoss(8, 9, bias=True, weight=torch.rand(9), label_smoothing=0.1).to(device)
    module = nn.LinearCrossEntropyLoss(8, 9, bias=True, weight=torch.rand(9), label_smoothing=0.1).to(device)
    module.load_state_dict(theirs.state_dict())
    x, t = torch.randn(5, 8, device=device), torch.arange(5, device=device)
    torch.testing.assert_close(module(x, t), theirs(x, t))
