"""torch.compile around torch.func, and over sizes that a compiler does not know."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import EagerAndRecordGraphs
from torch.func import grad, jvp, vmap

import fastattn
from fastattn import backends
from fastattn.testing import make_inputs


def assert_near(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


DERIVATIVES = {
    "attention": (lambda x: fastattn.attention(x, x, x, causal=True), (1, 2, 20, 16)),
    "varlen_attention": (lambda x: fastattn.varlen_attention(x, x, x, *PACKED, 7, 7), (10, 2, 16)),
    "layer_norm": (lambda x: fastattn.layer_norm(x, 16, residual=x)[0], (20, 16)),
    "rms_norm": (lambda x: fastattn.rms_norm(x, 16), (20, 16)),
    "softmax": (lambda x: fastattn.softmax(x, causal="top_left"), (20, 16)),
    "cross_entropy": (lambda x: fastattn.cross_entropy(x, torch.arange(20) % 16, z_loss=0.1), (20, 16)),
    "linear_cross_entropy": (
        lambda x: fastattn.linear_cross_entropy(x, torch.ones(7, 16), torch.arange(20) % 7),
        (20, 16),
    ),
    "rotary_embedding": (
        lambda x: fastattn.rotary_embedding(x, torch.full((20, 8), 0.6), torch.full((20, 8), 0.8)),
        (1, 2, 20, 16),
    ),
    "swiglu": (lambda x: fastattn.swiglu(x, x), (20, 16)),
    "dropout_add": (lambda x: fastattn.dropout_add(x, x, dropout_p=0.0), (20, 16)),
}
PACKED = [torch.tensor([0, 3, 10], dtype=torch.int32)] * 2


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "grad of grad", "vmap of grad"])
@pytest.mark.parametrize("name", DERIVATIVES)
def test_compiled_torch_func(name: str, transform: str):
    """torch.compile around torch.func, as torch's own functions allow it; a vmap alone keeps the kernels."""
    function, shape = DERIVATIVES[name]
    (x,) = make_inputs(shape)

    def loss(x):
        return function(x).square().sum()

    transformed, x = {
        "grad": (grad(loss), x),
        "jvp": (lambda x: jvp(function, (x,), (x,))[1], x),
        "vmap": (vmap(function), torch.stack([x, -x])),
        "grad of grad": (grad(lambda x: grad(loss)(x).sum()), x),
        "vmap of grad": (vmap(grad(loss)), torch.stack([x, -x])),
    }[transform]
    torch._dynamo.reset()
    assert_near(torch.compile(transformed, fullgraph=True, backend="aot_eager")(x), transformed(x))


def test_a_compiled_vmap_keeps_the_kernels():
    (x,) = make_inputs((2, 1, 2, 20, 16))
    graphs = EagerAndRecordGraphs()
    torch._dynamo.reset()
    torch.compile(vmap(lambda x: fastattn.attention(x, x, x, backend="cpu")), fullgraph=True, backend=graphs)(x)
    assert "fastattn.attention" in graphs.graphs[0].code


def test_a_named_backend_does_not_fall_back():
    (x,) = make_inputs((1, 2, 20, 16))
    named = grad(lambda x: fastattn.attention(x, x, x, backend="cpu").sum())
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="derivatives, which it takes of torch operations alone"):
        torch.compile(named, fullgraph=True, backend="aot_eager")(x)


OPEN = {
    "attention": (lambda x: fastattn.attention(x, x, x, causal=True), (5, 2, 4, 16)),
    "groups": (lambda x: fastattn.attention(x, x[:, :1], x[:, :1]), (5, 2, 4, 16)),
    "bias": (lambda x: fastattn.attention(x, x, x, bias=torch.ones(4, 4)), (5, 2, 4, 16)),
    "mask": (lambda x: fastattn.attention(x, x, x, mask=x.new_ones(x.shape[0], 1, 1, 4).bool()), (5, 2, 4, 16)),
    "length": (lambda x: fastattn.attention(*[x.transpose(0, 2)] * 3), (5, 2, 4, 16)),
    "layer_norm": (lambda x: fastattn.layer_norm(x, 16, residual=x)[0], (5, 16)),
    "softmax": (lambda x: fastattn.softmax(x, mask=torch.ones(16).bool()), (5, 16)),
    "swiglu": (lambda x: fastattn.swiglu(x, x), (5, 16)),
    "dropout_add": (lambda x: fastattn.dropout_add(x, x, dropout_p=0.0), (5, 16)),
    "encoder": (fastattn.nn.TransformerEncoderLayer(16, 2, batch_first=True, dropout=0.0), (5, 6, 16)),
    "weights": (lambda x: MHA(x, x, x, key_padding_mask=x.new_zeros(x.shape[:2]).bool())[0], (5, 6, 16)),
}
MHA = fastattn.nn.MultiheadAttention(16, 2, batch_first=True)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("name", OPEN)
def test_sizes_that_a_compiler_does_not_know(name: str, backend: str, monkeypatch):
    """The number of rows depends on data: nothing guards on it."""
    function, shape = OPEN[name]
    torch._dynamo.reset()
    (x,) = make_inputs(shape)
    leaf, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    chosen = torch.tensor([1, 0, 1, 1, 0])

    def call(x, chosen):
        return function(x[chosen.nonzero()[:, 0]])

    expected = call(plain, chosen)
    (gradient,) = torch.autograd.grad(expected.square().sum(), plain)
    order = ("eager", "reference")  # without kernels
    monkeypatch.setattr(backends, "ORDER", order if backend == "eager" else ("cpu", *order))
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        y = torch.compile(call, fullgraph=True, backend="aot_eager")(leaf, chosen)
    assert_near(y, expected)
    assert_near(torch.autograd.grad(y.square().sum(), leaf)[0], gradient)


def test_compiled_weights_of_any_length():
    torch._dynamo.reset()
    compiled = torch.compile(MHA, dynamic=True, fullgraph=True, backend="aot_eager")
    for L in (5, 7, 9):
        (x,) = make_inputs((2, L, 16))
        for ours, theirs in zip(compiled(x, x, x), MHA(x, x, x), strict=True):
            assert_near(ours, theirs)
        compiled(x, x, x)[0].sum().backward()
