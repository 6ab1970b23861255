"""Tensors that are not what they look like, and observers of a call: computed right, or refused by a sentence."""

from __future__ import annotations

import io
import sys

import pytest
import torch
import torch.nn.functional as F
from cpu_isas import NEEDS_MODULE
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import fastattn
from fastattn.errors import ArgumentError, ArgumentTypeError, NoMemoryError
from fastattn.testing import make_inputs
from fastattn.tracing import is_plain

S = 12
TARGET = torch.zeros(8 * S, dtype=torch.int64)
TABLES = torch.linspace(-1, 1, 2 * S * 8).view(2, S, 8)
CU_SEQLENS = torch.tensor([0, 5, S], dtype=torch.int32)

# name -> a function of x (2, 4, S, 16) and a backend
FUNCTIONS = {
    "attention": lambda x, b: fastattn.attention(x, x, x, causal=True, backend=b),
    "attention_with_mask": lambda x, b: fastattn.attention(x, x, x, mask=torch.ones(S, S).tril().bool(), backend=b),
    "varlen_attention": lambda x, b: fastattn.varlen_attention(
        *(t.transpose(0, 1) for t in (x[0], x[1], x[1])), CU_SEQLENS, CU_SEQLENS, 7, 7, backend=b
    ),
    "layer_norm": lambda x, b: fastattn.layer_norm(x, 16, backend=b),
    "rms_norm": lambda x, b: fastattn.rms_norm(x, 16, residual=x, backend=b)[0],
    "softmax": lambda x, b: fastattn.softmax(x, scale=0.5, backend=b),
    "log_softmax": lambda x, b: fastattn.log_softmax(x, backend=b),
    "cross_entropy": lambda x, b: fastattn.cross_entropy(x.flatten(0, 2), TARGET, backend=b),
    "linear_cross_entropy": lambda x, b: fastattn.linear_cross_entropy(x.flatten(0, 2), x[0, 0], TARGET, backend=b),
    "rotary_embedding": lambda x, b: fastattn.rotary_embedding(x, TABLES[0], TABLES[1], backend=b),
    "swiglu": lambda x, b: fastattn.swiglu(x, x + 1, backend=b),
    "geglu": lambda x, b: fastattn.geglu(x, x + 1, backend=b),
    "dropout_add": lambda x, b: fastattn.dropout_add(x, x, 0.0, backend=b),
    "encoder_layer": lambda x, b: LAYER(x[0]),
}
torch.manual_seed(0)
LAYER = fastattn.nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
EACH = pytest.mark.parametrize("name", FUNCTIONS)
BACKENDS = pytest.mark.parametrize("backend", ["triton", pytest.param("cpu", marks=NEEDS_MODULE), None])
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the constants are CPU tensors")


def inputs() -> list[Tensor]:
    return make_inputs(*[(2, 4, S, 16)] * 2)


@EACH
@BACKENDS
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_computes(name, backend, grad):
    """torch.jit.trace records what is computed, and not only the memory for it."""

    class Function(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = LAYER if name == "encoder_layer" else None

        def forward(self, x):
            return FUNCTIONS[name](x, backend)

    function = Function()
    x, y = (t.requires_grad_(grad) for t in inputs())
    traced = torch.jit.trace(function, (x,), check_trace=False)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    expected = function(y)
    for again in (traced, torch.jit.load(file)):
        torch.testing.assert_close(again(y), expected)
    if grad:
        (ours,) = torch.autograd.grad(traced(y).sum(), y)
        torch.testing.assert_close(ours, torch.autograd.grad(expected.sum(), y)[0])


@EACH
@BACKENDS
def test_gradients_of_a_batch_of_directions(name, backend):
    """is_grads_batched, which torch.autograd.functional.jacobian(vectorize=True) uses too."""
    x = inputs()[0].requires_grad_()
    o = FUNCTIONS[name](x, backend)
    directions = torch.randn(3, *o.shape, generator=torch.Generator().manual_seed(0))
    (batched,) = torch.autograd.grad(o, x, directions, is_grads_batched=True, retain_graph=True)
    for direction, gradient in zip(directions, batched, strict=True):
        torch.testing.assert_close(gradient, torch.autograd.grad(o, x, direction, retain_graph=True)[0])


WITHOUT_MEMORY = {
    "rms_norm: `weight`": lambda x, w, b: fastattn.rms_norm(x, 16, w, backend=b),
    "layer_norm: `weight`": lambda x, w, b: fastattn.layer_norm(x, 16, w, backend=b),
    "layer_norm: `bias`": lambda x, w, b: fastattn.layer_norm(x, 16, None, w, backend=b),
    "layer_norm: `x`": lambda x, w, b: fastattn.layer_norm(w, 16, backend=b),
    "cross_entropy: `weight`": lambda x, w, b: fastattn.cross_entropy(x, TARGET[:S], w, backend=b),
    "swiglu: `up`": lambda x, w, b: fastattn.swiglu(x[0], w, backend=b),
    "attention: `sinks`": lambda x, w, b: fastattn.attention(*[x.expand(1, 16, S, 16)] * 3, sinks=w, backend=b),
}


@BACKENDS
@pytest.mark.parametrize("case", WITHOUT_MEMORY)
def test_a_tensor_without_memory_is_refused(case, backend):
    """As a parameter of FSDP outside its module's forward: address 0 is no absent tensor."""
    x, w = make_inputs((S, 16), (16,))
    w.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=rf"{case} has shape \(16,\) and no memory|not allocated"):
        WITHOUT_MEMORY[case](x, w, backend)
    assert issubclass(NoMemoryError, (RuntimeError, ArgumentError))


@BACKENDS
def test_memory_freed_before_the_backward_is_refused(backend):
    q, k, v = (t.requires_grad_() for t in make_inputs(*[(1, 2, 20, 16)] * 3))
    o = fastattn.attention(q, k, v, backend=backend)
    k.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"`k` has shape|not allocated"):
        o.sum().backward()


def test_what_is_plain():
    t = torch.randn(4, 4)
    with torch.inference_mode():
        inference = torch.randn(4, 4)
    for plain in (t, torch.nn.Parameter(t), t.T, t[::2], inference, t.requires_grad_(), torch.randn(0)):
        assert is_plain(plain)
    peculiar = {
        "meta": torch.empty(2, device="meta"), "sparse": torch.eye(3).to_sparse(),
        "zeros": torch._efficientzerotensor(3), "negative": torch.randn(3, dtype=torch.complex64).conj().imag,
        "subclass": causal_upper_left(2, 2),
        "nested": torch.nested.nested_tensor([torch.randn(2), torch.randn(3)]),
    }  # fmt: skip
    assert {name for name, value in peculiar.items() if is_plain(value)} == set()


@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("S_q", "S_k"), [(9, 9), (6, 9), (200, 300)])
def test_causal_bias_objects(make, S_q, S_k):
    """torch.nn.attention.bias holds no numbers: it is read as what it means."""
    q, k, v = make_inputs((1, 2, S_q, 16), *[(1, 2, S_k, 16)] * 2)
    bias = make(S_q, S_k)
    expected = F.scaled_dot_product_attention(q, k, v, bias._materialize())
    torch.testing.assert_close(fastattn.scaled_dot_product_attention(q, k, v, bias), expected)
    compiled = torch.compile(lambda *x: fastattn.scaled_dot_product_attention(*x, bias), backend="eager")
    torch.testing.assert_close(compiled(q, k, v), expected)


def test_causal_bias_objects_that_do_not_fit():
    q, k = make_inputs((1, 2, 6, 16), (1, 2, 9, 16))
    with pytest.raises(ArgumentError, match="CausalBias should not be used with causal=True: `attn_mask` is one"):
        fastattn.scaled_dot_product_attention(q, q, q, causal_upper_left(6, 6), is_causal=True)
    with pytest.raises(ArgumentError, match="is a CausalBias for 5 queries and 9 keys; `query` has 6 and `key` has 9"):
        fastattn.scaled_dot_product_attention(q, k, k, causal_upper_left(5, 9))
    for name in ("mask", "bias"):
        with pytest.raises(ArgumentTypeError, match=f"`{name}` is a CausalBias, which holds no numbers"):
            fastattn.attention(q, k, k, **{name: causal_upper_left(6, 9)})


@pytest.mark.parametrize("backend", ["triton", "eager", "reference"])
@pytest.mark.parametrize("side", [2**31 - 1, 2**31, 2**62 - 1, 2**62, sys.maxsize, 2**63, 2**64, 10**30])
def test_a_window_wider_than_int64_hides_nothing(side, backend, device):
    q, k = make_inputs((1, 2, 20, 16), (1, 2, 30, 16), device=device)
    expected = fastattn.attention(q, k, k, backend=backend)
    for window in ((side, None), (None, side), (side, side)):
        torch.testing.assert_close(fastattn.attention(q, k, k, window=window, backend=backend), expected)
        for dtype in (torch.float32, torch.float64):
            reference = fastattn.attention(q.to(dtype), k.to(dtype), k.to(dtype), window=window, backend="reference")
            torch.testing.assert_close(reference.to(expected.dtype), expected)


def test_integers_and_truth_values_of_numpy():
    """torch takes them wherever it takes Python's."""
    numpy = pytest.importorskip("numpy")
    q, k = make_inputs((1, 4, 6, 16), (1, 2, 9, 16))
    assert torch.equal(
        fastattn.attention(q, k, k, window=(numpy.int64(2), numpy.int32(1))), fastattn.attention(q, k, k, window=(2, 1))
    )
    assert torch.equal(fastattn.attention(q, q, q, causal=numpy.True_), fastattn.attention(q, q, q, causal=True))
    sdpa = fastattn.scaled_dot_product_attention
    assert torch.equal(
        sdpa(q, k, k, is_causal=numpy.True_, enable_gqa=numpy.True_), sdpa(q, k, k, is_causal=True, enable_gqa=True)
    )
    assert torch.equal(fastattn.softmax(q, numpy.int64(1)), fastattn.softmax(q, 1))
    for shape in (numpy.int64(16), (numpy.int64(6), numpy.int32(16)), [numpy.int64(16)]):
        plain = int(shape) if not isinstance(shape, (tuple, list)) else tuple(map(int, shape))
        assert torch.equal(fastattn.layer_norm(q, shape), fastattn.layer_norm(q, plain))
        assert torch.equal(fastattn.rms_norm(q, shape), fastattn.rms_norm(q, plain))
    logits, target = q[0, 0], torch.tensor([0, 3, 2, 3, 1, 0])
    for function, first in ((fastattn.cross_entropy, (logits,)), (fastattn.linear_cross_entropy, (logits, k[0, 0]))):
        assert torch.equal(
            function(*first, target, ignore_index=numpy.int64(3)), function(*first, target, ignore_index=3)
        )
        with pytest.raises(ArgumentError, match="`ignore_index` is 1180591620717411303424; it must fit into 64 bits"):
            function(*first, target, ignore_index=2**70)
    for wrong in (True, numpy.True_, 1.0, numpy.float64(1.0), "1", torch.tensor(1.0), torch.tensor([1])):
        with pytest.raises(ArgumentTypeError, match="`dim` is"):
            fastattn.softmax(q, wrong)


def test_numbers_in_tensors():
    """torch takes a tensor of no dimension for a number; its value counts at each call."""
    q = make_inputs((1, 4, 6, 16))[0]
    number = torch.tensor(0.5)
    for function in (
        lambda a: fastattn.attention(q, q, q, scale=a),
        lambda a: fastattn.scaled_dot_product_attention(q, q, q, scale=a),
        lambda a: fastattn.layer_norm(q, 16, eps=a),
        lambda a: fastattn.rms_norm(q, 16, eps=a),
        lambda a: fastattn.nn.LayerNorm(16, eps=a)(q),
        lambda a: fastattn.softmax(q, scale=a),
        lambda a: fastattn.cross_entropy(q[0, 0], torch.arange(6), label_smoothing=a),
    ):
        for value in (0.5, 0.25):
            assert torch.equal(function(number.fill_(value)), function(value))
        with pytest.raises(TypeError):
            function(torch.tensor(0.5, requires_grad=True))
    assert torch.equal(fastattn.softmax(q, torch.tensor(1)), fastattn.softmax(q, 1))
    assert torch.equal(fastattn.layer_norm(q, (torch.tensor(16),)), fastattn.layer_norm(q, 16))


@pytest.mark.parametrize("backend", ["cpu", "triton", "eager", "reference"])
@pytest.mark.parametrize("function", [fastattn.softmax, fastattn.log_softmax], ids=["softmax", "log_softmax"])
def test_dtype_of_softmax(function, backend):
    theirs = getattr(torch.nn.functional, function.__name__)
    for x in (torch.randn(3, 40).half(), torch.randint(-3, 3, (3, 40))):
        y = function(x, -1, dtype=torch.float32, backend=backend)
        torch.testing.assert_close(y, theirs(x, -1, dtype=torch.float32))
    leaf = torch.randn(3, 40).half().requires_grad_()
    grads = [torch.autograd.grad(f(leaf, -1, dtype=torch.float32)[:, 0].sum(), leaf) for f in (function, theirs)]
    torch.testing.assert_close(*grads)
    assert fastattn.explain(function, leaf, dtype=torch.float32).spec.dtype == torch.float32
    with pytest.raises(ArgumentTypeError, match="`dtype` has dtype int32"):
        function(leaf, dtype=torch.int32)
    with pytest.raises(ArgumentError, match="`inplace` writes over x, which is float16; `dtype` is float32"):
        function(leaf.detach(), dtype=torch.float32, inplace=True)


@pytest.mark.parametrize("gqa", [False, True])
@pytest.mark.parametrize(
    "shapes",
    [
        ((4, 6, 16), (2, 9, 16), (2, 9, 8)),
        ((4, 6, 16), (4, 9, 16), (4, 9, 8)),
        ((3, 4, 6, 16), (3, 4, 9, 16), (1, 4, 9, 8)),
        ((3, 4, 6, 16), (1, 4, 9, 16), (3, 4, 9, 8)),
    ],
    ids=str,
)
def test_shapes_that_torch_takes(shapes, gqa):
    """Grouped heads without a batch; a batch of one of the three alone."""
    q, k, v = make_inputs(*shapes)
    if not gqa and q.shape[-3] != k.shape[-3]:
        with pytest.raises(ArgumentError):
            fastattn.scaled_dot_product_attention(q, k, v)
        return
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)
    torch.testing.assert_close(fastattn.scaled_dot_product_attention(q, k, v, enable_gqa=gqa), expected)


@pytest.mark.parametrize("function", [fastattn.softmax, fastattn.log_softmax], ids=lambda f: f.__name__)
def test_an_inference_tensor_is_written_over_in_inference_mode_alone(function):
    with torch.inference_mode():
        x = torch.randn(4, 40)
        expected = function(x)
        assert function(x.clone(), inplace=True).equal(expected)
    with pytest.raises(ArgumentError, match="`x` is an inference tensor"):
        function(x, inplace=True)


CLASSES = torch.tensor([0, 9, 1])
# name -> a call that is wrong, of this library's functions and of torch's
RAISED_BY_TORCH = {
    "a dimension of softmax": lambda f, x: f.softmax(x, 5),
    "a dimension of log_softmax": lambda f, x: f.log_softmax(x, -4),
    "a class": lambda f, x: f.cross_entropy(x[0], CLASSES),
    "a width": lambda f, x: f.layer_norm(x, (5,)),
    "a width of weight": lambda f, x: f.rms_norm(x, (4,), torch.ones(3)),
    "lengths": lambda f, x: f.scaled_dot_product_attention(x, x, x[:, :2]),
    "dtypes": lambda f, x: f.scaled_dot_product_attention(x, x.half(), x),
}


@pytest.mark.parametrize("case", RAISED_BY_TORCH)
def test_what_torch_raises_is_caught_by_the_same_clause(case):
    (x,) = make_inputs((2, 3, 4))
    with pytest.raises((IndexError, RuntimeError)) as raised:
        RAISED_BY_TORCH[case](F, x)
    with pytest.raises(raised.type, match="`"):
        RAISED_BY_TORCH[case](fastattn, x)
