"""Encoder and decoder stacks against torch.nn's, in training and in evaluation."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from module_parity import (
    BOOL_CAUSAL,
    CROSS,
    FF,
    FLOAT_CAUSAL,
    MEMORY_PAD,
    PAD,
    SOME_BOOL,
    SOME_FLOAT,
    E,
    H,
    L,
    N,
    S,
    assert_same_in_training_and_evaluation,
    build,
    sequences,
    stack,
)
from torch import Tensor, nn

import fastattn.nn as ours
from fastattn.nn import attention as attention_module
from fastattn.nn import weights as weights_module

# torch explains at construction why it will not use its nested tensors; that is not under test.
pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")

ENCODER_CALLS = {
    "plain": {},
    "bool_mask": {"src_mask": SOME_BOOL},
    "float_mask": {"src_mask": SOME_FLOAT},
    "mask_3d": {"src_mask": torch.stack([SOME_BOOL, SOME_BOOL.T] * N)},
    "padding": {"src_key_padding_mask": PAD},
    "bool_mask_and_padding": {"src_mask": SOME_BOOL, "src_key_padding_mask": PAD},
    "causal": {"src_mask": BOOL_CAUSAL},
    "float_causal": {"src_mask": FLOAT_CAUSAL},
    "hint": {"src_mask": FLOAT_CAUSAL, "is_causal": True},
    "hint_and_padding": {"src_mask": BOOL_CAUSAL, "src_key_padding_mask": PAD, "is_causal": True},
}
DECODER_CALLS = {
    "plain": {},
    "masks": {"tgt_mask": SOME_BOOL, "memory_mask": CROSS},
    "paddings": {"tgt_key_padding_mask": PAD, "memory_key_padding_mask": MEMORY_PAD},
    "all_masks": {
        "tgt_mask": BOOL_CAUSAL,
        "memory_mask": CROSS,
        "tgt_key_padding_mask": PAD,
        "memory_key_padding_mask": MEMORY_PAD,
    },
    "float_causal": {"tgt_mask": FLOAT_CAUSAL},
    "hints": {"tgt_mask": BOOL_CAUSAL, "memory_mask": torch.ones(L, S, dtype=torch.bool).triu(1), "tgt_is_causal": True,
              "memory_is_causal": True},
}  # fmt: skip


STYLES = list(itertools.product([False, True], [False, True]))
style = pytest.mark.parametrize(("norm_first", "batch_first"), STYLES, ids=lambda value: str(value)[0])


@style
@pytest.mark.parametrize("call", ENCODER_CALLS)
def test_encoder_layer_equals_torch(norm_first, batch_first, call):
    theirs, mine = build(
        "TransformerEncoderLayer", E, H, FF, 0.0, F.gelu, 1e-3, batch_first, norm_first, dtype=torch.float64
    )
    assert_same_in_training_and_evaluation(theirs, mine, sequences(batch_first, L), ENCODER_CALLS[call])


@style
@pytest.mark.parametrize("call", DECODER_CALLS)
def test_decoder_layer_equals_torch(norm_first, batch_first, call):
    theirs, mine = build(
        "TransformerDecoderLayer", E, H, FF, 0.0, "gelu", 1e-3, batch_first, norm_first, dtype=torch.float64
    )
    assert_same_in_training_and_evaluation(theirs, mine, sequences(batch_first, L, S), DECODER_CALLS[call])


@pytest.mark.parametrize("options", [{"bias": False}, {"activation": nn.SiLU()}, {"activation": "relu"}], ids=str)
@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
def test_layer_options(kind, options):
    theirs, mine = build(f"Transformer{kind}Layer", E, H, FF, dropout=0.0, dtype=torch.float64, **options)
    args = sequences(False, L, S, batched=False)
    assert_same_in_training_and_evaluation(theirs, mine, args[: 1 + (kind == "Decoder")], {})


@style
@pytest.mark.parametrize("call", ENCODER_CALLS)
def test_encoder_equals_torch(norm_first, batch_first, call):
    theirs, mine = (stack(library, "Encoder", 2, batch_first, norm_first) for library in (nn, ours))
    mine.load_state_dict(theirs.state_dict())
    kwargs = {{"src_mask": "mask"}.get(name, name): value for name, value in ENCODER_CALLS[call].items()}
    assert_same_in_training_and_evaluation(theirs, mine, sequences(batch_first, L), kwargs)


@style
@pytest.mark.parametrize("call", DECODER_CALLS)
def test_decoder_equals_torch(norm_first, batch_first, call):
    theirs, mine = (stack(library, "Decoder", 2, batch_first, norm_first) for library in (nn, ours))
    mine.load_state_dict(theirs.state_dict())
    assert_same_in_training_and_evaluation(theirs, mine, sequences(batch_first, L, S), DECODER_CALLS[call])


TRANSFORMER_CALLS = {
    "plain": {},
    "causal_target": {"tgt_mask": FLOAT_CAUSAL, "tgt_is_causal": True},
    "all_masks": {
        "src_mask": torch.eye(S, dtype=torch.bool).roll(1, 0),
        "tgt_mask": BOOL_CAUSAL,
        "memory_mask": CROSS,
        "src_key_padding_mask": MEMORY_PAD,
        "tgt_key_padding_mask": PAD,
        "memory_key_padding_mask": MEMORY_PAD,
    },
}


@style
@pytest.mark.parametrize("call", TRANSFORMER_CALLS)
def test_transformer_equals_torch(norm_first, batch_first, call):
    theirs, mine = build(
        "Transformer", E, H, 1, 1, FF, 0.0, batch_first=batch_first, norm_first=norm_first, dtype=torch.float64
    )
    assert_same_in_training_and_evaluation(theirs, mine, sequences(batch_first, S, L), TRANSFORMER_CALLS[call])


def test_transformer_of_custom_stacks():
    encoder, decoder = stack(ours, "Encoder"), stack(ours, "Decoder")
    model = ours.Transformer(E, H, custom_encoder=encoder, custom_decoder=decoder, batch_first=True)
    assert model.encoder is encoder
    assert model.decoder is decoder
    src, tgt = sequences(True, S, L)
    torch.testing.assert_close(model(src, tgt), decoder(tgt, encoder(src)))


def test_transformer_refuses_as_torch_does():
    model = ours.Transformer(E, H, 1, 1, FF, batch_first=True)
    with pytest.raises(RuntimeError, match="batch number"):
        model(torch.zeros(2, S, E), torch.zeros(3, L, E))
    with pytest.raises(RuntimeError, match="relu/gelu"):
        ours.TransformerEncoderLayer(E, H, activation="tanh")
    with pytest.raises(RuntimeError, match="attn_mask is needed"):
        model.encoder(torch.zeros(2, S, E), is_causal=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bool])
def test_causal_masks_are_recognised(dtype, monkeypatch):
    """A mask that is the causal one runs the causal kernel in every layer; one that is not, does not."""
    seen = []

    def spy(q, k, v, *, causal, mask, bias, dropout_p):
        seen.append((causal, mask is None and bias is None))
        return v

    monkeypatch.setattr(attention_module, "attention", spy)
    causal = nn.Transformer.generate_square_subsequent_mask(L, dtype=dtype)
    (x,) = sequences(True, L)
    stack(ours, "Encoder")(x, mask=causal)
    stack(ours, "Decoder", depth=1)(x, x, tgt_mask=causal)
    assert seen == [("top_left", True), ("top_left", True), ("top_left", True), (False, True)]
    seen.clear()
    stack(ours, "Encoder", depth=1)(x, mask=causal.T.contiguous())
    stack(ours, "Encoder", depth=1)(x, mask=causal, is_causal=False)
    assert seen == [(False, False), (False, False)]


# torch's inference kernels, which reada layer's weights and call no module


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Grows by one whenever our attention is called; torch's inference kernels fail."""
    seen: list[int] = []

    def spy(q, *args, **kwargs):
        seen.append(q.shape[1])
        return attention(q, *args, **kwargs)

    attention = attention_module.attention
    monkeypatch.setattr(attention_module, "attention", spy)
    monkeypatch.setattr(weights_module, "attention", spy)
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", _forbidden)
    monkeypatch.setattr(torch, "_native_multi_head_attention", _forbidden)
    return seen


def _forbidden(*args, **kwargs):
    raise AssertionError("torch's inference kernel was called")


def _torch_layer_with_our_attention() -> nn.TransformerEncoderLayer:
    layer = nn.TransformerEncoderLayer(E, H, FF, dropout=0.0, batch_first=True, dtype=torch.float64)
    layer.self_attn = ours.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64)
    return layer


def _our_layer() -> nn.TransformerEncoderLayer:
    return ours.TransformerEncoderLayer(E, H, FF, dropout=0.0, batch_first=True, dtype=torch.float64)


INFERENCE = {
    "our_layer": (_our_layer, 1),
    "our_encoder": (lambda: stack(ours, "Encoder"), 2),
    "our_layer_in_torch_encoder": (lambda: nn.TransformerEncoder(_our_layer(), 2), 2),
    "our_attention_in_torch_layer": (_torch_layer_with_our_attention, 1),
    "our_attention_in_torch_encoder": (lambda: nn.TransformerEncoder(_torch_layer_with_our_attention(), 2), 2),
    "our_transformer": (lambda: ours.Transformer(E, H, 3, 1, FF, batch_first=True, dtype=torch.float64).encoder, 3),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("name", INFERENCE)
def test_inference_runs_our_kernels(calls, name, padding):
    make, expected = INFERENCE[name]
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    (x,) = sequences(True, L)
    kwargs = {"src_key_padding_mask": PAD} if padding else {}
    training = model(x, **kwargs)
    assert len(calls) == expected
    with torch.no_grad():
        evaluation = model.eval()(x, **kwargs)
    assert len(calls) == 2 * expected
    visible = ~PAD if padding else torch.ones_like(PAD)  # torch's encoder writes 0 over padding when evaluating
    torch.testing.assert_close(evaluation[visible], training[visible])


def test_torch_encoder_does_not_nest_for_our_layer(monkeypatch):
    """It would, for a layer of its own: our kernel handles padding, and nesting would pad and unpad in each layer."""
    monkeypatch.setattr(torch, "_nested_tensor_from_mask", _forbidden)
    (x,) = sequences(True, L)
    ours_within = nn.TransformerEncoder(_our_layer(), 2).eval()
    torchs_own = stack(nn, "Encoder").eval()
    with torch.no_grad():
        ours_within(x, src_key_padding_mask=PAD)
        with pytest.raises(AssertionError, match="inference kernel"):
            torchs_own(x, src_key_padding_mask=PAD)


def test_evaluation_of_attention_runs_our_kernel(calls):
    mha = ours.MultiheadAttention(E, H, batch_first=True).eval()
    x = torch.randn(N, L, E)
    with torch.inference_mode():
        mha(x, x, x, need_weights=False)
    assert len(calls) == 1


LAYERS = pytest.mark.parametrize("kind", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
NORM_FIRST = pytest.mark.parametrize("norm_first", [False, True], ids=["post_norm", "pre_norm"])


def layer_and_inputs(kind: str, device: torch.device, **options) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    layer = getattr(ours, kind)(16, 2, 32, batch_first=True, device=device, **options)
    x = torch.randn(2, 5, 16, device=device)
    return layer, (x,) if "Encoder" in kind else (x, torch.randn(2, 7, 16, device=device))


@LAYERS
@NORM_FIRST
@pytest.mark.parametrize("training", [False, True])
def test_sums_and_dropout_are_fused_with_the_norms(kind, norm_first, training, device, monkeypatch):
    """Every residual sum that a norm of the layer follows, and its dropout, are one kernel."""
    from fastattn.backends import triton

    calls = []
    forward = triton.norm_forward
    monkeypatch.setattr(triton, "norm_forward", lambda *args: calls.append(args[-1]) or forward(*args))
    layer, inputs = layer_and_inputs(kind, device, dropout=0.25, norm_first=norm_first)
    layer.train(training)(*inputs)
    branches = 2 if "Encoder" in kind else 3
    fused = [spec for spec in calls if spec.residual]
    assert len(fused) == branches - norm_first
    assert len(calls) == branches
    assert all(spec.dropout_p == (0.25 if training else 0.0) for spec in fused)


@LAYERS
@NORM_FIRST
def test_layers_call_what_a_user_has_replaced(kind, norm_first, device):
    """Hooks on dropouts and norms, norms of another kind, and overridden blocks have their say."""
    layer, inputs = layer_and_inputs(kind, device, dropout=0.25, norm_first=norm_first)
    plain = layer.eval()(*inputs)
    seen = []
    for name, child in layer.named_children():
        if name.startswith(("norm", "dropout")) and name != "dropout":
            child.register_forward_hook(lambda module, args, output, name=name: seen.append(name))
    hooked = layer(*inputs)
    torch.testing.assert_close(hooked, plain)
    assert sorted(seen) == sorted(name for name, _ in layer.named_children() if name[-1] in "123" and name[0] in "dn")

    layer, _ = layer_and_inputs(kind, device, dropout=0.0, norm_first=norm_first)
    layer.norm2 = nn.Identity()
    torch.testing.assert_close(layer(*inputs), as_torch(layer, kind)(*inputs))

    class Silent(type(layer)):
        def _ff_block(self, x):
            return torch.zeros_like(x)

    layer.__class__ = Silent
    feed_forward_is_gone = layer(*inputs)
    layer.linear2.weight.data.zero_()
    layer.linear2.bias.data.zero_()
    layer.__class__ = getattr(ours, kind)
    torch.testing.assert_close(layer(*inputs), feed_forward_is_gone)


def as_torch(layer: nn.Module, kind: str) -> nn.Module:
    """The same layer with the forward of torch's class, over our children."""
    theirs = getattr(nn, kind)(16, 2, 32, batch_first=True, dropout=0.0, norm_first=layer.norm_first)
    theirs.norm2 = nn.Identity()
    theirs.load_state_dict(layer.state_dict())
    return theirs.to(next(layer.parameters()).device)


@LAYERS
def test_layers_call_what_a_user_has_put_on_an_instance_or_on_all_modules(kind, device):
    layer, inputs = layer_and_inputs(kind, device, dropout=0.0)
    theirs = getattr(nn, kind)(16, 2, 32, batch_first=True, dropout=0.0).to(device)
    theirs.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(*inputs), theirs(*inputs))
    for module in (layer, theirs):
        module.dropout1.forward = lambda x: x * 2
        module.norm2.forward = lambda x: x + 1
        module._ff_block = lambda x: x * 0.5
    torch.testing.assert_close(layer(*inputs), theirs(*inputs))

    def double(module, args, output):
        return output * 2 if isinstance(module, nn.LayerNorm) else None

    handle = nn.modules.module.register_module_forward_hook(double)
    try:
        torch.testing.assert_close(layer(*inputs), theirs(*inputs))
    finally:
        handle.remove()


class Seen(Exception):
    """Carries the arguments of an extension point."""


def _raise(*args, **kwargs):
    raise Seen(*args, kwargs)


def _own_block(layer):
    layer.__class__ = type(
        "Own", (type(layer),), {"_sa_block": lambda self, x, *masks, is_causal: _raise(*masks, is_causal)}
    )


def _own_attention(layer):
    class Attention(nn.MultiheadAttention):
        def forward(self, query, key, value, **given):
            _raise(given["attn_mask"], given["key_padding_mask"], given["is_causal"])

    layer.self_attn = Attention(E, H, batch_first=True)


def _hooked_attention(layer):
    def hook(module, args, given):
        _raise(given["attn_mask"], given["key_padding_mask"], given["is_causal"])

    layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True)


def _own_forward(layer):
    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        _raise(src_mask, src_key_padding_mask, is_causal)

    layer.__class__ = type("Own", (type(layer),), {"forward": forward})


def _hooked_layer(layer):
    def hook(module, args, given):
        _raise(given["src_mask"], given["src_key_padding_mask"], given["is_causal"])

    layer.register_forward_pre_hook(hook, with_kwargs=True)


@pytest.mark.parametrize("masks", ["bool", "float", "none"])
@pytest.mark.parametrize("change", [_own_block, _own_attention, _hooked_attention, _own_forward, _hooked_layer])
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_an_extension_point_receives_the_masks_that_torch_hands_it(change, masks):
    """Floating-point ones: a bool mask that a user's own block adds to a bias of the scores would show the future."""
    x = torch.randn(N, L, E)
    mask = {"bool": BOOL_CAUSAL, "float": FLOAT_CAUSAL.float(), "none": None}[masks]
    padding = None if masks == "none" else PAD
    seen = []
    for library in (nn, ours):
        layer = library.TransformerEncoderLayer(E, H, FF, dropout=0.0, batch_first=True)
        change(layer)
        encoder = library.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        for module in (encoder, layer):
            if module is layer and change is _hooked_layer:
                continue
            with pytest.raises(Seen) as raised:
                module(x, mask, src_key_padding_mask=padding)
            seen.append(raised.value.args[:3])
    half = len(seen) // 2
    for theirs, mine in zip(seen[:half], seen[half:], strict=True):
        assert theirs[2] == mine[2]
        for expected, given in zip(theirs[:2], mine[:2], strict=True):
            assert (expected is None) == (given is None)
            if expected is not None:
                assert given.dtype == expected.dtype
                assert torch.equal(given, expected)


def test_a_block_that_adds_a_bias_to_a_bool_mask_does_not_show_the_future():
    class Relative(ours.TransformerEncoderLayer):
        def _sa_block(self, x, attn_mask, key_padding_mask, is_causal=False):
            bias = torch.linspace(-1, 1, L * L).view(L, L)
            return self.self_attn(x, x, x, attn_mask=attn_mask + bias, need_weights=False)[0]

    torch.manual_seed(0)
    layer = Relative(E, H, FF, dropout=0.0, batch_first=True)
    x = torch.randn(N, L, E)
    later = x.clone()
    later[:, 1:] += 1.0
    outputs = [layer(t, BOOL_CAUSAL)[:, 0] for t in (x, later)]
    torch.testing.assert_close(*outputs)
