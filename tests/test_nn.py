"""What a torch.nn module can do besides being called: ours can too. And LayerNorm and Softmax against torch's."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch
from module_parity import (
    BOOL_CAUSAL,
    CROSS,
    FF,
    FLOAT_CAUSAL,
    MEMORY_PAD,
    PAD,
    SOME_FLOAT,
    E,
    H,
    L,
    N,
    S,
    assert_as_accurate,
    assert_same,
    build,
    run,
    sequences,
    stack,
    through_meta,
    through_pickle,
    through_torch_save,
)
from torch import nn
from torch.utils._pytree import tree_leaves

import fastattn.nn as ours

# torch explains at construction why it will not use its nested tensors; that is not under test.
pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")

MODULES = {
    "MultiheadAttention": [(E, H), {}],
    "MultiheadAttention_kdim": [(E, H), {"kdim": 6, "vdim": 3, "add_bias_kv": True, "bias": False}],
    "MultiheadAttention_bias_kv": [(E, H), {"add_bias_kv": True, "add_zero_attn": True}],
    "LayerNorm": [((3, E),), {"eps": 1e-3}],
    "LayerNorm_no_bias": [(E,), {"bias": False}],
    "LayerNorm_plain": [(E,), {"elementwise_affine": False}],
    "Softmax": [(-1,), {}],
    "TransformerEncoderLayer": [(E, H, FF), {}],
    "TransformerEncoderLayer_no_bias": [(E, H, FF), {"bias": False, "norm_first": True, "batch_first": True}],
    "TransformerDecoderLayer": [(E, H, FF), {"layer_norm_eps": 1e-3}],
    "TransformerDecoderLayer_no_bias": [(E, H, FF), {"bias": False, "activation": "gelu"}],
    "Transformer": [(E, H, 2, 2, FF), {}],
    "Transformer_no_bias": [(E, H, 1, 1, FF), {"bias": False, "norm_first": True}],
}


@pytest.mark.parametrize("name", MODULES)
def test_same_seed_gives_the_same_parameters(name):
    args, kwargs = MODULES[name]
    name = name.split("_")[0]
    torch.manual_seed(5)
    theirs = getattr(nn, name)(*args, **kwargs)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    mine = getattr(ours, name)(*args, **kwargs)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    for (key, p), q in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q), key
    assert isinstance(mine, type(theirs))
    assert repr(mine) == repr(theirs)


@pytest.mark.parametrize("name", sorted(name for name in ours.__all__ if hasattr(nn, name)))
def test_signatures_are_torchs(name):
    """What ours add can only be given by name, and need not be given."""
    for method in ("__init__", "forward"):
        theirs, mine = (inspect.signature(getattr(getattr(library, name), method)) for library in (nn, ours))
        n = len(theirs.parameters)
        parameters = [(p.name, p.kind, p.default) for p in mine.parameters.values()]
        assert parameters[:n] == [(p.name, p.kind, p.default) for p in theirs.parameters.values()]
        assert all(kind is inspect.Parameter.KEYWORD_ONLY and not default for _, kind, default in parameters[n:])


@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
def test_stacks_have_the_same_parameters(kind):
    torch.manual_seed(5)
    theirs = stack(nn, kind)
    torch.manual_seed(5)
    mine = stack(ours, kind)
    assert isinstance(mine, type(theirs))
    torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    assert repr(mine) == repr(theirs)


@pytest.mark.parametrize("name", MODULES)
def test_every_child_is_ours(name):
    args, kwargs = MODULES[name]
    for child in getattr(ours, name.split("_")[0])(*args, **kwargs).modules():
        if isinstance(child, (nn.MultiheadAttention, nn.LayerNorm, nn.TransformerEncoderLayer, nn.TransformerEncoder)):
            assert type(child).__module__.startswith("fastattn.nn"), child


@pytest.mark.parametrize("name", MODULES)
def test_state_dicts_are_interchangeable(name):
    args, kwargs = MODULES[name]
    name = name.split("_")[0]
    theirs, mine = getattr(nn, name)(*args, **kwargs), getattr(ours, name)(*args, **kwargs)
    mine.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    other = getattr(ours, name)(*args, **kwargs)
    theirs.load_state_dict(other.state_dict())
    torch.testing.assert_close(theirs.state_dict(), other.state_dict(), rtol=0, atol=0)


COPIED = ("MultiheadAttention", "LayerNorm", "Softmax", "TransformerEncoderLayer", "Transformer")


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save, through_meta])
@pytest.mark.parametrize("name", COPIED)
def test_copies_compute_the_same(name, copied):
    args, kwargs = MODULES[name]
    torch.manual_seed(0)
    module = getattr(ours, name)(*args, **kwargs).double().eval()
    copy_ = copied(module)
    assert type(copy_) is type(module)
    copy_.load_state_dict(module.state_dict())
    x = torch.randn(3, N, E, dtype=torch.float64).transpose(0, 1)
    inputs = {"MultiheadAttention": 3, "Transformer": 2}.get(name, 1)
    torch.testing.assert_close(copy_(*[x] * inputs), module(*[x] * inputs), rtol=0, atol=0)


@pytest.mark.parametrize("name", MODULES)
def test_construction_on_the_meta_device(name):
    args, kwargs = MODULES[name]
    module_class = getattr(ours, name.split("_")[0])
    with torch.device("meta"):
        module = module_class(*args, **kwargs)
    assert all(p.is_meta for p in module.parameters())
    real = module_class(*args, **kwargs)
    module.load_state_dict(real.state_dict(), assign=True)
    assert not any(p.is_meta for p in module.parameters())


@pytest.mark.parametrize("name", ["MultiheadAttention", "TransformerEncoderLayer"])
def test_autocast(name, device):
    theirs, mine = (module.to(device) for module in build(name, 16, H, dropout=0.0))
    args = [torch.randn(L, N, 16).to(device)] * (3 if name == "MultiheadAttention" else 1)
    exact = tree_leaves(theirs(*args))
    with torch.autocast(device.type, torch.bfloat16):
        expected, result = tree_leaves(theirs(*args)), tree_leaves(mine(*args))
    for truth, reference, output in zip(exact, expected, result, strict=True):
        assert output.dtype == reference.dtype
        floor = torch.finfo(torch.bfloat16).eps * truth.abs().max()
        assert (output - truth).abs().max() <= 2 * (reference - truth).abs().max() + floor


# LayerNorm and Softmax


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["LayerNorm", "LayerNorm_no_bias", "LayerNorm_plain", "Softmax"])
def test_row_modules(name, dtype, device):
    args, kwargs = MODULES[name]
    theirs, mine = (module.to(device, dtype) for module in build(name.split("_")[0], *args, **kwargs))
    x = torch.randn(20, 3, E, dtype=dtype).to(device).requires_grad_()
    if dtype == torch.float64:
        assert_same(theirs, mine, (x,), {})
    else:
        assert_as_accurate([(theirs, mine, (x,), {})])


@pytest.mark.parametrize("shape", [(), (3,), (3, 4), (2, 3, 4), (2, 3, 4, 5)], ids=str)
def test_softmax_without_dim_chooses_as_torch_does(shape):
    x = torch.randn(shape, dtype=torch.float64)
    with pytest.warns(UserWarning, match="Implicit dimension"):
        expected = nn.Softmax()(x)
    with pytest.warns(UserWarning, match="pass dim") as record:
        result = ours.Softmax()(x)
    torch.testing.assert_close(result, expected)
    assert record[0].filename == __file__


def test_layer_norm_of_a_nested_batch():
    theirs, mine = build("LayerNorm", E, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = torch.nested.nested_tensor([torch.randn(n, E, dtype=torch.float64) for n in (2, 3)])
    torch.testing.assert_close(mine(x).unbind(), theirs(x).unbind())


# Compilation

EXACT = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64}
COMPILED = {
    "attention": (lambda: ours.MultiheadAttention(E, H, **EXACT), (L,), {"need_weights": False}),
    "attention_weights": (lambda: ours.MultiheadAttention(E, H, **EXACT), (L, S), {"attn_mask": CROSS}),
    "attention_head_weights": (
        lambda: ours.MultiheadAttention(E, H, add_bias_kv=True, **EXACT),
        (L,),
        {"average_attn_weights": False, "attn_mask": SOME_FLOAT, "key_padding_mask": PAD},
    ),
    "attention_hint": (
        lambda: ours.MultiheadAttention(E, H, **EXACT),
        (L,),
        {"need_weights": False, "attn_mask": BOOL_CAUSAL, "is_causal": True},
    ),
    "encoder_layer": (
        lambda: ours.TransformerEncoderLayer(E, H, FF, **EXACT),
        (L,),
        {"src_mask": BOOL_CAUSAL, "src_key_padding_mask": PAD},
    ),
    "decoder_layer": (
        lambda: ours.TransformerDecoderLayer(E, H, FF, norm_first=True, **EXACT),
        (L, S),
        {"tgt_mask": BOOL_CAUSAL, "tgt_is_causal": True},
    ),
    "transformer": (
        lambda: ours.Transformer(E, H, 1, 1, FF, **EXACT),
        (S, L),
        {"tgt_mask": FLOAT_CAUSAL, "src_key_padding_mask": MEMORY_PAD},
    ),
    "layer_norm": (lambda: ours.LayerNorm(E, dtype=torch.float64), (L,), {}),
    "softmax": (lambda: ours.Softmax(-1), (L,), {}),
    "sinusoidal": (lambda: ours.SinusoidalPositionalEncoding(E), (L,), {"offset": 2}),
    "learned": (lambda: ours.LearnedPositionalEncoding(8, E, dtype=torch.float64), (L,), {}),
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", COMPILED)
def test_modules_compile_without_a_graph_break(name, train):
    make, lengths, kwargs = COMPILED[name]
    torch._dynamo.reset()
    module = make().train(train)
    args = sequences(True, *lengths)
    if isinstance(module, nn.MultiheadAttention):
        args = (args[0], args[-1], args[-1])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(train):
        if train:
            assert_same(module, compiled, args, kwargs)
        else:
            torch.testing.assert_close(compiled(*args, **kwargs), module(*args, **kwargs))


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_compiles_without_a_graph_break(need_weights):
    torch._dynamo.reset()
    module = ours.MultiheadAttention(E, H, dropout=0.5, dtype=torch.float64)
    (x,) = sequences(False, L)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    outputs, grads = run(compiled, (x, x, x), {"need_weights": need_weights})
    assert len(grads) == 3 + len(list(module.parameters()))  # x counts as query, key and value
    assert not torch.equal(compiled(x, x, x)[0], outputs[0])
    module.dropout = 0.0  # a number that has changed once is one that the compiler no longer bakes in
    torch.testing.assert_close(compiled(x, x, x), module(x, x, x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_new_length_is_no_new_graph(dtype):
    torch._dynamo.reset()
    layer = ours.TransformerEncoderLayer(16, H, FF, batch_first=True, dtype=dtype).eval()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(torch.randn(N, 5, 16, dtype=dtype))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (6, 9, 17):
            x = torch.randn(N, length, 16, dtype=dtype)
            torch.testing.assert_close(compiled(x), layer(x))
