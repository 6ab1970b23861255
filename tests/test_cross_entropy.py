"""cross_entropy of every backend against float64, values and gradients, and at its edges."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from module_parity import run
from parity import ONCE, Contexts, on_backends
from torch import Tensor
from torch.func import grad, hessian, jvp, vmap
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import fastattn
from fastattn import backends, nn
from fastattn.errors import ArgumentError, ArgumentIndexError, ArgumentTypeError, FastattnError, UnsupportedError
from fastattn.testing import assert_close, make_inputs, simulate_rounding

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
BACKENDS = pytest.mark.parametrize("backend", ["triton", "eager"])


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = F32
    probabilities: bool = False
    weight: bool = False
    ignored: int | None = None  # how many rows
    layout: str = "contiguous"
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


ALL = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 2.0}
CASES = [
    *(Case(f"V{V}", (3, V)) for V in (1, 2, 7, 1000, 20_001)),
    Case("one_dimension", (33,)),
    Case("images", (2, 7, 3, 4), ignored=3),
    Case("images_probabilities", (2, 7, 3, 4), probabilities=True, weight=True),
    Case("five_dimensions", (2, 5, 2, 3, 2)),
    Case("strided", (6, 20), layout="strided"),
    Case("many_rows", (130, 20), ignored=40),
    Case("weight", (9, 40), weight=True, ignored=2),
    Case("smoothing", (9, 40), ignored=2, options={"label_smoothing": 0.2}),
    Case("smoothing_weight", (9, 40), weight=True, ignored=2, options={"label_smoothing": 0.2}),
    Case("smoothing_wide", (5, 4097), options={"label_smoothing": 0.1}),
    Case("smoothing_wide_weight", (5, 4097), weight=True, options={"label_smoothing": 0.1}),
    Case("z_loss", (9, 40), ignored=2, options={"z_loss": 0.1}),
    Case("softcap", (9, 40), ignored=2, options={"softcap": 1.5}),
    Case("everything", (9, 40), weight=True, ignored=2, options=ALL),
    Case("everything_looped", (2, 20_000), weight=True, ignored=1, options=ALL),
    Case("probabilities", (9, 40), probabilities=True),
    Case("probabilities_everything", (9, 40), probabilities=True, weight=True, options=ALL),
    Case("probabilities_looped", (2, 20_000), probabilities=True, options=ALL),
    *(Case(f"{n}_{V}", (9, V), dtype=d, ignored=1) for d, n in ((F16, "fp16"), (BF16, "bf16")) for V in (50, 3000)),
    *(Case(f"{n}_everything", (9, 60), dtype=d, weight=True, options=ALL) for d, n in ((F16, "fp16"), (BF16, "bf16"))),
]


def inputs_of(case: Case, device) -> tuple[Tensor, Tensor, Tensor | None]:
    dim = min(1, len(case.shape) - 1)
    (x,) = make_inputs(case.shape, dtype=case.dtype, device=device, layout=case.layout)
    V = case.shape[dim]
    generator = torch.Generator().manual_seed(3)
    if case.probabilities:
        target = torch.rand(case.shape, generator=generator).softmax(dim).to(device, case.dtype)
    else:
        rows = (*case.shape[:dim], *case.shape[dim + 1 :])
        target = torch.randint(0, V, rows, generator=generator)
        target.view(-1)[: case.ignored or 0] = -100
        target = target.to(device)
    weight = (torch.rand(V, generator=generator) + 0.5).to(device, case.dtype) if case.weight else None
    return x, target, weight


def cuda_has(case: Case) -> bool:
    return not case.probabilities and not (case.weight and case.options.get("label_smoothing"))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(("case", "backend"), on_backends(CASES, cuda=cuda_has), ids=str)
def test_cross_entropy(case: Case, reduction: str, backend: str, device: torch.device):
    check(case, reduction, backend, device)


@pytest.mark.parametrize("backend", ["triton", "cpu", "cuda"])
@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
def test_smoothed_loss_is_right_to_its_rounding(scale, backend, device):
    """The term of the class is 9 · 4097 times one that smoothing spreads: in one sum with it those would be rounded."""
    if why := backends.get(backend).available(device):
        pytest.skip(why)
    V, (x,) = 4097, make_inputs((33, 4097), device=device)
    x, t = x * scale, torch.arange(33, device=device) * 123
    exact = fastattn.cross_entropy(x.double(), t, label_smoothing=0.1, reduction="none", backend="reference")
    loss = fastattn.cross_entropy(x, t, label_smoothing=0.1, reduction="none", backend=backend)
    assert (loss / exact - 1).square().mean().sqrt() < 7e-8  # 2^-24 is 6e-8
    if backend != "cuda":
        weight, identity = torch.linspace(0.5, 2.0, V, device=device), torch.eye(33, device=device)
        options = {"label_smoothing": 0.1, "reduction": "none"}
        exact = fastattn.cross_entropy(x.double(), t, weight.double(), **options, backend="reference")
        rows = x.T.contiguous()
        loss = fastattn.linear_cross_entropy(identity, rows, t, class_weight=weight, **options, backend=backend)
        assert (loss / exact - 1).square().mean().sqrt() < 7e-8


@pytest.mark.parametrize("backend", ["triton", "cpu", "cuda"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_gradient_of_rows_is_rounded_once(dtype, backend, device):
    """Each row has a factor: every entry is the float64 gradient rounded to its dtype, or its neighbour."""
    if why := backends.get(backend).available(device):
        pytest.skip(why)
    torch.manual_seed(0)
    x, t = (torch.randn(40, 100, device=device) * 2).to(dtype), torch.arange(40, device=device)
    weight, factor = torch.rand(100, device=device) + 0.1, torch.randn(40, device=device).to(dtype)

    def gradient(x, backend, weight):
        leaf = x.requires_grad_()
        loss = fastattn.cross_entropy(leaf, t, weight, reduction="none", backend=backend)
        return torch.autograd.grad(loss, leaf, factor.to(loss.dtype))[0]

    found = gradient(x.clone(), backend, weight).double()
    exact = gradient(x.double(), "reference", weight.double())
    half_ulp = torch.finfo(dtype).eps / 2
    normal = exact.abs() > torch.finfo(dtype).tiny  # smaller numbers are coarser, and so few in bfloat16
    off = ((found - exact).abs() / exact.abs())[normal]
    assert off.max() <= 1.01 * half_ulp
    assert off.square().mean().sqrt() <= 0.45 * half_ulp  # 0.42 of it is what one rounding leaves
    assert ((found - exact).abs()[~normal] <= torch.finfo(dtype).smallest_normal * half_ulp * 1.01).all()


@pytest.mark.parametrize("backend", ["triton", "cpu", "eager"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")], ids=str)
def test_a_logit_that_is_not_finite_is_as_torch_has_it(value, smoothing, backend, device):
    """At the class of a row and beside it."""
    if why := backends.get(backend).available(device):
        pytest.skip(why)
    (x,), t = make_inputs((4, 30), device=device), torch.tensor([3, 7, 3, 0], device=device)
    x[:3, 3] = value
    results = []
    for f in (torch.nn.functional.cross_entropy, partial(fastattn.cross_entropy, backend=backend)):
        leaf = x.clone().requires_grad_()
        losses = f(leaf, t, label_smoothing=smoothing, reduction="none")
        results.append((losses, torch.autograd.grad(losses.sum(), leaf)[0]))
    torch.testing.assert_close(*results, equal_nan=True)


@pytest.mark.parametrize("backend", ["triton", "cpu", "cuda"])
def test_gradient_is_right_where_probability_and_target_cancel(backend, device):
    """With label smoothing p is close to ε / V somewhere in every row: an error of p shows there."""
    if why := backends.get(backend).available(device):
        pytest.skip(why)
    x = torch.randn(63, 41, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    t = torch.arange(63, device=device).remainder(41)

    def gradient(x, backend):
        leaf = x.requires_grad_()
        loss = fastattn.cross_entropy(leaf, t, label_smoothing=0.2, reduction="sum", backend=backend)
        return torch.autograd.grad(loss, leaf)[0].double()

    exact = gradient(x.double(), "reference")
    off = (gradient(x.clone(), backend) - exact).abs()
    assert (off <= 1e-8 + torch.finfo(BF16).eps / 2 * 1.01 * exact.abs()).all()


@st.composite
def calls(draw) -> tuple[Case, str]:
    """A case of any combination of options, and a reduction."""
    V = draw(st.sampled_from([1, 2, 5, 31, 128, 1100]))
    shape = draw(st.sampled_from([(V,), (0, V), (1, V), (7, V), (2, V, 3), (2, V, 2, 3)]))
    rows = math.prod(shape) // V
    present = {
        "label_smoothing": st.sampled_from([0.1, 1.0]),
        "z_loss": st.sampled_from([1e-3, 0.5]),
        "softcap": st.sampled_from([0.5, 30.0]),
        "inplace_backward": st.just(True),
    }
    chosen = draw(st.sets(st.sampled_from(sorted(present))))
    case = Case(
        "drawn", shape, draw(st.sampled_from([F32, F16, BF16])), draw(st.booleans()), draw(st.booleans()),
        draw(st.integers(0, rows)), draw(st.sampled_from(["contiguous", "strided"])),
        {name: draw(present[name]) for name in sorted(chosen)},
    )  # fmt: skip
    return case, draw(st.sampled_from(["none", "mean", "sum"]))


@settings(max_examples=50, derandomize=True, deadline=None, database=None)
@given(call=calls())
def test_any_call(call, device: torch.device):
    check(*call, "triton", device)


def check(case: Case, reduction: str, backend: str, device: torch.device, under: Contexts = ONCE) -> None:
    """Loss and gradient of one backend, held to float64."""
    x, target, weight = inputs_of(case, device)

    def run(backend, dtype) -> tuple[Tensor, Tensor]:
        leaf = x.detach().to(dtype).requires_grad_()
        logits = leaf.clone() if case.options.get("inplace_backward") else leaf
        t, w = target.to(dtype) if case.probabilities else target, None if weight is None else weight.to(dtype)
        loss = fastattn.cross_entropy(logits, t, w, reduction=reduction, backend=backend, **case.options)
        factor = torch.linspace(0.5, 2, loss.numel(), device=device).view(loss.shape).to(dtype)
        return loss, torch.autograd.grad(loss, leaf, factor)[0]

    def plain(dtype) -> tuple[Tensor, Tensor]:
        """Eager torch in one dtype."""
        leaf = x.detach().clone().requires_grad_()
        cap = case.options.get("softcap")
        s = leaf if cap is None else cap * torch.tanh(leaf / cap)
        dim = min(1, s.dim() - 1)
        smoothing = case.options.get("label_smoothing", 0.0)
        loss = torch.nn.functional.cross_entropy(s, target, weight, reduction=reduction, label_smoothing=smoothing)
        if z := case.options.get("z_loss"):
            penalty = z * s.logsumexp(dim).square()
            counts = torch.ones_like(penalty, dtype=torch.bool) if case.probabilities else target != -100
            penalty = torch.where(counts, penalty, 0.0)
            if reduction == "mean":
                by = (
                    counts
                    if weight is None or case.probabilities
                    else torch.where(counts, weight[target.clamp(min=0)], 0.0)
                )
                loss = loss + penalty.sum() / by.sum()
            else:
                loss = loss + (penalty if reduction == "none" else penalty.sum())
        factor = torch.linspace(0.5, 2, loss.numel(), device=device).view(loss.shape).to(dtype)
        return loss, torch.autograd.grad(loss, leaf, factor)[0]

    exact, rounded = run("reference", torch.float64), simulate_rounding(lambda: plain(case.dtype))
    for context in under:
        with context:
            actual = run(backend, case.dtype)
            for name, ours, truth, same_dtype in zip(("loss", "dlogits"), actual, exact, rounded, strict=True):
                assert_close(ours, truth, same_dtype, name)


@BACKENDS
def test_ignored_everywhere_and_empty_are_nan_in_the_mean(backend, device):
    x = torch.randn(3, 5, device=device, requires_grad=True)
    ignored = torch.full((3,), -100, device=device)
    assert fastattn.cross_entropy(x, ignored, backend=backend).isnan()
    assert fastattn.cross_entropy(x, ignored, reduction="sum", backend=backend) == 0
    nothing, of = torch.empty(0, 5, device=device), torch.empty(0, dtype=torch.int64, device=device)
    assert fastattn.cross_entropy(nothing, of, backend=backend).isnan()
    assert fastattn.cross_entropy(nothing, of, reduction="sum", backend=backend) == 0
    assert fastattn.cross_entropy(nothing, of, reduction="none", backend=backend).shape == (0,)
    assert fastattn.cross_entropy(nothing, nothing, backend=backend).isnan()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("V", [40, 20_000])
def test_non_finite_rows_are_as_torch_has_them(value, V, device):
    (x,) = make_inputs((3, V), device=device)
    x[1, 5] = value
    target = torch.tensor([1, 5, 2], device=device)
    for t in (target, torch.tensor([1, 6, 2], device=device)):
        results = []
        for f in (torch.nn.functional.cross_entropy, fastattn.cross_entropy):
            leaf = x.clone().requires_grad_()
            losses = f(leaf, t, reduction="none")
            results.append((losses, torch.autograd.grad(losses, leaf, torch.ones_like(losses))[0]))
        torch.testing.assert_close(*results, equal_nan=True)


def test_ignored_row_is_not_read(device):
    x = torch.randn(3, 50, device=device)
    x[1] = math.nan
    x.requires_grad_()
    loss = fastattn.cross_entropy(x, torch.tensor([1, -100, 2], device=device), backend="triton")
    (dx,) = torch.autograd.grad(loss, x)
    assert loss.isfinite()
    assert (dx[1] == 0).all()


@pytest.mark.parametrize("bad", [50, -1, 1 << 40])
def test_class_that_does_not_exist_is_never_a_loss_of_zero(bad, device):
    """Through the operator, which looks at nothing, NaN; through the function, for a CPU tensor, an error."""
    from fastattn.ops.cross_entropy import cross_entropy_with_gradient
    from fastattn.spec import CrossEntropySpec

    x, t = torch.randn(3, 50, device=device), torch.tensor([1, bad, 2], device=device)
    spec = CrossEntropySpec(F32, F32, torch.int64, reduction="none", gradient=True)
    dx, losses = cross_entropy_with_gradient((x, t, None), spec, "triton")
    assert losses.isnan().tolist() == [False, True, False]
    assert dx.isnan().all(1).tolist() == [False, True, False]
    with pytest.raises(ArgumentError, match=f"`target` holds {bad}; it must hold classes from 0 to 49"):
        fastattn.cross_entropy(x.cpu(), t.cpu())


ASSERTED = """
import dataclasses, sys
import torch
import fastattn
from triton import knobs
from triton.runtime.interpreter import interpreter_builder

assert knobs.runtime.debug  # what the interpreter, unlike the compiler, does not pass on
interpreter_builder.options = dataclasses.replace(interpreter_builder.options, debug=True)
device, reduction = sys.argv[1:3]
x, target = torch.zeros(3, 5, device=device), torch.tensor([1, int(sys.argv[3]), 2], device=device)
options = torch.float32, -100, reduction, 0.0, 0.0, None, False, "triton"
print(torch.ops.fastattn.cross_entropy(x, target, None, *options)[0].tolist())
"""


@pytest.mark.parametrize(("bad", "reduction"), [(5, "none"), (-1, "mean"), (4, "mean")])
def test_kernel_asserts_that_classes_exist_if_triton_is_told_to_debug(bad, reduction, device):
    """In a process of its own, which on a GPU an assertion ends; of classes 0 to 4 the last is right."""
    environment = {**os.environ, "TRITON_DEBUG": "1", "TRITON_INTERPRET": str(int(device.type == "cpu"))}
    command = [sys.executable, "-c", ASSERTED, device.type, reduction, str(bad)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (bad == 4), done.stderr
    assert ("cross_entropy: a target is neither a class nor ignore_index" in done.stderr) == (bad != 4)


def test_in_place(device):
    leaf = torch.randn(6, 50, device=device, requires_grad=True)
    target = torch.arange(6, device=device)
    expected = torch.autograd.grad(fastattn.cross_entropy(leaf * 2, target, backend="triton"), leaf)[0]
    logits = leaf * 2
    version = logits._version
    loss = fastattn.cross_entropy(logits.view(6, 50), target, inplace_backward=True, backend="triton")
    assert logits._version > version
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], expected)
    assert torch.equal(logits * 2, expected)

    logits = leaf.exp()  # whose backward reads it
    loss = fastattn.cross_entropy(logits, target, inplace_backward=True, backend="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_logits_are_left_alone_and_the_gradient_is_not_copied(device):
    x = torch.randn(4, 30, device=device, requires_grad=True)
    before = x.detach().clone()
    loss = fastattn.cross_entropy(x, torch.arange(4, device=device), backend="triton")
    saved = loss.grad_fn.saved_tensors[0].data_ptr()
    loss.backward()
    assert torch.equal(x, before)
    assert x.grad.data_ptr() == saved


def test_graph_that_is_kept_gives_the_same_twice(device):
    x = torch.randn(4, 30, device=device, requires_grad=True)
    loss = fastattn.cross_entropy(x, torch.arange(4, device=device), backend="triton")
    first = torch.autograd.grad(loss, x, torch.tensor(3.0, device=device), retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, x, torch.tensor(3.0, device=device))[0], first)


@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize(
    ("shape", "options"),
    [((20_000, 30), {}), ((8, 3000), {"label_smoothing": 0.5}), ((20_000, 3), {"label_smoothing": 0.1})],
)
def test_float16_losses_are_not_summed_in_float16(shape, options, backend, device):
    """torch's mean is inf on a CPU."""
    (x,) = make_inputs(shape, dtype=torch.float16, device=device)
    target = torch.arange(shape[0], device=device) % shape[1]
    loss = fastattn.cross_entropy(x, target, **options, backend=backend)
    exact = torch.nn.functional.cross_entropy(x.double(), target, **options)
    torch.testing.assert_close(loss.double(), exact, rtol=torch.finfo(torch.float16).eps, atol=0.0)


def test_scaled_float16_gradients_do_not_vanish(device):
    """With a loss scale of 2^16 over many rows; each entry, relative to itself."""
    x = torch.randn(256, 64, device=device).half().requires_grad_()
    target = torch.arange(256, device=device) % 64
    scale = torch.tensor(2.0**15, device=device).half()
    actual = torch.autograd.grad(fastattn.cross_entropy(x, target, backend="triton"), x, scale)[0]
    double = x.detach().double().requires_grad_()
    exact = torch.autograd.grad(fastattn.cross_entropy(double, target) * scale, double)[0]
    torch.testing.assert_close(actual.double(), exact, rtol=2 * torch.finfo(torch.float16).eps, atol=0.0)


def ours(x, t, w=None):
    return fastattn.cross_entropy(x, t, w, label_smoothing=0.1, z_loss=0.01, backend="triton")


def reference(x, t, w=None):
    return fastattn.cross_entropy(x, t, w, label_smoothing=0.1, z_loss=0.01, backend="reference")


def test_transforms(device):
    x, t = torch.randn(3, 4, 9, device=device), torch.arange(4, device=device)
    torch.testing.assert_close(grad(ours)(x[0], t), grad(reference)(x[0], t))
    torch.testing.assert_close(hessian(ours)(x[0], t), hessian(reference)(x[0], t))
    torch.testing.assert_close(vmap(ours, (0, None))(x, t), torch.stack([reference(each, t) for each in x]))
    torch.testing.assert_close(vmap(grad(ours), (0, None))(x, t), torch.stack([grad(reference)(e, t) for e in x]))
    tangent = x[0].cos()
    results = [jvp(lambda x, f=f: f(x, t), (x[0],), (tangent,)) for f in (ours, reference)]
    torch.testing.assert_close(*results)


KEPT_GRADIENTS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "weighted": {"weight": torch.tensor([0.5, 0.0, 2.0, 1.0, 3.0, 0.25, 1.0, 4.0, 1.5])},
    "smoothed": {"label_smoothing": 0.3},
    "smoothed_and_weighted": {
        "weight": torch.tensor([0.5, 0.0, 2.0, 1.0, 3.0, 0.25, 1.0, 4.0, 1.5]),
        "label_smoothing": 0.3,
    },
}


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
@pytest.mark.parametrize("case", KEPT_GRADIENTS)
def test_gradient_is_differentiated_again_from_what_is_kept(case, backend, device):
    """To the third order, with ignored rows, far scores and classes without weight, in each layout of the logits."""
    if why := backends.get(backend).available(device):
        pytest.skip(why)
    if backend == "cuda" and case == "smoothed_and_weighted":
        pytest.skip("the kernel has no weight together with label_smoothing")
    for shape in ((9,), (6, 9), (4, 9, 3)):
        rows = (*shape[:1], *shape[2:]) if len(shape) > 1 else ()
        x = make_inputs(shape, device=device)[0].double() * 4.0
        t = torch.arange(math.prod(rows), device=device).remainder(9).reshape(rows)
        ignore_index = 4 if rows else -100
        options = {k: v.to(device) if torch.is_tensor(v) else v for k, v in KEPT_GRADIENTS[case].items()}
        exact_options = {k: v.double() if torch.is_tensor(v) else v for k, v in options.items()}

        def orders(x, backend, options, t=t, ignore_index=ignore_index):
            loss = fastattn.cross_entropy(x, t, ignore_index=ignore_index, backend=backend, **options)
            u = torch.linspace(-1.0, 2.0, x.numel(), dtype=x.dtype, device=x.device).reshape(x.shape)
            y, found = (loss * torch.arange(1, loss.numel() + 1, device=x.device).reshape(loss.shape)).sum(), []
            for _ in range(3):
                (g,) = torch.autograd.grad(y, x, create_graph=True)
                found.append(g.detach())
                y = (g * u).sum()
            return found

        exact = orders(x.clone().requires_grad_(), "reference", exact_options)
        found = orders(x.float().requires_grad_(), backend, options)
        largest = max(1.0, *(right.abs().max().item() for right in exact))
        for ours, right in zip(found, exact, strict=True):
            # Half an ulp of a score of 8 to 16 is 4 EPS of its e^s.
            bound = 4 * torch.finfo(F32).eps * largest
            torch.testing.assert_close(ours.double(), right, rtol=0.0, atol=bound)


def test_gradient_is_differentiated_again_at_any_size():
    """A call that is small enough for torch's own operation, and one that is not, give the same to the same request."""
    for rows in (16, 600):
        x, t = torch.randn(rows, 512, requires_grad=True), torch.arange(rows) % 512
        second = []
        for backend in (None, "eager"):
            (g,) = torch.autograd.grad(fastattn.cross_entropy(x, t, backend=backend), x, create_graph=True)
            second.append(torch.autograd.grad((g * x.detach().cos()).sum(), x)[0])
        torch.testing.assert_close(*second)


def test_second_derivative_in_bfloat16_has_two_roundings(device):
    """The kept gradient is rounded to half an ulp, and so is the result."""
    x, u = (t.bfloat16() for t in make_inputs((40, 100), (40, 100), device=device))
    t = torch.arange(40, device=device)

    def second(x, backend):
        leaf = (2 * x).requires_grad_()
        (g,) = torch.autograd.grad(fastattn.cross_entropy(leaf, t, backend=backend), leaf, create_graph=True)
        return torch.autograd.grad((g * u.to(x.dtype)).sum(), leaf)[0].double()

    exact = second(x.double(), "reference")
    for backend in ("triton", "cpu"):
        if backends.get(backend).available(device) is None:
            error = second(x, backend) - exact
            half_ulp = torch.finfo(BF16).eps / 2
            assert error.square().mean() <= 2 * half_ulp**2 * exact.square().mean()


@pytest.mark.parametrize("refused", ["softcap", "z_loss", "probabilities", "inplace_backward"])
def test_no_second_derivative_is_silently_zero(refused, device):
    """Refused before it can be asked for, since the loss itself leads to the logits."""
    (x,) = make_inputs((3, 9), device=device)
    t = torch.rand(3, 9, device=device) if refused == "probabilities" else torch.arange(3, device=device)
    options = {"softcap": 5.0, "z_loss": 0.1, "inplace_backward": True}

    def loss(x):
        given = {refused: options[refused]} if refused in options else {}
        return fastattn.cross_entropy(x * 1.0, t, backend="triton", **given)

    with pytest.raises(UnsupportedError, match=r"cross_entropy: create_graph=True .* cannot be differentiated again"):
        torch.autograd.functional.hessian(loss, x)
    value = loss(leaf := x.requires_grad_())
    with pytest.raises(UnsupportedError, match="create_graph=True"):
        torch.autograd.grad(value, leaf, create_graph=True)


@pytest.mark.parametrize("probabilities", [False, True])
def test_compile(probabilities, device):
    x = torch.randn(6, 9, device=device, requires_grad=True)
    t = torch.rand(6, 9, device=device) if probabilities else torch.arange(6, device=device)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    results = [(loss := f(x, t), torch.autograd.grad(loss, x)[0]) for f in (compiled, ours)]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("gradient", [False, True])
def test_opcheck(gradient, device):
    name = "cross_entropy_with_gradient" if gradient else "cross_entropy"
    op = getattr(torch.ops.fastattn, name).default
    x, t, w = torch.randn(6, 9, device=device, requires_grad=True), torch.arange(6, device=device), torch.rand(9)
    for reduction in ("mean", "none"):
        args = (x, t, w.to(device), F32, -100, reduction, 0.1, 0.01, None, gradient, "triton")
        torch.library.opcheck(op, args)


@BACKENDS
@pytest.mark.parametrize("dtype", [F16, BF16, F32, torch.float64], ids=str)
def test_autocast_gives_torchs_dtypes(dtype, backend, device):
    backend = "eager" if dtype == torch.float64 else backend
    results = []
    for f in (torch.nn.functional.cross_entropy, lambda x, t: fastattn.cross_entropy(x, t, backend=backend)):
        x = torch.randn(3, 9, device=device, dtype=dtype, requires_grad=True)
        with torch.autocast(device.type, dtype=BF16):
            loss = f(x, torch.arange(3, device=device))
        loss.backward()
        results.append((loss.dtype, x.grad.dtype))
    assert results[0] == results[1]


def test_offsets_pass_2_to_the_31(device):
    stride = 2**30 if device.type == "cpu" else 2**29 + 16
    far = torch.empty(stride * 4 + 64, dtype=F16, device=device).as_strided((5, 64), (stride, 1))
    near = make_inputs((5, 64), dtype=F16, device=device)[0]
    far.copy_(near)
    t = torch.arange(5, device=device)
    assert torch.equal(*(fastattn.cross_entropy(x, t, reduction="none", backend="triton") for x in (far, near)))


@pytest.mark.parametrize("dtype", [F32, torch.float64], ids=str)
def test_torchs_samples(dtype, device):
    """op_db's samples of cross_entropy, gradients included where they are wanted."""
    info = next(op for op in op_db if op.name == "nn.functional.cross_entropy")
    n = 0
    for sample in info.sample_inputs(device, dtype, requires_grad=True):
        results = []
        for f in (info.op, fastattn.cross_entropy):
            loss = f(sample.input, *sample.args, **sample.kwargs)
            results.append((loss, *torch.autograd.grad(loss.sum(), sample.input)))
        torch.testing.assert_close(*results, equal_nan=True)
        n += 1
    assert n > 20


@pytest.mark.parametrize("dtype", [F32, torch.float64], ids=str)
def test_torchs_module_samples(dtype, device):
    """module_db's samples of CrossEntropyLoss, of which some ignore every row."""
    (info,) = (info for info in module_db if info.module_cls is torch.nn.CrossEntropyLoss)
    torch.manual_seed(0)
    samples = info.module_inputs_func(info, device=device, dtype=dtype, requires_grad=True, training=True)
    assert len(samples) > 100
    for sample in samples[:: 1 if dtype == torch.float64 else 3]:
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        modules = (library.CrossEntropyLoss(*args, **kwargs).to(device, dtype) for library in (torch.nn, nn))
        results = [run(module, sample.forward_input.args, sample.forward_input.kwargs) for module in modules]
        torch.testing.assert_close(*results, equal_nan=True)


X, T = torch.zeros(3, 5), torch.tensor([0, 1, 2])
WRONG = {
    "logits_list": (([1.0], T), {}, ArgumentTypeError, "`logits` is a list"),
    "logits_scalar": ((torch.zeros(()), T), {}, ArgumentError, "`logits` has shape ()"),
    "logits_int": ((X.long(), T), {}, ArgumentTypeError, "`logits` has dtype int64"),
    "target_none": ((X, None), {}, ArgumentTypeError, "`target` is None"),
    "target_shape": ((X, T[:2]), {}, ArgumentError, "`target` has shape (2,)"),
    "target_bool": ((X, T > 0), {}, ArgumentTypeError, "`target` has dtype bool"),
    "target_probabilities": ((X, X[:2]), {}, ArgumentError, "`target` has shape (2, 5)"),
    "target_class": ((X, T + 3), {}, ArgumentIndexError, "`target` holds 5"),
    "weight_shape": ((X, T, X[0, :4]), {}, ArgumentError, "`weight` has shape (4,)"),
    "weight_int": ((X, T, T), {}, ArgumentTypeError, "`weight` has dtype int64"),
    "ignore_float": ((X, T), {"ignore_index": 1.0}, ArgumentTypeError, "`ignore_index` is a float"),
    "ignore_probabilities": ((X, X), {"ignore_index": 1}, ArgumentError, "`ignore_index` is 1"),
    "reduction": ((X, T), {"reduction": "max"}, ArgumentError, "`reduction` is 'max'"),
    "reduction_none": ((X, T), {"reduction": None}, ArgumentTypeError, "`reduction` is None"),
    "smoothing": ((X, T), {"label_smoothing": 1.5}, ArgumentError, "`label_smoothing` is 1.5"),
    "z_loss": ((X, T), {"z_loss": -1.0}, ArgumentError, "`z_loss` is -1.0"),
    "softcap": ((X, T), {"softcap": 0.0}, ArgumentError, "`softcap` is 0.0"),
    "inplace_int": ((X, T), {"inplace_backward": 1}, ArgumentTypeError, "`inplace_backward` is an int"),
    "inplace_overlap": ((X[:1].expand(3, 5), T), {"inplace_backward": True}, ArgumentError, "overlaps itself"),
    "inplace_leaf": ((X.clone().requires_grad_(), T), {"inplace_backward": True}, ArgumentError, "is a leaf"),
    "float64": ((X.double(), T), {"backend": "triton"}, UnsupportedError, "dtype float64"),
    "target_gradient": (
        (X, X.clone().requires_grad_()), {"backend": "triton"}, UnsupportedError, "a gradient of target"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_call_raises_one_sentence(name):
    args, kwargs, error, says = WRONG[name]
    with pytest.raises(FastattnError) as caught:
        fastattn.cross_entropy(*args, **kwargs)
    assert type(caught.value) is error
    assert says in str(caught.value)
    assert str(caught.value).endswith(".")


def test_module_is_torchs(device):
    weight = torch.rand(9, device=device)
    theirs = torch.nn.CrossEntropyLoss(weight, ignore_index=2, reduction="sum", label_smoothing=0.1)
    module = nn.CrossEntropyLoss(weight, ignore_index=2, reduction="sum", label_smoothing=0.1)
    assert repr(module) == repr(theirs)
    module.load_state_dict(theirs.state_dict())
    x, t = torch.randn(5, 9, device=device), torch.arange(5, device=device)
    torch.testing.assert_close(module(x, t), theirs(x, t))


@pytest.mark.parametrize(("dtype", "V"), [(torch.uint8, 256), (torch.uint8, 300), (torch.int8, 128), (torch.int16, 70)])
@pytest.mark.parametrize("backend", ["triton", "eager", "reference"])
def test_narrow_classes_are_not_wrapped(dtype, V, backend, device):
    """As many classes as the dtype has numbers; and 156, which is -100 in eight bits, is not ignored."""
    (x,) = make_inputs((4, V), device=device)
    t = torch.tensor([0, 1, 69, min(156, V - 1, torch.iinfo(dtype).max)], device=device)
    expected = fastattn.cross_entropy(x, t, z_loss=1e-3, backend="reference")
    torch.testing.assert_close(fastattn.cross_entropy(x, t.to(dtype), z_loss=1e-3, backend=backend), expected)
    torch.testing.assert_close(
        fastattn.cross_entropy(x, t.to(dtype), backend=backend), torch.nn.functional.cross_entropy(x, t)
    )


@pytest.mark.parametrize("backend", ["triton", "eager", "reference"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"reduction": "none"}], ids=str)
def test_ignored_rows_hold_whatever_they_hold(options, backend, device):
    x, weight = make_inputs((3, 9), (9,), device=device)
    t = torch.tensor([2, -100, 5], device=device)
    results = []
    for garbage in (0.0, torch.nan, torch.inf):
        leaf = x.clone()
        leaf[1] = garbage
        leaf.requires_grad_()
        loss = fastattn.cross_entropy(leaf, t, weight.abs(), backend=backend, **options)
        results.append((loss, torch.autograd.grad(loss.sum(), leaf)[0]))
    for loss, dx in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(dx, results[0][1])


def test_an_option_of_a_wrong_type_is_refused_after_a_right_one_too(device):
    """1 == True, and plans of calls are remembered."""
    x, t = torch.zeros(2, 4, device=device), torch.ones(2, dtype=torch.int64, device=device)
    fastattn.cross_entropy(x, t, ignore_index=1)
    with pytest.raises(fastattn.errors.ArgumentTypeError, match="`ignore_index` is a bool"):
        fastattn.cross_entropy(x, t, ignore_index=True)


def test_logits_are_not_written_over_where_targets_lie_in_them(device):
    (h,) = make_inputs((6, 40), device=device)
    leaf = h.requires_grad_()
    logits = leaf * 1.0
    with pytest.raises(fastattn.errors.ArgumentError, match="`target` lies in the memory of `logits`"):
        fastattn.cross_entropy(logits[1:], logits.detach()[:-1], inplace_backward=True, backend="triton")


def test_what_a_hook_keeps_is_not_written_over(device):
    """The last backward scales the gradient in its own memory, unless somebody else was given that to keep."""
    (x,) = make_inputs((4, 9), device=device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = fastattn.cross_entropy(x.requires_grad_(), torch.arange(4, device=device), backend="triton")
    before = [t.clone() for t in kept]
    (loss * 3.0).backward()
    assert before
    assert all(torch.equal(a, b) for a, b in zip(before, kept, strict=True))
