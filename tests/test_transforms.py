"""The operators under autograd, torch.func, torch.compile, autocast and dispatch modes."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch.func import grad, jvp, vmap

import fastattn
from fastattn.autograd import AttentionFunction, LayerNormFunction, SoftmaxFunction
from fastattn.spec import AttentionSpec, NormSpec, SoftmaxSpec
from fastattn.testing import make_inputs


def attention(q, k, v, backend="triton"):
    return fastattn.attention(q, k, v, causal="bottom_right", backend=backend)


def attention_lse(q, k, v, backend="triton"):
    o, lse = fastattn.attention(q, k, v, window=(5, 2), return_lse=True, backend=backend)
    return o.sum(-1) + lse


def layer_norm(x, weight, bias, backend="triton"):
    return fastattn.layer_norm(x, x.shape[-1], weight, bias, backend=backend)


def softmax(x, backend="triton"):
    return fastattn.softmax(x, -1, scale=0.7, causal="bottom_right", backend=backend)


def log_softmax(x, backend="triton"):
    return fastattn.log_softmax(x, 1, mask=torch.ones_like(x, dtype=torch.bool).tril(), backend=backend)


QKV = ((2, 4, 9, 16), (2, 2, 12, 16), (2, 2, 12, 16))
OPS = {  # name -> (function, shapes, operator)
    "attention": (attention, QKV, "fastattn::attention"),
    "attention_lse": (attention_lse, QKV, "fastattn::attention"),
    "layer_norm": (layer_norm, ((3, 5, 24), (24,), (24,)), "fastattn::layer_norm"),
    "softmax": (softmax, ((3, 6, 10),), "fastattn::softmax"),
    "log_softmax": (log_softmax, ((3, 6, 10),), "fastattn::softmax"),
}
EVERY_OP = pytest.mark.parametrize("op", OPS)


def setup(op: str, device: torch.device):
    function, shapes, name = OPS[op]
    return function, make_inputs(*shapes, device=device), name


def weighted(function, backend):
    """A scalar loss whose gradient is not constant."""

    def loss(*inputs):
        y = function(*inputs, backend=backend)
        return (torch.where(y.isfinite(), y, 0.0) * torch.linspace(-1, 1, y.shape[-1], device=y.device)).sum()

    return loss


def assert_near(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@EVERY_OP
def test_func_grad(op, device):
    function, inputs, _ = setup(op, device)
    argnums = tuple(range(len(inputs)))
    assert_near(
        grad(weighted(function, "triton"), argnums)(*inputs), grad(weighted(function, "reference"), argnums)(*inputs)
    )


@EVERY_OP
@pytest.mark.parametrize("in_dim", [0, 1])
def test_vmap(op, in_dim, device):
    function, inputs, _ = setup(op, device)
    batched = [torch.stack([t, 2 * t, -t], in_dim) for t in inputs]
    actual = vmap(function, in_dims=in_dim)(*batched)
    expected = torch.stack([function(*(t.select(in_dim, i) for t in batched)) for i in range(3)])
    assert_near(actual, expected)


@EVERY_OP
def test_vmap_over_one_argument(op, device):
    function, inputs, _ = setup(op, device)
    first = torch.stack([inputs[0], -inputs[0]])
    actual = vmap(function, in_dims=(0, *(None for _ in inputs[1:])))(first, *inputs[1:])
    assert_near(actual, torch.stack([function(t, *inputs[1:]) for t in first]))


@EVERY_OP
def test_per_sample_gradients(op, device):
    function, inputs, _ = setup(op, device)
    argnums = tuple(range(len(inputs)))
    batched = torch.stack([inputs[0], 2 * inputs[0]])
    dims = (0, *(None for _ in inputs[1:]))
    results = [
        vmap(grad(weighted(function, backend), argnums), in_dims=dims)(batched, *inputs[1:])
        for backend in ("triton", "reference")
    ]
    assert_near(*results)


@EVERY_OP
def test_forward_mode_is_refused_by_name(op, device):
    function, inputs, name = setup(op, device)
    with pytest.raises(NotImplementedError, match=f"{name}: forward-mode AD"):
        jvp(function, tuple(inputs), tuple(inputs))
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(t, t) for t in inputs]
        with pytest.raises(NotImplementedError, match=f"{name}: forward-mode AD"):
            function(*duals)


@EVERY_OP
def test_double_backward_is_refused_by_name(op, device):
    function, inputs, name = setup(op, device)
    leaves = [t.requires_grad_() for t in inputs]
    loss = weighted(function, "triton")(*leaves)
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{name}: double backward"):
        torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    with pytest.raises(NotImplementedError, match=f"{name}: double backward"):
        grad(lambda x: grad(weighted(function, "triton"))(x, *inputs[1:]).square().sum())(inputs[0])


@EVERY_OP
def test_reference_differentiates_to_any_order(op, device):
    function, inputs, _ = setup(op, device)
    inputs = [t.double() for t in inputs]
    tangents = [torch.ones_like(t) for t in inputs]

    def run(*x):
        return weighted(function, "reference")(*x)

    _, tangent = jvp(grad(run), tuple(inputs), tuple(tangents))
    assert tangent.isfinite().all()


def opcheck_arguments(op: str, device: torch.device):
    _, inputs, _ = setup(op, device)
    if op.startswith("attention"):
        return (*inputs, None, 0.25, 3, 0, False, 0.0, "triton")
    if op == "layer_norm":
        return (*inputs, 1e-5, 1, "triton")
    return (*inputs, None, -1, 0.5, op == "log_softmax", True, False, "triton")


@pytest.mark.parametrize("op", ["attention", "layer_norm", "softmax", "log_softmax"])
def test_opcheck(op, device):
    args = opcheck_arguments(op, device)
    leaves = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
    operator = getattr(torch.ops.fastattn, op.removeprefix("log_"))
    torch.library.opcheck(operator.default, tuple(leaves))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("training", [False, True])
def test_compile_without_graph_breaks(op, training, device):
    function, inputs, _ = setup(op, device)
    leaves = [t.requires_grad_(training) for t in inputs]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    y = compiled(*leaves)
    expected = function(*leaves)
    assert torch.equal(y, expected)
    if training:
        weight = torch.where(y.isfinite(), 1.0, 0.0)
        grads = [torch.autograd.grad(t.nan_to_num(neginf=0.0), leaves, weight) for t in (y, expected)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_compile_once_for_every_length(op, device):
    function, _, _ = setup(op, device)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
        for length in (7, 19, 33):
            if op.startswith("attention"):
                shapes = ((2, 4, length, 16), (2, 2, length + 4, 16), (2, 2, length + 4, 16))
            elif op == "layer_norm":
                shapes = ((3, length, 24), (24,), (24,))
            else:
                shapes = ((3, length, length + 4),)
            leaves = [t.requires_grad_() for t in make_inputs(*shapes, device=device)]
            y = compiled(*leaves)
            assert torch.equal(y, function(*leaves))
            y.nan_to_num(neginf=0.0).sum().backward()


@pytest.mark.skipif(
    shutil.which("g++") is None and not torch.cuda.is_available(), reason="Inductor needs a C++ compiler"
)
def test_compile_with_inductor(device):
    """One tensor as query, key and value, between operations that Inductor fuses."""
    (x,) = make_inputs((2, 2, 17, 16), device=device)

    def block(x):
        y = x * 2
        return fastattn.attention(y, y, y, causal=True, backend="triton") + x

    leaf = x.requires_grad_()
    y, expected = torch.compile(block, fullgraph=True)(leaf), block(leaf)
    assert_near(y, expected)
    assert_near(torch.autograd.grad(y.sum(), leaf), torch.autograd.grad(expected.sum(), leaf))


def test_compile_with_dropout(device):
    """Compiled and eager draw different seeds; each of them drops what it says."""
    q = torch.zeros(1, 2, 32, 16, device=device)
    v = torch.eye(32, device=device).expand(1, 2, 32, 32)
    compiled = torch.compile(
        lambda q, v: fastattn.attention(q, q, v, dropout_p=0.5, backend="triton"), fullgraph=True, backend="aot_eager"
    )
    first, second = compiled(q, v), compiled(q, v)
    assert not torch.equal(first, second)
    assert 0.4 < (first > 0).float().mean().item() < 0.6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_uses_the_ambient_dtype(dtype, device):
    q, k, v = (t.requires_grad_() for t in make_inputs(*QKV, device=device))
    with torch.autocast(device.type, dtype=dtype):
        o = attention(q, k, v)
        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")(q, k, v)
        reference = attention(q, k, v, backend="reference")
    assert o.dtype == compiled.dtype == reference.dtype == dtype
    assert torch.equal(o, attention(*(t.to(dtype) for t in (q, k, v))))
    assert torch.equal(o, compiled)
    torch.testing.assert_close(o, reference, rtol=2e-2, atol=2e-2)
    dq, dk, dv = torch.autograd.grad(o.float().sum(), (q, k, v))
    assert dq.dtype == dk.dtype == dv.dtype == torch.float32


def test_autocast_leaves_norms_and_softmax_as_torch_does(device):
    x, weight, bias = make_inputs((3, 24), (24,), (24,), dtype=torch.bfloat16, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert layer_norm(x, weight, bias).dtype == torch.nn.functional.layer_norm(x, (24,), weight, bias).dtype
        assert fastattn.softmax(x, backend="triton").dtype == torch.softmax(x, -1).dtype


@EVERY_OP
def test_saved_tensors_changed_in_place_are_noticed(op, device):
    function, inputs, _ = setup(op, device)
    leaves = [t.requires_grad_() for t in inputs]
    first = leaves[0] * 1.0
    y = function(first, *leaves[1:])
    (y if op.endswith("softmax") else first).mul_(2)  # softmax keeps its output
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_saved_tensor_hooks_and_checkpointing(device):
    q, k, v = (t.requires_grad_() for t in make_inputs(*QKV, device=device))
    expected = torch.autograd.grad(attention(q, k, v).sum(), (q, k, v))
    with torch.autograd.graph.save_on_cpu():
        o = attention(q, k, v)
    assert_near(torch.autograd.grad(o.sum(), (q, k, v)), expected)
    for reentrant in (False, True):
        o = torch.utils.checkpoint.checkpoint(attention, q, k, v, use_reentrant=reentrant)
        o.sum().backward()
        assert_near((q.grad, k.grad, v.grad), expected)
        q.grad = k.grad = v.grad = None


def test_dispatch_modes_see_one_operator(device):
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    with Recorder():
        attention(*make_inputs(*QKV, device=device))
    assert "fastattn::attention" in seen


def test_functions(device):
    """The exported autograd.Functions, called as their documentation says."""
    q, k, v = (t.requires_grad_() for t in make_inputs(*QKV, device=device))
    spec = AttentionSpec(4, 2, 16, 16, torch.float32, 0.25, right=0)
    o, lse = AttentionFunction.apply(q, k, v, None, spec, "triton")
    expected = fastattn.attention(q, k, v, causal="bottom_right", return_lse=True, backend="triton")
    assert torch.equal(o, expected[0])
    assert torch.equal(lse, expected[1])
    assert_near(torch.autograd.grad(o.sum(), (q, k, v)), torch.autograd.grad(expected[0].sum(), (q, k, v)))

    x, weight, bias = (t.requires_grad_() for t in make_inputs((5, 24), (24,), (24,), device=device))
    spec = NormSpec(torch.float32, torch.float32, torch.float32, 1e-5)
    y, _, _ = LayerNormFunction.apply(x, weight, bias, spec, "triton")
    assert torch.equal(y, layer_norm(x, weight, bias))
    y.sum().backward()

    (y,) = SoftmaxFunction.apply(x, None, SoftmaxSpec(torch.float32), "triton")
    assert torch.equal(y, fastattn.softmax(x, backend="triton"))
    y.sum().backward()
