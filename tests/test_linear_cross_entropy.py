"""linear_cross_entropy of every backend against float64, values, gradients and memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import ONCE
from torch.func import grad, jvp
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn import nn
from fastattn.backends.triton import linear_cross_entropy as triton_backend
from fastattn.errors import ArgumentError, ArgumentIndexError, ArgumentTypeError, FastattnError, UnsupportedError
from fastattn.spec import CrossEntropySpec, LinearCrossEntropySpec
from fastattn.testing import assert_close, make_inputs, simulate_rounding

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


SLICED = {  # one chunk of 13 rows or two of 10 and 3, each in slices of 16, 16 and 5 of the 37 classes
    "plain": (F32, False, False, False, 13, {}),
    "smoothing": (F32, True, True, False, 13, {"label_smoothing": 0.3}),
    "z_loss": (F32, False, False, False, 10, {"z_loss": 0.1}),
    "softcap": (F32, True, False, False, 10, {"softcap": 1.5}),
    "everything": (F32, True, True, False, 10, ALL),
    "probabilities": (F32, False, False, True, 13, {}),
    "probabilities_everything": (F32, True, True, True, 10, ALL),
    "bf16": (BF16, False, False, False, 13, {}),
    "bf16_everything": (BF16, True, True, False, 10, ALL),
    "fp16": (F16, True, True, False, 10, {}),
}


@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("case", CASES)
def test_linear_cross_entropy(case, reduction, backend, device):
    check(*CASES[case], reduction, backend, device)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("case", SLICED)
def test_slices_of_the_classes(case, reduction, device, monkeypatch):
    """As if memory were short: the classes are walked through in slices, which do not divide their number."""
    monkeypatch.setattr(triton_backend, "CHUNK_BYTES", 1)
    dtype, _, _, _, chunk_size, _ = SLICED[case]
    assert triton_backend.chunk_of(N, V, E, dtype.itemsize, chunk_size) == (chunk_size, 16)
    check(*SLICED[case], reduction, "triton", device)


@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "everything"])
def test_slices_of_several_tiles(options, device, monkeypatch):
    """Against float64, and as close to it as without slices."""
    V = 45_000
    hidden, weight = make_inputs((3, 2), (V, 2), device=device)
    target = torch.tensor([V - 1, 17, 20_001], device=device)
    results = []
    for classes, dtype in ((20_000, F32), (V, F32), (V, torch.float64)):
        monkeypatch.setattr(triton_backend, "CHUNK_BYTES", 3 * classes * F32.itemsize)
        assert triton_backend.chunk_of(3, V, 2, F32.itemsize, 3) == (3, classes)
        leaves = [t.detach().to(dtype).requires_grad_() for t in (hidden, weight)]
        loss = fastattn.linear_cross_entropy(*leaves, target, chunk_size=3, **options)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for name, sliced, whole, exact in zip(("loss", "dhidden", "dweight"), *results, strict=True):
        assert_close(sliced, exact, whole, name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("where", [slice(0, 16), slice(16, 20), slice(0, V)], ids=["first", "second", "all"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_non_finite_slices_are_as_torch_has_them(smoothing, where, value, device, monkeypatch):
    monkeypatch.setattr(triton_backend, "CHUNK_BYTES", 1)
    assert triton_backend.chunk_of(N, V, E, 4, N) == (N, 16)
    hidden, weight = make_inputs((N, E), (V, E), device=device)
    bias = torch.zeros(V, device=device)
    bias[where] = value
    target = torch.arange(0, V, 3, device=device)  # of every slice

    def theirs(hidden, weight, target, bias, **options):
        return torch.nn.functional.cross_entropy(torch.nn.functional.linear(hidden, weight, bias), target, **options)

    results = []
    for f in (theirs, lambda *args, **kwargs: fastattn.linear_cross_entropy(*args, chunk_size=N, **kwargs)):
        leaf = hidden.clone().requires_grad_()
        losses = f(leaf, weight, target, bias, reduction="none", label_smoothing=smoothing)
        results.append((losses, torch.autograd.grad(losses.sum(), leaf)[0]))
    torch.testing.assert_close(*results, equal_nan=True)


@settings(max_examples=20, derandomize=True, deadline=None, database=None)
@given(
    dtype=st.sampled_from([F32, F16, BF16]),
    with_bias=st.booleans(),
    weighted=st.booleans(),
    probabilities=st.booleans(),
    chunk_size=st.sampled_from([None, 1, 5, 10, N, 100]),
    options=st.fixed_dictionaries(
        {},
        optional={
            "label_smoothing": st.sampled_from([0.1, 1.0]),
            "z_loss": st.sampled_from([1e-3, 0.5]),
            "softcap": st.sampled_from([0.5, 30.0]),
        },
    ),
    reduction=st.sampled_from(["none", "mean", "sum"]),
    budget=st.sampled_from([1, triton_backend.CHUNK_BYTES]),
)
def test_any_call(budget, device, **call):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_backend, "CHUNK_BYTES", budget)
        check(**call, backend="triton", device=device)


def check(dtype, with_bias, weighted, probabilities, chunk_size, options, reduction, backend, device, under=ONCE):
    """Loss and gradients of one backend, held to float64."""
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

    rows = N if backend == "eager" or chunk_size is None else chunk_size

    def theirs(hidden, weight, target, *rest):
        """Of torch's products, which round differently for one row and for many: of as many as the backend takes."""
        bias, class_weight = rest if len(rest) == 2 else (None, rest[0])
        logits = torch.cat([torch.nn.functional.linear(h, weight, bias) for h in hidden.split(rows)])
        return fastattn.cross_entropy(logits, target, class_weight, reduction=reduction, backend="eager", **options)

    exact = run(with_backend("reference"), torch.float64)
    rounded = simulate_rounding(lambda: run(theirs, dtype))
    names = ("loss", "dhidden", "dweight", "dbias")
    for context in under:
        with context:
            actual = run(with_backend(backend, chunk_size), dtype)
            for name, ours, truth, same_dtype in zip(names, actual, exact, rounded, strict=False):
                assert_close(ours, truth, same_dtype, name)


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
@pytest.mark.parametrize("sliced", [False, True], ids=["whole", "sliced"])
def test_logits_are_never_held(sliced, reduction, dtype, device, monkeypatch):
    """Below the operator nothing has N × V elements, nor more than the logits that are held at once, or weight."""
    N, E, V, chunk = 96, 2, 200, 8
    budget = 64 * chunk if sliced else V * chunk
    monkeypatch.setattr(triton_backend, "CHUNK_BYTES", budget * dtype.itemsize)
    hidden, weight = make_inputs((N, E), (V, E), dtype=dtype, device=device)
    target = torch.arange(N, device=device) % V
    spec = LinearCrossEntropySpec(CrossEntropySpec(dtype, dtype, torch.int64, reduction=reduction), chunk)
    losses = torch.empty(N, device=device)
    gradients = torch.empty_like(hidden), torch.empty_like(weight), None
    with Largest() as largest:
        triton_backend.launch(losses, gradients, hidden, weight, target, None, None, None, None, spec)
    assert largest.numel == budget
    assert budget >= max(V * E, N * E)
    assert losses.isfinite().all()


def test_default_chunk_keeps_its_bound():
    """The sizes of vocabularies in use, and beyond."""
    least = triton_backend.LEAST_ROWS
    for V in (0, 1, 1000, 32_000, 131_072, 262_144, 10_000_001):
        for E in (1, 512, 4096):
            for size in (2, 4):
                rows, classes = triton_backend.chunk_of(1 << 20, V, E, size, None)
                assert rows * classes * size <= max(triton_backend.CHUNK_BYTES, V * E * size // 2)
                assert rows == least or (rows > least and classes == V)
                assert classes == V or classes % triton_backend.LEAST_CLASSES == 0
    assert triton_backend.chunk_of(100, 262_144, 64, 2, 50) == (50, 262_144)
    assert triton_backend.chunk_of(100, 1 << 30, 1, 2, 50) == (50, (1 << 29) // 50 // 16 * 16)
    assert triton_backend.chunk_of(1 << 30, 1000, 1, 2, 1 << 30) == (1 << 30, 16)


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
    loss = loss_of("triton")(*leaves)
    with pytest.raises(UnsupportedError, match=r"linear_cross_entropy: .*its gradient cannot be differentiated again"):
        torch.autograd.grad(torch.autograd.grad(loss, leaves, create_graph=True)[0].square().sum(), leaves)


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
    torch.testing.assert_close(*results, rtol=torch.finfo(BF16).eps, atol=torch.finfo(BF16).eps)


def of_torchs_sample(sample):
    """Our keywords for torch's: (hidden, weight, target, bias), options."""
    kwargs = dict(sample.kwargs)
    bias, class_weight = kwargs.pop("linear_bias", None), kwargs.pop("weight", None)
    options = kwargs.pop("options", None)
    chunk_size = None if options is None else options.batch_chunk_size
    return (sample.input, *sample.args, bias), {"class_weight": class_weight, "chunk_size": chunk_size, **kwargs}


TORCHS = [op for op in op_db if op.name == "nn.functional.linear_cross_entropy"]  # of torch 2.13 and later


@pytest.mark.parametrize("dtype", [F32, torch.float64], ids=str)
@pytest.mark.parametrize("op", TORCHS, ids=lambda op: op.variant_test_name or "plain")
def test_torchs_samples(op, dtype, device):
    """op_db's samples; those whose classes have several dimensions are refused."""
    torch.manual_seed(0)
    samples = list(op.sample_inputs(device, dtype, requires_grad=True))
    accepted = [sample for sample in samples if sample.args[0].dim() == 2]
    assert len(accepted) > 30
    for sample in accepted[:: 1 if dtype == torch.float64 else 3]:
        args, options = of_torchs_sample(sample)
        leaves = [t for t in args if t is not None and t.requires_grad]
        results = []
        for loss in (
            op.op(sample.input, *sample.args, **sample.kwargs),
            fastattn.linear_cross_entropy(*args, **options),
        ):
            results.append((loss, torch.autograd.grad(loss.sum(), leaves)))
        torch.testing.assert_close(*results, equal_nan=True)
    for sample in samples:
        if sample.args[0].dim() > 2:
            args, options = of_torchs_sample(sample)
            with pytest.raises(ArgumentError, match=r"they must be \(…, E\) and \(V, E\)"):
                fastattn.linear_cross_entropy(*args, **options)


H, W, T = torch.zeros(3, 8), torch.zeros(5, 8), torch.tensor([0, 1, 2])
WRONG = {
    "width": ((H, W[:, :4], T), {}, ArgumentError, "`weight` (5, 4)"),
    "weight_dtype": ((H, W.double(), T), {}, ArgumentTypeError, "`weight` has dtype float64"),
    "bias_shape": ((H, W, T, torch.zeros(4)), {}, ArgumentError, "`bias` has shape (4,)"),
    "target_shape": ((H, W, T[:2]), {}, ArgumentError, "`target` has shape (2,)"),
    "target_class": ((H, W, T + 3), {}, ArgumentIndexError, "`target` holds 5"),
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


@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_rows_hold_whatever_they_hold(reduction, backend, device):
    hidden, weight = make_inputs((5, 8), (9, 8), device=device)
    target = torch.tensor([0, -100, 3, 4, -100], device=device)
    results = []
    for garbage in (0.0, torch.nan):
        leaves = [
            torch.where(target[:, None] == -100, garbage, hidden).requires_grad_(),
            weight.clone().requires_grad_(),
        ]
        loss = fastattn.linear_cross_entropy(*leaves, target, reduction=reduction, chunk_size=2, backend=backend)
        results.append((loss, *torch.autograd.grad(loss.sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
