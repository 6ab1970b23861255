"""The operators under autograd, torch.func, torch.compile, autocast and dispatch modes."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import fastattn
from fastattn.autograd import AttentionFunction, LayerNormFunction, RMSNormFunction, SoftmaxFunction
from fastattn.ops.attention import INPUTS
from fastattn.reference.attention import attention as reference_attention
from fastattn.spec import AttentionSpec, NormSpec, SoftmaxSpec
from fastattn.testing import make_inputs


def attention(q, k, v, backend="triton"):
    return fastattn.attention(q, k, v, causal="bottom_right", backend=backend)


def attention_lse(q, k, v, backend="triton"):
    o, lse = fastattn.attention(q, k, v, window=(5, 2), return_lse=True, backend=backend)
    return o.sum(-1) + lse


def layer_norm(x, weight, bias, backend="triton"):
    return fastattn.layer_norm(x, x.shape[-1], weight, bias, backend=backend)


def rms_norm(x, weight, backend="triton"):
    return fastattn.rms_norm(x, x.shape[-1], weight, weight_offset=1.0, backend=backend)


def residual_norm(x, residual, weight, backend="triton"):
    y, h = fastattn.layer_norm(x, x.shape[-1], weight, residual=residual, backend=backend)
    return y + h.sin()


def softmax(x, backend="triton"):
    return fastattn.softmax(x, -1, scale=0.7, causal="bottom_right", backend=backend)


def log_softmax(x, backend="triton"):
    return fastattn.log_softmax(x, 1, mask=torch.ones_like(x, dtype=torch.bool).tril(), backend=backend)


QKV = ((2, 4, 9, 16), (2, 2, 12, 16), (2, 2, 12, 16))
OPS = {  # name -> (function, shapes, operator)
    "attention": (attention, QKV, "fastattn::attention"),
    "attention_lse": (attention_lse, QKV, "fastattn::attention"),
    "layer_norm": (layer_norm, ((3, 5, 24), (24,), (24,)), "fastattn::layer_norm"),
    "rms_norm": (rms_norm, ((3, 5, 24), (24,)), "fastattn::rms_norm"),
    "residual_norm": (residual_norm, ((3, 5, 24), (3, 5, 24), (24,)), "fastattn::layer_norm"),
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


SMALL_QKV = ((1, 2, 2, 8), (1, 1, 3, 8), (1, 1, 3, 8))
SMALL = {
    "attention": SMALL_QKV,
    "attention_lse": SMALL_QKV,
    "layer_norm": ((2, 8), (8,), (8,)),
    "rms_norm": ((2, 8), (8,)),
    "residual_norm": ((2, 8), (2, 8), (8,)),
    "softmax": ((1, 3, 4),),
    "log_softmax": ((1, 3, 4),),
}


def curved(function, backend):
    """A scalar loss whose gradient with respect to the output depends on the inputs."""

    def loss(*inputs):
        y = function(*inputs, backend=backend)
        return (torch.where(y.isfinite(), y, 0.0).sin() * torch.linspace(-1, 2, y.shape[-1], device=y.device)).sum()

    return loss


def every(inputs) -> tuple[int, ...]:
    return tuple(range(len(inputs)))


def tangents(inputs):
    return tuple(t.detach().cos() for t in inputs)


def penalty(grads):
    return sum((g.square() * torch.linspace(-1, 2, g.shape[-1], device=g.device)).sum() for g in grads)


def squared_gradient(loss):
    return lambda *inputs: penalty(grad(loss, every(inputs))(*inputs))


def derivative(loss, direction):
    return lambda *inputs: jvp(loss, inputs, direction)[1]


def by_autograd(loss, inputs, order):
    """The gradient of a loss, or, for each further order, of the penalty on the gradient before."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = loss(*leaves)
    for _ in range(order - 1):
        y = penalty(torch.autograd.grad(y, leaves, create_graph=True, materialize_grads=True))
    return torch.autograd.grad(y, leaves, materialize_grads=True)


def by_duals(function, inputs, direction):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(*map(forward_ad.make_dual, inputs, direction))).tangent


def forward_over_reverse(loss, inputs, direction):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t.detach().requires_grad_(), d) for t, d in zip(inputs, direction, strict=True)]
        grads = torch.autograd.grad(loss(*duals), duals, create_graph=True)
        return [forward_ad.unpack_dual(g).tangent for g in grads]


def doubled(inputs):
    return [torch.stack([t, 2 * t]) for t in inputs]


HIGHER = {
    "autograd_second_order": lambda f, x: by_autograd(f, x, 2),
    "autograd_third_order": lambda f, x: by_autograd(f, x, 3),
    "grad_of_grad": lambda f, x: grad(squared_gradient(f), every(x))(*x),
    "autograd_of_grad": lambda f, x: by_autograd(squared_gradient(f), x, 1),
    "vjp_of_grad": lambda f, x: vjp(grad(f, every(x)), *x)[1](tangents(x)),
    "jvp": lambda f, x: jvp(f, tuple(x), tangents(x)),
    "jvp_of_jvp": lambda f, x: derivative(derivative(f, tangents(x)), tangents(x))(*x),
    "jvp_of_grad": lambda f, x: jvp(grad(f, every(x)), tuple(x), tangents(x)),
    "jvp_of_jvp_of_grad": lambda f, x: derivative(derivative(grad(f, every(x)), tangents(x)), tangents(x))(*x),
    "grad_of_jvp": lambda f, x: grad(derivative(f, tangents(x)), every(x))(*x),
    "jacfwd": lambda f, x: jacfwd(f, every(x))(*x),
    "hessian": lambda f, x: hessian(f, every(x))(*x),
    "jacrev_of_jacfwd": lambda f, x: jacrev(jacfwd(f))(*x),
    "vmap_of_jvp": lambda f, x: vmap(derivative(f, tangents(x)))(*doubled(x)),
    "vmap_of_grad_of_grad": lambda f, x: vmap(grad(squared_gradient(f), every(x)))(*doubled(x)),
    "vmap_of_jvp_of_grad": lambda f, x: vmap(derivative(grad(f, every(x)), tangents(x)))(*doubled(x)),
    "forward_ad": lambda f, x: by_duals(f, x, tangents(x)),
    "forward_ad_over_reverse": lambda f, x: forward_over_reverse(f, x, tangents(x)),
    "hvp": lambda f, x: torch.autograd.functional.hvp(f, tuple(x), tangents(x)),
}


def hold_to_reference(run, function, inputs):
    """`run(loss, inputs)` of the kernels in float32 against the reference in float64."""
    actual = run(curved(function, "triton"), inputs)
    expected = run(curved(function, "reference"), [t.double() for t in inputs])
    assert_near(actual, tree_map(lambda t: t.to(inputs[0].dtype), expected))


@EVERY_OP
@pytest.mark.parametrize("higher", HIGHER)
def test_higher_derivatives(op, higher, device):
    function = OPS[op][0]
    hold_to_reference(HIGHER[higher], function, make_inputs(*SMALL[op], device=device))


@EVERY_OP
def test_jacobians_of_the_output(op, device):
    """Forward, reverse and reverse over autograd's own graph, each as one batched call."""
    function = OPS[op][0]
    inputs = make_inputs(*SMALL[op], device=device)
    expected = jacrev(lambda *x: function(*x, backend="reference"), every(inputs))(*[t.double() for t in inputs])
    expected = [t.float().nan_to_num() for t in expected]
    for jacobian in (jacfwd, jacrev):
        actual = jacobian(function, every(inputs))(*inputs)
        assert_near([t.nan_to_num() for t in actual], expected)
    leaves = [t.requires_grad_() for t in inputs]
    y = function(*leaves)
    basis = torch.eye(y.numel(), device=device).view(-1, *y.shape)
    actual = vmap(lambda dy: torch.autograd.grad(y, leaves, dy))(basis)
    assert_near([t.view_as(e).nan_to_num() for t, e in zip(actual, expected, strict=True)], expected)


@EVERY_OP
def test_first_gradients_with_create_graph(op, device):
    """Asking for a graph changes nothing in what it is asked along with."""
    function, inputs, _ = setup(op, device)
    leaves = [t.requires_grad_() for t in inputs]
    loss = curved(function, "triton")
    plain = torch.autograd.grad(loss(*leaves), leaves)
    graphed = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, graphed, strict=True))


@pytest.mark.parametrize("op", ["attention_lse", "layer_norm"])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_double_backward_of_some_inputs(op, wanted, device):
    function = OPS[op][0]
    inputs = make_inputs(*SMALL[op], device=device)

    def run(loss, inputs):
        def of_wanted(*varied):
            values = dict(zip(wanted, varied, strict=True))
            return loss(*(values.get(i, t) for i, t in enumerate(inputs)))

        varied = [inputs[i] for i in wanted]
        return by_autograd(of_wanted, varied, 2), jvp(of_wanted, tuple(varied), tangents(varied))

    hold_to_reference(run, function, inputs)


@pytest.mark.parametrize("higher", ["autograd_second_order", "grad_of_grad", "jvp", "jvp_of_grad"])
def test_higher_derivatives_of_one_tensor_as_key_and_value(higher, device):
    def self_attention(x, backend="triton"):
        return attention(x, x, x, backend)

    hold_to_reference(HIGHER[higher], self_attention, make_inputs((1, 2, 5, 8), device=device))


@pytest.mark.parametrize("higher", ["autograd_second_order", "jvp", "jvp_of_grad"])
def test_higher_derivatives_without_weight_and_bias(higher, device):
    def norm(x, backend="triton"):
        return fastattn.layer_norm(x, x.shape[-2:], backend=backend)

    hold_to_reference(HIGHER[higher], norm, make_inputs((2, 3, 8), device=device))


@pytest.mark.parametrize("higher", ["autograd_second_order", "jvp", "jvp_of_grad"])
def test_higher_derivatives_of_rows_that_see_nothing(higher, device):
    """S_q > S_k: the first rows see no key, o is 0 and lse −inf there; what flows back to them is not used."""

    def both(q, k, v, backend="triton"):
        o, lse = fastattn.attention(q, k, v, causal="bottom_right", return_lse=True, backend=backend)
        return torch.cat([o, lse[..., None]], -1)

    hold_to_reference(HIGHER[higher], both, make_inputs((1, 2, 6, 8), (1, 2, 3, 8), (1, 2, 3, 8), device=device))

    def masked(x, backend="triton"):
        mask = torch.arange(6, device=device) < torch.tensor([[0], [2], [6]], device=device)
        return fastattn.log_softmax(torch.where(mask, x, torch.nan), scale=0.7, mask=mask, backend=backend)

    hold_to_reference(HIGHER[higher], masked, make_inputs((2, 3, 6), device=device))


@pytest.mark.parametrize("higher", ["autograd_second_order", "grad_of_grad", "jvp", "jvp_of_grad", "vmap_of_jvp"])
def test_higher_derivatives_of_what_acts_on_the_scores(higher, device):
    mask = torch.tensor([[True, False, True], [True, True, True]], device=device)

    def attend(q, k, v, bias, slopes, sinks, backend="triton"):
        options = {"bias": bias, "mask": mask, "alibi_slopes": slopes, "sinks": sinks, "softcap": 1.5}
        return fastattn.attention(q, k, v, **options, backend=backend)

    hold_to_reference(HIGHER[higher], attend, make_inputs(*SMALL_QKV, (2, 1, 3), (2,), (2,), device=device))


@pytest.mark.parametrize("higher", ["autograd_second_order", "grad_of_grad", "jvp", "jvp_of_grad"])
def test_higher_derivatives_of_packed_sequences(higher, device):
    starts = torch.tensor([0, 2, 2, 5], dtype=torch.int32, device=device)

    def attend(q, k, v, backend="triton"):
        return fastattn.varlen_attention(q, k, v, starts, starts, 3, 3, causal=True, backend=backend)

    hold_to_reference(HIGHER[higher], attend, make_inputs((5, 2, 8), (5, 1, 8), (5, 1, 8), device=device))


def with_seed(q, k, v, seed, spec):
    inputs = {"q": q, "k": k, "v": v, "seed": seed}
    return AttentionFunction.apply(*(inputs.get(name) for name in INPUTS), spec, "triton")[0]


@pytest.mark.parametrize("higher", ["autograd_second_order", "jvp", "jvp_of_grad", "vmap_of_grad_of_grad"])
def test_higher_derivatives_with_dropout(higher, device):
    """The recomputation drops what the kernel dropped."""
    seed = torch.tensor(2**40 + 3, device=device)

    def dropped(q, k, v, backend="triton"):
        spec = AttentionSpec(2, 1, 8, 8, q.dtype, 0.3, dropout_p=0.4)
        if backend == "triton":
            return with_seed(q, k, v, seed, spec)
        return reference_attention(q, k, v, spec, seed=seed)[0]

    hold_to_reference(HIGHER[higher], dropped, make_inputs(*SMALL_QKV, device=device))


def test_vmap_with_dropout_keeps_each_seed(device):
    q, k, v = make_inputs((3, 1, 2, 5, 8), (1, 1, 4, 8), (1, 1, 4, 8), device=device)
    seeds = torch.arange(3, device=device)
    spec = AttentionSpec(2, 1, 8, 8, torch.float32, 0.3, dropout_p=0.5)

    def run(q, seed):
        return with_seed(q, k, v, seed, spec)

    assert_near(vmap(run)(q, seeds), torch.stack([run(*each) for each in zip(q, seeds, strict=True)]))
    assert_near(vmap(run, in_dims=(0, None))(q, seeds[1]), torch.stack([run(each, seeds[1]) for each in q]))


@EVERY_OP
def test_double_backward_in_half_precision_under_autocast(op, device):
    """It is computed in float32 in any case, so that rounding what goes in and comes out is its only error."""
    function = OPS[op][0]
    inputs = make_inputs(*SMALL[op], dtype=torch.bfloat16, device=device)
    directions = tangents(inputs)

    def second(dtype, backend):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        y = function(*leaves, backend=backend)
        dy = torch.linspace(-1, 1, y.numel(), device=device).view_as(y).bfloat16().to(y.dtype)
        grads = torch.autograd.grad(y, leaves, dy, create_graph=True)
        along = sum((g * d.to(dtype)).sum() for g, d in zip(grads, directions, strict=True))
        return torch.autograd.grad(along, leaves, materialize_grads=True)

    actual = second(torch.bfloat16, "triton")
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cpu"):
        under_autocast = second(torch.bfloat16, "triton")
    assert all(torch.equal(a, b) for a, b in zip(actual, under_autocast, strict=True))
    assert {t.dtype for t in actual} == {torch.bfloat16}
    roundings = 8 if op.endswith("softmax") else 1  # it comes from y, rounded, in two terms that nearly cancel
    for a, truth in zip(actual, second(torch.float64, "reference"), strict=True):
        assert (a - truth).norm() <= roundings * torch.finfo(torch.bfloat16).eps * truth.norm()


class Passing(TorchDispatchMode):
    """A dispatch mode that changes nothing, but takes every call off the fast path."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@EVERY_OP
@pytest.mark.parametrize("higher", ["autograd_second_order", "autograd_third_order", "forward_ad"])
def test_higher_derivatives_of_the_custom_ops(op, higher, device):
    function = OPS[op][0]
    inputs = make_inputs(*SMALL[op], device=device)

    def run(loss, inputs):
        with Passing():
            return HIGHER[higher](loss, inputs)

    hold_to_reference(run, function, inputs)


@EVERY_OP
def test_double_backward_of_tensor_subclasses(op, device):
    function = OPS[op][0]
    inputs = make_inputs(*SMALL[op], device=device)
    expected = by_autograd(curved(function, "triton"), inputs, 2)
    actual = by_autograd(curved(function, "triton"), [TwoTensor(t, t.clone()) for t in inputs], 2)
    assert_near([t.a for t in actual], expected)
    assert_near([t.b for t in actual], expected)


@EVERY_OP
def test_tangents_of_gradients_that_flow_back(op, device):
    """A graph built outside of forward mode, given a dual gradient inside it."""
    function = OPS[op][0]
    inputs = make_inputs(*SMALL[op], device=device)

    def run(backend, inputs):
        leaves = [t.requires_grad_() for t in inputs]
        y = function(*leaves, backend=backend)
        dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=device).view_as(y)
        with forward_ad.dual_level():
            grads = torch.autograd.grad(y, leaves, forward_ad.make_dual(dy, dy.cos()))
            return [forward_ad.unpack_dual(g).tangent for g in grads]

    assert_near(run("triton", inputs), [t.float() for t in run("reference", [t.double() for t in inputs])])


@pytest.mark.parametrize("op", ["attention", "layer_norm", "softmax"])
def test_bare_custom_op_is_never_silently_constant(op, device):
    """torch.func cannot differentiate a custom op, and would give a zero tangent; plain autograd and duals can."""
    x, *rest = opcheck_arguments(op, device)
    operator = getattr(torch.ops.fastattn, op)

    def first(x):
        result = operator(x, *rest)
        return result if isinstance(result, torch.Tensor) else result[0]

    for transform in (lambda: jvp(first, (x,), (x,)), lambda: grad(lambda x: first(x).sum())(x)):
        with pytest.raises(NotImplementedError, match=f"fastattn::{op}: torch.func"):
            transform()
    (dx,) = tangents([x])
    leaf, dy = x.detach().requires_grad_(), torch.ones_like(first(x)).cumsum(-1)
    pulled_back = torch.autograd.grad(first(leaf), leaf, dy)[0]
    assert_near((by_duals(first, [x], [dx]) * dy).sum(), (pulled_back * dx).sum())


@pytest.mark.parametrize("op", ["attention", "layer_norm"])
def test_compiled_double_backward_is_refused(op, device):
    function = OPS[op][0]
    loss = torch.compile(curved(function, "triton"), fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="double backward"):
        by_autograd(loss, make_inputs(*SMALL[op], device=device), 2)


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
        return (*inputs, *(None for _ in INPUTS[3:]), 0.25, 3, 0, False, None, 0.0, "triton")
    scalars = (torch.float32, None, None, 1e-5, 1, 0.0, 0.0, False, "triton")
    if op == "layer_norm":
        return (*inputs, None, None, *scalars)
    if op == "rms_norm":
        return (*inputs, None, None, None, *scalars)
    if op == "residual_norm":
        x, residual, weight = inputs
        seed = torch.zeros((), dtype=torch.int64, device=device)
        return x, weight, None, residual, seed, torch.float32, torch.float32, None, 1e-5, 1, 0.0, 0.4, False, "triton"
    return (*inputs, None, -1, 0.5, op == "log_softmax", True, False, "triton")


@pytest.mark.parametrize("op", ["attention", "layer_norm", "rms_norm", "residual_norm", "softmax", "log_softmax"])
def test_opcheck(op, device):
    args = opcheck_arguments(op, device)
    leaves = [a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    operator = getattr(torch.ops.fastattn, OPS[op][2].removeprefix("fastattn::"))
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
            elif op.endswith("norm"):
                shapes = tuple((3, length, 24) if len(shape) == 3 else shape for shape in OPS[op][1])
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


@pytest.mark.parametrize("op", [op for op in OPS if op != "residual_norm"])  # which keeps no input but the weight
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


@EVERY_OP
def test_views_whose_sign_is_still_to_be_changed(op, device):
    """PyTorch negates lazily where a conjugate's imaginary part is taken; memory holds the other sign."""
    function, inputs, _ = setup(op, device)
    lazy = [torch.complex(torch.zeros_like(t), -t).conj().imag for t in inputs]
    assert all(t.is_neg() for t in lazy)
    y, expected = function(*(t.requires_grad_() for t in lazy)), function(*(t.requires_grad_() for t in inputs))
    assert torch.equal(y, expected)
    dy = torch.linspace(-1, 1, y.numel(), device=device).view(y.shape)
    dy = torch.where(y.isfinite(), dy, 0.0)
    lazy_dy = torch.complex(torch.zeros_like(dy), -dy).conj().imag
    assert lazy_dy.is_neg()
    for ours, same in ((lazy, lazy_dy), (inputs, lazy_dy)):
        actual = torch.autograd.grad(function(*ours), ours, same)
        for gradient, exact in zip(actual, torch.autograd.grad(function(*inputs), inputs, dy), strict=True):
            assert torch.equal(gradient, exact)


def test_dispatch_modes_see_one_operator(device):
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
    o, lse, _ = AttentionFunction.apply(q, k, v, *(None for _ in INPUTS[3:]), spec, "triton")
    expected = fastattn.attention(q, k, v, causal="bottom_right", return_lse=True, backend="triton")
    assert torch.equal(o, expected[0])
    assert torch.equal(lse, expected[1])
    assert_near(torch.autograd.grad(o.sum(), (q, k, v)), torch.autograd.grad(expected[0].sum(), (q, k, v)))

    x, weight, bias = (t.requires_grad_() for t in make_inputs((5, 24), (24,), (24,), device=device))
    spec = NormSpec(torch.float32, torch.float32, torch.float32, 1e-5)
    y, _, _ = LayerNormFunction.apply(x, weight, bias, None, None, spec, "triton")
    assert torch.equal(y, layer_norm(x, weight, bias))
    y.sum().backward()
    spec = NormSpec(torch.float32, torch.float32, None, 1e-5, rms=True)
    y, _, _ = RMSNormFunction.apply(x, weight, None, None, None, spec, "triton")
    assert torch.equal(y, fastattn.rms_norm(x, 24, weight, 1e-5, backend="triton"))
    y.sum().backward()

    (y,) = SoftmaxFunction.apply(x, None, SoftmaxSpec(torch.float32), "triton")
    assert torch.equal(y, fastattn.softmax(x, backend="triton"))
    y.sum().backward()
