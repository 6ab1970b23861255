"""Small calls on CPU tensors go to torch's own operation, which is sooner done; `explain` says so."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import EagerAndRecordGraphs

import fastattn
from fastattn import backends
from fastattn.backends.cpu import module
from fastattn.backends.cpu.routing import SMALL, SMALL_COMPILED

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
pytestmark = pytest.mark.skipif(module.why_not() is not None, reason="the native module is not built")


@pytest.fixture(autouse=True)
def nothing_before_the_kernels(monkeypatch):
    """As on a machine where no interpreter stands before them."""
    monkeypatch.setattr(backends, "ORDER", ("cpu", "eager", "reference"))


STEP = defaultdict(lambda: 8, attention=32 * 32 * 8)  # between two sizes


def arguments(op: str, n: int, dtype: torch.dtype, gradient: bool) -> list:
    """Of a call of n elements, or of n multiply-adds of q kᵀ in sequences of 32."""
    rows = torch.zeros(n // 8, 8, dtype=dtype, requires_grad=gradient)
    found = {
        "attention": lambda: [torch.zeros(1, max(n // STEP[op], 1), 32, 8, dtype=dtype, requires_grad=gradient)] * 3,
        "layer_norm": lambda: [rows, 8],
        "rms_norm": lambda: [rows, 8],
        "softmax": lambda: [rows],
        "swiglu": lambda: [rows, rows],
        "geglu": lambda: [rows, rows],
        "cross_entropy": lambda: [rows, torch.zeros(n // 8, dtype=torch.long)],
    }
    return found[op]()


def call(op: str, n: int, dtype: torch.dtype, gradient: bool, **options):
    """Who serves it."""
    return fastattn.explain(getattr(fastattn, op), *arguments(op, n, dtype, gradient), **options)


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "step"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("op", SMALL)
def test_up_to_its_limit_a_call_is_torchs(op, dtype, gradient):
    limit = SMALL[op].of(dtype, gradient)
    above = call(op, limit + STEP[op], dtype, gradient)
    assert above.backend == "cpu"
    if limit == 0:
        return
    at = call(op, limit, dtype, gradient)
    assert at.backend == "eager"
    assert f"{limit} " in at.reasons["cpu"]
    assert ("backward" in at.reasons["cpu"]) == gradient
    with torch.no_grad():
        assert call(op, limit, dtype, gradient).backend == call(op, limit, dtype, False).backend
    assert call(op, limit, dtype, gradient, backend="cpu").backend == "cpu"


@pytest.mark.parametrize(
    ("shapes", "dtype", "gradient", "backend"),
    [
        (((9000, 1, 8, 64),) * 2, F32, False, "eager"),
        (((9000, 1, 9, 64),) * 2, F32, False, "cpu"),
        (((9000, 1, 24, 64),) * 2, F32, True, "eager"),
        (((9000, 1, 25, 64),) * 2, F32, True, "cpu"),
        (((9000, 1, 7, 64),) * 2, BF16, False, "cpu"),
        (((9000, 1, 8, 64),) * 2, BF16, True, "eager"),
        (((9000, 1, 9, 64),) * 2, BF16, True, "cpu"),
        (((64, 4, 15, 64), (64, 4, 500, 64)), F32, True, "eager"),
        (((64, 4, 16, 64), (64, 4, 500, 64)), F32, True, "cpu"),
        (((64, 4, 1, 64), (64, 4, 500, 64)), F32, False, "cpu"),
    ],
    ids=str,
)
def test_short_sequences_are_torchs_however_many(shapes, dtype, gradient, backend):
    q, k = (torch.empty(shape, dtype=dtype, requires_grad=gradient) for shape in shapes)
    found = fastattn.explain(fastattn.attention, q, k, k)
    assert found.backend == backend
    if backend == "eager":
        assert f"{q.shape[2]} queries and {k.shape[2]} keys leave most of a tile empty" in found.reasons["cpu"]


@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("attention", {"causal": "bottom_right"}),
        ("attention", {"softcap": 2.0}),
        ("attention", {"return_lse": True}),
        ("layer_norm", {"residual": torch.zeros(8, 8)}),
        ("softmax", {"scale": 2.0}),
        ("softmax", {"causal": True}),
        ("cross_entropy", {"z_loss": 0.1}),
        ("layer_norm", {"memory_efficient": True}),
    ],
    ids=str,
)
def test_what_is_no_single_operation_of_torch_is_the_kernels(op, options):
    assert call(op, 64, F32, False).backend == "eager"
    assert call(op, 64, F32, False, **options).backend == "cpu"


def test_the_call_itself_goes_where_explain_says():
    script = """
import torch, fastattn
from fastattn.backends import cpu, eager
entered = []
for backend, name in ((cpu, "norm_forward"), (eager, "norm")):
    def spy(*args, function=getattr(backend, name), backend=backend):
        entered.append(backend.NAME)
        return function(*args)
    setattr(backend, name, spy)
small, large = torch.zeros(8, 8), torch.zeros(16384, 8)
fastattn.layer_norm(small, 8)
fastattn.layer_norm(large, 8)
fastattn.layer_norm(small.clone().requires_grad_(), 8)
fastattn.layer_norm(small, 8, backend="cpu")
print(*entered)
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTATTN_EMULATE")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["eager", "cpu", "cpu", "cpu"], done.stderr


def serves_compiled(op: str, n: int, dtype: torch.dtype, gradient: bool, dynamic: bool = False, **options) -> str:
    """Who serves it in compiled code, and, of a size left open, without a guard on it."""

    def function(*arguments):
        return getattr(fastattn, op)(*arguments, **options)

    torch._dynamo.reset()
    graphs = EagerAndRecordGraphs()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=graphs)
    given = arguments(op, n, dtype, gradient)
    torch.testing.assert_close(compiled(*given), function(*given))
    if dynamic:
        with torch._dynamo.config.patch(error_on_recompile=True):
            compiled(*arguments(op, 4 * n, dtype, gradient))
    (graph,) = graphs.graphs
    return "cpu" if any("fastattn" in str(node.target) for node in graph.graph.nodes) else "eager"


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "step"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("op", SMALL_COMPILED)
def test_a_compiler_is_left_what_is_small(op, dtype, gradient):
    limit = SMALL_COMPILED[op].of(dtype, gradient)
    if limit:
        assert serves_compiled(op, limit, dtype, gradient) == "eager"
    assert serves_compiled(op, limit + STEP[op], dtype, gradient) == "cpu"


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_a_compiler_is_left_norms_of_sums(op):
    residual = torch.zeros(8, 8)
    assert serves_compiled(op, 64, F32, False, residual=residual) == "eager"
    assert serves_compiled(op, 64, F32, False, residual=residual, memory_efficient=True) == "cpu"
    assert serves_compiled(op, 64, F32, False, residual=residual, backend="cpu") == "cpu"


@pytest.mark.parametrize("op", SMALL_COMPILED)
def test_a_size_that_a_compiler_leaves_open_is_the_kernels(op):
    assert serves_compiled(op, SMALL_COMPILED[op].of(F32, False) // 4, F32, False, dynamic=True) == "cpu"


@pytest.mark.parametrize("weighted", [False, True], ids=["mean", "rows"])
@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_a_compiler_is_shown_how_a_loss_scales_its_gradient(op, weighted):
    """As a product, which it fuses; but where rows have a factor each, a kernel computes the gradient with it."""
    x, weight, target = torch.randn(12, 8), torch.randn(40, 8), torch.arange(12)
    leaves = [t.requires_grad_() for t in ((x @ weight.T,) if op == "cross_entropy" else (x, weight))]
    factor = torch.linspace(-1.0, 3.0, 12) if weighted else torch.tensor(3.0)
    backwards = []

    def function(*tensors):
        reduction = "none" if weighted else "mean"
        return getattr(fastattn, op)(*tensors, target, reduction=reduction, backend="cpu")

    def record(graph, inputs):
        backwards.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph.forward)

    def gradients(function):
        return torch.autograd.grad(function(*leaves), leaves, factor)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(graph.forward), bw_compiler=record)
    torch.testing.assert_close(gradients(torch.compile(function, backend=backend)), gradients(function))
    (targets,) = backwards
    assert any("aten.mul" in t for t in targets) != any("fastattn" in t for t in targets)
    assert any("fastattn" in t for t in targets) == weighted
